"""The order of play: every contestant once in each round, set up, warmed up, measured, taken down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from xdpmasq.bench.contestants import Contestant, StillThereError
from xdpmasq.bench.generator import (
    BROADEST_FRAME,
    DIRECTIONS,
    SMALLEST_FRAME,
    Direction,
    Tally,
    Traffic,
)
from xdpmasq.bench.measure import Usage
from xdpmasq.bench.topology import ENDPOINTS, MOST_FLOWS
from xdpmasq.errors import MasqError, UsageError

# Of a flow's first packets, outbound and inbound in turn: the first makes the session, the second lets XDP have it.
_WARM_UP_ROUNDS = 3
_SETTLE_PACKETS = 20_000  # as measured, but not counted: caches, and the page pool of the generator
# Directions take turns; a call of the generator costs some 60 µs, here about 1 ns a packet.
_CHUNK_PACKETS = 50_000
# One full check in so many packets; a prime, so that in time all flows have their turn.
_CHECK_EVERY_SMALL, _CHECK_EVERY_LARGE = 61, 509
_SETUP_WARM_UPS = 2

Scenario = Literal["established", "setup"]
SCENARIOS: tuple[Scenario, ...] = get_args(Scenario)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        scenario: in ``established`` all flows have been opened before; in ``setup`` each packet opens one, outbound,
            and the tables are emptied each time that all have had their turn.
        flows: UDP flows, one packet of each in turn.
        frame_bytes: from the Ethernet header on, without the frame check sequence.
        directions: of the measured packets; warm-up always uses both.
        packets: measured packets for each direction in each round.
    """

    flows: int = 1000
    frame_bytes: int = SMALLEST_FRAME
    directions: tuple[Direction, ...] = DIRECTIONS
    rounds: int = 7
    packets: int = 200_000
    scenario: Scenario = "established"

    def __post_init__(self) -> None:
        """Raises: UsageError."""
        most = ENDPOINTS if self.scenario == "setup" else MOST_FLOWS
        if not 1 <= self.flows <= most:
            raise UsageError(f"cannot run {self.flows:,} flows", f"1 to {most:,} fit one public address")
        if not SMALLEST_FRAME <= self.frame_bytes <= BROADEST_FRAME or self.frame_bytes % 2:
            raise UsageError(
                f"cannot send frames of {self.frame_bytes} bytes",
                f"even lengths from {SMALLEST_FRAME} to {BROADEST_FRAME} (without the check sequence) can be made",
            )
        if self.rounds < 1 or self.packets < 1:
            raise UsageError("nothing to measure", "rounds and packets begin at 1")

    @property
    def check_every(self) -> int:
        return _CHECK_EVERY_SMALL if self.frame_bytes <= 256 else _CHECK_EVERY_LARGE


@dataclass(frozen=True)
class Turn:
    """One contestant in one round.

    Attributes:
        tallies: of the measured passes.
        problems: why it does not count, in words; empty when every packet came and was right, also in warm-up.
        failure: why it could not even be set up; then there are no tallies.
    """

    contestant: str
    round: int
    tallies: tuple[Tally, ...] = ()
    problems: tuple[str, ...] = ()
    failure: MasqError | None = None

    @property
    def valid(self) -> bool:
        return not self.problems and self.failure is None

    @property
    def usage(self) -> Usage:
        return sum((tally.usage for tally in self.tallies), Usage())

    def ns_per_packet(self, direction: Direction | None = None) -> float | None:
        """CPU time per packet sent, of one direction or of all measured; None where nothing was."""
        tallies = [tally for tally in self.tallies if direction in (None, tally.direction)]
        sent = sum(tally.sent for tally in tallies)
        return sum(tally.usage.cpu_ns for tally in tallies) / sent if sent else None


def play(
    traffic: Traffic,
    contestants: Sequence[Contestant],
    settings: Settings,
    announce: Callable[[str, int], None] = lambda name, round_: None,
) -> Iterator[Turn]:
    """All turns, round by round, each round starting with another contestant.

    One that cannot be set up is not asked again.

    Args:
        announce: called before each turn with the contestant's name and the round, from 1.
    """
    left = list(contestants)
    for round_ in range(1, settings.rounds + 1):
        for contestant in _rotated(left, round_ - 1):
            announce(contestant.name, round_)
            turn = play_turn(traffic, contestant, settings, round_)
            if turn.failure:
                left.remove(contestant)
            yield turn


def _rotated(contestants: list[Contestant], by: int) -> list[Contestant]:
    start = by % len(contestants) if contestants else 0
    return contestants[start:] + contestants[:start]


def play_turn(traffic: Traffic, contestant: Contestant, settings: Settings, round_: int = 1) -> Turn:
    """Sets one contestant up, measures it and takes it down.

    Raises:
        StillThereError: it could not be taken down.
    """
    traffic.begin_turn()
    try:
        traffic.topology.forget_connections()
        with contestant.running(traffic):
            if settings.scenario == "setup":
                warm_up, ports, tallies = _opened(traffic, contestant, settings)
            else:
                warm_up = list(_warm_up(traffic, contestant, settings))
                ports = traffic.port_problems() if contestant.expected.translated else []
                tallies = list(_measured(traffic, contestant, settings))
    except StillThereError:
        raise
    except MasqError as error:
        return Turn(contestant.name, round_, failure=error)
    problems = [f"warm-up: {problem}" for tally in warm_up for problem in tally.problems]
    problems += ports + [problem for tally in tallies for problem in tally.problems]
    return Turn(contestant.name, round_, tuple(tallies), tuple(problems))


def _warm_up(traffic: Traffic, contestant: Contestant, settings: Settings) -> Iterator[Tally]:
    for _ in range(_WARM_UP_ROUNDS):
        for direction in DIRECTIONS:
            yield traffic.send(direction, settings.flows, contestant.expected)
    for direction in settings.directions:
        packets = min(_SETTLE_PACKETS, settings.packets)
        yield traffic.send(direction, packets, contestant.expected, check_every=settings.check_every)


def _opened(
    traffic: Traffic, contestant: Contestant, settings: Settings
) -> tuple[list[Tally], list[str], list[Tally]]:
    """Warm-up, in which all ports are looked at; what was wrong with them; and what is measured."""
    tallies, ports = [], []
    for number in range(_SETUP_WARM_UPS + -(-settings.packets // settings.flows)):
        warming = number < _SETUP_WARM_UPS
        contestant.forget(traffic.topology)
        traffic.begin_turn()
        check_every = 1 if warming else settings.check_every
        tallies.append(traffic.send("out", settings.flows, contestant.expected, check_every=check_every))
        if warming and contestant.expected.translated:
            ports += traffic.port_problems()
    return tallies[:_SETUP_WARM_UPS], ports, tallies[_SETUP_WARM_UPS:]


def _measured(traffic: Traffic, contestant: Contestant, settings: Settings) -> Iterator[Tally]:
    for sent in range(0, settings.packets, _CHUNK_PACKETS):
        for direction in settings.directions:
            packets = min(_CHUNK_PACKETS, settings.packets - sent)
            yield traffic.send(direction, packets, contestant.expected, check_every=settings.check_every)
