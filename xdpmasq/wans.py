"""The WANs as they are at the moment: their interfaces and addresses, and whose a named external address is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from xdpmasq import checks
from xdpmasq.config import Config
from xdpmasq.net import ifaddrs, netdev


@dataclass(frozen=True)
class Wan:
    """One of them.

    Attributes:
        name: as it was named; perhaps a wildcard.
        link: None while it is not there.
        own: its IPv4 addresses.
    """

    name: str
    link: netdev.Link | None
    own: tuple[ifaddrs.Address, ...]

    @property
    def primary(self) -> IPv4Address | None:
        """The first address."""
        return next((IPv4Address(each.ip.ip) for each in self.own if not each.secondary), None)

    def has(self, network: IPv4Network) -> bool:
        return any(IPv4Network(each.ip.ip) == network for each in self.own)

    def is_near(self, network: IPv4Network) -> bool:
        """It is of a network that the interface is in."""
        return any(network.subnet_of(IPv4Network(each.network)) for each in self.own)


def present(config: Config, links: list[netdev.Link], addresses: Iterable[ifaddrs.Address]) -> list[Wan]:
    """The WANs by number."""
    found = []
    for name, link in zip(config.wans, checks.wans_of(config, links), strict=True):
        own = tuple(each for each in addresses if link and each.index == link.index)
        found.append(Wan(name, link, own))
    return found


def primaries(wans: Sequence[Wan]) -> list[IPv4Address | None]:
    """Each WAN's first address; one that two have is the former's."""
    found: list[IPv4Address | None] = []
    for wan in wans:
        found.append(None if wan.primary in found else wan.primary)
    return found


def owners(
    named: Iterable[IPv4Network], wans: Sequence[Wan], before: Mapping[IPv4Network, int], *, default: int | None
) -> dict[IPv4Network, int]:
    """The WAN, by number, of each external address: which has it, had it ``before``, or is in a network with it.

    Args:
        default: the owner of what is none's; None: it stays without.
    """
    only = 0 if len(wans) == 1 else None
    found = {}
    for each in named:
        has = _first(wan.has(each) for wan in wans)
        near = _first(wan.is_near(each) for wan in wans)
        known = (number for number in (only, has, before.get(each), near, default) if number is not None)
        if (owner := next(known, None)) is not None:
            found[each] = owner
    return found


def _first(answers: Iterable[bool]) -> int | None:
    return next((number for number, answer in enumerate(answers) if answer), None)
