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
_CALL_WORD = b"\0\0\0\x07"
_REPLY = struct.Struct("!IIII")  # status (0: good), port, byte order, length of a resource's name
_BYTE_ORDERS = (0x1234, 0x4321)


class Sane(Alg):
    """What nf_conntrack_sane does, and the translation that it leaves out.

    Calls have no common frame, but a client waits for each one's answer: what it sends first after the server has
    sent something begins a call, and what the server sends first after that answers it.
    """

    name = "sane"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (6566,)}

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        memory = control.memory
        if control.server is not Side.INSIDE:
            whole = True
        elif side is Side.OUTSIDE:
            whole = memory.get("last") is side or len(data) >= _START.size or not _CALL_WORD.startswith(data[:4])
        else:
            whole = not memory.get("starts") or len(data) >= _REPLY.size or any(data[:4])
        return len(data) if whole else 0

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if control.server is not Side.INSIDE or not data:
            return data
        memory = control.memory
        if side is Side.OUTSIDE:
            begins = memory.get("last") is not side
            memory["last"] = side
            memory["starts"] = begins and len(data) == _START.size and data.startswith(_CALL_WORD)
            return data
        starts, memory["last"], memory["starts"] = memory.get("starts", False), side, False
        if not starts or any(data[:4]):  # not asked, or not successful
            return data
        if len(data) < _REPLY.size:
            raise Unparsed("a reply that was cut off")
        _, port, order, resource = _REPLY.unpack_from(data)
        if resource:  # that wants a password: there is no port yet
            return data
        if order not in _BYTE_ORDERS:
            raise Unparsed("no reply to SANE_NET_START")
        outside = openings.open("tcp", own(control, port), remote=control.remote.address)
        return data[:4] + outside.port.to_bytes(4, "big") + data[8:]
