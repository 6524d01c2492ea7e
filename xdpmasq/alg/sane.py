"""SANE (the SANE standard, chapter "Network Protocol"): the reply to SANE_NET_START names the picture's TCP port.

Only the server names a port; of one that is inside, behind a forward, it is opened for the client that has asked. A
client inside opens the connection itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import own

_START = struct.Struct("!II")  # the call, a handle
_CALL = 7
_REPLY = struct.Struct("!IIII")  # status, port, byte order, length of a resource's name
_GOOD = 0
_BYTE_ORDERS = (0x1234, 0x4321)


class Sane(Alg):
    """What nf_conntrack_sane does, and the translation that it leaves out.

    Calls have no common frame, but a client waits for each one's answer: what it sends first after the server has
    sent something begins a call, and what the server sends first after that answers it. Nothing is held: a reply in
    pieces, which no server sends, passes unchanged.
    """

    name = "sane"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (6566,)}

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if control.server is not Side.INSIDE or not data:
            return data
        memory = control.memory
        if side is Side.OUTSIDE:
            begins = memory.get("last") is not side
            memory["last"] = side
            memory["starts"] = begins and len(data) == _START.size and _START.unpack(data)[0] == _CALL
            return data
        starts, memory["last"], memory["starts"] = memory.get("starts", False), side, False
        if not starts:
            return data
        if len(data) < _REPLY.size:
            raise Unparsed("a piece of a reply")
        status, port, order, resource = _REPLY.unpack_from(data)
        if status != _GOOD or resource:  # a resource that wants a password: there is no port yet
            return data
        if order not in _BYTE_ORDERS or len(data) != _REPLY.size:
            raise Unparsed("no reply to SANE_NET_START")
        outside = openings.open("tcp", own(control, port), remote=control.remote.address)
        return data[:4] + outside.port.to_bytes(4, "big") + data[8:]
