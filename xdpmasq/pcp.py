"""PCP's messages (RFC 6887): bytes to what is asked, and answers to bytes."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Self

VERSION = 2
LONGEST = 1100  # bytes of a message (section 7)
RESPONSE = 0x80  # the R bit, beside the opcode
NONCE = 12  # bytes
PROTOCOLS = {6: "tcp", 17: "udp"}

_REQUEST = struct.Struct("!BBHI16s")  # version, opcode, reserved, lifetime, client
_RESPONSE = struct.Struct("!BBBBII12x")  # version, opcode, reserved, result, lifetime, epoch
_MAP = struct.Struct("!12sB3xHH16s")  # nonce, protocol, internal port, suggested (assigned) external port, address
_OPTION = struct.Struct("!BxH")  # code, length
_FILTER = struct.Struct("!xBH16s")  # prefix length, remote port, remote address
_OPTIONAL = 0x80  # options from here on may be ignored
_MAPPED_BITS = 96  # before the IPv4 address, in an IPv4-mapped one


class Opcode(enum.IntEnum):
    ANNOUNCE = 0
    MAP = 1


class Option(enum.IntEnum):
    PREFER_FAILURE = 2
    FILTER = 3


class Result(enum.IntEnum):
    """Section 7.4."""

    SUCCESS = 0
    UNSUPP_VERSION = 1
    NOT_AUTHORIZED = 2
    MALFORMED_REQUEST = 3
    UNSUPP_OPCODE = 4
    UNSUPP_OPTION = 5
    MALFORMED_OPTION = 6
    NETWORK_FAILURE = 7
    NO_RESOURCES = 8
    UNSUPP_PROTOCOL = 9
    USER_EX_QUOTA = 10
    CANNOT_PROVIDE_EXTERNAL = 11
    ADDRESS_MISMATCH = 12
    EXCESSIVE_REMOTE_PEERS = 13

    @property
    def lifetime_s(self) -> int:
        """For how long asking again would be answered the same (section 7.4)."""
        passing = self in (Result.NETWORK_FAILURE, Result.NO_RESOURCES, Result.USER_EX_QUOTA)
        return 30 if passing or self is Result.CANNOT_PROVIDE_EXTERNAL else 1800


class Refused(Exception):
    """What is asked for is not to be had.

    Args:
        lifetime_s: of the answer, where it is not that of every such result.
    """

    def __init__(self, result: Result, lifetime_s: int | None = None) -> None:
        super().__init__(result.name)
        self.result = result
        self.lifetime_s = result.lifetime_s if lifetime_s is None else lifetime_s


@dataclass(frozen=True)
class Request:
    """A request whose length and opcode are right.

    Attributes:
        body: what follows the header.
    """

    opcode: Opcode
    lifetime_s: int
    body: bytes

    @classmethod
    def parse(cls, message: bytes, client: IPv4Address) -> Self:
        """Reads a message of our version that came from ``client`` (section 8.2).

        Raises:
            Refused: what is wrong with it.
        """
        if len(message) < _REQUEST.size or len(message) > LONGEST or len(message) % 4:
            raise Refused(Result.MALFORMED_REQUEST)
        _, opcode, _, lifetime, address = _REQUEST.unpack_from(message)
        if opcode not in list(Opcode):
            raise Refused(Result.UNSUPP_OPCODE)
        if address != mapped(client):
            raise Refused(Result.ADDRESS_MISMATCH)
        return cls(Opcode(opcode), lifetime, message[_REQUEST.size :])


@dataclass(frozen=True)
class Filter:
    """A remote that may use the mapping; network None: forget the filters so far (section 13.3)."""

    network: IPv4Network | None
    port: int

    @classmethod
    def parse(cls, data: bytes) -> Self:
        bits, port, address = _FILTER.unpack(data)
        if bits == 0:
            return cls(None, port)
        remote = IPv6Address(address).ipv4_mapped
        # A shorter prefix would let in everybody, where a client may have meant bits of the IPv4 address.
        if remote is None or not _MAPPED_BITS < bits <= 128:
            raise Refused(Result.MALFORMED_OPTION)
        return cls(IPv4Network((remote, bits - _MAPPED_BITS), strict=False), port)


@dataclass(frozen=True)
class Map:
    """A MAP request's own part (section 11.1).

    Attributes:
        protocol: as in an IP header; 0: all of them.
        suggested_address: None: any.
        options: as they are copied into the answer.
    """

    nonce: bytes
    protocol: int
    internal_port: int
    suggested_port: int
    suggested_address: IPv4Address | None
    prefer_failure: bool
    filters: tuple[Filter, ...]
    options: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Raises Refused."""
        if len(body) < _MAP.size:
            raise Refused(Result.MALFORMED_REQUEST)
        nonce, protocol, internal, suggested, address = _MAP.unpack_from(body)
        options = parse_options(body[_MAP.size :], {Option.PREFER_FAILURE: 0, Option.FILTER: _FILTER.size})
        prefer_failure = [data for code, data in options if code is Option.PREFER_FAILURE]
        if len(prefer_failure) > 1:
            raise Refused(Result.MALFORMED_OPTION)
        filters = tuple(Filter.parse(data) for code, data in options if code is Option.FILTER)
        copied = b"".join(_OPTION.pack(code, len(data)) + data for code, data in options)
        wanted = IPv6Address(address).ipv4_mapped
        wanted = None if wanted is None or int(wanted) == 0 else wanted
        return cls(nonce, protocol, internal, suggested, wanted, bool(prefer_failure), filters, copied)

    def answer(self, port: int, address: IPv4Address | None) -> bytes:
        """The same part of the answer: the request's with what was assigned."""
        assigned = mapped(address or IPv4Address(0))
        return _MAP.pack(self.nonce, self.protocol, self.internal_port, port, assigned) + self.options


def parse_options(data: bytes, known: dict[Option, int]) -> list[tuple[Option, bytes]]:
    """The options of a request that are to be processed (section 7.3).

    Args:
        known: those of this opcode, and how long they are.

    Raises:
        Refused: one is malformed, or would have to be understood and is not.
    """
    found = []
    while data:
        code, length = _OPTION.unpack_from(data)  # what is left is a multiple of 4
        end = _OPTION.size + length
        if len(data) < end:
            raise Refused(Result.MALFORMED_OPTION)
        if code in list(known):
            if length != known[Option(code)]:
                raise Refused(Result.MALFORMED_OPTION)
            found.append((Option(code), data[_OPTION.size : end]))
        elif code < _OPTIONAL:
            raise Refused(Result.UNSUPP_OPTION)
        data = data[-(-end // 4) * 4 :]
    return found


def answer(opcode: int, result: Result, lifetime_s: int, epoch_s: int, body: bytes = b"") -> bytes:
    """A response."""
    return _RESPONSE.pack(VERSION, RESPONSE | opcode, 0, result, lifetime_s, epoch_s) + body


def refusal(message: bytes, refused: Refused, epoch_s: int) -> bytes:
    """The response to a request that cannot be served, which it copies (section 8.3); always of whole words."""
    body = message[_REQUEST.size : LONGEST]
    body += bytes(-len(body) % 4)
    return answer(message[1], refused.result, refused.lifetime_s, epoch_s, body)


def mapped(address: IPv4Address) -> bytes:
    """An IPv4-mapped IPv6 address, as IPv4 ones are written in PCP (section 5)."""
    return bytes(10) + b"\xff\xff" + address.packed
