"""PPTP (RFC 2637): call IDs of an internal host, which the peer's GRE packets carry in place of ports.

Either end of a control connection numbers its calls as it likes, so two hosts behind one address choose the same
number. What counts is whose number a field holds, not which message it is in: the sender's own is translated on its
way out, the receiver's own on its way in. A call of the internal host is a pinhole of protocol "gre", whose port is
its number outside.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Endpoint, Openings, Side, Unparsed

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


class Pptp(Alg):
    """What nf_conntrack_pptp and nf_nat_pptp do, for the end that is inside, client or server.

    A stream in which something else than a control message stands where one should begin is not looked at again.
    """

    name = "pptp"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (1723,)}
    longest = _LONGEST
    pinholes = 4

    def ready(self, data: bytes, side: Side) -> int:
        end = max(_ends(data), default=0)
        return end if _may_begin(data[end:]) else len(data)

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        lost = f"lost {side.value}"
        if lost in control.memory:
            raise Unparsed("the stream is not PPTP")
        done, begin, unparsed = [], 0, None
        for end in _ends(data):
            try:
                done.append(_message(data[begin:end], side, control, openings))
            except Unparsed as error:
                unparsed = error
                done.append(data[begin:end])
            begin = end
        if begin < len(data):
            control.memory[lost] = True
            unparsed = Unparsed("no control message begins here")
            done.append(data[begin:])
        changed = b"".join(done)
        if unparsed and changed == data:
            raise unparsed
        return changed


def _ends(data: bytes) -> Iterator[int]:
    """Where whole messages end, as long as one follows the other."""
    end = 0
    while len(data) >= end + _HEADER.size and _may_begin(data[end : end + _HEADER.size]):
        end += int.from_bytes(data[end : end + 2], "big")
        if end > len(data):
            return
        yield end


def _may_begin(data: bytes) -> bool:
    """Is that, as far as it goes, the beginning of a control message?"""
    known = data[2:8]
    if known != struct.pack("!HI", _CONTROL_MESSAGE, _COOKIE)[: len(known)]:
        return False
    if len(data) < 2:
        return data in (b"", b"\0")
    length = int.from_bytes(data[:2], "big")
    if not _HEADER.size <= length <= _LONGEST:
        return False
    layout = _LAYOUTS.get(_number(data, 8)) if len(data) >= 10 else None
    return layout is None or layout.length == length


def _message(message: bytes, side: Side, control: Control, openings: Openings) -> bytes:
    kind = _number(message, 8)
    layout = _LAYOUTS.get(kind)
    if layout is None:
        return message
    if side is Side.INSIDE:
        return message if layout.own is None else _out(message, layout, layout.own, control, openings)
    if layout.own is not None and kind != _Type.CALL_DISCONNECT_NOTIFY:
        _remember(_number(message, layout.own), control)
    if layout.peer is not None:
        return _in(message, layout.peer, control, openings)
    if kind == _Type.CALL_DISCONNECT_NOTIFY and _number(message, 12) not in control.memory.get("peers", ()):
        # section 2.13 has the sender's number here; some servers send the receiver's, as nf_nat_pptp expects of all
        return _in(message, 12, control, openings)
    return message


def _out(message: bytes, layout: _Layout, at: int, control: Control, openings: Openings) -> bytes:
    call = Endpoint(control.internal.address, _number(message, at))
    if layout.begins and (layout.result is None or message[layout.result] == _CONNECTED):
        remote = control.remote.address
        known: Endpoint | None = openings.open("gre", call, remote=remote, lasts_s=300.0, sessions=0)
    else:
        known = openings.external("gre", call)
    return _with(message, at, known)


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
