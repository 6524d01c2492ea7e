"""NAT-PMP's messages (RFC 6886): bytes to what is asked, and answers to bytes."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Self

VERSION = 0
NONCE = bytes(12)  # of its mappings, among those of PCP, which have one (RFC 6887 section 11.2)

_RESPONSE = 0x80  # beside the opcode
_HEADER = struct.Struct("!BBHI")  # version, opcode, result, epoch
_MAP = struct.Struct("!BBxxHHI")  # version, opcode, internal port, suggested external port, lifetime
_MAPPED = struct.Struct("!HHI")  # internal port, external port, lifetime


class Opcode(enum.IntEnum):
    ADDRESS = 0
    MAP_UDP = 1
    MAP_TCP = 2


class Result(enum.IntEnum):
    """Section 3.5."""

    SUCCESS = 0
    UNSUPPORTED_VERSION = 1
    NOT_AUTHORIZED = 2
    NETWORK_FAILURE = 3
    OUT_OF_RESOURCES = 4
    UNSUPPORTED_OPCODE = 5


@dataclass(frozen=True)
class Map:
    """A request for a mapping, or for its end.

    Attributes:
        internal_port: 0: all of this protocol.
        lifetime_s: 0: its end.
    """

    protocol: str
    internal_port: int
    suggested_port: int
    lifetime_s: int

    @classmethod
    def parse(cls, message: bytes) -> Self | None:
        """None where the message is too short."""
        if len(message) < _MAP.size:
            return None
        _, opcode, internal, suggested, lifetime = _MAP.unpack_from(message)
        return cls("udp" if opcode == Opcode.MAP_UDP else "tcp", internal, suggested, lifetime)


def header(opcode: int, result: Result, epoch_s: int) -> bytes:
    """Where each answer begins, and an error's end."""
    return _HEADER.pack(VERSION, opcode | _RESPONSE, result, epoch_s)


def address(external: IPv4Address | None, epoch_s: int) -> bytes:
    """The answer to Opcode.ADDRESS, and the announcement of a new one (section 3.2.1)."""
    result = Result.SUCCESS if external else Result.NETWORK_FAILURE
    return header(Opcode.ADDRESS, result, epoch_s) + (external or IPv4Address(0)).packed


def mapping(message: bytes, result: Result, epoch_s: int, port: int = 0, lifetime_s: int = 0) -> bytes:
    """The answer to a request for a mapping."""
    _, opcode, internal, *_ = _MAP.unpack_from(message)
    return header(opcode, result, epoch_s) + _MAPPED.pack(internal, port, lifetime_s)
