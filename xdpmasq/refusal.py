"""What a sender is told whose packet went nowhere: the bytes of the ICMP error, and how often it may be sent.

RFC 792 has the messages, RFC 1812 section 4.3.2 the manners, RFC 5508 REQ-8 the cause.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address

from xdpmasq import ipv4
from xdpmasq.ipv4 import checksum

PROHIBITED, HOST_UNREACHABLE, TIME_EXCEEDED, TOO_BIG = (3, 13), (3, 1), (11, 0), (3, 4)  # type and code
REFUSALS = {"prohibited": PROHIBITED, "host-unreachable": HOST_UNREACHABLE}
LONGEST = 576  # bytes of the message with its IP header (RFC 1812 4.3.2.3)
PRECEDENCE = 0xC0  # of its TOS: internetwork control (RFC 1812 4.3.2.5)

_MESSAGE = struct.Struct("!BBHI")
_QUOTE = LONGEST - ipv4.HEADER.size - _MESSAGE.size
_ICMP = 1
_ERRORS = (3, 4, 5, 11, 12)
_MULTICAST = 224  # first byte; classes D and E and the limited broadcast lie here and above
_NO_HOST = (0, 127)  # first byte: "this" network, loopback

# Messages a second, and at once (RFC 1812 4.3.2.8).
TO_EACH = (10.0, 20.0)
TO_ALL = (1000.0, 50.0)  # as the kernel holds its own (net.ipv4.icmp_msgs_per_sec)


def message(packet: bytes, kind: tuple[int, int], mtu: int = 0) -> tuple[IPv4Address, bytes] | None:
    """An ICMP error about a packet.

    Args:
        packet: from its IP header on; what follows its end is left out.
        kind: type and code.
        mtu: of the next hop, of :data:`TOO_BIG` (RFC 1191 section 4).

    Returns:
        To whom, and the message from its ICMP header on; None where none may be sent (RFC 1812 4.3.2.7). Directed
        broadcasts are not known here: the kernel refuses to send to one.
    """
    header = ipv4.parse(packet)
    if not header or header.offset or not _is_host(header.src) or header.dst[0] >= _MULTICAST:
        return None
    if header.protocol == _ICMP and (header.total == header.length or packet[header.length] in _ERRORS):
        return None
    quote = packet[: min(header.total, _QUOTE)]
    sum_ = checksum(_MESSAGE.pack(*kind, 0, mtu) + quote)
    return IPv4Address(header.src), _MESSAGE.pack(*kind, sum_, mtu) + quote


def _is_host(address: bytes) -> bool:
    return address[0] not in _NO_HOST and address[0] < _MULTICAST
