"""The interfaces and addresses around the gateway, as they are at one look."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Interface
from typing import Self

from xdpmasq import wans
from xdpmasq.abi import Role
from xdpmasq.config import Config
from xdpmasq.net import ifaddrs, netdev
from xdpmasq.wans import Wan


@dataclass(frozen=True)
class Topology:
    """What one look has found.

    Attributes:
        links: all interfaces.
        addresses: IPv4 ones.
        wans: by number; their links may be missing.
        lans: the interfaces that are there.
    """

    links: list[netdev.Link]
    addresses: list[ifaddrs.Address]
    wans: list[Wan]
    lans: list[netdev.Link]

    @classmethod
    def look(cls, config: Config) -> Self:
        links = netdev.links()
        addresses = [each for each in ifaddrs.addresses(4) if isinstance(each.ip, IPv4Interface)]
        outside = wans.present(config, links, addresses)
        uplinks = [wan.link for wan in outside]
        return cls(
            links,
            addresses,
            outside,
            [link for link in netdev.match_links(config.lans, links) if link not in uplinks],
        )

    @cached_property
    def uplinks(self) -> list[netdev.Link]:
        """The WANs' interfaces."""
        return [wan.link for wan in self.wans if wan.link]

    def wanted(self, *, loopback: bool) -> list[tuple[netdev.Link, Role]]:
        """The interfaces that are to have programs, in the order in which they get them: the WANs' first."""
        found: list[tuple[netdev.Link, Role]] = [(link, "wan") for link in self.uplinks]
        found += [(link, "lan") for link in self.lans]
        if loopback:
            found += [(link, "lo") for link in self.links if link.name == "lo"]
        return found
