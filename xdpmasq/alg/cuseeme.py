"""CU-SeeMe (Cornell's drafts "CU-SeeMe Header" and "OpenContinue Packet", 1996): addresses in each packet's header.

A client writes its own address as the source, a reflector and the other participants send it back as the destination
or in the list of who takes part; a client rejects what is for another address than its own. All goes between the
same two endpoints, so nothing is opened.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import addresses

# family, port and address of the destination and the source, sequence number, message, data type, length
_HEADER = struct.Struct("!HH4sHH4sIHHH")
_DESTINATION, _SOURCE = 4, 12
_FAMILIES = range(3)
_KINDS = frozenset({1, 2, 3, *range(100, 112), 256, 257})  # video, audio, control, auxiliary data
_OPEN_CONTINUE = 101
_CLIENTS = struct.Struct("!H28x")  # how many follow; behind the header
_CLIENT = 12  # the address first


class Cuseeme(Alg):
    """What ip_masq_cuseeme did, but that only the host's own address is replaced, whatever the field."""

    name = "cuseeme"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"udp": (7648,)}
    pinholes = 0

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if len(data) < _HEADER.size:
            raise Unparsed("shorter than a header")
        to, _, _, by, *_, kind, _ = _HEADER.unpack_from(data)
        if to not in _FAMILIES or by not in _FAMILIES or kind not in _KINDS:
            raise Unparsed("not a header")
        internal, external = addresses(control)
        if side is Side.INSIDE:
            return _with(data, [_SOURCE], internal, external)
        places = [_DESTINATION]
        begin = _HEADER.size + _CLIENTS.size
        if kind == _OPEN_CONTINUE and len(data) >= begin:
            count = min(_CLIENTS.unpack_from(data, _HEADER.size)[0], (len(data) - begin) // _CLIENT)
            places += range(begin, begin + count * _CLIENT, _CLIENT)
        return _with(data, places, external, internal)


def _with(data: bytes, places: list[int], old: bytes, new: bytes) -> bytes:
    changed = bytearray(data)
    for at in places:
        if data[at : at + 4] == old:
            changed[at : at + 4] = new
    return bytes(changed)
