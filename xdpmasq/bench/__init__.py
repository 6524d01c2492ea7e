"""The benchmark: what a packet costs, ours beside the kernel's own, measured in namespaces of its own.

::

    report = run(["forward"], Settings(), Chosen(), conditions)

====================  ==============================================================
topology.py           three namespaces in a row
traffic.c             generators, sinks, and the gateways that need no kernel
generator.py          bounded passes of that traffic, and what became of it
probe.py              a client and a server on either side of the gateway
measure.py            CPU time of the core that carries everything
conntrack.py          how much the kernel's own NAT may hold
contestants.py        the gateways: how to set them up, what they must do to a packet
stage.py              contestants side by side, each in a network of its own
turns.py              flows opened; every contestant once in each round
forward.py setup.py scale.py latency.py tcp.py memory.py isolated.py control.py     one scenario each
figures.py            medians, shares, quotients
report.py marks.py    what was found, and what was promised
terminal.py markdown.py plot.py     three ways to show it
====================  ==============================================================
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from xdpmasq.bench import conntrack, control, forward, isolated, latency, measure, memory, scale, setup, tcp
from xdpmasq.bench.contestants import Chosen, parse_external
from xdpmasq.bench.marks import MARKS
from xdpmasq.bench.report import Report, Section, host, valued
from xdpmasq.bench.stage import Settings, Stage
from xdpmasq.errors import HostError, UsageError

__all__ = ["SCENARIOS", "Chosen", "Conditions", "Report", "Scenario", "Settings", "named", "parse_external", "run"]


@dataclass(frozen=True)
class Scenario:
    """What one can ask for by name.

    Attributes:
        seconds: about how long it takes here, for the estimate of the time left.
    """

    name: str
    summary: str
    seconds: float
    run: Callable[[Stage], Iterator[Section]]


SCENARIOS = (
    Scenario("forward", "CPU time for a packet of an established flow", 60, forward.run),
    Scenario("scale", "the same against the number of flows", 180, scale.run),
    Scenario("setup", "CPU time for a new flow", 60, setup.run),
    Scenario("latency", "UDP round trips", 40, latency.run),
    Scenario("tcp", "bulk TCP for a second of CPU time", 120, tcp.run),
    Scenario("memory", "bytes for a session", 40, memory.run),
    Scenario("isolated", "each program by itself", 25, isolated.run),
    Scenario("control", "attaching, listing, expiring", 60, control.run),
)


def named(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of those names, in order; every one for ``all``.

    Raises:
        UsageError: there is none of a name.
    """
    known = [scenario.name for scenario in SCENARIOS]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise UsageError(f"no scenario {unknown[0]}", f"there are {', '.join(known)}", "name one of these, or all")
    return [scenario for scenario in SCENARIOS if scenario.name in names or "all" in names]


@dataclass(frozen=True)
class Conditions:
    """Under which it is run.

    Attributes:
        cpu: the core that carries everything; None: the last this process may use.
        raise_conntrack: connection tracking gets room for all flows meanwhile, on the whole machine.
        name: with which the namespaces' names begin.
    """

    cpu: int | None = None
    raise_conntrack: bool = False
    name: str = ""


def run(
    names: Sequence[str],
    settings: Settings,
    chosen: Chosen,
    conditions: Conditions,
    tell: Callable[[str, float], None] = lambda text, done: None,
) -> Report:
    """Plays the scenarios.

    Args:
        tell: is told what happens, and how much of all of it is done, from 0 to 1.

    Raises:
        UsageError: this cannot be measured.
        HostError: not root, or bcc or a tool is missing.
    """
    scenarios = named(names)
    if os.geteuid() != 0:
        raise HostError("the bench cannot build its network", "network namespaces need root", "run it with sudo")
    started = time.monotonic()
    name = conditions.name or f"masq-bench-{os.getpid()}"
    cpu = measure.usable_cpu(conditions.cpu)
    sections: list[Section] = []
    total, before = sum(scenario.seconds for scenario in scenarios), 0.0
    with contextlib.ExitStack() as stack:
        if conditions.raise_conntrack:
            stack.enter_context(conntrack.raised(max((*settings.flows, settings.sessions, *scale.FLOWS))))
        stage = stack.enter_context(Stage(settings, cpu, name, chosen))
        for scenario in scenarios:
            stage.tell = _part(scenario, before / total, scenario.seconds / total, tell)
            stage.expect(1)
            sections += scenario.run(stage)
            before += scenario.seconds
        machine = host(cpu)  # before connection tracking is put back
    return Report(machine, tuple(sections), valued(MARKS, sections), time.monotonic() - started)


def _part(
    scenario: Scenario, start: float, length: float, tell: Callable[[str, float], None]
) -> Callable[[str, float], None]:
    """A listener for one scenario, as part of all."""
    return lambda text, done: tell(f"{scenario.name}: {text}", start + length * done)
