"""Messages of a start line, headers and a body (RFC 2822's form): where they end, and their parts, byte for byte.

SIP (RFC 3261 section 7) and RTSP (RFC 2326 section 4) are made of them. What is not certainly well formed is none:
where two readers could differ, one could be told something that the other is not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from xdpmasq.alg.api import Control, Unparsed

# Possessive, as all that repeats here should be: what is tried in every other way, too, takes time by the square.
_HEADER = re.compile(rb"([!-9;-~]++)([ \t]*+:[ \t]*+)((?:[^\r\n\0]|\r\n[ \t])*+)\r\n")
_KEEP_ALIVES = re.compile(rb"(?:\r\n)++")
_LENGTH = re.compile(rb"\d{1,7}\s*")
CRLF = b"\r\n"


@dataclass
class Header:
    """``name`` as it was written; ``value`` with its folds, without the CRLF at the end."""

    name: bytes
    colon: bytes
    value: bytes


@dataclass
class Message:
    start: bytes
    headers: list[Header]
    body: bytes

    def __bytes__(self) -> bytes:
        lines = b"".join(each.name + each.colon + each.value + CRLF for each in self.headers)
        return self.start + CRLF + lines + CRLF + self.body


@dataclass(frozen=True)
class Form:
    """What is a message in one protocol.

    Attributes:
        start: a whole start line, without its CRLF.
        begun: every beginning of one.
        length: names of the header that tells the body's length, in lower case.
        always: a message without it is none, where messages follow each other.
        longest: a message; what is longer is none.
    """

    start: re.Pattern[bytes]
    begun: re.Pattern[bytes]
    length: tuple[bytes, ...]
    always: bool
    longest: int

    def first(self, data: bytes) -> int | None:
        """How long the message is that ``data`` begins with; None: that is not known, or not all of it is there.

        Raises:
            Unparsed: it begins with none. This is known as early as can be, and does not depend on how much is there.
        """
        line = data.find(CRLF)
        if not (self.start.fullmatch(data, 0, line) if line >= 0 else self.begun.fullmatch(data)):
            raise Unparsed("no message begins here")
        end = data.find(CRLF + CRLF, max(line, 0))
        total = end + 4 + self._body(self.read(data[: end + 4])) if end >= 0 else len(data) + 1
        if total >= self.longest:
            raise Unparsed("too long")
        return total if total <= len(data) else None

    def ready(self, data: bytes) -> int:
        """For :meth:`Alg.ready`: whole messages, and what is none."""
        at = 0
        try:
            while at < len(data):
                if not (length := self._next(data[at:])):
                    return at
                at += length
        except Unparsed:
            return len(data)
        return at

    def split(self, data: bytes, control: Control) -> Iterator[bytes]:
        """Messages, and CRLFs between them (keep-alives, RFC 5626 section 4.4.1).

        What is no message is one piece with all that follows, and when it is given, the session's memory says that
        the session is over for its ALG: where a message begins cannot be known any more, and what looks like one may
        be the body of another protocol's.
        """
        at = 0
        while at < len(data):
            try:
                length = None if control.memory.get("over") else self._next(data[at:])
            except Unparsed:
                length = None
            if not length:
                control.memory["over"] = True
                length = len(data) - at
            yield data[at : at + length]
            at += length

    def read(self, data: bytes) -> Message:
        """A datagram, or a message that :meth:`first` has found.

        Raises:
            Unparsed: it is none.
        """
        line = data.find(CRLF)
        if line < 0 or not self.start.fullmatch(data, 0, line):
            raise Unparsed("no start line")
        headers, at = [], line + 2
        while not data.startswith(CRLF, at):
            if not (found := _HEADER.match(data, at)):
                raise Unparsed("no header")
            headers.append(Header(*found.groups()))
            at = found.end()
        return Message(data[:line], headers, data[at + 2 :])

    def content_length(self, message: Message) -> Header | None:
        """The header.

        Raises:
            Unparsed: there are several, or it holds no number.
        """
        found = [each for each in message.headers if each.name.lower() in self.length]
        if not found:
            return None
        if len(found) > 1 or not _LENGTH.fullmatch(found[0].value):
            raise Unparsed("the length of the body is not certain")
        return found[0]

    def _next(self, data: bytes) -> int | None:
        """Of a message or CRLFs."""
        if alive := _KEEP_ALIVES.match(data):
            return alive.end()
        return None if data == b"\r" else self.first(data)

    def _body(self, message: Message) -> int:
        header = self.content_length(message)
        if header is None and self.always:
            raise Unparsed("the length of the body is not known")
        return int(header.value) if header else 0
