"""Quake (its network protocol as John Cash of id Software told it, 1996): the server's reply names the game's port.

The request goes to UDP 26000, the game is played at another port of the server's, which CCREP_ACCEPT names. A client
needs its mapping open to that port, too; of a server inside, behind a forward, the port is opened. QuakeWorld and
what came later play where they are asked, and need nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Refused, Side, Unparsed
from xdpmasq.alg.checks import own

_HEADER = struct.Struct("!HHB")  # control packet, its length, operation
_CONTROL = 0x8000
_ACCEPT = 0x81
_PORT = slice(5, 9)  # little-endian, where the header is not; engines of today add fields behind it


class Quake(Alg):
    """What ip_masq_quake did for a client, and the reverse."""

    name = "quake"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"udp": (26000,)}

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is not control.server:
            return data
        if len(data) < _HEADER.size or _HEADER.unpack_from(data) != (_CONTROL, len(data), _ACCEPT):
            return data
        if len(data) < _PORT.stop:
            raise Unparsed("accepted, but at no port")
        port = int.from_bytes(data[_PORT], "little")
        remote = control.remote.address
        if side is Side.INSIDE:
            outside = openings.open("udp", own(control, port), remote=remote)
            return data[: _PORT.start] + outside.port.to_bytes(4, "little") + data[_PORT.stop :]
        if not 1024 <= port <= 65535:
            raise Refused(f"no game is at port {port}")
        openings.open("udp", own(control, control.internal.port), remote=remote, remote_port=port)
        return data
