"""XDP: repeats what the slow path decided for a flow, hands up everything else unmodified."""

from collections.abc import Callable

import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    HOST_MAC,
    LAN_MAC,
    NEXT_HOP_MAC,
    OTHER_HOST,
    OTHER_SERVER,
    PSH,
    RST,
    SERVER,
    SYN,
    TICKS,
    URG,
    WAN_MAC,
    Gateway,
    age,
    ago,
    echo,
    next_tick,
    rebuilt,
    since,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import IP, UDP, IPOption_RR
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw


@pytest.fixture
def flying(gateway: Gateway) -> tuple[Gateway, int, int]:
    """A gateway with an armed UDP and an armed TCP flow, both ways; their external ports."""
    gateway.accelerate()
    full = bytes(1472)  # what flies is no longer than what went before
    udp_port = gateway.open(udp(HOST, 5000, SERVER, 53, full))
    _deliver(gateway, udp(SERVER, 53, GATEWAY, udp_port, full), udp(SERVER, 53, HOST, 5000, full))
    tcp_port = gateway.connect(HOST, 5000, SERVER, 80)
    _deliver(gateway, tcp(SERVER, 80, GATEWAY, tcp_port, ACK, ack=101), tcp(SERVER, 80, HOST, 5000, ACK, ack=101))
    return gateway, udp_port, tcp_port


def _deliver(gateway: Gateway, packet: Packet, delivered: Packet) -> None:
    assert gateway.inbound(packet).ended == "slow_inbound"
    gateway.learn(delivered)


def macs(frame: bytes) -> tuple[str, str]:
    return frame[:6].hex(":"), frame[6:12].hex(":")


SEGMENTS = {"empty": b"", "odd": b"odd", "data": bytes(range(200))}


@pytest.mark.parametrize("payload", SEGMENTS.values(), ids=SEGMENTS)
def test_flies(flying: tuple[Gateway, int, int], payload: bytes) -> None:
    gateway, udp_port, tcp_port = flying
    for out, port in (
        (udp(HOST, 5000, SERVER, 53, payload, ttl=2), udp_port),
        (tcp(HOST, 5000, SERVER, 80, ACK | PSH, seq=101, ack=501, payload=payload, tos=4, id=9), tcp_port),
    ):
        result = gateway.fast_outbound(out)
        assert (result.ended, result.counted) == ("fast_outbound", {})
        assert macs(result.frame) == (NEXT_HOP_MAC, WAN_MAC)
        assert result.bytes == wire(rebuilt(out, src=GATEWAY, sport=port, ttl=out.ttl - 1))
    for back in (
        udp(SERVER, 53, GATEWAY, udp_port, payload, ttl=255),
        tcp(SERVER, 80, GATEWAY, tcp_port, ACK | URG, seq=501, ack=101, payload=payload),
    ):
        result = gateway.fast_inbound(back)
        assert (result.ended, result.counted) == ("fast_inbound", {})
        assert macs(result.frame) == (HOST_MAC, LAN_MAC)
        assert result.bytes == wire(rebuilt(back, dst=HOST, dport=5000, ttl=back.ttl - 1))


@pytest.mark.req("checksums-768")
def test_no_udp_checksum_stays_none(flying: tuple[Gateway, int, int]) -> None:
    gateway, port, _ = flying
    packet = udp(HOST, 5000, SERVER, 53)
    packet[UDP].chksum = 0
    assert gateway.fast_outbound(packet).ip[UDP].chksum == 0
    packet = udp(SERVER, 53, GATEWAY, port)
    packet[UDP].chksum = 0
    assert gateway.fast_inbound(packet).ip[UDP].chksum == 0


def test_ethernet_padding_stays(flying: tuple[Gateway, int, int]) -> None:
    gateway, port, _ = flying
    packet = udp(HOST, 5000, SERVER, 53, b"x")
    result = gateway.fast_outbound(Raw(wire(packet) + b"\xaa" * 17))
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=port, ttl=63)) + b"\xaa" * 17


def test_keeps_the_books(flying: tuple[Gateway, int, int]) -> None:
    gateway, _, tcp_port = flying
    row = gateway.session(HOST, 5000, "tcp", SERVER, 80)
    age(row, 100)
    before = {name: int(row["sent"][name]) for name in ("packets", "bytes")}
    gateway.fast_outbound(tcp(HOST, 5000, SERVER, 80, ACK, ack=777, payload=bytes(60)))
    assert row["sent"]["packets"] == before["packets"] + 1
    assert row["sent"]["bytes"] == before["bytes"] + 100
    assert since(int(row["out"]["last_seen"])) < TICKS
    assert int(row["out"]["last_ack"]).to_bytes(4, "little") == (777).to_bytes(4, "big")
    gateway.fast_inbound(tcp(SERVER, 80, GATEWAY, tcp_port, ACK, ack=888))
    assert int(row["in"]["last_ack"]).to_bytes(4, "little") == (888).to_bytes(4, "big")


def test_further_sessions_fly_too(flying: tuple[Gateway, int, int]) -> None:
    gateway, port, _ = flying
    for remote in ((SERVER, 54), (OTHER_SERVER, 53)):
        gateway.open(udp(HOST, 5000, *remote))
        _deliver(gateway, udp(*remote, GATEWAY, port), udp(*remote, HOST, 5000))
        out = gateway.fast_outbound(udp(HOST, 5000, *remote))
        assert out.bytes == wire(rebuilt(udp(HOST, 5000, *remote), src=GATEWAY, sport=port, ttl=63))
        back = gateway.fast_inbound(udp(*remote, GATEWAY, port))
        assert back.bytes == wire(rebuilt(udp(*remote, GATEWAY, port), dst=HOST, dport=5000, ttl=63))


# --- what goes up ----------------------------------------------------------------------------------


def _frame(packet: Packet, dst: str = LAN_MAC, **ether: object) -> bytes:
    return bytes(Ether(dst=dst, src=HOST_MAC, **ether) / packet)


def _damaged(packet: Packet, at: int, value: bytes) -> bytes:
    frame = bytearray(_frame(packet))
    frame[at : at + len(value)] = value
    return bytes(frame)


UDP_OUT, TCP_OUT = udp(HOST, 5000, SERVER, 53), tcp(HOST, 5000, SERVER, 80, ACK, seq=101, ack=501)

GO_UP = [
    *(
        pytest.param(tcp(HOST, 5000, SERVER, 80, flags), "up_tcp_flags", id=f"TCP flags {flags:#04x}")
        for flags in (0, SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, PSH, FIN | PSH | URG)
    ),
    *(pytest.param(udp(HOST, 5000, SERVER, 53, ttl=ttl), "up_ttl", id=f"TTL {ttl}") for ttl in (0, 1)),
    pytest.param(udp(HOST, 5000, SERVER, 53, options=[IPOption_RR(length=7)]), "up_unusual_ip", id="IP options"),
    pytest.param(udp(HOST, 5000, SERVER, 53, flags="MF"), "up_unusual_ip", id="first fragment"),
    pytest.param(udp(HOST, 5000, SERVER, 53, frag=1), "up_unusual_ip", id="later fragment"),
    pytest.param(udp(HOST, 5001, SERVER, 53), "up_no_flow", id="another port"),
    pytest.param(udp(HOST, 5000, SERVER, 54), "up_no_flow", id="another remote port"),
    pytest.param(udp(HOST, 5000, OTHER_SERVER, 53), "up_no_flow", id="another remote"),
    pytest.param(udp(OTHER_HOST, 5000, SERVER, 53), "up_no_flow", id="another host"),
    pytest.param(udp(HOST, 5000, SERVER, 80), "up_no_flow", id="another protocol"),
    pytest.param(echo(HOST, SERVER, 5000), "up_protocol", id="ping"),
    pytest.param(IP(src=HOST, dst=SERVER, proto=47) / Raw(bytes(64)), "up_protocol", id="GRE"),
    pytest.param(udp(HOST, 5000, SERVER, 53, bytes(1473)), "up_longer", id="longer than any before"),
    pytest.param(_frame(UDP_OUT, dst=WAN_MAC), "up_not_for_us", id="another MAC"),
    pytest.param(_frame(UDP_OUT, dst="ff:ff:ff:ff:ff:ff"), "up_not_for_us", id="broadcast"),
    pytest.param(_damaged(UDP_OUT, 14, b"\x65"), "up_unusual_ip", id="IP version 6"),
    pytest.param(_damaged(UDP_OUT, 14, b"\x44"), "up_unusual_ip", id="IHL 4"),
    pytest.param(_damaged(UDP_OUT, 16, b"\x00\x1b"), "up_unusual_ip", id="length without a UDP header"),
    pytest.param(_damaged(UDP_OUT, 16, b"\x00\x00"), "up_unusual_ip", id="length 0"),
    pytest.param(_damaged(UDP_OUT, 16, b"\x02\x00"), "up_unusual_ip", id="length beyond the frame"),
    pytest.param(_damaged(TCP_OUT, 16, b"\x00\x27"), "up_protocol", id="length without a TCP header"),
    pytest.param(_damaged(TCP_OUT, 46, b"\x40"), "up_protocol", id="TCP header of 16 bytes"),
    pytest.param(_damaged(TCP_OUT, 46, b"\x60"), "up_protocol", id="TCP header longer than the packet"),
]


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize(("packet", "counter"), GO_UP)
def test_goes_up_unmodified(flying: tuple[Gateway, int, int], packet: Packet | bytes, counter: str) -> None:
    gateway = flying[0]
    tables = gateway.tables.sessions.tobytes()
    result = gateway.fast_outbound(packet)
    assert (result.verdict, result.ended, result.counted) == ("pass", counter, {})
    assert gateway.tables.sessions.tobytes() == tables


def test_strangers_from_outside_go_up(flying: tuple[Gateway, int, int]) -> None:
    gateway, udp_port, tcp_port = flying
    for packet in (
        udp(SERVER, 54, GATEWAY, udp_port),
        udp(OTHER_SERVER, 53, GATEWAY, udp_port),
        udp(SERVER, 53, GATEWAY, udp_port ^ 1),
        udp(SERVER, 53, "203.0.113.2", udp_port),
        udp(SERVER, 53, HOST, 5000),
        udp(SERVER, 53, HOST, udp_port),
        tcp(SERVER, 53, GATEWAY, udp_port),
        tcp(OTHER_SERVER, 80, GATEWAY, tcp_port),
    ):
        assert gateway.fast_inbound(packet).ended in ("up_no_flow", "up_not_armed")


# --- arming ----------------------------------------------------------------------------------------


def test_nothing_flies_without_acceleration(gateway: Gateway) -> None:
    gateway.open(UDP_OUT)
    assert gateway.fast_outbound(UDP_OUT).ended == "up_not_armed"


def test_each_direction_is_armed_by_itself(gateway: Gateway) -> None:
    gateway.accelerate()
    port = gateway.open(UDP_OUT)
    assert gateway.fast_outbound(UDP_OUT).ended == "fast_outbound"
    back = udp(SERVER, 53, GATEWAY, port)
    assert gateway.fast_inbound(back).ended == "up_not_armed"
    gateway.inbound(back)
    assert gateway.fast_inbound(back).ended == "up_not_armed", "translated, but not yet delivered"
    gateway.learn(udp(SERVER, 53, HOST, 5000))
    assert gateway.fast_inbound(back).ended == "fast_inbound"


@pytest.mark.parametrize(
    ("packet", "came_by"),
    [
        pytest.param(udp(SERVER, 53, HOST, 5000), "lan", id="from the LAN"),
        pytest.param(udp(SERVER, 53, HOST, 5000), "nowhere", id="the gateway's own"),
        pytest.param(udp(SERVER, 54, HOST, 5000), "wan", id="another remote"),
        pytest.param(udp(SERVER, 53, OTHER_HOST, 5000), "wan", id="another host"),
        pytest.param(udp(SERVER, 53, HOST, 5000, options=[IPOption_RR(length=7)]), "wan", id="IP options"),
        pytest.param(udp(SERVER, 53, HOST, 5000, flags="MF"), "wan", id="first fragment"),
        pytest.param(udp(SERVER, 53, HOST, 5000, frag=3), "wan", id="later fragment"),
    ],
)
def test_what_teaches_nothing(gateway: Gateway, packet: Packet, came_by: str) -> None:
    gateway.accelerate()
    port = gateway.open(UDP_OUT)
    gateway.learn(packet, came_by={"lan": gateway.lan, "wan": gateway.wan, "nowhere": 0}[came_by])
    assert gateway.fast_inbound(udp(SERVER, 53, GATEWAY, port)).ended == "up_not_armed"


@pytest.mark.parametrize("ethertype", ["0806", "86dd"])
def test_learning_ends_no_packet(gateway: Gateway, ethertype: str) -> None:
    """It counts nothing: the packet has been counted where it came in."""
    gateway.accelerate()
    gateway.learn(bytes(12) + bytes.fromhex(ethertype) + bytes(60))


def test_tcp_is_armed_when_both_sides_have_acknowledged(gateway: Gateway) -> None:
    gateway.accelerate()
    port = gateway.open(tcp(HOST, 5000, SERVER, 80, SYN, seq=100))
    answer = tcp(SERVER, 80, GATEWAY, port, SYN | ACK, seq=500, ack=101)
    _deliver(gateway, answer, rebuilt(answer, dst=HOST, dport=5000))
    data = tcp(SERVER, 80, GATEWAY, port, ACK, seq=501, ack=101)
    assert gateway.fast_outbound(TCP_OUT).ended == "up_not_armed"
    assert gateway.fast_inbound(data).ended == "up_not_armed"
    gateway.open(TCP_OUT)
    _deliver(gateway, data, rebuilt(data, dst=HOST, dport=5000))
    assert gateway.fast_outbound(TCP_OUT).ended == "fast_outbound"
    assert gateway.fast_inbound(data).ended == "fast_inbound"


def test_a_closed_connection_is_not_armed_again(flying: tuple[Gateway, int, int]) -> None:
    gateway, _, port = flying
    gateway.outbound(tcp(HOST, 5000, SERVER, 80, FIN | ACK, seq=101, ack=501))
    gateway.inbound(tcp(SERVER, 80, GATEWAY, port, FIN | ACK, seq=501, ack=102))
    gateway.tables.disarm()
    gateway.outbound(tcp(HOST, 5000, SERVER, 80, ACK, seq=102, ack=502))
    gateway.learn(tcp(SERVER, 80, HOST, 5000, ACK, seq=502, ack=102))
    assert gateway.fast_outbound(TCP_OUT).ended == "up_not_armed"
    assert gateway.fast_inbound(tcp(SERVER, 80, GATEWAY, port, ACK)).ended == "up_not_armed"


def test_disarmed_all_at_once_and_armed_again(flying: tuple[Gateway, int, int]) -> None:
    gateway, port, _ = flying
    gateway.tables.disarm()
    assert gateway.fast_outbound(UDP_OUT).ended == "up_not_armed"
    assert gateway.fast_outbound(TCP_OUT).ended == "up_not_armed"
    assert gateway.fast_inbound(udp(SERVER, 53, GATEWAY, port)).ended == "up_not_armed"
    next_tick()
    gateway.outbound(UDP_OUT)
    assert gateway.fast_outbound(UDP_OUT).ended == "fast_outbound"
    assert gateway.fast_outbound(TCP_OUT).ended == "up_not_armed"


def test_shows_itself_to_the_kernel_now_and_then(flying: tuple[Gateway, int, int]) -> None:
    gateway, _, _ = flying
    gateway.tables.set_settings(disarmed_at=ago(200))
    row = gateway.session(HOST, 5000, "udp", SERVER, 53)
    for seconds, ended in ((59, "fast_outbound"), (61, "up_not_armed")):
        row["out"]["armed_at"] = ago(seconds)
        assert gateway.fast_outbound(UDP_OUT).ended == ended
    gateway.outbound(UDP_OUT)
    assert gateway.fast_outbound(UDP_OUT).ended == "fast_outbound"


def test_a_changed_next_hop_is_learned(flying: tuple[Gateway, int, int]) -> None:
    gateway = flying[0]
    moved = "02:00:00:00:99:99"
    gateway.outbound(_frame(UDP_OUT, dst=moved))
    assert macs(gateway.fast_outbound(UDP_OUT).frame) == (moved, WAN_MAC)


def test_a_reopened_session_is_not_armed(flying: tuple[Gateway, int, int]) -> None:
    gateway, port, _ = flying
    gateway.tables.set_settings(accelerate=0)
    age(gateway.session(HOST, 5000, "udp", SERVER, 53), 301)
    gateway.outbound(UDP_OUT)
    assert gateway.fast_outbound(UDP_OUT).ended == "up_not_armed"
    assert gateway.fast_inbound(udp(SERVER, 53, GATEWAY, port)).ended == "up_not_armed"


@pytest.mark.parametrize(
    ("lan", "wan", "outbound", "inbound"),
    [
        pytest.param({"xdp_to": False}, {}, "fast_outbound", "up_not_armed", id="LAN takes no frames"),
        pytest.param({}, {"xdp_to": False}, "up_not_armed", "fast_inbound", id="WAN takes no frames"),
        pytest.param({"xdp_from": False}, {}, "up_not_armed", "fast_inbound", id="no program on the LAN"),
        pytest.param({}, {"xdp_from": False}, "fast_outbound", "up_not_armed", id="no program on the WAN"),
    ],
)
def test_interfaces_without_xdp(
    gateway: Gateway, lan: dict[str, bool], wan: dict[str, bool], outbound: str, inbound: str
) -> None:
    gateway.accelerate()
    both = {"xdp_from": True, "xdp_to": True}
    gateway.tables.set_interface(gateway.bench.lan, "lan", **{**both, **lan})
    gateway.tables.set_interface(gateway.bench.wan, "wan", **{**both, **wan})
    port = gateway.open(UDP_OUT)
    back = udp(SERVER, 53, GATEWAY, port)
    _deliver(gateway, back, udp(SERVER, 53, HOST, 5000))
    assert gateway.fast_outbound(UDP_OUT).ended == outbound
    assert gateway.fast_inbound(back).ended == inbound


def test_an_egress_that_stopped_taking_frames(flying: tuple[Gateway, int, int]) -> None:
    gateway = flying[0]
    gateway.tables.set_interface(gateway.bench.wan, "wan", xdp_from=True, xdp_to=False)
    assert gateway.fast_outbound(UDP_OUT).ended == "up_not_armed"


# --- length ----------------------------------------------------------------------------------------

LEAST = 576 - 28  # payload of the longest UDP packet that flies without a longer one having been let pass


def test_no_longer_than_what_the_kernel_let_pass(gateway: Gateway) -> None:
    """The kernel alone knows the MTU of a route: XDP repeats what it has seen it do."""
    gateway.accelerate()
    gateway.open(UDP_OUT)
    for seen, flies in ((LEAST, LEAST), (1000, 1000), (900, 1000), (1472, 1472)):
        assert gateway.outbound(udp(HOST, 5000, SERVER, 53, bytes(seen))).ended == "slow_outbound"
        assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53, bytes(flies))).ended == "fast_outbound"
        assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53, bytes(flies + 1))).ended == "up_longer"


def test_a_super_packet_vouches_for_its_segments_only(gateway: Gateway) -> None:
    gateway.accelerate()
    gateway.open(UDP_OUT)
    gateway.outbound(udp(HOST, 5000, SERVER, 53, bytes(1400)), gso_size=700, gso_segs=2)
    assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53, bytes(700))).ended == "fast_outbound"
    assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53, bytes(701))).ended == "up_longer"


def test_length_is_learned_anew_with_the_next_hop(flying: tuple[Gateway, int, int]) -> None:
    gateway = flying[0]
    gateway.tables.disarm()
    next_tick()
    gateway.outbound(UDP_OUT)
    assert gateway.fast_outbound(udp(HOST, 5000, SERVER, 53, bytes(LEAST + 1))).ended == "up_longer"


# --- the two paths agree ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [udp, tcp], ids=["UDP", "TCP"])
def test_fast_and_slow_make_the_same_of_a_packet(
    flying: tuple[Gateway, int, int], make: Callable[..., Packet]
) -> None:
    gateway, udp_port, tcp_port = flying
    remote_port, port = (53, udp_port) if make is udp else (80, tcp_port)
    for out in (make(HOST, 5000, SERVER, remote_port, payload=bytes([n]) * n, id=n * 99) for n in range(1, 60)):
        fast, slow = gateway.fast_outbound(out), gateway.outbound(out)
        assert fast.bytes == wire(rebuilt(IP(slow.bytes), ttl=63))
    for back in (make(SERVER, remote_port, GATEWAY, port, payload=bytes([n]) * n) for n in range(1, 60)):
        fast, slow = gateway.fast_inbound(back), gateway.inbound(back)
        assert fast.bytes == wire(rebuilt(IP(slow.bytes), ttl=63))
