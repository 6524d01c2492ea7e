"""The punt port, with a pair of sockets in the place of the TAP, and of the raw socket a list."""

import contextlib
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, UDP, fragment

from xdpmasq import punt
from xdpmasq.errors import HostError
from xdpmasq.net import netdev, tun
from xdpmasq.orphans import Key
from xdpmasq.punt import ALG_IN, ALG_OUT, BUDGET, FRAGMENT_IN, FRAGMENT_OUT, REFUSED, TOO_BIG, TTL, Punt
from xdpmasq.tables import Tables

HOST, REMOTE = "192.168.0.2", "198.51.100.10"


class Wire:
    """The far end of the port: what the kernel's programs do, and what the sender hears."""

    def __init__(self, **options: Any) -> None:
        near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (near, self._far):
            end.setblocking(False)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.told: list[tuple[bytes, str]] = []
        self.refuses: OSError | None = None
        self.firsts: set[Key] = set()
        self.asked = 0
        tap = tun.Tap(near.detach(), "masq-punt0", 7)
        self.punt = Punt(tap, self._known, self, 30, **options)  # type: ignore[arg-type]

    def _known(self, keys: Any) -> list[Key]:
        self.asked += 1
        return [key for key in keys if key in self.firsts]

    def sendto(self, text: bytes, address: tuple[str, int]) -> None:
        if self.refuses:
            raise self.refuses
        self.told.append((text, address[0]))

    def close(self) -> None:  # by the port, as its ICMP socket
        self._far.close()

    def put(self, *frames: bytes) -> None:
        for frame in frames:
            self._far.send(frame)

    def returned(self) -> list[bytes]:
        frames = []
        with contextlib.suppress(BlockingIOError):
            while True:
                frames.append(self._far.recv(1 << 17))
        return frames


@pytest.fixture
def wire() -> Iterator[Wire]:
    made = Wire()
    yield made
    made.punt.close()


LINK = bytes.fromhex("02 00 00 00 00 01 02 00 00 00 00 02 08 00")


def frame(
    reason: int, packet: bytes, *, local: int = 2, ethertype: int = 0x0800, about: int = 0, link: bytes = LINK
) -> bytes:
    return struct.pack("!BBII2xH", local, reason, 7, about, ethertype) + link + packet


def later(number: int = 1, *, offset: int = 1, text: bytes = b"the rest") -> bytes:
    return bytes(IP(src=HOST, dst=REMOTE, id=number, frag=offset, proto=17) / text)


def key_of(number: int = 1) -> Key:
    return Key(socket.inet_aton(HOST), socket.inet_aton(REMOTE), struct.pack("!H", number), 17)


@pytest.mark.parametrize("reason", [FRAGMENT_IN, FRAGMENT_OUT])
def test_fragments_go_back_as_they_came_once_their_first_is_known(wire: Wire, reason: int) -> None:
    frames = [frame(reason, later(offset=n, text=b"%d" % n) + b"padding") for n in (3, 1, 2)]
    wire.put(*frames)
    wire.punt.receive(0)
    assert wire.punt.tick(0) == pytest.approx(0.005)
    assert wire.returned() == []
    wire.firsts.add(key_of())
    assert wire.punt.tick(0.005) is None
    assert wire.returned() == frames
    assert wire.punt.counts == {"held": 3, "released": 3, "expired": 0, "refused": 0, "told": 0, "untold": 0}


def test_a_first_that_came_meanwhile_releases_at_once(wire: Wire) -> None:
    wire.firsts.add(key_of())
    wire.put(frame(FRAGMENT_OUT, later()))
    wire.punt.receive(0)
    assert wire.punt.tick(0) is None
    assert wire.returned() == [frame(FRAGMENT_OUT, later())]


def test_nothing_is_asked_while_nothing_is_held(wire: Wire) -> None:
    assert wire.punt.tick(0) is None
    wire.put(frame(FRAGMENT_IN, later()))
    wire.punt.receive(0)
    assert wire.punt.tick(0) == pytest.approx(0.005)
    assert wire.punt.tick(30) is None
    asked = wire.asked
    assert wire.punt.tick(60) is None
    assert wire.asked == asked
    assert wire.punt.counts["expired"] == 1


def test_one_call_takes_no_more_than_its_budget(wire: Wire) -> None:
    wire.put(*(frame(FRAGMENT_IN, later(number)) for number in range(BUDGET + 5)))
    wire.punt.receive(0)
    assert wire.punt.counts["held"] == BUDGET
    wire.punt.receive(0)
    assert wire.punt.counts["held"] == BUDGET + 5


@pytest.mark.parametrize(
    ("options", "reason", "kind"),
    [
        ({}, REFUSED, (3, 13)),
        ({"refusal_": "prohibited"}, REFUSED, (3, 13)),
        ({"refusal_": "host-unreachable"}, REFUSED, (3, 1)),
        ({"refusal_": "host-unreachable"}, TTL, (11, 0)),
    ],
)
def test_the_sender_is_told(options: dict[str, Any], reason: int, kind: tuple[int, int]) -> None:
    wire = Wire(**options)
    packet = bytes(IP(src=HOST, dst=REMOTE, ttl=63) / UDP(sport=5000) / b"text")
    wire.put(frame(reason, packet))
    wire.punt.receive(0)
    ((text, to),) = wire.told
    assert to == HOST
    assert (text[0], text[1]) == kind
    assert text[8:] == packet
    assert wire.punt.counts["told"] == 1
    wire.punt.close()


def test_too_many_and_refused_ones_are_counted(wire: Wire) -> None:
    packet = frame(REFUSED, bytes(IP(src=HOST, dst=REMOTE) / UDP()))
    wire.refuses = PermissionError(13, "a broadcast address")
    wire.put(packet)
    wire.punt.receive(0)
    wire.refuses = None
    wire.put(*[packet] * 40)
    wire.punt.receive(0)
    assert (len(wire.told), wire.punt.counts["told"], wire.punt.counts["untold"]) == (19, 19, 22)


UNHEEDED = {
    "MLD": frame(FRAGMENT_IN, bytes.fromhex("6000000000240001") + bytes(68), ethertype=0x86DD),
    "ARP": frame(REFUSED, bytes(28), ethertype=0x0806),
    "multicast": frame(FRAGMENT_IN, later(), local=0x33),
    "unknown reason": frame(4, later()),
    "first fragment": frame(FRAGMENT_IN, bytes(IP(src=HOST, dst=REMOTE, flags="MF") / UDP() / bytes(16))),
    "error about an error": frame(REFUSED, bytes(IP(src=HOST, dst=REMOTE) / ICMP(type=3) / later())),
    "cut short": frame(FRAGMENT_IN, later()[:-1]),
    "no packet": frame(FRAGMENT_IN, b""),
    "no frame": b"\2",
}


@pytest.mark.parametrize("strange", UNHEEDED.values(), ids=UNHEEDED)
def test_what_is_not_for_us_is_left_alone(wire: Wire, strange: bytes) -> None:
    wire.put(strange)
    wire.punt.receive(0)
    assert wire.punt.tick(0) is None
    assert not any(wire.punt.counts.values())
    assert wire.told == wire.returned() == []


@pytest.mark.parametrize("seed", range(3))
def test_no_frame_makes_it_raise(wire: Wire, seed: int) -> None:
    chance, now = random.Random(seed), 0.0
    whole = [*UNHEEDED.values(), *(frame(reason, later(text=bytes(40))) for reason in range(5))]
    whole += [frame(reason, bytes(IP(src=HOST, dst=REMOTE) / UDP() / bytes(40))) for reason in range(5)]
    wire.firsts.add(key_of())
    for _ in range(5000):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(5)):
            data[chance.randrange(min(len(data), 54))] = chance.randrange(256)
        data = data[: chance.randrange(1, len(data) + 1)] if chance.random() < 0.3 else data
        now += 0.01
        wire.put(bytes(data))
        wire.punt.receive(now)
        wire.punt.tick(now)
        wire.returned()
    assert wire.punt.counts["released"]
    assert wire.told


# --- what the kernel knows -------------------------------------------------------------------------

ADDR = [("word", "u4", (1,))]
FRAGMENT_KEY = np.dtype([("src", ADDR), ("dst", ADDR), ("id", "u4"), ("proto", "u4")])
FRAGMENT = np.dtype([("new_addr", ADDR, (2,)), ("seen_at", "u4")])


class Fragments:
    """The map, with its layout."""

    key = FRAGMENT_KEY

    def __init__(self, seen_at: dict[bytes, int]) -> None:
        self._seen_at = seen_at

    def get(self, key: Any) -> Any:
        at = self._seen_at.get(np.asarray(key, self.key).tobytes())
        if at is None:
            return None
        value = np.zeros(1, FRAGMENT)
        value["seen_at"] = at
        return value[0]


@pytest.mark.parametrize(
    ("now", "seen_at", "is_known"),
    [
        pytest.param(1000, 1000, True, id="just now"),
        pytest.param(1000, 900, True, id="at the limit"),
        pytest.param(1000, 899, False, id="too old"),
        pytest.param(1000, 1001, True, id="since the clock was read"),
        pytest.param(5, 2**32 - 90, True, id="before the clock began anew"),
        pytest.param(50, 2**32 - 90, False, id="long before it"),
    ],
)
def test_only_a_fresh_first_counts(monkeypatch: pytest.MonkeyPatch, now: int, seen_at: int, is_known: bool) -> None:
    # as the C has it: addresses and id as on the wire, the id widened by zeros
    wire_id = int(np.frombuffer(struct.pack("!H", 0x1234), np.uint16)[0])
    raw = socket.inet_aton(HOST) + socket.inet_aton(REMOTE) + struct.pack("=II", wire_id, 17)
    tables = type("", (), {"maps": {"fragments": Fragments({raw: seen_at})}, "settings": {"fragment": 100}})
    monkeypatch.setattr(punt.bpf, "jiffies", lambda: now)
    keys = [key_of(0x1234), key_of(0x1235)]
    assert punt.known_firsts(tables(), keys) == keys[:is_known]  # type: ignore[arg-type]


def test_what_is_too_big_goes_back_in_pieces(wire: Wire) -> None:
    wire.put(frame(TOO_BIG, bytes(IP(src=HOST, dst=REMOTE, id=9) / UDP() / bytes(2000)), about=1300))
    wire.punt.receive(0)
    whole = [
        frame(FRAGMENT_OUT, bytes(each), link=bytes(14))
        for each in fragment(IP(src=HOST, dst=REMOTE, id=9) / UDP() / bytes(2000), 1280)
    ]
    assert wire.returned() == whole
    assert wire.told == []


def test_of_what_is_too_big_and_not_to_be_cut_the_sender_is_told(wire: Wire) -> None:
    packet = bytes(IP(src=HOST, dst=REMOTE, flags="DF") / UDP() / bytes(2000))
    wire.put(frame(TOO_BIG, packet, about=1300))
    wire.punt.receive(0)
    ((text, to),) = wire.told
    assert (to, wire.returned()) == (HOST, [])
    assert struct.unpack_from("!BBxxHH", text) == (3, 4, 0, 1300)
    assert text[8:] == packet[:548]


def test_packets_of_algs_are_read_and_go_back(wire: Wire) -> None:
    """Each with the direction that it is to go on in; none where the reader says so."""
    packet = bytes(IP(src=HOST, dst=REMOTE) / UDP() / b"text")
    read: list[tuple[int, int, bytes]] = []

    def reader(direction: int, mapping: int, text: bytes) -> list[tuple[int, bytes]]:
        read.append((direction, mapping, text))
        return [(direction, b"edited"), (1 - direction, b"answer")] if len(read) == 1 else []

    reading = Wire(algs=reader)
    reading.put(frame(ALG_IN, packet, about=4711), frame(ALG_OUT, packet, about=4712))
    reading.punt.receive(0)
    assert read == [(1, 4711, packet), (0, 4712, packet)]
    assert reading.returned() == [
        frame(ALG_IN, b"edited", link=bytes(14)),
        frame(ALG_OUT, b"answer", link=bytes(14)),
    ]
    reading.punt.close()


def test_an_answer_goes_the_way_of_its_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the session's latest packet to that remote; not as one to another."""
    monkeypatch.setattr(punt, "WAYS", 2)
    reading = Wire(algs=lambda direction, *_: [(0, b"answer")] if direction else [])
    ways = [bytes([number]) * 12 + b"\x08\x00" for number in range(4)]
    remotes = [REMOTE, REMOTE, "198.51.100.77", "198.51.100.78"]

    def answers(remote: str) -> bytes:
        reading.put(frame(ALG_IN, bytes(IP(src=remote, dst=HOST) / UDP()), about=4711))
        reading.punt.receive(0)
        (answer,) = reading.returned()
        return answer[14:28]

    for number in range(3):
        reading.put(frame(ALG_OUT, bytes(IP(src=HOST, dst=remotes[number]) / UDP()), about=4711, link=ways[number]))
        reading.punt.receive(0)
    assert [answers(remote) for remote in remotes] == [ways[1], ways[1], ways[2], bytes(14)]
    reading.put(frame(ALG_OUT, bytes(IP(src=HOST, dst=remotes[3]) / UDP()), about=4711, link=ways[3]))
    reading.punt.receive(0)
    assert [answers(remote) for remote in remotes] == [bytes(14), bytes(14), ways[2], ways[3]]
    reading.punt.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (2, 1, 0)], ids=str)
@pytest.mark.parametrize(("reason", "later"), [(ALG_IN, FRAGMENT_IN), (ALG_OUT, FRAGMENT_OUT)], ids=["in", "out"])
def test_pieces_of_an_algs_datagram_are_read_together(reason: int, later: int, order: tuple[int, ...]) -> None:
    """In whatever order they come; what becomes of them goes back in pieces, the first one first."""
    read: list[bytes] = []

    def reader(direction: int, mapping: int, text: bytes) -> list[tuple[int, bytes]]:
        read.append(text)
        assert (direction, mapping) == (int(reason == ALG_IN), 4711)
        return [(direction, bytes(edited))]

    whole = IP(src=HOST, dst=REMOTE, id=9) / UDP() / bytes(3000)
    edited = IP(src=HOST, dst=REMOTE, id=9) / UDP() / bytes(3100)
    pieces = [bytes(each) for each in fragment(whole, 1480)]
    frames = [frame(reason, pieces[0], about=4711), *(frame(later, each) for each in pieces[1:])]
    link = bytes(14) if reason == ALG_IN else LINK
    reading = Wire(algs=reader)
    for number in order:
        assert reading.returned() == []
        reading.put(frames[number])
        reading.punt.receive(0)
    assert read == [bytes(whole)]
    first, *rest = [bytes(each) for each in fragment(edited, 1480)]
    assert reading.returned() == [
        frame(reason, first, link=link),
        *(frame(later, each, link=link) for each in rest),
    ]
    assert reading.punt.held == 0
    reading.punt.close()


def test_of_an_algs_datagram_a_piece_is_missing() -> None:
    """It waits as fragments do, and goes as they do; nothing is read."""
    reading = Wire(algs=lambda *_: pytest.fail("read"))
    first, *_, last = [bytes(each) for each in fragment(IP(src=HOST, dst=REMOTE) / UDP() / bytes(3000), 1480)]
    reading.put(frame(ALG_OUT, first), frame(FRAGMENT_OUT, last))
    reading.punt.receive(0)
    reading.punt.tick(0)
    reading.punt.tick(30)
    assert (reading.returned(), reading.punt.counts["expired"]) == ([], 2)
    reading.punt.close()


def pieces_of(text: bytes, reason: int = ALG_OUT, later_: int = FRAGMENT_OUT, size: int = 1480) -> list[bytes]:
    first, *rest = [bytes(each) for each in fragment(IP(src=HOST, dst=REMOTE, id=1) / UDP() / text, size)]
    return [frame(reason, first, about=4711), *(frame(later_, each) for each in rest)]


def test_a_first_of_the_same_identification_before_is_not_an_algs_datagrams() -> None:
    """The kernel knows it, but what is held here waits for the rest of its own."""
    read: list[bytes] = []
    reading = Wire(algs=lambda direction, _, packet: read.append(packet) or [(direction, packet)])  # type: ignore[func-returns-value]
    reading.firsts.add(key_of())
    *some, last = pieces_of(bytes(4000))
    reading.put(*some)
    reading.punt.receive(0)
    assert reading.punt.tick(0) is not None
    assert (reading.returned(), reading.punt.held) == ([], len(some))
    reading.put(last)
    reading.punt.receive(0.01)
    assert [len(each) for each in read] == [20 + 8 + 4000]
    assert len(reading.returned()) == len(some) + 1
    reading.punt.close()


def test_a_datagram_is_joined_once_however_many_pieces_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last first, the rest in their order, each of them twice."""
    joined: list[int] = []
    join = punt.ipv4.joined
    monkeypatch.setattr(punt.ipv4, "joined", lambda pieces: joined.append(len(pieces)) or join(pieces))
    read: list[bytes] = []
    reading = Wire(algs=lambda direction, _, packet: read.append(packet) or [])  # type: ignore[func-returns-value]
    *some, last = pieces_of(bytes(900), size=8)
    for each in (last, *[twice for one in some for twice in (one, one)][:-1]):
        reading.put(each)
        reading.punt.receive(0)
    assert joined == [2 * len(some)]
    assert [len(each) for each in read] == [20 + 8 + 900]
    assert reading.punt.held == 0
    reading.punt.close()


def test_of_an_algs_datagram_some_pieces_contradict_others() -> None:
    reading = Wire(algs=lambda *_: pytest.fail("read"))
    first, second, third = pieces_of(bytes(4000))
    reading.put(first, second, second[:-1] + b"x", third)
    reading.punt.receive(0)
    assert (reading.returned(), reading.punt.held) == ([], 0)
    assert reading.punt.counts["refused"] == 4
    assert reading.punt.counts["released"] == 0
    reading.punt.close()


def test_a_reader_that_fails_stops_nothing() -> None:
    def reader(*_: object) -> list[tuple[int, bytes]]:
        raise RuntimeError("a mistake")

    reading = Wire(algs=reader)
    packet = bytes(IP(src=HOST, dst=REMOTE) / UDP() / b"text")
    reading.put(frame(ALG_OUT, packet))
    reading.punt.receive(0)
    assert reading.returned() == [frame(ALG_OUT, packet)]
    reading.punt.close()


def test_the_reasons_are_those_of_the_c() -> None:
    types = (Path(__file__).parents[2] / "bpf" / "types.h").read_text()
    names = types.partition("enum punt_reason {")[2].partition("}")[0]
    listed = [line.split(",")[0].strip() for line in names.splitlines() if "PUNT_" in line]
    assert listed == [
        *(
            f"PUNT_{each}"
            for each in ("FRAGMENT_IN", "FRAGMENT_OUT", "REFUSED", "TTL", "TOO_BIG", "ALG_IN", "ALG_OUT", "REASONS")
        )
    ]
    assert tuple(range(7)) == (FRAGMENT_IN, FRAGMENT_OUT, REFUSED, TTL, TOO_BIG, ALG_IN, ALG_OUT)


def test_without_the_device_it_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tun, "DEVICE", str(tmp_path / "tun"))
    with pytest.raises(HostError, match=r"cannot create a TAP: .*/tun: No such file or directory; modprobe tun"):
        Punt.open(Tables({}), 30, "prohibited", lambda direction, _, packet: [(direction, packet)])


@pytest.mark.parametrize("pattern", ["masq*", "masq-punt0", "*"])
def test_a_punt_port_fits_no_pattern(pattern: str) -> None:
    values = {"mac": bytes(6), "mtu": 1500, "up": True, "carrier": True, "driver": "", "ethernet": True}
    others: dict[str, Any] = {**values, "xdp_prog_id": 0, "xdp_mode": None}
    ours = netdev.Link(index=2, name="masq-punt0", kind="tun", **others)
    assert netdev.match_links([pattern], [ours]) == []
    same_name = netdev.Link(index=2, name="masq-punt0", kind="veth", **others)
    assert netdev.match_links([pattern], [same_name]) == [same_name]
