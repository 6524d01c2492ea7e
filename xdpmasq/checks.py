"""Can this machine, and can these interfaces, carry a gateway? Asked before anything changes."""

from __future__ import annotations

import os

from xdpmasq import datapath, netdev
from xdpmasq.config import Config
from xdpmasq.errors import HostError, InterfaceError

OLDEST_KERNEL = (5, 15)
LOOPBACK = "lo"


def check_host() -> None:
    """Raises HostError when this machine cannot carry a datapath."""
    if os.geteuid() != 0:
        raise HostError("must be root", "loading programs needs CAP_BPF and CAP_NET_ADMIN", "use sudo")
    if netdev.kernel_release() < OLDEST_KERNEL:
        raise HostError(
            f"kernel {'.'.join(map(str, netdev.kernel_release()))} is too old",
            "xdpmasq needs 5.15 or later, and is tested on 6.18",
            "upgrade the kernel",
        )


def check_interfaces(config: Config) -> None:
    """Raises InterfaceError when the interfaces cannot serve as the configuration says."""
    links = netdev.links()
    wan = wan_of(config, links)
    if wan is None:
        raise netdev.no_such_interface(config.wan, links)
    for pattern in config.lans:
        matched = netdev.match_links([pattern], links)
        if not matched and not set(pattern) & set("*?["):
            raise netdev.no_such_interface(pattern, links)
    lans = netdev.match_links(config.lans, links)
    if any(link.name == LOOPBACK for link in (wan, *lans)):
        raise InterfaceError(
            f"{LOOPBACK} is no network", "nothing enters or leaves the machine there", "name another"
        )
    if wan in lans:
        raise InterfaceError(
            f"{wan.name} is both WAN and LAN",
            "one-armed masquerading on a single interface is not supported",
            "give the internal network an interface of its own",
        )
    _check_addresses(wan, lans)
    _check_unused(config.wan, [wan, *lans])


def overlap(wan: netdev.Link, lans: list[netdev.Link], addresses: list[netdev.Address]) -> InterfaceError | None:
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


def _check_addresses(wan: netdev.Link, lans: list[netdev.Link]) -> None:
    addresses = netdev.addresses(4)
    if not any(each.index == wan.index for each in addresses):
        raise InterfaceError(
            f"{wan.name} has no IPv4 address",
            "there is no public address to share",
            f"configure one (ip address add … dev {wan.name}, or a DHCP client) and try again",
        )
    if error := overlap(wan, lans, addresses):
        raise error


def _check_unused(wan: str, links: list[netdev.Link]) -> None:
    for each in datapath.find_all():
        manifest = each.manifest
        if manifest["wan"] == wan:
            continue
        taken = {entry["name"] for entry in manifest["interfaces"]} & {link.name for link in links}
        if taken:
            raise in_use(", ".join(sorted(taken)), manifest["wan"])


def in_use(what: str, wan: str) -> InterfaceError:
    """The error of an interface that another xdpmasq has."""
    return InterfaceError(f"{what} is in use", f"by the xdpmasq of WAN {wan}", f"xdpmasq detach --wan {wan}")


def wan_of(config: Config, links: list[netdev.Link]) -> netdev.Link | None:
    """The WAN: of several that match a wildcard, the first that is up."""
    matching = netdev.match_links([config.wan], links)
    return min(matching, key=lambda link: (not link.up, link.index), default=None)
