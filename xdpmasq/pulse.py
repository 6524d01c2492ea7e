"""What the agent notes of its own life while it works, for whoever shows it; it only counts, and never waits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Pulse:
    """Written by the agent, read by the metrics.

    Attributes:
        started_at, ticked_at: seconds since the epoch; ``ticked_at`` 0 before the first tick.
        disarms: how often all accelerated flows were sent through the kernel once, to learn their next hop anew.
        wan_changes: how often the WAN went, came, or got another address.
        expiries, expiry_s: passes over the session table, and what they have taken.
    """

    started_at: float = field(default_factory=time.time)
    ticked_at: float = 0.0
    disarms: int = 0
    wan_changes: int = 0
    expiries: int = 0
    expiry_s: float = 0.0
    _wan: object = None

    def tick(self) -> None:
        self.ticked_at = time.time()

    def sees_wan(self, wan: object) -> None:
        """Called at every look: whatever is not as it was at the last one is a change."""
        self.wan_changes += self._wan not in (None, wan)
        self._wan = wan

    @contextlib.contextmanager
    def expiring(self) -> Iterator[None]:
        """Around a pass over the session table."""
        started = time.monotonic()
        yield
        self.expiry_s += time.monotonic() - started
        self.expiries += 1
