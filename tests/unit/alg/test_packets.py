"""Packets of control sessions, as scapy takes them apart."""

from ipaddress import IPv4Address

import pytest
from scapy.layers.inet import IP, TCP, UDP, IPOption
from scapy.packet import Packet, Raw

from xdpmasq.alg import packets
from xdpmasq.alg.api import Endpoint
from xdpmasq.alg.packets import SHORTEST

HOST, REMOTE = "192.168.0.2", "198.51.100.10"
STAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (1111, 2222))]


def segment(text: bytes = b"PORT 1\r\n", flags: str = "PA", **ip: object) -> Packet:
    return (
        IP(src=HOST, dst=REMOTE, id=7, tos=8, **ip)
        / TCP(sport=5000, dport=21, seq=100, ack=500, flags=flags, window=321, options=STAMPS)
        / Raw(text)
    )


def parsed(packet: Packet) -> packets.Packet:
    found = packets.parse(bytes(packet) + b"Ethernet's padding")
    assert found
    return found


def is_right(made: bytes) -> Packet:
    """Lengths and checksums are those that scapy would give it."""
    packet = IP(made)
    blank = IP(made)
    del blank.len, blank.chksum, blank.payload.chksum
    if UDP in blank:
        del blank[UDP].len
    assert bytes(blank) == made
    return packet


@pytest.mark.parametrize("options", [[], [IPOption(b"\x94\x04\0\0")]], ids=["", "with IP options"])
@pytest.mark.parametrize("text", [b"", b"x", b"PORT 203,0,113,1,200,21\r\n"])
def test_another_text(text: bytes, options: list[IPOption]) -> None:
    (made,) = packets.segments(parsed(segment(options=options)), 4000, text)
    packet = is_right(made)
    assert (packet[TCP].seq, packet[TCP].ack, packet[TCP].window) == (4000, 500, 321)
    assert (bytes(packet[TCP].payload), packet[TCP].options[:3], packet.tos, packet.id) == (text, STAMPS, 8, 7)


def test_a_text_that_has_become_too_long_is_cut() -> None:
    """Into segments as long as it was; only the last one says that there is no more."""
    text = bytes(range(256)) * 4
    made = [is_right(each) for each in packets.segments(parsed(segment(bytes(600), "FPA")), 0xFFFFFF00, text)]
    assert [len(each[TCP].payload) for each in made] == [600, 424]
    assert [each[TCP].seq for each in made] == [0xFFFFFF00, (0xFFFFFF00 + 600) % 2**32]
    assert [str(each[TCP].flags) for each in made] == ["A", "FPA"]
    short = packets.segments(parsed(segment(b"x")), 0, bytes(SHORTEST + 1))
    assert [len(IP(each)[TCP].payload) for each in short] == [SHORTEST, 1]


def test_an_acknowledgement() -> None:
    external = Endpoint(IPv4Address("203.0.113.1"), 4711)
    made = packets.acknowledgement(
        parsed(segment(options=[IPOption(b"\x94\x04\0\0")])),
        Endpoint(IPv4Address(REMOTE), 21),
        external,
        sequence=500,
        ack=108,
        window=99,
    )
    packet = is_right(made)
    assert (packet.src, packet.dst, packet[TCP].sport, packet[TCP].dport) == (REMOTE, "203.0.113.1", 21, 4711)
    assert (packet[TCP].seq, packet[TCP].ack, packet[TCP].window, str(packet[TCP].flags)) == (500, 108, 99, "A")
    assert ("Timestamp", (2222, 1111)) in packet[TCP].options
    assert packet.options == []


@pytest.mark.parametrize("text", [b"", b"x", b"INVITE"])
def test_another_datagram(text: bytes) -> None:
    datagram = IP(src=HOST, dst=REMOTE) / UDP(sport=5060, dport=5060) / b"hello"
    assert bytes(is_right(packets.datagram(parsed(datagram), text))[UDP].payload) == text


def test_a_datagram_without_checksum_has_none() -> None:
    datagram = IP(src=HOST, dst=REMOTE) / UDP(sport=5060, dport=5060, chksum=0) / b"hello"
    assert IP(packets.datagram(parsed(datagram), b"other"))[UDP].chksum == 0


def test_a_datagram_may_not_be_too_long() -> None:
    datagram = parsed(IP(src=HOST, dst=REMOTE) / UDP() / b"hello")
    assert len(packets.datagram(datagram, bytes(65507))) == 65535
    with pytest.raises(ValueError, match="65516"):
        packets.datagram(datagram, bytes(65508))


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(IP(src=HOST, dst=REMOTE, flags="MF") / UDP() / b"x", id="a first fragment"),
        pytest.param(IP(src=HOST, dst=REMOTE, frag=1) / UDP() / b"x", id="a later one"),
        pytest.param(IP(src=HOST, dst=REMOTE, proto=47) / b"12345678", id="GRE"),
        pytest.param(IP(src=HOST, dst=REMOTE) / UDP(len=7) / b"x", id="UDP length below 8"),
        pytest.param(IP(src=HOST, dst=REMOTE) / UDP(len=10) / b"x", id="UDP length beyond the end"),
        pytest.param(IP(src=HOST, dst=REMOTE) / TCP(dataofs=4), id="TCP header below 20"),
        pytest.param(IP(src=HOST, dst=REMOTE) / TCP(dataofs=6), id="TCP header beyond the end"),
        pytest.param(IP(src=HOST, dst=REMOTE, proto=6) / b"1234567890123456789", id="half a TCP header"),
    ],
)
def test_what_is_not_read(packet: Packet) -> None:
    assert packets.parse(bytes(packet)) is None
