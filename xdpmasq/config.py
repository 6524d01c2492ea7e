"""What the user wants: settings, defaults with units, and checking them whole before anything changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Literal

Mode = Literal["auto", "xdp", "tc"]


@dataclass(frozen=True)
class Timeouts:
    """Idle times after which a session ends, in seconds (RFC 5382 REQ-5, RFC 4787 REQ-5, RFC 5508 REQ-2)."""

    tcp_established_s: int = 7440
    tcp_transitory_s: int = 240
    udp_s: int = 300
    icmp_s: int = 60
    fragment_s: int = 30
    port_rest_s: int = 120  # RFC 6888 REQ-8


@dataclass(frozen=True)
class Ports:
    """External ports to choose from; the host's own ephemeral range is always left out."""

    first: int = 1024
    last: int = 65535


@dataclass(frozen=True)
class Config:
    """One gateway.

    Attributes:
        wan: the interface whose address is shared.
        lans: interfaces of internal networks; shell wildcards allowed (``lan*``, ``ppp*``).
        mode: where established flows are translated.
        internal: prefixes behind the LANs that no route tells of.
        further_sessions: room for sessions beyond the first of each mapping; a power of two.
        inbound_refresh: inbound packets keep a mapping alive (RFC 4787 REQ-6).
        rearm_s: an accelerated flow shows itself to the kernel this often.
    """

    wan: str
    lans: tuple[str, ...]
    mode: Mode = "auto"
    internal: tuple[IPv4Network, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    ports: Ports = field(default_factory=Ports)
    further_sessions: int = 262144
    inbound_refresh: bool = True
    rearm_s: int = 20
