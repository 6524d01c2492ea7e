"""VDOLive: the player tells the server, over TCP 7000, at which UDP port it wants the film.

There is no published specification; VDOnet had told the author of Linux's ip_masq_vdolive how these two messages
look, and that module tells: words of 32 bits, of which the second is the message's number, 6 or 1; "VDO Live" from
the 7th or the 3rd on, and the port behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import own

_TAG = b"VDO Live"
_TAGS = {6: 24, 1: 8}  # message number to the tag's place


class Vdolive(Alg):
    """What ip_masq_vdolive did.

    How messages end is not known, so the second one is looked for where the player sends something, and nothing is
    held: one in pieces passes unchanged. The first must have begun the connection: no browser can be led to send its
    like.
    """

    name = "vdolive"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"tcp": (7000,)}

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is Side.OUTSIDE or control.client is not Side.INSIDE or not data:
            return data
        number = int.from_bytes(data[4:8], "big")
        at = _TAGS.get(number, 0)
        end = at + len(_TAG) + 4
        memory = control.memory
        begins = number == 6 or "begun" in memory
        if memory.get("over") or not at or data[at : end - 4] != _TAG or len(data) < end or not begins:
            memory["over"] = "begun" not in memory
            raise Unparsed("the port is not announced here")
        memory["begun"] = True
        port = own(control, int.from_bytes(data[end - 4 : end], "big"))
        outside = openings.open("udp", port, remote=control.remote.address)
        return data[: end - 4] + outside.port.to_bytes(4, "big") + data[end:]
