"""What the agent lets an ALG do: whatever that is, the message goes on, and it is counted.

What becomes of packets is looked at in the lab (tests/netns/test_alg_programs.py).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakes import session
from scapy.layers.inet import IP, TCP

from xdpmasq.alg import packets
from xdpmasq.alg.api import Alg, Endpoint, Refused, Side, Unparsed
from xdpmasq.alg.openings import SessionsOpenings
from xdpmasq.alg.packets import Packet
from xdpmasq.alg.service import LATE_MOST, LONG_S, PAUSE_S, Service, _Session
from xdpmasq.alg.stream import Shifts, Step
from xdpmasq.alg.timelimit import TimeLimit, schedstat, waited_s


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
    return _Session(Given(), session(21), SimpleNamespace(), 0)  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    "failure",
    [
        (failing(KeyError("x")), "the ALG given failed: KeyError('x'); the message has passed unchanged"),
        (forever, "the ALG given took longer than 10 ms; the message has passed unchanged"),
    ],
    ids=["raises", "late"],
)
def test_its_failure_is_told_once(
    service: Service, asked: _Session, caplog: Any, monkeypatch: Any, failure: tuple[Callable[[], Any], str]
) -> None:
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", 0.01)
    does, why = failure
    asked.alg.does = does  # type: ignore[attr-defined]
    for _ in range(LATE_MOST - 1):
        asked.control.memory.clear()
        assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert [each.getMessage() for each in caplog.records] == [why]


LENGTHS = {"negative": -1, "too-long": 5, "float": 1.0, "none": None}


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
def test_nothing_is_held_for_a_length_that_is_none(service: Service, asked: _Session, length: Any) -> None:
    asked.alg.does = lambda: length  # type: ignore[attr-defined]
    assert service._ready(asked, Side.INSIDE, b"said") == 4
    assert service.report["given"] == {"failed": 1}


def test_one_that_is_always_late_pauses(service: Service, asked: _Session, monkeypatch: Any) -> None:
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", 0.01)
    asked.alg.does = forever  # type: ignore[attr-defined]
    for _ in range(LATE_MOST + 3):
        asked.control.memory.clear()  # another session
        assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert service.report["given"]["late"] == LATE_MOST
    assert service.report["given"]["unasked"] == 3
    asked.alg.does = lambda: b"edited"  # type: ignore[attr-defined]
    asked.control.memory.clear()
    now = time.monotonic()
    monkeypatch.setattr("xdpmasq.alg.service.time.monotonic", lambda: now + PAUSE_S)
    assert service._edited(asked, Side.INSIDE, b"said") == b"edited"


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_late_message_ends_the_reading_of_its_own_session_only(
    service: Service, asked: _Session, monkeypatch: Any, protocol: str
) -> None:
    """Whoever can say what takes long switches nothing off for others, and says it once."""
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", 0.01)
    monkeypatch.setattr(service, "_write", lambda _: None)
    if protocol == "tcp":
        service._begin(asked)
    asked.alg.does = forever  # type: ignore[attr-defined]
    for _ in range(LATE_MOST):
        assert service._ready(asked, Side.INSIDE, b"said") == 4
    service._end_when_over(asked)
    assert asked.over, "the kernel is told"
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", LONG_S)
    other = _Session(asked.alg, session(21), SimpleNamespace(), 0)  # type: ignore[arg-type]
    asked.alg.does = lambda: b"edited"  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert service._edited(other, Side.INSIDE, b"said") == b"edited"
    assert service.report["given"] == {"late": 1, "messages": 1, "edited": 1}


def test_one_that_is_late_at_times_is_asked_on(service: Service, asked: _Session, monkeypatch: Any) -> None:
    monkeypatch.setattr("xdpmasq.alg.service.LONG_S", 0.01)
    for _ in range(LATE_MOST):
        asked.control.memory.clear()
        asked.alg.does = forever  # type: ignore[attr-defined]
        assert service._edited(asked, Side.INSIDE, b"said") == b"said"
        asked.control.memory.clear()
        asked.alg.does = lambda: b"edited"  # type: ignore[attr-defined]
        assert service._edited(asked, Side.INSIDE, b"said") == b"edited"


def test_a_busy_machine_makes_nobody_late(service: Service, asked: _Session, monkeypatch: Any) -> None:
    """All the time that it takes others have the CPU."""

    def all_of_it() -> bytes:
        return b"0 %d" % time.monotonic_ns()

    monkeypatch.setattr("xdpmasq.alg.timelimit.schedstat", all_of_it)

    def takes_long() -> bytes:
        time.sleep(2 * LONG_S)
        return b"edited"

    asked.alg.does = takes_long  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"edited"


def test_a_limit_ends_where_its_time_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Late at the very end: nothing is raised there, where the timer would be left running."""
    limit, really = TimeLimit(0.05, spared=""), signal.setitimer

    def setitimer(kind: int, *seconds: float) -> None:
        if seconds == (0,):
            time.sleep(0.06)  # the timer has its time before it is stopped
        really(kind, *seconds)

    monkeypatch.setattr(signal, "setitimer", setitimer)
    with limit:
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    time.sleep(0.1)


def test_a_thread_waits_for_a_cpu() -> None:
    """What the kernel tells grows while another thread of this CPU runs."""
    command = [sys.executable, "-c", "while True: pass"]
    here = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(here)})
    other = subprocess.Popen(command)
    try:
        before, until = waited_s(schedstat()), time.monotonic() + 10
        while waited_s(schedstat()) - before < 0.01 and time.monotonic() < until:
            pass
        assert waited_s(schedstat()) - before >= 0.01
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, here)


def test_a_pinhole_is_opened_to_the_end(service: Service, asked: _Session) -> None:
    """However long that takes; the ALG's own time goes on then."""
    slow: Any = SimpleNamespace(
        count=lambda _: 0, ports=lambda _: time.sleep(1.5 * LONG_S) or SimpleNamespace(mapped=lambda _: None)
    )
    control = asked.control
    openings = SessionsOpenings(slow, None, b"", 0, control, 1, "given")  # type: ignore[arg-type]

    def opens() -> bytes:
        assert openings.external("tcp", control.internal) is None
        return b"edited"

    asked.alg.does = opens  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"edited"
    asked.alg.does = lambda: opens() and forever()  # type: ignore[attr-defined]
    assert service._edited(asked, Side.INSIDE, b"said") == b"said"
    assert service.report["given"] == {"messages": 2, "edited": 1, "late": 1}


# --- connections


def segment(source: Endpoint, destination: Endpoint, text: bytes = b"", **fields: int) -> Packet:
    ip = IP(src=str(source.address), dst=str(destination.address))
    made = packets.parse(bytes(ip / TCP(sport=source.port, dport=destination.port, **fields) / text))
    assert made
    return made


def test_another_answer_does_not_begin_anew(service: Service, asked: _Session) -> None:
    """What is not its protocol an ALG reads no more of, whatever the server does then."""
    asked.alg.does = lambda: 0  # type: ignore[attr-defined]
    service._begin(asked)
    inside, outside = asked.control.internal, asked.control.remote
    for direction, packet in (
        (0, segment(inside, outside, flags=packets.SYN, seq=100)),
        (1, segment(outside, inside, flags=packets.SYN | packets.ACK, seq=500, ack=101)),
    ):
        service._segment(asked, direction, packet)
    assert asked.begun == [100, 500]
    asked.control.memory["over"] = True
    service._segment(asked, 1, segment(outside, inside, flags=packets.SYN | packets.ACK, seq=9000, ack=101))
    assert asked.control.memory["over"]


TAKEN = {"nothing": 0, "a part": 7, "all": 10}


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
def test_text_in_a_syn(service: Service, asked: _Session, taken: int) -> None:
    """It goes on as it is; of it an ALG reads what the other side has taken, and in what follows the rest."""
    read: list[bytes] = []

    def edited(data: bytes, *_: Any) -> bytes:
        read.append(data)
        return data.upper() + b"!"

    asked.alg.translate = edited  # type: ignore[method-assign]
    asked.alg.ready = lambda data, *_: len(data)  # type: ignore[method-assign]
    service._write = lambda _: None  # type: ignore[method-assign]
    service._begin(asked)
    inside, outside, text = asked.control.internal, asked.control.remote, b"user a\nprt"
    for packet in (
        segment(inside, outside, text, flags=packets.SYN, seq=100),
        segment(inside, outside, flags=packets.SYN, seq=100),  # again
    ):
        ((_, made),) = service._segment(asked, 0, packet)
        assert packets.parse(made).text == packet.text  # type: ignore[union-attr]
    answer = segment(outside, inside, flags=packets.SYN | packets.ACK, seq=500, ack=101 + taken)
    service._segment(asked, 1, answer)
    assert read == ([text[:taken]] if taken else [])
    assert service.report.get("given", {}).get("unparsed", 0) == bool(taken)
    rest = segment(inside, outside, text[taken:] + b" 1\n", flags=packets.ACK, seq=101 + taken, ack=501)
    ((_, made),) = service._segment(asked, 0, rest)
    found = packets.parse(made)
    assert found
    assert (found.sequence, found.text) == (101 + taken, rest.text.upper() + b"!")
    assert b"".join(read) == text + b" 1\n"


def test_an_answer_to_more_than_was_sent_begins_nothing(service: Service, asked: _Session) -> None:
    service._begin(asked)
    inside, outside = asked.control.internal, asked.control.remote
    service._segment(asked, 0, segment(inside, outside, b"text", flags=packets.SYN, seq=100))
    for ack in (100, 106):
        answer = segment(outside, inside, flags=packets.SYN | packets.ACK, seq=500, ack=ack)
        service._segment(asked, 1, answer)
        assert not asked.begun


def test_what_has_gone_in_a_syn_opens_nothing(service: Service, asked: _Session) -> None:
    """Its port would be another's, of whom nobody was told."""
    asked.alg.translate = lambda data, side, control, openings: openings.open("tcp", control.internal)  # type: ignore[method-assign]
    service._gone(asked, Side.INSIDE, b"PORT 1\n")
    assert service.report == {"given": {"messages": 1, "refused": 1}}


def test_what_is_held_goes_on_when_nothing_is_read_any_more(service: Service, asked: _Session) -> None:
    """Its sender may wait for an answer to it."""
    service._begin(asked)
    asked.streams[0].begin(99)
    asked.over = True  # the kernel's table is not here

    def ends() -> bytes:
        asked.control.memory["over"] = True
        return b"GET\n"

    asked.alg.ready = lambda *_: 4  # type: ignore[method-assign]
    asked.alg.does = ends  # type: ignore[attr-defined]
    inside, outside = asked.control.internal, asked.control.remote
    made = service._segment(asked, 0, segment(inside, outside, b"GET\nHo", flags=packets.ACK, seq=100, ack=1))
    assert [(direction, packet[40:]) for direction, packet in made] == [(0, b"GET\n"), (0, b"Ho")]


def table(records: dict[int, tuple[int, int]]) -> Any:
    """Of control sessions: what the outside has acknowledged of each, and when it was opened."""
    keys = np.array([*records], np.uint8)
    values = np.zeros(len(records), [("opened_at", np.uint32), ("acked", np.uint32, 2)])
    values["opened_at"], values["acked"][:, 0] = np.array([*records.values()]).T
    return SimpleNamespace(max_entries=9, items=lambda chunk: [(keys, values)])


@pytest.mark.parametrize("over", [True, False], ids=["over", "at the next tick"])
def test_shifts_are_folded(service: Service, asked: _Session, monkeypatch: Any, over: bool) -> None:
    """The other side has acknowledged all that was edited."""
    written: list[_Session] = []
    monkeypatch.setattr(service, "_write", written.append)
    service._begin(asked, [Shifts(0, [Step(90, 100, 3)]), Shifts()])
    if over:
        asked.control.memory["over"] = True
        asked.acked[0] = 99
        service._end_when_over(asked)
        assert not asked.over
        asked.acked[0] = 103
        service._end_when_over(asked)
        assert asked.over
    else:
        followed: list[int] = []
        asked.openings = SimpleNamespace(owner=b"", follow_on=followed.append)  # type: ignore[assignment]
        other = _Session(asked.alg, asked.control, asked.openings, 0)
        ended = _Session(asked.alg, asked.control, asked.openings, 0)
        service._sessions |= {b"\1": asked, b"\2": other, b"\3": ended, b"\4": ended}
        service._controls = table({1: (0, 103), 2: (0, 5), 3: (7, 0)})
        monkeypatch.setattr(service, "_alg_of", lambda *_: asked.alg)
        monkeypatch.setattr("xdpmasq.alg.switches.forget", lambda _: None)
        monkeypatch.setattr("xdpmasq.alg.switches.names", lambda _: set())
        service.tick()
        service.tick()
        assert followed == [21, 21], "what another session has had read is read on, by one look for all"
        assert service._sessions == {b"\1": asked, b"\2": other}
    assert written == [asked]
    assert asked.streams[0].shifts == Shifts(3)


def test_behind_a_gap_nothing_is_read(service: Service, asked: _Session) -> None:
    """Whoever makes us miss something could choose where we begin to read again."""
    asked.alg.does = lambda: b"edited"  # type: ignore[attr-defined]
    service._begin(asked)
    asked.streams[0].begin(99)
    asked.acked[0], asked.over = 200, True  # the kernel's table is not here
    inside, outside = asked.control.internal, asked.control.remote
    ((_, made),) = service._segment(asked, 0, segment(inside, outside, b"PORT 1", flags=packets.ACK, seq=200, ack=1))
    assert made.endswith(b"PORT 1")
    assert asked.control.memory["over"]


def test_what_is_on_is_there_before_its_first_message(service: Service, monkeypatch: Any) -> None:
    asked: list[str] = []
    service._find = lambda name: asked.append(name) or Given()  # type: ignore[func-returns-value]
    monkeypatch.setattr("xdpmasq.alg.switches.forget", lambda _: None)
    monkeypatch.setattr("xdpmasq.alg.switches.names", lambda _: {"given"})
    for _ in range(2):
        service.tick()
    assert asked == ["given"]
