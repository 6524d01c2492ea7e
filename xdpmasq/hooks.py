"""Which programs belong on which hooks of an interface, and how ours are told from others'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xdpmasq.abi import Role

TcHook = Literal["ingress", "egress"]
TC: tuple[TcHook, ...] = ("ingress", "egress")
WITHOUT_ETHERNET = "_l3"  # suffix of the functions for interfaces that have no Ethernet header
PROGRAM = "masq_"  # prefix of our programs' names
FILTER = "xdpmasq"  # name of our filters on clsact
PRIORITY = 0x4D51  # after filters that users put at low numbers, before those that the kernel numbers itself


@dataclass(frozen=True)
class Hook:
    """One place where a program of ours is attached."""

    kind: Literal["xdp", "ingress", "egress"]
    function: str


PUNT = Hook("ingress", "masq_punt_in")
XDP = Hook("xdp", "masq_xdp")  # on the device below, where the interface is a VLAN


def of_role(role: Role, *, xdp: bool, ethernet: bool, redirects: bool = False) -> tuple[Hook, ...]:
    """What belongs on an interface, in the order in which it is to be attached: the translation first.

    Args:
        redirects: some of what LANs send goes to the gateway itself.
    """
    suffix = "" if ethernet else WITHOUT_ETHERNET
    found: list[Hook] = []
    if role == "wan":
        found += [Hook("egress", f"masq_wan_out{suffix}"), Hook("ingress", f"masq_wan_in{suffix}")]
    elif role == "lo":
        found += [Hook("egress", "masq_lo_out")]
    else:
        found += [Hook("ingress", f"masq_lan_{'in' if redirects else 'lean'}{suffix}")]
        found += [Hook("egress", f"masq_lan_out{suffix}")] * (xdp or redirects)
    if xdp:
        found += [XDP]
    return tuple(found)
