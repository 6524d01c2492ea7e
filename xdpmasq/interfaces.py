"""What the programs are told of interfaces: the rows of the map of that name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from xdpmasq import drivers, settings, vlans
from xdpmasq.abi import PORTS, Role
from xdpmasq.config import Config
from xdpmasq.net import ifaddrs, netdev, routing
from xdpmasq.tables import Tables
from xdpmasq.topology import Topology


@dataclass(frozen=True)
class Served:
    """An interface that programs were put on.

    Attributes:
        hook: "xdp", "tc", or "none" after trouble.
        why: that one.
    """

    link: netdev.Link
    role: Role
    hook: str
    why: str


class Interfaces:
    """Those that are LAN or WAN, and all others."""

    def __init__(self, config: Config, tables: Tables) -> None:
        self._config, self._tables = config, tables
        self._others: set[int] = set()  # neither LAN nor WAN

    def tell(self, served: Sequence[Served], here: Topology, *, redirects: bool) -> list[dict[str, Any]]:
        """Writes the rows, by the links' features as they are with our programs attached.

        Args:
            redirects: LANs may send to what is redirected to the gateway.

        Returns:
            What the manifest and `status` say of them.
        """
        present = netdev.links()
        fresh = {link.index: link for link in present}
        routes = routing.routes(4) if self._config.mss != "off" else []
        numbers = {wan.link.index: number for number, wan in enumerate(here.wans) if wan.link}
        self._tables.set_settings(exit=[wan.link.index if wan.link else 0 for wan in here.wans])
        reports, on_xdp = [], {}
        for each in served:
            link, why = fresh.get(each.link.index, each.link), each.why
            wire = vlans.wire_of(link, present)
            xdp, takes = each.hook == "xdp", drivers.takes_frames(wire.device)
            if link.index < PORTS:
                home = _primary(link, here.addresses) if each.role == "lan" else None
                redirected = home and redirects and each.hook != "none"
                self._tables.set_interface(
                    link,
                    each.role,
                    xdp_from=xdp,
                    xdp_to=xdp and takes,
                    mss=settings.mss(self._config, link, routes) if each.role == "wan" else 0,
                    wan=numbers.get(link.index, 0),
                    wire=wire,
                    network=IPv4Network(home.network) if home else None,
                    redirect_to=IPv4Address(home.ip.ip) if home and redirected else None,
                )
            if xdp and wire.tags:
                on_xdp[wire] = link.index
                why += f", on {wire.device.name}"
            if xdp and not takes:
                why += "; but it takes no frames from XDP (a veth needs GRO or an XDP program at its peer)"
            report = {"name": link.name, "index": link.index, "device": wire.device.index}
            reports.append({**report, "role": each.role, "hook": each.hook, "why": why})
        self._tables.set_vlans(on_xdp)
        self._tell_of_others(here.links, {each.link.index for each in served})
        return reports

    def _tell_of_others(self, links: Sequence[netdev.Link], served: set[int]) -> None:
        """What is neither LAN nor WAN, as a VPN: the programs tell it from a WAN made anew, see bpf/guard.h."""
        others = {link.index: link for link in links if link.index < PORTS and link.index not in served}
        for index in self._others - others.keys() - served:
            self._tables.unset_interface(index)
        for index in others.keys() - self._others:
            self._tables.set_interface(others[index], "other", xdp_from=False, xdp_to=False)
        self._others = set(others)


def _primary(link: netdev.Link, addresses: Sequence[ifaddrs.Address]) -> ifaddrs.Address | None:
    return next((each for each in addresses if each.index == link.index and not each.secondary), None)
