"""What came between two looks: by session, by host, in order."""

from collections.abc import Callable
from ipaddress import IPv4Address
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from records import SESSION, SETTINGS

from xdpmasq import rates
from xdpmasq.rates import Look, Rates
from xdpmasq.selection import Selection

FURTHER_BASE = 3 * 65536
A, B, C = "192.168.0.2", "192.168.0.3", "192.168.1.1"

Change = Callable[[Any], None]


def put(table: Any, slot: int, host: str, carried: tuple[int, int, int, int], opened_at: int = 7) -> None:
    """A session; ``carried`` as in :data:`rates.TRAFFIC`."""
    row = table[slot]
    row["in"]["new_addr"]["word"] = int.from_bytes(IPv4Address(host).packed, "little")
    row["life"], row["mapping"], row["opened_at"] = 5, slot, opened_at
    (row["sent"]["packets"], row["sent"]["bytes"], row["received"]["packets"], row["received"]["bytes"]) = carried


def table() -> Any:
    made = np.zeros(FURTHER_BASE + 64, SESSION)
    put(made, 2000, A, (10, 1000, 20, 20000))
    put(made, 2001, A, (0, 0, 0, 0))
    put(made, 65536 + 3000, B, (5, 500, 0, 0))
    put(made, FURTHER_BASE, C, (0, 0, 0, 0))
    return made


def look(sessions: Any, **counters: int) -> Look:
    settings = np.zeros((), SETTINGS)
    settings["externals"] = 1
    for name in ("tcp_established", "tcp_transitory", "udp", "icmp"):
        settings[name] = 1000
    subject = SimpleNamespace(
        settings=settings, sessions=sessions, hz=100, now=lambda: 0, counters=lambda: counters,
        further_base=FURTHER_BASE, further=64,
    )  # fmt: skip
    return rates.look(subject)  # type: ignore[arg-type]


def grown(change: Change, seconds: float = 2, **counters: int) -> Rates:
    """What :func:`rates.between` makes of a change within so many seconds."""
    made = table()
    before = look(made, **dict.fromkeys(counters, 0))
    change(made)
    after = look(made, **counters)
    return rates.between(before, Look(before.at + seconds, after.table, after.counters, after.further, after.ports))


def ended(made: Any) -> None:
    made["life"][2000] = 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        pytest.param(lambda made: None, (0, 0, 0, 0), id="nothing"),
        pytest.param(lambda made: put(made, 2000, A, (14, 1400, 26, 26000)), (2, 200, 3, 3000), id="more of one"),
        pytest.param(lambda made: put(made, 2005, C, (2, 80, 4, 160)), (1, 40, 2, 80), id="a new one"),
        pytest.param(lambda made: put(made, 2000, B, (2, 60, 2, 40), 9), (1, 30, 1, 20), id="another in its place"),
        pytest.param(lambda made: put(made, 2000, B, (2, 60, 2, 40)), (1, 30, 1, 20), id="within one jiffy"),
        pytest.param(ended, (0, 0, 0, 0), id="one less"),
    ],
)
def test_speed(change: Change, expected: tuple[int, ...]) -> None:
    assert tuple(grown(change).total) == expected


def test_speed_of_the_first_sessions_ever() -> None:
    before = look(np.zeros(FURTHER_BASE + 64, SESSION))
    found = rates.between(before, Look(before.at + 1, look(table()).table, {}, (0, 0), {}))
    assert tuple(found.total) == (15, 1500, 20, 20000)


def test_counters() -> None:
    found = grown(lambda made: None, fast_outbound=90, fast_inbound=8, slow_outbound=2, drop_filtered=4, drop_ttl=6)
    assert found.fast_share == pytest.approx(0.98)
    assert found.drops == {"drop_ttl": 3, "drop_filtered": 2}
    assert grown(lambda made: None, drop_ttl=0).fast_share is None
    assert found.now.further == (1, 64)


def busy(made: Any) -> None:
    put(made, 2000, A, (11, 9000, 20, 20000))
    put(made, 65536 + 3000, B, (105, 2500, 0, 0))


@pytest.mark.parametrize(
    ("sort", "names"),
    [
        pytest.param("rate", [A, B, C], id="rate"),
        pytest.param("packets", [B, A, C], id="packets"),
        pytest.param("sessions", [A, B, C], id="sessions"),
        pytest.param("host", [A, B, C], id="host"),
    ],
)
def test_hosts_in_order(sort: str, names: list[str]) -> None:
    first = rates.top(grown(busy), Selection(), sort, 10, hosts=True)
    assert (first.names, first.sessions.tolist(), len(first), first.among) == (
        names,
        [2 if name == A else 1 for name in names],
        3,
        3,
    )
    assert rates.top(grown(busy), Selection(), sort, 1, hosts=True).names == names[:1]


def test_some_sessions_for_scripts() -> None:
    measured = grown(busy)
    first = rates.top(measured, Selection.parse(internal="192.168.0.0/24"), "rate", 2, hosts=False)
    fields = rates.as_fields(measured, first)
    assert [each["internal"]["address"] for each in fields["top"]] == [A, B]
    assert fields["top"][0]["out"] == {"bytes_per_s": 4000, "packets_per_s": 0.5}
    assert set(fields["top"][0]) == {"protocol", "state", "internal", "external", "remote", "out", "in"}
    assert (fields["among"], fields["sessions"]["total"]) == (3, 4)
    assert fields["out"] == {"bytes_per_s": 5000, "packets_per_s": 50.5}
