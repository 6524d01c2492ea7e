"""Redirects and triggers with real programs, by the command line, in both modes.

::

    LAN boxes .2 .3 .4 ─ lan0 192.168.0.1 masq-gate 203.0.113.1 wan0 ─ .10 internet: nginx, dnsmasq, echo
                                          nginx, dnsmasq on .0.1
"""

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netkit import CURL, ECHO, GATE, Gateway, Servers, answers, ask, read, soon

from xdpmasq import forwarding, redirecting
from xdpmasq.lab.servers import ECHO_PORT, DnsServer, WebServer
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.lab.topology import HOSTS, INTERNET, INTERNET_TOO, PUBLIC

INSIDE = "192.168.0.1"
LOCAL_PORT = 3128

in_one_mode = pytest.mark.parametrize(
    "shared", [pytest.param("tc", marks=pytest.mark.xdist_group("gateway-tc"))], indirect=True
)  # where the mode makes no difference


@contextlib.contextmanager
def rule(gateway: Gateway, kind: str, *words: str) -> Iterator[None]:
    """A rule is in place inside the block; what ran by it ends with it."""
    gateway.masq(kind, "add", *words)
    try:
        yield
    finally:
        named = words if kind == "trigger" else (*words[:2], *words[3:5])
        gateway.masq(kind, "del", *named, "--kill")
        tables = gateway.tables
        tables.flush(tables.live_slots())
        if not forwarding.any_on_lan(tables):
            soon(lambda: not redirecting.is_served(gateway.tables), "the LANs are as before", timeout_s=5)


@pytest.fixture
def proxy(gateway: Gateway) -> Iterator[WebServer]:
    """nginx on the gateway's internal address."""
    server = WebServer(gateway.lab, GATE, INSIDE)
    yield server
    server.stop()
    server.directory.rename(server.directory.with_name(f"old-{id(server)}"))


def listed(gateway: Gateway, kind: str) -> dict[str, Any]:
    (row,) = json.loads(gateway.masq(kind, "list", "--json").stdout)
    return dict(row)


def test_a_transparent_proxy(gateway: Gateway, servers: Servers, proxy: WebServer) -> None:
    """It sees the client's own address; the client knows nothing. When it goes, so does all of it."""
    ended = ["sh", "-c", f"{' '.join(CURL)} {servers.web.big_url} | sha256sum"]
    mapped = gateway.mappings()
    with rule(gateway, "redirect", "tcp", "80", "80", "--on", "lan", "--not-to", INTERNET_TOO):
        assert gateway.lab.exec("a-box", ended).stdout.split()[0] == proxy.big_sha256
        assert HOSTS["a-box"] in {client.address for client in proxy.clients()}
        assert gateway.on("lan0") >= {"ingress", "egress"}
        own = gateway.gate("sh", "-c", f"{' '.join(CURL)} {servers.web.big_url} | sha256sum")
        assert own.split()[0] == servers.web.big_sha256, "the gateway's own traffic is its own"
        assert listed(gateway, "redirect")["opened"] == 1
        assert gateway.mappings().keys() <= mapped.keys(), "nothing was masqueraded"
    assert gateway.lab.exec("a-box", ended).stdout.split()[0] == servers.web.big_sha256
    assert ("egress" in gateway.on("lan0")) == (gateway.mode == "xdp")


def test_one_source_port_to_two_remotes(gateway: Gateway) -> None:
    """Linux gives it twice, as the remotes differ; the proxy has both connections, and mixes nothing up."""
    with (
        rule(gateway, "redirect", "tcp", "80", str(LOCAL_PORT), "--on", "lan"),
        gateway.listen(GATE, LOCAL_PORT) as listener,
        contextlib.ExitStack() as ends,
    ):
        for remote in (INTERNET, INTERNET_TOO):
            near = ends.enter_context(gateway.lab.socket("a-box", socket.SOCK_STREAM))
            near.settimeout(5)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            near.bind((HOSTS["a-box"], 5000))
            near.connect((remote, 80))
            far = ends.enter_context(listener.accept()[0])
            far.settimeout(5)
            assert far.getpeername()[0] == HOSTS["a-box"]
            assert (far.getpeername()[1] == 5000) == (remote == INTERNET)
            for source, sink in ((near, far), (far, near)):
                text = remote.encode() * 5000
                source.sendall(text)
                assert read(sink, len(text)) == text
        assert listed(gateway, "redirect")["running"] == 2
        assert gateway.masq("sessions", "flush", "--remote", f"{INTERNET_TOO}:80").stdout == "1 session ended\n"
        assert listed(gateway, "redirect")["running"] == 1


def test_all_dns_by_the_gateway(gateway: Gateway) -> None:
    """dig checks from whom the answer comes; nobody is there to whom it was sent."""
    dns = DnsServer(gateway.lab, GATE, INSIDE)
    try:
        with rule(gateway, "redirect", "udp", "53", "53", "--on", "lan"):
            for remote in (INTERNET, INTERNET_TOO, "198.51.100.200"):
                asked = ["dig", "+tries=1", f"@{remote}", "here.lab.test"]
                output = gateway.lab.exec("a-box", asked).stdout
                assert f"SERVER: {remote}#53" in output
                assert re.search(rf"here\.lab\.test\..*{re.escape(INSIDE)}", output)
    finally:
        dns.stop()
        dns.directory.rename(dns.directory.with_name(f"old-{id(dns)}"))


def test_running_flows_are_redirected_and_refused(gateway: Gateway) -> None:
    """An accelerated UDP flow meets a new redirect at once, however fast it is; a closed port there is told."""
    with gateway.udp("a-box") as client:
        client.connect(ECHO)
        for number in range(30):
            client.send(b"%d" % number)
            assert client.recv(100) == b"%d" % number
        with rule(gateway, "redirect", "udp", str(ECHO_PORT), str(LOCAL_PORT), "--on", "lan"):
            client.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                client.recv(100)
            with gateway.udp(GATE, LOCAL_PORT) as server:
                client.send(b"now?")
                text, peer = server.recvfrom(100)
                assert (text, peer) == (b"now?", client.getsockname())
                for size in (4000, 20_000):
                    server.sendto(bytes(size), peer)
                    assert len(client.recv(65535)) == size
                    client.send(bytes(size))
                    assert len(server.recv(65535)) == size
                client.close()
                server.connect(peer)
                server.send(b"gone for good")
                with pytest.raises(ConnectionRefusedError):
                    server.recv(100)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_from_outside(gateway: Gateway, protocol: str) -> None:
    """The service sees the remote's address; from inside, the external address is as before."""
    with rule(gateway, "redirect", protocol, "80-81", "8080", "--on", "wan"):
        if protocol == "udp":
            with gateway.udp(GATE, 8081, address=PUBLIC) as server, gateway.udp("internet", address=INTERNET) as far:
                far.connect((PUBLIC, 81))
                far.send(b"hello")
                text, peer = server.recvfrom(100)
                assert (text, peer) == (b"hello", far.getsockname())
                server.sendto(b"welcome", peer)
                assert far.recv(100) == b"welcome"
            return
        with gateway.listen(GATE, 8081) as listener, gateway.tcp("internet", (PUBLIC, 81)) as far:
            near, peer = listener.accept()
            with near:
                assert peer == far.getsockname()
                far.sendall(b"hello")
                assert read(near, 5) == b"hello"
                near.sendall(bytes(200_000))
                assert read(far, 200_000) == bytes(200_000)
            assert listed(gateway, "redirect")["running"] == 1
        with pytest.raises(ConnectionRefusedError):
            gateway.tcp("a-box", (PUBLIC, 81))


REFUSED = [
    ("redirect add tcp 80-90 65530 --on lan", 2, "80-90 would lead to 65530-65540, and ports end at 65535"),
    ("redirect add tcp 80 0 --on lan", 2, "0 is no port"),
    ("redirect add icmp 80 80 --on lan", 2, "icmp cannot be redirected"),
    ("redirect add tcp 80 3128 --on dmz", 2, "dmz is no side → give --on lan or --on wan"),
    ("redirect add tcp 80 3128 --on wan --not-to 10.0.0.0/8", 2, "no destination can be spared on wan"),
    ("redirect add tcp 80 3128 --on lan --not-to 10.0.0.1/8", 2, "bits beyond its length"),
    (
        "redirect add tcp 70-90 3128 --on lan",
        1,
        "tcp 80 on lan → the gateway's 3128 is there already, and has tcp 80",
    ),
    ("redirect add tcp 8000-8100 80 --on wan", 1, "tcp 8080 → 192.168.0.2:80 is there already, and has tcp 8080"),
    ("forward add tcp 81 192.168.0.2", 1, "tcp 81 on wan → the gateway's 8081 is there already, and has tcp 81"),
    ("redirect del tcp 8080 --on wan", 1, "there is no redirect tcp 8080 --on wan"),
    ("forward del tcp 81", 1, "near it: tcp 8080"),
    ("trigger add udp 6113 --opens tcp 8080-8090", 1, "tcp 8080 → 192.168.0.2:80 is there already"),
    ("trigger add udp 6000-6200 --opens tcp 7000", 1, "udp 6112 to open tcp ports by, which can be one range"),
    ("trigger add udp 6113 --opens tcp 6112-6119", 1, "and has tcp 6112-6119"),
    ("trigger add udp 6112 --opens icmp 1", 2, "icmp cannot be opened"),
    ("trigger add udp 6112 --opens tcp 1 --for 10", 2, "allowed is 60 to 86400"),
    ("trigger del udp 6112 --opens tcp 1", 1, "near it: udp 6112 --opens tcp 6112-6119"),
]


@in_one_mode
def test_refused(gateway: Gateway) -> None:
    """Each names both sides, and changes nothing."""
    add = [
        ("redirect", "tcp", "80", "3128", "--on", "lan"),
        ("redirect", "tcp", "81", "8081", "--on", "wan"),
        ("trigger", "udp", "6112", "--opens", "tcp", "6112-6119"),
    ]
    with contextlib.ExitStack() as stack:
        for kind, *words in add:
            stack.enter_context(rule(gateway, kind, *words))
        with gateway.forward("tcp", "8080", "192.168.0.2:80"):
            before = forwarding.read(gateway.tables)
            for words, code, said in REFUSED:
                done = gateway.masq(*words.split(), check=False)
                assert (done.returncode, said in " ".join(done.stderr.split())) == (code, True), done.stderr
            assert forwarding.read(gateway.tables) == before


def test_triggered(gateway: Gateway) -> None:
    """By a call to the echo server, ports open to whoever called; also from inside, by the external address."""
    words = ("udp", str(ECHO_PORT), "--opens", "tcp", "6112-6119")
    with rule(gateway, "trigger", *words), gateway.listen("a-box", 6115) as listener:
        with pytest.raises(OSError, match="timed out"):
            gateway.tcp("internet", (PUBLIC, 6115), timeout_s=0.3)
        with gateway.udp("a-box") as caller, gateway.udp("b-box") as other:
            assert ask(caller, b"call") == b"call"
            assert answers(other)
            row = listed(gateway, "trigger")
            assert row["open_to"] == HOSTS["a-box"]
            assert 590 <= row["open_s"] <= 600
            for box in ("internet", "b-box", "d-box"):
                with gateway.tcp(box, (PUBLIC, 6115)) as far:
                    near, _ = listener.accept()
                    with near:
                        far.sendall(b"hello")
                        assert read(near, 5) == b"hello"
                        near.sendall(b"welcome")
                        assert read(far, 7) == b"welcome"
            assert listed(gateway, "trigger")["running"] >= 1


CONFIG = """
[interfaces]
wan = "wan0"
lan = ["lan0"]
[[redirect]]
protocol = "udp"
ports = 7
to = 3128
on = "lan"
[[redirect]]
protocol = "tcp"
ports = 80
to = 8080
on = "wan"
[[trigger]]
protocol = "udp"
ports = 6112
opens = "tcp 6112-6119"
"""


@pytest.mark.parametrize("mode", ["tc"], indirect=True)
def test_of_the_configuration_and_with_the_agent_dead(bare: Gateway, tmp_path: Path) -> None:
    """They are there at once, work without the agent, are kept by the next one, and leave nothing behind."""
    (tmp_path / "masq.toml").write_text(CONFIG)
    config = ("--config", str(tmp_path / "masq.toml"), "--mode", bare.mode)
    before = snapshot(bare.lab)
    bare.masq("attach", *config)
    rules = forwarding.read(bare.tables)
    assert {str(each.rule) for each in rules} == {
        "udp 7 on lan → the gateway's 3128",
        "tcp 80 on wan → the gateway's 8080",
        "udp 6112 opens tcp 6112-6119 for 600 s",
    }
    with bare.udp(GATE, LOCAL_PORT) as server, bare.udp("a-box") as client:
        for change in (bare.kill_agent, lambda: bare.masq("attach", *config)):
            change()
            client.sendto(b"anybody?", ECHO)
            text, peer = server.recvfrom(100)
            assert (text, peer) == (b"anybody?", (HOSTS["a-box"], client.getsockname()[1]))
            server.sendto(b"yes", peer)
            assert client.recvfrom(100) == (b"yes", ECHO)
    assert [each.rule for each in forwarding.read(bare.tables)] == [each.rule for each in rules]
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []
