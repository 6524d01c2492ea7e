"""The punt port of a real agent: there, looked after, gone; fragments returned and senders told.

The standard lab: ``a-box ─ lan0 masq-gate wan0 ─ internet (echo on .10)``, and masq-punt0 in masq-gate, through which
the tests speak to the agent as the programs do.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
from netkit import GATE, Gateway, ask, soon
from scapy.layers.inet import ICMP, IP, UDP

from xdpmasq import bpf, punt
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.lab.topology import HOSTS, INTERNET
from xdpmasq.net import monitor, netdev, tun

pytestmark = pytest.mark.parametrize("mode", ["tc"], indirect=True)  # where the mode makes no difference

PORT = "masq-punt0"
NEIGHBOUR = "192.168.0.1"  # masq-gate, as a-box knows it
ALL, OUTGOING = 3, 4  # ETH_P_ALL, PACKET_OUTGOING


def port(gateway: Gateway) -> netdev.Link | None:
    with gateway.inside():
        return next((link for link in netdev.links() if link.name.startswith("masq-punt")), None)


def has_port(gateway: Gateway) -> bool:
    """One that is up, has its program, and is known to the programs."""
    link = port(gateway)
    if not link or not link.up or gateway.tables.settings["punt"] != link.index:
        return False
    return gateway.on(link.name) == {"ingress"}


# --- its life --------------------------------------------------------------------------------------


def test_it_is_there_while_the_agent_is(bare: Gateway) -> None:
    before = snapshot(bare.lab)
    bare.attach()
    assert has_port(bare)
    link = port(bare)
    assert link
    assert (link.name, link.kind, link.mtu) == (PORT, "tun", 65521)
    assert "qlen 500" in bare.gate("ip", "link", "show", PORT)
    assert bare.gate("ip", "address", "show", PORT).count("inet") == 0
    assert bare.sysctl(f"net.ipv6.conf.{PORT}.disable_ipv6") == "1"
    assert bare.status()["punt"] == {"name": PORT, "why_not": ""}

    bare.kill_agent()
    assert port(bare) is None
    assert bare.opens()
    assert bare.status()["punt"] == {"name": None, "why_not": "the agent is not running"}

    bare.attach()
    assert has_port(bare)
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []


def test_stopped_in_order_it_says_so_to_the_programs(fresh: Gateway) -> None:
    os.kill(fresh.agent_pid or 0, 15)
    soon(lambda: fresh.agent_pid is None, "the agent has ended")
    assert port(fresh) is None
    assert fresh.tables.settings["punt"] == 0


def test_the_agents_heart_beats(fresh: Gateway) -> None:
    def beaten() -> int:
        settings = fresh.tables.settings
        return int(settings["heartbeat"])

    first = beaten()
    assert abs(bpf.jiffies() - first) < 3 * fresh.tables.hz
    soon(lambda: beaten() > first, "the next beat")


def test_made_anew_when_somebody_takes_it_away(fresh: Gateway) -> None:
    for command in (
        f"ip link del {PORT}",
        f"ip link set {PORT} down",
    ):
        old = port(fresh)
        assert old
        fresh.gate(*command.split())
        soon(lambda old=old: has_port(fresh) and port(fresh).index != old.index, command)  # type: ignore[misc]
    assert fresh.opens()


def test_no_pattern_makes_it_a_lan_and_nothing_goes_on_for_ever(bare: Gateway) -> None:
    bare.attach(lans=["lan0", "masq*", "m*"])
    assert set(bare.hooks()) == {"wan0", "lan0"}
    with bare.inside(), monitor.Watch() as watch:
        soon(lambda: not (time.sleep(0.3) or watch.drain()), "it is quiet")
        time.sleep(1.5)
        changes = watch.drain()
    assert {kind for kind, came in vars(changes).items() if came} <= {"neighbours"}
    assert bare.hooks().keys() == {"wan0", "lan0"}


def test_each_has_its_own_name(bare: Gateway) -> None:
    with bare.inside():
        taps = [tun.tap_create("masq-punt%d", 1500, 10) for _ in range(2)]
        bare.attach()
        assert {link.name for link in netdev.links() if netdev.is_punt_port(link)} == {
            "masq-punt0", "masq-punt1", "masq-punt2"
        }  # fmt: skip
    for tap in taps:
        os.close(tap.fd)
    assert bare.status()["punt"]["name"] == "masq-punt2"


def test_without_the_device_the_gateway_works_and_says_what_is_lacking(bare: Gateway) -> None:
    before = snapshot(bare.lab)
    agent = bare.lab.popen(GATE, [bare.python, "-c", _NO_DEVICE])
    soon(lambda: bare.agent_pid is not None and bare.is_attached, "it runs", timeout_s=20)
    soon(bare.opens, "it masquerades", timeout_s=10)
    why = "cannot create a TAP: /dev/net/none: No such file or directory"
    assert bare.status()["punt"] == {"name": None, "why_not": why}
    assert f"no punt port: {why}; out-of-order fragments are dropped" in bare.masq("status").stdout
    assert bare.tables.settings["punt"] == 0
    assert bare.status()["working"]
    bare.detach()
    agent.wait(timeout=10)
    assert differences(before, snapshot(bare.lab)) == []


_NO_DEVICE = """
from xdpmasq import daemon
from xdpmasq.net import tun
from xdpmasq.config import Config
tun.DEVICE = "/dev/net/none"
daemon.run(Config(("wan0",), ("lan0",), mode="tc"))
"""


# --- its work --------------------------------------------------------------------------------------


@pytest.fixture
def wire(fresh: Gateway) -> Iterator[socket.socket]:
    """On the punt port: what is sent there, the agent reads."""
    with fresh.lab.socket(GATE, socket.SOCK_RAW, socket.AF_PACKET) as made:
        made.bind((PORT, ALL))
        yield made


def frame(reason: int, packet: bytes) -> bytes:
    """Of an interface that there is not: the program that takes it back can do nothing with it."""
    return struct.pack("!BBI6sH", 2, reason, 60_000, b"source", 0x0800) + bytes(14) + packet


def returned(wire: socket.socket, timeout_s: float) -> bytes | None:
    """The next frame that the agent writes."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        wire.settimeout(left)
        try:
            data, address = wire.recvfrom(1 << 17)
        except TimeoutError:
            break
        if address[2] != OUTGOING:
            return data
    return None


def test_fragments_return_when_their_first_is_known(fresh: Gateway, wire: socket.socket) -> None:
    number = 0x1234
    ends = {"src": INTERNET, "dst": "203.0.113.1", "id": number, "proto": 17}
    packets = [bytes(IP(**ends, frag=n) / (bytes([n]) * 60)) for n in (3, 1, 2)]
    frames = [frame(punt.FRAGMENT_IN, packet) for packet in packets]
    for each in frames:
        wire.send(each)
    assert returned(wire, 0.3) is None
    src, dst, id_ = (
        int.from_bytes(each, "little")
        for each in (socket.inet_aton(INTERNET), socket.inet_aton("203.0.113.1"), struct.pack("!H", number))
    )
    table = fresh.tables.maps["fragments"]
    first = np.zeros(1, table.value)[0]
    first["seen_at"] = bpf.jiffies()
    table.set((([src],), ([dst],), id_, 17), first)
    assert [returned(wire, 5) for _ in frames] == frames
    assert returned(wire, 0.2) is None


@pytest.mark.parametrize(("reason", "kind"), [(punt.REFUSED, (3, 13)), (punt.TTL, (11, 0))])
def test_the_sender_is_told(fresh: Gateway, wire: socket.socket, reason: int, kind: tuple[int, int]) -> None:
    packet = bytes(IP(src=HOSTS["a-box"], dst=INTERNET, ttl=63) / UDP(sport=5000, dport=53) / b"question")
    with fresh.inside("a-box"):
        listener = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with listener:
        listener.settimeout(5)
        wire.send(frame(reason, packet))
        heard = IP(listener.recv(2000))
    assert (heard.src, heard.dst, heard.tos) == (NEIGHBOUR, HOSTS["a-box"], 0xC0)
    assert (heard[ICMP].type, heard[ICMP].code) == kind
    assert bytes(heard[ICMP])[8:] == packet


def test_a_flood_of_orphans_keeps_the_agent_from_nothing(fresh: Gateway, wire: socket.socket) -> None:
    """As many as there is room for, and more: afterwards it follows changes and carries traffic as before."""
    for number in range(6000):
        source = f"198.18.{number // 250}.{number % 250}"
        wire.send(frame(punt.FRAGMENT_OUT, bytes(IP(src=source, dst=INTERNET, id=number, frag=1, proto=17) / b"x")))
    assert fresh.opens()
    fresh.readdress("203.0.113.77/24")
    with fresh.udp("a-box") as client:
        soon(lambda: fresh.tables.manifest["external"] == "203.0.113.77", "the address is followed", timeout_s=5)
        assert ask(client, b"who").decode().startswith("203.0.113.77:")
