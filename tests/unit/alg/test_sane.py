"""SANE: the port of the picture of a scanner inside."""

import struct
from typing import Any

import pytest
from carried import carry, fresh, harmless
from fakes import HOST, REMOTE, session
from hypothesis import given, settings
from hypothesis import strategies as st
from talks import Said, Talk, check, said

from xdpmasq.alg.api import Control, Endpoint, Side
from xdpmasq.alg.sane import Sane

SANE = Sane()
SERVER, CLIENT = session(6566, from_outside=True), session(6566)
START, CANCEL = struct.pack("!II", 7, 0), struct.pack("!II", 8, 0)


def reply(port: int, status: int = 0, order: int = 0x1234, resource: bytes = b"") -> bytes:
    return struct.pack("!IIII", status, port, order, len(resource)) + resource


Steps = list[tuple[Side, bytes]]
OUT, IN = Side.OUTSIDE, Side.INSIDE
OPENED: dict[str, Steps] = {
    "start": [(OUT, START), (IN, reply(32900))],
    "after other calls": [(OUT, CANCEL), (IN, b"\0\0\0\0"), (OUT, START), (IN, reply(32900))],
    "in the middle of a session": [(IN, b"\0\0\0\0"), (OUT, START), (IN, reply(32900))],
    "big-endian picture": [(OUT, START), (IN, reply(32900, order=0x4321))],
}
LEFT: dict[str, tuple[Control, Steps]] = {
    "not asked": (SERVER, [(IN, reply(32900))]),
    "another call": (SERVER, [(OUT, CANCEL), (IN, reply(32900))]),
    "a call's other bytes": (SERVER, [(OUT, CANCEL), (OUT, START), (IN, reply(32900))]),
    "more than the call": (SERVER, [(OUT, START + b"x"), (IN, reply(32900))]),
    "more of the answer": (SERVER, [(OUT, START), (IN, reply(0, status=7)), (IN, reply(32900))]),
    "failed": (SERVER, [(OUT, START), (IN, reply(32900, status=3))]),
    "a password first": (SERVER, [(OUT, START), (IN, reply(32900, resource=b"net\0"))]),
    "system port": (SERVER, [(OUT, START), (IN, reply(1023))]),
    "no such port": (SERVER, [(OUT, START), (IN, reply(0x18084))]),
    "byte order": (SERVER, [(OUT, START), (IN, reply(32900, order=1))]),
    "interrupted": (SERVER, [(OUT, START), (IN, reply(32900)[:7]), (OUT, CANCEL), (IN, reply(32900)[7:])]),
    "client inside": (CLIENT, [(IN, START), (OUT, reply(32900))]),
}


@pytest.mark.parametrize("steps", OPENED.values(), ids=OPENED)
def test_port_is_opened(steps: Steps) -> None:
    done, opened = carry(SANE, SERVER, *steps)
    assert done[:-1] == [text for _, text in steps[:-1]]
    assert done[-1] == steps[-1][1].replace(struct.pack("!I", 32900), struct.pack("!I", 40000))
    (hole,) = opened
    assert (hole.protocol, hole.internal, hole.remote, hole.sessions) == ("tcp", Endpoint(HOST, 32900), REMOTE, 1)


@pytest.mark.parametrize("steps", OPENED.values(), ids=OPENED)
def test_port_is_opened_in_pieces(steps: Steps) -> None:
    outside = struct.pack("!I", 40000)
    talk = [Said(side, text, text.replace(struct.pack("!I", 32900), outside)) for side, text in steps]
    check(SANE, Talk("", talk, [f"tcp 32900 at 40000 for {REMOTE}"], port=6566, from_outside=True))


@pytest.mark.parametrize(
    ("side", "memory", "data", "held"),
    [
        pytest.param(OUT, {}, START[:7], True, id="most of the call"),
        pytest.param(OUT, {}, START[:3], True, id="what may become it"),
        pytest.param(OUT, {}, b"\0\0\0\1", False, id="another call, which has no more"),
        pytest.param(OUT, {"last": OUT}, START[:7], False, id="not at a call's beginning"),
        pytest.param(IN, {"starts": True}, reply(32900)[:15], True, id="most of the reply"),
        pytest.param(IN, {"starts": True}, reply(0, status=3)[:4], False, id="no success"),
        pytest.param(IN, {}, reply(32900)[:15], False, id="nobody has asked"),
    ],
)
def test_what_is_held(side: Side, memory: dict[str, Any], data: bytes, held: bool) -> None:
    """Nothing that the other side may wait for."""
    control = fresh(SERVER)
    control.memory.update(memory)
    assert SANE.ready(data, side, control) == (0 if held else len(data))


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(("control", "steps"), LEFT.values(), ids=LEFT)
def test_nothing_is_opened(control: Control, steps: Steps) -> None:
    assert carry(SANE, control, *steps) == ([text for _, text in steps], [])


# for test_alg_fuzz.py
CONVERSATIONS = [
    Talk(name, said(*steps), port=6566, from_outside=True)
    for name, steps in {**OPENED, **{name: steps for name, (_, steps) in LEFT.items()}}.items()
]


@pytest.mark.req("attacks-alg_fuzz")
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(Side),
            st.binary(max_size=20) | st.just(START) | st.builds(reply, st.integers(0, 2**32 - 1), st.integers(0, 2)),
        ),
        max_size=5,
    )
)
def test_anything(steps: Steps) -> None:
    harmless(SANE, SERVER, *steps)
