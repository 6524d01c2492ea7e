"""Forwards and settings as they stand in the kernel's tables, the command line that puts them there, its refusals.

The standard lab with two LANs: ``a-box .2, b-box .3, c-box .4 ─ lan0 masq-gate wan0 ─ internet``.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from netkit import GATE, Gateway, answers, internal, soon, who

from xdpmasq import abi, bpf, expiry, forwarding, forwardrecords, forwards
from xdpmasq.abi import CLASS_ROOM, CLASSES, LIFE_LIVE, LIFE_STATE, LIFE_STATIC, PORTS
from xdpmasq.datapath import Attached
from xdpmasq.errors import ForwardError
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import INTERNET, PUBLIC
from xdpmasq.settings import ports_for_one
from xdpmasq.upkeep import Upkeep

pytestmark = pytest.mark.xdist_group("forwards")
STRANGER = "198.51.100.7"


@pytest.fixture(scope="module")
def _shared() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", lans=2) as gateway:
        EchoServer(gateway.lab)
        yield gateway


@pytest.fixture
def gateway(_shared: Gateway) -> Iterator[Gateway]:
    """Without forwards, before and after."""
    yield _shared
    tables = _shared.tables
    for placed in forwarding.read(tables):
        forwarding.take(tables, tables.reaper, placed)
    # the agent may be publishing what has just been withdrawn: its next tick takes it back
    soon(lambda: contents(tables) == {"rules": 0, "entries": 0, "mappings": 0}, "no forward is left", timeout_s=5)


def listed(gateway: Gateway) -> list[dict[str, Any]]:
    return list(json.loads(gateway.masq("forward", "list", "--json").stdout))


def add(gateway: Gateway, *words: str) -> str:
    return gateway.masq("forward", "add", *words).stdout


def refuse(gateway: Gateway, *words: str, code: int = 1) -> str:
    """The words of a refusal; by the way checks that no table has changed."""
    before = contents(gateway.tables)
    done = gateway.masq("forward", *words, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert "→" in done.stderr  # what to do
    assert contents(gateway.tables) == before
    return done.stderr


def contents(tables: Attached) -> dict[str, int]:
    """How many rules, entries for ports, and internal endpoints that use forwarded ports."""
    _, rules = next(tables.maps["forward_rules"].items(chunk=1024))
    entries = sum(len(keys) for keys, _ in tables.maps["forwards"].items(chunk=tables.maps["forwards"].max_entries))
    slots = np.concatenate([values for _, values in tables.maps["mappings"].items()])
    return {
        "rules": int((rules["targets"] != 0).sum()),
        "entries": entries,
        "mappings": int((tables.sessions["life"][slots] & LIFE_STATE != LIFE_LIVE).sum()),
    }


def target_of(tables: Attached, protocol: str, port: int, remote: str = STRANGER) -> str:
    """Where the programs find that a new session leads, of its first target; "" where nowhere."""
    key = (64, 0, CLASSES.index(protocol), socket.htons(port), abi.addr(IPv4Address(remote)))
    index = tables.maps["forwards"].get(key)
    if index is None:
        return ""
    rule = tables.maps["forward_rules"].get(int(index))
    target = rule["target"][0]
    shifted = int(target["port"]) + port - int(rule["first"])
    return f"{IPv4Address(target['addr']['word'].tobytes())}:{shifted}"


def slot_of(protocol: str, port: int) -> int:
    return CLASSES.index(protocol) * PORTS + port


def mapping_of(tables: Attached, protocol: str, address: str, port: int) -> int | None:
    found = tables.maps["mappings"].get(
        (abi.addr(IPv4Address(address)), socket.htons(port), CLASSES.index(protocol), 0)
    )
    return None if found is None else int(found)


# --- adding, listing, deleting ---------------------------------------------------------------------


def test_one_port(gateway: Gateway) -> None:
    assert add(gateway, "tcp", "8080", "192.168.0.2:80") == "forwarded: tcp 8080 → 192.168.0.2:80\n"
    tables = gateway.tables
    assert target_of(tables, "tcp", 8080) == "192.168.0.2:80"
    assert target_of(tables, "tcp", 8081) == target_of(tables, "tcp", 8079) == target_of(tables, "udp", 8080) == ""
    assert listed(gateway) == [
        {
            "protocol": "tcp",
            "ports": {"first": 8080, "last": 8080},
            "default": False,
            "targets": [{"address": "192.168.0.2", "port": 80, "weight": 1}],
            "to": ["192.168.0.2:80"],
            "from": None,
            "by": "user",
            "opened": 0,
            "running": 0,
            "left_s": None,
        }
    ]
    assert gateway.masq("forward", "del", "tcp", "8080").stdout == "no longer forwarded: tcp 8080 → 192.168.0.2:80\n"
    assert target_of(tables, "tcp", 8080) == ""
    assert gateway.masq("forward", "list").stdout == "nothing is forwarded\n"


def test_the_only_target_sends_from_the_forwarded_port(gateway: Gateway) -> None:
    """RFC 4787 REQ-1 for what an inside server sends by itself: its endpoint leads to the slot, and is complete."""
    add(gateway, "udp", "5000-5002", "192.168.0.3:6000")
    tables, slot = gateway.tables, slot_of("udp", 5001)
    assert mapping_of(tables, "udp", "192.168.0.3", 6001) == slot
    session = tables.sessions[slot]
    assert session["in"]["new_addr"] == np.array(
        abi.addr(IPv4Address("192.168.0.3")), session["in"]["new_addr"].dtype
    )
    assert session["in"]["new_port"] == socket.htons(6001)
    assert session["out"]["new_addr"]["word"].tobytes() == IPv4Address(PUBLIC).packed
    assert session["out"]["new_port"] == socket.htons(5001)
    assert session["mapping"] == slot
    gateway.masq("forward", "del", "udp", "5000-5002")
    assert mapping_of(tables, "udp", "192.168.0.3", 6001) is None


def test_several_targets_for_some_remotes(gateway: Gateway) -> None:
    add(gateway, "tcp", "80", "192.168.0.2:80", "192.168.0.3:8000*2", "--from", "198.51.100.0/24")
    add(gateway, "tcp", "80", "192.168.0.4")
    tables = gateway.tables
    assert target_of(tables, "tcp", 80) == "192.168.0.2:80"
    assert target_of(tables, "tcp", 80, INTERNET) == "192.168.0.4:80"
    _, rules = next(tables.maps["forward_rules"].items(chunk=1024))
    assert [each["until"] for each in rules[0]["target"][:2]] == [1, 3]
    assert mapping_of(tables, "tcp", "192.168.0.2", 80) is None
    assert gateway.masq("forward", "list").stdout.splitlines()[1:] == [
        "tcp    80           192.168.0.2:80                  198.51.100.0/24              0         0",
        "                    192.168.0.3:8000*2",
        "tcp    80           192.168.0.4:80                  anywhere                     0         0",
    ]
    gateway.masq("forward", "del", "tcp", "80", "--from", "198.51.100.0/24")
    assert target_of(tables, "tcp", 80) == "192.168.0.4:80"
    assert mapping_of(tables, "tcp", "192.168.0.4", 80) == slot_of("tcp", 80)


def test_the_default_host_gets_what_is_left(gateway: Gateway) -> None:
    add(gateway, "udp", "default", "192.168.0.4")
    add(gateway, "udp", "5000-5010", "192.168.0.3")
    tables = gateway.tables
    assert target_of(tables, "udp", 4999) == "192.168.0.4:4999"
    assert target_of(tables, "udp", 5000) == "192.168.0.3:5000"
    assert target_of(tables, "udp", 65535) == "192.168.0.4:65535"
    assert target_of(tables, "tcp", 5000) == ""
    _, rules = next(tables.maps["forward_rules"].items(chunk=1024))
    assert rules["flags"][:2].tolist() == [forwardrecords.FLAG_DEFAULT, 0]
    gateway.masq("forward", "del", "udp", "default")
    assert target_of(tables, "udp", 4999) == ""


def test_a_wide_range_takes_few_entries(gateway: Gateway) -> None:
    add(gateway, "udp", "1024-65535", "192.168.0.3")
    assert contents(gateway.tables)["entries"] == 6
    assert target_of(gateway.tables, "udp", 40000) == "192.168.0.3:40000"
    assert target_of(gateway.tables, "udp", 1023) == ""


def test_a_mapping_gives_its_port_to_the_forward(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client:
        port = int(who(client).rpartition(":")[2])
        add(gateway, "udp", str(port), "192.168.0.3")
        assert internal("a-box", client) not in gateway.mappings()
        assert answers(client)  # from another port
        assert int(who(client).rpartition(":")[2]) != port


def test_sessions_are_counted_and_ended(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client, gateway.udp("a-box") as other:
        port, near = int(who(client).rpartition(":")[2]), client.getsockname()[1]
        who(other)
        rule = forwards.parse("udp", str(port), [f"192.168.0.2:{near}"])
        tables = gateway.tables
        tables.maps["forward_rules"].set(
            7, forwardrecords.record_of(tables, rule)
        )  # beside its session, as if it came by it
        assert [each["running"] for each in listed(gateway)] == [1]
        done = gateway.masq("forward", "del", "udp", str(port), "--kill")
        assert done.stdout == f"no longer forwarded: {rule}; 1 session ended\n"
        assert internal("a-box", client) not in gateway.mappings()
        assert internal("a-box", other) in gateway.mappings()


def test_with_the_agent_dead(gateway: Gateway) -> None:
    gateway.kill_agent()
    try:
        add(gateway, "tcp", "8080", "192.168.0.2:80")
        assert target_of(gateway.tables, "tcp", 8080) == "192.168.0.2:80"
        assert [row["to"] for row in listed(gateway)] == [["192.168.0.2:80"]]
        gateway.masq("forward", "del", "tcp", "8080")
        assert listed(gateway) == []
    finally:
        gateway.attach(lans=["lan0", "lan1"])


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param("add icmp 1 192.168.0.2", 2, "icmp cannot be forwarded", id="protocol"),
        pytest.param("add tcp 5010-5000 192.168.0.2", 2, "runs backwards", id="reversed"),
        pytest.param("add tcp 80 fd00::2", 2, "is an IPv6 address", id="IPv6"),
        pytest.param("add tcp 80 192.0.2.9", 1, "192.0.2.9 is behind no LAN: the internal", id="LAN"),
        pytest.param(f"add tcp 80 {INTERNET}", 1, f"{INTERNET} is behind no LAN", id="outside"),
        pytest.param("add tcp 80 192.168.0.1", 1, "192.168.0.1 is the gateway's own address", id="own, inside"),
        pytest.param(f"add tcp 80 {PUBLIC}", 1, f"{PUBLIC} is the gateway's own address", id="own, outside"),
        pytest.param("add tcp 80 127.0.0.1", 1, "127.0.0.1 is the gateway's own address", id="loopback"),
        pytest.param("add tcp 80 192.168.0.2 --wan wan9", 1, "not attached to wan9", id="other WAN"),
        pytest.param("del tcp 80", 1, "there is no forward tcp 80: there is none at all", id="not there"),
        pytest.param("del tcp 0", 2, "0 is no port", id="del of no port"),
        pytest.param("--json add tcp 80 192.168.0.2", 2, "options stand before add", id="order"),
    ],
)  # fmt: skip
def test_refused(gateway: Gateway, words: str, code: int, said: str) -> None:
    assert said in refuse(gateway, *words.split(), code=code)


def test_contradictions_and_near_misses(gateway: Gateway) -> None:
    add(gateway, "tcp", "8000-8100", "192.168.0.2")
    told = refuse(gateway, "add", "tcp", "8090-8200", "192.168.0.3")
    assert "tcp 8090-8200 → 192.168.0.3:8090-8200 is not possible" in told
    assert "tcp 8000-8100 → 192.168.0.2:8000-8100 is there already, and has tcp 8090-8100" in told
    assert "is there already" in refuse(gateway, "add", "tcp", "8000-8100", "192.168.0.2")
    assert "near it: tcp 8000-8100" in refuse(gateway, "del", "tcp", "8050")


@pytest.mark.parametrize(
    ("family", "kind", "address"),
    [
        pytest.param(socket.AF_INET, socket.SOCK_STREAM, "0.0.0.0", id="tcp"),
        pytest.param(socket.AF_INET, socket.SOCK_STREAM, PUBLIC, id="tcp at the address"),
        pytest.param(socket.AF_INET6, socket.SOCK_STREAM, "::", id="tcp with IPv6"),
        pytest.param(socket.AF_INET, socket.SOCK_DGRAM, "0.0.0.0", id="udp"),
    ],
)
@pytest.mark.req("attacks-port_shadow")
def test_ports_of_the_gateways_own_services(gateway: Gateway, family: int, kind: int, address: str) -> None:
    with service(gateway, family, kind, address) as port:
        protocol = "tcp" if kind == socket.SOCK_STREAM else "udp"
        told = refuse(gateway, "add", protocol, f"{port}-{port + 5}", "192.168.0.2")
        assert f"{protocol} {port} is a port of the gateway itself" in told
        assert "pytest (process" in told or "python" in told
    add(gateway, protocol, str(port), "192.168.0.2")


@pytest.mark.parametrize("address", ["192.168.0.1", "127.0.0.1"])
def test_services_inside_are_in_nobodys_way(gateway: Gateway, address: str) -> None:
    with service(gateway, socket.AF_INET, socket.SOCK_STREAM, address) as port:
        add(gateway, "tcp", str(port), "192.168.0.2")


@contextlib.contextmanager
def service(gateway: Gateway, family: int, kind: int, address: str) -> Iterator[int]:
    """A listening socket of masq-gate on a port below its ephemeral ones; gives the port."""
    with gateway.lab.socket(GATE, kind, family) as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, 2222))
        if kind == socket.SOCK_STREAM:
            made.listen()
        yield 2222


def test_no_room_for_another_rule(gateway: Gateway) -> None:
    tables = gateway.tables
    filler = forwardrecords.record_of(tables, forwards.parse("tcp", "1", ["192.168.0.2"]))
    for index in range(forwards.RULES_MOST):
        filler["first"] = filler["last"] = index + 1
        tables.maps["forward_rules"].set(index, filler)
    try:
        assert "1024 are in place" in refuse(gateway, "add", "tcp", "5000", "192.168.0.2")
    finally:
        for index in range(forwards.RULES_MOST):
            tables.maps["forward_rules"].set(index, np.zeros((), tables.maps["forward_rules"].value))


@pytest.mark.parametrize("name", ["forwards", "mappings"])
def test_all_or_nothing(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tables = gateway.tables
    written: list[object] = []
    write = tables.maps[name].set

    def full_at_the_third(*words: Any) -> None:
        written.append(words)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "no room")
        write(*words)

    monkeypatch.setattr(tables.maps[name], "set", full_at_the_third)
    with pytest.raises(ForwardError, match="the table of forwarded ports is full"):
        forwarding.put(tables, tables.reaper, forwards.parse("udp", "5001-5006", ["192.168.0.2"]))
    assert len(written) == 3
    assert contents(tables) == {"rules": 0, "entries": 0, "mappings": 0}


# --- the agent's part ------------------------------------------------------------------------------


def test_a_forwarded_port_outlives_its_sessions(gateway: Gateway) -> None:
    add(gateway, "tcp", "99", "192.168.0.2")
    tables, slot = gateway.tables, slot_of("tcp", 99)
    tables.sessions["life"][slot] = LIFE_LIVE | LIFE_STATIC
    time.sleep(2.2)
    assert tables.sessions["life"][slot] == LIFE_LIVE | LIFE_STATIC
    tables.sessions["life"][slot] = LIFE_LIVE  # as after the last session of a forward that is gone
    soon(lambda: int(tables.sessions["life"][slot]) != LIFE_LIVE, "it is closed, although it lies outside the pool")


def test_upkeep_follows_the_rules(gateway: Gateway) -> None:
    tables = gateway.tables
    upkeep = Upkeep(tables)
    add(gateway, "tcp", "90-91", "192.168.0.2")
    upkeep.run()
    assert upkeep.slots().tolist() == [90, 91]
    tables.sessions["life"][91] = LIFE_LIVE | abi.LIFE_SESSION
    gateway.kill_agent()  # it would end what has no true session
    try:
        gateway.masq("forward", "del", "tcp", "90-91")
        upkeep.run()
        assert upkeep.slots().tolist() == [90, 91]  # an agent would end the idle one now, and let it rest
        tables.sessions["life"][90] = 0
        upkeep.run()
        assert upkeep.slots().tolist() == [91]
        assert mapping_of(tables, "tcp", "192.168.0.2", 91) == 91
        tables.sessions["life"][91] = 0
        upkeep.run()
        assert upkeep.slots().tolist() == []
        assert mapping_of(tables, "tcp", "192.168.0.2", 91) is None
    finally:
        gateway.attach(lans=["lan0", "lan1"])


def test_hosts_and_bindings_are_forgotten(gateway: Gateway) -> None:
    tables = gateway.tables
    hosts, bindings = tables.maps["hosts"], tables.maps["bindings"]
    long_ago = (bpf.jiffies() - 400 * tables.hz) % 2**32
    now = bpf.jiffies()
    a, b, c, d = (abi.addr(IPv4Address(f"10.9.8.{number}")) for number in range(4))
    hosts.set(a, (0, [0, 0, 0, 0], 5, 10, long_ago))
    hosts.set(b, (1, [0, 0, 0, 0], 0, 10, long_ago))
    hosts.set(c, (0, [0, 1, 0, 0], 0, 10, long_ago))
    hosts.set(d, (0, [0, 0, 0, 0], 0, 10, now))
    for number, seen in ((47, long_ago), (50, now)):
        bindings.set((a, 0, 0, number, 0, 0), (b, seen, 0, 0, 0, 0))
    expiry.forget_hosts(tables)
    expiry.forget_bindings(tables)
    assert [hosts.get(each) is not None for each in (a, b, c, d)] == [False, True, True, True]
    assert [bindings.get((a, 0, 0, number, 0, 0)) is not None for number in (47, 50)] == [False, True]
    for each in (b, c, d):
        hosts.delete(each)
    bindings.delete((a, 0, 0, 50, 0, 0))


def test_the_agent_shows_that_it_lives(gateway: Gateway) -> None:
    tables = gateway.tables
    assert tables.settings["hz"] == tables.hz
    before = int(tables.settings["heartbeat"])
    soon(lambda: int(tables.settings["heartbeat"]) != before, "it has ticked")
    assert expiry.age(bpf.jiffies(), tables.settings["heartbeat"]) < 2 * tables.hz


# --- from the configuration ------------------------------------------------------------------------

CONFIG = """
[interfaces]
wan = "wan0"
lan = ["lan0"]
mode = "tc"
[[forward]]
protocol = "tcp"
ports = 8080
to = "192.168.0.2:80"
[[forward]]
protocol = "udp"
ports = "default"
to = "192.168.0.4"
"""


@pytest.fixture
def idle() -> Iterator[Gateway]:
    """A lab of its own; nothing is attached."""
    with Gateway.in_new_lab("tc", attach=False) as built:
        yield built


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> str:
        (tmp_path / "masq.toml").write_text(text)
        return str(tmp_path / "masq.toml")

    return write


def test_forwards_of_the_configuration(idle: Gateway, write: Any) -> None:
    idle.masq("attach", "--config", write(CONFIG))
    assert target_of(idle.tables, "tcp", 8080) == "192.168.0.2:80"
    assert target_of(idle.tables, "udp", 8080) == "192.168.0.4:8080"
    # An agent that takes over leaves what is there, and adds what is missing.
    idle.masq("forward", "del", "udp", "default")
    idle.masq("forward", "del", "tcp", "8080")
    add(idle, "tcp", "8080-8081", "192.168.0.3")
    idle.kill_agent()
    idle.masq("attach", "--config", write(CONFIG))
    assert target_of(idle.tables, "tcp", 8080) == "192.168.0.3:8080"
    assert target_of(idle.tables, "udp", 8080) == "192.168.0.4:8080"


@pytest.mark.parametrize(
    ("target", "said"),
    [("192.0.2.9", "192.0.2.9 is behind no LAN"), ("192.168.0.1", "192.168.0.1 is the gateway's own address")],
)
def test_a_wrong_forward_keeps_all_from_being_attached(idle: Gateway, write: Any, target: str, said: str) -> None:
    path = write(CONFIG.replace("192.168.0.4", target))
    assert idle.masq("check", path).returncode == 0
    done = idle.masq("attach", "--config", path, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    assert not idle.is_attached
    if "LAN" in said:  # its network may be that of a LAN that is not there yet
        idle.masq(
            "attach", "--config", write(CONFIG.replace("192.168.0.4", target).replace('"lan0"', '"lan0", "ppp*"'))
        )
        assert target_of(idle.tables, "udp", 1) == f"{target}:1"


SETTINGS = """
[interfaces]
wan = "wan0"
lan = ["lan0"]
[ports]
first = 2000
last = 2099
preserve = true
parity = true
low_ports = true
overload = true
[filtering]
tcp = "address-dependent"
udp = "endpoint-independent"
[limits]
sessions_per_host = 1000
new_per_second = 10
burst = 20
[sessions]
further = 2048
[tcp]
mss = 1400
[protocols]
other = "drop"
"""


def test_settings_reach_the_programs(idle: Gateway, write: Any) -> None:
    idle.gate("ip", "route", "add", "198.18.0.0/24", "via", "203.0.113.254", "dev", "wan0", "mtu", "1300")
    idle.masq("attach", "--config", write(SETTINGS))
    tables = idle.tables
    settings = tables.settings
    assert settings["filtering"].tolist() == [1, 2, 0, 0]
    assert [int(settings[each]) for each in ("preserve", "parity", "overload", "drop_other")] == [1, 1, 1, 1]
    assert [int(settings[f"host_{each}"]) for each in ("sessions", "mappings", "rate", "burst")] == [1000, 75, 10, 20]
    assert settings["pool"]["first"].tolist()[CLASS_ROOM:] == [[512, 0], [512, 0], [0, 0], [0, 0]]
    assert settings["pool"]["count"].tolist()[CLASS_ROOM:] == [[512, 0], [512, 0], [0, 0], [0, 0]]
    assert tables.further == 2048
    free = np.unpackbits(~tables.claims.view(np.uint8), bitorder="little").astype(bool)
    for class_ in range(2):
        assert np.flatnonzero(free[class_ * PORTS : (class_ + 1) * PORTS]).tolist() == [
            *range(512, 1024),
            *range(2000, 2100),
        ]
    with idle.inside():
        assert mss_of(tables) == {"wan0": 1260, "lan0": 0}
    idle.gate("ip", "route", "del", "198.18.0.0/24")
    with idle.inside():
        soon(lambda: mss_of(tables)["wan0"] == 1400, "the route's MTU counts no more")


def mss_of(tables: Attached) -> dict[str, int]:
    return {
        each["name"]: int(tables.maps["interfaces"].get(each["index"])["mss"])
        for each in tables.manifest["interfaces"]
    }


def test_settings_by_default(gateway: Gateway) -> None:
    tables, settings = gateway.tables, gateway.tables.settings
    further = tables.further
    assert 65536 <= further <= 1048576
    assert int(settings["host_sessions"]) == further // 4
    assert int(settings["host_mappings"]) == ports_for_one(int(settings["pool"][0]["count"].sum()))
    assert int(settings["pool"]["count"][CLASS_ROOM:].sum()) == 0
    with gateway.inside():
        assert set(mss_of(tables).values()) == {0}
