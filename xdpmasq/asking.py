"""Having a port where hosts ask for mappings: if at all, on which addresses, and since when what it says holds."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address
from typing import Any

from xdpmasq import bpf, leases, presence
from xdpmasq.abi import PREFIX_INTERNAL
from xdpmasq.config import Config
from xdpmasq.net import ifaddrs, netdev, routing
from xdpmasq.pcpd import Place, Service
from xdpmasq.pcpserver import Server
from xdpmasq.tables import Tables

ANYBODY = IPv4Address("240.0.0.1")  # reserved (RFC 1112 section 4): no route but the default ones leads there


class Asking:
    """Follows interfaces and external addresses; does nothing unless the configuration wants it.

    Args:
        hz: jiffies a second.
        before: the report of an earlier agent, whose epoch goes on with the mappings.
    """

    def __init__(
        self,
        config: Config,
        tables: Tables,
        reaper: bpf.Program,
        hz: int,
        *,
        selector: selectors.BaseSelector,
        before: Mapping[str, Any],
    ) -> None:
        self._enabled, self._tables, self._wans = config.pcp.enabled, tables, len(config.wans)
        self._epoch_at: float = before.get("epoch_at", _clock())
        self._externals: list[str] | None = before.get("externals")
        self._connected: frozenset[int] = frozenset()  # numbers of the WANs that have an address
        book = leases.Book(tables, reaper, config, hz, self._wan_of)
        self._server = Server(config, book, self._epoch_s, lambda host: self._wan_of(host) in self._connected)
        self._service = Service(self._server, selector, self._is_internal, lambda: presence.changing(patience_s=0))
        self.serve, self.drop = self._service.serve, self._service.drop

    def follow(
        self,
        lans: Iterable[netdev.Link],
        addresses: Iterable[ifaddrs.Address],
        externals: Iterable[IPv4Address | None],
    ) -> None:
        """The interfaces, or the addresses, may have changed.

        Args:
            externals: the WANs' addresses; None: one has none at the moment.
        """
        if not self._enabled:
            return
        self._connected = frozenset(wan for wan, address in enumerate(externals) if address)
        inside = {link.index for link in lans}
        self._service.follow(Place(each.index, IPv4Address(each.ip.ip)) for each in addresses if each.index in inside)
        served = [str(place.address or IPv4Address(0)) for place in self._tables.places]
        if served != self._externals:  # what hosts know of their mappings is wrong now (RFC 6887 section 8.5)
            self._externals, self._epoch_at = served, _clock()
            self._service.announce()

    @property
    def due_at(self) -> float:
        """When :meth:`serve` is needed next if nothing comes before; monotonic seconds."""
        return self._service.due_at

    @property
    def report(self) -> dict[str, Any]:
        """For the manifest, which outlives this agent."""
        return {
            "enabled": self._enabled,
            "listening": self._service.listening,
            "answered": self._service.answered,
            "dropped": self._service.dropped,
            "epoch_at": self._epoch_at,
            "externals": self._externals,
        }

    def _wan_of(self, host: IPv4Address) -> int:
        """The WAN that the kernel's policy routing chooses for what a host sends to anybody."""
        if self._wans == 1:
            return 0
        inside = routing.route_to(host)
        route = routing.route_to(ANYBODY, host, inside.oif) if inside else None
        return self._tables.wan_of(route.oif) if route else 0

    def _epoch_s(self) -> int:
        return int(_clock() - self._epoch_at)

    def _is_internal(self, client: IPv4Address, ifindex: int) -> bool:
        """Its own packets come by that interface, as far as the routes tell (RFC 6887 section 8.2)."""
        if self._tables.role_of(client) != PREFIX_INTERNAL:
            return False
        route = routing.route_to(client)
        return route is not None and route.oif == ifindex


def _clock() -> float:
    """Seconds; goes on in suspend, as lifetimes do for those who asked, and no further than the maps' own life."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
