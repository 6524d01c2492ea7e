"""Which external port a new mapping gets, and what happens when there is none."""

import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from harness import (
    EVERY_IDENTIFIER,
    FURTHER,
    GATEWAY,
    HOST,
    OTHER_SERVER,
    POOL,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    Result,
    age,
    ago,
    echo,
    tcp,
    udp,
    wan_frame,
)
from scapy.packet import Packet

from xdpmasq.abi import FURTHER_BASE, PORTS, REAP_FORCED, REAP_RESTED

HOSTS = [f"192.168.0.{i}" for i in range(2, 252)]


def _open_many(gateway: Gateway, count: int) -> list[int]:
    """External ports of new UDP mappings of as many internal endpoints."""
    frame = bytearray(wan_frame(udp(HOST, 0, SERVER, 53)))
    ports = []
    for i in range(count):  # by hand, because scapy would take most of the time; checksums stay as wrong as they are
        frame[29] = 2 + i % len(HOSTS)
        frame[34:36] = (1024 + i // len(HOSTS)).to_bytes(2, "big")
        ports.append(gateway.open(bytes(frame)))
    return ports


def _until_opened(gateway: Gateway, packet: Packet) -> Result:
    """The sender tries again: each packet looks at a few random places only."""
    for _ in range(200):
        result = gateway.outbound(packet)
        if result.ended != "drop_ports_exhausted":
            return result
    raise AssertionError("no port found")


@pytest.mark.req("7857-9")
def test_default_pool(gateway: Gateway) -> None:
    ports = np.array(_open_many(gateway, 3000))
    assert len(set(ports)) == len(ports)
    assert ports.min() >= 1024
    assert not ((ports >= 32768) & (ports <= 60999)).any(), "the gateway's own ephemeral ports"
    assert (ports >= 61000).any(), "the range above is used too"


@pytest.mark.req("6888-15")
@pytest.mark.req("7857-9")
@pytest.mark.req("attacks-predict")
def test_ports_look_random(gateway: Gateway) -> None:
    """10,000 ports over 32 equal boxes of the pool (chi-square), and no trend from one to the next (runs)."""
    (low, count), (high, _) = POOL
    ports = np.array(_open_many(gateway, 10_000))
    place = np.where(ports < high, ports - low, ports - high + count)
    boxes = np.bincount(place * 32 // sum(n for _, n in POOL), minlength=32)
    expected = len(ports) / 32
    # Without replacement the spread is below chi-square's; 80.0 leaves one false alarm in three million.
    assert ((boxes - expected) ** 2 / expected).sum() < 80.0
    rises = (np.diff(place) > 0).sum()  # mean n/2, variance n/12
    assert abs(rises - len(ports) / 2) < 6 * (len(ports) / 12) ** 0.5


def test_identifiers_use_their_whole_space(gateway: Gateway) -> None:
    numbers = {gateway.open(echo(host, SERVER, 1)) for host in HOSTS}
    assert len(numbers) == len(HOSTS)
    assert min(numbers) < 16384
    assert max(numbers) > 49152


@pytest.mark.req("6888-13")
@pytest.mark.req("4787-11")
def test_every_port_of_the_pool_can_be_had(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 700), (50000, 300)))
    ports = _open_many(gateway, 1000)
    assert set(ports) == {*range(3000, 3700), *range(50000, 50300)}
    for remote_port in (53, 54, 55):  # endpoint-independent at 100 % as at 0 %
        assert gateway.open(udp(HOSTS[7], 1024, SERVER, remote_port)) == ports[7]


@pytest.mark.req("4787-11")
@pytest.mark.parametrize("percent", [0, 50, 99])
def test_default_pool_in_use(gateway: Gateway, percent: int) -> None:
    """However full: a port that was free, its own for each host, one for all remotes, and closed to strangers."""
    bits = np.unpackbits(gateway.tables.claims.view(np.uint8), bitorder="little")
    free = np.flatnonzero(bits[PORTS : 2 * PORTS] == 0)
    left = set(np.random.default_rng(1).choice(free, len(free) * (100 - percent) // 100, replace=False))
    bits[[PORTS + port for port in free if port not in left]] = 1
    gateway.tables.claims[:] = np.packbits(bits, bitorder="little").view(np.uint64)
    ports = _open_many(gateway, len(free) // 200)
    assert len(set(ports)) == len(ports)
    assert set(ports) <= left
    for host, port in zip(HOSTS[:60], ports, strict=False):  # all with source port 1024
        assert {gateway.open(udp(host, 1024, *remote)) for remote in ((SERVER, 54), (OTHER_SERVER, 53))} == {port}
        assert gateway.inbound(udp(OTHER_SERVER, 53, GATEWAY, port)).ip.dst == host
        assert gateway.inbound(udp(OTHER_SERVER, 54, GATEWAY, port)).ended == "drop_filtered"


@pytest.mark.req("reliability-full")
def test_exhaustion_refuses_the_new_and_spares_the_old(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 20),))
    ports = _open_many(gateway, 20)
    refused = gateway.outbound(udp(HOST, 9999, SERVER, 53))
    assert (refused.ended, refused.counted) == ("drop_ports_exhausted", {})
    for host, port in zip(HOSTS, ports, strict=False):
        assert gateway.open(udp(host, 1024, SERVER, 53)) == port
        assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ip.dst == host
    assert gateway.open(tcp(HOST, 9999, SERVER, 53, SYN)) not in ports, "TCP has its own ports"
    gateway.reap([gateway.slot(HOSTS[3], 1024, "udp")], REAP_FORCED)
    assert _until_opened(gateway, udp(HOST, 9999, SERVER, 53)).port == ports[3], "recovers without a restart"


@pytest.mark.req("6888-8")
def test_a_closed_port_rests(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 2),))
    first, second = _open_many(gateway, 2)
    slot = gateway.slot(HOSTS[0], 1024, "udp")
    gateway.reap([slot], REAP_FORCED)
    assert gateway.is_claimed(slot), "resting, not free"
    gateway.reap([slot], REAP_RESTED)
    assert not gateway.is_claimed(slot)
    assert gateway.open(udp(HOST, 9999, SERVER, 53)) == first
    assert second != first


@pytest.mark.req("6888-8")
def test_resting_ports_are_avoided_while_others_are_free(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 64),))
    resting = set(_open_many(gateway, 32))
    gateway.reap(gateway.slots(), REAP_FORCED)
    assert {gateway.open(udp(host, 2000, SERVER, 53)) for host in HOSTS[:32]}.isdisjoint(resting)


def test_an_expired_mapping_gives_way_when_the_pool_is_used_up(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 8),))
    ports = _open_many(gateway, 8)
    age(gateway.session(HOSTS[5], 1024, "udp", SERVER, 53), 301)
    reopened = _until_opened(gateway, udp(HOST, 9999, SERVER, 53))
    assert reopened.port == ports[5]
    assert reopened.counted == {
        "session_closed": 1, "mapping_closed": 1, "mapping_reclaimed": 1, "mapping_opened": 1, "session_opened": 1,
    }  # fmt: skip
    assert gateway.slot(HOSTS[5], 1024, "udp") is None
    assert all(gateway.slot(host, 1024, "udp") for host in (*HOSTS[:5], *HOSTS[6:8]))


# --- the gateway's own sockets ---------------------------------------------------------------------


@pytest.fixture
def listening(gateway: Gateway) -> Iterator[set[int]]:
    """Ports 3001, 3003, 3005: a socket of the gateway's own on each, in each of the ways there are."""
    with ExitStack() as stack:
        for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
            for address, port in (("0.0.0.0", 3001), (GATEWAY, 3003)):
                opened = stack.enter_context(socket.socket(socket.AF_INET, kind))
                opened.bind((address, port))
                if kind == socket.SOCK_STREAM:
                    opened.listen()
            dual = stack.enter_context(socket.socket(socket.AF_INET6, kind))
            dual.bind(("::", 3005))
            if kind == socket.SOCK_STREAM:
                dual.listen()
        yield {3001, 3003, 3005}


@pytest.mark.req("attacks-port_shadow")
@pytest.mark.parametrize("protocol", ["udp", "tcp"])
def test_never_a_port_on_which_the_gateway_listens(gateway: Gateway, listening: set[int], protocol: str) -> None:
    gateway.pool(**{protocol: ((3000, 6),)})
    used: Counter[str] = Counter()
    for port in range(2000, 2200):
        packet = udp(HOST, port, SERVER, 53) if protocol == "udp" else tcp(HOST, port, SERVER, 53, SYN)
        result = gateway.outbound(packet)
        used[result.ended] += 1
        if result.ended == "slow_outbound":
            assert result.port not in listening
            slot = gateway.slot(HOST, port, protocol)
            gateway.reap([slot], REAP_FORCED)
            gateway.reap([slot], REAP_RESTED)
    # Four random tries and a scan all meet listeners now and then: that packet is dropped, the next one finds a port.
    assert used["slow_outbound"] > 150
    for port in listening:
        assert not gateway.is_claimed(["tcp", "udp"].index(protocol) * PORTS + port), "a refused port is put back"


@pytest.mark.req("attacks-port_shadow")
def test_only_ports_with_listeners_left(gateway: Gateway, listening: set[int]) -> None:
    gateway.pool(udp=((3001, 1), (3003, 1)))
    assert gateway.outbound(udp(HOST, 5000, SERVER, 53)).ended == "drop_ports_exhausted"
    assert gateway.slots() == []


# --- further sessions ------------------------------------------------------------------------------


@pytest.mark.req("reliability-full")
def test_further_sessions_full(gateway: Gateway) -> None:
    external = {gateway.open(udp(HOST, 5000, SERVER, 1000 + i)) for i in range(FURTHER + 1)}
    assert len(external) == 1
    assert gateway.outbound(udp(HOST, 5000, SERVER, 9)).ended == "drop_sessions_full"
    assert gateway.open(udp(HOST, 5001, SERVER, 9)), "a first session needs none"
    for i in range(FURTHER + 1):
        assert gateway.inbound(udp(SERVER, 1000 + i, GATEWAY, *external)).ended == "slow_inbound"
    slot = next(slot for slot in gateway.slots() if slot >= FURTHER_BASE)
    gateway.reap([slot], REAP_FORCED)
    gateway.reap([slot], REAP_RESTED)
    assert {gateway.open(udp(HOST, 5000, SERVER, 9))} == external, "recovers"


def test_a_mapping_whose_first_session_ended_takes_the_next_in_its_place(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 1))
    gateway.open(udp(HOST, 5000, SERVER, 2))
    mapping = gateway.slot(HOST, 5000, "udp")
    gateway.reap([mapping], REAP_FORCED)
    assert gateway.session(HOST, 5000, "udp", SERVER, 2)["life"], "the further one lives"
    gateway.open(udp(HOST, 5000, SERVER, 3))
    assert gateway.session(HOST, 5000, "udp", SERVER, 3)["mapping"] == mapping
    assert len(gateway.slots()) == 2


def test_the_place_of_an_expired_first_session_is_taken(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 1))
    age(gateway.session(HOST, 5000, "udp", SERVER, 1), 301)
    result = gateway.outbound(udp(HOST, 5000, SERVER, 2))
    assert (result.port, result.counted) == (port, {"session_closed": 1, "session_opened": 1})
    assert gateway.inbound(udp(SERVER, 1, GATEWAY, port)).ended == "drop_filtered"
    assert gateway.inbound(udp(SERVER, 2, GATEWAY, port)).ended == "slow_inbound"


def test_settings_reach_the_programs(gateway: Gateway) -> None:
    gateway.pool(icmp=((7, 1), (0, 0)))
    assert gateway.open(echo(HOST, SERVER, 1000)) == 7
    assert gateway.outbound(echo(HOST, SERVER, 1001)).ended == "drop_ports_exhausted"
    gateway.tables.set_settings(icmp=TICKS)
    session = gateway.session(HOST, 1000, "icmp", SERVER)
    session["out"]["last_seen"] = session["in"]["last_seen"] = ago(1.01)
    assert gateway.inbound(echo(SERVER, GATEWAY, 7)).ended == "own_inbound"
    assert EVERY_IDENTIFIER[0] == (0, PORTS)
