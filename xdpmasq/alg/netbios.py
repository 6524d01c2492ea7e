"""NetBIOS over UDP (RFC 1002): answers to broadcast name queries, and the sender's address in datagrams.

Whoever has a name that is asked for by broadcast answers from its own address (RFC 1002 section 4.2.13); for that
the asker's mapping is opened a few seconds. It helps those who ask from a port of their own: Windows asks from 137,
for which there are no pinholes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import addresses, own

_NAME_PORT, _DATAGRAM_PORT = 137, 138
_NAMES = struct.Struct("!HHHHHH")  # ID, opcode and flags, counts of the four sections (section 4.2.1.1)
_QUERY_MASK, _BROADCAST_QUERY = 0xF810, 0x0010  # response, opcode, and the flag B
_ANSWERS_S = 3.0  # of nf_conntrack_netbios_ns

_DATAGRAM = struct.Struct("!BBH4sH")  # type, flags, ID, the source's address and port (section 4.4.1)
_DATAGRAMS = range(0x10, 0x17)


class Netbios(Alg):
    """Names as nf_conntrack_netbios_ns does: those who answer a broadcast are let in, for three seconds.

    Datagrams (a server's port 138): the host's own address and port in what it sends, for answers go where these say.
    """

    name = "netbios"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"udp": (137, 138)}

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is not Side.INSIDE:
            return data
        server = control.internal if control.from_outside else control.remote
        if server.port == _DATAGRAM_PORT:
            return _datagram(data, control)
        if control.client is Side.INSIDE and _is_broadcast(data):
            port = own(control, control.internal.port)
            openings.open("udp", port, remote=None, remote_port=_NAME_PORT, lasts_s=_ANSWERS_S, sessions=0)
        return data


def _is_broadcast(data: bytes) -> bool:
    if len(data) < _NAMES.size:
        raise Unparsed("shorter than a header")
    _, flags, questions, *_ = _NAMES.unpack_from(data)
    return bool(flags & _QUERY_MASK == _BROADCAST_QUERY and questions == 1)


def _datagram(data: bytes, control: Control) -> bytes:
    if len(data) < _DATAGRAM.size:
        raise Unparsed("shorter than a header")
    kind, flags, number, address, port = _DATAGRAM.unpack_from(data)
    if kind not in _DATAGRAMS:
        raise Unparsed(f"no datagram has type {kind:#x}")
    internal, external = addresses(control)
    if (address, port) != (internal, control.internal.port):
        return data
    return _DATAGRAM.pack(kind, flags, number, external, control.external.port) + data[_DATAGRAM.size :]
