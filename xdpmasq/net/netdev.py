"""The interfaces of this network namespace."""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from xdpmasq.errors import InterfaceError
from xdpmasq.net import ethtool, features, netlink, xdp

PUNT_PORT = "masq-punt"  # how the names of our own TAPs begin

IFF_UP = 0x1
ARPHRD_ETHER = 1


@dataclass(frozen=True)
class Vlan:
    """What makes a link a VLAN device.

    Attributes:
        parent: index of the device below, 0 when that is in another network namespace.
        tpid: EtherType of the tag: 0x8100 (802.1Q) or 0x88a8 (802.1ad).
        vid: the VLAN's number.
    """

    parent: int
    tpid: int
    vid: int


@dataclass(frozen=True)
class Link:
    """A network interface.

    Attributes:
        mac: six bytes, or none on links without an Ethernet header.
        kind: rtnetlink's kind (``veth``, ``tun``, ``bridge``), None for hardware.
        driver: the driver's name as `ethtool -i` has it, empty when it names none.
        xdp_prog_id: the program on the XDP hook, 0 for none.
        xdp_features: NETDEV_XDP_ACT_* bits that the kernel reports (6.3 and later), else None.
        master: index of the bridge, bond or VRF that this link is a port of, or 0.
        vlan: set on VLAN devices.
    """

    index: int
    name: str
    mac: bytes
    mtu: int
    up: bool
    carrier: bool
    kind: str | None
    driver: str
    ethernet: bool
    xdp_prog_id: int
    xdp_mode: str | None
    xdp_features: int | None = None
    master: int = 0
    vlan: Vlan | None = None


def links() -> list[Link]:
    """Every interface of this namespace, by index."""
    messages = netlink.dump(lambda ipr: ipr.get_links())
    reported = features.of_xdp()
    return sorted((_link(message, reported) for message in messages), key=lambda each: each.index)


@dataclass(frozen=True)
class Traffic:
    """What an interface has carried since it was made, as the kernel counts, and how often its carrier changed."""

    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int
    carrier_changes: int


def traffic() -> dict[int, Traffic]:
    """Of every interface of this namespace, by index."""
    counted = [each.name for each in fields(Traffic) if each.name != "carrier_changes"]
    found = {}
    for message in netlink.dump(lambda ipr: ipr.get_links()):
        counts = message.get_attr("IFLA_STATS64")
        changes = message.get_attr("IFLA_CARRIER_CHANGES") or 0
        found[int(message["index"])] = Traffic(**{name: counts[name] for name in counted}, carrier_changes=changes)
    return found


def link(name: str) -> Link:
    """The interface of that name.

    Raises:
        InterfaceError: there is none; the text names those there are.
    """
    present = links()
    for each in present:
        if each.name == name:
            return each
    raise no_such_interface(name, present)


def no_such_interface(name: str, present: Iterable[Link]) -> InterfaceError:
    """The error for a name or pattern that fits none of the interfaces present."""
    names = ", ".join(each.name for each in present if each.name != "lo") or "none but lo"
    return InterfaceError(f"no interface {name}", f"here are: {names}", "name one of these, or create it")


def match_links(patterns: Sequence[str], links: Iterable[Link]) -> list[Link]:
    """The links that any of the patterns (``eth1``, ``lan*``, ``ppp?``) fits, each once, in their order.

    No pattern fits a punt port, which is no network.
    """
    networks = (each for each in links if not is_punt_port(each))
    return [each for each in networks if any(fnmatch.fnmatchcase(each.name, pattern) for pattern in patterns)]


def is_pattern(name: str) -> bool:
    """Whether what fits it may come later."""
    return bool(set(name) & set("*?["))


def is_punt_port(link: Link) -> bool:
    """Whether it is one of our own making: see punt.py."""
    return link.kind == "tun" and link.name.startswith(PUNT_PORT)


def _link(message: Any, reported: Mapping[int, int]) -> Link:
    index, name = int(message["index"]), str(message.get_attr("IFLA_IFNAME"))
    ethernet = message["ifi_type"] == ARPHRD_ETHER
    info = message.get_attr("IFLA_LINKINFO")
    prog_id, mode = xdp.attached(message.get_attr("IFLA_XDP"))
    mac = message.get_attr("IFLA_ADDRESS") if ethernet else None
    return Link(
        index=index,
        name=name,
        mac=bytes.fromhex(mac.replace(":", "")) if mac else b"",
        mtu=int(message.get_attr("IFLA_MTU") or 0),
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        driver=ethtool.driver(name),
        ethernet=ethernet,
        xdp_prog_id=prog_id,
        xdp_mode=mode,
        xdp_features=reported.get(index),
        master=int(message.get_attr("IFLA_MASTER") or 0),
        vlan=_vlan(message, info) if info and info.get_attr("IFLA_INFO_KIND") == "vlan" else None,
    )


def _vlan(message: Any, info: Any) -> Vlan:
    data = info.get_attr("IFLA_INFO_DATA")
    elsewhere = message.get_attr("IFLA_LINK_NETNSID") is not None
    return Vlan(
        parent=0 if elsewhere else int(message.get_attr("IFLA_LINK") or 0),
        tpid=int(data.get_attr("IFLA_VLAN_PROTOCOL")),
        vid=int(data.get_attr("IFLA_VLAN_ID")),
    )
