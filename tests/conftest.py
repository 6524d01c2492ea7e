"""What all tests share; and their marks can be asked for, which is what the conformance table is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves test modules without h323_messages


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--marks-to",
        metavar="FILE",
        help='with --collect-only: writes {requirement: [["tests/unit/test_x.py", "test_y"], …]} as JSON',
    )


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cert.pem and key.pem, for localhost."""
    folder = tmp_path_factory.mktemp("tls")
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-keyout", folder / "key.pem"]
    made = ["openssl", "req", "-x509", "-days", "2", *names, *key, "-out", folder / "cert.pem"]
    subprocess.run(made, check=True, capture_output=True)
    return folder


def pytest_collection_finish(session: pytest.Session) -> None:
    if not (target := session.config.getoption("--marks-to")):
        return
    marked: dict[str, list[list[str]]] = {}
    for item in session.items:
        place = [item.path.relative_to(session.config.rootpath).as_posix(), item.name.partition("[")[0]]
        for mark in item.iter_markers("req"):
            for requirement in mark.args:
                places = marked.setdefault(requirement, [])
                if place not in places:  # parametrised: one entry for all its cases
                    places.append(place)
    Path(target).write_text(json.dumps(marked))
