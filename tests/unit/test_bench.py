"""The benchmark's arithmetic, words and refusals: no root, no packets."""

import contextlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from xdpmasq.bench import (
    SCENARIOS,
    Settings,
    conntrack,
    figures,
    forward,
    markdown,
    memory,
    named,
    plot,
    stage,
    terminal,
)
from xdpmasq.bench import report as reports
from xdpmasq.bench import turns as turning
from xdpmasq.bench.contestants import NAMES, Chosen, contestants, parse_external
from xdpmasq.bench.generator import REASONS, Tally
from xdpmasq.bench.marks import MARKS
from xdpmasq.bench.measure import Usage
from xdpmasq.bench.report import Column, Drawing, Host, Line, Mark, Report, Section
from xdpmasq.bench.stage import rotated
from xdpmasq.bench.turns import Turn
from xdpmasq.errors import HostError, UsageError

HOST = Host("Linux 6.18", "some CPU", 2, 1, 16, {"xdpmasq": "0"})


@dataclass
class Lane:
    """As stage.Lane, without a network."""

    name: str
    failure: str = ""
    absent: str = ""
    contestant: Any = field(default_factory=lambda: contestants()[0])

    @property
    def plays(self) -> bool:
        return not (self.failure or self.absent)


def tally(direction: Any = "out", sent: int = 100, ns: int = 0, **fields: Any) -> Tally:
    """A pass in which every packet cost ``ns`` and came through, unless the fields say otherwise."""
    usual = {"seen": sent, "checked": 2, "strange": 0, "wrong": {}, "usage": Usage(ns * sent, ns * sent)}
    return Tally(direction, sent, **{**usual, **fields})


def turns(name: str, *costs: int) -> list[Turn]:
    return [Turn(name, number, (tally(ns=ns),)) for number, ns in enumerate(costs, 1)]


def lines(played: list[Turn], *lanes: Lane) -> list[Line]:
    wanted = lanes or tuple(Lane(name) for name in dict.fromkeys(turn.contestant for turn in played))
    return list(forward.lines(wanted, 100, played))  # type: ignore[arg-type]


def value(line: Line, title: str) -> float | None:
    return line.values[[column.title for column in forward.COLUMNS].index(title)]


def section(*lines: Line, **fields: Any) -> Section:
    usual: dict[str, Any] = {
        "key": "forward/1000/64", "title": "A title", "command": "xdpmasq bench", "columns": forward.COLUMNS,
        "drawing": Drawing("bars", ("ns",), "ns"),
    }  # fmt: skip
    return Section(**{**usual, **fields, "lines": lines})


PLAYED = [
    *turns("drop", 100, 90, 500),
    *turns("redirect", 200, 200, 210),
    *turns("nftables", 1000, 1200, 1100),
    *turns("xdpmasq-xdp", 250, 240, 220),
]


# --- figures ---------------------------------------------------------------------------------------


def test_medians_shares_and_quotients() -> None:
    drop, redirect, nftables, ours = lines(PLAYED)
    assert (value(drop, "ns"), value(drop, "share")) == (100, 0)
    assert (value(redirect, "share"), value(redirect, "of redirect")) == (100, 1)
    assert (value(nftables, "ns"), value(nftables, "× nftables")) == (1100, 1)
    assert (value(ours, "ns"), value(ours, "share")) == (240, 140)
    assert value(ours, "× nftables") == pytest.approx(1100 / 240)
    assert value(ours, "of redirect") == pytest.approx(200 / 240)
    assert value(ours, "share by nftables'") == pytest.approx(140 / 1000)
    assert value(ours, "±") == pytest.approx(15 / 240)


def test_directions_are_weighed_by_packets() -> None:
    (line,) = lines([Turn("drop", 1, (tally("out", 100, 200), tally("in", 300, 400)))])
    assert [value(line, title) for title in ("ns out", "ns in", "ns")] == [200, 400, 350]


def test_an_invalid_round_does_not_count_and_is_shown() -> None:
    lossy = tally(ns=1, seen=97)
    (line,) = lines([*turns("nftables", 1000, 1002), Turn("nftables", 3, (lossy,), tuple(lossy.problems))])
    assert value(line, "ns") == 1001
    assert line.problems == ("round 3: 3 of 100 outbound packets lost",)
    assert not section(line).valid


def test_what_was_wrong_in_warm_up_is_invalid_too() -> None:
    (line,) = lines(
        [Turn("nftables", 0, (), ("2 flows share port and remote endpoint with another",)), *turns("nftables", 9)]
    )
    assert line.problems == ("warm-up: 2 flows share port and remote endpoint with another",)


def test_who_fails_or_is_not_there_leaves_the_others_their_figures() -> None:
    failed, absent = Lane("nftables", failure="no nft"), Lane("flowtable", absent="not on this kernel")
    drop, nftables, flowtable = lines(turns("drop", 100), Lane("drop"), failed, absent)
    assert value(drop, "ns") == 100
    assert (value(nftables, "ns"), nftables.problems, nftables.absent) == (None, ("FAILED: no nft",), "")
    assert (value(flowtable, "ns"), flowtable.valid, flowtable.absent) == (None, True, "not on this kernel")


def test_without_base_and_rivals_only_costs_are_told() -> None:
    (line,) = lines(turns("xdpmasq-tc", 1200))
    assert value(line, "ns") == 1200
    assert [value(line, title) for title in ("share", "× nftables", "of redirect")] == [None] * 3


def test_nothing_measured_is_no_number() -> None:
    assert figures.median([None, None]) is None
    assert figures.median([None, 3.0, 1.0]) == 2
    assert figures.spread([]) is None
    assert figures.quotient(1, None) is None
    assert figures.quotient(1, 0) is None


def test_accounted_is_the_median_share_of_presence() -> None:
    played = [
        Turn("drop", number, (tally(usage=Usage(cpu, 1000)),)) for number, cpu in enumerate((900, 990, 1000), 1)
    ]
    assert forward.accounted(played) == pytest.approx(0.99)
    assert any("90%" in doubt for doubt in markdown.doubts(section(accounted=0.9)))
    assert markdown.doubts(section(accounted=0.99)) == []


def test_connections_that_do_not_fit_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conntrack, "most", lambda: 1000)
    everybody = {each.name: Lane(each.name, contestant=each) for each in contestants()}
    assert "nf_conntrack_max of this machine is 1,000" in turning.why_not(everybody["nftables"], 1001)  # type: ignore[arg-type]
    assert turning.why_not(everybody["nftables"], 1000) == ""  # type: ignore[arg-type]
    assert turning.why_not(everybody["xdpmasq-xdp"], 1001) == ""  # type: ignore[arg-type]


def test_more_connections_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"_MAX": tmp_path / "max", "_BUCKETS": tmp_path / "buckets"}
    for name, path in files.items():
        path.write_text("1000\n")
        monkeypatch.setattr(conntrack, name, path)
    with contextlib.suppress(KeyboardInterrupt), conntrack.raised(5000):
        assert [int(path.read_text()) for path in files.values()] == [5250, 5250]
        assert conntrack.holds(5000)
        raise KeyboardInterrupt
    assert [path.read_text() for path in files.values()] == ["1000\n", "1000\n"]
    with conntrack.raised(900):
        assert not conntrack.holds(5000)


def test_slabs_of_connections() -> None:
    text = """\
slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> : tunables …
nf_conntrack         208    272    256   16    1 : tunables    0    0    0 : slabdata     17     17      0
kmalloc-rnd-03-128   100    128    128   32    1 : tunables    0    0    0 : slabdata      3      4      0
kmalloc-1k           798    912   1024   16    4 : tunables    0    0    0 : slabdata     57     57      0
kmalloc-rcl-128      480    480    128   32    1 : tunables    0    0    0 : slabdata     15     15      0
dentry               480    480    128   32    1 : tunables    0    0    0 : slabdata     15     15      0
"""
    assert memory.slabs_bytes(text) == (17 + 4 + 57 * 4) * 4096


@pytest.mark.parametrize(
    ("fields", "problems"),
    [
        pytest.param({}, [], id="all right"),
        pytest.param({"strange": 5}, [], id="packets of others are no problem"),
        pytest.param({"seen": 99}, ["1 of 100 inbound packets lost"], id="lost"),
        pytest.param({"seen": 102}, ["2 more inbound packets than were sent"], id="doubled"),
        pytest.param({"wrong": {"TTL": 7}}, ["7 of 100 inbound packets with a wrong TTL"], id="wrong"),
    ],
)
def test_problems_of_a_pass(fields: dict[str, Any], problems: list[str]) -> None:
    assert tally("in", **fields).problems == problems


def test_rounds_start_with_another_contestant_each() -> None:
    lanes = [Lane("drop"), Lane("redirect"), Lane("flowtable", absent="no"), Lane("forward")]
    order = [[lane.name for lane in rotated(lanes, by)] for by in range(4)]  # type: ignore[arg-type]
    assert order == [
        ["drop", "redirect", "forward"],
        ["redirect", "forward", "drop"],
        ["forward", "drop", "redirect"],
        ["drop", "redirect", "forward"],
    ]


# --- marks and report ------------------------------------------------------------------------------


def mark(value: float | None, **bounds: float) -> Mark:
    return Mark("forward/1000/64", "xdpmasq-xdp", "ns", "some promise", **bounds, value=value)


@pytest.mark.parametrize(
    ("mark", "verdict"),
    [
        pytest.param(mark(0.85, least=0.85), "met", id="on the line"),
        pytest.param(mark(0.849, least=0.85), "MISSED", id="below"),
        pytest.param(mark(2.0, most=2), "met", id="on the upper line"),
        pytest.param(mark(2.1, most=2), "MISSED", id="above"),
        pytest.param(mark(None, least=1), "not measured", id="none"),
    ],
)
def test_marks(mark: Mark, verdict: str) -> None:
    assert mark.verdict == verdict


def test_marks_are_of_sections_that_were_measured() -> None:
    found = reports.valued(MARKS, [section(*lines(PLAYED))])
    assert [(mark.line, mark.column, mark.verdict) for mark in found] == [
        ("xdpmasq-xdp", "of redirect", "MISSED"),
        ("xdpmasq-xdp", "share by nftables'", "MISSED"),
        ("xdpmasq-tc", "× nftables", "not measured"),
    ]


def test_each_mark_has_one_bound_and_a_contestant() -> None:
    assert all((mark.least is None) != (mark.most is None) for mark in MARKS)
    assert {mark.line for mark in MARKS} <= set(NAMES)
    scenarios = {scenario.name for scenario in SCENARIOS}
    assert {mark.section.partition("/")[0] for mark in MARKS} <= scenarios


CURVE = Section(
    "scale", "By flows", "xdpmasq bench", (Column("1"), Column("1,000")),
    (Line("drop", (100.0, 110.0)), Line("xdpmasq-xdp", (200.0, None))),
    drawing=Drawing("curve", ("1", "1,000"), "ns"),
)  # fmt: skip


@pytest.fixture
def report() -> Report:
    lossy = Line("nftables", (1100.0, *(None,) * 7), ("round 3: 3 of 100 outbound packets lost",))
    absent = Line("flowtable", (None,) * 8, absent="not on this kernel")
    first = section(*lines(PLAYED)[:2], lossy, absent, *lines(PLAYED)[3:], notes=("A note.",))
    return Report(HOST, (first, CURVE), reports.valued(MARKS, [first]), 12.0)


def test_the_report_is_json_and_comes_back(report: Report) -> None:
    fields = json.loads(json.dumps(report.as_dict()))
    assert fields["valid"] is False
    assert fields["marks"][0]["verdict"] == "MISSED"
    assert reports.from_dict({key: value for key, value in fields.items() if key != "valid"}) == report
    assert report.value("forward/1000/64", "redirect", "ns") == 200
    assert report.value("scale", "redirect", "1") is None


def test_the_report_is_markdown(report: Report) -> None:
    text = markdown.document(report)
    assert "| gateway | ns | ± | ns out | ns in | share | share by nftables' | × nftables | of redirect |" in text
    assert "| **xdpmasq-xdp** | **240** |" in text
    assert "| nftables | 1,100 INVALID |" in text
    assert "* flowtable: not on this kernel." in text
    assert "* INVALID: nftables: round 3: 3 of 100 outbound packets lost" in text
    assert "| XDP by the bare redirect, 1,000 flows | ≥ 0.85 | 0.833 | MISSED |" in text
    assert "```sh\nxdpmasq bench\n```" in text


def test_the_report_fits_a_terminal(report: Report) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal.shown(report))
    text = console.export_text()
    assert re.search(r"redirect █+ 200", text)
    assert re.search(r"nftables INVALID +1,100", text)
    assert "MISSED" in text
    assert "D drop   X xdpmasq-xdp" in text
    grid = [line for line in text.splitlines() if "│" in line]
    assert sum(line.count("D") for line in grid) == 2
    assert "X" in grid[0]  # the dearest is on top


def test_the_report_is_a_picture(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "bench.png"
    plot.check(path)
    plot.write(report, path)
    assert path.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("path", ["bench.pdf", "/no/such/folder/bench.png"])
def test_no_picture_there(path: str) -> None:
    with pytest.raises(UsageError, match="cannot write a picture"):
        plot.check(Path(path))


def test_without_matplotlib_there_is_a_word_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(HostError, match="python3-matplotlib"):
        plot.check(tmp_path / "bench.png")


# --- what is refused -------------------------------------------------------------------------------


def test_contestants_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert [each.name for each in Chosen(("nftables", "drop")).among()] == ["drop", "nftables"]
    assert [each.name for each in Chosen().among()] == list(NAMES)
    mine = parse_external("mine=./nat.sh {wan} {lan}")
    assert [each.name for each in Chosen((), (mine,)).among()][-1] == "mine"
    with pytest.raises(UsageError, match="no contestant iptables: there are drop, redirect, forward"):
        Chosen(("iptables",))
    with pytest.raises(UsageError, match="two contestants named nftables"):
        Chosen((), (parse_external("nftables=true"),))


def test_a_command_of_somebody_elses() -> None:
    mine = parse_external("ei-nat=einat --ifname {wan} 'a b' --map={lan}:{other}")
    assert mine.name == "ei-nat"
    assert mine.background == ("einat", "--ifname", "wan0", "a b", "--map=lan0:{other}")


@pytest.mark.parametrize("text", ["", "name", "=true", "a b=true", "name=", "name='", "1=true"])
def test_no_command(text: str) -> None:
    with pytest.raises(UsageError):
        parse_external(text)


@pytest.mark.parametrize(
    "wrong",
    [
        {"flows": (0,)},
        {"flows": (1000, 1_048_577)},
        {"sessions": 1_048_577},
        {"sizes": (62,)},
        {"sizes": (65,)},
        {"sizes": (64, 1516)},
        {"externals": (0,)},
        {"externals": (17,)},
        {"rounds": 0},
        {"packets": 0},
    ],
    ids=lambda fields: "{}={}".format(*next(iter(fields.items()))),
)
def test_settings_that_cannot_be_measured(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("scenario", "settings", "said"),
    [
        pytest.param(
            "setup", Settings(flows=(30_001,), externals=(1,)), "1 public address can give", id="one address"
        ),
        pytest.param(
            "setup", Settings(flows=(100_001,), externals=(4,)), "4 public addresses can", id="four addresses"
        ),
        pytest.param("scale", Settings(flows=(1, 200_000)), "this machine's 2 GB", id="memory"),
        pytest.param("memory", Settings(), "this machine's 2 GB", id="sessions"),
    ],
)
def test_more_flows_than_fit(scenario: str, settings: Settings, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conntrack, "memory_bytes", lambda: 2 << 30)
    with pytest.raises(UsageError, match=said):
        list(named([scenario])[0].run(stage.Stage(settings, 0, "never")))


def test_scenarios_by_name() -> None:
    assert [each.name for each in named(["tcp", "forward"])] == ["forward", "tcp"]
    assert len(named(["all"])) == 8
    with pytest.raises(UsageError, match="no scenario fast: there are forward, scale"):
        named(["fast"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scenario", "fast"], "no scenario fast"),
        (["--contestant", "iptables"], "no contestant iptables"),
        (["--size", "50"], "cannot send frames of 50 bytes"),
        (["--flows", "2000000"], "cannot run 2,000,000 flows"),
        (["--external", "nonsense"], "nonsense is no contestant"),
        (["--plot", "bench.jpg"], "cannot write a picture"),
        (["--direction", "up"], "up"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_usage_is_status_2(words: list[str], said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "xdpmasq", "bench", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_progress_is_told_in_parts() -> None:
    told: list[float] = []
    playing = stage.Stage(Settings(), 0, "never")
    playing.tell = lambda text, done: told.append(done)
    playing.expect(2, 1, 2)
    for _ in range(3):
        playing.step("")
    assert told == [0.5, 0.75, 1.0]


def test_the_words_for_what_is_wrong_come_from_the_c() -> None:
    assert len(REASONS) == 7
    assert {"address", "TTL", "port", "UDP checksum"} <= set(REASONS)
    assert not any(re.search(r"[_\\]", words) for words in REASONS)


def test_percentiles_of_nobody_are_no_numbers() -> None:
    from xdpmasq.bench import latency  # noqa: PLC0415

    found = {"nftables": [np.array([2000, 4000])], "xdpmasq-xdp": [np.array([1000, 1000])], "forward": []}
    mine = {
        line.name: line.values
        for line in latency._lines([Lane(name) for name in found], found, dict.fromkeys(found, ()))
    }  # type: ignore[misc]
    assert mine["xdpmasq-xdp"][0] == 1.0
    assert mine["xdpmasq-xdp"][3] == pytest.approx(3.0)
    assert mine["forward"] == (None,) * 5
