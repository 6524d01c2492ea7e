"""The benchmark at work: whether it believes what is right, and disbelieves what is not. Never how fast.

::

    masq-bench-…-lan ── masq-bench-…-gate ── masq-bench-…-wan
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from xdpmasq import datapath
from xdpmasq.bench import Bench, Settings, chosen
from xdpmasq.bench.contestants import Command, Contestant
from xdpmasq.bench.generator import Expectation, Traffic
from xdpmasq.bench.rounds import play_turn

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

TINY = Settings(flows=100, rounds=1, packets=2000)
FORWARDED, MASQUERADED = Expectation(translated=False, hops=1), Expectation(translated=True, hops=1)


def namespaces(prefix: str) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"{prefix}*")]


@pytest.fixture(scope="module")
def traffic() -> Iterator[Traffic]:
    name = f"masq-bench-{os.getpid()}-t"
    with Bench(TINY, name=name) as bench:
        yield bench._traffic
    assert namespaces(name) == []


@pytest.mark.parametrize("name", ["drop", "redirect", "forward", "nftables", "xdpmasq-xdp", "xdpmasq-tc"])
def test_what_is_right_is_valid(traffic: Traffic, name: str) -> None:
    turn = play_turn(traffic, chosen([name])[0], TINY)
    assert turn.failure is None
    assert turn.problems == ()
    assert [(tally.direction, tally.sent, tally.seen) for tally in turn.tallies] == [
        ("out", 2000, 2000), ("in", 2000, 2000),
    ]  # fmt: skip
    cost = turn.ns_per_packet()
    assert cost is not None
    assert cost > 0
    if name != "drop":
        assert all(tally.checked >= 2000 // 61 for tally in turn.tallies)


@pytest.mark.parametrize("name", ["drop", "forward", "nftables", "xdpmasq-xdp", "xdpmasq-tc"])
def test_each_packet_opens_a_flow(traffic: Traffic, name: str) -> None:
    """Emptied tables in between, or the second warm-up and what is measured would find theirs."""
    turn = play_turn(traffic, chosen([name])[0], replace(TINY, scenario="setup", packets=300))
    assert turn.failure is None
    assert turn.problems == ()
    assert [(tally.direction, tally.sent, tally.seen) for tally in turn.tallies] == [("out", 100, 100)] * 3


@pytest.mark.parametrize("name", ["nftables", "xdpmasq-xdp"])
def test_tables_are_emptied(traffic: Traffic, name: str) -> None:
    contestant = chosen([name])[0]
    with contestant.running(traffic):
        ports = []
        for _ in range(2):
            traffic.begin_turn()
            assert traffic.send("out", 100, contestant.expected).problems == []
            ports.append(traffic._maps["ports"].view(writable=False)["port"][:100].copy())
            assert connections(traffic, name) == 100
            contestant.forget(traffic.topology)
            assert connections(traffic, name) == 0
        if name == "xdpmasq-xdp":  # drawn anew, at random
            assert (ports[0] != ports[1]).any()


def connections(traffic: Traffic, name: str) -> int:
    if name == "nftables":
        return int(traffic.topology.run("gate", ["conntrack", "--count"]).splitlines()[0])
    with traffic.topology.inside("gate"):
        return len(datapath.find().open_slots())


@pytest.mark.parametrize("name", ["xdpmasq-xdp", "xdpmasq-tc"])
def test_more_flows_than_one_address_has_ports(name: str) -> None:
    """Each both ways; a million of them is ``tools/million.py``."""
    settings = replace(TINY, flows=40_000)
    with Bench(settings, chosen([name]), name=f"masq-bench-{os.getpid()}-many") as bench:
        assert [turn.problems for turn in bench.play()] == [()]


@pytest.mark.parametrize("frame_bytes", [64, 66, 1400, 1514])
def test_any_length_of_frame(frame_bytes: int) -> None:
    settings = replace(TINY, frame_bytes=frame_bytes)
    with Bench(settings, chosen(["nftables"]), name=f"masq-bench-{os.getpid()}-{frame_bytes}") as bench:
        assert [turn.problems for turn in bench.play()] == [()]


def nft(expected: Expectation, *rules: str, kind: str = "filter") -> Contestant:
    """The kernel as gateway, with these rules last on the way of every packet."""
    chain = "\n".join((f"type {kind} hook postrouting priority 300", *rules))
    table = f"table ip wrong {{\nchain last {{\n{chain}\n}}\n}}\n"
    return Contestant(
        "wrong",
        "",
        expected,
        kernel_forwards=True,
        start=(Command(("nft", "-f", "-"), table),),
        stop=(Command(("nft", "delete", "table", "ip", "wrong")),),
    )


WRONG = {
    "other address": (nft(MASQUERADED, 'oifname "wan0" snat to 203.0.113.77', kind="nat"), "wrong address"),
    "not translated at all": (nft(MASQUERADED), "wrong address"),
    "TTL once too few": (nft(Expectation(translated=False, hops=2)), "wrong TTL"),
    "destination port": (nft(FORWARDED, "udp dport set 9001"), "wrong port"),
    "UDP checksum": (nft(FORWARDED, "@th,48,16 set 0x1234"), "wrong UDP checksum"),
    "UDP checksum taken away": (nft(FORWARDED, "@th,48,16 set 0"), "wrong UDP checksum"),
    "IP checksum": (nft(FORWARDED, "@nh,80,16 set 0x1234"), "wrong IP checksum"),
    "one port for several flows": (
        nft(
            MASQUERADED,
            "ip saddr 10.18.0.0/16 udp sport set 5000",
            "ip saddr 10.18.0.0/16 ip saddr set 203.0.113.1",
        ),
        "share port and remote",
    ),
    "one in 100 lost": (nft(FORWARDED, "numgen inc mod 100 7 drop"), "outbound packets lost"),
    "one in 100 lost inbound": (
        nft(FORWARDED, 'oifname "lan0" numgen inc mod 100 7 drop'),
        "inbound packets lost",
    ),
}


@pytest.mark.parametrize(("contestant", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_invalid(traffic: Traffic, contestant: Contestant, said: str) -> None:
    turn = play_turn(traffic, contestant, TINY)
    assert turn.failure is None
    assert not turn.valid
    # Also in the measured passes, where only samples are checked whole.
    assert any(said in problem for problem in turn.problems if not problem.startswith("warm-up")), turn.problems


def test_a_gateway_that_cannot_be_set_up_is_told_and_left_out() -> None:
    broken = replace(nft(FORWARDED), start=(Command(("nft", "no such rule")),), stop=())
    name = f"masq-bench-{os.getpid()}-broken"
    with Bench(replace(TINY, rounds=2), [broken, *chosen(["drop"])], name=name) as bench:
        played = [(turn.contestant, turn.valid) for turn in bench.play()]
    assert played == [("wrong", False), ("drop", True), ("drop", True)]
    row = bench.report().rows[0]
    assert row.failure is not None
    assert "nft no such rule" in row.failure
    assert namespaces(name) == []


def test_contestants_leave_the_gateway_as_they_found_it(traffic: Traffic) -> None:
    def gate() -> str:
        show = "ip -d addr; ip route; ip neigh; nft list ruleset; tc qdisc; sysctl net.ipv4.ip_forward"
        return traffic.topology.run("gate", ["sh", "-c", show])

    before = gate()
    for contestant in chosen([]):
        assert play_turn(traffic, contestant, replace(TINY, packets=100)).valid
    assert gate() == before


def bench_command(*words: str) -> list[str]:
    code = "import typer; from xdpmasq.cli.bench import bench; typer.run(bench)"
    return [sys.executable, "-c", code, *words]


def test_the_command_line_in_json() -> None:
    names = [word for name in ("drop", "redirect", "nftables") for word in ("--contestant", name)]
    command = bench_command("--json", "--rounds", "1", "--packets", "2000", "--flows", "100", *names)
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert [(row["contestant"], row["valid"], row["invalid"]) for row in result["rows"]] == [
        ("drop", 1, 0), ("redirect", 1, 0), ("nftables", 1, 0),
    ]  # fmt: skip
    assert result["host"]["kernel"].startswith("Linux")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_stays_when_it_is_interrupted(number: signal.Signals) -> None:
    command = bench_command("--rounds", "1000", "--contestant", "nftables")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        name = f"masq-bench-{process.pid}"
        deadline = time.monotonic() + 20
        while len(namespaces(name)) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(namespaces(name)) == 3
        time.sleep(1.5)  # into the measurement
        process.send_signal(number)
        assert process.wait(timeout=20) != 0
    assert namespaces(name) == []
