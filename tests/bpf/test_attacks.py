"""What an attacker outside, or a host gone wild, sends: each kind dropped under its own name, and nobody harmed."""

from ipaddress import IPv4Network

import pytest
from harness import (
    ACK,
    GATEWAY,
    GATEWAY_INSIDE,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    ROUTER,
    RST,
    SERVER,
    SYN,
    Gateway,
    age,
    echo,
    echo_reply,
    full_sum,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP
from scapy.packet import Packet, Raw
from test_icmp_errors import icmp_error

from xdpmasq.abi import LIFE_SESSION

EMBRYOS = 4096  # bpf/types.h

# --- sources that cannot be there ------------------------------------------------------------------

MARTIANS = {
    "this network": "0.1.2.3",
    "loopback": "127.0.0.1",
    "multicast": "224.0.0.1",
    "multicast's end": "239.255.255.255",
    "reserved": "240.0.0.1",
    "broadcast": "255.255.255.255",
    "our own address": GATEWAY,
    "our inner address": GATEWAY_INSIDE,
    "an internal host": HOST,
    "an internal host without sessions": OTHER_HOST,
}


@pytest.mark.req("attacks-martian")
@pytest.mark.parametrize("source", MARTIANS.values(), ids=MARTIANS)
def test_martian_sources(gateway: Gateway, source: str) -> None:
    """Of every kind of packet, wherever it would go: to a session, a forward, an open port, ourselves."""
    gateway.filtering(2)
    gateway.forward("udp", 8080, (HOST, 80))
    gateway.forward("tcp", 8080, (HOST, 80))
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    tcp_port = gateway.connect(HOST, 5000, SERVER, 80)
    before = gateway.tables.sessions.tobytes()
    for packet in (
        udp(source, 53, GATEWAY, port),
        udp(source, 53, GATEWAY, 8080),
        udp(source, 53, GATEWAY, 9),
        udp(source, 53, "203.0.113.2", 9),
        udp(source, 53, "255.255.255.255", 9),
        tcp(source, 80, GATEWAY, 8080, SYN),
        tcp(source, 80, GATEWAY, tcp_port, ACK),
        tcp(source, 80, GATEWAY, 22, SYN),
        echo(source, GATEWAY, 7),
        echo_reply(source, GATEWAY, 7),
        icmp_error(source, GATEWAY, udp(GATEWAY, port, SERVER, 53)),
        IP(src=source, dst=GATEWAY, proto=47) / Raw(bytes(12)),
        IP(src=source, dst=GATEWAY, proto=132) / Raw(bytes(12)),
        IP(src=source, dst=GATEWAY, proto=17, frag=3) / Raw(bytes(12)),
        udp(source, 53, GATEWAY, 8080, flags="MF"),
    ):
        result = gateway.inbound(packet)
        assert (result.verdict, result.ended) == ("drop", "drop_source_martian")
    assert gateway.inbound(udp(source, 53, HOST, 5000)).verdict == "drop", "for its destination, too"
    assert gateway.tables.sessions.tobytes() == before
    assert gateway.entries("fragments") == {}


@pytest.mark.req("attacks-martian")
@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(udp("10.0.0.1", 67, "255.255.255.255", 68), id="a private server's offer"),
        pytest.param(udp("203.0.113.10", 67, GATEWAY, 68), id="a lease renewed"),
        pytest.param(udp("0.0.0.0", 68, "255.255.255.255", 67), id="another client's question"),
        pytest.param(udp("169.254.1.1", 67, "255.255.255.255", 68), id="a link-local server"),
        pytest.param(IP(src="0.0.0.0", dst="224.0.0.1", proto=2) / Raw(bytes(8)), id="IGMP without an address"),
        pytest.param(echo("192.168.100.1", GATEWAY, 7), id="the modem, with a private address"),
    ],
)
def test_what_looks_strange_and_is_not(gateway: Gateway, packet: Packet) -> None:
    assert gateway.inbound(packet).ended == "own_inbound"


# --- options ---------------------------------------------------------------------------------------

LOOSE, STRICT = b"\x83\x0b\x04", b"\x89\x0b\x04"
ROUTE = bytes.fromhex("cb007163cb007162")
SOURCE_ROUTES = {
    "loose": LOOSE + ROUTE,
    "strict": STRICT + ROUTE,
    "loose, exhausted": LOOSE[:2] + b"\x0c" + ROUTE,
    "after no-operations": b"\x01" * 5 + LOOSE + ROUTE,
    "after a recorded route": b"\x07\x0b\x04" + bytes(8) + STRICT + ROUTE,
    "at the very end": b"\x01" * 37 + b"\x83\x03\x04",
    "after options of length 2": b"\x99\x02" * 3 + LOOSE + ROUTE,
    "cut off": b"\x01" * 38 + b"\x83\x0b",
    "cut off before its length": b"\x01" * 39 + b"\x83",
}
OTHER_OPTIONS = {
    "record route": b"\x07\x27\x04" + bytes(36),
    "router alert": b"\x94\x04\x00\x00",
    "no-operations": b"\x01" * 40,
    "a source route behind the end of the list": b"\x00" + LOOSE + ROUTE,
    "its number within another option": b"\x44\x0c" + b"\x83\x89" * 5,
}


def optioned(packet: Packet, options: bytes) -> Raw:
    """With options as they are, filled up to words."""
    data = wire(packet)
    options += bytes(-len(options) % 4)
    header = bytearray(data[:20] + options)
    header[0] = 0x40 | len(header) // 4
    header[2:4] = (len(data) + len(options)).to_bytes(2, "big")
    header[10:12] = b"\0\0"
    header[10:12] = (0xFFFF - full_sum(bytes(header))).to_bytes(2, "big")
    return Raw(bytes(header) + data[20:])


def _packets(source: str, destination: str, port: int, options: bytes) -> list[Packet]:
    plain = [
        udp(source, 53, destination, port),
        tcp(source, 53, destination, port, SYN),
        IP(src=source, dst=destination, proto=47) / Raw(bytes(8)),
        IP(src=source, dst=destination, proto=17, frag=3) / Raw(bytes(8)),
        IP(src=source, dst=destination) / ICMP() / Raw(bytes(8)),
    ]
    return [optioned(each, options) for each in plain]


@pytest.mark.req("attacks-options")
@pytest.mark.parametrize("options", SOURCE_ROUTES.values(), ids=SOURCE_ROUTES)
def test_source_routes(gateway: Gateway, options: bytes) -> None:
    gateway.forward("udp", 8080, (HOST, 80))
    for packet in _packets(HOST, SERVER, 53, options):
        assert gateway.outbound(packet).ended == "drop_source_route"
    for packet in _packets(SERVER, GATEWAY, 8080, options):
        assert gateway.inbound(packet).ended == "drop_source_route"
    for packet in _packets(HOST, GATEWAY, 8080, options):
        assert gateway.lan_in(packet).ended == "drop_source_route"
        assert gateway.fast_outbound(packet).ended == "up_unusual_ip"
    assert gateway.tables.live_slots().tolist() == []


@pytest.mark.req("attacks-options")
@pytest.mark.parametrize("options", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_other_options_are_kept(gateway: Gateway, options: bytes) -> None:
    packet = optioned(udp(HOST, 5000, SERVER, 53), options)
    result = gateway.outbound(packet)
    assert result.ended == "slow_outbound"
    header = (result.bytes[0] & 15) * 4
    assert result.bytes[20:header] == wire(packet)[20:header]
    result = gateway.inbound(optioned(udp(SERVER, 53, GATEWAY, result.port), options))
    assert (result.ended, result.ip.dst) == ("slow_inbound", HOST)


# --- resets ----------------------------------------------------------------------------------------


@pytest.mark.req("attacks-rst")
@pytest.mark.parametrize("ttl", [0, 1, 2])
def test_a_reset_that_ends_at_the_gateway(gateway: Gateway, ttl: int) -> None:
    """With the exact number: of TTL 1 the kernel lets nothing pass, so the host would not hear of it."""
    port = gateway.connect(HOST, 5000, SERVER, 80)
    gateway.inbound(tcp(SERVER, 80, GATEWAY, port, RST, seq=501, ttl=ttl))
    assert bool(gateway.session(HOST, 5000, "tcp", SERVER, 80)["in"]["tcp_seen"] & RST) == (ttl > 1)


# --- a flood of SYNs at a forward ------------------------------------------------------------------


def _embryos(gateway: Gateway) -> int:
    rows = gateway.tables.sessions[gateway.slots()]
    live = rows["life"] & LIFE_SESSION != 0
    return int((live & (rows["sent"]["packets"] == 0)).sum())


@pytest.mark.req("attacks-synflood")
def test_syn_flood(gateway: Gateway) -> None:
    """Three times as many as may wait: those who have answered stay, and a newcomer connects at once."""
    gateway.forward("tcp", 10000, (HOST, 10000), last=30000)
    friends = list(range(10000, 10200))
    for port in friends:
        gateway.inbound(tcp(OTHER_SERVER, 7000, GATEWAY, port, SYN, seq=100))
        gateway.outbound(tcp(HOST, port, OTHER_SERVER, 7000, SYN | ACK, seq=500, ack=101))
        gateway.inbound(tcp(OTHER_SERVER, 7000, GATEWAY, port, ACK, seq=101, ack=501))
    from harness import _frame  # noqa: PLC0415

    frame = bytearray(_frame(tcp("45.0.0.1", 7000, GATEWAY, 0, SYN), "02:00:00:00:01:01", "02:00:00:00:10:10"))
    evicted = 0
    for number in range(3 * EMBRYOS):
        frame[26:30] = (0x2D000000 + number).to_bytes(4, "big")
        frame[36:38] = (10200 + number).to_bytes(2, "big")
        context = bytearray(192)
        context[36:44] = gateway.wan.to_bytes(4, "little") * 2
        gateway.bench.programs["masq_wan_in"].test_run(bytes(frame), context=bytes(context), room=128)
    counted = gateway.counted()
    assert counted["slow_inbound"] == counted["forward_opened"] == 3 * EMBRYOS
    evicted = counted["embryo_evicted"]
    assert evicted >= 2 * EMBRYOS
    assert _embryos(gateway) <= EMBRYOS
    for port in friends:
        assert gateway.inbound(tcp(OTHER_SERVER, 7000, GATEWAY, port, ACK, seq=101, ack=501)).counted == {}
        assert gateway.outbound(tcp(HOST, port, OTHER_SERVER, 7000, ACK, seq=501, ack=101)).counted == {}
    gateway.assert_tables_agree()
    newcomer = gateway.inbound(tcp(ROUTER, 7000, GATEWAY, 10500, SYN, seq=100))
    assert newcomer.ip.dst == HOST
    assert gateway.outbound(tcp(HOST, 10500, ROUTER, 7000, SYN | ACK, seq=500, ack=101)).port == 10500


@pytest.mark.req("attacks-synflood")
def test_a_flood_that_shares_one_port(gateway: Gateway) -> None:
    """Two targets, so that no session is found through a mapping of its host: evicted ones leave nothing behind."""
    gateway.forward("tcp", 8080, (HOST, 80), (OTHER_HOST, 80))
    for slot in range(EMBRYOS):
        gateway.tables.maps["embryos"].set(slot, 8080)  # every newcomer meets the first
    for number in range(60):
        gateway.inbound(tcp("45.0.0.1", 1000 + number, GATEWAY, 8080, SYN))
        gateway.assert_tables_agree()
    assert gateway.counted().get("drop_sessions_full", 0) == 0


def test_a_one_sided_stream_of_datagrams_survives(gateway: Gateway) -> None:
    """Nobody answers to a log: evicted, the next datagram opens its session again."""
    gateway.forward("udp", 514, (HOST, 514))
    gateway.inbound(udp(SERVER, 7000, GATEWAY, 514))
    for slot in range(EMBRYOS):
        gateway.tables.maps["embryos"].set(slot, 65536 + 514)
    result = gateway.inbound(udp(OTHER_SERVER, 7000, GATEWAY, 514))
    assert result.counted["embryo_evicted"] == 1
    assert gateway.inbound(udp(SERVER, 7000, GATEWAY, 514)).ip.dst == HOST
    gateway.assert_tables_agree()


# --- ports of one's own ----------------------------------------------------------------------------


@pytest.mark.req("attacks-exhaust")
def test_live_sessions_survive_a_used_up_pool(gateway: Gateway) -> None:
    gateway.pool(udp=((3000, 20),))
    for number in range(20):
        gateway.open(udp(HOST, 5000 + number, SERVER, 53))
    for number in range(200):
        assert gateway.outbound(udp(OTHER_HOST, 6000 + number, SERVER, 53)).ended == "drop_ports_exhausted"
    for number in range(20):
        assert gateway.outbound(udp(HOST, 5000 + number, SERVER, 53)).counted == {}
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    results = {gateway.outbound(udp(OTHER_HOST, 7000, SERVER, 53)).ended for _ in range(60)}
    assert "slow_outbound" in results, "what has expired is taken back"


@pytest.mark.req("attacks-leak")
@pytest.mark.req("attacks-spoof")
@pytest.mark.parametrize(("local", "ended"), [(False, "drop_source_foreign"), (True, "own_outbound")])
def test_who_claims_the_external_address_of_another(gateway: Gateway, local: bool, ended: str) -> None:
    """The table of hosts with addresses of their own leads both ways; a source is looked for in one."""
    twin = "203.0.113.9"
    gateway.tables.set_counterparts([(IPv4Network(OTHER_HOST), IPv4Network(twin), 0)])
    try:
        result = gateway.outbound(udp(twin, 5000, SERVER, 53), local=local)
        assert result.ended == ended
        assert IP(result.bytes).src == twin
    finally:
        gateway.tables.set_counterparts([])
