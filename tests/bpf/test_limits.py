"""Limits for each internal host (RFC 6888 REQ-4): refused beyond them, counted exactly, given back at every end."""

import random
from ipaddress import IPv4Address

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    PUNT_REFUSED,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    ago,
    echo,
    tcp,
    udp,
)
from scapy.packet import Packet

from xdpmasq import abi, bpf
from xdpmasq.abi import REAP_EXPIRED, REAP_FORCED, REAP_RESTED

OPENING = {
    "tcp": lambda number: tcp(HOST, 5000 + number, SERVER, 80, SYN),
    "udp": lambda number: udp(HOST, 5000 + number, SERVER, 53),
    "icmp": lambda number: echo(HOST, SERVER, 5000 + number),
}
EACH_CLASS = pytest.mark.parametrize("class_", OPENING)


def limit(gateway: Gateway, **limits: int) -> None:
    gateway.tables.set_settings(**{f"host_{name}": value for name, value in limits.items()})


@pytest.mark.req("6888-4")
@EACH_CLASS
def test_mappings(gateway: Gateway, class_: str) -> None:
    limit(gateway, mappings=3)
    for number in range(3):
        gateway.open(OPENING[class_](number))
    assert gateway.outbound(OPENING[class_](3)).ended == "drop_host_limit"
    gateway.open(OPENING[class_](0))  # what is there goes on
    (other,) = set(OPENING) - {class_, "icmp"} if class_ != "icmp" else {"udp"}
    gateway.open(OPENING[other](3))
    gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    assert gateway.host(HOST)[1 + abi.CLASSES.index(class_)] == 3
    gateway.assert_tables_agree()


@pytest.mark.req("6888-4")
def test_sessions(gateway: Gateway) -> None:
    limit(gateway, sessions=4)
    for number in range(4):
        gateway.open(udp(HOST, 5000, SERVER, 50 + number))
    assert gateway.outbound(udp(HOST, 5000, SERVER, 99)).ended == "drop_host_limit"
    assert gateway.outbound(tcp(HOST, 5000, SERVER, 99, SYN)).ended == "drop_host_limit"
    assert gateway.host(HOST)[0] == 4
    gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    further = max(gateway.slots())
    gateway.reap([further], REAP_FORCED)
    gateway.open(udp(HOST, 5000, SERVER, 99))
    gateway.assert_tables_agree()


@pytest.mark.req("6888-4")
def test_rate(gateway: Gateway) -> None:
    """A bucket of 5, which 10 a second fill."""
    limit(gateway, rate=10, burst=5)
    for number in range(5):
        gateway.open(OPENING["udp"](number))
    assert gateway.outbound(OPENING["udp"](5)).ended == "drop_host_rate"
    gateway.open(OPENING["udp"](0))
    gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    hosts = gateway.tables.maps["hosts"]
    key = abi.addr(IPv4Address(HOST))
    for seconds, more in ((0.31, 3), (1000, 5)):
        host = hosts.get(key).copy()
        assert host["tokens"] == 0
        host["refilled_at"] = ago(seconds)
        limit(gateway, rate=10)
        hosts.set(key, host)
        results = [gateway.outbound(OPENING["tcp"](100 * more + number)).ended for number in range(more + 1)]
        assert results == ["slow_outbound"] * more + ["drop_host_rate"]
    assert hosts.get(key)["refused"] == 3


@pytest.mark.req("6888-4")
@pytest.mark.req("5508-8")
@pytest.mark.req("6888-11")
@pytest.mark.parametrize(
    ("settings", "ended"),
    [
        ({"host_mappings": 0}, "drop_host_limit"),
        ({"host_sessions": 0}, "drop_host_limit"),
        ({"host_burst": 0}, "drop_host_rate"),
        ({"external": [abi.addr(None)]}, "drop_no_external"),
    ],
    ids=["mappings", "sessions", "rate", "no address"],
)
def test_the_sender_is_told(gateway: Gateway, settings: dict[str, object], ended: str) -> None:
    """By the agent, which gets the very packet; dropped without a word when it is dead."""
    gateway.tables.set_settings(**settings)
    packet = udp(HOST, 5000, SERVER, 53)
    assert gateway.outbound(packet).verdict == "drop"
    gateway.attend()
    result = gateway.outbound(packet)
    assert (result.verdict, result.ended, result.punted) == ("redirect", ended, PUNT_REFUSED)
    gateway.tables.set_settings(heartbeat=ago(11))
    assert gateway.outbound(packet).verdict == "drop"
    gateway.assert_tables_agree()


@pytest.mark.req("5508-8")
@pytest.mark.req("6888-11")
def test_the_sender_is_told_of_a_used_up_pool(gateway: Gateway) -> None:
    gateway.attend()
    gateway.pool(udp=((3000, 2),))
    for number in range(2):
        gateway.open(OPENING["udp"](number))
    result = gateway.outbound(OPENING["udp"](2))
    assert (result.ended, result.punted) == ("drop_ports_exhausted", PUNT_REFUSED)
    for number in range(2):
        assert gateway.outbound(OPENING["udp"](number)).ended == "slow_outbound", "live ones are not evicted"
    gateway.assert_tables_agree()


def test_what_is_told_is_bounded(gateway: Gateway) -> None:
    """128 in an eighth of a second for each reason, whatever comes."""
    gateway.attend()
    gateway.tables.set_settings(host_mappings=0)
    budgets = gateway.tables.maps["budgets"]
    budgets.set(PUNT_REFUSED, (bpf.jiffies() + TICKS, 0))  # the window does not end meanwhile
    told = [gateway.outbound(udp(HOST, 5000, SERVER, 53)).verdict for _ in range(200)]
    assert told == ["redirect"] * 128 + ["drop"] * 72
    budgets.set(PUNT_REFUSED, (ago(1), 128))
    assert gateway.outbound(udp(HOST, 5000, SERVER, 53)).verdict == "redirect"


def test_who_is_not_limited(gateway: Gateway) -> None:
    """The gateway itself, and what comes from outside."""
    limit(gateway, sessions=0, mappings=0, burst=0)
    assert gateway.outbound(echo(GATEWAY, SERVER, 7), local=True).ended == "slow_outbound"
    gateway.forward("udp", 8080, (HOST, 80))
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, 8080)).ended == "slow_inbound"
    assert gateway.outbound(udp(HOST, 80, SERVER, 53)).ended == "slow_outbound"
    gateway.assert_tables_agree()


# --- given back ------------------------------------------------------------------------------------


@EACH_CLASS
@pytest.mark.parametrize("order", [REAP_EXPIRED, REAP_FORCED], ids=["expired", "forced"])
def test_after_the_end(gateway: Gateway, class_: str, order: int) -> None:
    for number in range(3):
        gateway.open(OPENING[class_](number))
    assert gateway.host(HOST)[0] == 3
    for slot in gateway.slots():
        age(gateway.tables.sessions[slot], 7441)
    gateway.reap(gateway.slots(), order)
    assert gateway.host(HOST) == (0, 0, 0, 0)
    gateway.assert_tables_agree()


def test_after_further_sessions(gateway: Gateway) -> None:
    for number in range(3):
        gateway.open(udp(HOST, 5000, SERVER, number))
    assert gateway.host(HOST) == (3, 0, 1, 0)
    for slot in sorted(gateway.slots()):  # the mapping's own first: it stays while there are others
        gateway.reap([slot], REAP_FORCED)
        gateway.assert_tables_agree()
    gateway.reap(gateway.slots(), REAP_FORCED)
    assert gateway.host(HOST) == (0, 0, 0, 0)


def test_an_expired_session_that_gives_its_place(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 1))
    age(gateway.session(HOST, 5000, "udp", SERVER, 1), 301)
    gateway.open(udp(HOST, 5000, SERVER, 2))
    assert gateway.host(HOST) == (1, 0, 1, 0)
    gateway.assert_tables_agree()


def test_reopened(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 1))
    age(gateway.session(HOST, 5000, "udp", SERVER, 1), 301)
    gateway.open(udp(HOST, 5000, SERVER, 1))
    assert gateway.host(HOST) == (1, 0, 1, 0)
    gateway.assert_tables_agree()


def test_a_port_taken_back_from_another(gateway: Gateway) -> None:
    """With the agent dead, a packet takes what has expired."""
    gateway.pool(udp=((3000, 1),))
    gateway.open(udp(HOST, 5000, SERVER, 1))
    age(gateway.session(HOST, 5000, "udp", SERVER, 1), 301)
    result = gateway.outbound(udp(OTHER_HOST, 5000, SERVER, 1))
    assert result.counted["mapping_reclaimed"] == 1
    assert gateway.host(HOST) == (0, 0, 0, 0)
    assert gateway.host(OTHER_HOST) == (1, 0, 1, 0)
    gateway.assert_tables_agree()


def test_after_refusals(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 1),))
    gateway.open(udp(HOST, 5000, SERVER, 1))
    for number in range(20):
        assert gateway.outbound(udp(HOST, 6000 + number, SERVER, 1)).ended == "drop_ports_exhausted"
    for number in range(257):
        gateway.outbound(udp(HOST, 5000, SERVER, 2 + number))
    assert gateway.outbound(udp(HOST, 5000, SERVER, 999)).ended == "drop_sessions_full"
    assert gateway.host(HOST) == (257, 0, 1, 0)
    gateway.assert_tables_agree()


@pytest.mark.req("attacks-exhaust")
def test_one_host_cannot_stop_another(gateway: Gateway) -> None:
    """It opens as much as it can: beyond its share of the ports nothing, and the other opens at its first packet."""
    gateway.pool(udp=((3000, 200),), tcp=((3000, 200),))
    limit(gateway, mappings=100)
    live = gateway.open(udp(OTHER_HOST, 4000, SERVER, 53))
    for number in range(3000):
        gateway.outbound(udp(HOST, 1024 + number, SERVER, 53))
    assert gateway.host(HOST) == (100, 0, 100, 0)
    for number in range(50):
        assert gateway.outbound(udp(OTHER_HOST, 5000 + number, SERVER, 53)).ended == "slow_outbound"
    assert gateway.open(udp(OTHER_HOST, 4000, SERVER, 53)) == live
    gateway.assert_tables_agree()


# --- whatever happens ------------------------------------------------------------------------------


def _anything(rng: random.Random) -> tuple[str, Packet]:
    host, number = rng.choice((HOST, OTHER_HOST, "192.168.0.4")), 5000 + rng.randrange(6)
    remote, remote_port = rng.choice((SERVER, OTHER_SERVER, GATEWAY)), 50 + rng.randrange(3)
    flags = rng.choice((SYN, SYN, ACK, SYN | ACK, FIN | ACK, 4))
    if remote == GATEWAY:
        make = rng.choice(
            (udp(host, number, GATEWAY, 3000 + rng.randrange(20)), tcp(host, number, GATEWAY, 8080, SYN))
        )
        return "hairpin", make
    if rng.random() < 0.4:
        port = rng.choice((8080, 8081, 3000 + rng.randrange(20)))
        return "inbound", rng.choice(
            (udp(remote, remote_port, GATEWAY, port), tcp(remote, remote_port, GATEWAY, port, flags))
        )
    return "outbound", rng.choice(
        (
            udp(host, number, remote, remote_port),
            tcp(host, number, remote, remote_port, flags),
            echo(host, remote, number),
        )
    )


@pytest.mark.req("6888-4")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("overload", [0, 1], ids=["exclusive ports", "shared ports"])
def test_the_tables_agree_whatever_happens(gateway: Gateway, seed: int, overload: int) -> None:
    """Few ports, few hosts, every way to open, sessions that age at random, rules that come and go."""
    rng = random.Random(seed)
    gateway.pool(udp=((3000, 12),), tcp=((3000, 12),), icmp=((3000, 12),))
    gateway.tables.set_settings(overload=overload, filtering=(2, rng.randrange(3), 0, 0))
    rules = []
    for run in range(1000):
        what, packet = _anything(rng)
        getattr(gateway, what)(packet)
        if run % 40 == 39 and (slots := gateway.slots()):
            for slot in rng.sample(slots, len(slots) // 3):
                age(gateway.tables.sessions[slot], 7441)
            gateway.reap(
                gateway.slots()[:: rng.randrange(1, 4)], rng.choice((REAP_EXPIRED, REAP_FORCED, REAP_RESTED))
            )
            gateway.assert_tables_agree()
        if run % 300 == 100:
            rules.append(gateway.forward("tcp", 8080, (HOST, 5000)))
            rules.append(gateway.forward("udp", 3003, (HOST, 5001), (OTHER_HOST, 5002, 2)))
            rules.append(gateway.forward("udp", 3003, ("192.168.0.4", 5003), source="198.51.100.0/24"))
        if run % 300 == 250:
            while rules:
                gateway.withdraw(rules.pop())
            gateway.assert_tables_agree()
    while rules:
        gateway.withdraw(rules.pop())
    for _ in range(3):
        for slot in gateway.slots():
            age(gateway.tables.sessions[slot], 7441)
        gateway.reap(gateway.slots(), REAP_EXPIRED)
    gateway.assert_tables_agree()
    assert gateway.entries("mappings") == {}
    assert gateway.indexed() == []
    for host in (HOST, OTHER_HOST, "192.168.0.4"):
        assert gateway.host(host) == (0, 0, 0, 0)
