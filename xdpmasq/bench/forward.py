"""``--scenario forward``: what a packet of an established flow costs, for each number of flows and size of frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from xdpmasq.bench import figures, turns
from xdpmasq.bench.contestants import BASE, BEST, RIVAL
from xdpmasq.bench.report import Column, Drawing, Line, Section
from xdpmasq.bench.stage import Lane, Stage
from xdpmasq.bench.turns import Case, Turn

FLOWS, SIZES = (1000,), (64, 1400)
COLUMNS = (
    Column("ns"),
    Column("±", ".0%"),
    Column("ns out"),
    Column("ns in"),
    Column("share"),
    Column("share by nftables'", ".3f"),
    Column(f"× {RIVAL}", ".2f"),
    Column(f"of {BEST}", ".2f"),
)


def run(stage: Stage) -> Iterator[Section]:
    """A table for each case."""
    settings = stage.settings
    flows, sizes = settings.flows or FLOWS, settings.sizes or SIZES
    stage.flows_fit(flows)
    lanes = stage.lanes()
    stage.expect(turns.steps(lanes, settings.rounds) * len(flows) * len(sizes))
    for case in (Case(each, size, settings.directions) for each in flows for size in sizes):
        yield _section(stage, lanes, case, turns.play(stage, lanes, case))


def _section(stage: Stage, lanes: Sequence[Lane], case: Case, played: Sequence[Turn]) -> Section:
    settings = stage.settings
    ways = "both directions" if len(case.directions) > 1 else f"{case.directions[0]}bound"
    direction = "both" if len(case.directions) > 1 else case.directions[0]
    return Section(
        key=f"forward/{case.flows}/{case.frame_bytes}",
        title=f"Established flows: {case.flows:,}, {case.frame_bytes}-byte frames, {ways}",
        command=f"xdpmasq bench --scenario forward --flows {case.flows} --size {case.frame_bytes} "
        f"--direction {direction} --rounds {settings.rounds} --packets {settings.packets}",
        columns=COLUMNS,
        lines=tuple(lines(lanes, case.flows, played)),
        notes=(
            f"CPU time for each packet, medians of {settings.rounds} rounds of {settings.packets:,} each way; "
            f"share: what the gateway adds to {BASE}.",
            checked(played),
        ),
        drawing=Drawing("bars", ("ns",), "ns for a packet"),
        accounted=accounted(played),
    )


def lines(lanes: Sequence[Lane], flows: int, played: Sequence[Turn]) -> Iterator[Line]:
    """One for each contestant."""
    valid = {lane.name: [turn for turn in played if turn.contestant == lane.name and counts(turn)] for lane in lanes}
    costs = {name: figures.median(turn.ns_per_packet() for turn in some) for name, some in valid.items()}
    shares = {name: figures.difference(cost, costs.get(BASE)) for name, cost in costs.items()}
    against_rival, against_best = figures.speeds(costs, RIVAL), figures.speeds(costs, BEST)
    for lane in lanes:
        name, some = lane.name, valid[lane.name]
        values = (
            costs[name],
            figures.spread([cost for turn in some if (cost := turn.ns_per_packet())]),
            figures.median(turn.ns_per_packet("out") for turn in some),
            figures.median(turn.ns_per_packet("in") for turn in some),
            shares[name],
            figures.quotient(shares[name], shares.get(RIVAL)),
            against_rival[name],
            against_best[name],
        )
        yield Line(name, values, problems(lane, played), absent(lane, flows))


def counts(turn: Turn) -> bool:
    """Whether it goes into the figures."""
    return bool(turn.tallies) and not turn.problems


def problems(lane: Lane, played: Sequence[Turn]) -> tuple[str, ...]:
    """Why a contestant's line is not valid, in words."""
    return (*invalid(lane, played), *([f"FAILED: {lane.failure}"] if lane.failure else []))


def invalid(lane: Lane, played: Sequence[Turn]) -> list[str]:
    """What was wrong with a contestant's turns."""
    return [
        f"{f'round {turn.round}' if turn.round else 'warm-up'}: {problem}"
        for turn in played
        if turn.contestant == lane.name
        for problem in turn.problems
    ]


def absent(lane: Lane, flows: int) -> str:
    """Why there is nothing, where that is nobody's fault."""
    return "" if lane.failure else turns.why_not(lane, flows)


def checked(played: Sequence[Turn]) -> str:
    """How much of the traffic was looked at."""
    tallies = [tally for turn in played for tally in turn.tallies]
    seen, whole = sum(tally.seen for tally in tallies), sum(tally.checked for tally in tallies)
    return (
        f"Addresses, TTL and length of all {seen:,} packets were checked, ports and checksums of {whole:,}, "
        "and of all in the warm-up."
    )


def accounted(played: Sequence[Turn]) -> float | None:
    """Median over turns of CPU time by time on the core."""
    return figures.median(turn.usage.cpu_ns / turn.usage.presence_ns for turn in played if turn.usage.presence_ns)
