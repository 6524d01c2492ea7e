"""The log of sessions and mappings: who had which external port, and when; of real packets and real tables."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import GATEWAY, HOST, OTHER_HOST, OTHER_SERVER, SERVER, SYN, TICKS, Gateway, age, tcp, udp

from xdpmasq import bpf, metrics, recorder
from xdpmasq.abi import REAP_EXPIRED, REAP_FORCED
from xdpmasq.config import Log
from xdpmasq.events import Watcher
from xdpmasq.recorder import Recorder
from xdpmasq.records import Record, Scribe
from xdpmasq.tables import Tables


class Logged:
    """What is recorded, without threads and targets."""

    def __init__(self, gateway: Gateway, what: str = "mappings", *, destinations: bool = False) -> None:
        attached: Any = _attached(gateway)
        self._watcher = Watcher(attached)
        self.scribe = Scribe(attached, self._watcher, what, destinations=destinations)

    def read(self) -> list[Record]:
        return [*self.scribe.records(self._watcher.read().rows)]

    def words(self) -> list[tuple[str, str, str]]:
        """Event, internal port and why."""
        return _words(self.read())


class _Attached(Tables):
    """What stands for ``datapath.Attached``, which has a manifest."""

    hz = TICKS

    def now(self) -> int:
        return bpf.jiffies()


def _attached(gateway: Gateway) -> Any:
    made = _Attached(gateway.tables.maps)
    made.counter_names = gateway.bench.counter_names
    return made


def _words(records: list[Record]) -> list[tuple[str, str, str]]:
    return [(each.event, f"{each.internal[0]}:{each.internal[1]}", each.why) for each in records]


@pytest.fixture(autouse=True)
def unwatched(gateway: Gateway) -> Iterator[None]:
    yield
    gateway.tables.maps["watch"].view()["until"] = 0


def end(gateway: Gateway, port: int, remote: str, remote_port: int = 53) -> None:
    age(gateway.session(HOST, port, "udp", remote, remote_port), 301)
    gateway.reap(gateway.slots(), REAP_EXPIRED)


FIRST, SECOND = f"{HOST}:5000", f"{HOST}:5001"


def test_a_mapping_from_its_first_session_to_its_last(gateway: Gateway) -> None:
    logged = Logged(gateway)
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    gateway.inbound(udp(SERVER, 53, GATEWAY, port))
    (opened,) = logged.read()
    assert (opened.kind, opened.event, opened.protocol, opened.remote) == ("mapping", "opened", "udp", None)
    assert (opened.internal, opened.external) == ((IPv4Address(HOST), 5000), (IPv4Address(GATEWAY), port))
    assert abs(opened.at - time.time()) < 5

    end(gateway, 5000, SERVER)
    assert logged.read() == []
    end(gateway, 5000, OTHER_SERVER)
    (closed,) = logged.read()
    assert (closed.event, closed.why, closed.internal, closed.external) == (
        *("closed", "idle"), opened.internal, opened.external
    )  # fmt: skip
    assert closed.duration_s == pytest.approx(closed.at - opened.at)


def test_a_mapping_that_goes_on(gateway: Gateway) -> None:
    """Its last session ends and another begins before anybody looks: the port was its host's all the time."""
    logged = Logged(gateway)
    gateway.open(udp(HOST, 5000, SERVER, 53))
    assert len(logged.read()) == 1
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    assert logged.read() == []
    gateway.reap(gateway.slots(), REAP_FORCED)
    assert logged.words() == [("closed", FIRST, "flushed")]


def test_a_forwarded_port(gateway: Gateway) -> None:
    """Its slot stays; it is logged while there are sessions."""
    gateway.forward("tcp", 8080, (HOST, 80))
    logged = Logged(gateway)
    gateway.inbound(tcp(OTHER_SERVER, 1000, GATEWAY, 8080, SYN))
    gateway.inbound(tcp(OTHER_SERVER, 1001, GATEWAY, 8080, SYN))
    assert logged.words() == [("opened", f"{HOST}:80", "remote")]
    gateway.reap(gateway.slots(), REAP_FORCED)
    assert logged.words() == [("closed", f"{HOST}:80", "flushed")]


def test_what_runs_already_and_what_was_missed(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    session = gateway.session(HOST, 5000, "udp", SERVER, 53)
    session["opened_at"] = (int(session["opened_at"]) - 100 * TICKS) % 2**32
    logged = Logged(gateway)
    (running,) = logged.scribe.running()
    assert _words([running]) == [("opened", FIRST, "running")]
    assert time.time() - running.at == pytest.approx(100, abs=5)
    assert [*logged.scribe.running()] == []

    gateway.tables.maps["watch"].view()["until"] = 0  # nobody hears
    gateway.open(udp(HOST, 5001, SERVER, 53))
    end(gateway, 5000, SERVER)
    assert logged.read() == []
    assert _words([*logged.scribe.ended(every=False)]) == []
    assert _words([*logged.scribe.ended(every=True)]) == [("closed", FIRST, "idle")]
    assert _words([*logged.scribe.running()]) == [("opened", SECOND, "running")]
    end(gateway, 5001, SERVER)
    assert logged.words() == [("closed", SECOND, "idle")]


def test_an_end_that_is_not_believed_at_first(gateway: Gateway) -> None:
    logged = Logged(gateway)
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    end(gateway, 5000, SERVER)
    assert logged.words() == [("opened", FIRST, "internal")]
    gateway.tables.maps["watch"].view()["until"] = 0
    end(gateway, 5000, OTHER_SERVER)
    assert _words([*logged.scribe.ended(every=False)]) == [("closed", FIRST, "idle")]


@pytest.mark.req("6888-12")
@pytest.mark.parametrize("destinations", [False, True])
def test_sessions(gateway: Gateway, destinations: bool) -> None:
    """Destinations only for whoever wants them."""
    logged = Logged(gateway, "sessions", destinations=destinations)
    gateway.open(udp(HOST, 5000, SERVER, 53))
    end(gateway, 5000, SERVER)
    gateway.tables.set_settings(host_sessions=0)
    gateway.outbound(udp(HOST, 5001, SERVER, 123))
    opened, closed, refused = logged.read()
    size = len(udp(HOST, 5000, SERVER, 53))
    assert [each.event for each in (opened, closed, refused)] == ["opened", "closed", "refused"]
    assert (opened.traffic, closed.traffic) == (None, (1, size, 0, 0))
    assert (refused.why, refused.external, refused.limit) == ("host_limit", None, 0)
    for each, port in ((opened, 53), (closed, 53), (refused, 123)):
        assert each.remote == ((IPv4Address(SERVER), port) if destinations else None)
        assert (SERVER in each.json()) is destinations


def test_refusals_are_not_repeated(gateway: Gateway) -> None:
    logged = Logged(gateway)
    gateway.tables.set_settings(host_sessions=1)
    for host in (HOST, OTHER_HOST):
        gateway.open(udp(host, 5000, SERVER, 53))
        for port in range(5001, 5011):
            gateway.outbound(udp(host, port, SERVER, 53))
    refused = [each for each in logged.read() if each.event == "refused"]
    assert [(str(each.internal[0]), each.limit) for each in refused] == [(HOST, 1), (OTHER_HOST, 1)]
    assert logged.scribe.repeated == 18


# --- with thread and targets -----------------------------------------------------------------------


@contextlib.contextmanager
def recording(gateway: Gateway, path: Path, **config: Any) -> Iterator[Recorder]:
    made = Recorder(Log(file=str(path), **config))
    made.begin(_attached(gateway))
    try:
        yield made
    finally:
        made.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def soon(question: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_from_packet_to_file(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "nat.json"
    gateway.open(udp(HOST, 5000, SERVER, 53))
    with recording(gateway, path):
        assert int(gateway.tables.maps["watch"].view()["until"][0])  # there is no other watcher
        soon(lambda: len(lines(path)) == 2)
        gateway.open(udp(HOST, 5001, SERVER, 53))
        soon(lambda: len(lines(path)) == 3)
        gateway.reap(gateway.slots(), REAP_FORCED)
    assert [(each["event"], each.get("internal", {}).get("port")) for each in lines(path)[:3]] == [
        *(("started", None), ("opened", 5000), ("opened", 5001)),
    ]
    assert sorted((each["event"], each["internal"]["port"]) for each in lines(path)[3:5]) == [
        *(("closed", 5000), ("closed", 5001)),
    ]
    assert lines(path)[5]["event"] == "stopped"
    assert not any(thread.name == "log" for thread in threading.enumerate())


def test_more_than_the_ring_holds(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said how much is lost, and of mappings it is made up for."""
    monkeypatch.setattr(recorder, "MAKE_UP_S", 0.0)
    path, watch = tmp_path / "nat.json", gateway.tables.maps["watch"].view()
    with recording(gateway, path) as made:
        soon(lambda: len(lines(path)) == 1)
        with made._reading:  # the reader is held up
            gateway.open(udp(HOST, 5000, SERVER, 53))
            watch["next"] += 20_000
        soon(lambda: any(each["event"] == "opened" for each in lines(path)))
    found = lines(path)
    assert [each["event"] for each in found] == ["started", "lost", "opened", "stopped"]
    assert found[1]["count"] == made.missed >= 3617
    assert (found[2]["why"], found[2]["internal"]["port"]) == ("running", 5000)


def test_it_stands_aside_for_the_agent(gateway: Gateway, tmp_path: Path) -> None:
    """Which listens meanwhile."""
    path = tmp_path / "nat.json"
    with recording(gateway, path) as made:
        soon(lambda: len(lines(path)) == 1)
        with made.aside():
            time.sleep(0.15)
            gateway.open(udp(HOST, 5000, SERVER, 53))
            time.sleep(0.15)
            assert len(lines(path)) == 1
            assert made.listen() == 1
        soon(lambda: len(lines(path)) == 2)


def test_its_pace(gateway: Gateway, tmp_path: Path) -> None:
    path = tmp_path / "nat.json"
    with recording(gateway, path, per_second=100) as made:
        for port in range(5000, 5050):
            gateway.open(udp(HOST, port, SERVER, 53))
        started = time.monotonic()
        soon(lambda: made.targets[0].written == 51)
        assert 0.2 < time.monotonic() - started < 3
    assert (made.missed, made.targets[0].lost) == (0, 0)


def test_metrics(gateway: Gateway, tmp_path: Path) -> None:
    with recording(gateway, tmp_path / "nat.json") as made:
        gateway.open(udp(HOST, 5000, SERVER, 53))
        soon(lambda: made.targets[0].written == 2)
    made.missed = 7
    sheet = metrics.Sheet()
    subject: Any = SimpleNamespace(recorder=made)
    metrics.Metrics._log(SimpleNamespace(_subject=subject), sheet)  # type: ignore[arg-type]
    assert sheet.values == {
        "log_records_total": {("file",): 3},
        "log_lost_records_total": {("file",): 0},
        "log_waiting_records": {("file",): 0},
        "log_missed_events_total": {(): 7},
        "log_repeated_refusals_total": {(): 0},
    }
