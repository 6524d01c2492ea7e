"""Real programs through the gateway, in both modes.

::

    a-box .2 ─┐                                                          ┌─ .10 .11 internet: nginx, dnsmasq,
    b-box .3 ─┼─ switch ─ lan0 192.168.0.1 ┐                             │          sshd, iperf3, echo
    c-box .4 ─┘                            ├ masq-gate .1 wan0 ─ exchange
    d-box .2 ─── switch ─ lan1 192.168.1.1 ┘                             └─ .254 transit ═ 1400 bytes ═ .10 far: echo
"""

import hashlib
import json
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from netkit import CURL, ECHO, Gateway, ask, internal, who

from xdpmasq.abi import CLASSES
from xdpmasq.lab import traffic
from xdpmasq.lab.servers import ECHO_PORT
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, INTERNET_TOO, PUBLIC, TRANSIT

BOXES = ("a-box", "b-box", "c-box", "d-box")
IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_RECVTTL = 10, 0, 12  # linux/in.h


def at_once(action: Callable[[str], object]) -> None:
    with ThreadPoolExecutor(len(BOXES)) as pool:
        list(pool.map(action, BOXES))


def scene(gateway: Gateway, servers: object) -> traffic.Scene:
    return traffic.Scene(gateway.lab, servers.web, servers.dns, servers.ssh)  # type: ignore[attr-defined]


@pytest.mark.req("5382-1")
@pytest.mark.req("5382-7")
@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize("step", traffic.STEPS, ids=lambda step: step.run.__name__)
def test_the_demo_steps(gateway: Gateway, servers: object, step: traffic.Step) -> None:
    step.run(scene(gateway, servers))


@pytest.mark.req("5508-4")
@pytest.mark.parametrize("how", [["-U"], ["-I"], ["-T", "-p80"], ["-U", "-p", "53"]], ids=" ".join)
def test_traceroute_shows_every_hop(gateway: Gateway, how: list[str]) -> None:
    options = ["-n", *how, "-q1", "-N1", "-w2", "-m6"]
    for box in ("a-box", "d-box"):
        output = gateway.lab.exec(box, ["traceroute", *options, FAR]).stdout
        own_gateway = HOSTS[box].rpartition(".")[0] + ".1"
        assert re.findall(r"^ *\d+  (\S+)", output, re.MULTILINE) == [own_gateway, TRANSIT, FAR], output


@pytest.mark.req("4787-13")
@pytest.mark.parametrize("box", ["a-box", "d-box"])
def test_bulk_tcp_finds_the_narrow_link(gateway: Gateway, box: str) -> None:
    """Full segments with DF meet 1400 bytes beyond the gateway; transit's ICMP must reach the box."""
    with gateway.listen("far", address=FAR) as listener, gateway.tcp(box, listener.getsockname()) as near:
        far, _ = listener.accept()
        with far, ThreadPoolExecutor(1) as pool:
            far.settimeout(5)
            text = bytes(300_000)
            sending = pool.submit(near.sendall, text)
            received = 0
            while received < len(text):
                received += len(far.recv(65536))
            sending.result(timeout=5)
        mss = near.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    assert mss <= 1400 - 40
    gateway.lab.exec(box, ["ip", "route", "flush", "cache"])


@pytest.mark.req("4787-13a")
def test_a_datagram_too_big_for_the_narrow_link_is_fragmented(gateway: Gateway) -> None:
    with gateway.udp("b-box") as client:
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        text = bytes(range(200)) * 7
        assert len(text) == 1400
        for _ in range(4):
            assert ask(client, text, (FAR, ECHO_PORT)) == text


@pytest.mark.req("4787-14")
@pytest.mark.parametrize("size", [1473, 2000, 20_000, 60_000])
def test_fragmented_datagrams_both_ways(gateway: Gateway, size: int) -> None:
    with gateway.udp("c-box") as client:
        text = bytes(range(250)) * (size // 250)
        for _ in range(3):
            assert ask(client, text) == text


@pytest.mark.parametrize("reverse", [[], ["-R"]], ids=["up", "down"])
def test_iperf3(gateway: Gateway, reverse: list[str]) -> None:
    done = gateway.lab.exec("a-box", ["iperf3", "-J", "-c", INTERNET, "-n", "20M", "-P2", *reverse])
    end = json.loads(done.stdout)["end"]
    assert end["sum_sent"]["bytes"] >= 20 << 20
    assert end["sum_received"]["bytes"] > 0


def test_every_box_downloads_at_once(gateway: Gateway, servers: object) -> None:
    web = servers.web  # type: ignore[attr-defined]

    def download(box: str) -> None:
        done = gateway.lab.exec(box, ["sh", "-c", f"{' '.join(CURL)} {web.big_url} | sha256sum"])
        assert done.stdout.split()[0] == web.big_sha256

    at_once(download)


def test_copies_in_both_directions(gateway: Gateway, servers: object, tmp_path) -> None:  # type: ignore[no-untyped-def]
    ssh, web = servers.ssh, servers.web  # type: ignore[attr-defined]
    remote = f"root@{INTERNET}:{web.directory}/pages/big"
    gateway.lab.exec("d-box", ["rsync", "--whole-file", "-e", ssh.remote_shell, remote, tmp_path / "here"])
    assert hashlib.sha256((tmp_path / "here").read_bytes()).hexdigest() == web.big_sha256


# --- mappings --------------------------------------------------------------------------------------


@pytest.mark.req("4787-1")
def test_one_socket_is_one_endpoint_wherever_it_talks(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client:
        seen = {who(client, (address, ECHO_PORT)) for address in (INTERNET, INTERNET_TOO, FAR)}
        seen |= {who(client)}
        assert len(seen) == 1
        assert seen == {gateway.mappings()[internal("a-box", client)]}
    assert seen.pop().startswith(f"{PUBLIC}:")


@pytest.mark.req("4787-3")
@pytest.mark.req("4787-3a")
def test_hosts_with_the_same_port_are_told_apart(gateway: Gateway) -> None:
    clients = {box: gateway.udp(box, 40_123) for box in BOXES}
    try:
        seen = {box: who(client) for box, client in clients.items()}
        assert len(set(seen.values())) == len(BOXES)
        assert all(int(endpoint.rpartition(":")[2]) >= 1024 for endpoint in seen.values())
        for box, client in clients.items():
            assert ask(client, box.encode()) == box.encode()
    finally:
        for client in clients.values():
            client.close()


@pytest.mark.req("attacks-predict")
def test_the_default_pool_has_15_bits(gateway: Gateway) -> None:
    tables = gateway.tables
    for class_ in ("tcp", "udp", "icmp"):
        assert tables.settings["pool"][CLASSES.index(class_)]["count"].sum() >= 1 << 15


@pytest.mark.req("attacks-port_shadow")
def test_external_ports_keep_out_of_the_gateways_own(gateway: Gateway) -> None:
    low, high = map(int, gateway.sysctl("net.ipv4.ip_local_port_range").split())
    for _ in range(50):
        port = int(gateway.seen_as("b-box").rpartition(":")[2])
        assert port >= 1024
        assert not low <= port <= high


@pytest.mark.req("4787-8")
def test_strangers_do_not_get_in(gateway: Gateway) -> None:
    """Address-and-port-dependent filtering: another port of the same server is a stranger already."""
    with gateway.udp("a-box", timeout_s=0.3) as client, gateway.udp("internet") as stranger:
        host, _, port = who(client).partition(":")
        stranger.sendto(b"boo", (host, int(port)))
        with pytest.raises(TimeoutError):
            client.recv(100)
        assert ask(client, b"still there") == b"still there"


@pytest.mark.req("7857-6")
def test_a_udp_mapping_admits_no_tcp(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client, gateway.listen("a-box", client.getsockname()[1]):
        host, _, port = who(client).partition(":")
        with pytest.raises(ConnectionRefusedError):  # by masq-gate itself, which listens there on nothing
            gateway.tcp("internet", (host, int(port)))


@pytest.mark.req("5508-1")
def test_two_hosts_ping_with_one_identifier(gateway: Gateway) -> None:
    def ping(box: str) -> None:
        gateway.lab.exec(box, ["ping", "-n", "-q", "-c5", "-i0.02", "-W2", "-e4711", INTERNET])

    at_once(ping)


@pytest.mark.req("5508-4")
@pytest.mark.req("5508-5")
def test_a_closed_port_outside_is_told_at_once(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client:
        client.connect((INTERNET, 9))
        client.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)


@pytest.mark.req("5508-5")
@pytest.mark.req("attacks-leak")
def test_a_closed_port_inside_is_told_outside(gateway: Gateway) -> None:
    """The box's "port unreachable" quotes its private address, which the outside must not see."""
    with gateway.udp("internet") as server:
        address = (INTERNET, server.getsockname()[1])
        with gateway.udp("a-box") as client:
            client.sendto(b"x", address)
            _, (host, port) = server.recvfrom(100)
        with gateway.counting() as grown:
            server.connect((host, port))
            server.send(b"too late")
            with pytest.raises(ConnectionRefusedError):
                server.recv(100)
    assert grown["slow_icmp_error_outbound"] == 1


@pytest.mark.req("checksums-768")
def test_a_udp_checksum_of_zero_stays(gateway: Gateway) -> None:
    so_no_check = 11
    with gateway.lab.capture("internet", "eth0", f"udp dst port {ECHO_PORT}") as capture:
        with gateway.udp("a-box") as client:
            client.setsockopt(socket.SOL_SOCKET, so_no_check, 1)
            for _ in range(5):
                assert ask(client, b"unchecked") == b"unchecked"
        frames = capture.stop()
    assert len(frames) == 5
    assert {frame[40:42] for frame in frames} == {bytes(2)}


@pytest.mark.req("attacks-loop")
def test_the_ttl_falls_by_one_each_way(gateway: Gateway) -> None:
    """Both ways, and on both paths: the first packets go through the kernel, later ones by XDP where it is on."""

    def ttl(receiver: socket.socket) -> tuple[int, tuple[str, int]]:
        _, ancillary, _, source = receiver.recvmsg(100, 100)
        (level, kind, value), *_ = ancillary
        assert (level, kind) == (socket.IPPROTO_IP, socket.IP_TTL)
        return int.from_bytes(value, "little"), source

    with gateway.udp("internet") as server, gateway.udp("a-box") as client, gateway.counting() as grown:
        for end in (server, client):
            end.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
            end.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 60)
        for _ in range(10):
            client.sendto(b"?", (INTERNET, server.getsockname()[1]))
            left, source = ttl(server)
            server.sendto(b"!", source)
            assert (left, ttl(client)[0]) == (59, 59)
    fast, slow = (grown[f"{path}_outbound"] + grown[f"{path}_inbound"] for path in ("fast", "slow"))
    assert slow >= 2
    assert fast + slow >= 20
    assert bool(fast) == (gateway.mode == "xdp")


@pytest.mark.req("attacks-options")
def test_ip_options_are_passed(gateway: Gateway) -> None:
    timestamps = bytes([68, 12, 5, 0]) + bytes(8)
    with gateway.udp("a-box") as client:
        client.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, timestamps)
        for _ in range(4):
            assert ask(client, b"with options", ECHO) == b"with options"
