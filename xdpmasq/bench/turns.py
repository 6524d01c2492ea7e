"""The order of play for frames: every contestant once in each round, with all of its flows seen just before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xdpmasq.bench import conntrack
from xdpmasq.bench.generator import DIRECTIONS, Direction, Tally
from xdpmasq.bench.measure import Usage
from xdpmasq.bench.stage import Lane, Stage, rotated
from xdpmasq.errors import MasqError

# Of a flow's first packets, outbound and inbound in turn: the first makes the session, the second lets XDP have it.
_WARM_UP_PASSES = 2
# Before each turn all flows are seen once more each way, and at least so many packets: caches are warm, the page pool
# of the generator is filled, and no flow has been silent for so long that XDP would hand it to the kernel again.
_SETTLE_PACKETS = 20_000
# Directions take turns; a call of the generator costs some 60 µs, here about 1 ns a packet.
_CHUNK_PACKETS = 50_000
# One full check in so many packets; a prime, so that in time all flows have their turn.
_CHECK_EVERY_SMALL, _CHECK_EVERY_LARGE = 61, 509


@dataclass(frozen=True)
class Case:
    """What all contestants play in one table."""

    flows: int
    frame_bytes: int
    directions: tuple[Direction, ...] = DIRECTIONS

    @property
    def check_every(self) -> int:
        return _CHECK_EVERY_SMALL if self.frame_bytes <= 256 else _CHECK_EVERY_LARGE


@dataclass(frozen=True)
class Turn:
    """One contestant in one round; round 0 is its warm-up.

    Attributes:
        tallies: of the measured passes.
        problems: why it does not count, in words; empty when every packet came and was right.
    """

    contestant: str
    round: int
    tallies: tuple[Tally, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def usage(self) -> Usage:
        return sum((tally.usage for tally in self.tallies), Usage())

    def ns_per_packet(self, direction: Direction | None = None) -> float | None:
        """CPU time per packet sent, of one direction or of all measured; None where nothing was."""
        tallies = [tally for tally in self.tallies if direction in (None, tally.direction)]
        sent = sum(tally.sent for tally in tallies)
        return sum(tally.usage.cpu_ns for tally in tallies) / sent if sent else None


def why_not(lane: Lane, flows: int) -> str:
    """Why a lane cannot play with so many flows; empty when it can."""
    if lane.failure or lane.absent:
        return lane.failure or lane.absent
    if lane.contestant.tracks and not conntrack.holds(flows):
        limit = f"nf_conntrack_max of this machine is {conntrack.most():,}"
        return f"not measured: {limit}, and --raise-conntrack was not given"
    return ""


def steps(lanes: Sequence[Lane], rounds: int) -> int:
    """That :func:`play` takes."""
    return len(lanes) * (rounds + 1)


def play(stage: Stage, lanes: Sequence[Lane], case: Case) -> list[Turn]:
    """Opens all flows everywhere, and then measures, round by round; one that fails does not play any more."""
    able = [lane for lane in lanes if not why_not(lane, case.flows)]
    turns = []
    for lane in able:
        stage.step(f"{case.flows:,} flows, opening those of {lane.name}")
        turns.append(guarded(lane, 0, functools.partial(opened, lane, case)))
    for round_ in range(1, stage.settings.rounds + 1):
        for lane in rotated(able, round_ - 1):
            stage.step(f"{case.flows:,} flows, round {round_}, {lane.name}")
            work = functools.partial(_measured, lane, round_, case, stage.settings.packets)
            turns.append(guarded(lane, round_, work))
    return turns


def guarded(lane: Lane, round_: int, work: Callable[[], Turn]) -> Turn:
    """A turn; a contestant that fails in it falls out."""
    try:
        return work()
    except MasqError as error:
        lane.failure = str(error)
        return Turn(lane.name, round_)


def opened(lane: Lane, case: Case) -> Turn:
    """All flows of the case, opened in empty tables and seen in both directions; every packet is checked whole."""
    traffic, expected = lane.traffic, lane.contestant.expected
    lane.contestant.forget(lane.topology)
    traffic.begin(case.flows, case.frame_bytes)
    problems = [
        problem
        for direction in DIRECTIONS * _WARM_UP_PASSES
        for problem in traffic.send(direction, case.flows, expected).problems
    ]
    return Turn(lane.name, 0, (), tuple(problems + (traffic.port_problems() if expected.translated else [])))


def _measured(lane: Lane, round_: int, case: Case, packets: int) -> Turn:
    passes = max(case.flows, min(_SETTLE_PACKETS, packets))
    settling = [_sent(lane, direction, passes, case) for direction in DIRECTIONS]
    tallies = tuple(_chunks(lane, case, packets))
    problems = [problem for tally in (*settling, *tallies) for problem in tally.problems]
    return Turn(lane.name, round_, tallies, tuple(problems))


def _chunks(lane: Lane, case: Case, packets: int) -> Iterator[Tally]:
    for sent in range(0, packets, _CHUNK_PACKETS):
        for direction in case.directions:
            yield _sent(lane, direction, min(_CHUNK_PACKETS, packets - sent), case)


def _sent(lane: Lane, direction: Direction, packets: int, case: Case) -> Tally:
    return lane.traffic.send(direction, packets, lane.contestant.expected, check_every=case.check_every)
