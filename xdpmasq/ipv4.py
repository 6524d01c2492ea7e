"""The IPv4 header (RFC 791), as far as the agent looks into packets."""

from __future__ import annotations

import struct
from typing import NamedTuple

HEADER = struct.Struct("!BBH2sHBBH4s4s")
DONT_FRAGMENT, MORE_FRAGMENTS = 0x4000, 0x2000
LONGEST = 65535
OFFSET_MASK = 0x1FFF  # in units of eight bytes
_COPIED = 0x80  # options that every fragment has


class Header(NamedTuple):
    """A header whose lengths are true.

    Attributes:
        length: bytes of the header itself, with options.
        total: bytes of the packet; what a frame has beyond them is Ethernet's padding.
        id: as on the wire.
        offset: bytes of the datagram's payload before this fragment's.
        flags: DONT_FRAGMENT, MORE_FRAGMENTS.
    """

    length: int
    total: int
    id: bytes
    offset: int
    flags: int
    protocol: int
    src: bytes
    dst: bytes


def parse(packet: bytes) -> Header | None:
    """The header at the start of ``packet``, None when there is no whole one or its lengths lie."""
    if len(packet) < HEADER.size:
        return None
    first, _, total, id_, fragment, _, protocol, _, src, dst = HEADER.unpack_from(packet)
    length = (first & 0xF) * 4
    if first >> 4 != 4 or length < HEADER.size or not length <= total <= len(packet):
        return None
    return Header(length, total, id_, (fragment & OFFSET_MASK) * 8, fragment & ~OFFSET_MASK, protocol, src, dst)


def fragments(packet: bytes, mtu: int) -> list[bytes] | None:
    """A packet in pieces of at most ``mtu`` bytes (RFC 791 section 3.2); None where it may not be cut, or cannot."""
    header = parse(packet)
    if not header or header.flags & DONT_FRAGMENT:
        return None
    options = packet[HEADER.size : header.length]
    copied = _copied(options)
    payload, start, pieces = packet[header.length : header.total], 0, []
    while start < len(payload):
        mine = copied if start else options
        room = (mtu - HEADER.size - len(mine)) & ~7
        if room <= 0:
            return None
        end = start + room
        more = MORE_FRAGMENTS if end < len(payload) else header.flags & MORE_FRAGMENTS
        pieces.append(_piece(packet, mine, more | (header.offset + start) // 8, payload[start:end]))
        start = end
    return pieces


def joined(pieces: list[bytes]) -> bytes | None:
    """The packet that these are all of, in whatever order, repeated or not; None: they are not, or some overlap."""
    found = sorted(
        ((header.offset, piece, header) for piece in pieces if (header := parse(piece))), key=lambda each: each[:2]
    )
    parts: list[bytes] = []
    end, more = 0, MORE_FRAGMENTS
    for offset, piece, header in found:
        part = piece[header.length : header.total]
        if part and part == (parts or [b""])[-1] and offset == end - len(part):
            continue  # the one before, once more
        if not more or offset != end:
            return None
        parts.append(part)
        end, more = end + len(part), header.flags & MORE_FRAGMENTS
    if not found or more:
        return None
    first = found[0][1]
    options = first[HEADER.size : (first[0] & 0xF) * 4]
    if HEADER.size + len(options) + end > LONGEST:
        return None
    return _piece(first, options, 0, b"".join(parts))


def _piece(packet: bytes, options: bytes, fragment: int, payload: bytes) -> bytes:
    _, tos, _, id_, _, ttl, protocol, _, src, dst = HEADER.unpack_from(packet)
    length = HEADER.size + len(options)
    fields = (0x40 | length // 4, tos, length + len(payload), id_, fragment, ttl, protocol)
    sum_ = checksum(HEADER.pack(*fields, 0, src, dst) + options)
    return HEADER.pack(*fields, sum_, src, dst) + options + payload


def _copied(options: bytes) -> bytes:
    """Those of the later fragments, padded; none where the list is broken."""
    copied, at = b"", 0
    while at < len(options) and (kind := options[at]):
        length = 1 if kind == 1 else options[at + 1] if at + 1 < len(options) else 0
        if not length or at + length > len(options) or (kind != 1 and length < 2):
            return b""
        copied += options[at : at + length] if kind & _COPIED else b""
        at += length
    return copied + bytes(-len(copied) % 4)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = int.from_bytes(data + bytes(len(data) % 2))
    return ~(total % 0xFFFF or (0xFFFF if total else 0)) & 0xFFFF  # 65,536 is 1 in this arithmetic, 0xFFFF a 0
