"""The signals by which an agent is told to stop or to read its configuration again."""

from __future__ import annotations

import contextlib
import os
import signal


class Signals:
    """What came. It is only noted: an exception thrown by the handler would leave pyroute2's event loop, or an
    attachment, in the middle of something.

    Attributes:
        stop: SIGTERM or SIGINT.
        reload: SIGHUP.
        wake: readable when one has come.
    """

    def __init__(self) -> None:
        self.stop = self.reload = False
        self.wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # who waits for descriptors is woken by it
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)

    def awake(self) -> None:
        """What woke has been seen."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake, 64)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self.reload = True
        else:
            self.stop = True
