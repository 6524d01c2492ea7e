"""Where the log's records go, and what becomes of them when it cannot take them: a file, syslog, a collector."""

import json
import os
import resource
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import netflow
import pytest

from xdpmasq import ipfix, targets
from xdpmasq.config import Log
from xdpmasq.errors import HostError
from xdpmasq.records import Record

INSIDE, OUTSIDE, REMOTE = (
    (IPv4Address(each), port) for each, port in (("192.168.0.2", 5000), ("203.0.113.1", 61000), ("198.51.100.7", 443))
)
AT = 1_700_000_000.25
MAPPING = Record(AT, "mapping", "opened", "internal", "tcp", INSIDE, OUTSIDE)
SESSION = Record(AT, "session", "closed", "fin", "udp", INSIDE, OUTSIDE, REMOTE, 1.5, (1, 2, 3, 4))


def refused(why: str, limit: int = 0, wan: int = 0) -> Record:
    return Record(AT, "session", "refused", why, "udp", INSIDE, limit=limit, wan=wan)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "RETRY_S", 0.0)
    monkeypatch.setattr(targets, "LOOK_S", 0.0)


# --- a file ----------------------------------------------------------------------------------------


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_a_file(tmp_path: Path) -> None:
    file = targets.File(str(tmp_path / "nat.json"))
    file.take([MAPPING, SESSION, refused("host_limit", 7)])
    file.flush()
    mapping, session, refusal = lines(tmp_path / "nat.json")
    inside = {"internal": {"address": "192.168.0.2", "port": 5000}}
    outside = {"external": {"address": "203.0.113.1", "port": 61000}}
    assert mapping == {
        **{"time": AT, "record": "mapping", "event": "opened", "why": "internal", "protocol": "tcp"},
        **{**inside, **outside},
    }
    assert session == {
        **{"time": AT, "record": "session", "event": "closed", "why": "fin", "protocol": "udp"},
        **{**inside, **outside, "remote": {"address": "198.51.100.7", "port": 443}, "duration_s": 1.5},
        **{"out": {"packets": 1, "bytes": 2}, "in": {"packets": 3, "bytes": 4}},
    }
    assert "external" not in refusal
    assert (file.written, file.lost, file.backlog) == (3, 0, 0)
    assert (tmp_path / "nat.json").stat().st_mode & 0o007 == 0


@pytest.mark.parametrize("how", ["moved", "removed", "told"])
def test_a_file_that_is_rotated(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = tmp_path / "nat.json", tmp_path / "nat.json.1"
    file = targets.File(str(path))
    file.take([MAPPING])
    file.flush()
    os.link(path, old)
    path.unlink()
    if how == "moved":
        path.write_text("")  # logrotate's create
    if how == "told":
        monkeypatch.setattr(targets, "LOOK_S", 1000.0)
        file.reopen()
    file.take([SESSION])
    file.flush()
    assert [each["record"] for each in lines(path)] == ["session"]
    assert [each["record"] for each in lines(old)] == ["mapping"]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file or directory; name another by file in"):
        targets.opened(Log(file=str(tmp_path / "none" / "nat.json")))


def test_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost, cut or written twice, as long as there is room to wait; then the oldest are lost."""
    path, before = tmp_path / "nat.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = targets.File(str(path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # Python ignores SIGXFSZ
    try:
        file.take([MAPPING] * 10)
        file.flush()
        file.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.stat().st_size == 1000
    assert caplog.text.count("cannot be written") == 1
    monkeypatch.setattr(targets, "ROOM", 2)
    file.take([SESSION] * 3)
    assert (file.backlog, file.lost) == (12, 1)
    file.flush()
    assert [each["record"] for each in lines(path)] == ["mapping"] * 10 + ["session"] * 2
    assert (file.written, file.lost, file.backlog) == (12, 1, 0)


def test_what_a_full_disk_kept_back_is_lost_at_the_end(tmp_path: Path) -> None:
    path, before = tmp_path / "nat.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    file = targets.File(str(path))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        file.take([MAPPING] * 10)
        file.flush()
        file.take([SESSION])
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.written + file.lost == 11
    assert file.lost > 1


# --- syslog ----------------------------------------------------------------------------------------


def test_syslog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = tmp_path / "log"
    monkeypatch.setattr(targets, "DEV_LOG", str(where))
    with pytest.raises(HostError, match=r"cannot log to syslog: .*No such file"):
        targets.opened(Log(syslog="local0"))
    with listening(where) as daemon:
        (target,) = targets.opened(Log(syslog="local3"))
        target.take([MAPPING])
        target.flush()
        text = daemon.recv(2000).decode()
    head, _, body = text.partition(": ")
    assert head == f"<{19 * 8 + 6}>xdpmasq[{os.getpid()}]"
    assert json.loads(body)["record"] == "mapping"
    target.take([SESSION])
    target.flush()  # it is gone
    assert (target.written, target.backlog) == (1, 1)
    where.unlink()
    with listening(where) as daemon:
        target.flush()
        assert b'"session"' in daemon.recv(2000)
    assert (target.written, target.lost, target.backlog) == (2, 0, 0)
    target.close()


def listening(where: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(where))
    return made


# --- IPFIX -----------------------------------------------------------------------------------------


class Collector:
    """By an implementation that is not ours."""

    def __init__(self, port: int = 0) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", port))
        self.socket.settimeout(1)
        self.templates: dict[str, Any] = {"netflow": {}, "ipfix": {}}
        self.sequences: list[tuple[int, int]] = []  # and how many records

    @property
    def port(self) -> int:
        return int(self.socket.getsockname()[1])

    def read(self) -> list[dict[str, Any]]:
        """What has come, as it was decoded."""
        found = []
        self.socket.setblocking(False)
        while True:
            try:
                datagram = self.socket.recv(65536)
            except BlockingIOError:
                return found
            assert len(datagram) <= 1472
            packet = netflow.parse_packet(datagram, self.templates)
            flows = [flow.data for flow in packet.flows]
            self.sequences.append((packet.header.sequence_number, len(flows)))
            found += flows


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.socket.close()


def exporter(collector: Collector) -> targets.Ipfix:
    (target,) = targets.opened(Log(ipfix=f"127.0.0.1:{collector.port}"))
    assert isinstance(target, targets.Ipfix)
    return target


BINDING = {
    "observationTimeMilliseconds": round(AT * 1000),
    "sourceIPv4Address": int(INSIDE[0]), "sourceTransportPort": 5000,
    "postNATSourceIPv4Address": int(OUTSIDE[0]), "postNAPTSourceTransportPort": 61000,
}  # fmt: skip
PORT_RANGE = {
    "sourceIPv4Address": int(INSIDE[0]), "postNATSourceIPv4Address": int(OUTSIDE[0]),
    "portRangeStart": 5120, "portRangeEnd": 5631, "portRangeStepSize": 1, "portRangeNumPorts": 512,
}  # fmt: skip
TOWARDS = {
    "destinationIPv4Address": int(REMOTE[0]), "destinationTransportPort": 443,
    "postNATDestinationIPv4Address": int(REMOTE[0]), "postNAPTDestinationTransportPort": 443,
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        pytest.param(MAPPING, {**BINDING, "natEvent": 8, "protocolIdentifier": 6}, id="BIB create"),
        pytest.param(
            Record(AT, "mapping", "closed", "idle", "icmp", INSIDE, OUTSIDE),
            {**BINDING, "natEvent": 9, "protocolIdentifier": 1},
            id="BIB delete",
        ),
        pytest.param(
            Record(AT, "session", "opened", "internal", "tcp", INSIDE, OUTSIDE),
            {**BINDING, "natEvent": 4, "protocolIdentifier": 6},
            id="session create",
        ),
        pytest.param(
            SESSION, {**BINDING, **TOWARDS, "natEvent": 5, "protocolIdentifier": 17}, id="session delete, with remote"
        ),
        pytest.param(
            Record(AT, "block", "opened", "internal", "", (INSIDE[0], 0), (OUTSIDE[0], 5120), last=5631),
            {**PORT_RANGE, "natEvent": 16},
            id="port block allocation",
        ),
        pytest.param(
            Record(AT, "block", "closed", "idle", "", (INSIDE[0], 0), (OUTSIDE[0], 5120), last=5631),
            {**PORT_RANGE, "natEvent": 17},
            id="port block de-allocation",
        ),
        pytest.param(
            refused("host_limit", 4096),
            {"natEvent": 13, "natQuotaExceededEvent": 3, "maxEntriesPerUser": 4096,
             "sourceIPv4Address": int(INSIDE[0])},
            id="quota of a host",
        ),
        pytest.param(
            refused("sessions_full", 65536),
            {"natEvent": 13, "natQuotaExceededEvent": 1, "maxSessionEntries": 65536},
            id="quota of sessions",
        ),
        pytest.param(refused("ports_exhausted", wan=1), {"natEvent": 3, "natPoolId": 1}, id="addresses exhausted"),
    ],
)  # fmt: skip
def test_what_a_collector_reads(collector: Collector, record: Record, fields: dict[str, int]) -> None:
    target = exporter(collector)
    target.take([record, refused("host_rate")])  # of which RFC 8158 has no event
    target.flush()
    (found,) = collector.read()
    assert found == {"observationTimeMilliseconds": round(AT * 1000), **fields}
    assert target.written == 1


def test_sequence_numbers_and_sizes(collector: Collector) -> None:
    """Of many records, of several templates in turn."""
    target = exporter(collector)
    records = [SESSION, MAPPING, MAPPING, refused("host_limit", 9)] * 100
    target.take(records)
    target.flush()
    found = collector.read()
    assert [each["natEvent"] for each in found] == [5, 8, 8, 13] * 100
    assert sum(count for _, count in collector.sequences) == len(records)
    sent = 0
    for sequence, count in collector.sequences:
        assert sequence == sent
        sent += count
    assert len(collector.sequences) < 20


def test_messages_are_no_longer_than_asked_for() -> None:
    records = [each for each in map(ipfix.encode, [SESSION, MAPPING] * 200) if each]
    messages = [(ipfix.message(sets, 0, 0), count) for sets, count in ipfix.data_sets(records, ipfix.LEAST)]
    assert sum(count for _, count in messages) == 400
    assert max(len(text) for text, _ in messages) <= ipfix.LEAST


def test_templates_are_repeated(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    target = exporter(collector)
    monkeypatch.setattr(targets, "TEMPLATES_S", 0.0)
    target.flush()
    collector.read()
    collector.templates["ipfix"].clear()  # another collector
    target.take([MAPPING])
    target.flush()
    assert [each["natEvent"] for each in collector.read()] == [8]


def test_a_collector_that_is_down(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent while it is down is known only after the fact; it comes when the collector is there again."""
    target = exporter(collector)
    port = collector.port
    collector.socket.close()
    target.flush()  # the templates
    monkeypatch.setattr(targets, "ROOM", 5)
    for _ in range(4):
        target.take([MAPPING])
        target.flush()
        time.sleep(0.01)  # for the ICMP error
    assert target.written + target.backlog == 4
    again = Collector(port)
    for _ in range(3):
        target.flush()
    assert len(again.read()) == 4
    assert (target.written, target.lost) == (4, 0)
    again.socket.close()
    target.flush()
    time.sleep(0.01)
    target.take([MAPPING] * 8)
    target.close()
    assert (target.backlog, target.lost) == (0, 8)
