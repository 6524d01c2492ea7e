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
    if target := session.config.getoption("--marks-to"):
        Path(target).write_text(json.dumps(marks_of(session)))


def marks_of(session: pytest.Session) -> dict[str, list[list[str]]]:
    marked: dict[str, list[list[str]]] = {}
    for item in session.items:
        place = [item.path.relative_to(session.config.rootpath).as_posix(), item.name.partition("[")[0]]
        for mark in item.iter_markers("req"):
            for requirement in mark.args:
                places = marked.setdefault(requirement, [])
                if place not in places:  # parametrised: one entry for all its cases
                    places.append(place)
    return marked


@pytest.fixture
def marks_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    """What `--marks-to` would write; None in a run of a part of the tests."""
    config = request.config
    folders = [config.rootpath / each for each in config.getini("testpaths")]
    files = {file for folder in folders for file in folder.rglob("test_*.py")}
    chosen = any("::" in each for each in config.args) or config.option.keyword or config.option.markexpr
    if chosen or files != {item.path for item in request.session.items}:
        return None
    file = tmp_path / "marks.json"
    file.write_text(json.dumps(marks_of(request.session)))
    return file
