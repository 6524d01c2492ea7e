"""The benchmark at work: whether it believes what is right, and disbelieves what is not. Never how fast.

Each contestant stands in a network of its own, and keeps it for all tests of this module::

    masq-bench-…-lan ── masq-bench-…-gate ── masq-bench-…-wan
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from netkit import needs_root

from xdpmasq import datapath
from xdpmasq.bench import SCENARIOS, Chosen, Settings, conntrack, measure, parse_external, setup, turns
from xdpmasq.bench.contestants import BASE, NAMES, Contestant
from xdpmasq.bench.generator import Expectation
from xdpmasq.bench.report import Section
from xdpmasq.bench.stage import Lane, Stage
from xdpmasq.bench.turns import Case, Turn

pytestmark = [
    needs_root,
    pytest.mark.xdist_group("bench"),
]

TINY = Settings(flows=(100,), sizes=(64,), rounds=1, packets=2000, seconds=1, sessions=3000, externals=(1,))
FORWARDED, MASQUERADED = Expectation(translated=False, hops=1), Expectation(translated=True, hops=1)
SESSIONS = ("nftables", "xdpmasq-xdp", "xdpmasq-tc")

# A gateway as somebody else may have it: sets up and stays, until it is ended.
SCRIPT = """\
#!/bin/sh
nft add table ip mine
nft add chain ip mine post '{ type nat hook postrouting priority 100; }'
nft add rule ip mine post oifname "$1" iifname "$2" masquerade
exec sleep 1000
"""


def namespaces(prefix: str) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{prefix}*")]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    name = f"masq-bench-{os.getpid()}-t"
    with Stage(TINY, measure.usable_cpu(), name) as stage:
        yield stage
    assert namespaces(name) == []


def lane(stage: Stage, name: str) -> Lane:
    (found,) = stage.lanes(lambda each: each.name == name)
    assert found.plays, found.failure
    return found


def played(lane: Lane, frame_bytes: int = 64) -> list[Turn]:
    """Opened, and one round."""
    case = Case(100, frame_bytes)
    return [turns.opened(lane, case), turns._measured(lane, 1, case, 2000)]


def measured(stage: Stage, scenario: str, *names: str, settings: Settings = TINY) -> dict[str, Section]:
    """The sections of a scenario, all of whose lines must be valid."""
    stage.chosen, stage.settings = Chosen(names), settings
    try:
        (found,) = [each for each in SCENARIOS if each.name == scenario]
        sections = {section.key: section for section in found.run(stage)}
    finally:
        stage.chosen, stage.settings = Chosen(), TINY
    for section in sections.values():
        assert section.valid, section.lines
    return sections


# --- scenarios -------------------------------------------------------------------------------------


def test_forward(stage: Stage) -> None:
    (section,) = measured(stage, "forward").values()
    for name in NAMES:
        line = next(line for line in section.lines if line.name == name)
        if not line.absent:
            assert all(value is not None and value >= 0 for value in line.values[:4]), line
        else:
            assert name == "flowtable"


def test_scale(stage: Stage) -> None:
    settings = Settings(flows=(40_000, 1), rounds=1, packets=1000)
    sections = measured(stage, "scale", "redirect", *SESSIONS, settings=settings)
    assert list(sections) == ["scale", "scale/redirect", "scale/nftables"]
    for name in SESSIONS:
        # More flows than one address has ports.
        assert (sections["scale"].value(name, "40,000") or 0) > 0
        assert (sections["scale/redirect"].value(name, "1") or 0) > 0


def test_setup(stage: Stage) -> None:
    (section,) = measured(stage, "setup", "drop", "forward", *SESSIONS).values()
    assert all((section.value(name, "ns") or 0) > 0 for name in SESSIONS)


def test_setup_with_several_addresses(stage: Stage) -> None:
    settings = Settings(flows=(2000,), externals=(4,), rounds=1, packets=2000)
    measured(stage, "setup", "nftables", "xdpmasq-tc", settings=settings)
    for lane in stage.lanes(lambda each: each.name in ("nftables", "xdpmasq-tc"), externals=4):
        turns.opened(lane, Case(2000, 64))
        learned = lane.traffic.maps["ports"].view(writable=False)[:2000]
        assert set(learned["external"].tolist()) == {0, 1, 2, 3}


def test_latency(stage: Stage) -> None:
    (section,) = measured(stage, "latency", "redirect", "forward", *SESSIONS).values()
    for line in section.lines:
        p50, p99, *_ = line.values
        assert p50 is not None
        assert p99 is not None
        assert 0 < p50 <= p99


def test_tcp(stage: Stage) -> None:
    sections = measured(stage, "tcp", "nftables", "xdpmasq-tc", "xdpmasq-xdp")
    for column in ("1 stream", "8 streams"):
        assert (sections["tcp/off"].value("xdpmasq-xdp", column) or 0) > 0
        assert (sections["tcp/on"].value("xdpmasq-tc", column) or 0) > 0
        assert sections["tcp/on"].value("xdpmasq-xdp", column) is None


def test_isolated(stage: Stage) -> None:
    (section,) = measured(stage, "isolated", "xdpmasq-xdp").values()
    programs = [line.name.partition(" ")[2] for line in section.lines]
    assert {"masq_xdp, out", "masq_xdp, in", "masq_wan_out, out", "masq_wan_in, in"} <= set(programs)


def test_memory_and_control(stage: Stage) -> None:
    (section,) = measured(stage, "memory", "nftables", "xdpmasq-tc").values()
    assert 100 < (section.value("xdpmasq-tc", "B/place") or 0) < 2000
    (section,) = measured(stage, "control", "xdpmasq-xdp").values()
    assert all(value is not None and value > 0 for value in section.lines[0].values)


# --- what it believes ------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_bytes", [66, 1400, 1514])
def test_any_length_of_frame(stage: Stage, frame_bytes: int) -> None:
    assert [turn.problems for turn in played(lane(stage, "nftables"), frame_bytes)] == [(), ()]


@pytest.mark.parametrize("name", ["nftables", "xdpmasq-xdp"])
def test_tables_are_emptied(stage: Stage, name: str) -> None:
    mine = lane(stage, name)
    ports = []
    for _ in range(2):
        assert turns.opened(mine, Case(100, 64)).problems == ()
        ports.append(mine.traffic.maps["ports"].view(writable=False)["port"][:100].copy())
        assert connections(mine) == 100
    mine.contestant.forget(mine.topology)
    assert connections(mine) == 0
    if name == "xdpmasq-xdp":  # drawn anew, at random
        assert (ports[0] != ports[1]).any()


def connections(lane: Lane) -> int:
    if lane.name == "nftables":
        return int(lane.topology.run("gate", ["conntrack", "--count"]).splitlines()[0])
    with lane.topology.inside("gate"):
        return len(datapath.find().open_slots())


WRONG = {
    "other address": (MASQUERADED, "nat", ('oifname "wan0" snat to 203.0.113.77',), "wrong address"),
    "not translated at all": (MASQUERADED, "filter", (), "wrong address"),
    "TTL once too few": (Expectation(translated=False, hops=2), "filter", (), "wrong TTL"),
    "destination port": (FORWARDED, "filter", ("udp dport set 9001",), "wrong port"),
    "UDP checksum": (FORWARDED, "filter", ("@th,48,16 set 0x1234",), "wrong UDP checksum"),
    "UDP checksum taken away": (FORWARDED, "filter", ("@th,48,16 set 0",), "wrong UDP checksum"),
    "IP checksum": (FORWARDED, "filter", ("@nh,80,16 set 0x1234",), "wrong IP checksum"),
    "one port for several flows": (
        MASQUERADED,
        "filter",
        ("ip saddr 10.18.0.0/16 udp sport set 5000", "ip saddr 10.18.0.0/16 ip saddr set 203.0.113.16"),
        "share port and remote",
    ),
    "one in 100 lost": (FORWARDED, "filter", ("numgen inc mod 100 7 drop",), "outbound packets lost"),
    "one in 100 lost inbound": (
        FORWARDED, "filter", ('oifname "lan0" numgen inc mod 100 7 drop',), "inbound packets lost",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("expected", "kind", "rules", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_invalid(
    stage: Stage, expected: Expectation, kind: str, rules: tuple[str, ...], said: str
) -> None:
    """The kernel as gateway, with these rules last on the way of every packet."""
    forward = lane(stage, "forward")
    chain = "\n".join((f"type {kind} hook postrouting priority 300", *rules))
    forward.topology.run("gate", ["nft", "-f", "-"], f"table ip wrong {{\nchain last {{\n{chain}\n}}\n}}\n")
    try:
        warm_up, round_ = played(Lane(Contestant("wrong", "", expected), forward.traffic))
    finally:
        forward.topology.run("gate", ["nft", "delete", "table", "ip", "wrong"])
    assert any(said in problem for problem in warm_up.problems), warm_up.problems
    # Also in the measured passes, where only samples are checked whole.
    assert "share port" in said or any(said in problem for problem in round_.problems), round_.problems


def test_somebody_elses_gateway(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "nat.sh"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    stage.chosen = Chosen(("mine",), (parse_external(f"mine={script} {{wan}} {{lan}}"),))
    with stage.lane(stage.playing()[0]) as mine:
        assert mine.plays, mine.failure
        mine.traffic.wire()
        assert [turn.problems for turn in played(mine)] == [(), ()]
        assert setup._opened(mine, 1, Case(100, 64, ("out",)), 100).problems == ()
        # As of one that keeps tables of its own, which nobody could empty.
        monkeypatch.setattr(conntrack, "count", lambda network: 1)
        problems = setup._opened(mine, 1, Case(100, 64, ("out",)), 100).problems
        assert problems == ("its tables cannot be emptied: the kernel tracks 1 of 100 flows",)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param("sh -c 'echo no such card; exit 3'", "mine ended with 3: no such card", id="failing"),
        pytest.param("/no/such/gateway", "No such file", id="not there"),
    ],
)
def test_somebody_elses_gateway_that_does_not_work(stage: Stage, command: str, said: str) -> None:
    with stage.lane(parse_external(f"mine={command}")) as mine:
        assert said in mine.failure


# --- the command -----------------------------------------------------------------------------------


def bench_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "xdpmasq", "bench", *words]


def test_the_command_line_in_json() -> None:
    names = [word for name in (BASE, "nftables") for word in ("--contestant", name)]
    command = bench_command("--json", "--rounds", "1", "--packets", "2000", "--flows", "100", "--size", "64", *names)
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert [line["name"] for line in result["sections"][0]["lines"]] == [BASE, "nftables"]
    assert result["host"]["kernel"].startswith("Linux")
    assert result["valid"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_stays_when_it_is_interrupted(number: signal.Signals) -> None:
    # What a shell runs in the background ignores SIGINT, and so would ours.
    command = ["env", "--default-signal=INT", *bench_command("--rounds", "1000", "--contestant", "nftables")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        name = f"masq-bench-{process.pid}"
        deadline = time.monotonic() + 20
        while len(namespaces(name)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(namespaces(name)) == 3
        time.sleep(1.5)  # into the measurement
        process.send_signal(number)
        try:
            assert process.wait(timeout=20) != 0
        finally:
            process.kill()
    assert namespaces(name) == []
