"""TFTP (RFC 1350, RFC 2347): the server answers from a port of its own, to the endpoint that asked.

So a client inside needs a pinhole to the very endpoint of its session, from the server's address, any port. For a
server inside, behind a forward, there is nothing to do: its answer opens a session by itself, from a port that the
client learns from the answer, and by that session the client comes back.
"""

from __future__ import annotations

import re
from typing import ClassVar

from xdpmasq.alg import words
from xdpmasq.alg.api import Alg, Control, Openings, Side

# RRQ or WRQ: file, mode, and options with their values, in netascii
_REQUEST = re.compile(rb"\0[\1\2][^\0]+\0(?i:netascii|octet|mail)\0(?:[^\0]+\0[^\0]*\0)*")


class Tftp(Alg):
    name = "tftp"
    ports: ClassVar = {"udp": (69,)}

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is Side.INSIDE and not control.from_outside and _REQUEST.fullmatch(data):
            own = words.own(control, control.internal.address, control.internal.port)
            openings.open("udp", own, remote=control.remote.address)
        return data
