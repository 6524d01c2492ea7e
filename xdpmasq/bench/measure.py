"""CPU time of one core: what a packet costs, whoever's name the kernel writes it under.

Generator, gateway and sink of a pass all run on one core: the program runs in the calling thread (in batches of
64 packets with bottom halves off), and every veth on the way is a softirq raised on the same core. A softirq's time
is charged

* to the thread it interrupts, nearly always the generator's, because ``local_bh_enable()`` at the end of a batch
  runs what the batch has raised; the thread's CPU clock has it;
* to ``ksoftirqd`` of the core, when a softirq round took longer than 2 ms or ten repeats; ``/proc/PID/schedstat``
  has its nanoseconds.

So the measure is the CPU clock of the calling thread plus that of ksoftirqd. ``/proc/stat`` would be complete too,
but counts in ticks of 10 ms; wall-clock time would count whoever else uses the core.

That it is complete is checked in every run, against a sum that comes from elsewhere: wall-clock time, less what the
thread waited in the run queue (second field of its schedstat), plus ksoftirqd's time. A generator that is held in
the dispatcher (generator.py) never sleeps, so that is all the time in which the core did our work, even under other
load. The quotient of both is the report's ``accounted``: 0.99 to 1.00 here. It is lower where the hypervisor steals
time, and far lower under CONFIG_IRQ_TIME_ACCOUNTING, which takes softirqs out of the CPU clocks of threads: there the
second sum is the better measure, and the report says so.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xdpmasq.errors import HostError

_OWN_SCHEDSTAT = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True)
class Usage:
    """What the core spent on us between two readings, ns.

    Attributes:
        cpu_ns: CPU clocks of the thread and of ksoftirqd: the measure.
        presence_ns: wall-clock time in which either was on the core, softirqs, interrupts and stolen time included.
    """

    cpu_ns: int = 0
    presence_ns: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.cpu_ns + other.cpu_ns, self.presence_ns + other.presence_ns)

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu_ns - other.cpu_ns, self.presence_ns - other.presence_ns)


class CoreClock:
    """Reads the :class:`Usage` so far of the calling thread and of a core's softirq thread.

    Raises:
        HostError: the kernel shows no ``ksoftirqd`` for that core.
    """

    def __init__(self, cpu: int) -> None:
        self._softirqs = _softirq_thread(cpu)

    def softirqs_ns(self) -> int:
        """CPU time of the core's ksoftirqd so far."""
        return int(self._softirqs.read_text().split()[0])

    def read(self) -> Usage:
        softirqs_ns = self.softirqs_ns()
        waited_ns = int(_OWN_SCHEDSTAT.read_text().split()[1])
        return Usage(
            cpu_ns=time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID) + softirqs_ns,
            presence_ns=time.monotonic_ns() - waited_ns + softirqs_ns,
        )


def _softirq_thread(cpu: int) -> Path:
    name = f"ksoftirqd/{cpu}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == name and (process / "schedstat").exists():
                return process / "schedstat"
    raise HostError(
        "the CPU time of softirqs cannot be read", f"/proc shows no {name} with a schedstat", "run it in the host"
    )


def usable_cpu(wanted: int | None = None) -> int:
    """The core to measure on: the wanted one, else the last this process may use (interrupts prefer the first).

    Raises:
        HostError: this process may not run there.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if wanted is None:
        return allowed[-1]
    if wanted not in allowed:
        raise HostError(f"cannot measure on CPU {wanted}", f"this process may run on {allowed}", "name one of these")
    return wanted


@contextlib.contextmanager
def pinned(cpu: int) -> Iterator[None]:
    """The calling thread runs on that core only; processes started meanwhile would inherit it."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
