"""From wire 5-tuples to sessions: the places where they are expected, and the index of those that found theirs taken.

What chance seldom brings is made with a key that spreads nothing.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from harness import GATEWAY, HOST, SERVER, Gateway, age, socket_order, udp

from xdpmasq.abi import PORTS, REAP_EXPIRED, REAP_FORCED

BUCKET_ENTRIES = 15


@pytest.fixture
def crowded(gateway: Gateway) -> Iterator[Gateway]:
    """Every flow has the same hash, so one bucket and one tag; and the place of further sessions is taken."""
    key = gateway.tables.settings["seed"]
    gateway.tables.set_settings(seed=np.array([5 << 32, 0, 0, 0, 0, 0], np.uint64))
    place = gateway.place_for(0, SERVER, 53)
    gateway.occupy(place, place ^ 1)
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


# --- places ----------------------------------------------------------------------------------------


def flies(gateway: Gateway, port: int, remote_port: int, external: int) -> bool:
    """Both ways, once the kernel has shown how."""
    out, back = udp(HOST, port, SERVER, remote_port), udp(SERVER, remote_port, GATEWAY, external)
    gateway.inbound(back)
    gateway.learn(udp(SERVER, remote_port, HOST, port))
    return gateway.fast_outbound(out).ended == "fast_outbound" and gateway.fast_inbound(back).ended == "fast_inbound"


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_a_further_session_stands_where_it_is_expected(gateway: Gateway, taken: int) -> None:
    """Or beside that; only where both places are taken it needs the index."""
    gateway.accelerate()
    external = gateway.open(udp(HOST, 5000, SERVER, 53))
    first = gateway.slot(HOST, 5000, "udp")
    expected = gateway.place_for(first, SERVER, 54)
    gateway.occupy(*[expected, expected ^ 1][:taken])
    assert gateway.open(udp(HOST, 5000, SERVER, 54)) == external
    (further,) = (slot for slot in gateway.slots() if slot >= gateway.tables.further_base)
    assert (further == expected, further == expected ^ 1) == (taken == 0, taken == 1)
    assert gateway.indexed() == [further, further] * (taken == 2)
    assert flies(gateway, 5000, 53, external)
    assert flies(gateway, 5000, 54, external)
    gateway.assert_tables_agree()
    gateway.reap([further], REAP_FORCED)
    assert gateway.indexed() == []


def test_a_mapping_with_no_room_in_front(gateway: Gateway) -> None:
    """It is found in the table behind."""
    gateway.accelerate()
    fronts = gateway.tables.maps["fronts"].view()["entry"]
    fronts[:] = 0xFFFFFF
    external = gateway.open(udp(HOST, 5000, SERVER, 53))
    assert gateway.open(udp(HOST, 5000, SERVER, 54)) == external
    assert gateway.indexed() == []
    assert flies(gateway, 5000, 53, external)
    assert flies(gateway, 5000, 54, external)
    fronts[:] = 0
    gateway.assert_tables_agree()


def test_a_mapping_that_is_in_front_of_none(gateway: Gateway) -> None:
    """Closed, it leaves no entry; one that were left would lead XDP to nobody's session, and others nowhere."""
    gateway.accelerate()
    gateway.open(udp(HOST, 5000, SERVER, 53))
    fronts = gateway.tables.maps["fronts"].view()["entry"]
    former = fronts.copy()
    assert np.count_nonzero(former) == 1
    gateway.reap(gateway.slots(), REAP_FORCED)
    assert not fronts.any()
    fronts[:] = former
    external = gateway.open(udp(HOST, 5000, SERVER, 53))
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, external)).ip.dport == 5000
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == external
    assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53)).ended == "up_not_armed"
    fronts[:] = 0
    gateway.assert_tables_agree()


# --- the index -------------------------------------------------------------------------------------


def test_a_full_bucket(crowded: Gateway) -> None:
    """Whoever finds no room in it is told apart by the 5-tuple all the same, accelerated or not."""
    crowded.accelerate()
    remotes = range(53, 73)
    (external,) = {crowded.open(udp(HOST, 5000, SERVER, remote)) for remote in remotes}
    assert overflown(crowded) == 2 * 19 - BUCKET_ENTRIES
    crowded.assert_tables_agree()
    for remote in remotes:
        assert crowded.open(udp(HOST, 5000, SERVER, remote)) == external
        assert crowded.inbound(udp(SERVER, remote, GATEWAY, external)).ip.dport == 5000
        assert crowded.fast_outbound(udp(HOST, 5000, SERVER, remote)).port == external
    assert crowded.inbound(udp(SERVER, 73, GATEWAY, external)).ended == "drop_filtered"


def test_an_ended_session_makes_room(crowded: Gateway) -> None:
    for remote in range(53, 63):
        crowded.open(udp(HOST, 5000, SERVER, remote))
    assert overflown(crowded) == 2 * 9 - BUCKET_ENTRIES
    age(crowded.session(HOST, 5000, "udp", SERVER, 56), 301)
    crowded.reap(crowded.slots(), REAP_EXPIRED)
    crowded.open(udp(HOST, 5000, SERVER, 63))
    assert overflown(crowded) == 2 * 9 - BUCKET_ENTRIES
    crowded.assert_tables_agree()
    for slot in crowded.slots():
        age(crowded.tables.sessions[slot], 301)
    crowded.reap(crowded.slots(), REAP_EXPIRED)
    assert crowded.indexed() == []


def test_no_room_at_all(crowded: Gateway) -> None:
    """Who comes then is refused and leaves nothing, also when only one of two entries found room."""
    for remote in range(53, 61):
        crowded.open(udp(HOST, 5000, SERVER, remote))
    leave_no_room(crowded)
    others, entries = overflown(crowded), crowded.indexed()
    assert len(entries) - others == BUCKET_ENTRIES - 1
    assert crowded.outbound(udp(HOST, 5000, SERVER, 61)).ended == "drop_sessions_full"
    assert crowded.indexed() == entries
    crowded.open(udp(HOST, 6000, SERVER, 53))  # has a place, and needs none in the index
    for key in crowded.entries("overflow"):
        crowded.tables.maps["overflow"].delete(np.frombuffer(key, crowded.tables.maps["overflow"].key)[0])
    crowded.assert_tables_agree()


def test_an_entry_out_of_date_leads_nowhere(gateway: Gateway) -> None:
    """It may be read just before it goes, and its slot be another session's by then."""
    gateway.accelerate()
    gateway.open(udp(HOST, 5000, SERVER, 52))
    first = gateway.slot(HOST, 5000, "udp")
    for remote in (53, 54):
        expected = gateway.place_for(first, SERVER, remote)
        gateway.occupy(expected, expected ^ 1)
    gateway.open(udp(HOST, 5000, SERVER, 53))
    (further,) = (
        slot for slot in gateway.slots() if slot >= gateway.tables.further_base and slot in gateway.indexed()
    )
    external = first % PORTS
    buckets = gateway.tables.maps["buckets"].view()
    former = buckets["entry"].copy()
    gateway.reap([further], REAP_FORCED)
    row = gateway.tables.sessions[further]
    row["out"]["remote_port"] = row["in"]["remote_port"] = socket_order(54)  # another has been there since
    buckets["entry"] |= former
    assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53)).ended == "up_no_flow"
    assert gateway.fast_inbound(udp(SERVER, 53, GATEWAY, external)).ended == "up_no_flow"
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, external)).ended == "drop_filtered"
