"""Counting the session table: what is what, and who has carried how much."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from xdpmasq import census, sessions
from xdpmasq.abi import EXTERNAL_SLOTS, LIFE_LIVE, LIFE_RESTING, LIFE_SESSION, LIFE_STATIC, PORTS

ACK, FIN = 0x10, 0x01
ADDRESS = [("word", "<u4", (1,))]
FLOW = [("new_addr", ADDRESS), ("tcp_seen", "u1")]
TRAFFIC = [("packets", "<u8"), ("bytes", "<u8")]
SESSION = np.dtype(
    [
        *(("out", FLOW), ("opened_at", "<u4"), ("sent", TRAFFIC)),
        *(("in", FLOW), ("mapping", "<u4"), ("life", "<u8"), ("received", TRAFFIC)),
    ]
)
FURTHER = 1024
TCP, UDP, ICMP = range(3)


class Table:
    """Stands for ``Tables``."""

    def __init__(self, externals: int = 1) -> None:
        self.externals, self.further_base = externals, externals * EXTERNAL_SLOTS
        self.sessions = np.zeros(self.further_base + FURTHER, SESSION)
        self.claims = np.zeros(len(self.sessions) // 64, np.uint64)

    def rows(self, slots: Any) -> Any:
        return self.sessions[slots]

    def put(
        self,
        slot: int,
        life: int = LIFE_LIVE | LIFE_SESSION,
        *,
        mapping: int | None = None,
        seen: tuple[int, int] = (0, 0),
        host: int = 1,
        sent: int = 0,
        received: int = 0,
        opened_at: int = 7,
    ) -> None:
        row = self.sessions[slot]
        row["life"], row["mapping"], row["opened_at"] = life, slot if mapping is None else mapping, opened_at
        row["out"]["tcp_seen"], row["in"]["tcp_seen"] = seen
        row["in"]["new_addr"]["word"] = host
        for side, size in (("sent", sent), ("received", received)):
            row[side]["bytes"], row[side]["packets"] = size, bool(size)
        self.claims[slot // 64] |= np.uint64(1 << slot % 64)


def slot(protocol: int, port: int, external: int = 0) -> int:
    return (external * 3 + protocol) * PORTS + port


def take(table: Table, hosts: census.Hosts | None = None) -> census.Census:
    return census.take(table, hosts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("protocol", "seen", "received", "state"),
    [
        pytest.param(TCP, (0x02, 0), 0, "SYN_SENT", id="syn"),
        pytest.param(TCP, (ACK, ACK), 1, "ESTABLISHED", id="established"),
        pytest.param(TCP, (ACK | FIN, ACK | FIN), 1, "TIME_WAIT", id="closed"),
        pytest.param(UDP, (0, 0), 0, "UNREPLIED", id="udp, no answer"),
        pytest.param(UDP, (0, 0), 9, "REPLIED", id="udp"),
        pytest.param(ICMP, (0, 0), 9, "REPLIED", id="icmp"),
    ],
)
def test_states(protocol: int, seen: tuple[int, int], received: int, state: str) -> None:
    table = Table()
    table.put(slot(protocol, 2000), seen=seen, received=received)
    counted = take(table)
    assert counted.total == 1
    assert counted.states[protocol, sessions.STATES.index(state)] == 1


def test_ports_by_address_and_use() -> None:
    table = Table(externals=2)
    table.put(slot(TCP, 1))
    table.put(slot(UDP, 2, external=1))
    table.put(slot(UDP, 3, external=1), LIFE_RESTING)
    table.put(slot(TCP, 4), LIFE_LIVE | LIFE_STATIC)  # a forward nobody uses
    table.put(slot(ICMP, 5), 0)  # claimed only: outside the pool
    ports = take(table).ports
    assert dict(zip(census.USES, ports[0, TCP].tolist(), strict=True)) == {"used": 1, "resting": 0, "forwarded": 1}
    assert ports[1, UDP].tolist() == [1, 1, 0]
    assert ports.sum() == 4


def test_further_sessions_are_of_their_mappings_protocol() -> None:
    table = Table()
    table.put(table.further_base + 9, mapping=slot(UDP, 2000))
    counted = take(table)
    assert counted.further == 1
    assert counted.states[UDP].sum() == 1
    assert counted.ports.sum() == 0


def test_traffic_is_added_up_by_protocol() -> None:
    table = Table()
    for port in (1, 2, 3):
        table.put(slot(TCP, port), sent=1 << 40, received=5)
    table.put(slot(UDP, 1), sent=7)
    carried = take(table).carried
    assert carried["out_bytes"].tolist() == [3 << 40, 7, 0]
    assert carried["in_bytes"].tolist() == [15, 0, 0]
    assert carried["out_packets"].tolist() == [3, 1, 0]


def test_it_counts_beyond_a_piece() -> None:
    table = Table()
    ports = range(0, PORTS, 97)
    for port in ports:
        table.put(slot(UDP, port))
        table.put(slot(ICMP, port))
    assert take(table).states.sum(axis=1).tolist() == [0, len(ports), len(ports)]


def test_it_looks_at_no_more_than_a_piece_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the agent would wait for its turn at the interpreter."""
    table, looked_at = Table(), []
    table.claims[:] = np.uint64(2**64 - 1)
    monkeypatch.setattr(table, "rows", lambda slots: (looked_at.append(len(slots)), table.sessions[slots])[1])
    take(table)
    assert sum(looked_at) == len(table.sessions)
    assert max(looked_at) <= 16384


# --- who has carried how much ----------------------------------------------------------------------


def carried(hosts: census.Hosts) -> dict[int, list[float]]:
    return dict(zip(hosts.addresses.tolist(), hosts.sums.tolist(), strict=True))


def test_a_hosts_bytes_are_what_came_since_the_first_look() -> None:
    table = Table()
    hosts = census.Hosts(len(table.sessions))
    table.put(slot(UDP, 1), host=5, sent=100, received=1000)
    take(table, hosts)
    assert carried(hosts) == {5: [1, 0, 0]}
    table.put(slot(UDP, 1), host=5, sent=130, received=1400)
    table.put(slot(TCP, 9), host=5, sent=3)
    table.put(slot(TCP, 10), host=6, received=8)
    take(table, hosts)
    assert carried(hosts) == {5: [2, 33, 400], 6: [1, 0, 8]}
    take(table, hosts)
    assert carried(hosts) == {5: [2, 33, 400], 6: [1, 0, 8]}


@pytest.mark.parametrize(
    "ended",
    [
        pytest.param({"life": LIFE_RESTING, "sent": 150}, id="ended, with its last bytes"),
        pytest.param({"opened_at": 8, "sent": 50}, id="another in its slot"),
    ],
)
def test_bytes_of_sessions_that_end_stay(ended: dict[str, Any]) -> None:
    table = Table()
    hosts = census.Hosts(len(table.sessions))
    take(table, hosts)
    table.put(slot(UDP, 1), host=5, sent=100)
    take(table, hosts)
    table.put(slot(UDP, 1), host=5, **ended)
    take(table, hosts)
    table.claims[:] = 0
    take(table, hosts)
    assert carried(hosts) == {5: [0, 150, 0]}


def test_the_first_are_those_with_most_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table()
    hosts = census.Hosts(len(table.sessions))
    take(table, hosts)
    for host, size in ((1, 10), (2, 30), (3, 20), (4, 5)):
        table.put(slot(UDP, host), host=host, sent=size // 2, received=size - size // 2)
    monkeypatch.setattr(census, "HOSTS_MOST", 3)
    take(table, hosts)
    assert hosts.addresses[hosts.first(2)].tolist() == [2, 3]
    assert hosts.addresses.tolist() == [1, 2, 3]


def test_an_empty_table() -> None:
    table = SimpleNamespace(**vars(Table()))
    hosts = census.Hosts(len(table.sessions))
    assert census.take(table, hosts).total == 0
    assert len(hosts.first(5)) == 0
