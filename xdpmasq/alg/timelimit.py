"""A time limit for somebody else's code in this process."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class TooLongError(BaseException):
    """Not to be caught by an ALG."""


@functools.cache
def _schedstat(thread: int) -> int | None:
    """A descriptor of a thread's statistics. It is kept: to open the file takes a fifth of what a message does."""
    try:
        return os.open(f"/proc/self/task/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def waited_s() -> float:
    """For how long this thread has been ready to run without a CPU: schedstat's second number, in ns.

    0 where the kernel does not tell (CONFIG_SCHED_INFO).
    """
    descriptor = _schedstat(threading.get_native_id())
    try:
        return int(os.pread(descriptor, 64, 0).split()[1]) / 1e9 if descriptor is not None else 0.0
    except (OSError, IndexError):
        return 0.0


@contextlib.contextmanager
def no_longer_than(seconds: float, *, spared: str) -> Iterator[None]:
    """Raises TooLongError, but not in what is called of the module ``spared``: half done, that would lose something.

    Time in which others have the CPU does not count, or a busy machine would be without ALGs. A signal does it, so it
    is for the main thread; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    began = time.monotonic() - waited_s()

    def stop(_: int, frame: FrameType | None) -> None:
        if time.monotonic() - waited_s() - began < seconds:
            return  # the timer comes again
        while frame:
            if frame.f_globals.get("__name__") == spared:
                return
            frame = frame.f_back
        raise TooLongError

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds / 4)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
