"""IPv4 packets of control sessions: taken apart, and put together with another text.

What the kernel adds or takes away on the way (addresses, ports, shifts of acknowledgements) is not our business here;
checksums are made anew, since a punted packet may have had only a part of its own.
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address
from typing import NamedTuple

from xdpmasq import ipv4
from xdpmasq.alg.api import Endpoint
from xdpmasq.alg.stream import ROUND

TCP, UDP = 6, 17
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
SHORTEST = 536  # text that every segment may have (RFC 9293 section 3.7.1)

_TCP = struct.Struct("!HHIIBBHHH")
_UDP = struct.Struct("!HHHH")
_TIMESTAMPS = 8  # kind of the option (RFC 7323 section 3)


class Packet(NamedTuple):
    """A TCP segment or UDP datagram, whole.

    Attributes:
        source, destination: address and port, as on the wire.
        head: the IP header.
        transport: TCP's header with its options; UDP's.
        flags, sequence, ack, window: TCP's fields; 0 of UDP.
    """

    protocol: str
    source: bytes
    destination: bytes
    head: bytes
    transport: bytes
    text: bytes
    flags: int = 0
    sequence: int = 0
    ack: int = 0
    window: int = 0


def parse(packet: bytes) -> Packet | None:
    """None: neither TCP nor UDP, a fragment, or its lengths lie."""
    header = ipv4.parse(packet)
    if not header or header.offset or header.flags & ipv4.MORE_FRAGMENTS:
        return None
    head, rest = packet[: header.length], packet[header.length : header.total]
    ends = header.src + rest[:2], header.dst + rest[2:4]
    if header.protocol == UDP and len(rest) >= _UDP.size:
        _, _, length, _ = _UDP.unpack_from(rest)
        if not _UDP.size <= length <= len(rest):
            return None
        return Packet("udp", *ends, head, rest[: _UDP.size], rest[_UDP.size : length])
    if header.protocol == TCP and len(rest) >= _TCP.size:
        _, _, sequence, ack, offset, flags, window, _, _ = _TCP.unpack_from(rest)
        start = (offset >> 4) * 4
        if not _TCP.size <= start <= len(rest):
            return None
        return Packet("tcp", *ends, head, rest[:start], rest[start:], flags, sequence, ack, window)
    return None


def endpoint(wire: bytes) -> Endpoint:
    """Of a packet's source or destination."""
    return Endpoint(IPv4Address(wire[:-2]), int.from_bytes(wire[-2:]))


def datagram(packet: Packet, text: bytes) -> bytes:
    """The same with another text; one without checksum stays so.

    Raises:
        ValueError: it is too long for UDP.
    """
    length = _UDP.size + len(text)
    if length > 0xFFFF - len(packet.head):
        raise ValueError(f"a datagram of {length} bytes")
    unchecked = packet.transport[:4] + struct.pack("!HH", length, 0)
    if packet.transport[6:8] != bytes(2):
        sum_ = _checksum(packet, UDP, unchecked + text) or 0xFFFF
        unchecked = unchecked[:6] + struct.pack("!H", sum_)
    return _head(packet, len(unchecked) + len(text)) + unchecked + text


def segments(packet: Packet, sequence: int, text: bytes) -> list[bytes]:
    """The same with another sequence number and text; as many segments as keep to the length that it had.

    FIN and PSH stand in the last one only.
    """
    room = max(len(packet.text), SHORTEST)
    parts = [text[at : at + room] for at in range(0, len(text), room)] or [b""]
    made = []
    for nth, part in enumerate(parts):
        flags = packet.flags if nth == len(parts) - 1 else packet.flags & ~(FIN | PSH)
        made.append(_segment(packet, (sequence + nth * room) % ROUND, flags, part))
    return made


def acknowledgement(
    packet: Packet, source: Endpoint, destination: Endpoint, *, sequence: int, ack: int, window: int
) -> bytes:
    """What the receiver of a segment would answer, had it taken it."""
    addresses = source.address.packed + destination.address.packed
    answer = packet._replace(head=b"\x45" + packet.head[1:12] + addresses)  # without IP options
    options = _timestamps_back(packet.transport[_TCP.size :])
    offset = (_TCP.size + len(options)) // 4 << 4
    transport = _TCP.pack(source.port, destination.port, sequence, ack, offset, ACK, window, 0, 0)
    return _segment_of(answer, transport + options, b"")


def _segment(packet: Packet, sequence: int, flags: int, text: bytes) -> bytes:
    transport = bytearray(packet.transport)
    transport[4:8] = struct.pack("!I", sequence)
    transport[13] = flags
    return _segment_of(packet, bytes(transport), text)


def _segment_of(packet: Packet, transport: bytes, text: bytes) -> bytes:
    unchecked = transport[:16] + bytes(2) + transport[18:]
    sum_ = _checksum(packet, TCP, unchecked + text)
    whole = unchecked[:16] + struct.pack("!H", sum_) + unchecked[18:] + text
    return _head(packet, len(whole)) + whole


def _head(packet: Packet, rest: int) -> bytes:
    """Its IP header, for that many bytes behind it."""
    head = packet.head
    fixed = head[:2] + struct.pack("!H", len(head) + rest) + head[4:10] + bytes(2) + head[12:]
    return fixed[:10] + struct.pack("!H", ipv4.checksum(fixed)) + fixed[12:]


def _checksum(packet: Packet, protocol: int, data: bytes) -> int:
    pseudo = packet.head[12:20] + struct.pack("!BBH", 0, protocol, len(data))
    return ipv4.checksum(pseudo + data)


def _timestamps_back(options: bytes) -> bytes:
    """The timestamps that an answer has: each other's."""
    at = 0
    while at < len(options) and options[at]:
        if options[at] == 1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if options[at] == _TIMESTAMPS and length == 10 and at + length <= len(options):
            value, echo = options[at + 2 : at + 6], options[at + 6 : at + 10]
            return bytes((1, 1, _TIMESTAMPS, 10)) + echo + value
        if length < 2:
            break
        at += length
    return b""
