"""ICQ, as it was to 1998 (Magnus Ihse's description of version 2): a login tells where to reach the client.

The server hands on the address and TCP port to the user's contacts, who then connect to the client: any of them may,
so the pinhole is for everybody. Versions 3 to 5 have check codes and, of what clients send, ciphers, to keep others
from reading and writing it; they pass as they are, and messages go by the server.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Endpoint, Openings, Side, Unparsed
from xdpmasq.alg.checks import addresses, own

_HEADER = struct.Struct("<HHHI")  # version, command, sequence number, user
_VERSION = 2
_LOGIN, _KEEP_ALIVE = 1000, 1070
_PORT = struct.Struct("<IH")  # TCP port, length of the password, which follows with its NUL
_UNKNOWN = 4  # bytes between the password and the address, which is in network order


class Icq(Alg):
    """The client's address and port in a login; what the server tells of others is theirs.

    Clients keep their session alive every two minutes, and with it the pinhole.
    """

    name = "icq"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"udp": (4000,)}

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is not Side.INSIDE or control.client is not Side.INSIDE:
            return data
        if len(data) < _HEADER.size:
            raise Unparsed("shorter than a header")
        version, command, *_ = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise Unparsed(f"version {version} cannot be read")
        if command == _KEEP_ALIVE and "port" in control.memory:
            _open(control, openings)
        if command != _LOGIN:
            return data
        internal, external = addresses(control)
        begin = _HEADER.size + _PORT.size
        if len(data) < begin:
            raise Unparsed("a login that ends early")
        port, password = _PORT.unpack_from(data, _HEADER.size)
        at = begin + password + _UNKNOWN
        if not password or len(data) < at + 4 or data[begin + password - 1]:
            raise Unparsed("a login without a password")
        if data[at : at + 4] != internal:
            raise Unparsed("the address is another's")
        control.memory["port"] = own(control, port)
        outside = _open(control, openings)
        return b"".join(
            (data[: _HEADER.size], _PORT.pack(outside.port, password), data[begin:at], external, data[at + 4 :])
        )


def _open(control: Control, openings: Openings) -> Endpoint:
    return openings.open("tcp", control.memory["port"], remote=None, lasts_s=300.0, sessions=0)
