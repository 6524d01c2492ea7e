"""The addresses of interfaces."""

import ipaddress
from dataclasses import dataclass
from typing import Any

from xdpmasq.net import netlink
from xdpmasq.net.inet import FAMILIES, IPInterface, IPNetwork, Version

IFA_F_SECONDARY = 0x01


@dataclass(frozen=True)
class Address:
    """An address of an interface.

    Attributes:
        ip: the address with its on-link prefix; a host prefix where there is a peer.
        secondary: a further address in the prefix of another one (IPv4), or a temporary one (IPv6).
        peer: the far end and its prefix, on point-to-point links.
    """

    index: int
    ip: IPInterface
    secondary: bool
    peer: IPInterface | None

    @property
    def network(self) -> IPNetwork:
        """The prefix that is reached directly through this address."""
        return (self.peer or self.ip).network


def addresses(family: Version = 4) -> list[Address]:
    """All addresses of that family, in the kernel's order (the primary one of a prefix comes first)."""
    return [_address(message) for message in netlink.dump(lambda ipr: ipr.get_addr(family=FAMILIES[family]))]


def _address(message: Any) -> Address:
    far, local = message.get_attr("IFA_ADDRESS"), message.get_attr("IFA_LOCAL")
    length = message["prefixlen"]
    peer = None if local in (None, far) else ipaddress.ip_interface(f"{far}/{length}")
    return Address(
        index=int(message["index"]),
        ip=ipaddress.ip_interface(local if peer else f"{far}/{length}"),
        secondary=bool(message["flags"] & IFA_F_SECONDARY),
        peer=peer,
    )
