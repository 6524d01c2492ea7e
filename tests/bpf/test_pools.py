"""Choosing among the ports: kept, of the same parity, below 1024, and shared where there are none left."""

import pytest
from harness import (
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    SERVER,
    SYN,
    Gateway,
    age,
    echo,
    tcp,
    udp,
)

from xdpmasq.abi import CLASS_ROOM, REAP_EXPIRED

THIRD_HOST = "192.168.0.4"


def low_pool(gateway: Gateway, first: int, count: int) -> None:
    """A pool for internal ports below 1024."""
    pools = gateway.tables.settings["pool"].copy()
    for class_ in range(2):
        pools[CLASS_ROOM + class_] = ((first, 0), (count, 0))
        base = class_ * 65536
        for port in range(first, first + count):
            gateway.tables.claims[(base + port) // 64] &= ~(1 << (base + port) % 64) & (2**64 - 1)
    gateway.tables.set_settings(pool=pools)


# --- kept ------------------------------------------------------------------------------------------


def test_preserved(gateway: Gateway) -> None:
    """Where it is of the pool, and nobody has it."""
    gateway.tables.set_settings(preserve=1)
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 5000
    assert gateway.open(tcp(HOST, 5000, SERVER, 53, SYN)) == 5000
    assert gateway.open(udp(OTHER_HOST, 5000, SERVER, 53)) != 5000
    assert gateway.open(udp(HOST, 80, SERVER, 53)) >= 1024
    assert not 32768 <= gateway.open(udp(HOST, 40000, SERVER, 53)) < 61000, "the gateway's own"
    gateway.assert_tables_agree()


def test_not_preserved_by_default(gateway: Gateway) -> None:
    assert [gateway.open(udp(HOST, 5000 + i, SERVER, 53)) == 5000 + i for i in range(20)].count(True) < 3


# --- parity ----------------------------------------------------------------------------------------


@pytest.mark.req("4787-4")
def test_parity(gateway: Gateway) -> None:
    """RTP's ports are even, RTCP's odd."""
    gateway.tables.set_settings(parity=1)
    for number in range(150):
        for protocol in (udp(HOST, 5000 + number, SERVER, 53), tcp(HOST, 5000 + number, SERVER, 53, SYN)):
            assert gateway.open(protocol) % 2 == number % 2


@pytest.mark.req("4787-4")
@pytest.mark.parametrize("parity", [0, 1], ids=["even", "odd"])
def test_parity_in_a_full_pool(gateway: Gateway, parity: int) -> None:
    """All of the parity can be had, and none of the other is given."""
    gateway.tables.set_settings(parity=1)
    gateway.pool(udp=((3000, 40), (50001, 20)))
    ports = {gateway.open(udp(HOST, 5000 + 2 * number + parity, SERVER, 53)) for number in range(30)}
    assert ports == {port for port in (*range(3000, 3040), *range(50001, 50021)) if port % 2 == parity}
    assert gateway.outbound(udp(HOST, 9000 + parity, SERVER, 53)).ended == "drop_ports_exhausted"
    assert gateway.open(udp(HOST, 9001 - parity, SERVER, 53)) % 2 != parity


# --- low ports -------------------------------------------------------------------------------------


@pytest.mark.req("4787-3a")
@pytest.mark.parametrize("parity", [0, 1])
def test_low_ports_map_to_low_ones(gateway: Gateway, parity: int) -> None:
    gateway.tables.set_settings(parity=parity)
    low_pool(gateway, 600, 400)
    for port in (1, 123, 500, 1023):
        for packet in (udp(HOST, port, SERVER, 53), tcp(HOST, port, SERVER, 53, SYN)):
            assert 600 <= gateway.open(packet) < 1000
    for port in (1024, 5000, 65535):
        assert gateway.open(udp(HOST, port, SERVER, 53)) >= 1024
    gateway.assert_tables_agree()


def test_low_ports_used_up_are_no_higher_ones(gateway: Gateway) -> None:
    low_pool(gateway, 640, 2)
    assert {gateway.open(udp(HOST, port, SERVER, 53)) for port in (1, 2)} == {640, 641}
    assert gateway.outbound(udp(HOST, 3, SERVER, 53)).ended == "drop_ports_exhausted"
    gateway.open(udp(HOST, 1024, SERVER, 53))


# --- shared ----------------------------------------------------------------------------------------


@pytest.fixture
def shared(gateway: Gateway) -> Gateway:
    """One port, which HOST has for SERVER."""
    gateway.pool(udp=((3000, 1),), tcp=((3000, 1),), icmp=((3000, 1),))
    gateway.tables.set_settings(overload=1)
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == 3000
    return gateway


def test_two_hosts_share_a_port_for_different_remotes(shared: Gateway) -> None:
    assert shared.open(udp(OTHER_HOST, 5000, OTHER_SERVER, 53)) == 3000
    assert shared.open(udp(THIRD_HOST, 6000, SERVER, 54)) == 3000
    for remote, host, port in (
        ((SERVER, 53), HOST, 5000),
        ((OTHER_SERVER, 53), OTHER_HOST, 5000),
        ((SERVER, 54), THIRD_HOST, 6000),
    ):
        answer = shared.inbound(udp(*remote, GATEWAY, 3000))
        assert (answer.ip.dst, answer.ip.dport) == (host, port)
        result = shared.outbound(udp(host, port, *remote))
        assert (result.port, result.counted) == (3000, {})
    shared.assert_tables_agree()


def test_not_for_the_same_remote(shared: Gateway) -> None:
    assert shared.outbound(udp(OTHER_HOST, 5000, SERVER, 53)).ended == "drop_reply_taken"
    assert shared.inbound(udp(SERVER, 53, GATEWAY, 3000)).ip.dst == HOST
    shared.assert_tables_agree()


def test_not_a_forwards_or_a_pinholes(gateway: Gateway) -> None:
    """Which stands for its endpoint while no session runs there: the others of the pool are shared."""
    gateway.pool(udp=((3000, 2),))
    gateway.tables.set_settings(overload=1)
    gateway.forward("udp", 3000, (HOST, 5000))
    assert gateway.open(udp(HOST, 6000, SERVER, 53)) == 3001
    for number in range(20):
        assert gateway.open(udp(OTHER_HOST, 5000 + number, OTHER_SERVER, number)) == 3001
    assert gateway.outbound(udp(HOST, 5000, SERVER, 99)).port == 3000
    gateway.assert_tables_agree()


@pytest.mark.parametrize("owners", ["alive", "expired"])
def test_the_owner_does_not_take_the_others_remote(shared: Gateway, owners: str) -> None:
    shared.open(udp(OTHER_HOST, 5000, OTHER_SERVER, 53))
    if owners == "expired":
        age(shared.session(HOST, 5000, "udp", SERVER, 53), 301)
    assert shared.outbound(udp(HOST, 5000, OTHER_SERVER, 53)).verdict == "drop"
    assert shared.inbound(udp(OTHER_SERVER, 53, GATEWAY, 3000)).ip.dst == OTHER_HOST
    assert shared.open(udp(HOST, 5000, SERVER, 99)) == 3000, "to others it goes on"
    shared.assert_tables_agree()


def test_the_ends_of_shared_sessions(shared: Gateway) -> None:
    shared.open(udp(OTHER_HOST, 5000, OTHER_SERVER, 53))
    assert shared.host(OTHER_HOST) == (1, 0, 0, 0)
    for slot in shared.slots():
        age(shared.tables.sessions[slot], 301)
    result = shared.outbound(udp(OTHER_HOST, 5000, OTHER_SERVER, 53))
    assert (result.port, result.counted) == (3000, {"session_reopened": 1})
    for slot in shared.slots():
        age(shared.tables.sessions[slot], 301)
    for _ in range(2):
        shared.reap(shared.slots(), REAP_EXPIRED)
    assert shared.host(OTHER_HOST) == shared.host(HOST) == (0, 0, 0, 0)
    assert shared.entries("mappings") == {}
    assert shared.indexed() == []
    shared.assert_tables_agree()


def test_queries_and_segments_share_too(shared: Gateway) -> None:
    assert shared.open(echo(HOST, SERVER, 1)) == shared.open(echo(OTHER_HOST, OTHER_SERVER, 2)) == 3000
    opened = [shared.open(tcp(host, 7, remote, 80, SYN)) for host, remote in ((HOST, SERVER), (OTHER_HOST, ROUTER))]
    assert opened == [3000, 3000]
    shared.assert_tables_agree()


ROUTER = "198.51.100.254"


@pytest.mark.req("4787-3")
@pytest.mark.req("5382-7")
def test_never_by_default(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 1),), tcp=((3000, 1),))
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(tcp(HOST, 5000, SERVER, 53, SYN))
    assert gateway.outbound(udp(OTHER_HOST, 5000, OTHER_SERVER, 53)).ended == "drop_ports_exhausted"
    assert gateway.outbound(tcp(OTHER_HOST, 5000, OTHER_SERVER, 53, SYN)).ended == "drop_ports_exhausted"
