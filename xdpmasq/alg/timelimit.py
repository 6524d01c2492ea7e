"""A time limit for somebody else's code in this process."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from types import FrameType


class TooLongError(BaseException):
    """Not to be caught by an ALG."""


class TimeLimit:
    """Raises TooLongError in what runs ``with`` it, but not in what is called of the module ``spared``: half done,
    that would lose something.

    Time in which others have the CPU does not count, or a busy machine would be without ALGs. A signal does it, so it
    is for the main thread, and one at a time; elsewhere there is no limit. Each message of an ALG has one: so nothing
    is worked out before it is asked for.
    """

    _running: TimeLimit | None = None

    def __init__(self, seconds: float, *, spared: str) -> None:
        self._seconds, self._spared = seconds, spared

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        _listen()
        self._began, self._waited = time.monotonic(), schedstat()
        TimeLimit._running = self
        signal.setitimer(signal.ITIMER_REAL, self._seconds, self._seconds / 4)

    def __exit__(self, *_: object) -> None:
        if TimeLimit._running is self:
            signal.setitimer(signal.ITIMER_REAL, 0)
            TimeLimit._running = None

    def check(self, frame: FrameType | None) -> None:
        """Raises TooLongError, when that is due; if it is not, the timer comes again."""
        waited = waited_s(schedstat()) - waited_s(self._waited)
        if time.monotonic() - self._began - waited < self._seconds:
            return
        while frame:
            # Nor at the very end: the timer would go on, and the next time nobody would be there to catch it.
            if frame.f_globals.get("__name__") == self._spared or frame.f_code is TimeLimit.__exit__.__code__:
                return
            frame = frame.f_back
        raise TooLongError


@functools.cache
def _listen() -> None:
    def stop(_: int, frame: FrameType | None) -> None:
        if TimeLimit._running:
            TimeLimit._running.check(frame)

    signal.signal(signal.SIGALRM, stop)


def schedstat() -> bytes:
    """This thread's statistics; empty where the kernel has none (CONFIG_SCHED_INFO)."""
    descriptor = _schedstat(threading.get_native_id())
    try:
        return os.pread(descriptor, 64, 0) if descriptor is not None else b""
    except OSError:
        return b""


@functools.cache
def _schedstat(thread: int) -> int | None:
    """A descriptor, which is kept: to open the file takes a fifth of what a message does."""
    try:
        return os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def waited_s(schedstat: bytes) -> float:
    """For how long the thread had been ready to run without a CPU: the second number, in ns."""
    numbers = schedstat.split()
    return int(numbers[1]) / 1e9 if len(numbers) > 1 else 0.0
