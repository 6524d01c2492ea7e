"""The benchmark: what a packet costs, ours beside the kernel's own, measured in namespaces of its own.

::

    with Bench(Settings()) as bench:
        for turn in bench.play():
            ...
    report = bench.report()

====================  ==============================================================
topology.py           three namespaces in a row
traffic.c             generators, sinks, and the gateways that need no kernel
generator.py          bounded passes of that traffic, and what became of it
measure.py            CPU time of the core that carries everything
contestants.py        the gateways: how to set them up, what they must do to a packet
rounds.py             warm-up, chunks, turns; every contestant once in each round
report.py             medians, shares, quotients, marks
====================  ==============================================================
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from xdpmasq.bench import measure, rounds
from xdpmasq.bench.contestants import CONTESTANTS, Contestant, chosen
from xdpmasq.bench.generator import Traffic
from xdpmasq.bench.report import Host, Mark, Report, Row, host, report
from xdpmasq.bench.rounds import Settings, Turn
from xdpmasq.bench.topology import Topology

__all__ = ["CONTESTANTS", "Bench", "Contestant", "Host", "Mark", "Report", "Row", "Settings", "Turn", "chosen"]


class Bench:
    """One run, from building the network to removing it; a context manager.

    Args:
        contestants: who takes part; everybody by default.
        cpu: the core that carries everything; by default the last this process may use.
        name: with which the namespaces' names begin; by default one of this process's own.

    Raises:
        HostError: not root, bcc or a tool is missing.
        DatapathError: the kernel does not take the traffic's programs.
    """

    def __init__(
        self,
        settings: Settings,
        contestants: Sequence[Contestant] = CONTESTANTS,
        *,
        cpu: int | None = None,
        name: str | None = None,
    ) -> None:
        self.settings = settings
        self.contestants = list(contestants)
        self.topology = Topology(name)
        self.turns: list[Turn] = []
        self._cpu = measure.usable_cpu(cpu)
        self._stack = contextlib.ExitStack()
        self._started = time.monotonic()

    def __enter__(self) -> Bench:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.topology)
            self._traffic = Traffic(
                self.topology, flows=self.settings.flows, frame_bytes=self.settings.frame_bytes, cpu=self._cpu
            )
            stack.callback(self._traffic.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def play(self, announce: Callable[[str, int], None] = lambda name, round_: None) -> Iterator[Turn]:
        """All turns, as they end; ``announce`` is told contestant and round (from 1) before each.

        Raises:
            StillThereError: a contestant could not be taken down.
        """
        for turn in rounds.play(self._traffic, self.contestants, self.settings, announce):
            self.turns.append(turn)
            yield turn

    def report(self) -> Report:
        """The figures of the turns played so far; also after the end."""
        names = [contestant.name for contestant in self.contestants]
        return report(self.turns, names, self.settings, host(self._cpu), time.monotonic() - self._started)
