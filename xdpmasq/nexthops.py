"""The neighbours behind our interfaces, whose MACs accelerated flows have learnt."""

from __future__ import annotations

from collections.abc import Container

from xdpmasq.net import neighbours


class NextHops:
    """As they were at the last look."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], bytes] = {}

    def changed(self, interfaces: Container[int]) -> bool:
        """Whether one of these interfaces' neighbours has another MAC now, or is gone."""
        present = {key: mac for key, mac in neighbours.resolved().items() if key[0] in interfaces}
        before, self._known = self._known, present
        return any(present.get(key) != mac for key, mac in before.items())
