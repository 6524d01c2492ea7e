"""What those who watch are told: sessions opened, closed and refused, and why; nothing unless somebody watches."""

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    OTHER_SERVER,
    RST,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    next_tick,
    tcp,
    udp,
)

from xdpmasq import bpf
from xdpmasq.abi import REAP_EXPIRED, REAP_FORCED
from xdpmasq.events import Watcher, json_lines
from xdpmasq.selection import Selection

Walk = Callable[[Gateway], object]


class Told:
    """A watcher, and what it is told as JSON."""

    def __init__(self, gateway: Gateway) -> None:
        attached = SimpleNamespace(
            maps=gateway.tables.maps, now=bpf.jiffies, hz=TICKS, counter_names=gateway.bench.counter_names
        )
        self._watcher = Watcher(attached)  # type: ignore[arg-type]

    def read(self, selection: Selection = Selection()) -> list[dict[str, Any]]:  # noqa: B008  frozen
        batch = self._watcher.read()
        assert batch.lost == batch.deaf_s == 0
        return [json.loads(line) for line in json_lines(self._watcher.story(batch.rows, selection))]

    def words(self) -> list[tuple[str, str]]:
        return [(each["event"], each["why"]) for each in self.read()]


@pytest.fixture
def told(gateway: Gateway) -> Iterator[Told]:
    yield Told(gateway)
    gateway.tables.maps["watch"].view()["until"] = 0


def test_nothing_is_written_when_nobody_watches(gateway: Gateway) -> None:
    watch = gateway.tables.maps["watch"].view()
    for until in (0, bpf.jiffies() - 1, (bpf.jiffies() + 20_000) % 2**32, (bpf.jiffies() + 2**31) % 2**32):
        watch["until"] = until
        before = int(watch["next"][0])
        gateway.open(udp(HOST, 5000 + until % 1000, SERVER, 53))
        gateway.reap(gateway.slots(), REAP_FORCED)
        assert int(watch["next"][0]) == before
    watch["until"] = 0


def test_a_session_from_its_first_packet_to_its_last(gateway: Gateway, told: Told) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    (opened,) = told.read()
    ends = {
        "protocol": "udp",
        "internal": {"address": HOST, "port": 5000},
        "external": {"address": GATEWAY, "port": port},
        "remote": {"address": SERVER, "port": 53},
    }
    assert opened.items() >= {"event": "opened", "why": "internal", "state": "UNREPLIED", **ends}.items()
    gateway.inbound(udp(SERVER, 53, GATEWAY, port))
    gateway.open(udp(HOST, 5000, SERVER, 53))
    assert told.read() == []

    session = gateway.session(HOST, 5000, "udp", SERVER, 53)
    session["opened_at"] = (int(session["opened_at"]) - 400 * TICKS) % 2**32
    age(session, 301)
    gateway.reap(gateway.slots())
    (closed,) = told.read()
    size = len(udp(HOST, 5000, SERVER, 53))
    traffic = {"out": {"packets": 2, "bytes": 2 * size}, "in": {"packets": 1, "bytes": size}}
    assert closed.items() >= {"event": "closed", "why": "idle", "state": "REPLIED", **ends, **traffic}.items()
    assert 400 <= closed["duration_s"] < 402
    assert abs(closed["time"] - opened["time"]) < 10


def test_several_watch_side_by_side(gateway: Gateway, told: Told) -> None:
    other = Told(gateway)
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(HOST, 5001, SERVER, 53))
    assert [each["remote"]["port"] for each in told.read()] == [53, 53]
    gateway.open(tcp(HOST, 5000, SERVER, 443, SYN))
    assert [each["protocol"] for each in told.read(Selection.parse("tcp"))] == ["tcp"]
    assert len(other.read()) == 3


def _closed_by_tcp(gateway: Gateway) -> None:
    port = gateway.connect(HOST, 5000, SERVER, 80)
    gateway.outbound(tcp(HOST, 5000, SERVER, 80, FIN | ACK, seq=101, ack=501))
    gateway.inbound(tcp(SERVER, 80, GATEWAY, port, FIN | ACK, seq=501, ack=102))
    age(gateway.session(HOST, 5000, "tcp", SERVER, 80), 241)
    gateway.reap(gateway.slots(), REAP_EXPIRED)


def _reset(gateway: Gateway) -> None:
    port = gateway.connect(HOST, 5000, SERVER, 80)
    gateway.inbound(tcp(SERVER, 80, GATEWAY, port, RST, seq=501))
    age(gateway.session(HOST, 5000, "tcp", SERVER, 80), 241)
    gateway.reap(gateway.slots(), REAP_EXPIRED)


def _flushed(gateway: Gateway) -> None:
    gateway.connect(HOST, 5000, SERVER, 80)
    gateway.reap(gateway.slots(), REAP_FORCED)


def _evicted(gateway: Gateway) -> None:
    gateway.forward("tcp", 8080, (HOST, 80))
    for place in range(gateway.tables.maps["embryos"].max_entries):
        gateway.tables.maps["embryos"].set(place, 8080)
    for port in (1000, 1001):
        gateway.inbound(tcp(OTHER_SERVER, port, GATEWAY, 8080, SYN))


def _opened_anew(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    next_tick()
    gateway.open(udp(HOST, 5000, SERVER, 53))


@pytest.mark.parametrize(
    ("walk", "words"),
    [
        pytest.param(_closed_by_tcp, [("opened", "internal"), ("closed", "fin")], id="FIN"),
        pytest.param(_reset, [("opened", "internal"), ("closed", "rst")], id="RST"),
        pytest.param(_flushed, [("opened", "internal"), ("closed", "flushed")], id="flushed"),
        pytest.param(_opened_anew, [("opened", "internal"), ("closed", "idle"), ("opened", "internal")], id="anew"),
        # the newcomer's first packet is told of when it has its place
        pytest.param(_evicted, [("opened", "remote"), ("closed", "evicted"), ("opened", "remote")], id="evicted"),
    ],
)
def test_why(gateway: Gateway, told: Told, walk: Walk, words: list[tuple[str, str]]) -> None:
    walk(gateway)
    assert told.words() == words
    gateway.assert_tables_agree()


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        pytest.param({"host_sessions": 1}, "host_limit", id="sessions"),
        pytest.param({"host_burst": 1, "host_rate": 0}, "host_rate", id="rate"),
        pytest.param({"external": [((0,),)]}, "no_external", id="no address"),
    ],
)
def test_refused(gateway: Gateway, told: Told, limits: dict[str, Any], why: str) -> None:
    if "external" not in limits:
        gateway.tables.set_settings(**limits)
        gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.tables.set_settings(**limits)
    assert gateway.outbound(udp(HOST, 5001, SERVER, 123)).ended == f"drop_{why}"
    refused = told.read()[-1]
    assert refused.items() >= {"event": "refused", "why": why, "protocol": "udp", "external": None}.items()
    assert (refused["internal"], refused["remote"]["port"]) == ({"address": HOST, "port": 5001}, 123)
    # what opens no session is refused none
    gateway.outbound(tcp(HOST, 5002, SERVER, 80, FIN | ACK))
    assert told.read() == []


def test_refused_from_outside(gateway: Gateway, told: Told) -> None:
    """Of a forward with two targets each session has a further place; there are none."""
    gateway.forward("tcp", 8080, (HOST, 80))
    gateway.tables.claims[gateway.tables.further_base // 64 :] = 2**64 - 1
    gateway.inbound(tcp(OTHER_SERVER, 1000, GATEWAY, 8080, SYN))
    gateway.inbound(tcp(OTHER_SERVER, 1001, GATEWAY, 8080, SYN))
    opened, refused = told.read()
    assert (opened["why"], refused["why"]) == ("remote", "sessions_full")
    assert refused["internal"] == opened["internal"] == {"address": HOST, "port": 80}
