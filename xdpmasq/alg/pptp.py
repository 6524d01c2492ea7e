"""PPTP (RFC 2637): call IDs of an internal host, which the peer's GRE packets carry in place of ports.

Either end of a control connection numbers its calls as it likes, so two hosts behind one address choose the same
number. What counts is whose number a field holds, not which message it is in: the sender's own is translated on its
way out, the receiver's own on its way in. A call of the internal host is a pinhole of protocol "gre", whose port is
its number outside.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from xdpmasq.alg.api import Control, Endpoint, Openings, Side, Unparsed
from xdpmasq.alg.framed import FramedAlg

_HEADER = struct.Struct("!HHIHH")  # length, message type, cookie, control message type, reserved (section 1.4)
_CONTROL_MESSAGE = 1
_COOKIE = 0x1A2B3C4D
_LONGEST = 220
_CONNECTED = 1  # result code of the replies to call requests (sections 2.8 and 2.10)
_PEERS = 16  # numbers of the peer's calls that are remembered


class _Type(enum.IntEnum):
    OUTGOING_CALL_REQUEST = 7
    OUTGOING_CALL_REPLY = 8
    INCOMING_CALL_REQUEST = 9
    INCOMING_CALL_REPLY = 10
    INCOMING_CALL_CONNECTED = 11
    CALL_CLEAR_REQUEST = 12
    CALL_DISCONNECT_NOTIFY = 13
    WAN_ERROR_NOTIFY = 14
    SET_LINK_INFO = 15


@dataclass(frozen=True)
class _Layout:
    """Where a message has call IDs.

    Attributes:
        own: the sender's.
        peer: the receiver's.
        begins: a call of the sender's begins, if ``result``, where there is one, says so.
    """

    length: int
    own: int | None = None
    peer: int | None = None
    begins: bool = False
    result: int | None = None


_LAYOUTS: Mapping[int, _Layout] = {
    _Type.OUTGOING_CALL_REQUEST: _Layout(168, own=12, begins=True),
    _Type.OUTGOING_CALL_REPLY: _Layout(32, own=12, peer=14, begins=True, result=16),
    _Type.INCOMING_CALL_REQUEST: _Layout(220, own=12, begins=True),
    _Type.INCOMING_CALL_REPLY: _Layout(24, own=12, peer=14, begins=True, result=16),
    _Type.INCOMING_CALL_CONNECTED: _Layout(28, peer=12),
    _Type.CALL_CLEAR_REQUEST: _Layout(16, own=12),
    _Type.CALL_DISCONNECT_NOTIFY: _Layout(148, own=12),
    _Type.WAN_ERROR_NOTIFY: _Layout(40, peer=12),
    _Type.SET_LINK_INFO: _Layout(24, peer=12),
}


class Pptp(FramedAlg):
    """What nf_conntrack_pptp and nf_nat_pptp do, for the end that is inside, client or server."""

    name = "pptp"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (1723,)}
    head = 10
    longest = _LONGEST
    pinholes = 4

    def length(self, head: bytes) -> int:
        fixed = struct.pack("!HI", _CONTROL_MESSAGE, _COOKIE)
        if head[:1] > b"\0" or head[2:8] != fixed[: len(head[2:8])]:
            raise Unparsed("no control message")
        if len(head) < self.head:
            return 0
        length, layout = _number(head, 0), _LAYOUTS.get(_number(head, 8))
        if not _HEADER.size <= length <= _LONGEST or (layout and layout.length != length):
            raise Unparsed(f"no control message is {length} bytes long")
        return length

    def translate_message(self, message: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        kind = _number(message, 8)
        layout = _LAYOUTS.get(kind)
        if layout is None:
            return message
        if side is Side.INSIDE:
            return message if layout.own is None else _out(message, layout, layout.own, control, openings)
        if layout.peer is not None:
            message = _in(message, layout.peer, control, openings)
        if layout.own is not None and _begins(message, layout):
            _remember(_number(message, layout.own), control)
        if kind == _Type.CALL_DISCONNECT_NOTIFY and _number(message, 12) not in control.memory.get("peers", ()):
            # section 2.13 has the sender's number here; some servers send the receiver's, as nf_nat_pptp expects
            return _in(message, 12, control, openings)
        return message


def _out(message: bytes, layout: _Layout, at: int, control: Control, openings: Openings) -> bytes:
    call = Endpoint(control.internal.address, _number(message, at))
    if _begins(message, layout):
        remote = control.remote.address
        known: Endpoint | None = openings.open("gre", call, remote=remote, lasts_s=300.0, sessions=0)
    else:
        known = openings.external("gre", call)
    return _with(message, at, known)


def _begins(message: bytes, layout: _Layout) -> bool:
    return layout.begins and (layout.result is None or message[layout.result] == _CONNECTED)


def _in(message: bytes, at: int, control: Control, openings: Openings) -> bytes:
    return _with(message, at, openings.internal("gre", Endpoint(control.external.address, _number(message, at))))


def _number(message: bytes, at: int) -> int:
    return int.from_bytes(message[at : at + 2], "big")


def _with(message: bytes, at: int, call: Endpoint | None) -> bytes:
    return message if call is None else message[:at] + call.port.to_bytes(2, "big") + message[at + 2 :]


def _remember(number: int, control: Control) -> None:
    peers = control.memory.setdefault("peers", [])
    if number not in peers:
        peers.append(number)
        del peers[:-_PEERS]
