"""Pinholes: who may come in because an ALG has read that it will, how often and how long."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np
import pytest
from harness import ACK, GATEWAY, HOST, OTHER_HOST, OTHER_SERVER, SERVER, SYN, TICKS, Gateway, tcp, udp

from xdpmasq import abi, algs, bpf, calls, config, pinholes
from xdpmasq.alg import switches
from xdpmasq.alg.api import Control, Endpoint, Refused
from xdpmasq.alg.ftp import Ftp
from xdpmasq.alg.irc import Irc
from xdpmasq.alg.openings import MOST_OF_A_HOST, MOST_OF_A_MESSAGE, SessionsOpenings
from xdpmasq.pinholes import Pinholes
from xdpmasq.ports import Ports

REMOTE, HERE = IPv4Address(SERVER), IPv4Address(HOST)
FTP = algs.Use("ftp", (("tcp", 21),), (IPv4Network("0.0.0.0/0"),))


@pytest.fixture
def all_(gateway: Gateway) -> Iterator[Pinholes]:
    switches.put(gateway.tables, FTP)
    yield started(gateway)
    started(gateway).end_those(lambda keys, _: np.ones(len(keys), bool))
    switches.take(gateway.tables, "ftp")


def started(gateway: Gateway) -> Pinholes:
    """As an agent that begins has them."""
    return Pinholes(gateway.tables, gateway.bench.programs["masq_reap"], config.Ports(), TICKS)


@pytest.fixture
def openings(gateway: Gateway, all_: Pinholes) -> SessionsOpenings:
    return of_session(gateway, all_, most=Ftp.pinholes)


def of_session(gateway: Gateway, all_: Pinholes, *, most: int) -> SessionsOpenings:
    """Of an FTP control session."""
    port = gateway.connect(HOST, 5000, SERVER, 21)
    owner = abi.control_key(port, REMOTE.packed + (21).to_bytes(2))
    control = Control("tcp", Endpoint(HERE, 5000), Endpoint(IPv4Address(GATEWAY), port), Endpoint(REMOTE, 21))
    return SessionsOpenings(all_, gateway.tables, owner, 0, control, most, "ftp")


def at(port: int) -> Endpoint:
    return Endpoint(HERE, port)


def held(all_: Pinholes) -> set[int]:
    """External ports with a pinhole."""
    return {int(slot) % abi.PORTS for slot in all_.records()[0]["mapping"]}


def comes_in(gateway: Gateway, port: int, remote: str = SERVER, sport: int = 20) -> str | None:
    """How a SYN ends; None of one that is let in to port 40000."""
    result = gateway.inbound(tcp(remote, sport, GATEWAY, port, SYN, seq=1))
    if result.ended == "slow_inbound":
        assert (result.ip.dst, result.ip.dport) == (HOST, 40000)
        return None
    return result.ended


@pytest.mark.req("attacks-pinholes")
def test_it_serves_its_remote_once(gateway: Gateway, openings: SessionsOpenings) -> None:
    hole = openings.open("tcp", at(40000), remote=REMOTE)
    assert hole.address == IPv4Address(GATEWAY)
    assert comes_in(gateway, hole.port, OTHER_SERVER) == "drop_filtered"
    assert comes_in(gateway, hole.port) is None
    assert comes_in(gateway, hole.port, sport=20) is None, "the same session goes on"
    assert comes_in(gateway, hole.port, sport=1234) == "drop_filtered"
    answer = gateway.outbound(tcp(HOST, 40000, SERVER, 20, SYN | ACK, seq=7, ack=2))
    assert (answer.ended, answer.port) == ("slow_outbound", hole.port)


def test_as_often_as_they_like(gateway: Gateway, openings: SessionsOpenings) -> None:
    hole = openings.open("tcp", at(40000), remote=None, sessions=0)
    for remote in (SERVER, OTHER_SERVER):
        for sport in range(2000, 2005):
            assert comes_in(gateway, hole.port, remote, sport) is None


def test_from_one_port_only(gateway: Gateway, openings: SessionsOpenings) -> None:
    hole = openings.open("tcp", at(40000), remote=REMOTE, remote_port=20)
    assert comes_in(gateway, hole.port, sport=21) == "drop_filtered"
    assert comes_in(gateway, hole.port, sport=20) is None


@pytest.mark.req("attacks-pinholes")
def test_its_time_is_over(gateway: Gateway, all_: Pinholes, openings: SessionsOpenings) -> None:
    """After 300 s at most, whatever was asked for; its port is the pool's again."""
    hole = openings.open("tcp", at(40000), remote=REMOTE, lasts_s=10_000)
    (key,), (value,) = all_.records()
    left = int(np.uint32(value["expires"]) - np.uint32(bpf.jiffies())) / TICKS
    assert 290 < left < 300.5
    value = np.array(value)
    value["expires"] = bpf.jiffies() - 1
    gateway.tables.maps["pinholes"].set(key, value)
    assert comes_in(gateway, hole.port) == "drop_filtered"
    all_.tick()
    assert len(all_.records()[0]) == 0
    gateway.reap([hole.port])
    assert int(gateway.tables.rows(np.array([hole.port]))[0]["life"]) & abi.LIFE_STATE == abi.LIFE_RESTING


def test_some_are_flushed(gateway: Gateway, all_: Pinholes) -> None:
    """Over to packets at once; the agent then gives the port back."""
    ports = [of_session(gateway, all_, most=2).open("tcp", at(port), remote=REMOTE).port for port in (40001, 40000)]
    assert pinholes.flush(gateway.tables, lambda rows: rows[rows.external.port == ports[0]]) == 1
    assert comes_in(gateway, ports[0]) == "drop_filtered"
    assert [each.external.port for each in pinholes.listed(gateway.tables)] == [ports[1]]
    assert pinholes.expected(gateway.tables).external.port.tolist() == [ports[1]]
    all_.tick()
    assert len(all_.records()[0]) == 1
    assert comes_in(gateway, ports[1]) is None


@pytest.mark.req("attacks-pinholes")
@pytest.mark.parametrize(("alg", "most"), [(Ftp, 1), (Irc, 8)])
def test_how_many_a_session_may_have(gateway: Gateway, all_: Pinholes, alg: type[Ftp | Irc], most: int) -> None:
    """The oldest gives way, as the host has gone on; its port is the pool's again."""
    openings = of_session(gateway, all_, most=alg.pinholes)
    for nth in range(most + 2):
        openings.open("tcp", at(40000 + nth), remote=REMOTE, lasts_s=100 + nth)
    assert [each.internal.port for each in pinholes.listed(gateway.tables)] == [
        40000 + nth for nth in range(2, most + 2)
    ]
    all_.tick()
    slots = gateway.tables.used_slots()
    assert {int(slot) for slot in slots[gateway.tables.rows(slots)["life"] & abi.LIFE_STATIC != 0]} == held(all_)


def test_what_has_given_way_comes_back_before_its_port_is_given_back(
    gateway: Gateway, all_: Pinholes, openings: SessionsOpenings
) -> None:
    """It is ours still, and is given back when it is over again."""
    first = openings.open("tcp", at(40000), remote=REMOTE)
    openings.open("tcp", at(40001), remote=REMOTE)
    assert openings.open("tcp", at(40000), remote=REMOTE) == first
    all_.tick()
    assert held(all_) == {first.port}
    assert comes_in(gateway, first.port) is None
    all_.tick()
    assert held(all_) == set()
    assert not int(gateway.tables.rows(np.array([first.port]))[0]["life"]) & abi.LIFE_STATIC


def test_a_pair_counts_as_two(gateway: Gateway, all_: Pinholes) -> None:
    """Whatever is opened beside it: the bound is one of ports, and the oldest go."""
    openings = of_session(gateway, all_, most=4)
    first = openings.open("udp", at(40000), remote=REMOTE, lasts_s=100, pair=True).port
    one, two = (openings.open("udp", at(41001 + nth), remote=REMOTE, lasts_s=101 + nth).port for nth in range(2))
    assert held(all_) == {first, first + 1, one, two}
    second = openings.open("udp", at(42000), remote=REMOTE, lasts_s=110, pair=True).port
    assert held(all_) == {one, two, second, second + 1}
    three = openings.open("udp", at(43001), remote=REMOTE, lasts_s=111).port
    assert held(all_) == {two, second, second + 1, three}


def test_one_message_has_a_bound(openings: SessionsOpenings) -> None:
    """Of time, too: each opening takes some."""
    for nth in range(MOST_OF_A_MESSAGE):
        openings.open("tcp", at(40000 + nth % 2), remote=REMOTE)
    with pytest.raises(Refused, match="one message"):
        openings.open("tcp", at(40000), remote=REMOTE)
    openings.asked = 0
    assert openings.open("tcp", at(40000), remote=REMOTE)


def test_the_same_again_is_the_same(gateway: Gateway, openings: SessionsOpenings) -> None:
    first = openings.open("tcp", at(40000), remote=REMOTE)
    assert openings.open("tcp", at(40000), remote=REMOTE) == first
    assert len(pinholes.listed(gateway.tables)) == 1


def test_an_endpoint_that_has_a_mapping_keeps_it(gateway: Gateway, openings: SessionsOpenings) -> None:
    port = gateway.open(udp(HOST, 40000, SERVER, 69))
    hole = openings.open("udp", at(40000), remote=REMOTE)
    assert hole.port == port
    assert openings.external("udp", at(40000)) == hole
    assert openings.internal("udp", hole) == at(40000)
    assert gateway.inbound(udp(SERVER, 2000, GATEWAY, port)).ended == "slow_inbound"


def test_a_pair(gateway: Gateway, openings: SessionsOpenings) -> None:
    hole = openings.open("udp", at(40000), remote=REMOTE, pair=True)
    assert hole.port % 2 == 0
    for nth in (0, 1):
        result = gateway.inbound(udp(SERVER, 2000 + nth, GATEWAY, hole.port + nth))
        assert (result.ended, result.ip.dport) == ("slow_inbound", 40000 + nth)


def test_a_pair_that_cannot_be(gateway: Gateway, openings: SessionsOpenings) -> None:
    for nth in (0, 1):
        while (port := gateway.open(udp(HOST, 40000 + nth, SERVER, 69))) % 2 == nth:
            gateway.reap([port + abi.PORTS], abi.REAP_FORCED)
    with pytest.raises(Refused, match="neighbours"):
        openings.open("udp", at(40000), remote=REMOTE, pair=True)


@pytest.mark.parametrize("pair", [False, True], ids=["one", "pair"])
def test_a_packet_overtakes_what_is_said(
    gateway: Gateway, openings: SessionsOpenings, monkeypatch: pytest.MonkeyPatch, pair: bool
) -> None:
    """The mapping that it makes while a port is chosen is the endpoint's, and no other."""
    name = "take_pair" if pair else "take"
    take, mapped = getattr(Ports, name), []

    def overtaken(*words: Any, **more: Any) -> Any:
        while not mapped:
            port = gateway.open(udp(HOST, 40000, OTHER_SERVER, 6000))
            if port % 2:
                gateway.reap([port + abi.PORTS], abi.REAP_FORCED)
            else:
                mapped.append(port)
        return take(*words, **more)

    monkeypatch.setattr(Ports, name, overtaken)
    hole = openings.open("udp", at(40000), remote=REMOTE, pair=pair)
    assert [hole.port] == mapped
    for nth in range(1 + pair):
        result = gateway.inbound(udp(SERVER, 2000 + nth, GATEWAY, hole.port + nth))
        assert (result.ended, result.ip.dport) == ("slow_inbound", 40000 + nth)
    assert gateway.outbound(udp(HOST, 40000, SERVER, 2000)).port == hole.port


@pytest.mark.parametrize("nth", [0, 1], ids=["the first", "the second"])
@pytest.mark.parametrize("mapped", [False, True], ids=["new", "mapped"])
def test_of_a_pair_that_cannot_be_published_nothing_is_left(
    gateway: Gateway, openings: SessionsOpenings, monkeypatch: pytest.MonkeyPatch, nth: int, mapped: bool
) -> None:
    """The table of mappings is full: both ports are the pool's again, and what was mapped is as it was."""
    if mapped:
        while (port := gateway.open(udp(HOST, 40000, SERVER, 69))) % 2:
            gateway.reap([port + abi.PORTS], abi.REAP_FORCED)
    before = gateway.entries("mappings")
    publish, published = Ports.publish, []

    def full(ports: Ports, endpoint: Any, slot: int) -> bool:
        published.append(slot)
        if len(published) > nth:
            raise OSError(errno.E2BIG, "no room")
        return publish(ports, endpoint, slot)

    monkeypatch.setattr(Ports, "publish", full)
    with pytest.raises(Refused, match="full"):
        openings.open("udp", at(40000), remote=REMOTE, pair=True)
    assert pinholes.listed(gateway.tables) == []
    assert not (gateway.tables.sessions["life"] & abi.LIFE_STATIC).any()
    gateway.reap(gateway.slots(), abi.REAP_EXPIRED)
    assert gateway.entries("mappings") == before
    gateway.assert_tables_agree()
    monkeypatch.undo()
    assert openings.open("udp", at(40000), remote=REMOTE, pair=True).port % 2 == 0


@pytest.mark.req("attacks-slipstream")
@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(Endpoint(IPv4Address(OTHER_HOST), 40000), id="another host's"),
        pytest.param(Endpoint(HERE, 1023), id="a service's"),
        pytest.param(Endpoint(HERE, 0), id="0"),
        pytest.param(Endpoint(HERE, 65536), id="none"),
    ],
)
def test_what_nobody_gets(gateway: Gateway, openings: SessionsOpenings, wanted: Endpoint) -> None:
    with pytest.raises(Refused):
        openings.open("tcp", wanted, remote=REMOTE)
    assert pinholes.listed(gateway.tables) == []


def test_another_address_of_the_gateway(gateway: Gateway, all_: Pinholes, openings: SessionsOpenings) -> None:
    """Who was told the old one will not come."""
    openings.open("tcp", at(40000), remote=REMOTE)
    before = gateway.tables.settings["external"].copy()
    gateway.tables.set_settings(external=abi.addr(IPv4Address("203.0.113.77")))
    all_.tick()
    gateway.tables.set_settings(external=before)
    assert pinholes.listed(gateway.tables) == []


def test_ten_thousand_end_within_some_ticks(gateway: Gateway, all_: Pinholes, openings: SessionsOpenings) -> None:
    """When all are over at once; before, they are in nobody's way."""
    table = gateway.tables.maps["pinholes"]
    value = np.zeros((), table.value)
    value["expires"] = (bpf.jiffies() + 100 * TICKS) % 2**32
    slots = range(abi.PORTS + 20000, abi.PORTS + 30000)  # of UDP
    gateway.tables.sessions["out"]["new_addr"][slots] = gateway.tables.settings["external"][0]
    for nth, slot in enumerate(slots):
        value["internal"]["word"] = nth // 100
        table.set((slot, abi.addr(REMOTE)), value)
    all_.tick()
    openings.open("tcp", at(40000), remote=REMOTE)
    assert len(all_.records()[0]) == len(slots) + 1
    gateway.tables.sessions["out"]["new_addr"][slots] = 0
    left = []
    while len(all_.records()[0]) > 1:
        all_.tick()
        left.append(len(all_.records()[0]) - 1)
    assert left == [*range(len(slots) - 1024, 0, -1024), 0]


@pytest.mark.parametrize("beyond", [0, 1], ids=["the last", "one more"])
@pytest.mark.parametrize("protocol", ["tcp", "gre"])
def test_a_host_has_a_bound(gateway: Gateway, openings: SessionsOpenings, protocol: str, beyond: int) -> None:
    """Over all of its sessions, also of those that an earlier agent has opened; others do not notice."""
    table, calls_ = gateway.tables.maps["pinholes"], gateway.tables.maps["calls"]
    value, call = np.zeros((), table.value), np.zeros((), calls_.value)
    value["internal"]["word"] = call["internal"]["word"] = abi.addr(HERE)[0][0]
    value["expires"] = (bpf.jiffies() + 100 * TICKS) % 2**32
    numbers = range(20000, 20000 + MOST_OF_A_HOST - 1 + beyond)
    for number in numbers:
        if protocol == "tcp":
            table.set((number, abi.addr(REMOTE)), value)
        else:
            calls_.set((abi.addr(REMOTE), number, 0), call)
    openings = replace(openings, pinholes=started(gateway))
    with pytest.raises(Refused, match=f"{HOST} has 256 already") if beyond else contextlib.nullcontext():
        openings.open(protocol, at(40000), remote=REMOTE)
    other = Control(
        "tcp", Endpoint(IPv4Address(OTHER_HOST), 5000), openings.control.external, openings.control.remote
    )
    replace(openings, control=other).open(protocol, Endpoint(other.internal.address, 40000), remote=REMOTE)
    calls.forget(gateway.tables, -1)


def test_what_is_followed_has_a_bound_and_lasts(gateway: Gateway, all_: Pinholes) -> None:
    """What is forgotten counts no more; what a session of its own goes on with is not forgotten."""
    openings, table = of_session(gateway, all_, most=2), gateway.tables.maps["algs"]
    for port in (6000, 6001, 6000):
        openings.follow(Endpoint(REMOTE, port))
    with pytest.raises(Refused, match="2 others"):
        openings.follow(Endpoint(REMOTE, 6002))
    keys = [(switches.ALG_ANY + 32, 0, int(np.uint16(port).byteswap()), abi.addr(HERE)) for port in (6000, 6001)]
    for key in keys:
        record = table.get(key)
        record["expires"] = (bpf.jiffies() - 1) % 2**32
        table.set(key, record)
    openings.follow_on(6001)
    openings.follow_on(21)
    switches.forget(gateway.tables)
    assert [switches.is_followed(gateway.tables, HERE, port) for port in (6000, 6001, 21)] == [False, True, False]
    openings.follow(Endpoint(REMOTE, 6002))
    for port in (6001, 6002):
        table.delete((switches.ALG_ANY + 32, 0, int(np.uint16(port).byteswap()), abi.addr(HERE)))


def test_a_pair_that_the_table_has_no_room_for(
    gateway: Gateway, all_: Pinholes, openings: SessionsOpenings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither port stays taken."""

    def full(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(all_, "_put", full)
    with pytest.raises(Refused, match="full"):
        openings.open("udp", at(40000), remote=REMOTE, pair=True)
    slots = gateway.tables.used_slots()
    static = gateway.tables.rows(slots)["life"] & abi.LIFE_STATIC != 0
    assert not static.any()


def test_keys_are_as_the_programs_have_them(gateway: Gateway) -> None:
    """Those that are put together without numpy, which has the programs' own layout."""
    maps, port = gateway.tables.maps, int(np.uint16(5060).byteswap())
    for name, made, fields in (
        ("mappings", abi.mapping_key(HERE, 5060, 1, 3), (abi.addr(HERE), port, 1, 3)),
        ("controls", abi.control_key(70000, REMOTE.packed + (5060).to_bytes(2)), (70000, abi.addr(REMOTE), port, 0)),
        ("pinholes", abi.pinhole_key(70000, REMOTE), (70000, abi.addr(REMOTE))),
        ("pinholes", abi.pinhole_key(70000, None), (70000, abi.addr(None))),
    ):
        assert made == np.array(fields, maps[name].key).tobytes(), name
    with pytest.raises(ValueError, match="a key of 4 bytes for map pinholes, whose keys have 8"):
        maps["pinholes"].get(bytes(4))
