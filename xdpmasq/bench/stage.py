"""What every scenario is given: what is to be measured, who plays, on which core, and lanes to play in.

A *lane* is one contestant set up in a network of its own. All lanes stand side by side until the end, so that rounds
can go from one contestant to the next, and scenario after scenario, without setting anybody up again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from xdpmasq.bench import conntrack
from xdpmasq.bench import contestants as who
from xdpmasq.bench.contestants import AbsentError, Chosen, Contestant
from xdpmasq.bench.generator import BROADEST_FRAME, DIRECTIONS, SMALLEST_FRAME, Direction, Traffic
from xdpmasq.bench.topology import MOST_EXTERNALS, MOST_FLOWS, Topology
from xdpmasq.errors import MasqError, UsageError


@dataclass(frozen=True)
class Settings:
    """What is measured. Empty: what the scenario has by itself.

    Attributes:
        flows: UDP flows, one packet of each in turn; several make a table each.
        sizes: of frames, in bytes from the Ethernet header on, without the frame check sequence.
        directions: of the measured packets; warm-up always uses both.
        externals: numbers of public addresses.
        rounds: each contestant plays once in each.
        packets: measured for each direction in each round.
        seconds: of a TCP transfer; iperf3 knows whole ones only.
        sessions: that the memory and control scenarios open.
    """

    flows: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    directions: tuple[Direction, ...] = DIRECTIONS
    externals: tuple[int, ...] = ()
    rounds: int = 7
    packets: int = 200_000
    seconds: int = 2
    sessions: int = 1_000_000

    def __post_init__(self) -> None:
        """Raises: UsageError."""
        for flows in (*self.flows, self.sessions):
            if not 1 <= flows <= MOST_FLOWS:
                raise UsageError(f"cannot run {flows:,} flows", f"1 to {MOST_FLOWS:,} are possible")
        for size in self.sizes:
            if not SMALLEST_FRAME <= size <= BROADEST_FRAME or size % 2:
                raise UsageError(
                    f"cannot send frames of {size} bytes",
                    f"{SMALLEST_FRAME} to {BROADEST_FRAME}, even, without the check sequence, can be made",
                )
        for externals in self.externals:
            if not 1 <= externals <= MOST_EXTERNALS:
                raise UsageError(f"cannot have {externals} public addresses", f"1 to {MOST_EXTERNALS} are possible")
        if self.rounds < 1 or self.packets < 1:
            raise UsageError("nothing to measure", "rounds and packets begin at 1")


@dataclass
class Lane:
    """A contestant in a network of its own.

    Attributes:
        failure: why it could not be set up, or fell out later; it does not play any more.
        absent: why this machine does not have it.
    """

    contestant: Contestant
    traffic: Traffic
    failure: str = ""
    absent: str = ""

    @property
    def name(self) -> str:
        return self.contestant.name

    @property
    def topology(self) -> Topology:
        return self.traffic.topology

    @property
    def plays(self) -> bool:
        return not (self.failure or self.absent)


def _nobody(text: str, done: float) -> None:
    pass


class Stage:
    """Where scenarios are played; a context manager, after which no network is left.

    Args:
        cpu: the core that carries everything that is measured.
        name: with which the namespaces' names begin.

    Attributes:
        tell: is told what happens now, and how much of the scenario is done (0 to 1).
    """

    def __init__(self, settings: Settings, cpu: int, name: str, chosen: Chosen | None = None) -> None:
        self.settings, self.cpu, self.name, self.chosen = settings, cpu, name, chosen or Chosen()
        self.tell: Callable[[str, float], None] = _nobody
        self._standing: dict[tuple[str, int], Lane] = {}
        self._stack = contextlib.ExitStack()
        self._start, self._length, self._steps, self._done, self._made = 0.0, 1.0, 1, 0, 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def expect(self, steps: int, part: int = 0, parts: int = 1) -> None:
        """This part of the scenario will take so many steps of some equal length."""
        self._start, self._length = part / parts, 1 / parts
        self._steps, self._done = max(steps, 1), 0

    def step(self, text: str) -> None:
        """The next step begins."""
        self.tell(text, self._start + self._length * min(self._done / self._steps, 1))
        self._done += 1

    def flows_fit(self, flows: Sequence[int]) -> None:
        """Raises: UsageError: this machine's memory does not let the bench open so many."""
        if max(flows) > (most := who.most_flows()):
            why = f"this machine's {conntrack.memory_bytes() >> 30} GB let each contestant open {most:,}"
            raise UsageError(f"cannot run {max(flows):,} flows", why, f"--flows {most}")

    def playing(
        self, suits: Callable[[Contestant], bool] = lambda each: True, externals: int = 1
    ) -> list[Contestant]:
        """Whoever is chosen and suits the scenario."""
        return [each for each in self.chosen.among(externals) if suits(each)]

    def lanes(
        self, suits: Callable[[Contestant], bool] = lambda each: True, *, externals: int = 1, wired: bool = True
    ) -> list[Lane]:
        """A lane for each of those; they stay for the scenarios that follow.

        Args:
            wired: with generators and sinks; otherwise sockets can talk through the gateways.
        """
        lanes = [self._lane(each, externals) for each in self.playing(suits, externals)]
        for lane in lanes:
            lane.traffic.wire() if wired else lane.traffic.unwire()
        return lanes

    def _lane(self, contestant: Contestant, externals: int) -> Lane:
        key = (contestant.name, externals)
        if key not in self._standing:
            self._standing[key] = self._stack.enter_context(self.lane(contestant, externals))
        return self._standing[key]

    @contextlib.contextmanager
    def lane(self, contestant: Contestant, externals: int = 1) -> Iterator[Lane]:
        """A fresh lane, for a while; whether the contestant could be set up stands in it."""
        self.tell(f"setting up {contestant.name}", self._start)
        with contextlib.ExitStack() as stack:
            self._made += 1
            network = stack.enter_context(Topology(f"{self.name}-{self._made}", externals))
            traffic = Traffic(network, self.cpu)
            stack.callback(traffic.close)
            lane = Lane(contestant, traffic)
            try:
                stack.enter_context(contestant.running(traffic))
            except AbsentError as error:
                lane.absent = str(error)
            except MasqError as error:
                lane.failure = str(error)
            yield lane


def rotated(lanes: Sequence[Lane], by: int) -> list[Lane]:
    """Those that play, beginning with another one each time."""
    playing = [lane for lane in lanes if lane.plays]
    start = by % len(playing) if playing else 0
    return playing[start:] + playing[:start]
