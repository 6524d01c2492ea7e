"""Can this machine, and can these interfaces, carry a gateway? Asked before anything changes."""

from __future__ import annotations

import os
from collections.abc import Sequence

from xdpmasq import datapath, kernel
from xdpmasq.config import Config
from xdpmasq.errors import HostError, InterfaceError
from xdpmasq.net import ifaddrs, netdev

OLDEST_KERNEL, TESTED = (6, 1), "6.1, 6.12 and 6.18"
LOOPBACK = "lo"


def check_host() -> None:
    """Raises HostError when this machine cannot carry a datapath."""
    if os.geteuid() != 0:
        raise HostError("must be root", "loading programs needs CAP_BPF and CAP_NET_ADMIN", "use sudo")
    if kernel.release() < OLDEST_KERNEL:
        oldest = ".".join(map(str, OLDEST_KERNEL))
        raise HostError(
            f"kernel {'.'.join(map(str, kernel.release()))} is too old",
            f"xdpmasq needs {oldest} or later, whose verifier follows its programs; it is tested on {TESTED}",
            "upgrade the kernel",
        )


def check_interfaces(config: Config) -> None:
    """Raises InterfaceError when the interfaces cannot serve as the configuration says."""
    links = netdev.links()
    wans = wans_of(config, links)
    if not any(wans):  # another may be a provider's line that comes later
        raise netdev.no_such_interface(config.wan, links)
    for pattern in config.lans:
        matched = netdev.match_links([pattern], links)
        if not matched and not netdev.is_pattern(pattern):
            raise netdev.no_such_interface(pattern, links)
    lans = netdev.match_links(config.lans, links)
    outside = [wan for wan in wans if wan]
    if any(link.name == LOOPBACK for link in (*outside, *lans)):
        raise InterfaceError(
            f"{LOOPBACK} is no network", "nothing enters or leaves the machine there", "name another"
        )
    for wan in outside:
        if wan in lans:
            raise InterfaceError(
                f"{wan.name} is both WAN and LAN",
                "one-armed masquerading on a single interface is not supported",
                "give the internal network an interface of its own",
            )
    _check_addresses(outside, lans)
    _check_unused(config.wans, [*outside, *lans])


def overlap(wan: netdev.Link, lans: list[netdev.Link], addresses: list[ifaddrs.Address]) -> InterfaceError | None:
    """What is wrong where a LAN and the WAN share addresses, so that nobody could tell inside from outside."""
    names = {link.index: link.name for link in lans}
    for outer in (each for each in addresses if each.index == wan.index):
        for inner in (each for each in addresses if each.index in names):
            if inner.network.overlaps(outer.network):
                return InterfaceError(
                    f"{names[inner.index]} and {wan.name} overlap",
                    f"LAN {inner.network} and WAN {outer.network} share addresses (RFC 4787 REQ-7)",
                    "renumber the LAN",
                )
    return None


def _check_addresses(wans: list[netdev.Link], lans: list[netdev.Link]) -> None:
    """One WAN with an address is enough: the others' may be a provider's that is out of order."""
    addresses = ifaddrs.addresses(4)
    names = {link.index: link.name for link in wans}
    outside = [each for each in addresses if each.index in names]
    if not outside:
        raise InterfaceError(
            f"{' and '.join(names.values())} {'has' if len(wans) == 1 else 'have'} no IPv4 address",
            "there is no public address to share",
            f"configure one (ip address add … dev {wans[0].name}, or a DHCP client) and try again",
        )
    for nth, one in enumerate(outside):
        for other in outside[:nth]:
            if one.ip.ip == other.ip.ip and one.index != other.index:
                raise InterfaceError(
                    f"{names[other.index]} and {names[one.index]} both have {one.ip.ip}",
                    "what comes back to it could be of either",
                    "give each WAN an address of its own",
                )
    for wan in wans:
        if error := overlap(wan, lans, addresses):
            raise error


def _check_unused(wans: Sequence[str], links: list[netdev.Link]) -> None:
    for each in datapath.find_others(wans):
        taken = {entry["name"] for entry in each.manifest["interfaces"]} & {link.name for link in links}
        if taken:
            raise in_use(", ".join(sorted(taken)), each.manifest["wan"])


def in_use(what: str, wan: str) -> InterfaceError:
    """The error of an interface that another xdpmasq has."""
    return InterfaceError(f"{what} is in use", f"by the xdpmasq of WAN {wan}", f"xdpmasq detach --wan {wan}")


def wans_of(config: Config, links: list[netdev.Link]) -> list[netdev.Link | None]:
    """The WANs by number: of several that match a wildcard, the first that is up."""
    matching = [netdev.match_links([name], links) for name in config.wans]
    return [min(some, key=lambda link: (not link.up, link.index), default=None) for some in matching]
