"""Talks between a host inside and a remote, and what an ALG makes of them.

A talk runs as it is written, and again with every byte on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import GATEWAY, HOST, FakeOpenings, Pinhole, session

from xdpmasq.alg.api import Alg, Control, Endpoint, Side, Unparsed


@dataclass(frozen=True)
class Said:
    side: Side
    given: bytes
    becomes: bytes


def inside(given: bytes, becomes: bytes | None = None) -> Said:
    """What the host says, and what the remote hears; the same without ``becomes``."""
    return Said(Side.INSIDE, given, given if becomes is None else becomes)


def outside(given: bytes, becomes: bytes | None = None) -> Said:
    return Said(Side.OUTSIDE, given, given if becomes is None else becomes)


def said(*steps: tuple[Side, bytes]) -> list[Said]:
    """What nobody says how it is to be changed."""
    return [Said(side, text, text) for side, text in steps]


@dataclass(frozen=True)
class Talk:
    """``opens``: the pinholes, as :func:`told` tells them; ``mapped``: UDP ports that are mapped already."""

    id: str
    said: list[Said]
    opens: list[str] = field(default_factory=list)
    port: int = 0
    protocol: str = "tcp"
    from_outside: bool = False
    internal_port: int | None = None
    mapped: dict[int, int] = field(default_factory=dict)

    def session(self) -> Control:
        return session(self.port, self.protocol, from_outside=self.from_outside, internal_port=self.internal_port)


def told(pinhole: Pinhole) -> str:
    """For example ``udp 5004+5005 at 40000+40001 for 198.51.100.7``."""

    def ports(first: int) -> str:
        return f"{first}+{first + 1}" if pinhole.pair else str(first)

    outside = ports(pinhole.external.port)
    return f"{pinhole.protocol} {ports(pinhole.internal.port)} at {outside} for {pinhole.remote or 'anybody'}"


def whole(data: bytes) -> Iterable[bytes]:
    return [data] if data else []


def bytewise(data: bytes) -> Iterator[bytes]:
    return (data[at : at + 1] for at in range(len(data)))


class Line:
    """The agent's part: holds what is not ready, by side."""

    def __init__(self, alg: Alg, control: Control, openings: FakeOpenings) -> None:
        self.alg, self.control, self.openings = alg, control, openings
        self.held = {Side.INSIDE: b"", Side.OUTSIDE: b""}

    def say(self, side: Side, data: bytes, cut: Callable[[bytes], Iterable[bytes]] = whole) -> bytes:
        """What goes on of it, and of what was held before."""
        if self.control.protocol == "udp":
            return self._translated(data, side)
        heard = b""
        for piece in cut(data):
            held = self.held[side] + piece
            ready = len(held) if self.control.memory.get("over") else self.alg.ready(held, side, self.control)
            assert 0 <= ready <= len(held)
            heard += self._translated(held[:ready], side) if ready else b""
            self.held[side] = held[ready:]
            if self.control.memory.get("over"):
                heard += self.held[side]
                self.held[side] = b""
            assert len(self.held[side]) <= self.alg.longest
        return heard

    def _translated(self, data: bytes, side: Side) -> bytes:
        before = self.openings.asked, self.openings.looked_up
        try:
            new = self.alg.translate(data, side, self.control, self.openings)
        except Unparsed:
            return data
        if (self.openings.asked, self.openings.looked_up) == before:
            assert new == data or self._names_an_address(data), "changed, though nothing was asked for"
        return new

    def _names_an_address(self, data: bytes) -> bool:
        """Which an ALG knows how to replace without asking."""
        known = (self.control.internal.address, self.control.external.address)
        return any(address.packed in data or str(address).encode() in data for address in known)


def cases(talks: Iterable[Talk]) -> list[Any]:
    """To parametrize with. After a browser's request nothing may be read: that is what slipstreaming begins with."""
    slipstream = pytest.mark.req("attacks-slipstream")
    return [pytest.param(talk, id=talk.id, marks=[slipstream] if "browser" in talk.id else []) for talk in talks]


def check(alg: Alg, talk: Talk) -> None:
    """Raises AssertionError: something is heard that should not be, or other pinholes are opened."""
    for cut in (whole, bytewise):
        control = talk.session()
        openings = FakeOpenings(control, alg.pinholes)
        for internal, external in talk.mapped.items():
            openings.mappings["udp", Endpoint(HOST, internal)] = Endpoint(GATEWAY, external)
        line = Line(alg, control, openings)
        heard = {Side.INSIDE: b"", Side.OUTSIDE: b""}
        for said in talk.said:
            heard[said.side] += line.say(said.side, said.given, cut)
        for side in Side:
            assert heard[side] + line.held[side] == b"".join(each.becomes for each in talk.said if each.side is side)
        assert [told(pinhole) for pinhole in openings.opened] == talk.opens
