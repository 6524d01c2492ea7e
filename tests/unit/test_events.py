"""Reading the ring of events: each once, in order, and what was missed is known."""

import json
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdpmasq.errors import DatapathError
from xdpmasq.events import (
    CLOSED,
    EVICTED,
    EXPIRED,
    FORCED,
    FROM_OUTSIDE,
    HEADING,
    HERE_S,
    OPENED,
    REFUSED,
    VOID,
    Watcher,
    json_lines,
    lines,
)
from xdpmasq.selection import Selection

ADDR = [("word", "u4", (1,))]
KEY = [("addr", ADDR), ("port", "u2"), ("class", "u1"), ("wan", "u1")]
TRAFFIC = [("packets", "u8"), ("bytes", "u8")]
EVENT = np.dtype(
    [
        *(("number", "u8"), ("remote", ADDR), ("external", ADDR), ("remote_port", "u2"), ("external_port", "u2")),
        *(("opened_at", "u4"), ("internal", KEY), ("sent", TRAFFIC), ("received", TRAFFIC), ("at", "u4")),
        *(("reason", "u4"), ("kind", "u1"), ("tcp_seen", "u1", (2,)), ("marks", "u1"), ("pad", "u4")),
    ]
)
WATCH = np.dtype([("next", "u8"), ("until", "u4"), ("pad", "u4")])
ROOM, HZ, NOW = 64, 100, 2**32 - 50
TCP, UDP, ICMP = range(3)
FIN, RST = 1, 4


class Ring:
    """The kernel's part, and what stands for ``datapath.Attached``."""

    def __init__(self) -> None:
        self.events, self.watch = np.zeros(ROOM, EVENT), np.zeros(1, WATCH)
        self.attached: Any = SimpleNamespace(
            maps={"events": self._map(self.events), "watch": self._map(self.watch)},
            hz=HZ, now=lambda: NOW, counter_names=["fast_outbound", "drop_host_limit"],
        )  # fmt: skip

    def _map(self, array: Any) -> Any:
        return SimpleNamespace(view=lambda writable=True: array, id=7)

    def begin(self) -> Any:
        """A place, not yet whole."""
        row = self.events[int(self.watch["next"][0]) % ROOM]
        self.watch["next"] += 1
        return row

    def put(self, kind: int = OPENED, class_: int = UDP, *, port: int = 0, **fields: Any) -> None:
        row = self.begin()
        number = int(self.watch["next"][0])
        row["internal"]["class"], row["internal"]["port"] = class_, int.from_bytes(port.to_bytes(2, "big"), "little")
        row["kind"], row["at"], row["opened_at"] = kind, NOW, (NOW - 1234) % 2**32
        for name, value in fields.items():
            row[name] = value
        row["number"] = number


@pytest.fixture
def ring() -> Ring:
    return Ring()


def ports(watcher: Watcher) -> list[int]:
    rows = watcher.read().rows
    return watcher.story(rows, Selection()).table.internal.port.tolist()


def test_each_once_by_each_watcher(ring: Ring) -> None:
    ring.put(port=1)
    early = Watcher(ring.attached)
    ring.put(port=2)
    late = Watcher(ring.attached)
    ring.put(port=3)
    assert (ports(early), ports(late)) == ([2, 3], [3])
    assert (ports(early), ports(late)) == ([], [])


def test_the_unfinished_is_waited_for(ring: Ring) -> None:
    watcher = Watcher(ring.attached)
    ring.put(port=1)
    row = ring.begin()
    ring.put(port=3)
    assert ports(watcher) == [1]
    assert ports(watcher) == []
    row["kind"], row["number"] = OPENED, 2
    assert ports(watcher) == [0, 3]


def test_a_reader_that_is_slower_than_the_ring(ring: Ring) -> None:
    watcher = Watcher(ring.attached)
    for port in range(ROOM + 10):
        ring.put(port=port)
    batch = watcher.read()
    assert (len(batch.rows), batch.lost) == (ROOM, 10)
    ring.put(VOID)
    ring.put(port=99)
    batch = watcher.read()
    assert (len(batch.rows), batch.lost) == (1, 1)


def test_what_is_written_over_while_it_is_read(ring: Ring) -> None:
    watcher = Watcher(ring.attached)
    for port in range(ROOM):
        ring.put(port=port)
    watcher._watch = Moving(ring.watch, ROOM, ROOM + 3)  # type: ignore[assignment]
    batch = watcher.read()
    assert (len(batch.rows), batch.lost) == (ROOM - 3, 3)


class Moving:
    """The word of the watchers, with more events begun at each look at it."""

    def __init__(self, watch: Any, *heads: int) -> None:
        self._watch, self._heads = watch, iter(heads)

    def __getitem__(self, name: str) -> Any:
        return [next(self._heads)] if name == "next" else self._watch[name]


def test_it_says_that_it_is_there(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    watcher = Watcher(ring.attached)
    assert int(ring.watch["until"][0]) == (NOW + HERE_S * HZ) % 2**32
    ring.watch["until"] = 0
    now += HERE_S
    assert watcher.read().deaf_s == 0
    assert int(ring.watch["until"][0]) == (NOW + HERE_S * HZ) % 2**32
    now += HERE_S + 5  # stopped, say
    assert watcher.read().deaf_s == 5


def test_a_datapath_without_events() -> None:
    with pytest.raises(DatapathError, match="no events to watch"):
        Watcher(SimpleNamespace(maps={}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "class_", "fields", "why"),
    [
        pytest.param(OPENED, UDP, {}, "internal", id="opened from inside"),
        pytest.param(OPENED, TCP, {"marks": FROM_OUTSIDE | 2}, "remote", id="opened from outside"),
        pytest.param(CLOSED, TCP, {"reason": EXPIRED}, "idle", id="TCP idle"),
        pytest.param(CLOSED, TCP, {"tcp_seen": (FIN, FIN)}, "fin", id="FIN both ways"),
        pytest.param(CLOSED, TCP, {"tcp_seen": (FIN, 0)}, "idle", id="FIN one way"),
        pytest.param(CLOSED, TCP, {"tcp_seen": (FIN, FIN | RST)}, "rst", id="RST"),
        pytest.param(CLOSED, UDP, {"tcp_seen": (RST, 0)}, "idle", id="UDP"),
        pytest.param(CLOSED, TCP, {"tcp_seen": (RST, 0), "reason": FORCED}, "flushed", id="flushed"),
        pytest.param(CLOSED, TCP, {"reason": EVICTED}, "evicted", id="evicted"),
        pytest.param(REFUSED, UDP, {"reason": 1}, "host_limit", id="refused"),
        pytest.param(REFUSED, UDP, {"reason": 9}, "9", id="refused by a newer version's reason"),
    ],
)
def test_why(ring: Ring, kind: int, class_: int, fields: dict[str, Any], why: str) -> None:
    watcher = Watcher(ring.attached)
    ring.put(kind, class_, **fields)
    told = watcher.story(watcher.read().rows, Selection())
    assert told.why == [why]
    assert json.loads(next(json_lines(told)))["why"] == why
    assert f" {why}" in next(lines(told))


def test_lines(ring: Ring) -> None:
    watcher = Watcher(ring.attached)
    ring.put(CLOSED, sent=(3, 300), received=(2, 200), port=5000)
    ring.put(REFUSED, reason=1)
    told = watcher.story(watcher.read().rows, Selection())
    closed, refused = lines(told)
    assert closed[9:].split() == [
        *("closed", "udp", "0.0.0.0:5000", "0.0.0.0:0", "0.0.0.0:0", "idle", "12.3", "3", "300", "2", "200")
    ]
    assert refused[9:].split() == ["refused", "udp", "0.0.0.0:0", "-", "0.0.0.0:0", "host_limit"]
    assert closed.index("udp") == HEADING.index("PROTO")
    assert set(map(len, [closed, HEADING])) == {len(HEADING)}
    fields = json.loads([*json_lines(told)][1])
    assert (fields["external"], set(fields)) == (
        None,
        {"time", "event", "why", "protocol", "state", "internal", "external", "remote", "out", "in", "duration_s"},
    )
    assert abs(fields["time"] - time.time()) < 5


def test_only_those_that_fit(ring: Ring) -> None:
    watcher = Watcher(ring.attached)
    ring.put(class_=TCP, port=1)
    ring.put(class_=UDP, port=2)
    told = watcher.story(watcher.read().rows, Selection.parse("udp"))
    assert told.table.internal.port.tolist() == [2]
