"""When the agent looks at its interfaces: at once, but not all the time; after trouble again, ever more rarely."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

SETTLE_S = 0.02  # netlink messages come in bursts: the least rest between two looks
BUSY_S = 0.5  # the longest one, while changes rain down
RETRY_S = (1, 60)  # after something went wrong: first, and at most


class Pacing:
    """Of one agent."""

    def __init__(self) -> None:
        self._rested_at = 0.0
        self._retry_at, self._retry_s = float("inf"), 0.0

    @property
    def is_retry_due(self) -> bool:
        return time.monotonic() >= self._retry_at

    @property
    def is_retrying(self) -> bool:
        """Something went wrong at the last look, and another is planned."""
        return bool(self._retry_s)

    def rest(self) -> None:
        """Waits until the next look may be."""
        time.sleep(max(0.0, self._rested_at - time.monotonic()))

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Around a look. A third of the time at most goes into them, however fast changes come."""
        started = time.monotonic()
        yield
        ended = time.monotonic()
        self._rested_at = ended + min(max(SETTLE_S, 2 * (ended - started)), BUSY_S)

    def retry_now(self) -> None:
        self._retry_at = time.monotonic()

    def plan(self, *, done: bool) -> None:
        """After a look: another one soon, unless all was well."""
        first, last = RETRY_S
        self._retry_s = 0 if done else min(max(first, 2 * self._retry_s), last)
        self._retry_at = time.monotonic() + self._retry_s if self._retry_s else float("inf")
