"""The IPv4 header (RFC 791), as far as the agent looks into packets."""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEADER = struct.Struct("!BBH2sHBBH4s4s")
OFFSET_MASK = 0x1FFF  # in units of eight bytes


@dataclass(frozen=True)
class Header:
    """A header whose lengths are true.

    Attributes:
        length: bytes of the header itself, with options.
        total: bytes of the packet; what a frame has beyond them is Ethernet's padding.
        id: as on the wire.
        offset: bytes of the datagram's payload before this fragment's.
    """

    length: int
    total: int
    id: bytes
    offset: int
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
    return Header(length, total, id_, (fragment & OFFSET_MASK) * 8, protocol, src, dst)
