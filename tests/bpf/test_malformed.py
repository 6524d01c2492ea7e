"""Truncated and contradictory packets: dropped or passed, never misread, at every hook."""

import socket
import time
from collections.abc import Callable

import pytest
from harness import (
    ACK,
    GATEWAY,
    HOST,
    ROUTER,
    SERVER,
    SYN,
    Gateway,
    Result,
    echo,
    echo_reply,
    full_sum,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import ICMP, IP, TCP, IPOption_RR
from scapy.packet import Packet, Raw

TCP_OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
MACS = {
    "outbound": bytes.fromhex("020000001010 020000000101"),
    "inbound": bytes.fromhex("020000000101 020000001010"),
    "fast_outbound": bytes.fromhex("020000000001 020000000002"),
    "fast_inbound": bytes.fromhex("020000000101 020000001010"),
}
HOOKS = tuple(MACS)
SHORTEST = 20  # a TC test run needs an IPv4 header behind an Ethernet header that tells of one


def _kinds(src: str, sport: int, dst: str, dport: int) -> dict[str, Packet]:
    """Every kind of packet between two endpoints, as they are at one side of the gateway."""
    options = [IPOption_RR(length=11, pointer=4, routers=["0.0.0.0"] * 2)]
    outside = src == SERVER
    quoted = udp(dst, dport, src, sport)
    ping = echo_reply(src, dst, dport) if outside else echo(src, dst, sport)
    with_options = tcp(src, sport, dst, dport)
    with_options[TCP].options = TCP_OPTIONS
    error = IP(src=ROUTER if outside else src, dst=dst) / ICMP(type=3, code=4) / quoted
    return {
        "UDP": udp(src, sport, dst, dport),
        "UDP, IP options": udp(src, sport, dst, dport, options=options),
        "TCP": tcp(src, sport, dst, dport, ACK),
        "TCP SYN, options": with_options,
        "TCP, IP options": tcp(src, sport, dst, dport, options=options),
        "ping": ping,
        "ICMP error": error,
        "ICMP error, options in the quote": error.__class__(src=error.src, dst=dst)
        / ICMP(type=11)
        / udp(dst, dport, src, sport, options=options),
        "ICMP error about TCP": IP(src=error.src, dst=dst) / ICMP(type=12) / tcp(dst, dport, src, sport),
        "first fragment": udp(src, sport, dst, dport, flags="MF"),
        "later fragment": IP(src=src, dst=dst, proto=17, frag=3) / Raw(bytes(40)),
        "GRE": IP(src=src, dst=dst, proto=47) / Raw(bytes(60)),
    }


@pytest.fixture
def busy(gateway: Gateway) -> tuple[Gateway, dict[str, dict[str, Packet]]]:
    """A gateway with armed sessions, and every kind of packet of them for each hook.

    The bench's pools are one port wide, so that all sessions have external port 4000.
    """
    gateway.pool(udp=((4000, 1),), tcp=((4000, 1),), icmp=((4000, 1),))
    gateway.accelerate()
    gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.inbound(udp(SERVER, 53, GATEWAY, 4000))
    gateway.learn(udp(SERVER, 53, HOST, 5000))
    gateway.connect(HOST, 5000, SERVER, 53)
    gateway.open(echo(HOST, SERVER, 5000))
    out, back = _kinds(HOST, 5000, SERVER, 53), _kinds(SERVER, 53, GATEWAY, 4000)
    return gateway, {"outbound": out, "inbound": back, "fast_outbound": out, "fast_inbound": back}


KINDS = list(_kinds(HOST, 1, SERVER, 2))


def _sent(gateway: Gateway, hook: str, packet: bytes) -> Result:
    send: Callable[[bytes], Result] = getattr(gateway, hook)
    return send(MACS[hook] + b"\x08\x00" + packet)


def _with_length(packet: bytes, length: int) -> bytes:
    """With another length in a header that is otherwise right."""
    header = bytearray(packet[:20])
    header[2:4], header[10:12] = length.to_bytes(2, "big"), b"\0\0"
    whole = bytes(header) + packet[20:]
    check = 0xFFFF - full_sum(whole[: (whole[0] & 15) * 4])
    return whole[:10] + check.to_bytes(2, "big") + whole[12:]


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("kind", KINDS)
def test_every_prefix(busy: tuple[Gateway, dict[str, dict[str, Packet]]], kind: str) -> None:
    """The rest is missing, whatever the header says."""
    gateway, kinds = busy
    for hook in HOOKS:
        packet = wire(kinds[hook][kind])
        before = gateway.tables.sessions.tobytes()
        for length in range(0 if hook.startswith("fast") else SHORTEST, len(packet)):
            ended = _sent(gateway, hook, packet[:length]).ended
            assert ended == "drop_malformed" if hook in ("outbound", "inbound") else ended.startswith("up_")
        assert gateway.tables.sessions.tobytes() == before


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("padding", [0, 40], ids=["exact", "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_true_length(busy: tuple[Gateway, dict[str, dict[str, Packet]]], kind: str, padding: int) -> None:
    """The header tells of a shorter packet; behind it comes nothing, or what would complete the packet."""
    gateway, kinds = busy
    for hook in HOOKS:
        packet = wire(kinds[hook][kind])
        header = (packet[0] & 15) * 4
        least = {1: 8, 6: packet[header + 12] // 16 * 4, 17: 8}.get(packet[9], 0)
        if packet[7] or packet[6] & 0x1F:
            least = 0
        for length in range(len(packet)):
            if length + padding < SHORTEST and not hook.startswith("fast"):
                continue
            short = _with_length(packet, length)[: length + padding]
            ended = _sent(gateway, hook, short).ended
            if hook.startswith("fast"):
                assert ended.startswith("up_" if length < header + least or header > 20 else ("up_", "fast_"))
            elif length < header + least:
                assert ended in ("drop_malformed", "drop_fragment_tiny")
            else:
                assert ended != "drop_malformed"


@pytest.mark.req("attacks-truncated")
def test_prefixes_too_short_for_a_test_run(gateway: Gateway, real_wan: str) -> None:
    """Sent for real: out of the WAN, and from its peer into it, where XDP meets them first."""
    packet = wire(udp(HOST, 5000, SERVER, 53))
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as out,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as into,
    ):
        out.bind((real_wan, 0))
        into.bind(("wan1", 0))
        for length in range(1, SHORTEST):
            with pytest.raises(OSError, match="No buffer space"):  # how a sender hears of a drop
                out.send(MACS["outbound"] + b"\x08\x00" + packet[:length])
            assert gateway.counted() == {"drop_malformed": 1}
            into.send(MACS["inbound"] + b"\x08\x00" + packet[:length])
            counted = gateway.counted()
            deadline = time.monotonic() + 5
            while len(counted) < 2 and time.monotonic() < deadline:  # it goes through a queue
                counted |= gateway.counted()
            assert counted == {"up_not_ip": 1, "drop_malformed": 1}


LIES = {
    "IHL 0": {0: 0x40},
    "IHL 4": {0: 0x44},
    "IHL 15": {0: 0x4F},
    "version 0": {0: 0x05},
    "version 6": {0: 0x65},
    "version 15": {0: 0xF5},
    "length 0": {2: 0, 3: 0},
    "length 19": {2: 0, 3: 19},
    "length 1 more": {3: "+1"},
    "length 65535": {2: 255, 3: 255},
}


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
@pytest.mark.parametrize("hook", HOOKS)
def test_lying_ip_header(
    busy: tuple[Gateway, dict[str, dict[str, Packet]]], hook: str, lie: dict[int, int | str]
) -> None:
    gateway, kinds = busy
    for kind in ("UDP", "TCP", "ping", "ICMP error", "later fragment"):
        packet = bytearray(wire(kinds[hook][kind]))
        for at, value in lie.items():
            packet[at] = packet[at] + 1 if isinstance(value, str) else value
        before = gateway.tables.sessions.tobytes()
        ended = _sent(gateway, hook, bytes(packet)).ended
        if lie == LIES["IHL 15"] and len(packet) >= 60:
            assert ended.startswith(("drop_", "up_", "own_"))
        else:
            assert ended == "drop_malformed" if hook in ("outbound", "inbound") else ended.startswith("up_")
        assert gateway.tables.sessions.tobytes() == before


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("words", [0, 1, 4, 6, 15])
def test_lying_tcp_header(busy: tuple[Gateway, dict[str, dict[str, Packet]]], hook: str, words: int) -> None:
    """The bare segment has 20 bytes: 5 words."""
    gateway, kinds = busy
    packet = bytearray(wire(kinds[hook]["TCP"]))
    packet[32] = words << 4
    before = gateway.tables.sessions.tobytes()
    ended = _sent(gateway, hook, bytes(packet)).ended
    assert ended == ("up_protocol" if hook.startswith("fast") else "drop_malformed")
    assert gateway.tables.sessions.tobytes() == before


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("length", [0, 7, 8, 20, 65535])
def test_lying_udp_length_is_the_receivers_business(
    busy: tuple[Gateway, dict[str, dict[str, Packet]]], length: int
) -> None:
    gateway, kinds = busy
    for hook in HOOKS:
        packet = bytearray(wire(kinds[hook]["UDP"]))
        packet[24:26] = length.to_bytes(2, "big")
        result = _sent(gateway, hook, bytes(packet))
        assert result.ended in ("slow_outbound", "slow_inbound", "fast_outbound", "fast_inbound")
        assert result.bytes[24:26] == packet[24:26]


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("kind", ["UDP", "TCP", "ping", "ICMP error", "ICMP error about TCP", "UDP, IP options"])
@pytest.mark.parametrize("hook", HOOKS[:2])
def test_ethernet_padding_stays_as_it_is(
    busy: tuple[Gateway, dict[str, dict[str, Packet]]], hook: str, kind: str
) -> None:
    gateway, kinds = busy
    packet = wire(kinds[hook][kind])
    plain, padded = (_sent(gateway, hook, packet + padding) for padding in (b"", b"\xaa" * 33))
    assert plain.ended == padded.ended
    assert plain.ended.startswith("slow_")
    assert padded.bytes == plain.bytes + b"\xaa" * 33


def test_syn_with_data_and_options(gateway: Gateway) -> None:
    packet = tcp(HOST, 5000, SERVER, 80, SYN, payload=b"early")
    packet[TCP].options = TCP_OPTIONS
    assert gateway.outbound(IP(wire(packet))).ended == "slow_outbound"


def test_what_is_counted_as_dropped_is(gateway: Gateway) -> None:
    """At a LAN's egress, too, where only the gateway's own raw sockets could send such a thing."""
    frame = bytes.fromhex("020000000002 020000000001 0800") + wire(udp(GATEWAY, 53, HOST, 5000))[:-3]
    result = gateway.lan_out(frame)
    assert (result.ended, result.verdict) == ("drop_malformed", "drop")
