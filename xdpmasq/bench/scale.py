"""``--scenario scale``: what a packet costs, against the number of flows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from xdpmasq.bench import figures, forward, turns
from xdpmasq.bench.contestants import BEST, RIVAL
from xdpmasq.bench.report import Column, Drawing, Line, Section
from xdpmasq.bench.stage import Lane, Stage
from xdpmasq.bench.turns import Case, Turn

FLOWS = (1, 1000, 30_000, 100_000, 1_000_000)

Costs = Mapping[str, Mapping[int, float | None]]  # by contestant and flows


def run(stage: Stage) -> Iterator[Section]:
    """The costs, and the speeds against the bare redirect and nftables."""
    settings = stage.settings
    flows = tuple(sorted(settings.flows or FLOWS))
    stage.flows_fit(flows)
    (size,) = settings.sizes[:1] or forward.SIZES[:1]
    lanes = stage.lanes()
    stage.expect(turns.steps(lanes, settings.rounds) * len(flows))
    played = {each: turns.play(stage, lanes, Case(each, size, settings.directions)) for each in flows}
    costs = {lane.name: {each: _cost(lane, played[each]) for each in flows} for lane in lanes}
    command = (
        f"xdpmasq bench --scenario scale {' '.join(f'--flows {each}' for each in flows)} --size {size} "
        f"--rounds {settings.rounds} --packets {settings.packets}"
    )
    yield Section(
        key="scale",
        title=f"Cost against the number of flows, {size}-byte frames",
        command=command,
        columns=tuple(Column(f"{each:,}") for each in flows),
        lines=tuple(_lines(lanes, played, costs)),
        notes=(
            f"CPU time for each packet, ns, medians of {settings.rounds} rounds of {settings.packets:,} packets each "
            "way; every flow was seen just before each of them.",
        ),
        drawing=Drawing("curve", tuple(f"{each:,}" for each in flows), "ns for a packet"),
        accounted=forward.accounted([turn for some in played.values() for turn in some]),
    )
    for against, title in ((BEST, "the bare redirect's"), (RIVAL, "nftables'")):
        yield Section(
            key=f"scale/{against}",
            title=f"Speed by {title}",
            command=command,
            columns=tuple(Column(f"{each:,}", ".2f") for each in flows),
            lines=tuple(_speeds(costs, costs.get(against, {}))),
        )


def _cost(lane: Lane, played: Sequence[Turn]) -> float | None:
    return figures.median(
        turn.ns_per_packet() for turn in played if turn.contestant == lane.name and forward.counts(turn)
    )


def _lines(lanes: Sequence[Lane], played: Mapping[int, Sequence[Turn]], costs: Costs) -> Iterator[Line]:
    for lane in lanes:
        found = [f"{flows:,} flows: {each}" for flows in played for each in forward.invalid(lane, played[flows])]
        found += [f"FAILED: {lane.failure}"] if lane.failure else []
        reasons = [f"{flows:,}: {why}" for flows in played if (why := forward.absent(lane, flows))]
        yield Line(lane.name, tuple(costs[lane.name].values()), tuple(found), lane.absent or "; ".join(reasons))


def _speeds(costs: Costs, theirs: Mapping[int, float | None]) -> Iterator[Line]:
    for name, mine in costs.items():
        yield Line(name, tuple(figures.quotient(theirs.get(flows), cost) for flows, cost in mine.items()))
