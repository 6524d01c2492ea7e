"""ALGs in the kernel: which packets the agent gets, and the numbers that are shifted, with it and without."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np
import pytest
from harness import (
    ACK,
    FIN,
    GATEWAY,
    HOST,
    OTHER_HOST,
    PSH,
    PUNT_FRAGMENT_IN,
    PUNT_FRAGMENT_OUT,
    SERVER,
    SYN,
    TC_VERDICTS,
    Gateway,
    age,
    full_sum,
    rebuilt,
    tcp,
    udp,
    wire,
)
from harness import _frame as framed
from scapy.layers.inet import IP, TCP, fragment
from scapy.packet import Packet

from xdpmasq import abi, algs, bpf, calls
from xdpmasq.alg import switches
from xdpmasq.alg.stream import ROUND, Shifts, Step

FTP = algs.Use("ftp", (("tcp", 21), ("udp", 69)), (IPv4Network("192.168.0.2/32"),))
ALG_MARK = 0x4D600000
READ, SHIFT, SHIFTED = 1, 2, 4
PUNT_ALG_IN, PUNT_ALG_OUT = 5, 6
OUT, IN = 0, 1
WAN_MAC, NEIGHBOUR = "02:00:00:00:00:02", "02:00:00:00:00:01"


@pytest.fixture(autouse=True)
def on(gateway: Gateway) -> Iterator[None]:
    switches.put(gateway.tables, FTP)
    yield
    switches.take(gateway.tables, "ftp")


def skb(gateway: Gateway, mark: int, direction: int = OUT) -> bytes:
    """``struct __sk_buff`` at the WAN's hook."""
    made = bytearray(192)
    struct.pack_into("<I", made, 8, mark)
    struct.pack_into("<II", made, 36, (gateway.lan, gateway.wan)[direction], gateway.wan)
    return bytes(made)


def passes(gateway: Gateway, packet: Any, direction: int, mark: int = 0) -> tuple[str, bytes, int]:
    """A packet at the WAN's hook, as often as it comes by: verdict, frame, and how often."""
    frame, function = framed(packet, WAN_MAC, NEIGHBOUR), ("masq_wan_out", "masq_wan_in")[direction]
    times, verdict = 0, ""
    while not times or (verdict == "redirect" and mark & ALG_MARK):
        run = gateway.bench.programs[function].test_run(frame, context=skb(gateway, mark, direction))
        verdict, frame, mark = TC_VERDICTS[run.verdict], run.data, struct.unpack_from("<I", run.context, 8)[0]
        times += 1
    gateway.counted()
    return verdict, frame, times


def edges(packet: Packet) -> list[int]:
    return [each for name, value in packet[TCP].options if name == "SAck" for each in value]


def sacked(shifts: Shifts, blocks: tuple[int, ...]) -> list[int]:
    return [shifts.acked(each, begins=nth % 2 == 0) for nth, each in enumerate(blocks)]


def control(gateway: Gateway, port: int) -> tuple[tuple[Any, ...], Any]:
    key = (port, abi.addr(IPv4Address(SERVER)), int(np.uint16(21).byteswap()), 0)
    return key, gateway.tables.maps["controls"].get(key)


def shift(gateway: Gateway, port: int, direction: int, shifts: Shifts) -> None:
    key, record = control(gateway, port)
    record["shifts"]["before"][direction] = shifts.base
    record["shifts"]["count"][direction] = len(shifts.steps)
    for nth, step in enumerate(shifts.steps):
        record["shifts"]["shift"][direction, nth] = tuple(step)
    gateway.tables.maps["controls"].set(key, record, bpf.UPDATE_EXIST)


def control_session(gateway: Gateway) -> int:
    return gateway.connect(HOST, 5000, SERVER, 21)


def test_what_the_agent_reads(gateway: Gateway) -> None:
    """Texts, SYN and FIN; other packets, and other hosts' sessions, are nobody's business."""
    port = control_session(gateway)
    gateway.attend()
    for flags, text, read in (
        (ACK, b"", False),
        (ACK | PSH, b"USER me\r\n", True),
        (ACK | FIN, b"", True),
        (SYN, b"", True),
    ):
        packet = tcp(HOST, 5000, SERVER, 21, flags, seq=101, ack=501, payload=text)
        verdict, frame, _ = passes(gateway, packet, OUT)
        assert verdict == ("redirect" if read else "pass")
        if read:
            assert frame[:2] == bytes((2, PUNT_ALG_OUT))
            assert struct.unpack_from("!II", frame, 2) == (gateway.wan, port)
            assert frame[28:] == wire(packet)
    answer = tcp(SERVER, 21, GATEWAY, port, ACK | PSH, seq=501, ack=101, payload=b"220 hello\r\n")
    verdict, frame, _ = passes(gateway, answer, IN)
    assert (verdict, frame[1]) == ("redirect", PUNT_ALG_IN)
    other = gateway.connect(OTHER_HOST, 5000, SERVER, 21)
    assert (
        passes(gateway, tcp(SERVER, 21, GATEWAY, other, ACK | PSH, seq=501, ack=101, payload=b"x"), IN)[0] == "pass"
    )
    assert passes(gateway, udp(HOST, 5000, SERVER, 69), OUT)[0] == "redirect"


def test_the_first_piece_of_a_datagram_is_read(gateway: Gateway) -> None:
    """The others, of which nobody knows yet whose they are, wait in the same place."""
    gateway.attend()
    first, second = fragment(IP(wire(udp(HOST, 5000, SERVER, 69, bytes(2000), id=7))), 1480)
    assert passes(gateway, first, OUT)[1][:2] == bytes((2, PUNT_ALG_OUT))
    assert passes(gateway, second, OUT)[1][:2] == bytes((2, PUNT_FRAGMENT_OUT))
    back, _, _ = passes(gateway, first, OUT, ALG_MARK | READ)
    gateway.counted()
    assert (back, gateway.outbound(second).ended) == ("pass", "slow_fragment_outbound")


def test_the_first_piece_of_a_segment_is_read_though_its_text_is_in_the_others(gateway: Gateway) -> None:
    control_session(gateway)
    gateway.attend()
    segment = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501, payload=bytes(100), id=7)
    segment[TCP].options = [("NOP", None)] * 4  # a multiple of eight
    first, *rest = fragment(IP(wire(segment)), 24)
    assert TCP(bytes(first.payload)).dataofs * 4 == len(first.payload), "no text"
    assert passes(gateway, first, OUT)[1][:2] == bytes((2, PUNT_ALG_OUT))
    for each in rest:
        assert passes(gateway, each, OUT)[1][:2] == bytes((2, PUNT_FRAGMENT_OUT))


def test_what_is_over_is_read_no_more(gateway: Gateway) -> None:
    """Until somebody connects anew."""
    port = control_session(gateway)
    gateway.attend()
    key, record = control(gateway, port)
    record["over"] = 1
    gateway.tables.maps["controls"].set(key, record, bpf.UPDATE_EXIST)
    packet = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501, payload=b"anything")
    assert passes(gateway, packet, OUT)[0] == "pass"
    assert passes(gateway, tcp(HOST, 5000, SERVER, 21, SYN, seq=1), OUT)[0] == "redirect"


def test_of_an_agent_that_is_gone_nobody_waits(gateway: Gateway) -> None:
    """Its port has gone with it, however young its last heartbeat is."""
    control_session(gateway)
    gateway.tables.set_settings(punt=60000, heartbeat=bpf.jiffies())
    packet = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501, payload=b"PORT 1\r\n")
    assert passes(gateway, packet, OUT)[0] == "pass"


def test_without_an_agent_they_pass_unread(gateway: Gateway) -> None:
    control_session(gateway)
    packet = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501, payload=b"PORT 1\r\n")
    result = gateway.outbound(packet)
    assert (result.ended, result.counted["alg_bypassed"]) == ("slow_outbound", 1)
    assert result.ip[TCP].payload == packet[TCP].payload


def test_what_it_has_read_is_translated(gateway: Gateway) -> None:
    control_session(gateway)
    gateway.attend()
    packet = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501, payload=b"PORT 1\r\n")
    assert passes(gateway, packet, OUT, ALG_MARK | READ)[0] == "pass"


def test_its_packets_keep_their_mark(gateway: Gateway) -> None:
    """Through the agent, and through the shifting of numbers."""
    port = control_session(gateway)
    gateway.attend()
    packet = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501, payload=b"PORT 1\r\n")
    assert passes(gateway, packet, OUT, 77)[0] == "redirect"
    assert gateway.outbound(packet, mark=ALG_MARK | READ).mark == 77
    shift(gateway, port, OUT, Shifts(0, [Step(95, 101, 3)]))
    assert gateway.outbound(packet, mark=ALG_MARK | READ | SHIFTED).mark == 77
    bare = tcp(HOST, 5000, SERVER, 21, ACK, seq=109, ack=501)
    first = gateway.bench.programs["masq_wan_out"].test_run(
        framed(bare, WAN_MAC, NEIGHBOUR), context=skb(gateway, 78)
    )
    assert struct.unpack_from("<I", first.context, 8) == (ALG_MARK | SHIFT,)
    gateway.counted()
    assert gateway.outbound(bare, mark=ALG_MARK | SHIFTED).mark == 78


@pytest.mark.parametrize("options", [0, 1, 2, 3], ids=lambda count: f"{count} blocks")
@pytest.mark.parametrize("odd", [False, True], ids=["even", "odd"])
@pytest.mark.parametrize("first", [1000, ROUND - 40], ids=["", "wrap"])
def test_numbers_are_shifted(gateway: Gateway, options: int, odd: bool, first: int) -> None:
    """Sequence numbers, acknowledgements and the edges of SACK, as the agent reckons; checksums stay right."""
    port = control_session(gateway)
    chance = random.Random(options)
    mine, theirs = Shifts(), Shifts()
    for nth in range(8):
        for shifts, begin in ((mine, first), (theirs, first + 500)):
            start = begin + 20 * nth + chance.randint(0, 12)
            shifts.add(start % ROUND, (start + 8) % ROUND, chance.randint(-7, 17))
    shift(gateway, port, OUT, mine)
    shift(gateway, port, IN, theirs)
    for _ in range(60):
        seq, ack = (first + chance.randint(-30, 200)) % ROUND, (first + 500 + chance.randint(-30, 200)) % ROUND
        blocks = tuple((first + 500 + chance.randint(-30, 200)) % ROUND for _ in range(2 * options))
        sack = [("NOP", None)] * (1 if odd else 2) + [("SAck", blocks)] if options else []
        packet = tcp(HOST, 5000, SERVER, 21, ACK, seq=seq, ack=ack)
        packet[TCP].options = sack
        verdict, frame, times = passes(gateway, packet, OUT)
        got = IP(frame[14:])
        assert (verdict, times) == ("pass", 3)
        assert (got[TCP].seq, got[TCP].ack) == (mine.seen(seq), theirs.acked(ack))
        assert edges(got) == sacked(theirs, blocks)
        assert_sums(frame)
        packet = tcp(SERVER, 21, GATEWAY, port, ACK, seq=ack, ack=seq)
        packet[TCP].options = sack
        verdict, frame, times = passes(gateway, packet, IN)
        got = IP(frame[14:])
        assert (verdict, times, got.dst) == ("pass", 2, HOST)
        assert (got[TCP].seq, got[TCP].ack) == (theirs.seen(ack), mine.acked(seq))
        assert edges(got) == sacked(mine, blocks)
        assert_sums(frame)


def test_the_agents_own_sequence_numbers_are_right_already(gateway: Gateway) -> None:
    port = control_session(gateway)
    shift(gateway, port, OUT, Shifts(5))
    shift(gateway, port, IN, Shifts(0, [Step(390, 400, 9)]))
    packet = tcp(HOST, 5000, SERVER, 21, ACK | PSH, seq=101, ack=501 + 9, payload=b"text")
    _, frame, times = passes(gateway, packet, OUT, ALG_MARK | READ)
    got = IP(frame[14:])
    assert (times, got[TCP].seq, got[TCP].ack) == (3, 101, 501)


def test_numbers_are_shifted_far_behind_the_last_edit(gateway: Gateway) -> None:
    """Which is folded then: what lies 2 GiB behind cannot be told from what is ahead."""
    port = control_session(gateway)
    shift(gateway, port, OUT, Shifts(9))
    seq = 101 + 2**31 + 100
    verdict, frame, _ = passes(gateway, tcp(HOST, 5000, SERVER, 21, ACK, seq=seq, ack=501), OUT)
    assert (verdict, IP(frame[14:])[TCP].seq) == ("pass", seq + 9)
    verdict, frame, _ = passes(gateway, tcp(SERVER, 21, GATEWAY, port, ACK, seq=501, ack=seq + 9), IN)
    assert (verdict, IP(frame[14:])[TCP].ack) == ("pass", seq)
    assert_sums(frame)


def test_a_new_connection_is_not_shifted(gateway: Gateway) -> None:
    """Over the same endpoints, after the earlier one was closed."""
    port = control_session(gateway)
    shift(gateway, port, OUT, Shifts(0, [Step(40, 50, 9)]))
    session = gateway.session(HOST, 5000, "tcp", SERVER, 21)
    session["out"]["tcp_seen"] = session["in"]["tcp_seen"] = FIN | ACK | SYN
    _, frame, _ = passes(gateway, tcp(HOST, 5000, SERVER, 21, SYN, seq=900), OUT)
    assert IP(frame[14:])[TCP].seq == 900
    assert control(gateway, port)[1]["shifts"]["count"].sum() == 0


def test_the_record_goes_with_the_session(gateway: Gateway) -> None:
    port = control_session(gateway)
    assert control(gateway, port)[1] is not None
    gateway.reap([port], abi.REAP_FORCED)
    assert control(gateway, port)[1] is None


def test_acknowledgements_are_noted(gateway: Gateway) -> None:
    """Also those of what the agent puts back; what it makes up itself has no text."""
    port = control_session(gateway)
    assert control(gateway, port)[1]["acked"].tolist() == [101, 501]
    passes(gateway, tcp(HOST, 5000, SERVER, 21, ACK, seq=101, ack=777, payload=b""), OUT, ALG_MARK | READ)
    assert control(gateway, port)[1]["acked"].tolist() == [101, 501]
    passes(gateway, tcp(HOST, 5000, SERVER, 21, ACK, seq=101, ack=505, payload=b"x"), OUT, ALG_MARK | READ)
    assert control(gateway, port)[1]["acked"].tolist() == [101, 505]


def assert_sums(frame: bytes) -> None:
    packet = frame[14:]
    assert full_sum(packet[:20]) == 0
    length = int.from_bytes(packet[2:4], "big")
    pseudo = packet[12:20] + struct.pack("!BBH", 0, 6, length - 20)
    assert full_sum(pseudo + packet[20:length]) == 0


@pytest.mark.parametrize("is_on", [True, False], ids=["still on", "switched off"])
def test_a_session_that_starts_anew_in_place(gateway: Gateway, is_on: bool) -> None:
    """Knows nothing of the earlier one; without its ALG, it has no record."""
    packet = udp(HOST, 5000, SERVER, 69)
    port = gateway.open(packet)
    key = (abi.PORTS + port, abi.addr(IPv4Address(SERVER)), int(np.uint16(69).byteswap()), 0)
    controls = gateway.tables.maps["controls"]
    record = controls.get(key)
    record["over"], record["opened_at"] = 1, 7
    controls.set(key, record, bpf.UPDATE_EXIST)
    age(gateway.session(HOST, 5000, "udp", SERVER, 69), 301)
    if not is_on:
        switches.take(gateway.tables, "ftp")
    assert gateway.outbound(packet).counted["session_reopened"] == 1
    fresh = controls.get(key)
    if is_on:
        assert (fresh["over"], fresh["opened_at"] == 7) == (0, False)
    else:
        assert fresh is None


# --- PPTP's calls


def gre(src: str, dst: str, call: int, *, version: int = 1) -> Packet:
    """Enhanced GRE with a sequence number (RFC 2637 section 4.1)."""
    text = struct.pack("!HHHHI", 0x3000 | version, 0x880B, 4, call, 7) + b"ppp!"
    return IP(src=src, dst=dst, proto=47) / text


def test_two_hosts_choose_the_same_number_for_their_calls(gateway: Gateway) -> None:
    numbers = {}
    for host in (HOST, OTHER_HOST):
        numbers[host] = calls.open_(gateway.tables, 0, IPv4Address(host), 77, IPv4Address(SERVER))
    assert numbers[HOST] == 77 != numbers[OTHER_HOST]
    assert numbers[HOST] == calls.open_(gateway.tables, 0, IPv4Address(HOST), 77, IPv4Address(SERVER))
    for host, number in numbers.items():
        result = gateway.outbound(gre(host, SERVER, 4000))
        assert (result.ended, result.bytes) == (
            "slow_portless_outbound",
            wire(rebuilt(gre(host, SERVER, 4000), src=GATEWAY)),
        )
        verdict, frame, _ = passes(gateway, gre(SERVER, GATEWAY, number), IN)
        assert (verdict, frame[14:]) == ("pass", wire(gre(SERVER, host, 77)))
        assert calls.inside(gateway.tables, 0, IPv4Address(host), number, IPv4Address(SERVER)) == 77
    assert calls.inside(gateway.tables, 0, IPv4Address(HOST), numbers[OTHER_HOST], IPv4Address(SERVER)) is None


def test_pieces_follow_the_first_one_of_their_call(gateway: Gateway) -> None:
    """To either host, though only the first one has the number."""
    big, hosts = bytes(range(256)) * 10, (HOST, OTHER_HOST)
    for host in hosts:
        number = calls.open_(gateway.tables, 0, IPv4Address(host), 77, IPv4Address(SERVER))
        for packet, way, ends in (
            (gre(host, SERVER, 9), gateway.outbound, {"src": GATEWAY}),
            (gre(SERVER, GATEWAY, number), gateway.inbound, {"dst": host}),
        ):
            packet[IP].id = 7 + hosts.index(host)
            first, *rest = fragment(packet / big, 1000)
            done = [way(each) for each in (first, *rest)]
            side = "outbound" if "src" in ends else "inbound"
            assert [each.ended for each in done] == [f"slow_portless_{side}", *[f"slow_fragment_{side}"] * len(rest)]
            assert {getattr(each.ip, name) for each in done for name in ends} == {*ends.values()}
            assert len({each.ip.id for each in done}) == 1
            text = b"".join(each.bytes[20:] for each in done)
            assert text == bytes((gre(host, SERVER, 77 if "dst" in ends else 9) / big)[IP].payload)
    assert gateway.entries("fragments") == {}
    assert gateway.entries("bindings") == {}


def test_a_piece_of_a_call_that_overtakes_its_first_waits_for_it(gateway: Gateway) -> None:
    """And takes the remote for nobody: other GRE still goes to and from another host."""
    gateway.attend()
    number = calls.open_(gateway.tables, 0, IPv4Address(HOST), 77, IPv4Address(SERVER))
    for packet, way, reason in (
        (gre(HOST, SERVER, 9), gateway.outbound, PUNT_FRAGMENT_OUT),
        (gre(SERVER, GATEWAY, number), gateway.inbound, PUNT_FRAGMENT_IN),
    ):
        packet[IP].id = 7
        first, rest = fragment(packet / bytes(1500), 1000)
        early = way(rest)
        assert (early.ended, early.punted) == ("punt_fragment", reason)
        assert gateway.entries("bindings") == {}
        begun, late = way(first), way(IP(early.bytes))
        assert late.ended == f"slow_fragment_{'outbound' if way == gateway.outbound else 'inbound'}"
        assert late.ip.id == begun.ip.id
    assert gateway.outbound(gre(OTHER_HOST, SERVER, 1, version=0)).ended == "slow_portless_outbound"


def test_calls_that_nobody_has_told_of_are_one_hosts(gateway: Gateway) -> None:
    assert gateway.outbound(gre(HOST, SERVER, 4000)).ended == "slow_portless_outbound"
    assert gateway.outbound(gre(OTHER_HOST, SERVER, 4001)).ended == "drop_portless_taken"
    calls.open_(gateway.tables, 0, IPv4Address(OTHER_HOST), 5, IPv4Address(SERVER))
    assert gateway.outbound(gre(OTHER_HOST, SERVER, 4001, version=0)).ended == "drop_portless_taken"


def test_a_silent_call_is_forgotten(gateway: Gateway) -> None:
    calls.open_(gateway.tables, 0, IPv4Address(HOST), 77, IPv4Address(SERVER))
    calls.forget(gateway.tables, 10)
    assert calls.outside(gateway.tables, 0, IPv4Address(HOST), 77, IPv4Address(SERVER)) == 77
    calls.forget(gateway.tables, -10)
    assert calls.outside(gateway.tables, 0, IPv4Address(HOST), 77, IPv4Address(SERVER)) is None


@pytest.fixture(autouse=True)
def no_calls(gateway: Gateway) -> Iterator[None]:
    yield
    calls.forget(gateway.tables, -(1 << 30))
