"""H.245 (control of H.323 media): the addresses that logical channels are opened with.

It comes within H.225.0 messages, and in TCP sessions of its own: :mod:`xdpmasq.alg.h323` reads both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from xdpmasq.alg.api import Control, Endpoint, Openings, Refused, Side, Unparsed
from xdpmasq.alg.checks import own
from xdpmasq.alg.per import OPEN_LOGICAL_CHANNEL, SYSTEM_CONTROL, Place, Type, place

_MEDIA_S = 300.0  # they begin when the call is answered
_WITHIN = 64  # messages in a message: a terminal offers each of its codecs once or twice


class Changes:
    """What becomes of the addresses in one message of a side's.

    The host's own: on their way out they are those of pinholes for the peer, on their way back, where the peer
    repeats them, the host's again. All others stay.
    """

    def __init__(self, side: Side, control: Control, openings: Openings) -> None:
        self.side, self.control, self.openings = side, control, openings

    def system_control(self, text: bytes) -> bytes:
        """A MultimediaSystemControlMessage: OpenLogicalChannel, and its acknowledgement."""
        return self.apply(SYSTEM_CONTROL, text, self._in_system_control)

    def open_logical_channel(self, text: bytes) -> bytes:
        return self.apply(OPEN_LOGICAL_CHANNEL, text, self._in_channel)

    def apply(self, kind: Type, text: bytes, change: Callable[[Any], bool]) -> bytes:
        """``text``, in whose value ``change`` changes addresses, and says whether it did."""
        value = kind.read(text)
        return kind.write(value, len(text)) if change(value) else text

    def each(self, texts: list[bytes], change: Callable[[bytes], bytes]) -> bool:
        """Messages within a message, in place; one that is not understood does not keep the others."""
        if len(texts) > _WITHIN:
            raise Unparsed(f"{len(texts)} messages in one")
        changed, unparsed = False, None
        for at, text in enumerate(texts):
            try:
                texts[at] = change(text)
            except Unparsed as error:
                unparsed = error
            changed |= texts[at] != text
        if unparsed and not changed:
            raise unparsed
        return changed

    def known(self, protocol: str, *places: Place | None) -> bool:
        """Addresses of the host's that something is open at already."""
        outwards = self.side is Side.INSIDE
        here, there = self.control.internal, self.control.external
        old, new = (here, there) if outwards else (there, here)
        look = self.openings.external if outwards else self.openings.internal
        changed = False
        for each in places:
            if each is None or each.endpoint.address != old.address:
                continue
            same = self.control.protocol == protocol and each.endpoint == old
            other = new if same else look(protocol, each.endpoint)
            if other is not None:
                each.put(other)
                changed = True
        return changed

    def tcp(self, where: Place | None) -> bool:
        """An address that the peer is to connect to."""
        if where is None or self.side is Side.OUTSIDE:
            return self.known("tcp", where)
        if where.endpoint.address != self.control.internal.address:
            return False
        port = own(self.control, where.endpoint.port)
        where.put(self.openings.open("tcp", port, remote=self.control.remote.address))
        return True

    def media(self, rtp: Place | None, rtcp: Place | None) -> bool:
        """Where media and their reports are wanted: a pair of ports, but for who does not keep to RFC 3550."""
        if self.side is Side.OUTSIDE:
            return self.known("udp", rtp, rtcp)
        address = self.control.internal.address
        rtp = rtp if rtp and rtp.endpoint.address == address else None
        rtcp = rtcp if rtcp and rtcp.endpoint.address == address else None
        # each port and whether it is the second of a pair, checked before the first is opened
        wanted = [(each, self._pair(each.endpoint.port, each is rtcp)) for each in (rtp, rtcp) if each]
        for each, (port, second, pair) in wanted:
            outside = self.openings.open("udp", port, remote=self.control.remote.address, lasts_s=_MEDIA_S, pair=pair)
            each.put(self._second(port) if second else outside)
        return bool(wanted)

    def _pair(self, port: int, is_report: bool) -> tuple[Endpoint, int, bool]:
        second = int(is_report and port % 2)
        return own(self.control, port - second), second, (port - second) % 2 == 0 and second == is_report

    def _second(self, first: Endpoint) -> Endpoint:
        """What the second port of a pair is known as: it has none, when the first has been opened alone before."""
        outside = self.openings.external("udp", Endpoint(first.address, first.port + 1))
        if outside is None:
            raise Refused(f"{first} is open without a neighbour")
        return outside

    def _in_system_control(self, message: Any) -> bool:
        match message:
            case ("request", ("openLogicalChannel", dict(channel))):
                return self._in_channel(channel)
            case ("response", ("openLogicalChannelAck", dict(channel))):
                return self._in_channel(channel)
        return False

    def _in_channel(self, channel: dict[str, Any]) -> bool:
        changed = False
        for parameters in _parameters(channel):
            media, reports = place(parameters.get("mediaChannel")), place(parameters.get("mediaControlChannel"))
            changed |= self.media(media, reports)
        match channel.get("separateStack"):  # T.120
            case {"networkAddress": ("localAreaAddress", address)}:
                changed |= self.tcp(place(address))
        return changed


def _parameters(channel: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of H.225.0 logical channels, for either direction of an OpenLogicalChannel or its acknowledgement."""
    for direction in ("forwardLogicalChannelParameters", "reverseLogicalChannelParameters"):
        match channel.get(direction):
            case {"multiplexParameters": ("h2250LogicalChannelParameters", dict(parameters))}:
                yield parameters
    match channel.get("forwardMultiplexAckParameters"):
        case ("h2250LogicalChannelAckParameters", dict(parameters)):
            yield parameters
