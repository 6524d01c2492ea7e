"""``--scenario setup``: what a new flow costs; every packet opens one, and the tables are emptied again and again."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from xdpmasq.bench import conntrack, forward, turns
from xdpmasq.bench.contestants import BEST, RIVAL
from xdpmasq.bench.generator import SMALLEST_FRAME, Tally
from xdpmasq.bench.report import Column, Drawing, Line, Section
from xdpmasq.bench.stage import Lane, Stage, rotated
from xdpmasq.bench.topology import endpoints
from xdpmasq.bench.turns import Case, Turn
from xdpmasq.errors import UsageError

FLOWS, EXTERNALS = 10_000, (1, 4)
_WARM_UPS = 2
_COLUMNS = (
    Column("ns"),
    Column("±", ".0%"),
    Column("share"),
    Column(f"× {RIVAL}", ".2f"),
    Column(f"of {BEST}", ".2f"),
)


def run(stage: Stage) -> Iterator[Section]:
    """A table for each number of public addresses."""
    settings = stage.settings
    flows = max(settings.flows or (FLOWS,))
    wanted = settings.externals or EXTERNALS
    for number in wanted:
        if flows > endpoints(number):
            raise UsageError(
                f"cannot open {flows:,} flows in setup",
                f"{number} public address{'es' * (number > 1)} can give {endpoints(number):,} a port of their own",
                f"--flows {endpoints(number)}, or more --externals",
            )
    for nth, number in enumerate(wanted):
        yield _with_externals(stage, flows, number, nth, len(wanted))


def _with_externals(stage: Stage, flows: int, externals: int, nth: int, of: int) -> Section:
    settings = stage.settings
    case = Case(flows, (settings.sizes or (SMALLEST_FRAME,))[0], ("out",))
    played: list[Turn] = []
    lanes = stage.lanes(externals=externals)
    stage.expect(len(lanes) * settings.rounds, nth, of)
    for round_ in range(1, settings.rounds + 1):
        for lane in rotated([lane for lane in lanes if not turns.why_not(lane, flows)], round_ - 1):
            stage.step(f"round {round_}, {lane.name}")
            work = functools.partial(_opened, lane, round_, case, settings.packets)
            played.append(turns.guarded(lane, round_, work))
    return Section(
        key=f"setup/{externals}",
        title=f"New flows: each packet opens one, {externals} public address{'es' * (externals > 1)}",
        command=f"xdpmasq bench --scenario setup --externals {externals} --flows {flows} "
        f"--rounds {settings.rounds} --packets {settings.packets}",
        columns=_COLUMNS,
        lines=tuple(_lines(lanes, flows, played)),
        notes=(
            f"CPU time for each, medians of {settings.rounds} rounds of {settings.packets:,}; the tables are emptied "
            f"after every {flows:,}.",
            forward.checked(played),
        ),
        drawing=Drawing("bars", ("ns",), "ns for a new flow"),
        accounted=forward.accounted(played),
    )


def _lines(lanes: list[Lane], flows: int, played: list[Turn]) -> Iterator[Line]:
    wanted = [forward.COLUMNS.index(column) for column in _COLUMNS]
    for line in forward.lines(lanes, flows, played):
        yield Line(line.name, tuple(line.values[each] for each in wanted), line.problems, line.absent)


def _opened(lane: Lane, round_: int, case: Case, packets: int) -> Turn:
    """Warm-ups, in which all ports are looked at, and what is measured."""
    tallies: list[Tally] = []
    problems: list[str] = []
    for number in range(_WARM_UPS + -(-packets // case.flows)):
        warming = number < _WARM_UPS
        lane.contestant.forget(lane.topology)
        lane.traffic.begin(case.flows, case.frame_bytes)
        check_every = 1 if warming else case.check_every
        tally = lane.traffic.send("out", case.flows, lane.contestant.expected, check_every=check_every)
        problems += tally.problems
        if warming and lane.contestant.expected.translated:
            problems += lane.traffic.port_problems()
        if lane.contestant.background and (tracked := conntrack.count(lane.topology)) < case.flows:
            problems.append(f"its tables cannot be emptied: the kernel tracks {tracked:,} of {case.flows:,} flows")
            break
        if not warming:
            tallies.append(tally)
    return Turn(lane.name, round_, tuple(tallies), tuple(problems))
