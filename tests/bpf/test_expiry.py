"""Sessions end: seen by packets in the kernel, closed by the reaper, their ports rested and returned."""

import numpy as np
import pytest
from harness import (
    GATEWAY,
    HOST,
    LIFE_FURTHER,
    OTHER_HOST,
    OTHER_SERVER,
    POOL,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    ago,
    echo,
    echo_reply,
    next_tick,
    since,
    tcp,
    udp,
)
from scapy.packet import Packet

from xdpmasq import bpf
from xdpmasq.abi import (
    FURTHER_BASE,
    LIFE_FURTHER_MASK,
    LIFE_LIVE,
    LIFE_RESTING,
    LIFE_SESSION,
    LIFE_STATE,
    PORTS,
    REAP_EXPIRED,
    REAP_FORCED,
    REAP_RESTED,
)
from xdpmasq.expiry import Expiry
from xdpmasq.tables import Tables

REAP_CLAIM = 3  # bpf/reaper.c
LIFE_OPENING = 3  # bpf/types.h

OUT = {
    "udp": (udp(HOST, 5000, SERVER, 53), ("udp", SERVER, 53), 300),
    "tcp": (tcp(HOST, 5000, SERVER, 80, SYN), ("tcp", SERVER, 80), 240),
    "icmp": (echo(HOST, SERVER, 5000), ("icmp", SERVER, 0), 60),
}


def _answer(class_: str, port: int) -> Packet:
    return {
        "udp": udp(SERVER, 53, GATEWAY, port),
        "tcp": tcp(SERVER, 80, GATEWAY, port, SYN | 0x10),
        "icmp": echo_reply(SERVER, GATEWAY, port),
    }[class_]


@pytest.mark.req("4787-5")
@pytest.mark.req("5508-2")
@pytest.mark.parametrize(("packet", "key", "limit"), OUT.values(), ids=OUT)
def test_limits_in_the_kernel(gateway: Gateway, packet: Packet, key: tuple[str, str, int], limit: int) -> None:
    port = gateway.open(packet)
    row = gateway.session(HOST, 5000, *key)
    age(row, limit - 1)
    assert gateway.inbound(_answer(key[0], port)).ended == "slow_inbound"
    age(row, limit + 1)
    assert gateway.inbound(_answer(key[0], port)).ended == ("own_inbound" if key[0] == "icmp" else "drop_filtered")
    again = gateway.outbound(packet)
    assert (again.port, again.counted) == (port, {"session_reopened": 1})
    assert (row["sent"]["packets"], row["received"]["packets"]) == (1, 0), "started anew"
    assert gateway.inbound(_answer(key[0], port)).ended == "slow_inbound"


@pytest.mark.req("4787-6")
def test_outbound_refreshes(gateway: Gateway) -> None:
    packet, key, _ = OUT["udp"]
    gateway.tables.set_settings(inbound_refresh=0)
    port = gateway.open(packet)
    row = gateway.session(HOST, 5000, *key)
    age(row, 299)
    assert gateway.open(packet) == port
    assert since(int(row["out"]["last_seen"])) < TICKS


@pytest.mark.req("4787-6")
@pytest.mark.parametrize(("refresh", "ended"), [(1, "slow_inbound"), (0, "drop_filtered")], ids=["on", "off"])
def test_inbound_refresh_is_configurable(gateway: Gateway, refresh: int, ended: str) -> None:
    packet, key, _ = OUT["udp"]
    gateway.tables.set_settings(inbound_refresh=refresh)
    port = gateway.open(packet)
    row = gateway.session(HOST, 5000, *key)
    row["out"]["last_seen"] = ago(301)
    row["in"]["last_seen"] = ago(299)
    assert gateway.inbound(_answer("udp", port)).ended == ended
    row["out"]["last_seen"] = ago(301)
    row["in"]["last_seen"] = ago(299)
    assert bool(gateway.reap([gateway.slot(HOST, 5000, "udp")])) == (not refresh)


def test_clocks_of_two_cpus(gateway: Gateway) -> None:
    """Another CPU may be a jiffy ahead: last seen in the future is not long ago."""
    packet, key, _ = OUT["udp"]
    port = gateway.open(packet)
    row = gateway.session(HOST, 5000, *key)
    for name in ("out", "in"):
        row[name]["last_seen"] = bpf.jiffies() + 50
    assert gateway.inbound(_answer("udp", port)).ended == "slow_inbound"
    assert gateway.reap(gateway.slots()) == {}


# --- the reaper ------------------------------------------------------------------------------------


def test_reaper_spares_the_living(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    before = gateway.tables.sessions[gateway.slots()[0]].tobytes()
    assert gateway.reap(gateway.slots(), REAP_EXPIRED) == {}
    assert gateway.reap(gateway.slots(), REAP_RESTED) == {}
    assert gateway.tables.sessions[gateway.slots()[0]].tobytes() == before


@pytest.mark.req("7857-11")
@pytest.mark.parametrize("order", [REAP_EXPIRED, REAP_FORCED], ids=["expired", "forced"])
def test_a_mapping_closes_with_its_last_session(gateway: Gateway, order: int) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    (slot,) = gateway.slots()
    if order == REAP_EXPIRED:
        age(gateway.tables.sessions[slot], 301)
    assert gateway.reap([slot], order) == {"session_closed": 1, "mapping_closed": 1}
    assert gateway.mappings == 0
    assert gateway.tables.sessions[slot]["life"] & LIFE_STATE == LIFE_RESTING
    assert since(int(gateway.tables.sessions[slot]["out"]["last_seen"])) < TICKS, "its rest begins"
    assert gateway.is_claimed(slot)
    assert gateway.inbound(_answer("udp", port)).ended == "own_inbound"
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) != port, "the host gets another"


GROUNDED = {"up_not_armed", "up_no_flow"}  # while it rests it may still be found


def test_a_closed_session_no_longer_flies(gateway: Gateway) -> None:
    """Neither the first session of a mapping, nor a further one, nor the last."""
    gateway.accelerate()
    remotes = [(SERVER, 53), (OTHER_SERVER, 53)]
    for remote in remotes:
        port = gateway.open(udp(HOST, 5000, *remote))
        gateway.inbound(udp(*remote, GATEWAY, port))
        gateway.learn(udp(*remote, HOST, 5000))
    first = gateway.slot(HOST, 5000, "udp")
    (further,) = (slot for slot in gateway.slots() if slot != first)

    def fly(remote: tuple[str, int]) -> list[str]:
        outbound = gateway.fast_outbound(udp(HOST, 5000, *remote)).ended
        return [outbound, gateway.fast_inbound(udp(*remote, GATEWAY, port)).ended]

    assert fly(remotes[0]) == fly(remotes[1]) == ["fast_outbound", "fast_inbound"]
    gateway.reap([first], REAP_FORCED)
    assert set(fly(remotes[0])) <= GROUNDED
    assert fly(remotes[1]) == ["fast_outbound", "fast_inbound"]
    gateway.reap([further], REAP_FORCED)
    assert set(fly(remotes[1])) <= GROUNDED
    gateway.open(udp(HOST, 5000, *remotes[0]))
    next_tick()
    gateway.open(udp(HOST, 5000, *remotes[0]))
    gateway.inbound(udp(*remotes[0], GATEWAY, port))
    gateway.learn(udp(*remotes[0], HOST, 5000))
    assert fly(remotes[0]) == ["fast_outbound", "fast_inbound"]
    gateway.reap([first], REAP_FORCED)
    assert set(fly(remotes[0])) <= GROUNDED


@pytest.mark.parametrize("further", [False, True], ids=["mapping", "further session"])
def test_the_entry_of_another_slot_is_left_alone(gateway: Gateway, further: bool) -> None:
    """A CPU fills a slot and has not made it live yet, or was second to do so: the entries are another's."""
    remotes = [(SERVER, 53), (SERVER, 54)] if further else [(SERVER, 53)]
    (port,) = {gateway.open(udp(HOST, 5000, *remote)) for remote in remotes}
    slot = max(gateway.slots())
    twin = FURTHER_BASE + (slot + 1 - FURTHER_BASE) % 256 if further else slot ^ 1
    sessions = gateway.tables.sessions
    sessions[twin] = sessions[slot]
    if further:
        sessions[gateway.slot(HOST, 5000, "udp")]["life"] += LIFE_FURTHER
    else:
        sessions[twin]["mapping"] = twin
    sessions[twin]["life"] |= LIFE_OPENING
    assert gateway.reap([twin], REAP_FORCED) == {}, "it is being opened"
    sessions[twin]["life"] = LIFE_LIVE | LIFE_SESSION
    age(sessions[twin], 301)
    assert gateway.reap([twin], REAP_EXPIRED)["session_closed"] == 1
    assert gateway.open(udp(HOST, 5000, *remotes[-1])) == port
    assert gateway.session(HOST, 5000, "udp", *remotes[-1])["life"] & LIFE_SESSION


def test_a_mapping_with_further_sessions_stays(gateway: Gateway) -> None:
    remotes = [(SERVER, 53), (SERVER, 54), (OTHER_SERVER, 53)]
    (port,) = {gateway.open(udp(HOST, 5000, *remote)) for remote in remotes}
    mapping = gateway.slot(HOST, 5000, "udp")
    further = [slot for slot in gateway.slots() if slot >= FURTHER_BASE]
    row = gateway.tables.sessions[mapping]
    assert row["life"] & LIFE_FURTHER_MASK == 2 << 8

    assert gateway.reap([mapping], REAP_FORCED) == {"session_closed": 1}
    assert not row["life"] & LIFE_SESSION
    assert gateway.reap([mapping], REAP_FORCED) == {}
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ended == "drop_filtered"
    assert gateway.inbound(udp(SERVER, 54, GATEWAY, port)).ip.dst == HOST

    assert gateway.reap(further[:1], REAP_FORCED) == {"session_closed": 1}
    assert row["life"] & LIFE_FURTHER_MASK == 1 << 8
    assert gateway.reap([mapping], REAP_EXPIRED) == {}
    assert gateway.reap(further, REAP_FORCED) == {"session_closed": 1}
    assert row["life"] & LIFE_FURTHER_MASK == 0
    assert gateway.reap([mapping], REAP_EXPIRED) == {"mapping_closed": 1}
    assert gateway.mappings == 0
    assert gateway.reap(further, REAP_RESTED) == {}
    assert not any(gateway.is_claimed(slot) for slot in further)


def test_orders_for_free_and_foreign_slots_do_nothing(gateway: Gateway) -> None:
    slots = [0, 5, 65535, FURTHER_BASE, FURTHER_BASE + 255, FURTHER_BASE + 256, 2**32 - 1]
    claims = gateway.tables.claims.copy()
    for order in (REAP_EXPIRED, REAP_FORCED, REAP_RESTED, 99):
        assert gateway.reap(slots, order) == {}
    assert (gateway.tables.claims == claims).all()
    assert gateway.slots() == []


def test_slots_taken_out_of_the_pool(gateway: Gateway) -> None:
    """For an agent that has narrowed the pool under running sessions: taken, whoever holds them."""
    gateway.pool(udp=((3000, 2),))
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.reap([PORTS + 3000, PORTS + 3001], REAP_CLAIM)
    assert gateway.outbound(udp(HOST, 5001, SERVER, 53)).ended == "drop_ports_exhausted"
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ended == "slow_inbound"


def test_many_at_once(gateway: Gateway) -> None:
    """More than one run of the reaper takes."""
    for number in range(600):
        gateway.open(echo(HOST, SERVER, number))
    assert gateway.reap(gateway.slots(), REAP_FORCED) == {"session_closed": 600, "mapping_closed": 600}


# --- the agent's pass ------------------------------------------------------------------------------


@pytest.fixture(params=["whole table", "row by row"])
def expiry(gateway: Gateway, request: pytest.FixtureRequest) -> Expiry:
    reaper, tables = gateway.bench.programs["masq_reap"], Tables(gateway.tables.maps)
    if request.param == "whole table":
        assert len(tables.sessions)
    return Expiry(tables, reaper, gateway.tables.claims.copy(), 120 * TICKS, TICKS)


@pytest.mark.req("6888-8")
def test_pass_over_the_table(gateway: Gateway, expiry: Expiry) -> None:
    for packet, _, _ in OUT.values():
        gateway.open(packet)
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    alive = gateway.slot(OTHER_HOST, 5000, "udp")
    for slot in gateway.slots():
        if slot != alive:
            age(gateway.tables.sessions[slot], 301)
    expiry.run()  # the mapping with a further session keeps its place until the next pass
    expiry.run()
    assert gateway.mappings == 1
    lives = gateway.tables.sessions["life"][gateway.slots()]
    assert sorted(lives & LIFE_STATE) == [1, 2, 2, 2, 2]

    for slot in gateway.slots():
        if slot != alive:
            seconds = 119 if slot < FURTHER_BASE else 2
            gateway.tables.sessions[slot]["out"]["last_seen"] = ago(seconds)
    expiry.run()
    assert len(gateway.slots()) == 4, "the further slot rests a second only, ports 120"
    for slot in gateway.slots():
        if slot != alive:
            gateway.tables.sessions[slot]["out"]["last_seen"] = ago(121)
    expiry.run()
    assert gateway.slots() == [alive]
    claimed = np.unpackbits(gateway.tables.claims.view(np.uint8)).sum()
    outside = 2 * (65536 - sum(count for _, count in POOL))
    assert claimed == outside + 1


@pytest.mark.req("6888-8")
@pytest.mark.parametrize(("in_use", "rested"), [pytest.param(100, 0, id="plenty"), pytest.param(127, 1, id="scarce")])
def test_no_rest_in_a_pool_that_is_all_but_used_up(gateway: Gateway, in_use: int, rested: int) -> None:
    gateway.pool(udp=((3000, 64), (50000, 64)))
    reserved = gateway.tables.claims.copy()
    for number in range(in_use + 1):
        gateway.open(udp(HOST, 5000 + number, SERVER, 53))
    ended = gateway.slot(HOST, 5000, "udp")
    gateway.reap([ended], REAP_FORCED)
    gateway.tables.sessions[ended]["out"]["last_seen"] = ago(2)
    Expiry(gateway.tables, gateway.bench.programs["masq_reap"], reserved, 120 * TICKS, TICKS).run()
    assert len(gateway.slots()) == in_use + 1 - rested
