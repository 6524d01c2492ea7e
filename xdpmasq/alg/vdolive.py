"""VDOLive: the player tells the server, over TCP 7000, at which UDP port it wants the film.

There is no published specification; VDOnet had told the author of Linux's ip_masq_vdolive how the message looks, and
that module tells: words of 32 bits, of which the second is the number of the message, 6; "VDO Live" from the 7th on,
and the port behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import own

_NUMBER, _TAG, _PORT = slice(4, 8), slice(24, 32), slice(32, 36)
_FIXED = ((_NUMBER, b"\0\0\0\6"), (_TAG, b"VDO Live"))


class Vdolive(Alg):
    """What ip_masq_vdolive did with the message that begins a connection.

    A later one repeats the port. How messages end is not known, so it cannot be said where that one begins, and it
    passes as it is.
    """

    name = "vdolive"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (7000,)}
    longest = _PORT.stop

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        return 0 if side is Side.INSIDE and len(data) < _PORT.stop and _is_announcement(data) else len(data)

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is Side.OUTSIDE:
            return data
        if control.memory.get("over"):
            raise Unparsed("the port is announced at the beginning, or never")
        control.memory["over"] = True
        if control.client is not side or len(data) < _PORT.stop or not _is_announcement(data):
            raise Unparsed("the port is not announced here")
        port = own(control, int.from_bytes(data[_PORT], "big"))
        outside = openings.open("udp", port, remote=control.remote.address)
        return data[: _PORT.start] + outside.port.to_bytes(4, "big") + data[_PORT.stop :]


def _is_announcement(data: bytes) -> bool:
    """As far as it goes."""
    return all(text.startswith(data[place]) for place, text in _FIXED)
