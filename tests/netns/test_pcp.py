"""Hosts ask for mappings: by natpmpc, by libtorrent's PCP, and by bytes of our own; then somebody outside uses them.

::

    a-box .2 ─┐
    b-box .3 ─┼─ lan0 192.168.0.1 ┐
    c-box .4 ─┘                   ├ masq-gate 203.0.113.1 wan0 ── .10 internet
    d-box .2 ─── lan1 192.168.1.1 ┘
"""

import contextlib
import json
import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest
from netkit import MEET, Gateway, soon, who
from pcpclient import INSIDE, INSIDE_TOO, NUMBERS, Answer, ask, exchange, message

from xdpmasq import forwarding
from xdpmasq.config import Pcp
from xdpmasq.externals import Externals
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC

pytestmark = [pytest.mark.xdist_group("pcp"), pytest.mark.req("6888-9")]
both = pytest.mark.parametrize("protocol", list(NUMBERS))


@pytest.fixture(scope="module")
def _shared() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", lans=2, attach=False) as gateway:
        EchoServer(gateway.lab)
        gateway.attach_with(pcp=Pcp(enabled=True))
        yield gateway


@pytest.fixture
def gateway(_shared: Gateway) -> Iterator[Gateway]:
    """Without mappings, before and after."""
    yield _shared
    tables = _shared.tables
    forwarding.take(tables, tables.reaper, *forwarding.read(tables))
    tables.flush(tables.live_slots())


# --- asking ----------------------------------------------------------------------------------------


def natpmpc(gateway: Gateway, box: str, *words: str) -> str:
    return gateway.lab.exec(box, ["natpmpc", "-g", INSIDE[0], *words], timeout_s=60).stdout


def listed(gateway: Gateway) -> list[dict[str, Any]]:
    return list(json.loads(gateway.masq("forward", "list", "--json").stdout))


def knocks_in_vain(gateway: Gateway, protocol: str, box: str, port: int, inside: int) -> bool:
    """Nothing that somebody new sends to an external port gets to a port inside."""
    if protocol == "udp":
        with gateway.udp(box, inside, timeout_s=0.3) as server, gateway.udp("internet") as client:
            client.sendto(b"anybody?", (PUBLIC, port))
            with contextlib.suppress(TimeoutError):
                return not server.recv(100)
            return True
    with gateway.listen(box, inside), contextlib.suppress(OSError):
        gateway.tcp("internet", (PUBLIC, port), timeout_s=0.5).close()
        return False
    return True


# --- judges of others' making ----------------------------------------------------------------------


@both
def test_natpmpc(gateway: Gateway, protocol: str) -> None:
    assert f"Public IP address : {PUBLIC}" in natpmpc(gateway, "a-box")
    said = natpmpc(gateway, "a-box", "-a", "8080", "9090", protocol, "3600")
    assert f"Mapped public port 8080 protocol {protocol.upper()} to local port 9090 " in said
    met = MEET[protocol](gateway, "internet", (PUBLIC, 8080), "a-box", 9090)
    assert (met.server, met.called) == (f"{HOSTS['a-box']}:9090", f"{PUBLIC}:8080")
    (row,) = listed(gateway)
    assert (row["by"], row["ports"], row["to"]) == ("pcp", {"first": 8080, "last": 8080}, ["192.168.0.2:9090"])
    assert 3500 < row["left_s"] <= 3600
    shown = gateway.masq("forward", "list").stdout
    assert re.search(rf"{protocol} +8080 +192.168.0.2:9090 +anywhere +1 +\d  59 min \d+ s, by pcp\n", shown)
    natpmpc(gateway, "a-box", "-a", "0", "9090", protocol, "0")
    assert listed(gateway) == []
    assert knocks_in_vain(gateway, protocol, "a-box", 8080, 9090)


_LIBTORRENT = """
import signal, time, libtorrent
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
session = libtorrent.session({
    **dict.fromkeys(["enable_dht", "enable_lsd", "enable_upnp"], False),
    **{"enable_natpmp": True, "listen_interfaces": "192.168.0.3:7881"},
    "alert_mask": libtorrent.alert.category_t.all_categories,
})
mapped, until = set(), time.monotonic() + 20
while len(mapped) < 2 and time.monotonic() < until:
    session.wait_for_alert(500)
    for alert in session.pop_alerts():
        if isinstance(alert, libtorrent.portmap_alert):
            mapped.add(f"{alert.map_protocol} {alert.external_port}")
print(*sorted(mapped), sep="\\n", flush=True)
signal.sigwait({signal.SIGTERM})
"""


def test_libtorrent(gateway: Gateway) -> None:
    """It asks by PCP first; at its end it takes its mappings back."""
    process = gateway.lab.popen("b-box", ["/usr/bin/python3", "-c", _LIBTORRENT], stdout=subprocess.PIPE)
    assert process.stdout
    lines = {process.stdout.readline().decode().strip() for _ in range(2)}
    leases = {(each.rule.protocol, each.rule.first): each.rule for each in forwarding.read(gateway.tables)}
    assert {protocol for protocol, _ in leases} == {"tcp", "udp"}
    assert {int(line.split()[-1]) for line in lines} == {port for _, port in leases}
    assert all(rule.to == ("192.168.0.3:7881",) for rule in leases.values())
    assert all(rule.lease and any(rule.lease.nonce) for rule in leases.values()), "NAT-PMP has no nonce"
    with gateway.tcp("internet", (PUBLIC, next(port for protocol, port in leases if protocol == "tcp"))):
        pass  # libtorrent itself has accepted
    gateway.lab.stop(process)
    soon(lambda: listed(gateway) == [], "it has taken them back")


# --- in and out ------------------------------------------------------------------------------------


@both
def test_pcp(gateway: Gateway, protocol: str) -> None:
    answer = ask(gateway, "d-box", protocol, 9090, 8082)
    assert replace(answer, epoch=0) == Answer(0, 600, 0, 8082, PUBLIC)
    met = MEET[protocol](gateway, "internet", (PUBLIC, 8082), "d-box", 9090)
    assert met.server == f"{HOSTS['d-box']}:9090"
    assert ask(gateway, "d-box", protocol, 9090, lifetime=0).result == 0
    assert knocks_in_vain(gateway, protocol, "d-box", 8082, 9090)


def test_what_a_socket_is_seen_as_is_what_it_gets(gateway: Gateway) -> None:
    """RFC 6887 section 11.3: a mapping made by sending comes first; and asked for first, sending uses it."""
    with gateway.udp("a-box", 9090) as client:
        seen = who(client)
        assert seen == f"{PUBLIC}:{ask(gateway, 'a-box', 'udp', 9090, 8080).port}"
        assert who(client) == seen
        with gateway.udp("internet") as stranger:
            stranger.sendto(b"come in", (PUBLIC, int(seen.split(":")[1])))
            assert client.recv(100) == b"come in"
    assert ask(gateway, "b-box", "udp", 9091, 8081).port == 8081
    assert gateway.seen_as("b-box", 9091) == f"{PUBLIC}:8081"


# --- who is heard ----------------------------------------------------------------------------------


def test_nobody_else_is_answered(gateway: Gateway) -> None:
    """From the WAN, to whatever address; from one LAN to the address of another; with another LAN's source."""
    assert gateway.status()["pcp"]["listening"] == [INSIDE[0], INSIDE_TOO[0]]
    gateway.lab.exec("internet", ["ip", "route", "add", "192.168.0.0/24", "via", PUBLIC])
    with gateway.udp("internet") as outside:
        for server in ((PUBLIC, 5351), INSIDE):
            assert exchange(outside, message(INTERNET, "udp", 9090), server, 0.4) is None
    gateway.lab.exec("internet", ["ip", "route", "del", "192.168.0.0/24"])
    with gateway.udp("d-box") as other:
        assert exchange(other, message(HOSTS["d-box"], "udp", 9090), INSIDE, 0.4) is None
    for spoofed in ("192.168.1.77", FAR):
        gateway.lab.exec("a-box", ["ip", "addr", "add", f"{spoofed}/32", "dev", "eth0"])
        with gateway.udp("a-box", address=spoofed) as liar:
            assert exchange(liar, message(spoofed, "udp", 9090), INSIDE, 0.4) is None
        gateway.lab.exec("a-box", ["ip", "addr", "del", f"{spoofed}/32", "dev", "eth0"])
    assert listed(gateway) == []


def test_addresses_come_and_go(gateway: Gateway) -> None:
    def listens(*addresses: str) -> bool:
        return bool(gateway.status()["pcp"]["listening"] == sorted(addresses))

    gateway.gate("ip", "addr", "add", "192.168.0.77/24", "dev", "lan0")
    soon(lambda: listens(INSIDE[0], INSIDE_TOO[0], "192.168.0.77"), "the new address is listened at")
    with gateway.udp("a-box") as client:
        assert exchange(client, b"\0\0", ("192.168.0.77", 5351), 5)
    gateway.gate("ip", "addr", "del", "192.168.0.77/24", "dev", "lan0")
    soon(lambda: listens(INSIDE[0], INSIDE_TOO[0]), "it is not any more")


def test_a_flood_keeps_nobody_out_for_long(gateway: Gateway) -> None:
    """What one host asks too often is dropped and counted; the agent goes on, and answers others."""
    before = gateway.status()["pcp"]
    with gateway.udp("a-box") as flood, gateway.udp("b-box") as other:
        flood.setblocking(False)
        for number in range(5000):
            with contextlib.suppress(BlockingIOError):
                flood.sendto(message(HOSTS["a-box"], "udp", 1 + number), INSIDE)
        assert exchange(other, b"\0\0", patience_s=10)
    soon(lambda: gateway.status()["pcp"]["dropped"] - before["dropped"] > 3000, "they are counted")
    assert gateway.status()["pcp"]["answered"] - before["answered"] < 200
    assert len(forwarding.read(gateway.tables)) <= 128


# --- what lasts ------------------------------------------------------------------------------------


def test_a_killed_agent(gateway: Gateway) -> None:
    """The mapping stands, and the next agent knows whose it is and goes on counting."""
    first = ask(gateway, "a-box", "udp", 9090, 8083)
    gateway.kill_agent()
    MEET["udp"](gateway, "internet", (PUBLIC, 8083), "a-box", 9090)
    gateway.attach_with(pcp=Pcp(enabled=True))
    MEET["udp"](gateway, "internet", (PUBLIC, 8083), "a-box", 9090)
    stranger = ask(gateway, "a-box", "udp", 9090, nonce=b"ABCDEFGHIJKL")
    assert (stranger.result, stranger.lifetime > 400) == (2, True)
    again = ask(gateway, "a-box", "udp", 9090)
    assert (again.result, again.port) == (0, 8083)
    assert again.epoch >= first.epoch


def test_what_is_over_is_taken_out(gateway: Gateway) -> None:
    ask(gateway, "a-box", "udp", 9090, 8083)
    tables = gateway.tables
    (placed,) = forwarding.read(tables)
    tables.rules["expires"][placed.index] = (tables.now() - 1) % 2**32
    assert knocks_in_vain(gateway, "udp", "a-box", 8083, 9090)
    soon(lambda: not forwarding.read(tables), "the agent has taken it out")


def test_another_wan_address(gateway: Gateway) -> None:
    """The epoch begins anew and everybody is told (RFC 6886 section 3.2.1, RFC 6887 section 14.1); the port stays."""
    before = ask(gateway, "a-box", "udp", 9090, 8083)
    heard = gateway.lab.socket("c-box", socket.SOCK_DGRAM)
    with heard:
        heard.settimeout(10)
        heard.bind(("224.0.0.1", 5350))
        try:
            gateway.readdress("203.0.113.9/24")
            told = sorted({heard.recvfrom(100) for _ in range(4)})
            assert {sender for _, sender in told} == {INSIDE}
            texts = [text for text, _ in told]
            by_natpmp = next(text for text in texts if text[0] == 0)
            assert (by_natpmp[1], by_natpmp[8:]) == (128, IPv4Address("203.0.113.9").packed)
            by_pcp = next(text for text in texts if text[0] == 2)
            assert (len(by_pcp), by_pcp[1], by_pcp[3]) == (24, 128, 0)
            assert all(struct.unpack_from("!I", text, 4 if text[0] == 0 else 8)[0] <= 1 for text in texts)
            MEET["udp"](gateway, "internet", ("203.0.113.9", 8083), "a-box", 9090)
            after = ask(gateway, "a-box", "udp", 9090)
            assert (after.port, after.address) == (8083, "203.0.113.9")
            assert after.epoch < 20
        finally:
            gateway.readdress(f"{PUBLIC}/24")
            soon(lambda: gateway.tables.manifest["external"] == PUBLIC, "the old address is back")
    assert before.address == PUBLIC


@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_of_several_addresses_each_host_gets_its_own(bare: Gateway) -> None:
    """The one that it is seen as anyway (RFC 4787 REQ-2)."""
    pool = [PUBLIC, *(f"203.0.113.{last}" for last in (5, 6, 7))]
    for address in pool[1:]:
        bare.gate("ip", "addr", "add", f"{address}/24", "dev", "wan0")
    external = Externals.parse(addresses=pool, choices=["192.168.0.4 as 203.0.113.7"])
    bare.attach_with(pcp=Pcp(enabled=True), external=external)
    given = {}
    for box in ("a-box", "b-box", "c-box"):
        answer = ask(bare, box, "udp", 9090, 8083)
        given[box] = f"{answer.address}:{answer.port}"
        assert bare.seen_as(box, 9090) == bare.seen_as(box, 9090) == given[box]
        assert bare.seen_as(box).split(":")[0] == answer.address
        with bare.udp(box, 9090) as server, bare.udp("internet") as stranger:
            stranger.sendto(b"come in", (answer.address, answer.port))
            assert server.recv(100) == b"come in"
    assert given["c-box"] == "203.0.113.7:8083"
    assert len(set(given.values())) == 3
