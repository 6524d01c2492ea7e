"""Sessions end when idle, ports rest and come back, full tables recover. Time is written, not waited for.

The standard lab: ``LAN boxes ─ lan0 masq-gate wan0 ─ internet (echo on .10) ─ transit``, which
drops what goes to 198.18.0.0/15 without a word.
"""

import json
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest
from netkit import ECHO, Gateway, Wire, answers, ask, internal, soon, who

from xdpmasq import bpf
from xdpmasq.abi import FURTHER_BASE, LIFE_RESTING, LIFE_STATE, PORTS
from xdpmasq.config import Limits, Ports, Timeouts
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import INTERNET, PUBLIC, TRANSIT

pytestmark = pytest.mark.xdist_group("expiry")
TIMES = Timeouts()


@pytest.fixture(scope="module")
def _shared() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc") as gateway:
        EchoServer(gateway.lab)
        yield gateway


@pytest.fixture
def gateway(_shared: Gateway) -> Iterator[Gateway]:
    wire = Wire(_shared.lab)
    yield _shared
    wire.check()


def slot_of(gateway: Gateway, endpoint: str) -> int:
    """Where the session of an internal endpoint lives."""
    tables, mappings = gateway.tables, gateway.mappings()
    port = int(mappings[endpoint].rpartition(":")[2])
    return next(slot for slot in tables.live_slots().tolist() if slot % PORTS == port)


def age(gateway: Gateway, slots: object, seconds: float) -> None:
    """The last packets of these sessions, both ways, were so long ago."""
    tables = gateway.tables
    stamp = np.uint32((bpf.jiffies() - int(seconds * tables.hz)) % 2**32)
    for side in ("out", "in"):
        tables.sessions[side]["last_seen"][slots] = stamp


def is_claimed(gateway: Gateway, slot: int) -> bool:
    return bool(int(gateway.tables.claims[slot // 64]) >> slot % 64 & 1)


def is_resting(gateway: Gateway, slot: int) -> bool:
    return int(gateway.tables.sessions["life"][slot]) & LIFE_STATE == LIFE_RESTING


# --- one session -----------------------------------------------------------------------------------


@pytest.mark.req("4787-5")
@pytest.mark.req("6888-8")
def test_an_idle_udp_session_ends_and_its_port_rests(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client:
        who(client)
        slot = slot_of(gateway, internal("a-box", client))
        age(gateway, slot, TIMES.udp_s - 5)
        time.sleep(1.3)
        assert internal("a-box", client) in gateway.mappings()

        age(gateway, slot, TIMES.udp_s + 1)
        soon(lambda: internal("a-box", client) not in gateway.mappings(), "it has ended")
        assert is_claimed(gateway, slot)
        assert is_resting(gateway, slot)

        gateway.tables.sessions["out"]["last_seen"][slot] -= np.uint32(TIMES.port_rest_s * gateway.tables.hz + 10)
        soon(lambda: not is_claimed(gateway, slot), "the port is free again")
        assert answers(client)  # as a new session


@pytest.mark.req("5382-5")
@pytest.mark.req("7857-2")
def test_tcp_has_a_long_time_and_a_short_one(gateway: Gateway) -> None:
    with gateway.connection() as connection:
        endpoint = internal("a-box", connection.near)
        slot = slot_of(gateway, endpoint)
        connection.talk()
        age(gateway, slot, TIMES.tcp_established_s - 60)
        time.sleep(1.3)
        connection.talk()
        connection.near.shutdown(socket.SHUT_WR)
        assert connection.far.recv(1) == b""
        age(gateway, slot, TIMES.tcp_transitory_s + 60)  # half closed is still established
        time.sleep(1.3)
        connection.far.sendall(b"last words")
        assert connection.near.recv(20) == b"last words"
    soon(lambda: state_of(gateway, endpoint) == "TIME_WAIT", "both sides have closed")
    age(gateway, slot, TIMES.tcp_transitory_s - 5)
    time.sleep(1.3)
    assert endpoint in gateway.mappings()
    age(gateway, slot, TIMES.tcp_transitory_s + 1)
    soon(lambda: endpoint not in gateway.mappings(), "it has ended")


@pytest.mark.req("4787-5")
@pytest.mark.req("5382-5")
@pytest.mark.req("5508-2")
@pytest.mark.req("4787-6")
@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_times_of_a_file_reach_the_programs(bare: Gateway) -> None:
    """There they are obeyed, as the tests of the programs show."""
    wanted = {"tcp_established": 8000, "tcp_transitory": 250, "udp": 400, "icmp": 70}
    file = bare.lab.directory / "masq.toml"
    lines = ["[timeouts]", *(f"{name}_s = {value}" for name, value in wanted.items())]
    file.write_text("\n".join([*lines, "[sessions]", "inbound_refresh = false\n"]))
    bare.attach("--config", str(file))
    settings, hz = bare.tables.settings, bare.tables.hz
    assert {name: int(settings[name]) // hz for name in wanted} == wanted
    assert not settings["inbound_refresh"]


def state_of(gateway: Gateway, endpoint: str) -> str:
    return next((each["state"] for each in gateway.sessions("--internal", endpoint)), "")


@pytest.mark.req("5508-2")
def test_a_ping_session_lives_for_a_minute(gateway: Gateway) -> None:
    gateway.lab.exec("a-box", ["ping", "-c1", "-W1", "-e", "321", INTERNET])
    slot = slot_of(gateway, "192.168.0.2:321")
    age(gateway, slot, 58)
    time.sleep(1.3)
    assert "192.168.0.2:321" in gateway.mappings()
    age(gateway, slot, 61)
    soon(lambda: "192.168.0.2:321" not in gateway.mappings(), "it has ended")


@pytest.mark.req("4787-6")
def test_a_packet_at_the_last_moment_keeps_the_session(gateway: Gateway) -> None:
    """Also when the agent is too late: an expired session opens again in place, with its endpoint."""
    with gateway.udp("a-box") as client:
        endpoint = who(client)
        slot = slot_of(gateway, internal("a-box", client))
        for seconds in (TIMES.udp_s - 2, TIMES.udp_s + 1):
            age(gateway, slot, seconds)
            assert who(client) == endpoint
        time.sleep(1.3)
        assert who(client) == endpoint


def test_a_mapping_lives_as_long_as_one_of_its_sessions(gateway: Gateway) -> None:
    EchoServer(gateway.lab, "internet", "203.0.113.11")
    other = ("203.0.113.11", ECHO[1])
    with gateway.udp("a-box") as client:
        endpoint = who(client)
        assert who(client, other) == endpoint
        first = slot_of(gateway, internal("a-box", client))
        further = [slot for slot in gateway.tables.live_slots() if slot >= FURTHER_BASE]
        assert len(further) == 1
        age(gateway, first, TIMES.udp_s + 1)
        soon(lambda: first not in gateway.tables.live_slots(), "the first session has ended")
        assert who(client, other) == endpoint
        assert who(client) == endpoint  # the mapping is the same, and takes the session in again
        age(gateway, [first, *further], TIMES.udp_s + 1)
        soon(lambda: is_resting(gateway, first), "both sessions, and with them the mapping, have ended")
        assert who(client, other) != endpoint


# --- full ------------------------------------------------------------------------------------------


def to_nowhere(gateway: Gateway, box: str, *, sockets: int, remotes: int) -> None:
    """One datagram from each of so many sockets of a box to each of so many remote endpoints."""
    gateway.lab.exec("transit", ["ip", "route", "replace", "blackhole", "198.18.0.0/15"])
    gateway.gate("ip", "route", "replace", "198.18.0.0/15", "via", TRANSIT)
    program = _TO_NOWHERE.format(sockets=sockets, remotes=remotes)
    gateway.lab.exec(box, [gateway.python, "-c", program], timeout_s=60)


_TO_NOWHERE = """
import socket, time
remotes = [(f"198.18.{{n // 250}}.{{n % 250}}", 9) for n in range({remotes})]
sent = 0
for number in range({sockets}):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("0.0.0.0", 1024 + number))
        for remote in remotes:
            s.sendto(b"", remote)
            sent += 1
            if sent % 500 == 0:
                time.sleep(0.001)  # the queues on the way hold so many
"""


UNLIMITED = Limits(sessions_per_host=1_000_000, ports_per_host=65536)


@pytest.fixture
def small() -> Iterator[Gateway]:
    """77 ports, 1,024 further sessions."""
    with Gateway.in_new_lab("tc", attach=False) as gateway:
        EchoServer(gateway.lab)
        gateway.attach_with(ports=Ports(2000, 2076), further_sessions=1024, limits=UNLIMITED)
        yield gateway


@pytest.mark.req("reliability-full")
@pytest.mark.req("6888-11")
@pytest.mark.req("6888-13")
@pytest.mark.req("6888-8")
def test_ports_used_up(small: Gateway) -> None:
    with small.udp("b-box") as old:
        endpoint = who(old)
        with small.counting() as grown:
            to_nowhere(small, "a-box", sockets=150, remotes=1)
        assert grown["mapping_opened"] == 76  # with b-box's every one of the 77
        assert grown["drop_ports_exhausted"] == 150 - 76
        assert not small.opens("c-box")
        assert who(old) == endpoint
        assert "76 sessions ended" in small.masq("sessions", "flush", "--internal", "192.168.0.2").stdout
        assert small.opens("c-box")  # from resting ports, since there are no others
        assert who(old) == endpoint


@pytest.mark.req("reliability-full")
@pytest.mark.req("6888-11")
def test_further_sessions_used_up(small: Gateway) -> None:
    with small.udp("b-box") as old:
        endpoint = who(old)
        with small.counting() as grown:
            to_nowhere(small, "a-box", sockets=1, remotes=1100)
        assert grown["drop_sessions_full"] == 1100 - 1 - 1024
        assert who(old) == endpoint
        assert small.opens("c-box")  # the first session of a mapping needs no such room
        small.masq("sessions", "flush", "--internal", "192.168.0.2")
        soon(lambda: small.tables.used_slots()[-1] < FURTHER_BASE, "the room is free again", timeout_s=5)
        with small.counting() as grown:
            to_nowhere(small, "a-box", sockets=1, remotes=500)
        assert grown["drop_sessions_full"] == 0
        assert grown["session_opened"] == 500


def test_two_hundred_thousand_sessions(gateway: Gateway) -> None:
    """Listed rightly, followed by the agent, and ended all at once."""
    sockets, remotes = 200, 1000
    to_nowhere(gateway, "c-box", sockets=sockets, remotes=remotes)
    listed = gateway.masq("sessions", "list", "--json", "--internal", "192.168.0.4").stdout
    rows = json.loads(listed)
    pairs = {(row["internal"]["port"], row["remote"]["address"]) for row in rows}
    assert len(pairs) == len(rows) >= sockets * remotes * 0.999  # a queue may have overflowed
    assert {row["protocol"] for row in rows} == {"udp"}
    assert {row["external"]["address"] for row in rows} == {PUBLIC}
    external: dict[int, set[int]] = {}
    for row in rows:
        external.setdefault(row["internal"]["port"], set()).add(row["external"]["port"])
    assert all(len(ports) == 1 for ports in external.values())  # endpoint-independent
    assert len(set.union(*external.values())) == sockets
    assert {row["state"] for row in rows} == {"UNREPLIED"}
    assert gateway.opens("a-box")

    age(gateway, gateway.tables.open_slots(), TIMES.udp_s + 1)
    with gateway.udp("b-box") as client:
        soon(lambda: len(gateway.tables.live_slots()) < 10, "the agent has ended them", timeout_s=20)
        assert ask(client, b"?") == b"?"
    assert gateway.agent_pid
    soon(lambda: gateway.tables.used_slots()[-1] < FURTHER_BASE, "their room is free again", timeout_s=20)


def test_the_agent_dead_for_long_costs_no_ports() -> None:
    """Packets help themselves: ports of expired sessions are taken back when no other is left."""
    with Gateway.in_new_lab("tc", attach=False) as gateway:
        EchoServer(gateway.lab)
        gateway.attach_with(ports=Ports(2000, 2076), limits=UNLIMITED)
        to_nowhere(gateway, "a-box", sockets=150, remotes=1)  # few free ports among many are not always found
        assert not gateway.opens("b-box")
        gateway.kill_agent()
        age(gateway, gateway.tables.open_slots(), TIMES.udp_s + 1)
        with gateway.counting() as grown:
            assert sum(gateway.opens("b-box") for _ in range(20)) >= 19
        assert grown["mapping_reclaimed"] >= 19
