"""Checksum arithmetic against full sums, and the corners where incremental updates go wrong."""

import socket
import struct
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from harness import (
    ACK,
    GATEWAY,
    HOST,
    SERVER,
    SYN,
    Gateway,
    full_sum,
    rebuilt,
    sums,
    tcp,
    udp,
    wan_frame,
    wire,
)
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Packet, Raw

from xdpmasq import attachment, bpf, source
from xdpmasq.hooks import Hook
from xdpmasq.lab import netns
from xdpmasq.net import clsact, netdev

# A header of ten words is filled at random, its sum taken in full; then words 4 and 5 (an address) and word 6 (a
# port) are replaced, and the updated sum compared with a full one.
SUMS = """
BPF_TABLE("array", u32, u64, results, 2); /* pairs compared, pairs that differed */
#define WORDS 10

union header {
	u16 word[WORDS];
	u32 pair[WORDS / 2];
};

static __always_inline u16 sum_in_full(const union header *h)
{
	u64 sum = 0;
	for (int i = 0; i < WORDS; i++)
		sum += h->word[i];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

int compare_sums(struct __sk_buff *skb)
{
	u32 at[2] = { 0, 1 };
	u64 *compared = results.lookup(&at[0]), *differed = results.lookup(&at[1]);
	union header h = {};

	if (!compared || !differed)
		return 1;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 1000; i++) {
		u32 random = bpf_get_prandom_u32();
		addr_t old, new = { { bpf_get_prandom_u32() } };
		u16 before, port = random;
		u32 delta;

		for (int n = 0; n < WORDS / 2; n++)
			h.pair[n] = bpf_get_prandom_u32();
		if (random < 1 << 28) /* now and then a check of 0 */
			h.word[9] = csum_fold16((u32)h.word[9] + sum_in_full(&h));
		if (random < 1 << 27)
			new.word[0] = 0;
		before = sum_in_full(&h);
		old.word[0] = h.pair[2];
		delta = csum_delta_addr(old, new) + csum_delta_port(h.word[6], port);
		h.pair[2] = new.word[0];
		h.word[6] = port;
		if (csum_apply(before, delta) != sum_in_full(&h))
			++*differed;
		++*compared;
	}
	return 0;
}

int csum_one(struct __sk_buff *skb) /* check, old and new word in; the new check out */
{
	u16 word[3] = {};

	bpf_skb_load_bytes(skb, 14, word, sizeof(word));
	u32 delta = csum_delta_port(word[1], word[2]);
	return csum_apply(word[0], delta) | csum_apply_udp(word[0], delta) << 16;
}
"""


@pytest.fixture(scope="module")
def arithmetic() -> bpf.Object:
    return bpf.compile(source.flatten(("types.h", "csum.h")) + SUMS, {"EXTERNALS": 1, "FURTHER": 64})


@pytest.mark.req("checksums-1624")
def test_ten_million_updates_agree_with_full_sums(arithmetic: bpf.Object) -> None:
    program = arithmetic.load("compare_sums", "tc")
    assert program.test_run(bytes(14), repeat=10_000).verdict == 0
    results = arithmetic.maps["results"]
    assert (results.get(0), results.get(1)) == (10_000_000, 0)


@pytest.mark.req("checksums-1624")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        pytest.param((0xDD2F, 0x5555, 0x3285), (0x0000, 0xFFFF), id="the example of RFC 1624"),
        pytest.param((0xDD2F, 0x5555, 0x5555), (0xDD2F, 0xDD2F), id="nothing changes"),
        pytest.param((0x1234, 0x0000, 0xFFFF), (0x1234, 0x1234), id="both forms of zero"),
        pytest.param((0x0000, 0x1111, 0x2222), (0xEEEE, 0x0000), id="a check of zero; UDP: none"),
        pytest.param((0xFFFE, 0x0001, 0x0002), (0xFFFD, 0xFFFD), id="carry"),
        pytest.param((0x0001, 0xFFFF, 0xFFFE), (0x0002, 0x0002), id="borrow"),
        pytest.param((0xFFFF, 0x1111, 0x2222), (0xEEEE, 0xEEEE), id="UDP's zero as ones"),
    ],
)
def test_examples(arithmetic: bpf.Object, words: tuple[int, int, int], expected: tuple[int, int]) -> None:
    """Check, old and new word; the new check, and that of UDP.

    The order of bytes does not matter to a one's complement sum: these are little-endian words.
    """
    run = arithmetic.load("csum_one", "tc").test_run(bytes(14) + struct.pack("<3H", *words))
    assert (run.verdict & 0xFFFF, run.verdict >> 16) == expected


# --- UDP's zeroes ----------------------------------------------------------------------------------


def _without_checksum(packet: Packet) -> Packet:
    packet[UDP].chksum = 0
    return packet


def _filled(packet: Packet, wanted: int, changes: dict[str, object]) -> Packet:
    """The packet with two bytes of its payload chosen so that its UDP checksum, after ``changes``, is ``wanted``."""
    payload = packet[UDP].payload.load
    packet[UDP].payload.load = b"\0\0" + payload[2:]
    after = wire(rebuilt(packet, **changes))
    segment = after[20:26] + b"\0\0" + after[28:]
    rest = full_sum(after[12:20] + bytes([0, 17]) + len(segment).to_bytes(2, "big") + segment)
    packet[UDP].payload.load = ((0xFFFF - wanted - rest) % 0xFFFF).to_bytes(2, "big") + payload[2:]
    return IP(wire(packet))


@pytest.mark.req("checksums-768")
def test_no_udp_checksum_stays_none(gateway: Gateway) -> None:
    packet = _without_checksum(udp(HOST, 5000, SERVER, 53))
    result = gateway.outbound(packet)
    assert result.ip[UDP].chksum == 0
    assert result.bytes == wire(rebuilt(packet, src=GATEWAY, sport=result.port))
    answer = _without_checksum(udp(SERVER, 53, GATEWAY, result.port))
    assert gateway.inbound(answer).bytes == wire(rebuilt(answer, dst=HOST, dport=5000))


@pytest.mark.req("checksums-768")
@pytest.mark.parametrize("fast", [False, True], ids=["slow", "fast"])
def test_a_computed_zero_is_sent_as_ones(gateway: Gateway, fast: bool) -> None:
    gateway.accelerate()
    port = gateway.open(udp(HOST, 5000, SERVER, 53))
    out = _filled(udp(HOST, 5000, SERVER, 53), 0xFFFF, {"src": GATEWAY, "sport": port})
    result = (gateway.fast_outbound if fast else gateway.outbound)(out)
    assert result.ended == ("fast_outbound" if fast else "slow_outbound")
    assert result.ip[UDP].chksum == 0xFFFF

    back = _filled(udp(SERVER, 53, GATEWAY, port), 0xFFFF, {"dst": HOST, "dport": 5000})
    assert gateway.inbound(back).ip[UDP].chksum == 0xFFFF


def test_a_tcp_checksum_of_zero_is_sent_as_it_is(gateway: Gateway) -> None:
    port = gateway.connect(HOST, 5000, SERVER, 80)
    segment = partial(tcp, HOST, 5000, SERVER, 80, ACK, seq=101, ack=501)
    other = rebuilt(segment(payload=b"\0\0"), src=GATEWAY, sport=port)
    result = gateway.outbound(segment(payload=other[TCP].chksum.to_bytes(2, "big")))
    assert result.ip[TCP].chksum == 0


# --- GSO and partial checksums ---------------------------------------------------------------------


@pytest.mark.req("checksums-partial")
def test_super_packet(gateway: Gateway) -> None:
    port = gateway.connect(HOST, 5000, SERVER, 80)
    super_packet = tcp(HOST, 5000, SERVER, 80, ACK, seq=101, ack=501, payload=bytes(range(250)) * 13)
    result = gateway.outbound(super_packet, gso_size=500, gso_segs=7)
    assert result.bytes == wire(rebuilt(super_packet, src=GATEWAY, sport=port))
    back = tcp(SERVER, 80, GATEWAY, port, ACK, seq=501, ack=101, payload=bytes(range(250)) * 13)
    assert gateway.inbound(back, gso_size=500, gso_segs=7).bytes == wire(rebuilt(back, dst=HOST, dport=5000))


@pytest.mark.req("checksums-partial")
def test_super_packet_beyond_64k_has_no_length(gateway: Gateway) -> None:
    """BIG TCP: the header's length is 0, the skb's counts. (The kernel does not let us make one that big.)"""
    packet = bytearray(wire(tcp(HOST, 5000, SERVER, 80, ACK, payload=bytes(3000))))
    packet[2:4] = packet[10:12] = b"\0\0"
    packet[10:12] = (0xFFFF - full_sum(packet[:20])).to_bytes(2, "big")
    result = gateway.outbound(IP(bytes(packet)), gso_size=500, gso_segs=6)
    assert result.ended == "slow_outbound"
    assert gateway.session(HOST, 5000, "tcp", SERVER, 80)["sent"]["bytes"] == 3040
    assert gateway.outbound(IP(bytes(packet))).ended == "drop_malformed", "without GSO it is a lie"


VIRTIO_NET_HDR = "<BBHHHH"  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset
NEEDS_CSUM, GSO_NONE, GSO_TCPV4, GSO_UDP_L4 = 1, 0, 1, 5
SOL_PACKET, PACKET_VNET_HDR = 263, 15


@pytest.fixture
def send_and_receive(real_wan: str) -> Iterator[Callable[[bytes, bytes], tuple[bytes, bytes]]]:
    """Sends (virtio header, frame) out of wan0; returns what arrives at its peer."""
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as receiver,
    ):
        for each, name in ((sender, real_wan), (receiver, "wan1")):
            each.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            each.bind((name, 0 if each is sender else 0x0003))
        receiver.settimeout(5)

        def send(header: bytes, frame: bytes) -> tuple[bytes, bytes]:
            sender.send(header + frame)
            while True:
                got = receiver.recv(70000)
                if got[10 + 12 : 10 + 14] == b"\x08\x00":
                    return got[:10], got[10:]

        yield send


@pytest.mark.req("checksums-partial")
@pytest.mark.parametrize(
    ("packet", "gso_type", "gso_size"),
    [
        pytest.param(udp(HOST, 5000, SERVER, 53, bytes(500)), GSO_NONE, 0, id="UDP"),
        pytest.param(tcp(HOST, 5000, SERVER, 80, SYN), GSO_NONE, 0, id="TCP"),
        pytest.param(tcp(HOST, 5000, SERVER, 80, ACK, payload=bytes(60000)), GSO_TCPV4, 1448, id="TCP, 60 kB"),
        pytest.param(udp(HOST, 5000, SERVER, 53, bytes(5000)), GSO_UDP_L4, 1000, id="UDP, 5 segments"),
    ],
)
def test_partial_checksum(
    gateway: Gateway,
    send_and_receive: Callable[..., tuple[bytes, bytes]],
    packet: Packet,
    gso_type: int,
    gso_size: int,
) -> None:
    """Such a packet carries the sum of its pseudo header only; a device fills in the rest later."""
    at = 16 if TCP in packet else 6
    data = bytearray(wire(packet))

    def pseudo_sum(ip: bytes) -> int:
        return full_sum(ip[12:20] + bytes([0, ip[9]]) + (len(ip) - 20).to_bytes(2, "big"))

    data[20 + at : 22 + at] = pseudo_sum(data).to_bytes(2, "big")
    header_len = 54 if TCP in packet else 42
    virtio = struct.pack(VIRTIO_NET_HDR, NEEDS_CSUM, gso_type, header_len, gso_size, 34, at)
    virtio_after, frame = send_and_receive(virtio, wan_frame(Raw(bytes(data))))
    after = frame[14:]
    slot = gateway.slot(HOST, 5000, "tcp" if TCP in packet else "udp")
    assert slot is not None
    assert (after[12:16], int.from_bytes(after[20:22], "big")) == (socket.inet_aton(GATEWAY), slot % 65536)
    assert sums(after)["ip"] == 0
    flags, gso_type_after, _, gso_size_after, start, offset = struct.unpack(VIRTIO_NET_HDR, virtio_after)
    assert (flags & NEEDS_CSUM, start, offset) == (NEEDS_CSUM, 34, at), "still partial"
    assert (gso_type_after, gso_size_after) == (gso_type, gso_size), "still whole"
    assert int.from_bytes(after[20 + at : 22 + at], "big") % 0xFFFF == pseudo_sum(after)
    assert after[22 : 20 + at] == data[22 : 20 + at]
    assert after[22 + at :] == data[22 + at :]


@pytest.fixture
def jumbo(gateway: Gateway) -> Iterator[None]:
    """A WAN of 9000 bytes, jumbo0; its peer is jumbo1."""
    netns.ip_batch(
        [
            "link add jumbo0 mtu 9000 type veth peer name jumbo1 mtu 9000",
            *(f"link set {name} arp off up" for name in ("jumbo0", "jumbo1")),
        ]
    )
    try:
        link = netdev.link("jumbo0")
        if not attachment.uses_tcx():
            clsact.add(link.index)
        attachment.put(link, Hook("egress", "masq_wan_out"), gateway.bench.programs)
        yield
    finally:
        netns.ip_batch(["link del jumbo0"])


@pytest.mark.usefixtures("jumbo")
@pytest.mark.parametrize("linear", [14, 30, 40], ids="linear part of {} bytes".format)
def test_headers_beyond_the_linear_part(gateway: Gateway, linear: int) -> None:
    """Drivers may leave headers in page fragments. Of a frame longer than a page, AF_PACKET puts into the linear part
    no more than the header length it is told.
    """
    packet = udp(HOST, 5000, SERVER, 53, bytes(5000))
    with (
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender,
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as receiver,
    ):
        receiver.bind(("jumbo1", 0x0800))
        receiver.settimeout(5)
        sender.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        sender.bind(("jumbo0", 0))
        sender.send(struct.pack(VIRTIO_NET_HDR, 0, GSO_NONE, linear, 0, 0, 0) + wan_frame(packet))
        frame = receiver.recv(9100)
    slot = gateway.slot(HOST, 5000, "udp")
    assert slot is not None
    assert frame[14:] == wire(rebuilt(packet, src=GATEWAY, sport=slot % 65536))
