"""Mappings that hosts ask for, in the tables and under packets: which port is given, what it lets in, how it ends."""

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network

import numpy as np
import pytest
from harness import (
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    SERVER,
    SYN,
    TICKS,
    Gateway,
    age,
    ago,
    tcp,
    udp,
)
from scapy.packet import Packet

from xdpmasq import forwarding
from xdpmasq.abi import (
    LIFE_LIVE,
    LIFE_OPENING,
    LIFE_STATE,
    LIFE_STATIC,
    PORTS,
    REAP_EXPIRED,
    REAP_FORCED,
    REAP_RESTED,
)
from xdpmasq.config import Config, Pcp, Ports
from xdpmasq.leases import EVERYBODY, Book, Filters, Held
from xdpmasq.ports import Endpoint

NONCE = b"abcdefghijkl"
HERE, ELSEWHERE = Endpoint("udp", IPv4Address(HOST), 5000), Endpoint("udp", IPv4Address(OTHER_HOST), 5000)
MAKE = {"tcp": tcp, "udp": udp}


@pytest.fixture
def book(gateway: Gateway) -> Book:
    return book_of(gateway)


def book_of(gateway: Gateway, ports: Ports | None = None, **pcp: int) -> Book:
    config = Config(("wan0",), ("lan0",), ports=ports or Ports(), pcp=Pcp(**pcp))  # type: ignore[arg-type]
    return Book(gateway.tables, gateway.bench.programs["masq_reap"], config, TICKS)


def lease(
    book: Book, endpoint: Endpoint = HERE, suggested: int = 0, *, exact: bool = False, filters: Filters = EVERYBODY
) -> Held | None:
    return book.open(endpoint, suggested, exact=exact, filters=filters, nonce=NONCE, lifetime_s=600)


def given(
    book: Book, endpoint: Endpoint = HERE, suggested: int = 0, *, exact: bool = False, filters: Filters = EVERYBODY
) -> int:
    held = lease(book, endpoint, suggested, exact=exact, filters=filters)
    assert held
    return held.port


def knock(protocol: str, remote: str, port: int, sport: int = 7000) -> Packet:
    return tcp(remote, sport, GATEWAY, port, SYN) if protocol == "tcp" else udp(remote, sport, GATEWAY, port)


# --- what it lets in and out -----------------------------------------------------------------------


@pytest.mark.req("6888-9")
@pytest.mark.parametrize("protocol", list(MAKE))
def test_in_and_out_by_one_port(gateway: Gateway, book: Book, protocol: str) -> None:
    """Whoever comes to the external endpoint gets to the internal one, which is seen as that (RFC 4787 REQ-1)."""
    port = given(book, Endpoint(protocol, IPv4Address(HOST), 5000), 6000)
    assert port == 6000
    came = gateway.inbound(knock(protocol, OTHER_SERVER, port))
    assert (came.ended, came.ip.dst, came.ip.dport) == ("slow_inbound", HOST, 5000)
    flags = {"flags": SYN} if protocol == "tcp" else {}
    assert gateway.open(MAKE[protocol](HOST, 5000, SERVER, 53, **flags)) == port
    gateway.assert_tables_agree()


@pytest.mark.req("6888-9")
def test_a_mapping_of_its_own_keeps_its_port_and_sessions(gateway: Gateway, book: Book) -> None:
    """RFC 6887 section 11.3: whatever is suggested. Its end leaves them as they were before."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    assert gateway.open(udp(HOST, 5000, OTHER_SERVER, 53)) == port
    assert gateway.inbound(udp(OTHER_SERVER, 54, GATEWAY, port)).ended == "drop_filtered"
    assert lease(book, suggested=6000, exact=True) is None
    assert given(book, suggested=6000) == port
    gateway.counted()
    for remote, remote_port in ((SERVER, 53), (OTHER_SERVER, 53), (OTHER_SERVER, 54)):
        assert gateway.inbound(udp(remote, remote_port, GATEWAY, port)).ip.dst == HOST
    assert gateway.host(HOST) == (2, 0, 0, 0), "the mapping is no longer the host's own doing, its sessions are"
    gateway.assert_tables_agree()
    book.end(book.held_by(IPv4Address(HOST)))
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ip.dst == HOST
    assert gateway.inbound(udp(OTHER_SERVER, 55, GATEWAY, port)).ended == "drop_filtered"
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == port
    gateway.assert_tables_agree()


def test_filters(gateway: Gateway, book: Book) -> None:
    """Only they are let in; what goes out uses the port all the same. Others take their place without a gap."""
    net, one = IPv4Network("198.51.100.0/24"), IPv4Network(f"{SERVER}/32")
    port = given(book, suggested=6000, filters=[net])
    assert gateway.inbound(udp(OTHER_SERVER, 1, GATEWAY, port)).ip.dst == HOST
    assert gateway.inbound(udp(SERVER, 1, GATEWAY, port)).ended == "drop_filtered"
    assert gateway.open(udp(HOST, 5000, SERVER, 2)) == port
    (held,) = book.held_by(IPv4Address(HOST))
    book.renew(held, 900, [one, net])
    assert gateway.inbound(udp(SERVER, 1, GATEWAY, port)).ip.dst == HOST
    (held,) = book.held_by(IPv4Address(HOST))
    assert len(held.placed) == 2
    assert 880 < held.left_s <= 900
    book.renew(held, 900, EVERYBODY)
    assert gateway.inbound(udp("192.0.2.1", 1, GATEWAY, port)).ip.dst == HOST
    (held,) = book.held_by(IPv4Address(HOST))
    assert [each.rule.source for each in held.placed] == [None]
    assert gateway.open(udp(HOST, 5000, SERVER, 3)) == port
    gateway.assert_tables_agree()


# --- whose port ------------------------------------------------------------------------------------


@pytest.fixture
def service() -> Iterator[int]:
    """A port of the gateway's own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
        own.bind(("0.0.0.0", 6000))
        yield 6000


@pytest.mark.req("6888-9")
@pytest.mark.req("attacks-port_shadow")
@pytest.mark.parametrize("taken_by", ["mapping", "rest", "forward", "lease", "ephemeral", "bounds", "service"])
def test_no_port_of_anybody_elses(gateway: Gateway, service: int, taken_by: str) -> None:
    """Another is given, or none where only that one would do."""
    gateway.tables.set_settings(preserve=1)
    book, wanted = book_of(gateway, first=2000, last=50000), 7000
    match taken_by:
        case "mapping" | "rest":
            assert gateway.open(udp(OTHER_HOST, wanted, SERVER, 53)) == wanted
            if taken_by == "rest":
                age(gateway.session(OTHER_HOST, wanted, "udp", SERVER, 53), 301)
                assert gateway.reap([PORTS + wanted])["mapping_closed"] == 1
        case "forward":
            gateway.forward("udp", wanted, (OTHER_HOST, 80), source="198.51.100.0/24")
        case "lease":
            assert given(book, ELSEWHERE, wanted) == wanted
        case "ephemeral":
            wanted = 40000
        case "bounds":
            wanted = 1999
        case "service":
            wanted = service
    before = gateway.tables.sessions[PORTS + wanted].tobytes()
    assert lease(book, suggested=wanted, exact=True) is None
    port = given(book, suggested=wanted)
    assert port != wanted
    assert 2000 <= port < 32768
    assert gateway.tables.sessions[PORTS + wanted].tobytes() == before
    gateway.assert_tables_agree()


def test_outside_the_pool(gateway: Gateway) -> None:
    """A port that is in no pool can be suggested, but is not given unasked."""
    gateway.pool(udp=((3000, 64),))
    book = book_of(gateway, Ports(3000, 3063), first=80)
    assert given(book, suggested=80) == 80
    assert 3000 <= given(book, ELSEWHERE) < 3064
    assert gateway.inbound(knock("udp", SERVER, 80)).ip.dst == HOST


def test_a_port_at_rest_is_its_last_hosts(gateway: Gateway, book: Book) -> None:
    """Who gives it back and asks again gets it, at once."""
    assert given(book, suggested=6000) == 6000
    book.end(book.held_by(IPv4Address(HOST)))
    gateway.reap([PORTS + 6000])
    assert given(book, ELSEWHERE, 6000) != 6000
    assert given(book, suggested=6000) == 6000
    assert gateway.inbound(knock("udp", SERVER, 6000)).ip.dst == HOST
    gateway.assert_tables_agree()


def test_none_left(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 64),))
    book = book_of(gateway, Ports(3000, 3063))
    ports = {given(book, Endpoint("udp", IPv4Address(HOST), 1 + number)) for number in range(64)}
    assert ports == set(range(3000, 3064))
    assert lease(book) is None
    assert gateway.outbound(udp(HOST, 5000, SERVER, 53)).ended == "drop_ports_exhausted"


def test_a_port_that_a_packet_has_just_claimed(gateway: Gateway, book: Book) -> None:
    """Its bit is set before its record is filled in: the reaper then leaves it alone."""
    slot = PORTS + 6000
    gateway.tables.claims[slot // 64] |= np.uint64(1 << slot % 64)
    assert not gateway.tables.take(gateway.bench.programs["masq_reap"], slot, IPv4Address(HOST), 5000)
    assert gateway.tables.sessions["life"][slot] == 0
    assert given(book, suggested=6000) != 6000


@pytest.mark.parametrize("state", ["free", "at rest", "a session's", "being opened"])
def test_what_is_taken_is_its_hosts_at_once(gateway: Gateway, state: str) -> None:
    """There is no moment in which the port is static, and still the one's who had it last."""
    reaper, slot = gateway.bench.programs["masq_reap"], PORTS + 6000
    if state != "free":
        slot = PORTS + gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    if state == "at rest":
        gateway.reap([slot], REAP_FORCED)
    if state == "being opened":
        gateway.tables.sessions["life"][slot] |= np.uint64(LIFE_OPENING)
    before = gateway.tables.rows(np.array([slot]))[0].copy()
    taken = gateway.tables.take(reaper, slot, IPv4Address(HOST), 5001)
    assert taken == (state in ("free", "at rest"))
    after = gateway.tables.rows(np.array([slot]))[0]
    if not taken:
        assert after == before
        return
    assert int(after["life"]) & (LIFE_STATE | LIFE_STATIC) == LIFE_LIVE | LIFE_STATIC
    for side, address, port in (("in", HOST, 5001), ("out", GATEWAY, slot % PORTS)):
        assert after[side]["new_addr"].tobytes() == IPv4Address(address).packed
        assert int(after[side]["new_port"]) == socket.htons(port)
    assert int(after["mapping"]) == slot


def test_a_mapping_that_has_just_become_anothers(gateway: Gateway, book: Book) -> None:
    """Held for the wrong one, it is let go; nobody's sessions suffer."""
    port = gateway.open(udp(OTHER_HOST, 5000, SERVER, 53))
    assert book._ports.hold(HERE, PORTS + port) is None
    assert not gateway.tables.sessions["life"][PORTS + port] & LIFE_STATIC
    assert gateway.inbound(udp(SERVER, 53, GATEWAY, port)).ip.dst == OTHER_HOST
    gateway.assert_tables_agree()


# --- its end, its life -----------------------------------------------------------------------------


def test_renewing_moves_the_end_only(gateway: Gateway, book: Book) -> None:
    given(book, suggested=6000)
    gateway.inbound(knock("udp", SERVER, 6000))
    (held,) = book.held_by(IPv4Address(HOST))
    before = gateway.tables.rules[held.placed[0].index].copy()
    book.renew(held, 3600, EVERYBODY)
    after = gateway.tables.rules[held.placed[0].index].copy()
    moved = int(after["expires"]) - int(before["expires"])
    assert 0 <= moved % 2**32 - 3000 * TICKS < 60 * TICKS
    after["expires"] = before["expires"]
    assert after == before


@pytest.mark.parametrize("with_default", [False, True])
def test_what_is_over_is_absent(gateway: Gateway, book: Book, with_default: bool) -> None:
    """At once, by its time alone; then it is taken out, and the port rests."""
    if with_default:
        gateway.forward("udp", 0, (OTHER_HOST, 0))
    port = given(book)
    (held,) = book.held_by(IPv4Address(HOST))
    gateway.tables.rules["expires"][held.placed[0].index] = ago(1)
    assert gateway.inbound(knock("udp", SERVER, port)).ended == "drop_filtered"
    forwarding.end_expired(gateway.tables, gateway.bench.programs["masq_reap"])
    assert not list(book.held_by(IPv4Address(HOST)))
    assert len(forwarding.read(gateway.tables)) == with_default
    assert gateway.slot(HOST, 5000, "udp") is None
    gateway.reap([PORTS + port], REAP_EXPIRED)
    gateway.reap([PORTS + port], REAP_RESTED)
    assert not gateway.is_claimed(PORTS + port)
    came = gateway.inbound(knock("udp", SERVER, port))
    assert came.ip.dst == OTHER_HOST if with_default else came.ended == "own_inbound"
    gateway.assert_tables_agree()


def test_what_is_not_over_stays(gateway: Gateway, book: Book) -> None:
    gateway.forward("udp", 5001, (HOST, 53))
    port = given(book)
    forwarding.end_expired(gateway.tables, gateway.bench.programs["masq_reap"])
    assert {each.rule.first for each in forwarding.read(gateway.tables)} == {5001, port}


def test_a_later_process_finds_all_of_it(gateway: Gateway, book: Book) -> None:
    given(book, suggested=6000, filters=[IPv4Network("198.51.100.0/24"), IPv4Network("192.0.2.1/32")])
    given(book, ELSEWHERE, 6001)
    held = book_of(gateway).held(HERE)
    assert held
    assert (held.port, held.address, held.nonce) == (6000, IPv4Address(GATEWAY), NONCE)
    assert 590 <= held.left_s <= 600
    assert {str(each.rule.source) for each in held.placed} == {"198.51.100.0/24", "192.0.2.1/32"}
    assert book_of(gateway).count() == 3


def test_a_forward_of_the_users_is_found(gateway: Gateway, book: Book) -> None:
    gateway.forward("udp", 8080, (HOST, 5000))
    held = book.held(HERE)
    assert held
    assert (held.port, held.nonce) == (8080, None)
    assert list(book.held_by(IPv4Address(HOST))) == []
