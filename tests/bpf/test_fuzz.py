"""Mutated packets, many and seeded: whatever comes, the rules of harness.Gateway hold, the tables agree with each
other, and XDP does as TC would.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
from harness import (
    GATEWAY,
    HAIRPIN_MARK,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    PUNT_FRAGMENT_IN,
    PUNT_FRAGMENT_OUT,
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

RUNS, SEEDS = 20_000, range(5)
OPTIONS = [IPOption_RR(length=11, pointer=4, routers=["0.0.0.0"] * 2)]
MACS = {
    "outbound": bytes.fromhex("020000001010 020000000101 0800"),
    "inbound": bytes.fromhex("020000000101 020000001010 0800"),
    "fast_outbound": bytes.fromhex("020000000001 020000000002 0800"),
    "fast_inbound": bytes.fromhex("020000000101 020000001010 0800"),
    "lan_in": bytes.fromhex("020000000001 020000000002 0800"),
    "turned": bytes.fromhex("020000000101 020000001010 0800"),
    "lo_out": bytes.fromhex("000000000000 000000000000 0800"),
}
MARKED = ("turned",)  # at the WAN's ingress, as a hairpin's second leg
SLOW = {"fast_outbound": "outbound", "fast_inbound": "inbound"}
TELLING = (0x00, 0x01, 0x04, 0x06, 0x08, 0x11, 0x14, 0x20, 0x3F, 0x40, 0x45, 0x46, 0x4F, 0x7F, 0x80, 0xFF)


def _packets(ours: str, ports: dict[str, int], *, answers: bool) -> list[Packet]:
    """Every kind of packet between one of our addresses and SERVER:53."""

    def between(make: Callable[..., Packet], *, back: bool = answers, **fields: Any) -> Packet:
        if make is echo:
            here = ports["icmp"]
            return echo_reply(SERVER, ours, here, **fields) if back else echo(ours, SERVER, here, **fields)
        here = ports["udp" if make is udp else "tcp"]
        return make(SERVER, 53, ours, here, **fields) if back else make(ours, here, SERVER, 53, **fields)

    src, dst, teller = (SERVER, ours, ROUTER) if answers else (ours, SERVER, ours)
    return [
        between(udp),
        between(udp, options=OPTIONS),
        between(udp, flags="MF"),
        IP(src=src, dst=dst, proto=17, frag=3) / Raw(bytes(30)),
        between(tcp, payload=b"data"),
        between(tcp, options=OPTIONS),
        between(echo),
        IP(src=teller, dst=dst) / ICMP(type=3) / between(udp, back=not answers),
        IP(src=teller, dst=dst) / ICMP(type=3) / between(udp, back=not answers, options=OPTIONS),
        IP(src=teller, dst=dst) / ICMP(type=11) / between(tcp, back=not answers, options=OPTIONS),
        IP(src=teller, dst=dst) / ICMP(type=12) / between(echo, back=not answers),
        IP(src=src, dst=dst, proto=47) / Raw(bytes(30)),
        IP(src=src, dst=dst, proto=33) / Raw(bytes.fromhex("1388 0035 0400 1234") + bytes(20)),
        IP(src=src, dst=dst, proto=132) / Raw(bytes.fromhex("1388 0035") + bytes(28)),
        IP(src=src, dst=dst, proto=132, frag=4) / Raw(bytes(28)),
        IP(src=teller, dst=dst) / ICMP(type=3) / IP(src=dst, dst=src, proto=47) / Raw(bytes(30)),
        between(tcp, flags=SYN),
        with_mss(between(tcp, flags=SYN)),
    ]


def with_mss(packet: Packet) -> Packet:
    packet[TCP].options = [("NOP", None), ("MSS", 9000)]
    return packet


def _round(ports: dict[str, int]) -> list[Packet]:
    """From HOST to what leads inside by GATEWAY: OTHER_HOST's mappings and forwards."""
    return [
        udp(HOST, 5000, GATEWAY, ports["udp"]),
        tcp(HOST, 5000, GATEWAY, ports["tcp"], SYN),
        udp(HOST, 5000, GATEWAY, 8080, flags="MF", id=9),
        IP(src=HOST, dst=GATEWAY, proto=17, frag=3, id=9) / Raw(bytes(40)),
        tcp(HOST, 5000, GATEWAY, 8080, SYN, options=OPTIONS),
        udp(OTHER_HOST, 80, GATEWAY, 40000),
        IP(src=OTHER_HOST, dst=GATEWAY) / ICMP(type=3) / udp(GATEWAY, ports["udp"], OTHER_HOST, 6000),
    ]


def _own() -> list[Packet]:
    """From the gateway to itself, or as a hairpin's second leg."""
    return [
        udp(GATEWAY, 40000, GATEWAY, 8080),
        tcp(GATEWAY, 40000, GATEWAY, 8080, SYN),
        udp(GATEWAY, 40000, GATEWAY, 8080, flags="MF", id=9),
        IP(src=GATEWAY, dst=GATEWAY, proto=17, frag=3, id=9) / Raw(bytes(40)),
        udp(GATEWAY, 40000, GATEWAY, 8080, options=OPTIONS),
        IP(src=GATEWAY, dst=GATEWAY) / ICMP(type=3) / udp(GATEWAY, 8080, GATEWAY, 40000),
        echo(GATEWAY, GATEWAY, 5),
    ]


@pytest.fixture
def flying(gateway: Gateway) -> tuple[Gateway, dict[str, int]]:
    """Armed sessions of HOST:5000 with SERVER:53, and their external ports."""
    gateway.accelerate()
    gateway.attend()
    gateway.tables.set_interface(gateway.bench.wan, "wan", xdp_from=True, xdp_to=True, mss=1400)
    gateway.tables.set_settings(filtering=(0, 1, 0, 0))
    for protocol in ("tcp", "udp"):
        gateway.forward(protocol, 8080, (OTHER_HOST, 80))
        gateway.forward(protocol, 0, (OTHER_HOST, 0))
    ports = {
        "udp": gateway.open(udp(HOST, 5000, SERVER, 53)),
        "icmp": gateway.open(echo(HOST, SERVER, 5000)),
        "tcp": gateway.connect(HOST, 5000, SERVER, 53),
    }
    gateway.open(udp(HOST, 5000, OTHER_SERVER, 53))
    for make, name in ((udp, "udp"), (tcp, "tcp")):
        gateway.inbound(make(SERVER, 53, GATEWAY, ports[name]))
        gateway.learn(make(SERVER, 53, HOST, 5000))
    return gateway, ports


def _mutated(rng: random.Random, packet: bytes) -> bytes:
    data = bytearray(packet)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        at = min(int(rng.expovariate(1 / 25)), len(data) - 1)
        what = rng.random()
        if what < 0.35:
            data[at] = rng.choice(TELLING)
        elif what < 0.6:
            data[at] ^= 1 << rng.randrange(8)
        elif what < 0.75:
            data[at] = rng.randrange(256)
        elif what < 0.85:
            del data[max(20, at) :]
        elif what < 0.93:
            data[2:4] = min(65535, len(data) + rng.randrange(-8, 8)).to_bytes(2, "big", signed=False)
        else:
            data += rng.randbytes(rng.randrange(1, 40))
    header = (data[0] & 15) * 4
    if rng.random() < 0.5 and 20 <= header <= len(data):  # often enough its checksum is right
        data[10:12] = b"\0\0"
        data[10:12] = (0xFFFF - full_sum(bytes(data[:header]))).to_bytes(2, "big")
    return bytes(data)


def _touched(rng: random.Random, frame: bytes) -> bytes:
    """As the agent got it, or with another header."""
    if rng.random() < 0.5:
        return frame
    data = bytearray(frame)
    data[rng.randrange(28)] = rng.choice(TELLING)
    return bytes(data)


def _agree(fast: Result, slow: Result) -> None:
    """TC, on the same packet right after, makes of it what XDP made, but for TTL and IP checksum."""
    assert slow.ended == fast.ended.replace("fast", "slow")
    mask = (8, 10, 11)
    assert [byte for i, byte in enumerate(fast.bytes) if i not in mask] == [
        byte for i, byte in enumerate(slow.bytes) if i not in mask
    ]


@pytest.mark.req("attacks-leak")
@pytest.mark.req("reliability-fuzz")
@pytest.mark.parametrize("seed", SEEDS)
def test_mutated_packets(flying: tuple[Gateway, dict[str, int]], seed: int) -> None:
    gateway, ports = flying
    rng = random.Random(seed)
    out = [wire(packet) for packet in _packets(HOST, dict.fromkeys(ports, 5000), answers=False)]
    back = [wire(packet) for packet in _packets(GATEWAY, ports, answers=True)]
    turning = {"udp": gateway.open(udp(OTHER_HOST, 6000, SERVER, 53))}
    turning["tcp"] = gateway.connect(OTHER_HOST, 6000, SERVER, 53)
    kinds = {
        "outbound": out,
        "fast_outbound": out,
        "inbound": back,
        "fast_inbound": back,
        "lan_in": [wire(packet) for packet in _round(turning)] + out,
        "turned": [wire(packet) for packet in _own()] + back,
        "lo_out": [wire(packet) for packet in _own()],
    }
    ends = set()
    for run in range(RUNS):
        hook = rng.choice(tuple(MACS))
        packet = _mutated(rng, rng.choice(kinds[hook]))
        marks = {"mark": HAIRPIN_MARK | gateway.lan} if hook in MARKED else {}
        try:
            result = getattr(gateway, "inbound" if hook in MARKED else hook)(MACS[hook] + packet, **marks)
            if hook in ("lan_in", "lo_out") and result.verdict == "redirect" and not result.ended:
                ends.add(gateway.turned(result).ended)
            if result.punted in (PUNT_FRAGMENT_IN, PUNT_FRAGMENT_OUT):
                ends.add(gateway.punt_in(_touched(rng, result.frame)).ended)
            if result.ended.startswith("fast"):
                _agree(result, getattr(gateway, SLOW[hook])(MACS[SLOW[hook]] + packet))
            ends.add(result.ended)
        except Exception as error:
            raise AssertionError(f"seed {seed}, run {run}: {hook} of {packet.hex()}: {error}") from error
    gateway.assert_tables_agree()
    assert len(ends) >= 35, f"the packets meet few turns of the walk: {sorted(ends)}"
