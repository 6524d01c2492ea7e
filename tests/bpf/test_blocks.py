"""Port blocks (RFC 6888 REQ-14): a host's ports are in blocks of its own, taken when needed, given back when idle."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from harness import (
    GATEWAY,
    HOST,
    NETWORK,
    OTHER_HOST,
    SERVER,
    SYN,
    TICKS,
    Bench,
    Gateway,
    echo,
    namespace_of,
    tcp,
    udp,
)
from scapy.packet import Packet

from xdpmasq import abi, blocks, bpf, ports, records, targets
from xdpmasq import config as configuration
from xdpmasq.abi import REAP_FORCED, REAP_RESTED
from xdpmasq.lab import netns
from xdpmasq.net import netdev
from xdpmasq.upkeep import Upkeep

SIZE, MOST = 256, 3
POOL = ((4096, 8 * SIZE), (0, 0))  # eight blocks

OPENING: dict[str, Callable[[str, int], Packet]] = {
    "tcp": lambda host, number: tcp(host, 5000 + number, SERVER, 80, SYN),
    "udp": lambda host, number: udp(host, 5000 + number, SERVER, 53),
    "icmp": lambda host, number: echo(host, SERVER, 5000 + number),
}


@pytest.fixture(scope="module")
def bench_with_blocks(as_root: None) -> Iterator[tuple[str, Bench]]:
    with namespace_of() as name:
        with netns.entered(name):
            bench = Bench(blocks=True)
        yield name, bench


@pytest.fixture
def gateway(bench_with_blocks: tuple[str, Bench]) -> Iterator[Gateway]:
    name, bench = bench_with_blocks
    with netns.entered(name):
        gateway = Gateway(bench)
        tables = gateway.tables
        tables.maps["blocks"].view().view(np.uint8)[:] = 0
        for keys, _ in tables.maps["tenants"].items(chunk=16384):
            for key in keys:
                tables.maps["tenants"].delete(key)
        tables.set_settings(block_bits=SIZE.bit_length() - 1, host_blocks=MOST)
        gateway.pool(tcp=POOL, udp=POOL)
        tick(gateway)
        gateway.counted()
        yield gateway


def tick(gateway: Gateway) -> None:
    """What the agent does for blocks each second."""
    reaper = gateway.bench.programs["masq_reap"]
    forwards = Upkeep(gateway.tables)
    forwards.run()
    blocks.Upkeep(gateway.tables, reaper, forwards.slots).run()


def number(port: int) -> int:
    return port // SIZE


def taken(gateway: Gateway) -> dict[int, str]:
    return {number(each.first): str(each.owner) for each in blocks.taken(gateway.tables)}


def close_all(gateway: Gateway) -> None:
    """Every session ends, and every port has rested."""
    gateway.reap(gateway.slots(), REAP_FORCED)
    gateway.reap(gateway.slots(), REAP_RESTED)


@pytest.mark.req("6888-14")
def test_two_hosts_never_share_one(gateway: Gateway) -> None:
    """Whatever protocols they speak, in turns; each port is in a block of its host's."""
    found: dict[str, set[int]] = {HOST: set(), OTHER_HOST: set()}
    for nth in range(3 * SIZE // 2):
        for host, used in found.items():
            for opening in OPENING.values():
                used.add(number(gateway.open(opening(host, nth))))
    assert len(found[HOST]) == len(found[OTHER_HOST]) == 2
    assert not found[HOST] & found[OTHER_HOST]
    assert taken(gateway) == {each: host for host, used in found.items() for each in used}
    gateway.assert_tables_agree()


@pytest.mark.req("6888-14")
@pytest.mark.parametrize("class_", OPENING)
def test_another_is_taken_when_all_are_full(gateway: Gateway, class_: str) -> None:
    """And not before: one record stands for 256 mappings."""
    for nth in range(MOST):
        first = gateway.outbound(OPENING[class_](HOST, nth * SIZE))
        assert first.counted.get("block_taken") == 1
        ports = {first.port} | {
            gateway.open(OPENING[class_](HOST, nth * SIZE + 1 + more)) for more in range(SIZE - 1)
        }
        assert len(ports) == SIZE
        assert len({number(port) for port in ports}) == 1
        assert len(taken(gateway)) == nth + 1
    assert gateway.outbound(OPENING[class_](HOST, 1000)).ended == "drop_host_limit"
    gateway.open(OPENING[class_](OTHER_HOST, 1000))
    other = next(each for each in OPENING if each != class_)
    assert gateway.outbound(OPENING[other](HOST, 1000)).counted.get("block_taken") is None, "it has room in these"


@pytest.mark.req("6888-15")
def test_ports_within_a_block_are_random(gateway: Gateway) -> None:
    first = [gateway.open(OPENING["udp"](HOST, nth)) for nth in range(32)]
    steps = {one - other for one, other in zip(first[1:], first, strict=False)}
    assert len(steps) > 16


def test_none_is_free(gateway: Gateway) -> None:
    """Refused, and no other host's ports are touched (RFC 6888 REQ-4, REQ-11)."""
    hosts = [f"192.168.0.{10 + nth}" for nth in range(9)]
    for nth, host in enumerate(hosts[:8]):
        gateway.open(OPENING["udp"](host, nth))
    gateway.attend()
    refused = gateway.outbound(OPENING["udp"](hosts[8], 1))
    assert (refused.ended, refused.verdict) == ("drop_blocks_exhausted", "redirect"), "it is told"
    assert len(taken(gateway)) == 8
    gateway.open(OPENING["udp"](hosts[0], 100))  # who has one goes on


def test_it_is_given_back(gateway: Gateway) -> None:
    """When its last port has rested, at the second tick that finds it so."""
    gateway.open(OPENING["udp"](HOST, 1))
    (mine,) = taken(gateway)
    gateway.reap(gateway.slots(), REAP_FORCED)
    for _ in range(3):
        tick(gateway)
        assert mine in taken(gateway), "its port is at rest"
    gateway.reap(gateway.slots(), REAP_RESTED)
    tick(gateway)
    assert mine in taken(gateway)
    gateway.counted()
    tick(gateway)
    assert not taken(gateway)
    assert gateway.counted() == {"block_freed": 1}
    (tenant,) = gateway.entries("tenants").values()
    assert not tenant["block"].any()


def test_a_packet_at_the_last_moment_keeps_it(gateway: Gateway) -> None:
    """Idle at one tick, used before the next."""
    gateway.open(OPENING["udp"](HOST, 1))
    close_all(gateway)
    tick(gateway)
    (mine,) = taken(gateway)
    assert number(gateway.open(OPENING["udp"](HOST, 2))) == mine
    close_all(gateway)
    tick(gateway)
    assert taken(gateway) == {mine: HOST}, "idle anew, for the first time"


def test_a_port_claimed_in_a_block_that_was_lost(gateway: Gateway) -> None:
    """A packet that saw the block as its host's gives the port back when the block is another's by then."""
    gateway.open(OPENING["udp"](HOST, 1))
    (mine,) = taken(gateway)
    gateway.tables.maps["blocks"].view()["owner"]["word"][mine, 0] = abi.addr(IPv4Address(OTHER_HOST))[0][0]
    claims = gateway.tables.claims.copy()
    assert gateway.outbound(OPENING["udp"](HOST, 2)).ended == "drop_blocks_exhausted"
    assert (gateway.tables.claims == claims).all()


def test_only_whole_ones_are_given_out(gateway: Gateway) -> None:
    """None at an edge of the pool, and none with a forward in it."""
    cut = ((4096 + 10, 3 * SIZE), (0, 0))  # two whole blocks
    gateway.pool(tcp=cut, udp=cut)
    gateway.forward("tcp", 4096 + SIZE + 5, (HOST, 80))
    for _ in range(2):
        tick(gateway)
    gateway.open(OPENING["udp"](HOST, 1))
    assert taken(gateway) == {4096 // SIZE + 2: HOST}
    assert gateway.outbound(OPENING["udp"](OTHER_HOST, 1)).ended == "drop_blocks_exhausted"


def test_a_forward_in_a_hosts_block_does_not_hold_it(gateway: Gateway) -> None:
    gateway.open(OPENING["udp"](HOST, 1))
    (mine,) = taken(gateway)
    gateway.forward("tcp", mine * SIZE + 7, (OTHER_HOST, 80))
    life = gateway.tables.sessions["life"]
    gateway.reap([slot for slot in gateway.slots() if not life[slot] & abi.LIFE_STATIC], REAP_FORCED)
    gateway.reap(gateway.slots(), REAP_RESTED)
    for _ in range(2):
        tick(gateway)
    assert not taken(gateway)


def test_ports_at_rest_are_used_again_when_there_is_nothing_else(gateway: Gateway) -> None:
    """By their own host, who is the only one to be mistaken for itself (RFC 6888 REQ-8)."""
    gateway.tables.set_settings(host_blocks=1)
    for nth in range(SIZE):
        gateway.open(OPENING["udp"](HOST, nth))
    assert gateway.outbound(OPENING["udp"](HOST, 999)).ended == "drop_host_limit"
    gateway.reap(gateway.slots(), REAP_FORCED)
    for nth in range(8):
        gateway.open(OPENING["udp"](HOST, 1000 + nth))
    assert len(taken(gateway)) == 1


def test_the_gateway_itself_has_one(gateway: Gateway) -> None:
    """Its queries' identifiers are in no other's block."""
    gateway.open(echo(HOST, SERVER, 5000))
    result = gateway.outbound(echo(GATEWAY, SERVER, 5000), local=True)
    assert result.ended == "slow_outbound"
    assert taken(gateway)[number(result.port)] == GATEWAY


def test_what_the_agent_takes_is_in_its_hosts_blocks(gateway: Gateway) -> None:
    """Ports for pinholes and leases; for a host without a block one is taken."""
    reaper, pools = gateway.bench.programs["masq_reap"], configuration.Ports(block_size=SIZE)
    agent = ports.Ports(gateway.tables, reaper, pools, lambda _: 0)
    one, two, three, four = (ports.Endpoint("udp", IPv4Address(HOST), 6000 + nth) for nth in range(4))
    slot = agent.take(one, suggested=4096 + 7 * SIZE + 3)
    assert slot is not None
    assert taken(gateway) == {number(slot % abi.PORTS): HOST}
    pair = agent.take_pair(two, three)
    assert pair is not None
    assert {number(each % abi.PORTS) for each in pair} == {number(slot % abi.PORTS)}
    for _ in range(3):
        tick(gateway)
    assert len(taken(gateway)) == 1, "they hold it"
    other = next(each for each in range(16, 24) if each not in taken(gateway))
    assert agent.take(four, other * SIZE, exact=True) is None


def test_hosts_without_blocks_are_forgotten(gateway: Gateway) -> None:
    gateway.open(OPENING["udp"](HOST, 1))
    gateway.open(OPENING["udp"](OTHER_HOST, 1))
    upkeep = blocks.Upkeep(gateway.tables, gateway.bench.programs["masq_reap"], Upkeep(gateway.tables).slots)
    upkeep.forget()
    upkeep.forget()
    assert len(gateway.entries("tenants")) == 2
    close_all(gateway)
    for _ in range(2):
        tick(gateway)
    upkeep.forget()
    assert len(gateway.entries("tenants")) == 2
    upkeep.forget()
    assert not gateway.entries("tenants")


# --- in the log ------------------------------------------------------------------------------------


def test_syslog_has_its_ports(gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the daemon gets it, a datagram for each: by whom, from when on, and until when."""
    monkeypatch.setattr(targets, "DEV_LOG", str(tmp_path / "log"))
    fields = {"settings": gateway.tables.settings, "maps": gateway.tables.maps, "hz": TICKS, "now": bpf.jiffies}
    ledger = records.Ledger(SimpleNamespace(**fields))  # type: ignore[arg-type]
    assert [*ledger.records()] == []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        daemon.bind(str(tmp_path / "log"))
        daemon.settimeout(5)
        (target,) = targets.opened(configuration.Log(what="blocks", syslog="local3"))

        def logged() -> dict[str, object]:
            target.take([*ledger.records()])
            target.flush()
            head, _, body = daemon.recv(2000).decode().partition(": ")
            assert head == f"<{19 * 8 + 6}>xdpmasq[{os.getpid()}]"
            return dict(json.loads(body))

        port = gateway.open(OPENING["udp"](HOST, 1))
        opened = logged()
        close_all(gateway)
        tick(gateway)
        tick(gateway)
        closed = logged()
        target.close()
    first = number(port) * SIZE
    for each, event in ((opened, "opened"), (closed, "closed")):
        assert (each["record"], each["event"], each["internal"]) == ("block", event, {"address": HOST})
        assert each["external"] == {"address": GATEWAY, "first": first, "last": first + SIZE - 1}
    assert abs(float(str(closed["time"])) - float(str(opened["time"])) - float(str(closed["duration_s"]))) < 1


# --- two external addresses ------------------------------------------------------------------------


GATEWAY_TOO = "192.0.2.1"
SECOND = (
    "link add far0 type veth peer name far1",
    "link set far0 up",
    f"addr add {GATEWAY_TOO}/24 dev far0",
)


@pytest.fixture
def two(as_root: None) -> Iterator[Gateway]:
    """Two WANs with an address each."""
    with namespace_of((*NETWORK, *SECOND)) as name, netns.entered(name):
        gateway = Gateway(Bench([GATEWAY, GATEWAY_TOO], blocks=True))
        gateway.tables.set_interface(netdev.link("far0"), "wan", xdp_from=True, xdp_to=True, wan=1)
        gateway.tables.set_settings(block_bits=SIZE.bit_length() - 1, host_blocks=MOST)
        gateway.pool(tcp=POOL, udp=POOL)
        tick(gateway)
        gateway.counted()
        yield gateway


@pytest.mark.req("6888-14")
def test_each_external_address_has_blocks_of_its_own(two: Gateway) -> None:
    """A host that leaves by both WANs has one of each, whose ports are not the other's; and both are told of."""
    far = netdev.link("far0").index
    found = {}
    for host in (HOST, OTHER_HOST):
        for external, index in ((0, two.wan), (1, far)):
            ports_ = {two.outbound(OPENING["udp"](host, nth), ifindex=index).port for nth in range(40)}
            (found[host, external],) = {number(port) for port in ports_}
    held = {(str(each.owner), each.external): number(each.first) for each in blocks.taken(two.tables)}
    assert held == found
    for external in (0, 1):
        assert found[HOST, external] != found[OTHER_HOST, external]
    assert blocks.use(two.tables)[:, 0].tolist() == [2, 2]
