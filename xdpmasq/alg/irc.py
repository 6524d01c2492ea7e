"""IRC (RFC 1459, RFC 2812): DCC, by which two clients connect to each other, is arranged in CTCP messages.

Who offers a file or a talk says where it listens; the peer is unknown, so the pinhole is for anybody. RESUME comes to
who offered, ACCEPT goes back from there, and both name the port of the offer. With port 0 and a token (reverse DCC)
it is the other who is to listen, and answers with an offer like any other.

A server inside opens nothing: it tells what others have said.
"""

from __future__ import annotations

import re
from ipaddress import IPv4Address
from typing import ClassVar

from xdpmasq.alg import words
from xdpmasq.alg.api import Control, Endpoint, Openings, Side, Unparsed
from xdpmasq.alg.commands import CommandAlg

_FILE = rb'(?:"[^"\0\x01\r\n]*"|[^"\0\x01\r\n ][^\0\x01\r\n ]*)'
_TO = rb"(?:@[^ \0\r\n]+ +)?(?::[^ \0\r\n]+ +)?(?:PRIVMSG|NOTICE) +[^ :\0\r\n][^ \0\r\n]* +:?\x01DCC +"
_END = rb"(?: [^\0\x01\r\n]*)?\x01?\r?\n"
_OFFER = re.compile(
    rb"(" + _TO + rb"(?:SEND|TSEND|SSEND|CHAT|SCHAT) +" + _FILE + rb" +)(\d{1,10})( +)(\d{1,5})(" + _END + rb")",
    re.IGNORECASE,
)
_RESUME = re.compile(rb"(" + _TO + rb"(RESUME|ACCEPT) +" + _FILE + rb" +)(\d{1,5})(" + _END + rb")", re.IGNORECASE)


class Irc(CommandAlg):
    name = "irc"
    ports: ClassVar = {"tcp": (6667,)}
    pinholes = 8
    # Only NUL is forbidden, but of the control characters text has those of CTCP, mIRC's colours, and bells.
    command = re.compile(rb"(?:(?:@[^ \r\n]+ +)?(?::[^ \r\n]+ +)?(?:[A-Za-z]+|\d{3})(?: [^\r\n]*)?)?\r?\n")
    binary = re.compile(rb"[\0\x05\x06\x08\x0b\x0c\x0e\x10\x12-\x15\x17-\x1a\x1c]")

    def translate_line(self, line: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if control.from_outside:
            return line
        if side is Side.INSIDE and (offer := _OFFER.fullmatch(line)):
            return _offer(offer, control, openings)
        if resume := _RESUME.fullmatch(line):
            if side is Side.INSIDE and resume[2].upper() == b"ACCEPT":
                return _with_port(resume, _offered_as(resume[3], control, openings))
            if side is Side.OUTSIDE and resume[2].upper() == b"RESUME":
                return _with_port(resume, _offered(resume[3], control, openings))
        return line


def _offer(offer: re.Match[bytes], control: Control, openings: Openings) -> bytes:
    before, host, space, number, after = offer.groups()
    if int(number) == 0:
        return offer[0]
    if int(host) > 0xFFFFFFFF:
        raise Unparsed("no address")
    internal = words.own(control, IPv4Address(int(host)), words.port(number))
    opened = openings.open("tcp", internal, remote=None, lasts_s=300)  # a person is asked
    offers = _offers(control)
    offers[internal.port] = opened.port
    if len(offers) > Irc.pinholes:
        del offers[next(iter(offers))]
    return before + b"%d" % int(opened.address) + space + b"%d" % opened.port + after


def _offered_as(number: bytes, control: Control, openings: Openings) -> int | None:
    """The external port of an internal one; memory knows it still when the pinhole has served."""
    if int(number) < 1024:
        return None
    internal = Endpoint(control.internal.address, words.port(number))
    if known := openings.external("tcp", internal):
        return known.port
    return _offers(control).get(internal.port)


def _offered(number: bytes, control: Control, openings: Openings) -> int | None:
    """The internal port of an external one."""
    if int(number) == 0:
        return None
    external = Endpoint(control.external.address, words.port(number))
    if known := openings.internal("tcp", external):
        return known.port
    return next((old for old, new in _offers(control).items() if new == external.port), None)


def _offers(control: Control) -> dict[int, int]:
    """Internal to external ports."""
    offers: dict[int, int] = control.memory.setdefault("offers", {})
    return offers


def _with_port(resume: re.Match[bytes], number: int | None) -> bytes:
    return resume[0] if number is None else resume[1] + b"%d" % number + resume[4]
