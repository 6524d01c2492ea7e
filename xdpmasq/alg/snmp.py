"""SNMP versions 1 and 2c (RFCs 1157, 3416): the host's own address as a value, in what agents send.

Such an address (RFC 1155 IpAddress) is four bytes, so no length changes. Addresses within object identifiers stay, as
nf_nat_snmp_basic leaves them: the length of an identifier depends on the numbers in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import addresses

_INTEGER, _OCTETS, _OBJECT, _SEQUENCE, _ADDRESS = 0x02, 0x04, 0x06, 0x30, 0x40
_TICKS = 0x43
_VERSIONS = (b"\0", b"\1")  # 1 and 2c
_RESPONSE, _TRAP, _INFORM, _TRAP2 = 0xA2, 0xA4, 0xA6, 0xA7


class Snmp(Alg):
    """What nf_nat_snmp_basic does: agent-addr, and the values of responses, traps and informs."""

    name = "snmp"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"udp": (161, 162)}
    pinholes = 0

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        old, new = addresses(control)
        if side is Side.OUTSIDE:
            old, new = new, old
        changed = bytearray(data)
        for at in _places(data):
            if data[at : at + 4] == old:
                changed[at : at + 4] = new
        return bytes(changed)


class _Reader:
    """BER values one after the other, between two places of a message (X.690 section 8.1)."""

    def __init__(self, data: bytes, begin: int, end: int) -> None:
        self.data, self.at, self.end = data, begin, end

    def next(self) -> tuple[int, int, int]:
        """The tag of the next value, and where its contents begin and end."""
        head = self.data[self.at : min(self.at + 2, self.end)]
        if len(head) < 2:
            raise Unparsed("a value is missing")
        tag, length = head
        begin = self.at + 2
        if length & 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4 or begin + size > self.end:
                raise Unparsed("a length is not definite")
            length = int.from_bytes(self.data[begin : begin + size], "big")
            begin += size
        if begin + length > self.end:
            raise Unparsed("a value ends behind what it is in")
        self.at = begin + length
        return tag, begin, self.at

    def need(self, *tags: int) -> tuple[int, int]:
        tag, begin, end = self.next()
        if tag not in tags:
            raise Unparsed(f"a value of type {tag:#04x}")
        return begin, end

    def into(self, *tags: int) -> _Reader:
        return _Reader(self.data, *self.need(*tags))

    def close(self) -> None:
        if self.at != self.end:
            raise Unparsed("more than the values that belong here")


def _places(data: bytes) -> list[int]:
    """Where a message has addresses."""
    whole = _Reader(data, 0, len(data))
    message = whole.into(_SEQUENCE)
    whole.close()
    begin, end = message.need(_INTEGER)
    if data[begin:end] not in _VERSIONS:
        raise Unparsed("neither version 1 nor 2c")
    message.need(_OCTETS)  # community
    kind, begin, end = message.next()
    message.close()
    pdu = _Reader(data, begin, end)
    places = []
    if kind == _TRAP:
        pdu.need(_OBJECT)
        places += _address(*pdu.need(_ADDRESS))
        expected = (_INTEGER, _INTEGER, _TICKS)
    elif kind in (_RESPONSE, _INFORM, _TRAP2):
        expected = (_INTEGER, _INTEGER, _INTEGER)
    else:
        return []
    for tag in expected:
        pdu.need(tag)
    bindings = pdu.into(_SEQUENCE)
    pdu.close()
    while bindings.at < bindings.end:
        binding = bindings.into(_SEQUENCE)
        binding.need(_OBJECT)
        tag, begin, end = binding.next()
        binding.close()
        if tag == _ADDRESS:
            places += _address(begin, end)
    return places


def _address(begin: int, end: int) -> list[int]:
    if end - begin != 4:
        raise Unparsed("an address of another length than four")
    return [begin]
