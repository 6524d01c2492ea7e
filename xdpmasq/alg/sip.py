"""SIP (RFC 3261) with SDP (RFC 8866), over UDP and TCP.

What a host inside says of itself, outside is to read of us, and what comes back names it again: the Via headers of
its requests, and of the answers to them; Contact, Record-Route and Route; the Request-URI; and of SDP the addresses
and ports of media. Only the host's own address is changed. From, To and Call-ID are names, not addresses: they stay.

Media are for the session's remote: a third party that sends them comes in by the session that the host opens when
it sends its own, from the same ports. A body of which not every medium could be opened stays as it is; the headers
do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from xdpmasq.alg import words
from xdpmasq.alg.api import Address, Alg, Control, Endpoint, Openings, Refused, Side, Unparsed
from xdpmasq.alg.messages import CRLF, Form, Header, Message

_FORM = Form(
    start=re.compile(rb"SIP/2\.0 \d{3}(?: [^\r\n\0]*)?|[A-Z]{1,20} [A-Za-z][A-Za-z0-9+.-]*:[^ \r\n\0]+ SIP/2\.0"),
    begun=re.compile(
        rb"S(?:I(?:P(?:/(?:2(?:\.(?:0(?: [^\r\n\0]*)?)?)?)?)?)?)?\r?"
        rb"|[A-Z]{1,20}(?: (?:[A-Za-z][^ \r\n\0]*(?: [SIP/2.0]*)?)?)?\r?"
    ),
    length=(b"content-length", b"l"),
    always=True,  # RFC 3261 section 18.3
    longest=16384,
)
_COMPACT = {b"v": b"via", b"m": b"contact", b"c": b"content-type", b"e": b"content-encoding"}
# One that does not end reaches to the end of the text, so that it is not looked for again behind each of its bytes.
_QUOTED = rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)'
# Elements of a header: quoted display names are stepped over, an address is in brackets or begins an element.
_ADDRESSES = re.compile(_QUOTED + rb'|<[^<>"]*>|(?:\A|(?<=,))\s*[^"<>,\s]+', re.DOTALL)
_URI = re.compile(
    rb'([<\s]*(sips?):(?:[^@<>\s"]*@)?)(' + words.DOTTED + rb")(?::(\d{1,5}))?(?=[;?>]|\Z)([^>]*>?)", re.IGNORECASE
)
_TRANSPORT = re.compile(rb";transport=([^;?>]*)", re.IGNORECASE)
_VIA = re.compile(
    rb"((?:\A|,)\s*SIP\s*/\s*2\.0\s*/\s*(UDP|TCP)\s+)(" + words.DOTTED + rb")(?:(\s*:\s*)(\d{1,5}))?"
    rb"((?:\s*;(?:" + _QUOTED + rb'|[^",])*)?)(?=\s*(?:,|\Z))',
    re.IGNORECASE | re.DOTALL,
)
_RECEIVED = re.compile(rb"(;\s*received\s*=\s*)(" + words.DOTTED + rb")(?=[\s;]|\Z)", re.IGNORECASE)
_RPORT = re.compile(rb"(;\s*rport\s*=\s*)(\d{1,5})(?=[\s;]|\Z)", re.IGNORECASE)
_DEFAULT = 5060
_SIGNALLING_S = 300.0  # pinholes last no longer; the host registers again, or the session lives
_MEDIA_S = 300.0  # while it rings
_MEDIA_MOST = 16  # of a host, in one body: each may need two ports


class Sip(Alg):
    name = "sip"
    ports: ClassVar = {"udp": (5060,), "tcp": (5060,)}
    longest = _FORM.longest
    pinholes = 32

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        return _FORM.ready(data)

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        pieces = _FORM.split(data, control) if control.protocol == "tcp" else iter([data])
        done: list[bytes] = []
        unparsed: list[Unparsed] = []
        for piece in pieces:
            if control.memory.get("over") or not piece.strip(b"\r\n\0"):  # keep-alives
                done.append(piece)
                continue
            exchange = _Exchange(side, control, openings, unparsed)
            try:
                done.append(exchange.message(_FORM.read(piece)))
            except Unparsed as error:
                unparsed.append(error)
                done.append(piece)
        changed = b"".join(done)
        if unparsed and changed == data:
            raise unparsed[0]
        return changed


@dataclass
class _Exchange:
    """A message on its way out or in; what of it could not be changed is in ``unparsed``."""

    side: Side
    control: Control
    openings: Openings
    unparsed: list[Unparsed]
    named: dict[tuple[str, Endpoint], Endpoint | None] = field(default_factory=dict)  # it is said several times

    def message(self, message: Message) -> bytes:
        length, body = self._body(message)
        is_answer = message.start.startswith(b"SIP/")
        leaves = self.side is Side.INSIDE
        if not is_answer and not leaves:
            method, uri, version = message.start.split(b" ")
            message.start = b" ".join((method, self._uri(uri), version))
        for header in message.headers:
            name = header.name.lower()
            name = _COMPACT.get(name, name)
            if name == b"via" and leaves != is_answer:
                header.value = _VIA.sub(self._via, header.value)
            elif name in {b"contact", b"record-route", b"route"}:
                header.value = _ADDRESSES.sub(lambda found: self._uri(found[0]), header.value)
        if leaves and _is_sdp(message.headers):
            self._replace_body(message, length, body)
        return bytes(message)

    def _body(self, message: Message) -> tuple[Header | None, bytes]:
        length = _FORM.content_length(message)
        if length is None:
            return None, message.body
        if int(length.value) > len(message.body):
            raise Unparsed("the body is cut off")
        return length, message.body[: int(length.value)]

    def _replace_body(self, message: Message, length: Header | None, body: bytes) -> None:
        try:
            new = _sdp(body, self.control, self.openings)
        except Unparsed as error:
            self.unparsed.append(error)
            return
        if new != body:
            message.body = new + message.body[len(body) :]
            if length:
                length.value = re.sub(rb"\d+", b"%d" % len(new), length.value, count=1)

    def _uri(self, text: bytes) -> bytes:
        """``<sip:…>``, or what begins with ``sip:``; anything else stays."""
        if not (uri := _URI.fullmatch(text)):
            return text
        before, scheme, host, digits, after = uri.groups()
        transport = _TRANSPORT.search(after)
        protocol = transport[1].decode("latin-1").lower() if transport else self.control.protocol
        if scheme.lower() == b"sips" or protocol not in {"udp", "tcp"}:
            return text
        new = self._host_port("URIs", protocol, host, digits)
        return text if new is None else before + new + after

    def _via(self, via: re.Match[bytes]) -> bytes:
        before, protocol, host, colon, digits, after = via.groups()
        new = self._host_port("Via", protocol.decode().lower(), host, digits)
        if new is None:
            return via[0]
        if self.side is Side.OUTSIDE:
            after = _RECEIVED.sub(self._received, _RPORT.sub(self._rport, after))
        return before + new.replace(b":", colon or b":") + after

    def _received(self, old: re.Match[bytes]) -> bytes:
        ours = old[2] == str(self.control.external.address).encode()
        return old[1] + str(self.control.internal.address).encode() if ours else old[0]

    def _rport(self, old: re.Match[bytes]) -> bytes:
        ours = int(old[2]) == self.control.external.port
        return old[1] + b"%d" % self.control.internal.port if ours else old[0]

    def _host_port(self, kind: str, protocol: str, host: bytes, digits: bytes | None) -> bytes | None:
        """``host:port`` as it is to be now; None: it stays.

        A host that leaves out its port, which is the default, gets its name back like that: for it the two differ
        (RFC 3261 section 19.1.4).
        """
        memory, leaves_out = self.control.memory, f"{protocol} port left out in {kind}"
        try:
            old = Endpoint(words.address(host), words.port(digits) if digits else _DEFAULT)
            if (protocol, old) not in self.named:
                translate = self._outside if self.side is Side.INSIDE else self._inside
                self.named[protocol, old] = translate(protocol, old)
            new = self.named[protocol, old]
        except Unparsed as error:
            self.unparsed.append(error)
            return None
        if new is None:
            return None
        if self.side is Side.INSIDE and old.port == _DEFAULT:
            memory[leaves_out] = digits is None
        without = digits is None or (self.side is Side.OUTSIDE and memory.get(leaves_out))
        text = str(new.address).encode()
        return text if without and new.port == _DEFAULT else text + b":%d" % new.port

    def _outside(self, protocol: str, internal: Endpoint) -> Endpoint | None:
        if internal.address != self.control.internal.address:
            return None
        if known := words.known_outside(protocol, internal, self.control, self.openings):
            return known
        own = words.own(self.control, internal.address, internal.port)
        return self.openings.open(protocol, own, remote=self.control.remote.address, lasts_s=_SIGNALLING_S)

    def _inside(self, protocol: str, external: Endpoint) -> Endpoint | None:
        return words.known_inside(protocol, external, self.control, self.openings)


def _is_sdp(headers: list[Header]) -> bool:
    kinds = [each.value for each in headers if each.name.lower() in {b"content-type", b"c"}]
    coded = any(each.name.lower() in {b"content-encoding", b"e"} for each in headers)
    return len(kinds) == 1 and not coded and kinds[0].partition(b";")[0].strip().lower() == b"application/sdp"


_SDP_LINES = re.compile(rb"[^\n]*\n|[^\n]+")
_ORIGIN = re.compile(rb"(o=[^ \r\n\0]+ [^ \r\n\0]+ [^ \r\n\0]+ IN IP4 )(" + words.DOTTED + rb")([ \t]*\r?\n?)")
_CONNECTION = re.compile(rb"(c=IN IP4 )(" + words.DOTTED + rb")((?:/\d+)*[ \t]*\r?\n?)")
_MEDIUM = re.compile(rb"(m=[^ \r\n\0]+ )(\d{1,5})((?:/1)? ([^ \r\n\0]+)(?: [^\r\n\0]*)?\r?\n?)")
_RTCP = re.compile(rb"(a=rtcp:)(\d{1,5})(?:( IN IP4 )(" + words.DOTTED + rb"))?([ \t]*\r?\n?)")


@dataclass
class _Medium:
    """``last``: the line with which it ends."""

    line: int
    last: int
    port: int
    protocol: str
    host: Address | None = None
    rtcp: int | None = None
    rtcp_host: Address | None = None
    rtcp_line: int | None = None


def _sdp(body: bytes, control: Control, openings: Openings) -> bytes:
    """RFC 8866, and a=rtcp (RFC 3605).

    Raises:
        Unparsed: it stays as it is.
    """
    lines = _SDP_LINES.findall(body)
    added: dict[int, bytes] = {}
    media = [
        each
        for each in _media(lines)
        if each.host == control.internal.address and each.port not in {0, 9}  # 9: this side will connect
    ]
    if len(media) > _MEDIA_MOST:
        raise Unparsed(f"more than {_MEDIA_MOST} media")
    for medium in media:
        if number := _open(medium, lines, control, openings):
            line = b"a=rtcp:%d" % number
            added[medium.last] = line + CRLF if lines[medium.last].endswith(b"\n") else CRLF + line
    own = str(control.internal.address).encode()
    known = words.known_outside(control.protocol, control.internal, control, openings)
    ours = str(known.address if known else control.external.address).encode()
    for at, line in enumerate(lines):
        found = _ORIGIN.fullmatch(line) or _CONNECTION.fullmatch(line)
        if found and found[2] == own:
            lines[at] = found[1] + ours + found[3]
        elif (rtcp := _RTCP.fullmatch(line)) and rtcp[4] == own:
            lines[at] = rtcp[1] + rtcp[2] + rtcp[3] + ours + rtcp[5]
    return b"".join(line + added.get(at, b"") for at, line in enumerate(lines))


def _media(lines: list[bytes]) -> list[_Medium]:
    session: Address | None = None
    media: list[_Medium] = []
    for at, line in enumerate(lines):
        if media and not line.startswith(b"m="):
            media[-1].last = at
        if line.startswith(b"m="):
            if not (found := _MEDIUM.fullmatch(line)):
                raise Unparsed("a medium that is not understood")
            media.append(_Medium(at, at, _number(found[2]), found[4].decode("latin-1").upper(), session))
        elif connection := _CONNECTION.fullmatch(line):
            if media:
                media[-1].host = words.address(connection[2])
            else:
                session = words.address(connection[2])
        elif media and (rtcp := _RTCP.fullmatch(line)):
            media[-1].rtcp, media[-1].rtcp_line = words.port(rtcp[2]), at
            media[-1].rtcp_host = words.address(rtcp[4]) if rtcp[4] else None
    return media


def _open(medium: _Medium, lines: list[bytes], control: Control, openings: Openings) -> int | None:
    """Asks for what the medium needs, and writes it into its lines; returns the port of RTCP if it has no line.

    RTP and RTCP are neighbours, unless packets of theirs have overtaken what is said here and were given other ports:
    a=rtcp tells it then (RFC 3605).
    """
    carries_rtp = "RTP/" in medium.protocol
    if medium.protocol.startswith("TCP/") or not (carries_rtp or medium.protocol.startswith(("UDP", "DTLS/"))):
        return None  # it stays as it is, and keeps no other from being heard
    if medium.rtcp_host not in {None, medium.host}:
        raise Unparsed("RTCP is another host's")
    remote, host = control.remote.address, control.internal.address
    rtp = words.own(control, host, medium.port)
    next_to_it = medium.rtcp in {None, medium.port + 1}
    pair = carries_rtp and medium.port % 2 == 0 and next_to_it
    try:
        opened = openings.open("udp", rtp, remote=remote, lasts_s=_MEDIA_S, pair=pair)
    except Refused:
        if not pair:
            raise
        pair = False
        opened = openings.open("udp", rtp, remote=remote, lasts_s=_MEDIA_S)
        medium.rtcp = medium.port + 1
    _put_port(_MEDIUM, lines, medium.line, opened.port)
    if medium.rtcp is None:
        return None
    if medium.rtcp == medium.port:
        rtcp = opened.port
    elif pair:
        rtcp = opened.port + 1
    else:
        rtcp = openings.open("udp", words.own(control, host, medium.rtcp), remote=remote, lasts_s=_MEDIA_S).port
    if medium.rtcp_line is None:
        return rtcp
    _put_port(_RTCP, lines, medium.rtcp_line, rtcp)
    return None


def _put_port(kind: re.Pattern[bytes], lines: list[bytes], at: int, port: int) -> None:
    if found := kind.fullmatch(lines[at]):
        start, end = found.span(2)
        lines[at] = lines[at][:start] + b"%d" % port + lines[at][end:]


def _number(digits: bytes) -> int:
    """A port, or the 0 of a medium that is not wanted."""
    return 0 if int(digits) == 0 else words.port(digits)
