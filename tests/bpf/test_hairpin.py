"""Hairpinning (RFC 4787 REQ-9): two internal hosts, or the gateway and one, meet at the external address.

The first leg is seen at the LAN's ingress, the second at the WAN's; what the LAN gets is what is asserted.
"""

from typing import Any

import pytest
from harness import (
    ACK,
    GATEWAY,
    HAIRPIN_MARK,
    HOST,
    LOOPBACK,
    OTHER_HOST,
    OTHER_SERVER,
    PUNT_TTL,
    RST,
    SERVER,
    SYN,
    Gateway,
    age,
    echo,
    next_tick,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import IP, fragment
from scapy.packet import Packet
from test_icmp_errors import cut, icmp_error

MAKE = {"udp": udp, "tcp": tcp}
EACH_PROTOCOL = pytest.mark.parametrize("protocol", list(MAKE))


def mapped(gateway: Gateway, protocol: str, host: str = OTHER_HOST) -> int:
    if protocol == "udp":
        return gateway.open(udp(host, 6000, SERVER, 53))
    return gateway.connect(host, 6000, SERVER, 53)


def opening(protocol: str, src: str, sport: int, port: int, **ip: Any) -> Packet:
    flags = {"flags": SYN, "seq": 100} if protocol == "tcp" else {}
    return MAKE[protocol](src, sport, GATEWAY, port, **flags, **ip)


@pytest.mark.req("4787-9")
@pytest.mark.req("4787-9a")
@pytest.mark.req("5382-8")
@EACH_PROTOCOL
def test_two_hosts_through_a_mapping(gateway: Gateway, protocol: str) -> None:
    port = mapped(gateway, protocol)
    packet = opening(protocol, HOST, 5000, port, ttl=33)
    result = gateway.hairpin(packet)
    assert result.ended == "slow_hairpin"
    own = result.port
    assert own not in (port, 5000)
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=own, dst=OTHER_HOST, dport=6000, ttl=32))
    assert result.mark == 0
    flags = {"flags": SYN | ACK, "seq": 500, "ack": 101} if protocol == "tcp" else {}
    answer = MAKE[protocol](OTHER_HOST, 6000, GATEWAY, own, **flags)
    back = gateway.hairpin(answer)
    assert back.ended == "slow_hairpin"
    assert back.bytes == wire(rebuilt(answer, src=GATEWAY, sport=port, dst=HOST, dport=5000, ttl=63))
    gateway.assert_tables_agree()
    assert gateway.hairpin(opening(protocol, HOST, 5000, port)).counted == {}, "the same sessions"


@pytest.mark.req("4787-9")
@pytest.mark.req("4787-9a")
@EACH_PROTOCOL
@pytest.mark.parametrize("default", [False, True], ids=["a port", "the default host"])
def test_through_a_forward(gateway: Gateway, protocol: str, default: bool) -> None:
    gateway.forward(protocol, *((0, (OTHER_HOST, 0)) if default else (8080, (OTHER_HOST, 8080))))
    packet = opening(protocol, HOST, 5000, 8080)
    result = gateway.hairpin(packet)
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=result.port, dst=OTHER_HOST, ttl=63))
    flags = {"flags": SYN | ACK, "seq": 500, "ack": 101} if protocol == "tcp" else {}
    answer = MAKE[protocol](OTHER_HOST, 8080, GATEWAY, result.port, **flags)
    assert gateway.hairpin(answer).bytes == wire(rebuilt(answer, src=GATEWAY, dst=HOST, dport=5000, ttl=63))
    gateway.assert_tables_agree()


@EACH_PROTOCOL
def test_to_itself(gateway: Gateway, protocol: str) -> None:
    """By its own forward, from another socket; and the same socket, which has one mapping both ways."""
    gateway.forward(protocol, 8080, (HOST, 80))
    packet = opening(protocol, HOST, 5000, 8080)
    result = gateway.hairpin(packet)
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=result.port, dst=HOST, dport=80, ttl=63))
    flags = {"flags": SYN | ACK, "seq": 500, "ack": 101} if protocol == "tcp" else {}
    answer = MAKE[protocol](HOST, 80, GATEWAY, result.port, **flags)
    assert gateway.hairpin(answer).bytes == wire(
        rebuilt(answer, src=GATEWAY, sport=8080, dport=5000, dst=HOST, ttl=63)
    )
    port = mapped(gateway, protocol, HOST)
    result = gateway.hairpin(opening(protocol, HOST, 6000, port))
    assert (result.ip.src, result.port, result.ip.dst, result.ip.dport) == (GATEWAY, port, HOST, 6000)
    gateway.assert_tables_agree()


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(udp(HOST, 5000, GATEWAY, 53), id="a port of the gateway's own"),
        pytest.param(tcp(HOST, 5000, GATEWAY, 22, SYN), id="its ssh"),
        pytest.param(echo(HOST, GATEWAY, 7), id="ping"),
        pytest.param(udp(HOST, 5000, "192.168.0.1", 53), id="its inner address"),
        pytest.param(udp(HOST, 5000, SERVER, 53), id="outside"),
        pytest.param(udp("10.1.1.1", 5000, GATEWAY, 53), id="from nobody inside"),
        pytest.param(IP(src=HOST, dst=GATEWAY, proto=17, frag=3) / bytes(20), id="an orphan fragment"),
    ],
)
def test_what_is_no_hairpin_is_left_alone(gateway: Gateway, packet: Packet) -> None:
    mapped(gateway, "udp")
    result = gateway.lan_in(packet)
    assert (result.verdict, result.ended, result.counted) == ("pass", "", {})
    assert result.frame[14:] == wire(packet)


@pytest.mark.req("attacks-spoof")
def test_a_foreign_source_is_not_turned_round(gateway: Gateway) -> None:
    port = mapped(gateway, "udp")
    for source in (SERVER, GATEWAY, "10.1.1.1", "127.0.0.1"):
        assert gateway.lan_in(udp(source, 5000, GATEWAY, port)).verdict == "pass"


# --- filtering -------------------------------------------------------------------------------------


def test_hosts_on_one_lan_may_meet_in_every_mode(gateway: Gateway) -> None:
    for mode in range(3):
        gateway.filtering(mode)
        assert gateway.hairpin(udp(HOST, 5000 + mode, GATEWAY, mapped(gateway, "udp"))).ended == "slow_hairpin"


def test_from_another_lan_filtering_holds(gateway: Gateway) -> None:
    """The bench's WAN stands for it: the way to the host is by another interface than the packet's."""
    port = mapped(gateway, "udp")
    first = gateway.lan_in(udp(HOST, 5000, GATEWAY, port))
    assert first.mark == HAIRPIN_MARK | gateway.lan
    second = gateway.inbound(first.frame, mark=HAIRPIN_MARK | gateway.wan)
    assert (second.verdict, second.ended) == ("drop", "drop_filtered")


def test_nobodys_port_in_the_second_leg(gateway: Gateway) -> None:
    """The mapping ended between the legs."""
    port = mapped(gateway, "udp")
    first = gateway.lan_in(udp(HOST, 5000, GATEWAY, port))
    gateway.reap([gateway.slot(OTHER_HOST, 6000, "udp")], 1)
    assert gateway.turned(first).ended == "drop_filtered"


# --- forgeries -------------------------------------------------------------------------------------


@pytest.mark.req("attacks-martian")
@EACH_PROTOCOL
def test_a_hairpins_packet_cannot_come_from_outside(gateway: Gateway, protocol: str) -> None:
    """Nothing from the wire has a mark, so one from our own address is forged, however well it fits."""
    port = mapped(gateway, protocol)
    first = gateway.lan_in(opening(protocol, HOST, 5000, port))
    assert gateway.inbound(first.frame).ended == "drop_source_martian"
    assert gateway.turned(first).ended == "slow_hairpin"
    assert gateway.inbound(first.frame).ended == "drop_source_martian"
    for mark in (1, HAIRPIN_MARK >> 16, HAIRPIN_MARK ^ 0x100000, 0xFFFF0000):
        assert gateway.inbound(first.frame, mark=mark).ended == "drop_source_martian"


@pytest.mark.req("attacks-martian")
def test_hairpins_do_not_fly(gateway: Gateway) -> None:
    """XDP knows no marks: a flow whose remote is ourselves would let a forgery in."""
    gateway.accelerate()
    port = mapped(gateway, "udp")
    packet = udp(HOST, 5000, GATEWAY, port)
    for _ in range(2):
        own = gateway.hairpin(packet).port
        gateway.learn(udp(GATEWAY, own, OTHER_HOST, 6000))
        gateway.hairpin(udp(OTHER_HOST, 6000, GATEWAY, own))
        gateway.learn(udp(GATEWAY, port, HOST, 5000))
        next_tick()
    assert gateway.fast_inbound(udp(GATEWAY, own, GATEWAY, port)).verdict == "pass"
    assert gateway.fast_outbound(packet).verdict == "pass"


# --- TTL -------------------------------------------------------------------------------------------


@pytest.mark.req("attacks-loop")
@pytest.mark.parametrize("ttl", [0, 1])
def test_ttl_ends(gateway: Gateway, ttl: int) -> None:
    port = mapped(gateway, "udp")
    packet = udp(HOST, 5000, GATEWAY, port, ttl=ttl)
    before = gateway.tables.sessions.tobytes()
    result = gateway.lan_in(packet)
    assert (result.verdict, result.ended) == ("drop", "drop_ttl")
    gateway.attend()
    result = gateway.lan_in(packet)
    assert (result.verdict, result.ended, result.punted) == ("redirect", "drop_ttl", PUNT_TTL)
    assert gateway.tables.sessions.tobytes() == before
    assert gateway.hairpin(udp(HOST, 5000, GATEWAY, port, ttl=2)).ip.ttl == 1


# --- fragments -------------------------------------------------------------------------------------


def test_fragments(gateway: Gateway) -> None:
    port = mapped(gateway, "udp")
    packet = udp(HOST, 5000, GATEWAY, port, bytes(range(256)) * 12, id=7)
    results = [gateway.hairpin(each) for each in fragment(IP(wire(packet)), 1000)]
    assert {result.ended for result in results} == {"slow_hairpin"}
    assert {(result.ip.src, result.ip.dst, result.ip.ttl) for result in results} == {(GATEWAY, OTHER_HOST, 63)}
    expected = rebuilt(packet, src=GATEWAY, sport=results[0].port, dst=OTHER_HOST, dport=6000)
    assert b"".join(result.bytes[20:] for result in results) == wire(expected)[20:]
    assert gateway.entries("fragments") == {}


# --- ICMP errors -----------------------------------------------------------------------------------


@pytest.mark.req("5508-7")
@EACH_PROTOCOL
@pytest.mark.parametrize("how", [cut, wire], ids=["8 bytes", "all"])
@pytest.mark.parametrize("kind", [(3, 3), (3, 4), (11, 0), (12, 0)])
def test_icmp_errors(gateway: Gateway, protocol: str, how: Any, kind: tuple[int, int]) -> None:
    """The one who was asked complains; the asker reads about the packet it sent, from the external address."""
    port = mapped(gateway, protocol)
    asked = opening(protocol, HOST, 5000, port)
    delivered = gateway.hairpin(asked)
    result = gateway.hairpin(icmp_error(OTHER_HOST, GATEWAY, how(IP(delivered.bytes)), kind, rest=1400))
    assert result.ended == "slow_hairpin"
    quoted = rebuilt(asked, ttl=63)
    assert result.bytes == wire(icmp_error(GATEWAY, HOST, how(quoted), kind, rest=1400, ttl=63))


@pytest.mark.req("5508-7")
def test_icmp_errors_about_nothing(gateway: Gateway) -> None:
    port = mapped(gateway, "udp")
    stranger = icmp_error(HOST, GATEWAY, udp(GATEWAY, port, HOST, 5000))
    assert gateway.hairpin(stranger).verdict == "drop"
    own = icmp_error(HOST, GATEWAY, udp(GATEWAY, port + 1 if port < 65535 else 1024, HOST, 5000))
    assert gateway.lan_in(own).verdict == "pass"
    broken = bytearray(wire(icmp_error(OTHER_HOST, GATEWAY, udp(GATEWAY, port, OTHER_HOST, 6000))))
    broken[30] ^= 1
    assert gateway.hairpin(IP(bytes(broken))).verdict == "drop"


# --- the gateway and a host ------------------------------------------------------------------------


@EACH_PROTOCOL
def test_the_gateway_asks_for_a_forward_of_its_own(gateway: Gateway, protocol: str) -> None:
    gateway.forward(protocol, 8080, (HOST, 80))
    packet = opening(protocol, GATEWAY, 40000, 8080)
    first = gateway.lo_out(packet)
    assert (first.verdict, first.mark) == ("redirect", HAIRPIN_MARK | LOOPBACK)
    result = gateway.turned(first)
    assert result.ended == "slow_hairpin_own"
    assert result.bytes == wire(rebuilt(packet, dst=HOST, dport=80, ttl=63))
    flags = {"flags": SYN | ACK, "seq": 500, "ack": 101} if protocol == "tcp" else {}
    answer = MAKE[protocol](HOST, 80, GATEWAY, 40000, **flags)
    back = gateway.lan_in(answer)
    assert (back.verdict, back.ended) == ("redirect", "slow_hairpin_own")
    assert back.bytes == wire(rebuilt(answer, src=GATEWAY, sport=8080))
    assert back.frame[:12] == bytes(12), "as what comes by lo"
    gateway.assert_tables_agree()


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(udp(GATEWAY, 40000, GATEWAY, 53), id="its own port"),
        pytest.param(tcp(GATEWAY, 40000, GATEWAY, 8080, SYN), id="another protocol"),
        pytest.param(udp("127.0.0.1", 40000, "127.0.0.1", 8080), id="loopback"),
        pytest.param(udp("192.168.0.1", 40000, GATEWAY, 8080), id="from its inner address"),
        pytest.param(echo(GATEWAY, GATEWAY, 8080), id="ping"),
        pytest.param(IP(src=GATEWAY, dst=GATEWAY, proto=17, frag=3) / bytes(20), id="fragment"),
    ],
)
def test_what_else_the_gateway_says_to_itself(gateway: Gateway, packet: Packet) -> None:
    gateway.forward("udp", 8080, (HOST, 80))
    result = gateway.lo_out(packet)
    assert (result.verdict, result.ended, result.mark) == ("pass", "", 0)


def test_the_gateway_does_not_meet_the_default_host(gateway: Gateway) -> None:
    """All it says to itself would go there."""
    gateway.forward("udp", 0, (HOST, 0))
    assert gateway.lo_out(udp(GATEWAY, 40000, GATEWAY, 8080)).verdict == "pass"


@pytest.mark.req("attacks-loop")
def test_the_gateways_own_packet_with_ttl_1(gateway: Gateway) -> None:
    gateway.forward("udp", 8080, (HOST, 80))
    assert gateway.turned(gateway.lo_out(udp(GATEWAY, 40000, GATEWAY, 8080, ttl=1))).ended == "drop_ttl"


def test_what_a_host_says_to_the_gateway_without_a_session(gateway: Gateway) -> None:
    gateway.forward("tcp", 8080, (HOST, 80))
    assert gateway.lan_in(tcp(HOST, 80, GATEWAY, 40000, RST)).verdict == "pass"
    first = gateway.lo_out(tcp(GATEWAY, 40000, GATEWAY, 8080, SYN))
    gateway.turned(first)
    age(gateway.tables.sessions[8080], 241)
    assert gateway.lan_in(tcp(HOST, 80, GATEWAY, 40000, SYN | ACK)).verdict == "pass"


# --- what ends it ----------------------------------------------------------------------------------


def test_the_way_leads_to_no_lan(gateway: Gateway) -> None:
    port = mapped(gateway, "udp", "192.168.0.9")
    first = gateway.lan_in(udp(HOST, 5000, GATEWAY, port))
    gateway.tables.unset_interface(gateway.lan)
    result = gateway.turned(first)
    assert (result.verdict, result.ended) == ("drop", "drop_hairpin_route")


def test_limits_hold_in_hairpins(gateway: Gateway) -> None:
    port = mapped(gateway, "udp")
    gateway.tables.set_settings(host_mappings=0)
    assert gateway.hairpin(udp(HOST, 5000, GATEWAY, port)).ended == "drop_host_limit"
    gateway.attend()
    assert gateway.lan_in(udp(HOST, 5000, GATEWAY, port)).punted == 2
    assert OTHER_SERVER not in gateway.entries("mappings")
