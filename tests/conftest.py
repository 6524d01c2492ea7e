"""What all tests share: their marks can be asked for, which is what the conformance table is made of."""

import json
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--marks-to",
        metavar="FILE",
        help='with --collect-only: writes {requirement: [["tests/unit/test_x.py", "test_y"], …]} as JSON',
    )


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
