"""How often something may be done for each of many, and for all together."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

KNOWN = 4096  # of whom a count is kept


class Bucket:
    """Tokens that come back with time.

    Args:
        rate: a second.
        burst: at once.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._tokens, self._at = burst, float("-inf")

    def has_one(self, now: float) -> bool:
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        return self._tokens >= 1

    def take(self) -> None:
        self._tokens -= 1


class Allowance:
    """Each has a bucket, and all together have one.

    When the table of those known is full, the one that has been quiet longest is forgotten; only the limit of all
    then stands before it, which is what that one is for.

    Args:
        each, of_all: rate and burst.
    """

    def __init__(self, each: tuple[float, float], of_all: tuple[float, float]) -> None:
        self._limit = each
        self._all = Bucket(*of_all)
        self._each: OrderedDict[Hashable, Bucket] = OrderedDict()

    def take(self, whose: Hashable, now: float) -> bool:
        """Whether it may be done now; it then counts as done."""
        bucket = self._each.setdefault(whose, Bucket(*self._limit))
        self._each.move_to_end(whose)
        if len(self._each) > KNOWN:
            self._each.popitem(last=False)
        if not (bucket.has_one(now) and self._all.has_one(now)):
            return False
        bucket.take()
        self._all.take()
        return True
