"""The punt port from the programs' side: which fragments go to the agent, and which of its frames come back."""

import pytest
from harness import (
    GATEWAY,
    HOST,
    OTHER_SERVER,
    PUNT_FRAGMENT_IN,
    PUNT_FRAGMENT_OUT,
    SERVER,
    TICKS,
    WAN_MAC,
    Gateway,
    ago,
    echo,
    rebuilt,
    tcp,
    udp,
    wan_frame,
    wire,
)
from scapy.layers.inet import IP, fragment
from scapy.packet import Packet, Raw

from xdpmasq import bpf

BIG = bytes(range(256)) * 12


def pieces(packet: Packet) -> list[Packet]:
    return list(fragment(IP(wire(packet)), 1000))


@pytest.mark.req("4787-14")
@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 2, 1, 0), (2, 3, 0, 1)], ids=str)
@pytest.mark.parametrize("kind", ["udp", "tcp", "icmp"])
def test_any_order(gateway: Gateway, kind: str, order: tuple[int, ...]) -> None:
    """What comes too early goes to the agent unharmed; put back after the first, it is translated like the others."""
    gateway.attend()
    packet = {
        "udp": udp(HOST, 5000, SERVER, 53, BIG, id=7),
        "tcp": tcp(HOST, 5000, SERVER, 80, payload=BIG, id=7),
        "icmp": echo(HOST, SERVER, 5000, BIG, id=7),
    }[kind]
    parts = pieces(packet)
    done, kept = {}, []
    for number in order:
        result = gateway.outbound(parts[number])
        if result.punted is None:
            done[number] = result
            continue
        assert (result.ended, result.punted) == ("punt_fragment", PUNT_FRAGMENT_OUT)
        kept.append((number, result.frame))
    assert len(kept) == order.index(0)
    for number, frame in kept:
        back = gateway.punt_in(frame)
        assert (back.verdict, back.ended) == ("redirect", "punt_return")
        assert back.bytes == wire(parts[number])
        done[number] = gateway.outbound(IP(back.bytes))
    assert [done[number].ended for number in sorted(done)] == ["slow_outbound", *["slow_fragment_outbound"] * 3]
    expected = rebuilt(packet, src=GATEWAY, **{"id" if kind == "icmp" else "sport": done[0].port})
    assert b"".join(done[number].bytes[20:] for number in sorted(done)) == wire(expected)[20:]
    assert gateway.entries("fragments") == {}


@pytest.mark.req("4787-14")
def test_any_order_inbound(gateway: Gateway) -> None:
    gateway.attend()
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    packet = udp(SERVER, 53, GATEWAY, port, BIG, id=9)
    parts = pieces(packet)
    early = gateway.inbound(parts[2])
    assert (early.ended, early.punted) == ("punt_fragment", PUNT_FRAGMENT_IN)
    results = [gateway.inbound(parts[0]), gateway.inbound(parts[1])]
    back = gateway.punt_in(early.frame)
    assert back.frame[:6].hex(":") == WAN_MAC, "or the stack would take it for another's"
    results += [gateway.inbound(back.frame), gateway.inbound(parts[3])]
    expected = rebuilt(packet, dst=HOST, dport=5000)
    assert b"".join(result.bytes[20:] for result in results) == wire(expected)[20:]


def test_the_way_back(gateway: Gateway) -> None:
    """As the kernel had chosen it, or, with an Ethernet header of zeros, as it chooses now."""
    gateway.attend()
    frame = wan_frame(pieces(udp(HOST, 5000, SERVER, 53, BIG))[1])
    early = gateway.outbound(frame)
    back = gateway.punt_in(early.frame)
    assert (back.ended, back.frame) == ("punt_return", frame)
    header, packet = early.frame[:14], early.frame[28:]
    blank = gateway.punt_in(header + bytes(14) + packet)
    assert (blank.ended, blank.frame) == ("punt_return", header + packet)


@pytest.mark.parametrize("agent", ["never there", "dead"])
def test_without_an_agent(gateway: Gateway, agent: str) -> None:
    if agent == "dead":
        gateway.attend()
        gateway.tables.set_settings(heartbeat=ago(10.05))
    orphan = pieces(udp(HOST, 5000, SERVER, 53, BIG, id=7))[1]
    assert gateway.outbound(orphan).ended == "drop_fragment_orphan"
    assert gateway.inbound(rebuilt(orphan, src=SERVER, dst=GATEWAY)).ended == "own_inbound"


def test_the_gateways_own_fragments_wait_for_nobody(gateway: Gateway) -> None:
    """Also when an identifier comes again, long after or while another datagram has it."""
    gateway.attend()
    own = pieces(udp(SERVER, 53, GATEWAY, 9, BIG, id=7))
    for _ in range(2):
        assert {gateway.inbound(each).ended for each in own} == {"own_inbound"}
        ((keys, values),) = gateway.tables.maps["fragments"].items(chunk=16)
        values[0]["seen_at"] = ago(31)
        gateway.tables.maps["fragments"].set(keys[0], values[0])
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.inbound(pieces(udp(SERVER, 53, GATEWAY, port, BIG, id=7))[0])
    assert {gateway.inbound(each).ended for each in own} == {"own_inbound"}
    assert gateway.outbound(pieces(udp(GATEWAY, 9, SERVER, 53, BIG))[1], local=True).ended == "own_outbound"


@pytest.mark.req("4787-14a")
@pytest.mark.req("attacks-fragments")
def test_a_flood_of_orphans(gateway: Gateway) -> None:
    """A bounded number goes to the agent; whole packets, and fragments in order, pass as ever."""
    gateway.attend()
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    gateway.tables.maps["budgets"].set(PUNT_FRAGMENT_IN, (bpf.jiffies() + TICKS, 0))
    frame = bytearray(wire(IP(src=OTHER_SERVER, dst=GATEWAY, proto=17, frag=3) / Raw(bytes(30))))
    ends = []
    for number in range(1000):
        frame[4:6] = number.to_bytes(2, "big")
        ends.append(gateway.inbound(Raw(bytes(frame))).ended)
    assert ends == ["punt_fragment"] * 128 + ["own_inbound"] * 872
    assert gateway.entries("fragments") == {}
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == port
    results = [gateway.inbound(each).ended for each in pieces(udp(SERVER, 53, GATEWAY, port, BIG))]
    assert results == ["slow_inbound", *["slow_fragment_inbound"] * 3]
    assert gateway.outbound(pieces(udp(HOST, 5000, SERVER, 53, BIG))[1]).ended == "punt_fragment", "its own budget"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param({0: 0x00}, id="not ours"),
        pytest.param({1: 2}, id="a refusal"),
        pytest.param({1: 3}, id="a TTL's end"),
        pytest.param({1: 99}, id="no reason"),
        pytest.param({5: 0xEE, 4: 0xEE}, id="no interface"),
        pytest.param({2: 0xFF}, id="an interface beyond all"),
    ],
)
def test_strays(gateway: Gateway, damage: dict[int, int]) -> None:
    gateway.attend()
    frame = bytearray(gateway.outbound(pieces(udp(HOST, 5000, SERVER, 53, BIG))[1]).frame)
    for at, value in damage.items():
        frame[at] = value
    assert gateway.punt_in(bytes(frame)).ended == "drop_punt_stray"


def test_only_the_punt_port_and_only_to_a_wan(gateway: Gateway) -> None:
    gateway.attend()
    frame = bytearray(gateway.outbound(pieces(udp(HOST, 5000, SERVER, 53, BIG))[1]).frame)
    assert gateway.punt_in(bytes(frame), ifindex=gateway.lan).ended == "drop_punt_stray"
    frame[2:6] = gateway.lan.to_bytes(4, "big")
    assert gateway.punt_in(bytes(frame)).ended == "drop_punt_stray"
    gateway.tables.set_settings(punt=0)
    assert gateway.punt_in(bytes(frame)).ended == "drop_punt_stray"


# --- what overlaps ---------------------------------------------------------------------------------


def piece(offset: int, length: int, *, last: bool = False, inbound: bool = False, number: int = 7) -> Packet:
    src, dst = (SERVER, GATEWAY) if inbound else (HOST, SERVER)
    return IP(src=src, dst=dst, id=number, proto=17, frag=offset // 8, flags="" if last else "MF") / Raw(
        bytes(length)
    )


OVERLAPS = {
    "the first": (0, 16),
    "the first's end": (792, 16),
    "a later one's beginning": (1592, 16),
    "a later one's end": (2392, 16),
    "within a later one": (1608, 8),
    "around a later one": (1592, 900),
}


@pytest.mark.req("attacks-fragments")
@pytest.mark.parametrize(("offset", "length"), OVERLAPS.values(), ids=OVERLAPS)
@pytest.mark.parametrize("inbound", [False, True], ids=["outbound", "inbound"])
def test_overlaps(gateway: Gateway, offset: int, length: int, inbound: bool) -> None:
    """RFC 1858, RFC 3128: that piece, and all of the datagram after it."""
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    send = gateway.inbound if inbound else gateway.outbound
    done = "slow_fragment_inbound" if inbound else "slow_fragment_outbound"
    whole = udp(SERVER, 53, GATEWAY, port, BIG, id=7) if inbound else udp(HOST, 5000, SERVER, 53, BIG, id=7)
    first = IP(wire(fragment(IP(wire(whole)), 800)[0]))
    length_of_first = len(wire(first)) - 20
    assert send(first).verdict == "pass"
    assert send(piece(1600, 800, inbound=inbound)).ended == done
    assert send(piece(1600, 800, inbound=inbound)).ended == done, "a mere repetition"
    assert send(first).verdict == "pass", "also of the first"
    at = min(offset, length_of_first - 8) if offset < 800 else offset
    if at == 0:
        assert send(rebuilt(first, src=first.src)).verdict == "pass"
        at = 8
    assert send(piece(at, length, inbound=inbound)).ended == "drop_fragment_overlap"
    assert send(piece(2400, 8, last=True, inbound=inbound)).ended == "drop_fragment_overlap"
    assert send(first).ended == "drop_fragment_overlap"
    assert send(piece(1600, 800, inbound=inbound, number=8)).ended != done


def test_the_last_byte_ends_it(gateway: Gateway) -> None:
    """And the identifier may come again at once, with other lengths."""
    for size in (3000, 2500, 2999):
        for each in fragment(IP(wire(udp(HOST, 5000, SERVER, 53, bytes(size), id=7))), 1000):
            assert gateway.outbound(each).verdict == "pass"
        assert gateway.entries("fragments") == {}


def test_more_pieces_than_are_remembered(gateway: Gateway) -> None:
    """64 kB in pieces of an Ethernet frame, the longest datagram there is."""
    packet = udp(HOST, 5000, SERVER, 53, bytes(65507), id=7)
    ends = [gateway.outbound(each).ended for each in fragment(IP(wire(packet)), 1480)]
    assert ends == ["slow_outbound", *["slow_fragment_outbound"] * 44]
    assert gateway.entries("fragments") == {}
