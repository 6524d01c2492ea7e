"""Having a port where hosts ask for mappings: if at all, on which addresses, and since when what it says holds."""

from __future__ import annotations

import selectors
import time
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address
from typing import Any

from xdpmasq import bpf, leases, netdev, presence
from xdpmasq.config import Config
from xdpmasq.datapath import PREFIX_INTERNAL, Tables
from xdpmasq.pcpd import Place, Service
from xdpmasq.pcpserver import Server


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
        self._enabled, self._tables = config.pcp.enabled, tables
        self._epoch_at: float = before.get("epoch_at", _clock())
        self._externals: list[str] | None = before.get("externals")
        self._server = Server(config, leases.Book(tables, reaper, config, hz), self._epoch_s)
        self._service = Service(self._server, selector, self._is_internal, lambda: presence.changing(patience_s=0))
        self.serve, self.drop = self._service.serve, self._service.drop

    def follow(
        self, lans: Iterable[netdev.Link], addresses: Iterable[netdev.Address], external: IPv4Address | None
    ) -> None:
        """The interfaces, or the addresses, may have changed.

        Args:
            external: the WAN's address; None: it has none at the moment.
        """
        if not self._enabled:
            return
        self._server.external_known = external is not None
        inside = {link.index for link in lans}
        self._service.follow(Place(each.index, IPv4Address(each.ip.ip)) for each in addresses if each.index in inside)
        externals = [str(place.address or IPv4Address(0)) for place in self._tables.places]
        if externals != self._externals:  # what hosts know of their mappings is wrong now (RFC 6887 section 8.5)
            self._externals, self._epoch_at = externals, _clock()
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

    def _epoch_s(self) -> int:
        return int(_clock() - self._epoch_at)

    def _is_internal(self, client: IPv4Address, ifindex: int) -> bool:
        """Its own packets come by that interface, as far as the routes tell (RFC 6887 section 8.2)."""
        if self._tables.role_of(client) != PREFIX_INTERNAL:
            return False
        route = netdev.route_to(client)
        return route is not None and route.oif == ifindex


def _clock() -> float:
    """Seconds; goes on in suspend, as lifetimes do for those who asked, and no further than the maps' own life."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
