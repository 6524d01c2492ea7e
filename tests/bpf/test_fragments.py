"""Fragments: the first one has the ports, later ones follow it."""

import pytest
from harness import (
    GATEWAY,
    HOST,
    OTHER_HOST,
    OTHER_SERVER,
    SERVER,
    Gateway,
    ago,
    echo,
    echo_reply,
    full_sum,
    rebuilt,
    sums,
    tcp,
    udp,
    wire,
)
from scapy.layers.inet import IP, fragment
from scapy.packet import Packet, Raw

KINDS = {
    "udp": (udp(HOST, 5000, SERVER, 53, bytes(range(256)) * 16, id=77), "sport"),
    "tcp": (tcp(HOST, 5000, SERVER, 80, payload=bytes(range(256)) * 16, id=77), "sport"),
    "icmp": (echo(HOST, SERVER, 5000, bytes(range(256)) * 16, id=77), "id"),
}


def whole(fragments: list[bytes]) -> bytes:
    """The payload put together again."""
    payload = bytearray()
    for each in fragments:
        offset = (int.from_bytes(each[6:8], "big") & 0x1FFF) * 8
        assert offset == len(payload)
        payload += each[20:]
    return bytes(payload)


def later(src: str, dst: str, number: int = 77, proto: int = 17, **ip: object) -> Packet:
    return IP(src=src, dst=dst, id=number, proto=proto, frag=185, **ip) / Raw(b"the rest of it")


@pytest.mark.parametrize(("packet", "port_field"), KINDS.values(), ids=KINDS)
def test_outbound_in_order(gateway: Gateway, packet: Packet, port_field: str) -> None:
    results = [gateway.outbound(each) for each in fragment(IP(wire(packet)), 1400)]
    assert [result.ended for result in results] == ["slow_outbound", *["slow_fragment_outbound"] * 2]
    expected = rebuilt(packet, src=GATEWAY, **{port_field: results[0].port})
    assert whole([result.bytes for result in results]) == wire(expected)[20:]
    assert all(result.ip.src == GATEWAY and sums(result.bytes)["ip"] == 0 for result in results)


@pytest.mark.req("7857-10")
@pytest.mark.parametrize("kind", KINDS)
def test_hosts_that_chose_one_identification(gateway: Gateway, kind: str) -> None:
    """Their pieces meet at one remote, which tells them apart; what is whole, or comes in, keeps its own."""
    packet, _ = KINDS[kind]
    names = []
    for host in (HOST, OTHER_HOST) * 10:
        pieces = [gateway.outbound(each) for each in fragment(rebuilt(packet, src=host), 1400)]
        assert all(sums(each.bytes)["ip"] == 0 for each in pieces)
        assert len({each.ip.id for each in pieces}) == 1
        names.append(pieces[0].ip.id)
    assert len({*names}) >= 18, "three meetings by chance in ten million runs"
    assert names.count(77) <= 2
    assert 0 not in names
    assert gateway.outbound(udp(HOST, 5000, SERVER, 53, id=77)).ip.id == 77


def test_a_first_piece_that_comes_again(gateway: Gateway) -> None:
    first, last = fragment(udp(HOST, 5000, SERVER, 53, bytes(2000), id=77), 1400)
    pieces = [gateway.outbound(each) for each in (first, first, last)]
    assert [each.ended for each in pieces] == ["slow_outbound", "slow_outbound", "slow_fragment_outbound"]
    assert len({each.ip.id for each in pieces}) == 1


@pytest.mark.parametrize(("packet", "port_field"), KINDS.values(), ids=KINDS)
def test_inbound_in_order(gateway: Gateway, packet: Packet, port_field: str) -> None:
    port = gateway.open(fragment(IP(wire(packet)), 1400)[0])
    answer = {
        "udp": udp(SERVER, 53, GATEWAY, port, bytes(4000), id=88),
        "tcp": tcp(SERVER, 80, GATEWAY, port, payload=bytes(4000), id=88),
        "icmp": echo_reply(SERVER, GATEWAY, port, bytes(4000), id=88),
    }[packet.payload.name.lower()]
    results = [gateway.inbound(each) for each in fragment(IP(wire(answer)), 1400)]
    assert [result.ended for result in results] == ["slow_inbound", *["slow_fragment_inbound"] * 2]
    expected = rebuilt(answer, dst=HOST, **{"id" if port_field == "id" else "dport": 5000})
    assert whole([result.bytes for result in results]) == wire(expected)[20:]
    assert all(result.ip.dst == HOST and sums(result.bytes)["ip"] == 0 for result in results)


def test_orphan_inbound_is_the_gateways_own(gateway: Gateway) -> None:
    gateway.open(udp(HOST, 5000, SERVER, 53))
    assert gateway.inbound(later(SERVER, GATEWAY)).ended == "own_inbound"


@pytest.mark.parametrize(
    "stranger",
    [
        pytest.param(later(HOST, SERVER, number=78), id="another id"),
        pytest.param(later(HOST, OTHER_SERVER), id="another destination"),
        pytest.param(later("192.168.0.9", SERVER), id="another source"),
        pytest.param(later(HOST, SERVER, proto=6), id="another protocol"),
    ],
)
@pytest.mark.req("attacks-leak")
def test_only_fragments_of_the_same_packet_follow(gateway: Gateway, stranger: Packet) -> None:
    gateway.outbound(fragment(udp(HOST, 5000, SERVER, 53, bytes(2000), id=77), 1400)[0])
    assert gateway.outbound(stranger).ended == "drop_fragment_orphan"
    assert gateway.outbound(later(HOST, SERVER)).ended == "slow_fragment_outbound"


def test_remembered_for_a_while_only(gateway: Gateway) -> None:
    gateway.outbound(fragment(udp(HOST, 5000, SERVER, 53, bytes(2000), id=77), 1400)[0])
    table = gateway.tables.maps["fragments"]
    ((keys, values),) = table.items(chunk=16384)
    values[0]["seen_at"] = ago(30.01)
    table.set(keys[0], values[0])
    assert gateway.outbound(later(HOST, SERVER)).ended == "drop_fragment_orphan"


def test_a_refused_first_fragment_lets_none_follow(gateway: Gateway) -> None:
    first = fragment(tcp(HOST, 5000, SERVER, 80, 0x29, payload=bytes(2000), id=77), 1400)[0]
    assert gateway.outbound(first).ended == "drop_tcp_flags"
    assert gateway.outbound(later(HOST, SERVER, proto=6)).ended == "drop_fragment_orphan"


@pytest.mark.parametrize(
    ("proto", "length"), [(6, 8), (6, 16), (17, 0), (1, 0)], ids=["8 of TCP", "16 of TCP", "0 of UDP", "0 of ICMP"]
)
def test_tiny_first_fragment(gateway: Gateway, proto: int, length: int) -> None:
    """RFC 1858: it hides its ports or flags."""
    port = gateway.connect(HOST, 5000, SERVER, 80)
    head = wire(tcp(HOST, 5000, SERVER, 80))[20 : 20 + length]
    tiny = IP(src=HOST, dst=SERVER, flags="MF", id=77, proto=proto) / Raw(head)
    assert gateway.outbound(tiny).ended == "drop_fragment_tiny"
    head = wire(tcp(SERVER, 80, GATEWAY, port))[20 : 20 + length]
    tiny = IP(src=SERVER, dst=GATEWAY, flags="MF", id=77, proto=proto) / Raw(head)
    assert gateway.inbound(tiny).ended == "drop_fragment_tiny"


def test_first_fragment_within_the_tcp_options(gateway: Gateway) -> None:
    """The TCP header says 40 bytes, the fragment has 24 of them."""
    gateway.connect(HOST, 5000, SERVER, 80)
    segment = bytearray(wire(tcp(HOST, 5000, SERVER, 80, payload=bytes(20)))[20:])
    segment[12] = 0xA0
    packet = IP(src=HOST, dst=SERVER, flags="MF", id=77, proto=6) / Raw(bytes(segment[:24]))
    assert gateway.outbound(packet).ended == "drop_fragment_tiny"


@pytest.mark.req("attacks-fragments")
def test_tcp_fragment_at_offset_8(gateway: Gateway) -> None:
    """RFC 3128: it would overwrite the flags that were looked at."""
    port = gateway.connect(HOST, 5000, SERVER, 80)
    head = wire(tcp(HOST, 5000, SERVER, 80, payload=bytes(92)))[20:]
    assert gateway.outbound(IP(src=HOST, dst=SERVER, flags="MF", id=77, proto=6) / Raw(head)).ended == "slow_outbound"
    overlap = IP(src=HOST, dst=SERVER, frag=1, id=77, proto=6) / Raw(bytes(20))
    assert gateway.outbound(overlap).ended == "drop_malformed"
    head = wire(tcp(SERVER, 80, GATEWAY, port, payload=bytes(92)))[20:]
    assert gateway.inbound(IP(src=SERVER, dst=GATEWAY, flags="MF", id=7, proto=6) / Raw(head)).ended == "slow_inbound"
    overlap = IP(src=SERVER, dst=GATEWAY, frag=1, id=7, proto=6) / Raw(bytes(20))
    assert gateway.inbound(overlap).ended == "drop_malformed"


@pytest.mark.req("attacks-fragments")
def test_a_total_over_64k(gateway: Gateway) -> None:
    gateway.outbound(fragment(udp(HOST, 5000, SERVER, 53, bytes(2000), id=77), 1400)[0])
    fits = IP(src=HOST, dst=SERVER, frag=8189, id=77, proto=17) / Raw(bytes(3))
    assert gateway.outbound(fits).ended == "slow_fragment_outbound"
    beyond = IP(src=HOST, dst=SERVER, frag=8189, id=77, proto=17) / Raw(bytes(4))
    assert gateway.outbound(beyond).ended == "drop_malformed"


@pytest.mark.req("4787-14a")
def test_a_flood_of_first_fragments_is_bounded(gateway: Gateway) -> None:
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    frame = bytearray(wire(IP(src=HOST, dst=SERVER, flags="MF", proto=17) / udp(HOST, 5000, SERVER, 53).payload))
    for number in range(20_000):
        frame[4:6] = number.to_bytes(2, "big")
        frame[10:12] = b"\0\0"
        frame[10:12] = (0xFFFF - full_sum(frame[:20])).to_bytes(2, "big")
        gateway.outbound(Raw(bytes(frame)))
    assert sum(len(keys) for keys, _ in gateway.tables.maps["fragments"].items(16384)) <= 16384
    assert gateway.outbound(later(HOST, SERVER, number=19_999)).ended == "slow_fragment_outbound"
    assert gateway.open(udp(HOST, 5000, SERVER, 53)) == port
