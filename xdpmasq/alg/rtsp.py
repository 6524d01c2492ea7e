"""RTSP (RFC 2326): the Transport header of SETUP says at which UDP ports a client, and a server, listen.

A client inside names its own in client_port, and gets them back in the answer; a server inside, behind a forward,
names its own in server_port. Ports for RTP and RTCP are a pair. The streams come from the session's remote.
Multicast, and streams within the connection, need nothing; once there has been one of the latter, nothing is read
any more. URLs are left alone: they are sent on the same connection, and name what the server itself has named.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from typing import ClassVar

from xdpmasq.alg import words
from xdpmasq.alg.api import Address, Alg, Control, Endpoint, Openings, Refused, Side, Unparsed
from xdpmasq.alg.messages import Form, Header

_FORM = Form(
    start=re.compile(rb"RTSP/1\.0 \d{3}(?: [^\r\n\0]*)?|[A-Z_]{1,20} [^ \r\n\0]+ RTSP/1\.0"),
    begun=re.compile(
        rb"R(?:T(?:S(?:P(?:/(?:1(?:\.(?:0(?: [^\r\n\0]*)?)?)?)?)?)?)?)?\r?"
        rb"|[A-Z_]{1,20}(?: (?:[^ \r\n\0]+(?: [RTSP/1.0]*)?)?)?\r?"
    ),
    length=(b"content-length",),
    always=False,
    longest=16384,
)
_PORTS = re.compile(rb"(;[ \t]*)(client_port|server_port)(=)(\d{1,5})(?:-(\d{1,5}))?(?=[;,\s]|\Z)", re.IGNORECASE)
_HOST = re.compile(rb"(;[ \t]*)(destination|source)(=)(" + words.DOTTED + rb")(?=[;,\s]|\Z)", re.IGNORECASE)
_MULTICAST = re.compile(rb";[ \t]*multicast(?=[;,\s]|\Z)|/mcast(?=[;,\s]|\Z)", re.IGNORECASE)


class Rtsp(Alg):
    name = "rtsp"
    ports: ClassVar = {"tcp": (554,)}  # 7070, where RealServer listens, too, is PNA's
    longest = _FORM.longest
    pinholes = 16

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        return _FORM.ready(data)

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        done, unparsed = [], None
        for piece in _FORM.split(data, control):
            try:
                done.append(_translated(piece, side, control, openings))
            except Unparsed as error:
                unparsed = error
                done.append(piece)
        changed = b"".join(done)
        if unparsed and changed == data:
            raise unparsed
        return changed


def _translated(piece: bytes, side: Side, control: Control, openings: Openings) -> bytes:
    if control.memory.get("over") or not piece.strip(b"\r\n"):
        return piece
    message = _FORM.read(piece)
    headers = [each for each in message.headers if each.name.lower() == b"transport"]
    if message.start.startswith(b"SETUP ") and side is Side.INSIDE and not control.from_outside:
        change: _Change = _Opened(b"client_port", headers, control, openings)
    elif message.start.startswith(b"RTSP/1.0 2") and side is Side.INSIDE and control.from_outside:
        change = _Opened(b"server_port", headers, control, openings)
    elif message.start.startswith(b"RTSP/1.0 ") and side is Side.OUTSIDE and not control.from_outside:
        change = _Back(b"client_port", headers, control, openings)
    else:
        return piece
    for header in headers:
        header.value = b",".join(map(change.transport, header.value.split(b",")))
    return bytes(message)


class _Change:
    """Of one port parameter, and the addresses beside it."""

    def __init__(self, name: bytes, headers: list[Header], control: Control, openings: Openings) -> None:
        self.name, self.control, self.openings = name, control, openings
        self.ports = self.new_ports([at for each in headers for at in each.value.split(b",") if _is_udp(at)])

    def new_ports(self, transports: list[bytes]) -> dict[int, int]:
        """Old first port to new one, for those that change."""
        raise NotImplementedError

    def new_address(self, old: IPv4Address) -> Address | None:
        raise NotImplementedError

    def asked(self, transports: list[bytes]) -> list[tuple[int, int]]:
        """First and last ports; Unparsed: they are neither one nor a pair."""
        asked = []
        for found in (found for each in transports for found in _PORTS.finditer(each)):
            if found[2].lower() == self.name:
                first = words.port(found[4])
                last = words.port(found[5]) if found[5] else first
                if last not in {first, first + 1}:
                    raise Unparsed(f"no pair: {first}-{last}")
                asked.append((first, last))
        return asked

    def transport(self, text: bytes) -> bytes:
        """One transport of those that are offered or chosen."""
        first = next((int(at[4]) for at in _PORTS.finditer(text) if at[2].lower() == self.name), None)
        if first not in self.ports or not _is_udp(text):
            return text
        return _HOST.sub(self._host, _PORTS.sub(self._ports, text))

    def _ports(self, old: re.Match[bytes]) -> bytes:
        if old[2].lower() != self.name or int(old[4]) not in self.ports:
            return old[0]
        first = self.ports[int(old[4])]
        last = b"-%d" % (first + int(old[5]) - int(old[4])) if old[5] else b""
        return b"".join((old[1], old[2], old[3], b"%d" % first, last))

    def _host(self, old: re.Match[bytes]) -> bytes:
        new = self.new_address(words.address(old[4]))
        return b"".join((old[1], old[2], old[3], str(new).encode())) if new else old[0]


class _Opened(_Change):
    """Internal to external: there are pinholes for them."""

    def new_ports(self, transports: list[bytes]) -> dict[int, int]:
        asked = self.asked(transports)
        pairs = {first for first, last in asked if last > first}
        return {first: self._open(first, first in pairs).port for first, _ in asked}

    def new_address(self, old: IPv4Address) -> Address | None:
        return self.control.external.address if old == self.control.internal.address else None

    def _open(self, first: int, pair: bool) -> Endpoint:
        internal = words.own(self.control, self.control.internal.address, first)
        if pair and first % 2:
            raise Refused(f"no pair begins with {first}")
        return self.openings.open("udp", internal, remote=self.control.remote.address, pair=pair)


class _Back(_Change):
    """External to internal, in what the server repeats."""

    def new_ports(self, transports: list[bytes]) -> dict[int, int]:
        known = {}
        for first, _ in self.asked(transports):
            external = Endpoint(self.control.external.address, first)
            if internal := words.known_inside("udp", external, self.control, self.openings):
                known[first] = internal.port
        return known

    def new_address(self, old: IPv4Address) -> Address | None:
        return self.control.internal.address if old == self.control.external.address else None


def _is_udp(transport: bytes) -> bool:
    lower = transport.partition(b";")[0].strip().lower()
    return not lower.endswith(b"/tcp") and not _MULTICAST.search(transport)
