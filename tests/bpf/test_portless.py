"""Protocols without ports: one internal host for each remote, only addresses changed."""

from ipaddress import IPv4Network
from typing import Any

import pytest
from harness import (
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    PUNT_REFUSED,
    ROUTER,
    SERVER,
    TICKS,
    Gateway,
    ago,
    full_sum,
    since,
    wire,
)
from scapy.layers.inet import IP
from scapy.packet import Packet, Raw
from test_icmp_errors import cut, icmp_error

PROTOCOLS = {"GRE": 47, "ESP": 50, "AH": 51, "IPIP": 4, "6in4": 41, "L2TP": 115, "OSPF": 89}
SUMMED = {"DCCP": 33, "UDP-Lite": 136}
EACH = pytest.mark.parametrize("proto", PROTOCOLS.values(), ids=PROTOCOLS)


def portless(src: str, dst: str, proto: int, payload: bytes = b"\x30\x01\x88\x0b some of it", **ip: Any) -> Packet:
    return IP(src=src, dst=dst, proto=proto, **ip) / Raw(payload)


def sctp(src: str, sport: int, dst: str, dport: int, **ip: Any) -> Packet:
    return portless(src, dst, 132, sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + bytes(24), **ip)


def summed(src: str, dst: str, proto: int, payload: bytes, *, sport: int = 9, want: int = -1) -> Packet:
    """DCCP and UDP-Lite have their checksum at 6, over pseudo header and (here) everything."""
    body = bytearray(sport.to_bytes(2, "big") + b"\x00\x35\x00\x00\x00\x00" + payload)
    if want >= 0:  # two bytes that make the checksum so
        body += b"\0" * (len(body) % 2) + b"\0\0"
    packet = wire(IP(src=src, dst=dst, proto=proto) / Raw(bytes(body)))
    pseudo = packet[12:20] + bytes([0, proto]) + len(body).to_bytes(2, "big")
    check = 0xFFFF - full_sum(pseudo + body)
    if want >= 0:
        body[-2:] = ((check - want) % 0xFFFF).to_bytes(2, "big")
        check = want
    body[6:8] = (check or 0xFFFF if proto == 136 else check).to_bytes(2, "big")
    return IP(src=src, dst=dst, proto=proto) / Raw(bytes(body))


def moved(packet: Packet, **changes: str) -> bytes:
    new = IP(wire(packet))
    for name, value in changes.items():
        setattr(new, name, value)
    new.chksum = None
    return wire(new)


@EACH
@pytest.mark.parametrize("payload", [b"", b"x", bytes(1400)], ids=["empty", "a byte", "large"])
def test_there_and_back(gateway: Gateway, proto: int, payload: bytes) -> None:
    packet = portless(HOST, SERVER, proto, payload, ttl=7)
    result = gateway.outbound(packet)
    assert (result.ended, result.counted) == ("slow_portless_outbound", {})
    assert result.bytes == moved(packet, src=GATEWAY)
    back = portless(SERVER, GATEWAY, proto, payload)
    result = gateway.inbound(back)
    assert (result.ended, result.counted) == ("slow_portless_inbound", {})
    assert result.bytes == moved(back, dst=HOST)
    for stranger in (portless(OTHER_SERVER, GATEWAY, proto), portless(SERVER, GATEWAY, proto ^ 0x80)):
        assert gateway.inbound(stranger).ended == "own_inbound"


@EACH
def test_two_hosts_one_remote(gateway: Gateway, proto: int) -> None:
    """The first has it, until it is silent for as long as a UDP mapping lives."""
    gateway.attend()
    gateway.outbound(portless(HOST, SERVER, proto))
    result = gateway.outbound(portless(OTHER_HOST, SERVER, proto))
    assert (result.ended, result.punted) == ("drop_portless_taken", PUNT_REFUSED)
    assert gateway.outbound(portless(OTHER_HOST, OTHER_SERVER, proto)).ended == "slow_portless_outbound"
    assert gateway.inbound(portless(SERVER, GATEWAY, proto)).ip.dst == HOST
    assert gateway.inbound(portless(OTHER_SERVER, GATEWAY, proto)).ip.dst == OTHER_HOST
    bindings = gateway.tables.maps["bindings"]
    for keys, values in bindings.items(chunk=16):
        for key, value in zip(keys, values, strict=True):
            value["last_seen"] = ago(301)
            bindings.set(key, value)
    assert gateway.inbound(portless(SERVER, GATEWAY, proto)).ended == "own_inbound"
    assert gateway.outbound(portless(OTHER_HOST, SERVER, proto)).ended == "slow_portless_outbound"
    assert gateway.inbound(portless(SERVER, GATEWAY, proto)).ip.dst == OTHER_HOST


@pytest.mark.parametrize("refresh", [1, 0])
def test_what_refreshes(gateway: Gateway, refresh: int) -> None:
    gateway.tables.set_settings(inbound_refresh=refresh)
    gateway.outbound(portless(HOST, SERVER, 47))
    bindings = gateway.tables.maps["bindings"]
    ((keys, values),) = bindings.items(chunk=16)
    values[0]["last_seen"] = ago(299)
    bindings.set(keys[0], values[0])
    gateway.inbound(portless(SERVER, GATEWAY, 47, bytes(80)))
    binding = bindings.get(keys[0])
    assert (since(int(binding["last_seen"])) < TICKS) == bool(refresh)
    assert (binding["in_packets"], binding["in_bytes"], binding["out_packets"]) == (1, 100, 1)


def test_unknown_protocols_can_be_dropped(gateway: Gateway) -> None:
    gateway.tables.set_settings(drop_other=1)
    assert gateway.outbound(portless(HOST, SERVER, 89)).ended == "drop_protocol"
    assert gateway.outbound(portless(HOST, SERVER, 47)).ended == "slow_portless_outbound"
    assert gateway.outbound(portless(GATEWAY, SERVER, 89), local=True).ended == "own_outbound"


@pytest.mark.req("attacks-leak")
@EACH
def test_without_an_address(gateway: Gateway, proto: int) -> None:
    gateway.tables.set_settings(external=[([0],)])
    assert gateway.outbound(portless(HOST, SERVER, proto)).ended == "drop_no_external"
    assert gateway.entries("bindings") == {}


@EACH
def test_fragments(gateway: Gateway, proto: int) -> None:
    """No ports, so each needs its address only, in any order."""
    for fragment in (
        portless(HOST, SERVER, proto, bytes(64), frag=8),
        portless(HOST, SERVER, proto, bytes(64), flags="MF"),
    ):
        result = gateway.outbound(fragment)
        assert result.bytes == moved(fragment, src=GATEWAY)
    for fragment in (
        portless(SERVER, GATEWAY, proto, bytes(64), frag=8),
        portless(SERVER, GATEWAY, proto, bytes(64), flags="MF"),
    ):
        assert gateway.inbound(fragment).bytes == moved(fragment, dst=HOST)


# --- SCTP ------------------------------------------------------------------------------------------


def test_sctp_keeps_its_ports_and_is_told_apart_by_them(gateway: Gateway) -> None:
    for host, sport in ((HOST, 1000), (OTHER_HOST, 1001)):
        packet = sctp(host, sport, SERVER, 36412)
        assert gateway.outbound(packet).bytes == moved(packet, src=GATEWAY)
    assert gateway.outbound(sctp(OTHER_HOST, 1000, SERVER, 36412)).ended == "drop_portless_taken"
    assert gateway.inbound(sctp(SERVER, 36412, GATEWAY, 1000)).ip.dst == HOST
    assert gateway.inbound(sctp(SERVER, 36412, GATEWAY, 1001)).ip.dst == OTHER_HOST
    assert gateway.inbound(sctp(SERVER, 36413, GATEWAY, 1001)).ended == "own_inbound"


def test_sctp_fragments_follow_their_first(gateway: Gateway) -> None:
    rest = portless(HOST, SERVER, 132, bytes(16), frag=4, id=5)
    assert gateway.outbound(rest).ended == "drop_fragment_orphan"
    first = sctp(HOST, 1000, SERVER, 9, flags="MF", id=5)
    begun = gateway.outbound(first)
    assert begun.ended == "slow_portless_outbound"
    assert gateway.outbound(rest).bytes == moved(rest, src=GATEWAY, id=begun.ip.id)


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("length", range(4))
def test_sctp_without_ports(gateway: Gateway, length: int) -> None:
    assert gateway.outbound(portless(HOST, SERVER, 132, bytes(length))).ended == "drop_malformed"
    assert gateway.inbound(portless(SERVER, GATEWAY, 132, bytes(length))).ended == "drop_malformed"


# --- checksums over addresses ----------------------------------------------------------------------


@pytest.mark.req("checksums-1624")
@pytest.mark.parametrize("proto", SUMMED.values(), ids=SUMMED)
@pytest.mark.parametrize("payload", [b"", b"odd", bytes(range(100))], ids=["empty", "odd", "100"])
def test_checksums_over_addresses(gateway: Gateway, proto: int, payload: bytes) -> None:
    result = gateway.outbound(summed(HOST, SERVER, proto, payload))
    assert result.bytes == wire(summed(GATEWAY, SERVER, proto, payload))
    result = gateway.inbound(summed(SERVER, GATEWAY, proto, payload, sport=53))
    assert result.bytes == wire(summed(SERVER, HOST, proto, payload, sport=53))


@pytest.mark.req("checksums-768")
def test_udp_lite_has_no_checksum_0(gateway: Gateway) -> None:
    """RFC 3828 section 3.1: zero is sent as all ones. The payload is chosen so that ours would be zero."""
    outside = summed(GATEWAY, SERVER, 136, b"", want=0)
    body = wire(outside)[20:]
    inside = bytearray(body)
    inside[6:8] = b"\0\0"
    packet = wire(IP(src=HOST, dst=SERVER, proto=136) / Raw(bytes(inside)))
    check = 0xFFFF - full_sum(packet[12:20] + bytes([0, 136]) + len(body).to_bytes(2, "big") + bytes(inside))
    inside[6:8] = check.to_bytes(2, "big")
    result = gateway.outbound(IP(src=HOST, dst=SERVER, proto=136) / Raw(bytes(inside)))
    assert result.bytes[26:28] == b"\xff\xff"


# --- ICMP errors -----------------------------------------------------------------------------------


@pytest.mark.req("5508-4")
@pytest.mark.parametrize("kind", [(3, 2), (3, 4), (11, 0), (12, 0)])
@pytest.mark.parametrize("proto", [47, 50, 132])
def test_errors_about_them(gateway: Gateway, proto: int, kind: tuple[int, int]) -> None:
    sent = sctp(HOST, 1000, SERVER, 9) if proto == 132 else portless(HOST, SERVER, proto)
    outside = IP(gateway.outbound(sent).bytes)
    for how in (cut, wire):
        error = icmp_error(ROUTER, GATEWAY, how(outside), kind, rest=1400)
        result = gateway.inbound(error)
        assert result.ended == "slow_icmp_error_inbound"
        assert result.bytes == wire(icmp_error(ROUTER, HOST, how(sent), kind, rest=1400))
    answer = sctp(SERVER, 9, GATEWAY, 1000) if proto == 132 else portless(SERVER, GATEWAY, proto)
    delivered = IP(gateway.inbound(answer).bytes)
    for source in (HOST, OTHER_HOST):
        result = gateway.outbound(icmp_error(source, SERVER, cut(delivered), kind))
        assert result.bytes == wire(icmp_error(GATEWAY, SERVER, cut(answer), kind))
    result = gateway.outbound(icmp_error(GATEWAY, SERVER, cut(delivered), kind), local=True)
    assert result.bytes == wire(icmp_error(GATEWAY, SERVER, cut(answer), kind))


@pytest.mark.req("5508-3")
@pytest.mark.parametrize("at", [22, 27, 28 + 8, 28 + 10, 28 + 19])
def test_damaged_errors_about_them(gateway: Gateway, at: int) -> None:
    """Outer ICMP checksum, or the quoted IP header's."""
    gateway.outbound(portless(HOST, SERVER, 47))
    for frame, send in (
        (icmp_error(ROUTER, GATEWAY, portless(GATEWAY, SERVER, 47)), gateway.inbound),
        (icmp_error(HOST, SERVER, portless(SERVER, HOST, 47)), gateway.outbound),
    ):
        broken = bytearray(wire(frame))
        broken[at] ^= 1
        assert send(Raw(bytes(broken))).ended == "drop_icmp_checksum"


def test_errors_about_nobodys(gateway: Gateway) -> None:
    gateway.outbound(portless(HOST, SERVER, 47))
    for quoted in (portless(GATEWAY, OTHER_SERVER, 47), portless(GATEWAY, SERVER, 50)):
        assert gateway.inbound(icmp_error(ROUTER, GATEWAY, quoted)).ended == "own_inbound"
    for quoted in (portless(OTHER_SERVER, HOST, 47), portless(SERVER, OTHER_HOST, 47)):
        assert gateway.outbound(icmp_error(HOST, SERVER, quoted)).ended == "drop_icmp_error_no_session"


def test_to_a_host_with_an_address_of_its_own(gateway: Gateway) -> None:
    """A hairpin has one end: where it is delivered."""
    twin = "203.0.113.9"
    gateway.tables.set_counterparts([(IPv4Network(OTHER_HOST), IPv4Network(twin), 0)])
    try:
        first = gateway.lan_in(portless(HOST, twin, 47))
        assert (first.verdict, first.ended) == ("redirect", "")
        second = gateway.turned(first)
        assert (second.ended, second.ip.src, second.ip.dst) == ("slow_hairpin", GATEWAY, OTHER_HOST)
    finally:
        gateway.tables.set_counterparts([])
