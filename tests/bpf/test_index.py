"""The index, from wire 5-tuples to sessions: what chance seldom brings is made with a key that spreads nothing."""

from collections.abc import Iterator

import numpy as np
import pytest
from harness import GATEWAY, HOST, SERVER, Gateway, age, udp

from xdpmasq.abi import REAP_EXPIRED, REAP_RESTED

BUCKET_ENTRIES = 15


@pytest.fixture
def crowded(gateway: Gateway) -> Iterator[Gateway]:
    """Every flow has the same hash: one bucket, and one tag."""
    key = gateway.tables.settings["seed"]
    gateway.tables.set_settings(seed=np.array([5 << 32, 0, 0, 0, 0, 0], np.uint64))
    yield gateway
    gateway.tables.set_settings(seed=key)


def overflown(gateway: Gateway) -> int:
    return len(gateway.entries("overflow"))


def leave_no_room(gateway: Gateway) -> None:
    """Others' entries fill what is there beside the buckets."""
    overflow = gateway.tables.maps["overflow"]
    for number in range(overflow.max_entries):
        key = np.zeros((), overflow.key)
        key["mapping"] = number
        overflow.set(key, 0xFFFFFF)


def test_a_full_bucket(crowded: Gateway) -> None:
    """Whoever finds no room in it is told apart by the 5-tuple all the same, accelerated or not."""
    crowded.accelerate()
    ports = {port: crowded.open(udp(HOST, port, SERVER, 53)) for port in range(5000, 5020)}
    assert overflown(crowded) == 20 - BUCKET_ENTRIES
    for remote in range(54, 60):
        assert crowded.open(udp(HOST, 5019, SERVER, remote)) == ports[5019]
    assert overflown(crowded) == 20 - BUCKET_ENTRIES + 2 * 6
    crowded.assert_tables_agree()
    for port, external in ports.items():
        assert crowded.open(udp(HOST, port, SERVER, 53)) == external
        assert crowded.inbound(udp(SERVER, 53, GATEWAY, external)).ip.dport == port
        assert crowded.fast_outbound(udp(HOST, port, SERVER, 53)).port == external
    for remote in range(54, 60):
        assert crowded.inbound(udp(SERVER, remote, GATEWAY, ports[5019])).ip.dport == 5019
    assert crowded.inbound(udp(SERVER, 60, GATEWAY, ports[5019])).ended == "drop_filtered"


def test_an_ended_session_makes_room(crowded: Gateway) -> None:
    for port in range(5000, 5000 + BUCKET_ENTRIES + 2):
        crowded.open(udp(HOST, port, SERVER, 53))
    age(crowded.session(HOST, 5003, "udp", SERVER, 53), 301)
    crowded.reap(crowded.slots(), REAP_EXPIRED)
    crowded.open(udp(HOST, 6000, SERVER, 53))
    assert overflown(crowded) == 2
    crowded.open(udp(HOST, 6000, SERVER, 54))
    crowded.assert_tables_agree()
    for slot in crowded.slots():
        age(crowded.tables.sessions[slot], 301)
    crowded.reap(crowded.slots(), REAP_EXPIRED)
    assert crowded.indexed() == []


def test_no_room_at_all(crowded: Gateway) -> None:
    """Who comes then is refused and leaves nothing, also when only one of two entries found room."""
    for port in range(5000, 5000 + BUCKET_ENTRIES - 1):
        crowded.open(udp(HOST, port, SERVER, 53))
    leave_no_room(crowded)
    others = overflown(crowded)
    assert crowded.outbound(udp(HOST, 5000, SERVER, 54)).ended == "drop_sessions_full"
    crowded.open(udp(HOST, 6000, SERVER, 53))
    assert crowded.outbound(udp(HOST, 6001, SERVER, 53)).ended == "drop_sessions_full"
    assert overflown(crowded) == others
    for key in crowded.entries("overflow"):
        crowded.tables.maps["overflow"].delete(np.frombuffer(key, crowded.tables.maps["overflow"].key)[0])
    crowded.assert_tables_agree()
    assert len(crowded.indexed()) == BUCKET_ENTRIES


def test_an_entry_out_of_date_leads_nowhere(gateway: Gateway) -> None:
    """It may be read just before it goes, and its slot be another session's by then."""
    gateway.pool(udp=((1024, 1),))
    gateway.accelerate()
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 1024
    buckets = gateway.tables.maps["buckets"].view()
    former = buckets["entry"].copy()
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    for order in (REAP_EXPIRED, REAP_RESTED):
        gateway.reap(gateway.slots(), order)
    assert gateway.open(udp(HOST, 5001, SERVER, 54)) == 1024
    buckets["entry"] |= former
    assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53)).ended == "up_no_flow"
    assert gateway.fast_inbound(udp(SERVER, 53, GATEWAY, 1024)).ended == "up_no_flow"
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, 1024)).ended == "drop_filtered"
    assert gateway.inbound(udp(SERVER, 54, GATEWAY, 1024)).ip.dport == 5001
