"""LAN to WAN through the slow path: translation, endpoint-independent mapping, and what must never leave."""

from dataclasses import dataclass
from ipaddress import IPv4Network

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    GATEWAY_INSIDE,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    PREFIXES,
    PSH,
    RST,
    SERVER,
    SYN,
    URG,
    Gateway,
    echo,
    echo_reply,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP, UDP, IPOption_RR, IPOption_Timestamp
from scapy.packet import Packet, Raw

from xdpmasq.abi import PREFIX_INTERNAL

RECORD_ROUTE = [IPOption_RR(length=7, pointer=4, routers=["0.0.0.0"])]
TIMESTAMP = [IPOption_Timestamp(length=12, pointer=9, oflw=0, flg=0)]


@pytest.mark.parametrize(
    ("packet", "port_field"),
    [
        pytest.param(udp(HOST, 5000, SERVER, 53), "sport", id="UDP"),
        pytest.param(udp(HOST, 5000, SERVER, 53, b""), "sport", id="UDP, empty"),
        pytest.param(udp(HOST, 5000, SERVER, 53, b"odd"), "sport", id="UDP, odd length"),
        pytest.param(udp(HOST, 0, SERVER, 53), "sport", id="UDP from port 0"),
        pytest.param(udp(HOST, 5000, SERVER, 53, bytes(1400)), "sport", id="UDP, large"),
        pytest.param(tcp(HOST, 5000, SERVER, 80, SYN), "sport", id="TCP SYN"),
        pytest.param(tcp(HOST, 5000, SERVER, 80, ACK, payload=b"x" * 99), "sport", id="TCP in the middle"),
        pytest.param(echo(HOST, SERVER, 77), "id", id="ping"),
        pytest.param(echo(HOST, SERVER, 77, b""), "id", id="ping, empty"),
        pytest.param(udp(HOST, 5000, SERVER, 53, ttl=1), "sport", id="TTL 1 is the kernel's business"),
        pytest.param(udp(HOST, 5000, SERVER, 53, tos=0xB8, id=0x1234, flags="DF"), "sport", id="TOS, id and DF stay"),
        pytest.param(udp(GATEWAY_INSIDE, 5000, SERVER, 53), "sport", id="the gateway's inner address"),
    ],
)
def test_translated(gateway: Gateway, packet: Packet, port_field: str) -> None:
    result = gateway.outbound(packet)
    assert result.ended == "slow_outbound"
    assert result.counted == {"mapping_opened": 1, "session_opened": 1}
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, **{port_field: result.port}))
    assert gateway.outbound(packet).bytes == result.bytes


@pytest.mark.parametrize("options", [RECORD_ROUTE, TIMESTAMP], ids=["record route", "timestamp"])
@pytest.mark.parametrize(
    ("packet", "port_field"),
    [
        pytest.param(udp(HOST, 5000, SERVER, 53), "sport", id="UDP"),
        pytest.param(tcp(HOST, 5000, SERVER, 80, SYN), "sport", id="TCP"),
        pytest.param(echo(HOST, SERVER, 77), "id", id="ping"),
    ],
)
def test_ip_options(gateway: Gateway, packet: Packet, port_field: str, options: list[object]) -> None:
    packet = IP(src=packet.src, dst=packet.dst, options=options) / packet.payload
    result = gateway.outbound(packet)
    assert result.ended == "slow_outbound"
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, **{port_field: result.port}))


# --- endpoint-independent mapping ------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How to make packets of a protocol between any two endpoints."""

    name: str

    def out(self, host: str, port: int, remote: str, remote_port: int) -> Packet:
        if self.name == "icmp":
            return echo(host, remote, port)
        make = udp if self.name == "udp" else tcp
        return make(host, port, remote, remote_port, **({"flags": SYN} if self.name == "tcp" else {}))

    def back(self, remote: str, remote_port: int, port: int) -> Packet:
        if self.name == "icmp":
            return echo_reply(remote, GATEWAY, port)
        make = udp if self.name == "udp" else tcp
        return make(remote, remote_port, GATEWAY, port, **({"flags": SYN | ACK} if self.name == "tcp" else {}))


EACH_KIND = [
    pytest.param(Kind("udp"), marks=pytest.mark.req("4787-1"), id="udp"),
    pytest.param(Kind("tcp"), marks=pytest.mark.req("5382-1"), id="tcp"),
    pytest.param(Kind("icmp"), marks=pytest.mark.req("5508-1"), id="icmp"),
]
REMOTES = [(f"198.51.100.{i}", 1000 + i % 3) for i in range(1, 41)]


@pytest.mark.parametrize("kind", EACH_KIND)
def test_one_external_port_for_all_remotes(gateway: Gateway, kind: Kind) -> None:
    external = {gateway.open(kind.out(HOST, 5000, *remote)) for remote in REMOTES}
    assert len(external) == 1
    assert gateway.mappings == 1
    for remote in REMOTES:
        back = gateway.inbound(kind.back(*remote, *external))
        assert back.ended == "slow_inbound"
        assert back.ip.dst == HOST


@pytest.mark.parametrize("kind", EACH_KIND[:2])
def test_remotes_that_differ_only_in_port(gateway: Gateway, kind: Kind) -> None:
    external = {gateway.open(kind.out(HOST, 5000, SERVER, port)) for port in (80, 81, 82)}
    assert len(external) == 1
    assert len(gateway.slots()) == 3
    assert gateway.inbound(kind.back(SERVER, 83, *external)).ended == "drop_filtered"


@pytest.mark.req("4787-3")
@pytest.mark.req("5382-7")
@pytest.mark.req("5508-1")
@pytest.mark.parametrize("kind", EACH_KIND)
def test_hosts_with_the_same_port_do_not_collide(gateway: Gateway, kind: Kind) -> None:
    hosts = [f"192.168.0.{i}" for i in range(2, 50)]
    external = {host: gateway.open(kind.out(host, 5000, SERVER, 80)) for host in hosts}
    assert len(set(external.values())) == len(hosts)
    for host, port in external.items():
        assert gateway.inbound(kind.back(SERVER, 80, port)).ip.dst == host


@pytest.mark.req("7857-6")
def test_mappings_are_per_protocol(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 80))
    assert gateway.inbound(tcp(SERVER, 80, GATEWAY, port, SYN | ACK)).ended == "own_inbound"
    assert gateway.inbound(echo_reply(SERVER, GATEWAY, port)).ended == "own_inbound"
    gateway.open(tcp(HOST, 5000, SERVER, 80, SYN))
    assert gateway.mappings == 2


def test_counts_packets_and_bytes(gateway: Gateway) -> None:
    packet = udp(HOST, 5000, SERVER, 53, bytes(72))  # 100 bytes from the IP header on
    port = gateway.open(packet)
    gateway.open(packet)
    gateway.inbound(udp(SERVER, 53, GATEWAY, port, bytes(172)))
    session = gateway.session(HOST, 5000, "udp", SERVER, 53)
    assert (session["sent"]["packets"], session["sent"]["bytes"]) == (2, 200)
    assert (session["received"]["packets"], session["received"]["bytes"]) == (1, 200)


# --- what must not leave ---------------------------------------------------------------------------


def _icmp(icmp_type: int, src: str = HOST) -> Packet:
    return IP(src=src, dst=SERVER) / ICMP(type=icmp_type) / Raw(bytes(64))


UNTRANSLATABLE = [
    *(
        pytest.param(_icmp(number), "drop_icmp_type", id=f"ICMP type {number}")
        for number in (0, 1, 4, 5, 9, 10, 13, 14, 15, 17, 42, 255)
    ),
    *(
        pytest.param(_icmp(number), "drop_icmp_error_no_session", id=f"ICMP error {number} quoting nothing")
        for number in (3, 11, 12)
    ),
    *(
        pytest.param(
            IP(src=HOST, dst=SERVER, frag=185, flags=flags, proto=number) / Raw(bytes(64)),
            "drop_fragment_orphan",
            id=f"orphan fragment of {number}, flags {flags}",
        )
        for number in (1, 6, 17, 132)
        for flags in (0, "MF")
    ),
    *(
        pytest.param(IP(src=HOST, dst=SERVER, proto=number) / Raw(bytes(7)), "drop_malformed", id=f"7 of {number}")
        for number in (1, 6, 17)
    ),
    pytest.param(IP(src=HOST, dst=SERVER, proto=6) / Raw(bytes(19)), "drop_malformed", id="19 bytes of TCP"),
    pytest.param(udp("10.1.2.3", 1, SERVER, 2), "drop_source_private", id="private source, not of our LAN"),
    pytest.param(udp("100.64.1.1", 1, SERVER, 2), "drop_source_private", id="shared address space"),
    pytest.param(udp("169.254.1.1", 1, SERVER, 2), "drop_source_private", id="link-local source"),
    pytest.param(udp("127.0.0.1", 1, SERVER, 2), "drop_source_private", id="loopback source"),
    pytest.param(udp("192.168.1.2", 1, SERVER, 2), "drop_source_private", id="the neighbouring private network"),
    pytest.param(udp("0.0.0.0", 68, SERVER, 67), "drop_source_private", id="no source, from the LAN"),
    pytest.param(IP(src="10.1.2.3", dst=SERVER, frag=9) / Raw(b"x"), "drop_source_private", id="private fragment"),
]


@pytest.mark.req("attacks-leak")
@pytest.mark.req("5508-11")
@pytest.mark.parametrize(("packet", "counter"), UNTRANSLATABLE)
def test_untranslatable_never_leaves(gateway: Gateway, packet: Packet, counter: str) -> None:
    result = gateway.outbound(packet)
    assert (result.verdict, result.ended) == ("drop", counter)
    assert gateway.slots() == []


@pytest.mark.req("attacks-spoof")
@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(udp(OTHER_SERVER, 1, SERVER, 2), id="UDP"),
        pytest.param(tcp(OTHER_SERVER, 1, SERVER, 2, SYN), id="TCP"),
        pytest.param(echo(OTHER_SERVER, SERVER, 2), id="ping"),
        pytest.param(IP(src=OTHER_SERVER, dst=SERVER, proto=47) / Raw(bytes(8)), id="GRE"),
        pytest.param(IP(src=OTHER_SERVER, dst=SERVER, frag=9) / Raw(bytes(8)), id="fragment"),
        pytest.param(IP(src=OTHER_SERVER, dst=SERVER) / ICMP(type=3) / udp(SERVER, 1, HOST, 2), id="ICMP error"),
    ],
)
def test_foreign_source_from_the_lan(gateway: Gateway, packet: Packet) -> None:
    assert gateway.outbound(packet).ended == "drop_source_foreign"


def test_routed_between_other_interfaces(gateway: Gateway) -> None:
    """A third network with public addresses is the kernel's business, not ours."""
    assert gateway.outbound(udp(OTHER_SERVER, 1, SERVER, 2), ingress_ifindex=1).ended == "own_outbound"


# --- TCP without a session -------------------------------------------------------------------------

INSANE = {
    "NULL": 0,
    "XMAS": FIN | PSH | URG,
    "FIN alone": FIN,
    "PSH alone": PSH,
    "URG alone": URG,
    "SYN+FIN": SYN | FIN,
    "SYN+RST": SYN | RST,
    "SYN+FIN+ACK": SYN | FIN | ACK,
    "SYN+RST+ACK": SYN | RST | ACK,
    "FIN+RST": FIN | RST,
    "FIN+RST+ACK": FIN | RST | ACK,
    "all": 0x3F,
}
OPEN_NOTHING = {"RST": RST, "RST+ACK": RST | ACK, "FIN+ACK": FIN | ACK, "SYN+ACK": SYN | ACK}


@pytest.mark.req("attacks-tcp_flags")
@pytest.mark.parametrize("flags", INSANE.values(), ids=INSANE)
def test_insane_flags(gateway: Gateway, flags: int) -> None:
    assert gateway.outbound(tcp(HOST, 5000, SERVER, 80, flags)).ended == "drop_tcp_flags"
    assert gateway.slots() == []
    port = gateway.connect(HOST, 5000, SERVER, 80)
    before = gateway.session(HOST, 5000, "tcp", SERVER, 80).tobytes()
    assert gateway.outbound(tcp(HOST, 5000, SERVER, 80, flags)).ended == "drop_tcp_flags"
    assert gateway.inbound(tcp(SERVER, 80, GATEWAY, port, flags)).ended == "drop_tcp_flags"
    assert gateway.session(HOST, 5000, "tcp", SERVER, 80).tobytes() == before


@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize("flags", OPEN_NOTHING.values(), ids=OPEN_NOTHING)
def test_no_session_and_cannot_open_one(gateway: Gateway, flags: int) -> None:
    assert gateway.outbound(tcp(HOST, 5000, SERVER, 80, flags)).ended == "drop_tcp_no_session"
    assert gateway.slots() == []
    gateway.connect(HOST, 5000, SERVER, 80)
    assert gateway.outbound(tcp(HOST, 5000, SERVER, 81, flags)).ended == "drop_tcp_no_session"
    assert len(gateway.slots()) == 1


@pytest.mark.req("attacks-leak")
def test_no_external_address(gateway: Gateway) -> None:
    gateway.tables.set_settings(external=[([0],)])
    assert gateway.outbound(udp(HOST, 5000, SERVER, 53)).ended == "drop_no_external"
    assert gateway.outbound(IP(src=HOST, dst=SERVER) / UDP(sport=0, dport=0)).ended == "drop_no_external"
    assert gateway.inbound(udp(SERVER, 53, "0.0.0.0", 0)).ended == "own_inbound"


def test_second_host_is_not_disturbed(gateway: Gateway) -> None:
    first = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.outbound(tcp(OTHER_HOST, 5000, SERVER, 53, RST))
    gateway.outbound(udp("10.0.0.9", 5000, SERVER, 53))
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == first


# --- WANs without Ethernet header ------------------------------------------------------------------

ABROAD = "8.0.9.9"  # what such test runs need, see Gateway.outbound_l3


@pytest.mark.xdist_group("without Ethernet")  # what they need is compiled once, while the others go on
@pytest.mark.parametrize("options", [[], RECORD_ROUTE], ids=["plain", "IP options"])
def test_wan_without_ethernet(gateway: Gateway, options: list[object]) -> None:
    inside = IPv4Network("8.0.0.0/24")
    gateway.tables.set_prefixes({**PREFIXES, inside: PREFIX_INTERNAL})
    packet = udp("8.0.0.2", 5000, ABROAD, 53, options=options)
    result = gateway.outbound_l3(packet)
    assert result.ended == "slow_outbound"
    port = int.from_bytes(result.frame[(result.frame[0] & 15) * 4 :][:2], "big")
    assert result.frame == wire(rebuilt(packet, src=GATEWAY, sport=port))
    answer = udp(ABROAD, 53, GATEWAY, port, options=options)
    assert gateway.inbound_l3(answer).frame == wire(rebuilt(answer, dst="8.0.0.2", dport=5000))
    gateway.accelerate()
    gateway.outbound_l3(packet)
    assert gateway.fast_outbound(packet).ended in ("up_not_armed", "up_unusual_ip"), "there is no MAC to learn"
