"""ICMP errors byte by byte, as scapy reads them; when none may be sent; and how many."""

import random
from ipaddress import IPv4Address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, IPOption_NOP
from scapy.packet import Raw

from xdpmasq import allowance, refusal
from xdpmasq.allowance import Allowance
from xdpmasq.refusal import HOST_UNREACHABLE, PROHIBITED, TIME_EXCEEDED, message

HOST, REMOTE = "192.168.0.2", "198.51.100.10"


def packet(above: object, **fields: object) -> bytes:
    return bytes(IP(**{"src": HOST, "dst": REMOTE, "ttl": 63, **fields}) / above)


PACKETS = {
    "UDP": packet(UDP(sport=5000, dport=53) / b"question"),
    "TCP": packet(TCP(sport=5000, dport=80, flags="S")),
    "echo": packet(ICMP(type=8, id=7) / b"ping"),
    "options": packet(UDP(sport=5000) / b"text", options=[IPOption_NOP()] * 40),
    "first fragment": packet(UDP(sport=5000) / bytes(1400), flags="MF"),
    "odd length": packet(UDP(sport=5000) / b"odd"),
    "no payload": packet(b"", proto=47),
    "long": packet(UDP(sport=5000) / (bytes(range(256)) * 5)),
    "just fits": packet(UDP(sport=5000) / bytes(548 - 28)),
}


@pytest.mark.parametrize("kind", [PROHIBITED, HOST_UNREACHABLE, TIME_EXCEEDED], ids=str)
@pytest.mark.parametrize("quoted", PACKETS.values(), ids=PACKETS)
def test_the_message_as_scapy_reads_it(quoted: bytes, kind: tuple[int, int]) -> None:
    made = message(quoted, kind)
    assert made
    destination, text = made
    assert destination == IPv4Address(HOST)
    read = ICMP(text)
    assert (read.type, read.code) == kind
    assert text[4:8] == bytes(4)
    written, read.chksum = read.chksum, None
    assert ICMP(bytes(read)).chksum == written
    assert read.haslayer(IPerror)
    assert text[8:] == quoted[: 576 - 28]
    assert len(IP(dst=HOST) / Raw(text)) == min(28 + len(quoted), 576)


def test_padding_of_the_frame_is_not_quoted() -> None:
    quoted = PACKETS["odd length"]
    assert message(quoted + bytes(20), PROHIBITED) == message(quoted, PROHIBITED)


SILENT = {
    "unspecified source": packet(UDP(), src="0.0.0.0"),
    "loopback source": packet(UDP(), src="127.0.0.1"),
    "multicast source": packet(UDP(), src="224.0.0.1"),
    "class E source": packet(UDP(), src="240.0.0.1"),
    "broadcast source": packet(UDP(), src="255.255.255.255"),
    "multicast destination": packet(UDP(), dst="239.1.2.3"),
    "broadcast destination": packet(UDP(), dst="255.255.255.255"),
    "later fragment": packet(b"payload of it", frag=1, proto=17),
    **{f"ICMP error {kind}": packet(ICMP(type=kind) / PACKETS["UDP"]) for kind in (3, 4, 5, 11, 12)},
    "ICMP with options": packet(ICMP(type=3) / PACKETS["UDP"], options=[IPOption_NOP()] * 4),
    "ICMP without its type": packet(b"", proto=1),
    "length lies": packet(UDP() / b"text")[:-1],
    "IPv6": b"\x60" + packet(UDP())[1:],
    "header of 16 bytes": b"\x44" + packet(UDP())[1:],
    "header beyond the end": b"\x4f" + packet(UDP())[1:],
    "half a header": packet(UDP())[:19],
    "nothing": b"",
}


@pytest.mark.parametrize("quoted", SILENT.values(), ids=SILENT)
def test_about_these_none_is_sent(quoted: bytes) -> None:
    assert message(quoted, PROHIBITED) is None


def test_no_bytes_make_it_raise() -> None:
    chance = random.Random(1812)
    for _ in range(20_000):
        data = bytearray(chance.choice([*PACKETS.values(), *SILENT.values()]))
        for _ in range(chance.randrange(4) if data else 0):
            data[chance.randrange(min(len(data), 24))] = chance.randrange(256)
        made = message(bytes(data[: chance.randrange(80)]), TIME_EXCEEDED)
        assert made is None or 28 <= len(made[1]) <= 556


def messages() -> Allowance:
    return Allowance(refusal.TO_EACH, refusal.TO_ALL)


def test_allowed_to_one_destination() -> None:
    some, host = messages(), IPv4Address(HOST)
    assert sum(some.take(host, 0) for _ in range(100)) == 20
    assert sum(some.take(host, 1) for _ in range(100)) == 10
    assert sum(some.take(host, 1000) for _ in range(100)) == 20


def test_one_that_has_used_up_his_own_takes_nothing_from_the_others() -> None:
    some = messages()
    for _ in range(1000):
        some.take(IPv4Address(HOST), 0)
    assert sum(some.take(IPv4Address(10), 0) for _ in range(20)) == 20


def test_allowed_to_all() -> None:
    some = messages()
    assert sum(some.take(IPv4Address(n), 0) for n in range(10_000)) == 50
    assert sum(some.take(IPv4Address(n), 0.02) for n in range(10_000)) == 20
    assert len(some._each) <= allowance.KNOWN
