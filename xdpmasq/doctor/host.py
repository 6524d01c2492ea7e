"""The gateway as the checks see it: what is asked of several times is read once."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Network

from xdpmasq import drivers, vlans
from xdpmasq.config import Mode
from xdpmasq.doctor.ruleset import Ruleset
from xdpmasq.net import ifaddrs, netdev


@dataclass(frozen=True)
class Host:
    """Links by their part in it; ``present`` are all."""

    present: tuple[netdev.Link, ...]
    wans: tuple[netdev.Link, ...]
    lans: tuple[netdev.Link, ...]
    mode: Mode
    ours: Collection[int]  # ids of xdpmasq's own programs

    @property
    def ports(self) -> tuple[netdev.Link, ...]:
        return (*self.wans, *self.lans)

    @cached_property
    def addresses(self) -> list[ifaddrs.Address]:
        return ifaddrs.addresses(4)

    def networks(self, link: netdev.Link) -> list[IPv4Network]:
        own = [each.network for each in self.addresses if each.index == link.index]
        return [each for each in own if isinstance(each, IPv4Network)]

    def uses_xdp(self, link: netdev.Link) -> bool:
        return self.mode == "xdp" or (self.mode == "auto" and drivers.auto(link, self.present)[0] == "xdp")

    def device(self, link: netdev.Link) -> netdev.Link:
        """Where XDP for an interface would be."""
        return vlans.wire_of(link, self.present).device

    def devices(self, *, xdp: bool = False) -> list[netdev.Link]:
        """Those of all interfaces, or with ``xdp`` of those that are to use it, each once."""
        return list(dict.fromkeys(self.device(link) for link in self.ports if not xdp or self.uses_xdp(link)))

    @cached_property
    def ruleset(self) -> Ruleset:
        return Ruleset.read()
