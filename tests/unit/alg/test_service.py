"""What the agent lets an ALG do: whatever that is, the message goes on, and it is counted.

What becomes of packets is looked at in the lab (tests/netns/test_alg_programs.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import session

from xdpmasq import pinholes
from xdpmasq.alg.api import Alg, Refused, Side, Unparsed
from xdpmasq.alg.service import LATE_MOST, LONG_S, Service, _Session


def forever() -> None:
    while True:
        pass


def failing(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


class Given(Alg):
    """Does what it is given."""

    name = "given"
    does: Callable[[], Any]

    def translate(self, *_: Any) -> bytes:
        return self.does()  # type: ignore[no-any-return]

    def ready(self, *_: Any) -> int:
        return self.does()  # type: ignore[no-any-return]


@pytest.fixture
def service() -> Service:
    tables: Any = SimpleNamespace(maps={"controls": None, "algs": None})
    return Service(tables, None, None)  # type: ignore[arg-type]


@pytest.fixture
def asked() -> _Session:
    return _Session(Given(), session(21), None, 0)  # type: ignore[arg-type]


DEEDS = {
    "raises": (failing(KeyError("x")), "failed"),
    "unparsed": (failing(Unparsed()), "unparsed"),
    "refused": (failing(Refused()), "refused"),
    "recursion": (failing(RecursionError()), "failed"),
    "memory": (failing(MemoryError()), "failed"),
    "sleeps": (lambda: time.sleep(2 * LONG_S), "late"),
    "loops": (forever, "late"),
    "none": (lambda: None, "failed"),
    "text": (lambda: "text", "failed"),
    "bytearray": (lambda: bytearray(b"text"), "failed"),
}


@pytest.mark.parametrize(("does", "counted"), DEEDS.values(), ids=DEEDS)
def test_the_message_goes_on(service: Service, asked: _Session, does: Callable[[], Any], counted: str) -> None:
    asked.alg.does = does  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert service.report["given"] == {"messages": 1, counted: 1}


LENGTHS = {"negative": -1, "too-long": 5, "float": 1.0, "none": None}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_nothing_is_held_for_a_length_that_is_none(service: Service, asked: _Session, length: Any) -> None:
    asked.alg.does = lambda: length  # type: ignore[attr-defined]
    assert service._ready(asked, Side.INSIDE, b"said") == 4
    assert service.report["given"] == {"failed": 1}


def test_one_that_is_always_late_is_asked_no_more(service: Service, asked: _Session, monkeypatch: Any) -> None:
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", 0.01)
    asked.alg.does = forever  # type: ignore[attr-defined]
    for _ in range(LATE_MOST + 3):
        assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert service.report["given"]["late"] == LATE_MOST
    assert service.report["given"]["unasked"] == 3


def test_one_that_is_late_at_times_is_asked_on(service: Service, asked: _Session, monkeypatch: Any) -> None:
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", 0.01)
    for _ in range(LATE_MOST):
        asked.alg.does = forever  # type: ignore[attr-defined]
        assert service._edited(asked, Side.INSIDE, b"said") == b"said"
        asked.alg.does = lambda: b"edited"  # type: ignore[attr-defined]
        assert service._edited(asked, Side.INSIDE, b"said") == b"edited"


def test_a_pinhole_is_opened_to_the_end(service: Service, asked: _Session) -> None:
    """However long that takes; the ALG's own time goes on then."""
    slow: Any = SimpleNamespace(ports=lambda _: time.sleep(1.5 * LONG_S) or SimpleNamespace(mapped=lambda _: None))
    control = asked.control
    openings = pinholes.SessionsOpenings(slow, None, (), 0, control, 1, "given")  # type: ignore[arg-type]

    def opens() -> bytes:
        assert openings.external("tcp", control.internal) is None
        return b"edited"

    asked.alg.does = opens  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"edited"
    asked.alg.does = lambda: opens() and forever()  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert service.report["given"] == {"messages": 2, "edited": 1, "late": 1}
