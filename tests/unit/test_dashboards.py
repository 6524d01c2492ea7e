"""Dashboards, rules and docs/metrics.md name metrics that there are. What they return is tried in tests/netns."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xdpmasq.families import FAMILIES, PREFIX

ROOT = Path(__file__).parents[2]
DASHBOARDS = sorted((ROOT / "dashboards").glob("*.json"))
RULES = ROOT / "dashboards" / "rules.yml"


def run(*argv: object) -> str:
    done = subprocess.run([*map(str, argv)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def unknown(text: str) -> set[str]:
    """Words in it that should be metrics of ours and are not."""
    named = set(re.findall(rf"(?<![\w:]){PREFIX}\w+", text))
    known = {PREFIX + name for name in FAMILIES} | {
        f"{PREFIX}expiry_duration_seconds_{each}" for each in ("sum", "count")
    }
    return named - known


def test_rules_do_what_they_should() -> None:
    run("promtool", "check", "rules", RULES)
    run("promtool", "test", "rules", Path(__file__).with_name("rules.test.yml"))


def test_rules_name_metrics_that_there_are() -> None:
    assert not unknown(re.sub(r"\w+:\w+(:\w+)?", "", RULES.read_text()))


def test_every_alert_has_a_test() -> None:
    alerts = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    assert len(alerts) == 13
    tests = Path(__file__).with_name("rules.test.yml").read_text()
    assert {alert for alert in alerts if alert not in tests} == set()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: str(path.stem))
def test_a_dashboard_can_be_imported(path: Path) -> None:
    board: dict[str, Any] = json.loads(path.read_text())
    panels = board["panels"]
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    assert not unknown(path.read_text())
    places = [set(cells(panel["gridPos"])) for panel in panels]
    assert sum(map(len, places)) == len(set().union(*places))  # none lies on another
    variables = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", path.read_text()))
    assert used - {"__rate_interval", "__range"} <= variables


def cells(grid: dict[str, int]) -> list[tuple[int, int]]:
    assert grid["x"] + grid["w"] <= 24
    return [(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])]


def test_the_list_of_metrics_is_fresh() -> None:
    run(sys.executable, ROOT / "tools" / "metrics.py", "--check")


def test_names_follow_the_conventions() -> None:
    """As `promtool check metrics` would say, of all families, those without series included."""
    for name, family in FAMILIES.items():
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", name)
        assert (family.kind == "counter") is name.endswith("_total"), name
        assert (family.kind == "info") is name.endswith("_info"), name
        assert family.help.endswith("."), name
        assert not re.search(r"_(ms|milliseconds|kb|bits)(_|$)", name)
