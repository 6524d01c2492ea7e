"""The benchmark's arithmetic: no root, no packets."""

import json
import re
from typing import Any

import pytest

from xdpmasq.bench import Settings, Turn, chosen, rounds
from xdpmasq.bench.generator import REASONS, Tally
from xdpmasq.bench.measure import Usage
from xdpmasq.bench.report import MARKS, Host, Report, report
from xdpmasq.errors import MasqError, UsageError

HOST = Host("Linux 6.18", "some CPU", 2, 1, {"xdpmasq": "0"})


def tally(direction: Any = "out", sent: int = 100, ns: int = 0, **fields: Any) -> Tally:
    """A pass in which every packet cost ``ns`` and came through, unless the fields say otherwise."""
    usual = {"seen": sent, "checked": 2, "strange": 0, "wrong": {}, "usage": Usage(ns * sent, ns * sent)}
    return Tally(direction, sent, **{**usual, **fields})


def turns(name: str, *costs: int) -> list[Turn]:
    return [Turn(name, number, (tally(ns=ns),)) for number, ns in enumerate(costs, 1)]


def reported(played: list[Turn], settings: Settings | None = None) -> Report:
    names = list(dict.fromkeys(turn.contestant for turn in played))
    return report(played, names, settings or Settings(), HOST, 1.0)


def test_medians_shares_and_quotients() -> None:
    played = [
        *turns("drop", 100, 90, 500),
        *turns("redirect", 200, 200, 210),
        *turns("nftables", 1000, 1200, 1100),
        *turns("xdpmasq-xdp", 250, 240, 220),
    ]
    drop, redirect, nftables, ours = reported(played).rows
    assert (drop.ns, drop.share_ns, drop.mpps) == (100, 0, 10)
    assert (redirect.share_ns, redirect.against_best) == (100, 1)
    assert (nftables.ns, nftables.against_rival) == (1100, 1)
    assert (ours.ns, ours.ns_least, ours.ns_most, ours.share_ns) == (240, 220, 250, 140)
    assert ours.against_rival == pytest.approx(1100 / 240)
    assert ours.against_best == pytest.approx(200 / 240)
    assert ours.spread == pytest.approx(15 / 240)


def test_directions_are_weighed_by_packets() -> None:
    turn = Turn("drop", 1, (tally("out", 100, 200), tally("in", 300, 400)))
    row = reported([turn]).rows[0]
    assert (row.ns_out, row.ns_in, row.ns) == (200, 400, 350)


def test_an_invalid_round_does_not_count_and_is_shown() -> None:
    lossy = tally(ns=1, seen=97)
    played = [*turns("nftables", 1000, 1002), Turn("nftables", 3, (lossy,), tuple(lossy.problems))]
    result = reported(played)
    row = result.rows[0]
    assert (row.ns, row.valid, row.invalid) == (1001, 2, 1)
    assert row.problems == ("round 3: 3 of 100 outbound packets lost",)
    assert not result.valid


def test_a_contestant_that_fails_leaves_the_others_their_figures() -> None:
    played = [*turns("drop", 100), Turn("nftables", 1, failure=MasqError("no nft", "not installed"))]
    result = reported(played)
    drop, nftables = result.rows
    assert drop.ns == 100
    assert (nftables.ns, nftables.failure, nftables.against_rival) == (None, "no nft: not installed", None)
    assert not result.valid


def test_without_base_and_rivals_only_costs_are_told() -> None:
    row = reported(turns("xdpmasq-tc", 1200)).rows[0]
    assert (row.ns, row.share_ns, row.against_rival, row.against_best) == (1200, None, None, None)


@pytest.mark.parametrize(
    ("cost", "met"),
    [
        pytest.param(200, [True, True, None], id="both reached, on the line"),
        pytest.param(201, [True, False, None], id="a little slower than the redirect allows"),
        pytest.param(300, [False, False, None], id="too slow"),
    ],
)
def test_marks(cost: int, met: list[bool | None]) -> None:
    played = [*turns("redirect", 164), *turns("nftables", 910), *turns("xdpmasq-xdp", cost)]
    result = reported(played)
    assert [mark.met for mark in result.marks] == met
    assert [(mark.contestant, mark.least) for mark in result.marks] == [
        ("xdpmasq-xdp", 4.5), ("xdpmasq-xdp", 0.82), ("xdpmasq-tc", 1.15),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "marked"),
    [
        pytest.param(Settings(), True, id="default"),
        pytest.param(Settings(rounds=3, packets=1000), True, id="quick"),
        pytest.param(Settings(directions=("in", "out")), True, id="order of directions"),
        pytest.param(Settings(directions=("out",)), False, id="one direction"),
        pytest.param(Settings(flows=1), False, id="one flow"),
        pytest.param(Settings(frame_bytes=1400), False, id="long frames"),
    ],
)
def test_marks_are_only_held_against_the_settings_they_are_meant_for(settings: Settings, marked: bool) -> None:
    assert bool(reported(turns("drop", 100), settings).marks) is marked
    assert MARKS


def test_accounted_is_the_median_share_of_presence() -> None:
    played = [
        Turn("drop", number, (tally(usage=Usage(cpu, 1000)),)) for number, cpu in enumerate((900, 990, 1000), 1)
    ]
    assert reported(played).accounted == pytest.approx(0.99)


def test_the_report_is_json() -> None:
    result = reported([*turns("drop", 100), *turns("nftables", 1000)])
    fields = json.loads(json.dumps(result.as_dict()))
    assert fields["rows"][1]["against_rival"] == 1
    assert fields["settings"]["frame_bytes"] == 64
    assert fields["marks"][0]["met"] is None
    assert fields["valid"] is True


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
    rotated = [rounds._rotated(chosen(["drop", "redirect", "forward"]), by) for by in range(4)]
    assert [[each.name for each in order] for order in rotated] == [
        ["drop", "redirect", "forward"],
        ["redirect", "forward", "drop"],
        ["forward", "drop", "redirect"],
        ["drop", "redirect", "forward"],
    ]


def test_contestants_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert [each.name for each in chosen(["nftables", "drop"])] == ["drop", "nftables"]
    assert len(chosen([])) == 6
    with pytest.raises(UsageError, match="no contestant iptables: there are drop, redirect, forward"):
        chosen(["iptables"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"flows": 0},
        {"flows": 1_048_577},
        {"flows": 30_001, "scenario": "setup"},
        {"frame_bytes": 62},
        {"frame_bytes": 65},
        {"frame_bytes": 1516},
        {"rounds": 0},
        {"packets": 0},
    ],
    ids=lambda fields: "{}={}".format(*next(iter(fields.items()))),
)
def test_settings_that_cannot_be_measured(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_the_words_for_what_is_wrong_come_from_the_c() -> None:
    assert len(REASONS) == 7
    assert {"address", "TTL", "port", "UDP checksum"} <= set(REASONS)
    assert not any(re.search(r"[_\\]", words) for words in REASONS)
