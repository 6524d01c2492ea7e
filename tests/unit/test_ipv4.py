"""IPv4 headers, and packets in pieces."""

import pytest
from scapy.layers.inet import IP, UDP, IPOption, defragment, fragment
from scapy.packet import Packet, Raw

from xdpmasq import ipv4


def packet(length: int = 3000, **fields: object) -> Packet:
    return (
        IP(src="192.168.0.2", dst="198.51.100.10", id=77, **fields)
        / UDP(sport=5000)
        / Raw(bytes(range(256)) * (length // 256))
    )


@pytest.mark.parametrize("mtu", [68, 576, 1280, 1281, 1500])
def test_pieces_are_those_that_another_makes(mtu: int) -> None:
    pieces = ipv4.fragments(bytes(packet()), mtu)
    assert pieces == [bytes(each) for each in fragment(packet(), (mtu - 20) & ~7)]


def test_pieces_of_a_piece() -> None:
    first, second = ipv4.fragments(bytes(packet()), 2000) or []
    pieces = [piece for each in (first, second) for piece in ipv4.fragments(each, 600) or []]
    assert all(len(piece) <= 600 for piece in pieces)
    (whole,) = defragment([IP(each) for each in pieces])
    assert bytes(whole[UDP].payload) == bytes(packet()[UDP].payload)


def test_only_options_to_be_copied_are() -> None:
    """RFC 791 section 3.1: the router alert is, a record route is not."""
    alert, route = IPOption(b"\x94\x04\0\0"), IPOption(b"\x07\x07\x04" + bytes(4))
    first, *later = [IP(each) for each in ipv4.fragments(bytes(packet(options=[route, alert])), 600) or []]
    assert [option.option for option in first.options] == [7, 20, 0]
    assert all([option.option for option in each.options] == [20] for each in later)
    for each in later:
        assert len(each) <= 600
        sum_ = each.chksum
        del each.chksum
        assert IP(bytes(each)).chksum == sum_


@pytest.mark.parametrize(
    "options", [b"\x94", b"\x94\x01\0\0", b"\x94\xff\0\0"], ids=["no length", "a length of 1", "beyond the end"]
)
def test_a_broken_list_of_options_is_not_copied(options: bytes) -> None:
    text = bytearray(bytes(packet(options=[IPOption(b"\x94\x04\0\0")])))
    text[20:24] = options.ljust(4, b"\x94")
    first, second, *_ = ipv4.fragments(bytes(text), 1500) or []
    assert (first[0] & 15, second[0] & 15) == (6, 5)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param((bytes(packet(flags="DF")), 600), id="not to be cut"),
        pytest.param((bytes(packet()), 27), id="no room for anything"),
        pytest.param((bytes(packet())[:100], 600), id="its end is missing"),
    ],
)
def test_no_pieces(given: tuple[bytes, int]) -> None:
    assert ipv4.fragments(*given) is None


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (3, 0, 1, 4, 2), (0, 0, 1, 2, 2, 2, 3, 4, 4)], ids=str
)
def test_pieces_make_a_whole(order: tuple[int, ...]) -> None:
    whole = bytes(packet(options=[IPOption(b"\x94\x04\0\0")]))
    pieces = ipv4.fragments(whole, 600) or []
    assert ipv4.joined([pieces[nth] for nth in order]) == whole


PIECES = ipv4.fragments(bytes(packet()), 1000) or []
NO_WHOLE = {
    "nothing": [],
    "no first": PIECES[1:],
    "no last": PIECES[:-1],
    "a gap": [PIECES[0], PIECES[2]],
    "one in two versions": [*PIECES, PIECES[1][:-1] + bytes([PIECES[1][-1] ^ 1])],
    "an overlap": [*PIECES, *(ipv4.fragments(PIECES[1], 600) or [])],
    "cut": [PIECES[0][:-1], *PIECES[1:]],
    "something behind it": [*PIECES, *(ipv4.fragments(bytes(packet(6000)), 1000) or [])[len(PIECES) :]],
    "too long": [bytes(each) for each in fragment(IP(id=77, len=65535) / Raw(bytes(65520)), 1480)],
}


@pytest.mark.parametrize("pieces", NO_WHOLE.values(), ids=NO_WHOLE)
def test_no_whole(pieces: list[bytes]) -> None:
    assert ipv4.joined(pieces) is None
