"""RealAudio's PNA: the client's first bytes on the control connection name the UDP port it listens at.

They are "PNA", a zero, a byte of version, and then chunks: a type and a length of 16 bits each, and as many bytes. A
chunk of type 1 and two bytes is the port; the one of type "R", the path asked for, is the last. A client that wants
its audio over TCP sends no chunk of type 1. The server sends from its own address.
"""

from __future__ import annotations

from typing import ClassVar

from xdpmasq.alg import words
from xdpmasq.alg.api import Alg, Control, Openings, Side

_BEGINNING = b"PNA\0"
_HEADER = 5
_PORT, _LAST = 1, 0x52
_LONGEST = 1024  # a chunk; what says it is longer is none


class Pna(Alg):
    name = "pna"
    ports: ClassVar = {"tcp": (7070,)}

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        # Whether the beginning is over is not known here: after it nothing begins like a chunk.
        if side is Side.OUTSIDE or not (data[:1] == b"\0" or data.startswith(_BEGINNING[: len(data)])):
            return len(data)
        if data[:1] == b"\0":
            return _chunks(data, 0)[0]
        return _chunks(data, _HEADER)[0] if len(data) >= _HEADER else 0

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        memory = control.memory
        if side is Side.OUTSIDE or control.from_outside or memory.get("over"):
            return data
        begins = not memory.get("begun")
        if begins and not (data.startswith(_BEGINNING) and len(data) >= _HEADER):
            memory["over"] = True
            return data
        whole, port_at, over = _chunks(data, _HEADER if begins else 0)
        memory["begun"], memory["over"] = True, over or whole < len(data)
        if port_at is None:
            return data
        number = int.from_bytes(data[port_at : port_at + 2], "big")
        internal = words.own(control, control.internal.address, number)
        opened = openings.open("udp", internal, remote=control.remote.address)
        return data[:port_at] + opened.port.to_bytes(2, "big") + data[port_at + 2 :]


def _chunks(data: bytes, at: int) -> tuple[int, int | None, bool]:
    """How much of the data can go, where in it the port is, and whether all has been seen that matters."""
    while at < len(data) and data[at] == 0:
        kind, length = int.from_bytes(data[at : at + 2], "big"), int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 4 + length
        if len(data) < at + 4 or (0 < length <= _LONGEST and end > len(data)):
            return at, None, False
        if not 0 < length <= _LONGEST or kind == _LAST:
            break
        if kind == _PORT and length == 2:
            return len(data), at + 4, True
        at = end
    return len(data), None, at < len(data)
