"""``--scenario latency``: UDP round trips through the gateway, between two sockets of one thread (probe.py).

What is timed is four system calls and two passes of the gateway. Where the scheduler gave the core to somebody else
meanwhile, which it counts for the thread, a block of round trips says nothing about the gateway and is left out.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from xdpmasq.bench import figures, measure
from xdpmasq.bench.contestants import BASE, RIVAL
from xdpmasq.bench.probe import Probe
from xdpmasq.bench.report import Column, Drawing, Line, Section
from xdpmasq.bench.stage import Lane, Stage, rotated

_PERCENTILES = (50.0, 99.0, 99.9)
_BLOCK = 10
_ENOUGH = 0.2  # of the blocks must have been undisturbed
_PER_PACKET = 10  # a round trip for so many packets of the other scenarios
_WARM_UP = 2000
_PATIENCE_S = 1.0

Samples = npt.NDArray[np.int64]


def run(stage: Stage) -> Iterator[Section]:
    """One table."""
    settings = stage.settings
    trips = max(settings.packets // _PER_PACKET // _BLOCK, 1) * _BLOCK
    lanes = stage.lanes(lambda each: each.name != BASE, wired=False)
    stage.expect(len(lanes) * settings.rounds)
    found: dict[str, list[Samples]] = {lane.name: [] for lane in lanes}
    problems: dict[str, list[str]] = {lane.name: [] for lane in lanes}
    for round_ in range(1, settings.rounds + 1):
        for lane in rotated(lanes, round_ - 1):
            stage.step(f"round {round_}, {lane.name}")
            samples, wrong = _round_trips(lane, trips, stage.cpu)
            if wrong:
                problems[lane.name] += [f"round {round_}: {each}" for each in wrong]
            else:
                found[lane.name].append(samples)
    yield Section(
        key="latency",
        title="UDP round trips, µs",
        command=f"xdpmasq bench --scenario latency --rounds {settings.rounds} --packets {settings.packets}",
        columns=(
            *(Column(f"p{percent:g}", ".2f") for percent in _PERCENTILES),
            *(Column(f"p{percent:g} × {RIVAL}", ".2f") for percent in _PERCENTILES[:2]),
        ),
        lines=tuple(_lines(lanes, found, problems)),
        notes=(
            f"Medians of {settings.rounds} rounds of {trips:,} round trips; four system calls are part of each.",
            _undisturbed(found, trips),
        ),
        drawing=Drawing("bars", ("p50", "p99"), "µs for a round trip"),
    )


def timed(probe: Probe, trips: int) -> tuple[Samples, int]:
    """Durations of undisturbed round trips, ns, and how many were left out. Raises: TimeoutError."""
    kept: list[int] = []
    left_out = 0
    for _ in range(trips // _BLOCK):
        before = _preemptions()
        block = []
        for _ in range(_BLOCK):
            started = time.perf_counter_ns()
            probe.echo()
            block.append(time.perf_counter_ns() - started)
        if _preemptions() == before:
            kept += block
        else:
            left_out += len(block)
    return np.array(kept, np.int64), left_out


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def _round_trips(lane: Lane, trips: int, cpu: int) -> tuple[Samples, list[str]]:
    with Probe(lane.topology, _PATIENCE_S) as probe, measure.pinned(cpu):
        for _ in range(3):  # the first make the session, and get it into XDP
            if problems := probe.problems(lane.contestant.expected):
                return np.zeros(0, np.int64), problems
        try:
            timed(probe, _WARM_UP)
            samples, _ = timed(probe, trips)
        except TimeoutError:
            return np.zeros(0, np.int64), ["a datagram or its answer was lost"]
        problems = probe.problems(lane.contestant.expected)
    if len(samples) < _ENOUGH * trips:
        problems.append(f"others had the core in all but {len(samples)} of {trips} round trips")
    return samples, problems


def _lines(
    lanes: Sequence[Lane], found: Mapping[str, Sequence[Samples]], problems: Mapping[str, Sequence[str]]
) -> Iterator[Line]:
    microseconds = {
        name: [
            figures.median(float(np.percentile(each, percent)) / 1e3 for each in rounds) for percent in _PERCENTILES
        ]
        for name, rounds in found.items()
    }
    rival = microseconds.get(RIVAL, [None] * len(_PERCENTILES))
    for lane in lanes:
        mine = microseconds[lane.name]
        quotients = [figures.quotient(theirs, ours) for theirs, ours in zip(rival[:2], mine[:2], strict=True)]
        wrong = [*problems[lane.name], *([f"FAILED: {lane.failure}"] if lane.failure else [])]
        yield Line(lane.name, (*mine, *quotients), tuple(wrong), lane.absent)


def _undisturbed(found: Mapping[str, Sequence[Samples]], trips: int) -> str:
    kept, all_ = sum(len(each) for some in found.values() for each in some), trips * sum(map(len, found.values()))
    return f"{kept:,} of {all_:,} round trips were undisturbed by other processes on the core, and count."
