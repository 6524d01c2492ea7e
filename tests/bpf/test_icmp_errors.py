"""ICMP errors: outer address and quoted packet translated together, and nothing else moved by them."""

from collections.abc import Callable
from dataclasses import dataclass
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
    SERVER,
    SYN,
    Gateway,
    age,
    echo,
    echo_reply,
    full_sum,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP, UDP, IPOption_RR
from scapy.packet import Packet, Raw

RECORD_ROUTE = [IPOption_RR(length=11, pointer=4, routers=["0.0.0.0"] * 2)]


def icmp_error(
    src: str, dst: str, about: Packet | bytes, type_code: tuple[int, int] = (3, 1), *, rest: int = 0, **ip: object
) -> Packet:
    """An ICMP error; ``rest`` is what its header's second word holds (the MTU of 3/4)."""
    head = bytes([*type_code, 0, 0]) + rest.to_bytes(4, "big")
    body = head + wire(about)
    check = ((0xFFFF - full_sum(body)) % 0xFFFF).to_bytes(2, "big")
    return IP(src=src, dst=dst, proto=1, **ip) / Raw(head[:2] + check + head[4:] + wire(about))


def cut(packet: Packet, transport: int = 8) -> bytes:
    """The packet as a thrifty router quotes it: IP header and so many bytes of its transport."""
    data = wire(packet)
    return data[: (data[0] & 15) * 4 + transport]


@dataclass(frozen=True)
class Flow:
    """A session and the packets that errors are about."""

    name: str
    sent: Packet  # by the host
    outside: Callable[[int], dict[str, object]]  # what of it changes outside
    answer: Callable[[int], Packet]  # as it arrives at the gateway
    inside: dict[str, object]  # what of that changes inside


def _no_checksum(packet: Packet) -> Packet:
    packet[UDP].chksum = 0
    return packet


FLOWS = [
    Flow(
        "UDP",
        udp(HOST, 5000, SERVER, 53, ttl=3, id=99),
        lambda port: {"src": GATEWAY, "sport": port},
        lambda port: udp(SERVER, 53, GATEWAY, port),
        {"dst": HOST, "dport": 5000},
    ),
    Flow(
        "UDP without checksum",
        _no_checksum(udp(HOST, 5000, SERVER, 53)),
        lambda port: {"src": GATEWAY, "sport": port},
        lambda port: _no_checksum(udp(SERVER, 53, GATEWAY, port)),
        {"dst": HOST, "dport": 5000},
    ),
    Flow(
        "TCP",
        tcp(HOST, 5000, SERVER, 80, SYN, seq=77),
        lambda port: {"src": GATEWAY, "sport": port},
        lambda port: tcp(SERVER, 80, GATEWAY, port, SYN | ACK, payload=b"x"),
        {"dst": HOST, "dport": 5000},
    ),
    Flow(
        "ping",
        echo(HOST, SERVER, 5000),
        lambda port: {"src": GATEWAY, "id": port},
        lambda port: echo_reply(SERVER, GATEWAY, port),
        {"dst": HOST, "id": 5000},
    ),
    Flow(
        "UDP with IP options",
        udp(HOST, 5000, SERVER, 53, options=RECORD_ROUTE),
        lambda port: {"src": GATEWAY, "sport": port},
        lambda port: udp(SERVER, 53, GATEWAY, port, options=RECORD_ROUTE),
        {"dst": HOST, "dport": 5000},
    ),
    Flow(
        "TCP with IP options",
        tcp(HOST, 5000, SERVER, 80, SYN, options=RECORD_ROUTE),
        lambda port: {"src": GATEWAY, "sport": port},
        lambda port: tcp(SERVER, 80, GATEWAY, port, SYN | ACK, options=RECORD_ROUTE),
        {"dst": HOST, "dport": 5000},
    ),
]
EACH_FLOW = [pytest.param(flow, id=flow.name) for flow in FLOWS]
QUOTES = {"8 bytes": cut, "12 bytes": lambda packet: cut(packet, 12), "all": wire}
EACH_QUOTE = [pytest.param(how, id=f"quoting {name}") for name, how in QUOTES.items()]
KINDS = {
    "unreachable": (3, 1),
    "port unreachable": (3, 3),
    "time exceeded": (11, 0),
    "reassembly": (11, 1),
    "parameter": (12, 0),
}


@pytest.mark.req("5508-4")
@pytest.mark.req("5508-10")
@pytest.mark.req("5382-9")
@pytest.mark.parametrize("how", EACH_QUOTE)
@pytest.mark.parametrize("type_code", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("flow", EACH_FLOW)
def test_inbound(gateway: Gateway, flow: Flow, how: Callable[[Packet], bytes], type_code: tuple[int, int]) -> None:
    quoted = rebuilt(flow.sent, **flow.outside(gateway.open(flow.sent)))
    result = gateway.inbound(icmp_error(ROUTER, GATEWAY, how(quoted), type_code))
    assert (result.ended, result.counted) == ("slow_icmp_error_inbound", {})
    assert result.bytes == wire(rebuilt(icmp_error(ROUTER, HOST, how(flow.sent), type_code)))


@pytest.mark.req("5508-5")
@pytest.mark.parametrize("how", EACH_QUOTE)
@pytest.mark.parametrize("type_code", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("flow", EACH_FLOW)
def test_outbound(gateway: Gateway, flow: Flow, how: Callable[[Packet], bytes], type_code: tuple[int, int]) -> None:
    answer = flow.answer(gateway.open(flow.sent))
    delivered = rebuilt(answer, **flow.inside)
    result = gateway.outbound(icmp_error(HOST, SERVER, how(delivered), type_code))
    assert (result.ended, result.counted) == ("slow_icmp_error_outbound", {})
    assert result.bytes == wire(rebuilt(icmp_error(GATEWAY, SERVER, how(answer), type_code)))


@pytest.mark.req("5508-5")
def test_outbound_from_a_router_inside(gateway: Gateway) -> None:
    """Not the session's own host: another internal address complains. It too becomes the public one."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    answer = udp(SERVER, 53, GATEWAY, port)
    result = gateway.outbound(icmp_error(OTHER_HOST, SERVER, cut(rebuilt(answer, dst=HOST, dport=5000)), (11, 0)))
    assert result.bytes == wire(icmp_error(GATEWAY, SERVER, cut(answer), (11, 0)))


@pytest.mark.parametrize("mtu", [552, 1280, 1400])
def test_path_mtu_is_kept(gateway: Gateway, mtu: int) -> None:
    sent = udp(HOST, 5000, SERVER, 53, bytes(1400))
    quoted = rebuilt(sent, src=GATEWAY, sport=gateway.open(sent))
    result = gateway.inbound(icmp_error(ROUTER, GATEWAY, quoted, (3, 4), rest=mtu))
    assert result.bytes == wire(icmp_error(ROUTER, HOST, sent, (3, 4), rest=mtu))


@pytest.mark.req("5508-3")
def test_rfc_4884_extensions_are_left_alone(gateway: Gateway) -> None:
    """128 bytes of quote, as the length field says, then an extension structure (an MPLS label)."""
    extension = bytes.fromhex("2000 dfff 0008 0101 1e00 0140")
    sent = udp(HOST, 5000, SERVER, 53, bytes(100))
    outside = wire(rebuilt(sent, src=GATEWAY, sport=gateway.open(sent))) + extension
    result = gateway.inbound(icmp_error(ROUTER, GATEWAY, outside, (11, 0), rest=32 << 16))
    assert result.bytes == wire(icmp_error(ROUTER, HOST, wire(sent) + extension, (11, 0), rest=32 << 16))


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("outbound", [False, True], ids=["inbound", "outbound"])
def test_what_lies_behind_the_packet_is_no_part_of_the_quote(gateway: Gateway, outbound: bool) -> None:
    """A TCP quote of 8 bytes, its checksum not among them, and bytes of Ethernet padding where it would be."""
    port = gateway.open(tcp(HOST, 5000, SERVER, 80, SYN))
    padding = b"\x11\x22" * 10
    if outbound:
        error = icmp_error(HOST, SERVER, cut(tcp(SERVER, 80, HOST, 5000)))
        result = gateway.outbound(Raw(wire(error) + padding))
        expected = icmp_error(GATEWAY, SERVER, cut(tcp(SERVER, 80, GATEWAY, port)))
    else:
        error = icmp_error(ROUTER, GATEWAY, cut(tcp(GATEWAY, port, SERVER, 80)))
        result = gateway.inbound(Raw(wire(error) + padding))
        expected = icmp_error(ROUTER, HOST, cut(tcp(HOST, 5000, SERVER, 80)))
    # The quoted header's length tells of 20 bytes of TCP, as it should.
    assert result.bytes == wire(expected) + padding


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("transport", range(8))
def test_quote_shorter_than_8_bytes(gateway: Gateway, transport: int) -> None:
    """With padding that would complete it."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    outside, inside = udp(GATEWAY, port, SERVER, 53), udp(SERVER, 53, HOST, 5000)
    frame = wire(icmp_error(ROUTER, GATEWAY, cut(outside, transport))) + wire(outside)[20 + transport : 28]
    assert gateway.inbound(Raw(frame)).ended == "own_inbound"
    frame = wire(icmp_error(HOST, SERVER, cut(inside, transport))) + wire(inside)[20 + transport : 28]
    assert gateway.outbound(Raw(frame)).ended == "drop_icmp_error_no_session"


# --- what is not believed --------------------------------------------------------------------------


@pytest.mark.req("5508-4")
def test_inbound_about_no_session_of_ours(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    quotes = [
        udp(GATEWAY, port, SERVER, 54),
        udp(GATEWAY, port, OTHER_SERVER, 53),
        udp(GATEWAY, port ^ 1, SERVER, 53),
        udp(HOST, 5000, SERVER, 53),
        udp(HOST, port, SERVER, 53),
        tcp(GATEWAY, port, SERVER, 53),
        echo(GATEWAY, SERVER, port),
        IP(src=GATEWAY, dst=SERVER, proto=47) / Raw(bytes(8)),
        IP(src=GATEWAY, dst=SERVER, proto=17, frag=3) / Raw(wire(udp(GATEWAY, port, SERVER, 53))[20:]),
        IP(src=GATEWAY, dst=SERVER) / ICMP(type=13) / Raw(bytes(8)),
        Raw(b"\x65" + wire(udp(GATEWAY, port, SERVER, 53))[1:]),  # version 6
        Raw(b"\x44" + wire(udp(GATEWAY, port, SERVER, 53))[1:]),  # a header of 16 bytes
        Raw(b"\x4f" + wire(udp(GATEWAY, port, SERVER, 53, b""))[1:]),  # a header of 60 bytes, most of them missing
    ]
    for quoted in quotes:
        assert gateway.inbound(icmp_error(ROUTER, GATEWAY, quoted)).ended == "own_inbound"


@pytest.mark.req("attacks-leak")
def test_outbound_about_no_session_of_ours(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    for quoted in (
        udp(SERVER, 54, HOST, 5000),
        udp(OTHER_SERVER, 53, HOST, 5000),
        udp(SERVER, 53, OTHER_HOST, 5000),
        udp(SERVER, 53, HOST, 5001),
        tcp(SERVER, 53, HOST, 5000),
        IP(src=SERVER, dst=HOST, proto=47) / Raw(bytes(8)),
    ):
        assert gateway.outbound(icmp_error(HOST, SERVER, quoted)).ended == "drop_icmp_error_no_session"


@pytest.mark.req("5508-3")
@pytest.mark.parametrize("at", [22, 28 + 10], ids=["error", "quoted header"])
def test_wrong_checksums_about_a_protocol_without_ports(gateway: Gateway, at: int) -> None:
    inside = IP(src=HOST, dst=SERVER, proto=50) / Raw(bytes(8))
    assert gateway.outbound(inside).ended == "slow_portless_outbound"
    errors = {
        gateway.inbound: icmp_error(ROUTER, GATEWAY, rebuilt(inside, src=GATEWAY)),
        gateway.outbound: icmp_error(HOST, SERVER, rebuilt(inside, src=SERVER, dst=HOST)),
    }
    for send, error in errors.items():
        assert send(error).ended.startswith("slow_icmp_error")
        spoiled = bytearray(wire(error))
        spoiled[at] ^= 1
        if at > 22:  # the outer sum covers it: made to agree
            spoiled[22:24] = b"\0\0"
            spoiled[22:24] = ((0xFFFF - full_sum(bytes(spoiled[20:]))) % 0xFFFF).to_bytes(2, "big")
        assert send(Raw(bytes(spoiled))).ended == "drop_icmp_checksum"


@pytest.mark.req("5508-6")
@pytest.mark.req("4787-12")
@pytest.mark.req("5382-10")
@pytest.mark.parametrize("flow", EACH_FLOW)
def test_errors_neither_refresh_nor_end_a_session(gateway: Gateway, flow: Flow) -> None:
    port = gateway.open(flow.sent)
    answer = flow.answer(port)
    row = gateway.tables.sessions[gateway.slots()[0]]
    age(row, 59)
    before = row.tobytes()
    for kind in KINDS.values():
        quoted = rebuilt(flow.sent, **flow.outside(port))
        assert gateway.inbound(icmp_error(ROUTER, GATEWAY, quoted, kind)).ended == "slow_icmp_error_inbound"
        delivered = rebuilt(answer, **flow.inside)
        assert gateway.outbound(icmp_error(HOST, SERVER, delivered, kind)).ended == "slow_icmp_error_outbound"
    assert row.tobytes() == before
    assert gateway.inbound(answer).ended == "slow_inbound"


@pytest.mark.req("5508-6")
@pytest.mark.req("4787-12")
@pytest.mark.req("5382-10")
@pytest.mark.parametrize("flow", EACH_FLOW)
def test_no_icmp_message_ends_a_session(gateway: Gateway, flow: Flow) -> None:
    """Of any type there is or may be, from anybody, quoting the session's own packets."""
    port = gateway.open(flow.sent)
    answer = flow.answer(port)
    slot = gateway.slots()[0]
    before = gateway.tables.sessions[slot].tobytes()
    outside, delivered = rebuilt(flow.sent, **flow.outside(port)), rebuilt(answer, **flow.inside)
    for icmp_type in range(256):
        if icmp_type not in (0, 8):  # an echo is no message about a session: it is one
            for code in (0, 4):
                for source in (ROUTER, SERVER):
                    gateway.inbound(icmp_error(source, GATEWAY, outside, (icmp_type, code)))
                for source in (HOST, OTHER_HOST):
                    gateway.outbound(icmp_error(source, SERVER, delivered, (icmp_type, code)))
    assert gateway.tables.sessions[slot].tobytes() == before
    assert gateway.inbound(answer).ended == "slow_inbound"
    assert gateway.open(flow.sent) == port


def test_expired_session(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    assert gateway.inbound(icmp_error(ROUTER, GATEWAY, udp(GATEWAY, port, SERVER, 53))).ended == "own_inbound"
    error = icmp_error(HOST, SERVER, udp(SERVER, 53, HOST, 5000))
    assert gateway.outbound(error).ended == "drop_icmp_error_no_session"


def test_about_a_further_session(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    result = gateway.inbound(icmp_error(ROUTER, GATEWAY, udp(GATEWAY, port, OTHER_SERVER, 53)))
    assert result.bytes == wire(icmp_error(ROUTER, HOST, udp(HOST, 5000, OTHER_SERVER, 53)))


# --- the gateway's own errors ----------------------------------------------------------------------


@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize("how", EACH_QUOTE)
@pytest.mark.parametrize("flow", EACH_FLOW)
@pytest.mark.parametrize("source", [GATEWAY, GATEWAY_INSIDE])
def test_own_error_about_a_translated_packet(
    gateway: Gateway, flow: Flow, how: Callable[[Packet], bytes], source: str
) -> None:
    """TTL or MTU ends at the gateway, after the answer was translated: its quote is restored."""
    answer = flow.answer(gateway.open(flow.sent))
    delivered = rebuilt(answer, **flow.inside)
    result = gateway.outbound(icmp_error(source, SERVER, how(delivered), (11, 0)), local=True)
    assert result.ended == "slow_icmp_error_outbound"
    assert result.bytes == wire(icmp_error(GATEWAY, SERVER, how(answer), (11, 0)))


@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize(
    "quoted",
    [
        pytest.param(udp(SERVER, 53, HOST, 5001), id="UDP"),
        pytest.param(tcp(SERVER, 53, HOST, 5001), id="TCP"),
        pytest.param(echo(SERVER, HOST, 1), id="ping"),
        pytest.param(echo_reply(SERVER, HOST, 1), id="ping's answer"),
        pytest.param(cut(udp(SERVER, 53, HOST, 5001), 0), id="nothing but the IP header"),
        pytest.param(cut(udp(SERVER, 53, HOST, 5001), 7), id="7 bytes"),
        pytest.param(IP(src=SERVER, dst=HOST, proto=47) / Raw(bytes(8)), id="GRE"),
        pytest.param(IP(src=SERVER, dst=HOST, proto=50) / Raw(bytes(8)), id="ESP"),
        pytest.param(IP(src=SERVER, dst=HOST, proto=17, frag=3) / Raw(bytes(64)), id="later fragment"),
        pytest.param(IP(src=SERVER, dst=HOST) / ICMP(type=13) / Raw(bytes(12)), id="ICMP timestamp"),
        pytest.param(udp(SERVER, 53, "10.1.2.3", 5001), id="private, not of our LAN"),
        pytest.param(udp(HOST, 5001, SERVER, 53), id="from a host inside"),
    ],
)
def test_own_error_that_would_quote_an_internal_address(gateway: Gateway, quoted: Packet | bytes) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    error = icmp_error(GATEWAY, SERVER, quoted, (3, 13))
    assert gateway.outbound(error, local=True).ended == "drop_icmp_error_leak"


@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize("local", [False, True], ids=["routed", "the gateway's"])
@pytest.mark.parametrize(
    "quoted",
    [
        pytest.param(udp(SERVER, 53, HOST, 5001), id="receiver inside"),
        pytest.param(udp(HOST, 5001, SERVER, 53), id="sender inside"),
        pytest.param(cut(udp(SERVER, 53, HOST, 5001), 0), id="nothing but the IP header"),
        pytest.param(IP(src=SERVER, dst=HOST, proto=17, frag=3) / Raw(bytes(64)), id="later fragment"),
    ],
)
def test_an_error_of_another_source_does_not_quote_an_internal_address(
    gateway: Gateway, quoted: Packet | bytes, local: bool
) -> None:
    """From a router behind an interface that is neither LAN nor WAN, or from an external address not on the WAN."""
    context = {"local": True} if local else {"ingress_ifindex": gateway.bench.punt.index}
    for kind in ((11, 0), (5, 1)):
        error = icmp_error(ROUTER, SERVER, quoted, kind)
        assert gateway.outbound(error, **context).ended == "drop_icmp_error_leak"
        of_others = icmp_error(ROUTER, SERVER, udp(SERVER, 53, OTHER_SERVER, 5001), kind)
        assert gateway.outbound(of_others, **context).ended == "own_outbound"


def test_own_errors_about_its_own_packets(gateway: Gateway) -> None:
    for quoted in (
        udp(SERVER, 53, GATEWAY, 5001),
        udp("192.168.100.1", 53, GATEWAY, 5001),  # the modem, with a private address on the WAN
        IP(src=SERVER, dst=GATEWAY, proto=47) / Raw(bytes(8)),
        IP(src=SERVER, dst=GATEWAY, proto=17, frag=3) / Raw(bytes(64)),
        echo(SERVER, GATEWAY, 1),
    ):
        assert gateway.outbound(icmp_error(GATEWAY, SERVER, quoted), local=True).ended == "own_outbound"


# --- what is damaged, or cannot be -----------------------------------------------------------------

LENGTHS = (0, 1, 35, 36, 37, 63, 64, 500, 576 - 56, 576 - 55, 1444, 1445, 1444 + 36)


@pytest.mark.req("5508-3")
@pytest.mark.parametrize("length", LENGTHS)
def test_checksums_of_every_length(gateway: Gateway, length: int) -> None:
    """Odd and even, the 576 bytes of RFC 1812, a full frame: right ones pass, one wrong bit anywhere does not."""
    payload = bytes(i * 7 & 255 for i in range(length))
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    about = udp(GATEWAY, port, SERVER, 53, payload)
    error = icmp_error(ROUTER, GATEWAY, about)
    assert gateway.inbound(error).bytes == wire(icmp_error(ROUTER, HOST, udp(HOST, 5000, SERVER, 53, payload)))
    delivered = udp(SERVER, 53, HOST, 5000, payload)
    answer = icmp_error(HOST, SERVER, delivered)
    assert gateway.outbound(answer).ended == "slow_icmp_error_outbound"
    for at in {21, 27, 31, len(wire(error)) - 1}:  # code, MTU's end, a length, the last byte
        for frame, send in ((error, gateway.inbound), (answer, gateway.outbound)):
            broken = bytearray(wire(frame))
            broken[at] ^= 0x10
            assert send(Raw(bytes(broken))).ended == "drop_icmp_checksum"


@pytest.mark.req("5508-3")
@pytest.mark.parametrize("options", [None, RECORD_ROUTE], ids=["plain", "with options"])
def test_checksum_of_the_quoted_header(gateway: Gateway, options: list[object] | None) -> None:
    """The outer one is right about it; only the quoted header's own tells."""
    extra = {"options": options} if options else {}
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    for about, src, dst, send in (
        (udp(GATEWAY, port, SERVER, 53, **extra), ROUTER, GATEWAY, gateway.inbound),
        (udp(SERVER, 53, HOST, 5000, **extra), HOST, SERVER, gateway.outbound),
    ):
        for at in (1, 4, 8, 11, *([22] if options else [])):
            quoted = bytearray(wire(about))
            quoted[at] ^= 1
            assert send(icmp_error(src, dst, bytes(quoted))).ended == "drop_icmp_checksum"


def test_longer_than_a_frame(gateway: Gateway) -> None:
    """Beyond 1536 bytes of ICMP nothing is summed up: no router quotes so much."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    sent = udp(HOST, 5000, SERVER, 53, bytes(1600))
    result = gateway.inbound(icmp_error(ROUTER, GATEWAY, rebuilt(sent, src=GATEWAY, sport=port)))
    assert result.bytes == wire(icmp_error(ROUTER, HOST, sent))


@pytest.mark.req("attacks-icmp_spoof")
@pytest.mark.parametrize(("mtu", "believed"), [(0, True), (1, False), (68, False), (551, False), (552, True)])
def test_tiny_mtu(gateway: Gateway, mtu: int, believed: bool) -> None:
    """0 is what routers older than RFC 1191 say. Of other errors that field is no MTU."""
    quoted = udp(GATEWAY, gateway.open(udp(HOST, 5000, SERVER, 53)), SERVER, 53)
    ended = "slow_icmp_error_inbound" if believed else "drop_icmp_error_implausible"
    assert gateway.inbound(icmp_error(ROUTER, GATEWAY, quoted, (3, 4), rest=mtu)).ended == ended
    for kind in ((3, 1), (11, 0), (12, 4)):
        assert gateway.inbound(icmp_error(ROUTER, GATEWAY, quoted, kind, rest=mtu)).ended == "slow_icmp_error_inbound"


WINDOW = 1 << 22  # SEQ_WINDOW of bpf/icmp.h
OFFSETS = {
    "the next": (0, True),
    "just sent": (-1, True),
    "a window ago": (-WINDOW, True),
    "more than a window ago": (-WINDOW - 1, False),
    "a window ahead": (WINDOW - 1, True),
    "further ahead": (WINDOW, False),
    "the other side of the world": (1 << 31, False),
}


@pytest.mark.req("attacks-icmp_spoof")
@pytest.mark.parametrize("state", ["SYN sent", "established", "mid-stream", "about to wrap"])
@pytest.mark.parametrize(("offset", "believed"), OFFSETS.values(), ids=OFFSETS)
def test_tcp_sequence(gateway: Gateway, state: str, offset: int, believed: bool) -> None:
    """A blind forger knows the endpoints at most. Nothing moves, whatever is quoted."""
    start = {"SYN sent": 1_000_000_000, "about to wrap": 2**32 - 5}.get(state, 100)
    if state == "mid-stream":  # picked up after the gateway was replaced, and answered
        port = gateway.open(tcp(HOST, 5000, SERVER, 80, ACK, seq=90_000, ack=7))
        gateway.inbound(tcp(SERVER, 80, GATEWAY, port, ACK, seq=7, ack=start + 1))
    elif state == "established":
        port = gateway.connect(HOST, 5000, SERVER, 80)
    else:
        port = gateway.open(tcp(HOST, 5000, SERVER, 80, SYN, seq=start))
    seq = (start + 1 + offset) % 2**32
    before = gateway.tables.sessions[gateway.slots()[0]].tobytes()
    for how in (cut, wire):
        for kind in ((3, 1), (3, 3), (3, 4), (11, 0)):
            error = icmp_error(ROUTER, GATEWAY, how(tcp(GATEWAY, port, SERVER, 80, seq=seq)), kind, rest=1400)
            ended = "slow_icmp_error_inbound" if believed else "drop_icmp_error_implausible"
            assert gateway.inbound(error).ended == ended
    assert gateway.tables.sessions[gateway.slots()[0]].tobytes() == before


def test_tcp_sequence_before_the_remote_has_spoken(gateway: Gateway) -> None:
    """Picked up in the middle: nothing is known to compare with."""
    port = gateway.open(tcp(HOST, 5000, SERVER, 80, ACK, seq=90_000, ack=7))
    for seq in (90_000, 5, 2**31):
        error = icmp_error(ROUTER, GATEWAY, tcp(GATEWAY, port, SERVER, 80, seq=seq))
        assert gateway.inbound(error).ended == "slow_icmp_error_inbound"


@pytest.mark.req("attacks-leak")
def test_a_host_with_an_address_of_its_own_quotes_nobody_else(gateway: Gateway) -> None:
    """One to one is the address that it has, and nothing that lies behind it."""
    twin = "203.0.113.9"
    gateway.tables.set_counterparts([(IPv4Network(HOST), IPv4Network(twin), 0)])
    try:
        own = gateway.outbound(icmp_error(HOST, SERVER, udp(SERVER, 53, HOST, 5000)))
        assert (own.ended, own.ip.src, IP(own.bytes[28:]).dst) == ("slow_basic_outbound", twin, twin)
        ping = gateway.outbound(icmp_error(HOST, SERVER, echo(SERVER, HOST, 77)))
        assert (ping.ended, IP(ping.bytes[28:])[ICMP].id) == ("slow_basic_outbound", 77)
        for about in (udp(SERVER, 53, OTHER_HOST, 5000), udp(SERVER, 53, "10.9.9.9", 5000)):
            assert gateway.outbound(icmp_error(HOST, SERVER, about)).ended == "drop_icmp_error_leak"
        from_inside = icmp_error(HOST, SERVER, udp(OTHER_HOST, 53, HOST, 5000))
        assert gateway.outbound(from_inside).ended == "drop_icmp_error_leak"
        redirect = icmp_error(HOST, SERVER, udp(SERVER, 53, HOST, 5000), (5, 1))
        assert gateway.outbound(redirect).ended == "drop_icmp_type"
    finally:
        gateway.tables.set_counterparts([])
