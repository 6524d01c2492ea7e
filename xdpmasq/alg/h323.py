"""H.323 call signalling: H.225.0 messages (H.225.0 section 7), in the User-User element of Q.931 messages, in TPKT.

They have the ends' own addresses, the address of the session for H.245, and, when the call is to begin fast, H.245
messages themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from xdpmasq.alg.api import Control, Openings, Side, Unparsed
from xdpmasq.alg.framed import FramedAlg
from xdpmasq.alg.h245 import Changes
from xdpmasq.alg.per import USER_INFORMATION, Place, place

_Q931 = 8  # protocol discriminator; of H.245, only the request requestMode begins so, which has no addresses
_USER_USER = 0x7E
_ASN1 = 5  # protocol discriminator of user information (H.225.0 section 7.2.2.31)
_SIGNALLING = ("sourceCallSignalAddress", "destCallSignalAddress", "alternativeAddress")


class H323(FramedAlg):
    """What nf_conntrack_h323 and nf_nat_h323 do with a call, but for gatekeepers (RAS, UDP 1719).

    Sessions for H.245 are read, too: their messages stand in TPKT without Q.931.
    """

    name = "h323"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (1720,)}
    head = 4
    longest = 8192  # reading takes up to 20 µs a byte
    pinholes = 16

    def length(self, head: bytes) -> int:
        """Of a TPKT (RFC 1006 section 6): 3, 0, the length of all."""
        if head[:2] != b"\3\0"[: len(head)]:
            raise Unparsed("no TPKT")
        if len(head) < self.head:
            return 0
        length = int.from_bytes(head[2:4], "big")
        if not self.head <= length <= self.longest:
            raise Unparsed(f"a TPKT of {length} bytes")
        return length

    def translate_message(self, message: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        head, content = message[: self.head], message[self.head :]
        if not content:  # keeps the connection open
            return message
        changes = Changes(side, control, openings)
        if content[0] != _Q931:
            return head + changes.system_control(content)
        at, end = _user_information(content)
        if at == end:
            return message
        text = changes.apply(USER_INFORMATION, content[at:end], lambda value: _change(value, changes))
        return head + content[:at] + text + content[end:]


def _user_information(message: bytes) -> tuple[int, int]:
    """Where a Q.931 message (Q.931 section 4) has H.225.0 in it; nothing: nowhere."""
    if len(message) < 2:
        raise Unparsed("no Q.931 message")
    at = 2 + (message[1] & 0x0F) + 1  # call reference, message type
    found = []
    while at < len(message):
        element = message[at]
        if element & 0x80:  # of one octet
            at += 1
            continue
        size = 2 if element == _USER_USER else 1
        begin = at + 1 + size
        at = begin + int.from_bytes(message[at + 1 : begin], "big")
        if element == _USER_USER:
            found.append((begin, at))
    if at != len(message) or len(found) > 1:
        raise Unparsed("its elements are not where they should be")
    if not found:
        return 0, 0
    begin, end = found[0]
    if message[begin : begin + 1] != bytes([_ASN1]):
        raise Unparsed("user information of another kind")
    return begin + 1, end


def _change(value: dict[str, Any], changes: Changes) -> bool:
    pdu = value["h323-uu-pdu"]
    _, body = pdu["h323-message-body"]
    changed = False
    if isinstance(body, dict):
        changed |= changes.known("tcp", *(place(body.get(name)) for name in _SIGNALLING))
        changed |= _h245(place(body.get("h245Address")), changes)
        changed |= changes.each(body.get("fastStart", []), changes.open_logical_channel)
        changed |= changes.each(body.get("parallelH245Control", []), changes.system_control)
    changed |= changes.each(pdu.get("h245Control", []), changes.system_control)
    return changed


def _h245(where: Place | None, changes: Changes) -> bool:
    """The address that the other end is to connect to for H.245."""
    if where is None:
        return False
    endpoint = where.endpoint
    if changes.side is Side.OUTSIDE:
        if endpoint.address == changes.control.remote.address and endpoint.port >= 1024:
            changes.openings.follow(endpoint)
        return False
    if changes.tcp(where):
        changes.openings.follow(endpoint)
        return True
    return False
