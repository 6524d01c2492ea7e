"""Every ALG is told nonsense, most of it near to the truth, and does no harm.

Talks are the CONVERSATIONS of the module test_<name of the ALG>, spoilt; ``mended`` of that module puts lengths right
that the rest of a message would else not be read for. XDPMASQ_ALG_INPUTS says how many are told to each.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from fakes import GATEWAY, HOST, REMOTE, FakeOpenings, session
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from talks import Line, Talk, bytewise, whole

from xdpmasq.alg.api import Address, Alg, Endpoint, Side
from xdpmasq.alg.registry import by_name

INPUTS = int(os.environ.get("XDPMASQ_ALG_INPUTS", "10000"))
AT_ONCE = 100  # inputs of one of hypothesis's examples, which cost more than they do
NUMBER = re.compile(rb"(?:\s*:\s*)?\d+")  # a port goes with what stands around its colon
TEXT = {"ftp", "irc", "rtsp", "sip"}  # of these, only numbers are changed, and the last says where RTCP is
Mended = Callable[[bytes], bytes]
RTCP = re.compile(rb"\r\na=rtcp|a=rtcp\r\n")

NUMBERS = [
    *(b"0", b"1", b"21", b"255", b"256", b"1023", b"1024", b"5005", b"65535", b"65536", b"4294967296", b"-1", b""),
    *(b"0" * 39 + b"9", b"9" * 40, b"0x50", b"1e3", b"\xd9\xa3", b"192.168.1.10", b"192.168.1.11", b"203.0.113.1"),
]
PIECES = [
    *(b"\0", b"\r", b"\n", b"\r\n", b"\r\n\r\n", b" ", b"\t", b",", b";", b":", b"<", b">", b'"', b"\\", b"|", b"("),
    *(b"\x01", b"\x16\x03\x01", b"\xff\xf4", b"$\0\0\x04", b"227 ", b"PORT ", b"\x01DCC SEND "),
    *(b"m=audio 5004 RTP/AVP 0\r\n", b"Content-Length: 5\r\n", b"\r\n ", b"\x80\xff", b"\xf0\x9f\x98\x80"),
]
WORDS = [each.packed for each in (HOST, GATEWAY, REMOTE)] + [
    number.to_bytes(2, "big") for number in (0, 1, 255, 1023, 1024, 5000, 32768, 40000, 65535)
]


class Strict(FakeOpenings):
    """An ALG must not even ask for what it would be refused, nor for strangers to come."""

    def open(self, protocol: str, internal: Endpoint, *, remote: Address | None, **other: Any) -> Endpoint:
        assert internal.address == self.control.internal.address, f"asked for another's endpoint: {internal}"
        assert internal.port >= 1024 or protocol == "gre", f"asked for port {internal.port}"
        assert remote in {None, self.control.remote.address}, f"asked for a stranger: {remote}"
        return super().open(protocol, internal, remote=remote, **other)


def without_numbers(text: bytes) -> bytes:
    """And without lines that say where RTCP is, also such that stand where somebody cut another one."""
    text, former = NUMBER.sub(b"", text), b""
    while text != former:
        text, former = RTCP.sub(b"", text), text
    return text


def spoilt(data: bytes, chance: random.Random) -> bytes:
    """Changed in one to three places."""
    for _ in range(chance.randint(1, 3)):
        at = chance.randint(0, len(data))
        to = min(len(data), at + chance.choice((1, 1, 2, 8, 40)))
        match chance.randrange(10):
            case 0:
                data = data[:at] + data[to:]
            case 1:
                data = data[:at] + chance.choice(PIECES) + data[at:]
            case 2:
                data = data[:at] + chance.randbytes(to - at) + data[to:]
            case 3:
                data = data[:to] + data[at:]
            case 4:
                data = data[:at]
            case 5:
                data = data[:at] + data[at:to].swapcase() + data[to:]
            case 6:
                data = data + data
            case 7:
                piece = chance.choice(WORDS)
                data = data[:at] + piece + data[at + len(piece) :]
            case _:
                numbers = list(re.finditer(rb"\d+(?:\.\d+){3}|\d+", data))
                if numbers:
                    start, end = chance.choice(numbers).span()
                    data = data[:start] + chance.choice(NUMBERS) + data[end:]
    return data


def noise(chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        return chance.randbytes(chance.choice((0, 1, 5, 60, 300)))
    return b"".join(chance.choice(PIECES + NUMBERS) for _ in range(chance.randint(1, 20)))


def spoilt_talk(talk: Talk, mended: Mended, chance: random.Random) -> list[tuple[Side, bytes]]:
    said = [(each.side, each.given) for each in talk.said if len(each.given) < 1000]  # long ones take long
    for at in range(len(said)):
        if chance.random() < 0.7:
            side, data = said[at]
            data = noise(chance) if chance.random() < 0.1 else spoilt(data, chance)
            said[at] = side, mended(data) if chance.random() < 0.5 else data
    if said and chance.random() < 0.1:
        said.append(chance.choice(said))
    return said


def cut_by(chance: random.Random) -> Any:
    """Every byte on its own now and then, as this takes its time; else, in a few places."""
    if chance.random() < 0.01:
        return bytewise
    seed = chance.random()

    def cut(data: bytes) -> Iterable[bytes]:
        where = random.Random(seed)
        places = sorted({0, len(data), *(where.randint(0, len(data)) for _ in range(3))})
        return [data[at:to] for at, to in itertools.pairwise(places)]

    return cut


def heard(
    alg: Alg, talk: Talk, said: list[tuple[Side, bytes]], cut: Any, *, restart: int, limit: int
) -> tuple[dict[Side, bytes], list[Any]]:
    """All that each side hears, with what is held to the end, and the pinholes."""
    control = talk.session()
    openings = Strict(control, limit)
    line = Line(alg, control, openings)
    all_heard = {Side.INSIDE: b"", Side.OUTSIDE: b""}
    for at, (side, data) in enumerate(said):
        if at == restart:
            control.memory.clear()
        all_heard[side] += line.say(side, data, cut)
    return {side: all_heard[side] + line.held[side] for side in Side}, openings.opened


def one_input(alg: Alg, talk: Talk, mended: Mended, chance: random.Random) -> None:
    talk = dataclasses.replace(talk, protocol=chance.choice((talk.protocol, *alg.ports)))
    said = spoilt_talk(talk, mended, chance)
    times = {"restart": chance.randint(0, 3 * len(said)), "limit": chance.choice((alg.pinholes, alg.pinholes, 1, 0))}
    at_once = heard(alg, talk, said, whole, **times)
    if talk.protocol == "tcp":
        in_pieces = heard(alg, talk, said, cut_by(chance), **times)
        assert in_pieces == at_once
    if alg.name in TEXT:
        for side in Side:
            given = b"".join(data for by, data in said if by is side)
            assert without_numbers(at_once[0][side]) == without_numbers(given)


@pytest.mark.req("attacks-alg_fuzz")
@pytest.mark.parametrize("name", sorted(by_name()))
def test_no_wrong_pinhole_no_wrong_byte_no_crash(name: str) -> None:
    alg = by_name()[name]
    its_tests = importlib.import_module(f"test_{name}")
    talks: list[Talk] = its_tests.CONVERSATIONS
    mended: Mended = getattr(its_tests, "mended", bytes)
    told = 0

    @settings(
        max_examples=-(-INPUTS // AT_ONCE),
        derandomize=INPUTS <= 10000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.integers(0, 2**64 - 1))
    def tell(seed: int) -> None:
        nonlocal told
        chance = random.Random(seed)
        for _ in range(AT_ONCE):
            one_input(alg, chance.choice(talks), mended, chance)
        told += AT_ONCE

    tell()
    assert told >= INPUTS


@pytest.mark.parametrize("name", sorted(by_name()))
def test_nothing_is_nothing(name: str) -> None:
    alg = by_name()[name]
    for side in Side:
        assert alg.ready(b"", side, session(21)) == 0
