"""FTP (RFC 959, RFC 2428): who listens for the data connection says where.

A client inside says it in PORT and EPRT, a server inside, behind a forward, in its answers to PASV and EPSV. The
pinhole is for the session's remote only, and there is one: FXP, and with it bouncing (RFC 2577), is not for us. A
passive client inside needs nothing: it opens the data connection itself. After AUTH (RFC 4217) there is nothing to
be read.
"""

from __future__ import annotations

import re
from collections import deque
from ipaddress import IPv4Address
from typing import ClassVar

from xdpmasq.alg import words
from xdpmasq.alg.api import Control, Endpoint, Openings, Refused, Side, Unparsed
from xdpmasq.alg.commands import CommandAlg

_SIX = rb"(\d{1,3}(?:,\d{1,3}){5})"
_PORT = re.compile(rb"(PORT +)" + _SIX + rb"( *\r?\n)", re.IGNORECASE)
_EPRT = re.compile(rb"(EPRT +)(([!-/:-~])1\3(" + words.DOTTED + rb")\3(\d{1,5})\3)( *\r?\n)", re.IGNORECASE)
_ASKS = re.compile(rb"(PASV|EPSV(?! +ALL)|AUTH)(?: [^\r\n]*)?\r?\n", re.IGNORECASE)
_ASKED_MOST = 64  # commands before their answers; most clients send one at a time
_REPLY = re.compile(rb"(\d{3})([ -])[^\n]*\n")
# RFC 1123 section 4.1.2.6: the text around the numbers is anybody's, brackets may be missing.
_227 = re.compile(rb"(227[ -][^\d\r\n]*)" + _SIX + rb"(?![,\d])([^\r\n]*\r?\n)")
_229 = re.compile(rb"(229[ -][^(\r\n]*\(([!-/:-~])\2\2)(\d{1,5})(\2\)[^\r\n]*\r?\n)")
_ANSWERS = {b"227": b"PASV", b"229": b"EPSV", b"234": b"AUTH"}


class Ftp(CommandAlg):
    name = "ftp"
    ports: ClassVar = {"tcp": (21,)}
    # Telnet's own (RFC 854) may stand before ABOR. What is no FTP has a colon there: every header of HTTP.
    command = re.compile(rb"[\xf0-\xff]*(?:[A-Za-z][A-Za-z0-9]{1,15}(?: [^\r\n]*)?)?\r?\n")
    binary = re.compile(rb"[\0-\x06\x0e-\x1a\x1c-\x1f]")  # a greeting may have colours and a bell

    def translate_line(self, line: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is control.client:
            asks = _ASKS.fullmatch(line)
            asked = control.memory.setdefault("asked", deque(maxlen=_ASKED_MOST))
            asked.append(asks[1].upper() if asks else None)
            return _command(line, control, openings) if side is Side.INSIDE else line
        answers = _answer_to(line, control)
        if answers == b"AUTH":
            control.memory["over"] = True
        if side is Side.INSIDE and answers == b"PASV":
            return _passive(line, control, openings)
        if side is Side.INSIDE and answers == b"EPSV":
            return _extended_passive(line, control, openings)
        return line


def _command(line: bytes, control: Control, openings: Openings) -> bytes:
    if port := _PORT.fullmatch(line):
        return port[1] + _six(_open(*_of_six(port[2]), control, openings)) + port[3]
    if eprt := _EPRT.fullmatch(line):
        opened = _open(words.address(eprt[4]), words.port(eprt[5]), control, openings)
        bar = eprt[3]
        text = bar.join((b"", b"1", str(opened.address).encode(), b"%d" % opened.port, b""))
        return eprt[1] + text + eprt[6]
    return line


def _answer_to(line: bytes, control: Control) -> bytes | None:
    """Which command of :data:`_ANSWERS` has been answered with yes.

    Lines between "123-" and "123 " are a text that may quote anything, such as the name of a file. Answers come in
    the order of the commands (RFC 959 section 5.4), but not every server answers each, and some of an earlier agent's
    time are not known: so a question is asked until it is answered with its own code, or refused when it is the next.
    """
    memory, reply = control.memory, _REPLY.fullmatch(line)
    begun = memory.get("reply")
    if begun is not None and not (reply and reply[2] == b" " and reply[1] == begun):
        return None
    if not reply:
        return None
    memory["reply"] = reply[1] if reply[2] == b"-" else None
    asked: deque[bytes | None] = memory.setdefault("asked", deque(maxlen=_ASKED_MOST))
    answered = _ANSWERS.get(reply[1])
    if answered and answered in asked:
        if reply[2] == b" ":
            while asked.popleft() != answered:
                pass
        return answered
    if reply[2] == b" " and asked and (asked[0] is None or reply[1][:1] in b"45") and reply[1][:1] != b"1":
        asked.popleft()
    return None


def _passive(line: bytes, control: Control, openings: Openings) -> bytes:
    if not (reply := _227.fullmatch(line)):
        raise Unparsed("an answer to PASV without an endpoint")
    return reply[1] + _six(_open(*_of_six(reply[2]), control, openings)) + reply[3]


def _extended_passive(line: bytes, control: Control, openings: Openings) -> bytes:
    if not (reply := _229.fullmatch(line)) or not isinstance(control.internal.address, IPv4Address):
        raise Unparsed("an answer to EPSV without a port")
    opened = _open(control.internal.address, words.port(reply[3]), control, openings)
    if opened.address != control.external.address:
        raise Refused("the client would look for it at another address")
    return reply[1] + b"%d" % opened.port + reply[4]


def _open(host: IPv4Address, number: int, control: Control, openings: Openings) -> Endpoint:
    return openings.open("tcp", words.own(control, host, number), remote=control.remote.address)


def _of_six(text: bytes) -> tuple[IPv4Address, int]:
    numbers = [int(each) for each in text.split(b",")]
    if max(numbers) > 255:
        raise Unparsed("a number above 255")
    return IPv4Address(bytes(numbers[:4])), numbers[4] << 8 | numbers[5]


def _six(endpoint: Endpoint) -> bytes:
    numbers = *endpoint.address.packed, endpoint.port >> 8, endpoint.port & 255
    return b",".join(b"%d" % each for each in numbers)
