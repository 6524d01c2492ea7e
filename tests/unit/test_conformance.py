"""docs/conformance.md says what the tests say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "conformance.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conformance", TOOL)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_table_is_fresh_and_whole(marks_file: Path | None) -> None:
    """Also: each mark names a requirement, and each requirement has a test or a reason why not."""
    known = [f"--marks={marks_file}"] if marks_file else []
    done = subprocess.run(
        [sys.executable, TOOL, "--check", *known], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


REQUIREMENTS = """
[rfc4787]
1 = ["M", "this | that"]
9a = ["S", "something else"]
[attacks]
leak = ["X", "no leaks"]
"""
MARKS = {"4787-1": [("tests/x.py", "test_b"), ("tests/x.py", "test_a")], "attacks-leak": [("tests/y.py", "test_c")]}
DEVIATIONS = """
4787-9a = { kind = "open", why = "not\\n done" }
attacks-leak = { kind = "deviates", why = "it drips" }
"""


def test_rendering(tool: ModuleType) -> None:
    requirements, deviations = tool.read_requirements(REQUIREMENTS), tool.read_deviations(DEVIATIONS)
    assert list(tool.complaints(requirements, MARKS, deviations)) == []
    lines = tool.render(requirements, MARKS, deviations).splitlines()
    first = "[x.py::test_a](../tests/x.py), [x.py::test_b](../tests/x.py)"
    assert f"| 4787-1 | must | this \\| that | *pass* | {first} |" in lines
    assert "| 4787-9a | should | something else | *open*: not done |  |" in lines
    assert "| attacks-leak | ours | no leaks | *deviates*: it drips | [y.py::test_c](../tests/y.py) |" in lines
    assert "| must | 1 | 1 | 0 | 0 | 0 |" in lines
    assert "| should | 1 | 0 | 0 | 0 | 1 |" in lines


@pytest.mark.parametrize(
    ("marks", "deviations", "complaint"),
    [
        pytest.param({**MARKS, "4787-99": [("t.py", "t")]}, "", "4787-99 is marked by t.py::t, but", id="mark"),
        pytest.param(MARKS, '4787-99 = { kind = "open", why = "" }', "4787-99 is in tests/dev", id="deviation"),
        pytest.param(MARKS, "", "4787-9a has neither a test nor an entry", id="nothing said"),
        pytest.param(MARKS, '4787-9a = { kind = "later", why = "" }', "4787-9a in tests/dev", id="unknown kind"),
    ],
)
def test_what_does_not_fit_is_named(
    tool: ModuleType, marks: dict[str, list[tuple[str, str]]], deviations: str, complaint: str
) -> None:
    found = tool.complaints(tool.read_requirements(REQUIREMENTS), marks, tool.read_deviations(deviations))
    assert any(each.startswith(complaint) for each in found)
