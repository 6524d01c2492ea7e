"""From raw session records to rows. The records' layout is read from the C, so that it stays the only one."""

import json
import re
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xdpmasq import listing, sessions
from xdpmasq.errors import UsageError
from xdpmasq.selection import Endpoint, Selection
from xdpmasq.sessions import Table

HZ = 250
NOW = 1_000_000
TYPES = (Path(__file__).parents[2] / "bpf" / "types.h").read_text()
SCALARS = {"u8": "u1", "u16": "u2", "__be16": "u2", "u32": "u4", "__be32": "u4", "u64": "u8"}
LENGTHS = {"EXTERNALS": 1, "WANS": 1, "EXTERNAL_ROOM": 64, "CLASS_ROOM": 4, "2 * CLASS_ROOM": 8, "SEEDS": 6}
FIN, SYN, RST, ACK = 1, 2, 4, 16
TCP, UDP, ICMP = range(3)
LIVE, RESTING, SESSION, STATIC, FURTHER = 1, 2, 4, 8, 1 << 8


def layout(struct: str) -> np.dtype[Any]:
    """The numpy dtype of a struct of bpf/types.h (which leaves no implicit padding)."""
    body = re.search(rf"struct {struct} {{.*?\n(.*?)\n}};", TYPES, re.DOTALL)
    assert body
    found: list[Any] = []
    for kind, declared in re.findall(r"^\t((?:struct )?\w+) ([^;]+);", body[1], re.MULTILINE):
        for name, length in re.findall(r"(\w+)(?:\[([\w* ]+)\])?", declared):
            shape = (LENGTHS.get(length) or int(length),) if length else ()
            found.append((name, field_type(kind), shape))
    return np.dtype(found)


def field_type(kind: str) -> Any:
    if kind == "addr_t":
        return np.dtype([("word", "u4", (1,))])
    return layout(kind.removeprefix("struct ")) if kind.startswith("struct") else np.dtype(SCALARS[kind])


def table_of(slots: int = 3 * 65536 + 1024) -> Any:
    assert layout("session").itemsize == 128
    return np.zeros(slots, layout("session"))


def settings(**changed: Any) -> Any:
    values = np.zeros(1, layout("settings"))
    values["tcp_established"], values["tcp_transitory"] = 7440 * HZ, 240 * HZ
    values["udp"], values["icmp"], values["inbound_refresh"] = 300 * HZ, 60 * HZ, 1
    for name, value in changed.items():
        values[name] = value
    return values[0]


def word(address: str) -> int:
    return int(np.frombuffer(IPv4Address(address).packed, np.uint32)[0])


def net(port: int) -> int:
    return int(np.frombuffer(port.to_bytes(2, "big"), np.uint16)[0])


def put(
    array: Any,
    slot: int,
    *,
    mapping: int | None = None,
    internal: str = "192.168.0.2:5000",
    remote: str = "198.51.100.10:443",
    life: int = LIVE | SESSION,
    seen: tuple[int, int] = (SYN | ACK, SYN | ACK),
    idle: tuple[float, float] = (0, 0),
    packets: tuple[int, int] = (3, 2),
    now: int = NOW,
    opened_at: int = 17,
) -> None:
    """A session as the slow path writes it; ``idle`` in seconds."""
    mapping = slot if mapping is None else mapping
    row = array[slot]
    inside, inside_port = internal.split(":")
    far, far_port = remote.split(":")
    for side, flow in enumerate((row["out"], row["in"])):
        flow["remote_addr"]["word"] = word(far)
        flow["remote_port"] = net(int(far_port))
        flow["tcp_seen"] = seen[side]
        flow["last_seen"] = (now - int(idle[side] * HZ)) % 2**32
    for traffic, count in zip((row["sent"], row["received"]), packets, strict=True):
        traffic["packets"], traffic["bytes"] = count, count * 100
    row["out"]["new_addr"]["word"], row["out"]["new_port"] = word("203.0.113.1"), net(mapping % 65536)
    row["in"]["new_addr"]["word"], row["in"]["new_port"] = word(inside), net(int(inside_port))
    row["life"], row["mapping"], row["opened_at"] = life, mapping, opened_at


def read(array: Any, now: int = NOW, **changed: Any) -> Table:
    return sessions.read(array, settings(**changed), now, HZ)


def text_of(table: Table) -> list[str]:
    return [line for block in listing.lines(table) for line in block]


def objects_of(table: Table) -> list[dict[str, Any]]:
    return [json.loads(line) for block in listing.json_objects(table) for line in block]


def only(array: Any, **options: Any) -> dict[str, Any]:
    (found,) = objects_of(read(array, **options))
    return found


@pytest.mark.parametrize(
    ("out", "in_", "state", "left"),
    [
        pytest.param(SYN, 0, "SYN_SENT", 240, id="SYN"),
        pytest.param(SYN, SYN | ACK, "SYN_RECV", 240, id="SYN answered"),
        pytest.param(SYN | ACK, SYN | ACK, "ESTABLISHED", 7440, id="both acknowledged"),
        pytest.param(SYN | ACK | FIN, SYN | ACK, "FIN_WAIT", 7440, id="internal side closed"),
        pytest.param(SYN | ACK, SYN | ACK | FIN, "CLOSE_WAIT", 7440, id="remote closed"),
        pytest.param(SYN | ACK | FIN, SYN | ACK | FIN, "TIME_WAIT", 240, id="both closed"),
        pytest.param(SYN | ACK, SYN | ACK | RST, "CLOSE", 240, id="reset by the remote"),
        pytest.param(SYN | RST, 0, "CLOSE", 240, id="reset by the internal side"),
        pytest.param(SYN | FIN, SYN | ACK, "FIN_WAIT", 240, id="closed while opening"),
    ],
)
def test_tcp_states_and_their_timers(out: int, in_: int, state: str, left: float) -> None:
    array = table_of(70000)
    put(array, 40000, seen=(out, in_), idle=(1, 1))
    found = only(array)
    assert (found["protocol"], found["state"], found["remaining_s"]) == ("tcp", state, left - 1)


@pytest.mark.parametrize(
    ("class_", "replies", "state", "left"),
    [
        pytest.param(UDP, 0, "UNREPLIED", 300, id="UDP asked"),
        pytest.param(UDP, 1, "REPLIED", 300, id="UDP answered"),
        pytest.param(ICMP, 0, "UNREPLIED", 60, id="ICMP asked"),
        pytest.param(ICMP, 7, "REPLIED", 60, id="ICMP answered"),
    ],
)
def test_other_states_and_their_timers(class_: int, replies: int, state: str, left: float) -> None:
    array = table_of()
    put(array, class_ * 65536 + 9, packets=(1, replies), seen=(RST, RST))
    found = only(array)
    assert (found["protocol"], found["state"], found["remaining_s"]) == (sessions.PROTOCOLS[class_], state, left)


@pytest.mark.parametrize(
    ("life", "listed"),
    [
        pytest.param(0, False, id="free"),
        pytest.param(LIVE | SESSION, True, id="in use"),
        pytest.param(LIVE | SESSION | 3 * FURTHER | 5 << 32, True, id="with further sessions, reopened"),
        pytest.param(LIVE | 2 * FURTHER, False, id="mapping alive by further sessions only"),
        pytest.param(RESTING, False, id="resting"),
        pytest.param(RESTING | SESSION, False, id="closing"),
        pytest.param(3 | SESSION, False, id="no state at all"),
    ],
)
def test_only_sessions_in_use(life: int, listed: bool) -> None:
    array = table_of(70000)
    put(array, 1024, life=life)
    assert len(read(array)) == listed


@pytest.mark.parametrize(
    ("idle", "now", "refresh", "wanted"),
    [
        pytest.param((0, 0), NOW, 1, (0, 300), id="just now"),
        pytest.param((10, 40), NOW, 1, (10, 290), id="outbound last"),
        pytest.param((40, 10), NOW, 1, (10, 290), id="inbound last"),
        pytest.param((40, 10), NOW, 0, (10, 260), id="inbound does not count"),
        pytest.param((300, 300), NOW, 1, (300, 0), id="to the last moment"),
        pytest.param((300.1, 300.1), NOW, 1, None, id="expired"),
        pytest.param((400, 10), NOW, 1, (10, 290), id="kept by the inbound side"),
        pytest.param((400, 10), NOW, 0, None, id="not kept by the inbound side"),
        pytest.param((-0.004, 5), NOW, 1, (0, 300), id="seen by a CPU that is ahead"),
        pytest.param((10, 40), 1000, 1, (10, 290), id="jiffies have wrapped"),
        pytest.param((10, 40), 2**32 + 1000, 1, (10, 290), id="64-bit jiffies"),
    ],
)
def test_idle_and_remaining_time(
    idle: tuple[float, float], now: int, refresh: int, wanted: tuple[float, float] | None
) -> None:
    array = table_of()
    put(array, 65536 + 2000, idle=idle, now=now % 2**32)
    found = objects_of(read(array, now, inbound_refresh=refresh))
    assert [(each["idle_s"], each["remaining_s"]) for each in found] == ([wanted] if wanted else [])


@pytest.fixture
def few() -> Table:
    """Five sessions: two of one mapping, UDP, ICMP, and one of another host."""
    array = table_of()
    put(array, 40001, internal="192.168.0.2:5000", remote="198.51.100.10:443", idle=(2, 1.5))
    put(array, 3 * 65536 + 7, mapping=40001, internal="192.168.0.2:5000", remote="198.51.100.11:80", seen=(SYN, 0))
    put(array, 65536 + 50000, internal="192.168.0.3:5353", remote="9.9.9.9:53", packets=(1, 0))
    put(array, 2 * 65536 + 60000, internal="192.168.0.2:77", remote="198.51.100.10:0")
    put(array, 40002, internal="10.9.0.4:6000", remote="198.51.100.10:22", packets=(2**40, 5))
    return read(array).ordered()


def test_text(few: Table) -> None:
    heading = "PROTO STATE       INTERNAL              EXTERNAL              REMOTE               "
    assert listing.heading(few).startswith(heading)
    assert [" ".join(line.split()) for line in text_of(few)] == [
        "tcp ESTABLISHED 10.9.0.4:6000 203.0.113.1:40002 198.51.100.10:22 1099511627776 109951162777600 5 500 0 7440",
        "tcp ESTABLISHED 192.168.0.2:5000 203.0.113.1:40001 198.51.100.10:443 3 300 2 200 1 7438",
        "tcp SYN_SENT 192.168.0.2:5000 203.0.113.1:40001 198.51.100.11:80 3 300 2 200 0 240",
        "udp UNREPLIED 192.168.0.3:5353 203.0.113.1:50000 9.9.9.9:53 1 100 0 0 0 300",
        "icmp REPLIED 192.168.0.2:77 203.0.113.1:60000 198.51.100.10 3 300 2 200 0 60",
    ]


def test_text_is_of_fixed_width() -> None:
    array = table_of()
    for slot, internal in ((1024, "1.1.1.1:1"), (65535, "255.255.255.255:65535")):
        put(array, slot, internal=internal, remote=internal, packets=(10**7, 10**9))
    table = read(array)
    assert {len(line) for line in text_of(table)} == {len(listing.heading(table))}


def test_json(few: Table) -> None:
    assert objects_of(few)[1] == {
        "protocol": "tcp",
        "state": "ESTABLISHED",
        "internal": {"address": "192.168.0.2", "port": 5000},
        "external": {"address": "203.0.113.1", "port": 40001},
        "remote": {"address": "198.51.100.10", "port": 443},
        "out": {"packets": 3, "bytes": 300},
        "in": {"packets": 2, "bytes": 200},
        "idle_s": 1.5,
        "remaining_s": 7438.5,
    }
    assert objects_of(few)[4]["remote"] == {"address": "198.51.100.10", "port": None}


def test_counts(few: Table) -> None:
    assert few.counts() == {"tcp": 3, "udp": 1, "icmp": 1}


def test_nothing_at_all() -> None:
    table = read(table_of(70000)).ordered()
    assert (len(table), text_of(table), objects_of(table)) == (0, [], [])
    assert table.counts() == {"tcp": 0, "udp": 0, "icmp": 0}
    assert len(Selection.parse(internal="192.168.0.0/24")(table)) == 0


# rows of `few`, in order: other host, established, SYN, UDP, ICMP
@pytest.mark.parametrize(
    ("words", "rows"),
    [
        pytest.param({}, [0, 1, 2, 3, 4], id="everything"),
        pytest.param({"protocol": "tcp"}, [0, 1, 2], id="protocol"),
        pytest.param({"protocol": "ICMP"}, [4], id="protocol, in capitals"),
        pytest.param({"state": "established"}, [0, 1], id="state"),
        pytest.param({"state": "syn-sent"}, [2], id="state with a hyphen"),
        pytest.param({"internal": "192.168.0.2"}, [1, 2, 4], id="host"),
        pytest.param({"internal": "192.168.0.0/24"}, [1, 2, 3, 4], id="prefix"),
        pytest.param({"internal": "192.168.0.2:5000"}, [1, 2], id="endpoint"),
        pytest.param({"internal": "192.168.0.0/24:5353"}, [3], id="prefix and port"),
        pytest.param({"internal": ":6000"}, [0], id="port only"),
        pytest.param({"internal": "0.0.0.0/0"}, [0, 1, 2, 3, 4], id="any address"),
        pytest.param({"external": ":40001"}, [1, 2], id="external port"),
        pytest.param({"external": "203.0.113.2"}, [], id="not our address"),
        pytest.param({"remote": "198.51.100.0/31"}, [], id="prefix beside"),
        pytest.param({"remote": "198.51.100.10/31"}, [0, 1, 2, 4], id="odd prefix length"),
        pytest.param({"remote": "198.51.100.10:22", "protocol": "tcp"}, [0], id="two conditions"),
        pytest.param({"remote": "9.9.9.9", "protocol": "tcp"}, [], id="contradiction"),
        pytest.param({"remote": "2001:db8::/32"}, None, id="IPv6 without brackets"),
        pytest.param({"remote": "[2001:db8::/32]:53"}, [], id="IPv6 in an IPv4 table"),
        pytest.param({"remote": "198.51.100.1/24"}, None, id="host bits"),
        pytest.param({"remote": "example.org"}, None, id="name"),
        pytest.param({"remote": ":65536"}, None, id="no port"),
        pytest.param({"remote": "1.2.3.4:x"}, None, id="port of letters"),
        pytest.param({"protocol": "sctp"}, None, id="no protocol of ours"),
        pytest.param({"state": "OPEN"}, None, id="no state"),
    ],
)
def test_selection(few: Table, words: dict[str, str], rows: list[int] | None) -> None:
    if rows is None:
        with pytest.raises(UsageError, match=re.escape(next(iter(words.values())))):
            Selection.parse(**words)
    else:
        chosen = Selection.parse(**words)(few)
        assert chosen.slot.tolist() == few.slot[rows].tolist()


def test_empty_selection_is_everything() -> None:
    assert Selection.parse().is_everything
    assert Endpoint.parse("") == Endpoint()
    assert not Selection.parse(remote=":0").is_everything


def test_a_reading_does_not_change_with_the_table() -> None:
    array = table_of(70000)
    put(array, 2000)
    table = read(array)
    array[:] = np.zeros((), array.dtype)
    assert objects_of(table)[0]["internal"] == {"address": "192.168.0.2", "port": 5000}


def test_port_use() -> None:
    array = table_of()
    for slot, life in ((1024, LIVE | SESSION), (1025, LIVE | FURTHER), (1026, RESTING), (65536 + 1, LIVE | SESSION)):
        array["life"][slot] = life
    array["life"][[80, 81]] = LIVE | STATIC, LIVE | STATIC | SESSION
    array["life"][3 * 65536 + 5] = LIVE | SESSION  # a further session uses no port of its own
    pools = np.zeros(8, layout("pool"))
    pools["count"][:3] = [[31744, 4536], [31744, 4536], [64512, 0]]
    assert sessions.port_use(array, settings(pool=pools, externals=1)) == {
        "tcp": {"used": 2, "resting": 1, "forwarded": 2, "available": 36280},
        "udp": {"used": 1, "resting": 0, "forwarded": 0, "available": 36280},
        "icmp": {"used": 0, "resting": 0, "forwarded": 0, "available": 64512},
    }


def test_ipv6_layout() -> None:
    """The same code reads the records of an IPv6 instance."""
    words = np.frombuffer(bytes.fromhex("20010db8" + "00" * 11 + "07"), np.uint32).reshape(1, 4)
    endpoints = sessions.Endpoints(words, np.array([443], np.uint16))
    empty = read(table_of(70000))
    one = {name: np.zeros(1, getattr(empty, name).dtype) for name in vars(empty)  # every other column
           if not isinstance(getattr(empty, name), sessions.Endpoints)}  # fmt: skip
    table = Table(**one, internal=endpoints, external=endpoints, remote=endpoints).ordered()
    assert text_of(table)[0].split()[2:5] == ["[2001:db8::7]:443"] * 3
    assert objects_of(table)[0]["remote"] == {"address": "2001:db8::7", "port": 443}
    assert len(Selection.parse(remote="[2001:db8::/32]:443")(table)) == 1
    assert len(Selection.parse(remote="[2001:db9::/32]")(table)) == 0


def test_many() -> None:
    """More rows than are formatted at a time: every one is there once, in order, with its own values."""
    count = 70_000
    array = table_of(3 * 65536 + 262144)
    slots = np.random.default_rng(7).choice(len(array), count, replace=False)
    put(array, 0)
    array[slots] = array[0]
    if 0 not in slots:
        array["life"][0] = 0
    array["mapping"][slots] = slots % (3 * 65536)
    number = np.arange(count, dtype=np.uint32)
    array["in"]["new_addr"]["word"][slots, 0] = (0x0A000000 + number // 1000).astype(">u4").view(np.uint32)
    array["in"]["new_port"][slots] = (number % 1000 + 1024).astype(">u2").view(np.uint16)
    array["sent"]["packets"][slots] = number + 1
    table = read(array).ordered()

    wanted = {
        (f"10.0.{n // 1000 >> 8}.{n // 1000 & 255}:{n % 1000 + 1024}", str(n + 1), sessions.PROTOCOLS[s // 65536 % 3])
        for n, s in zip(number.tolist(), slots.tolist(), strict=True)
    }
    rows = [line.split() for line in text_of(table)]
    shown = [(row[2], row[5], row[0]) for row in rows]
    assert len(shown) == count
    assert set(shown) == wanted

    # an ICMP remote shows no port, which is not what this test is about
    found = [(f"{o['internal']['address']}:{o['internal']['port']}", str(o["out"]["packets"]), o["protocol"])
             for o in objects_of(table)]  # fmt: skip
    assert found == shown
    keys = [(sessions.PROTOCOLS.index(each[2]), IPv4Address(each[0].split(":")[0]), each[0]) for each in shown]
    assert [key[:2] for key in keys] == sorted(key[:2] for key in keys)
