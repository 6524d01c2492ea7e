"""The gateway's own connections and services work untouched, whatever ports they use.

::

    LAN boxes .2 .3 .4 ─ lan0 192.168.0.1 masq-gate 203.0.113.1 wan0 ─ .10 internet: nginx, dnsmasq, sshd, echo
"""

import socket
from collections.abc import Iterator

import pytest
from netkit import CURL, ECHO, GATE, Gateway, ask, soon, who

from xdpmasq.lab.servers import ECHO_PORT, EchoServer, WebServer
from xdpmasq.lab.topology import INTERNET, PUBLIC

IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_PMTUDISC_DO, IP_RECVERR, IP_MTU = 10, 0, 2, 11, 14  # linux/in.h
MSG_ERRQUEUE = 0x2000


@pytest.fixture
def gate_web(gateway: Gateway) -> Iterator[WebServer]:
    server = WebServer(gateway.lab, GATE, PUBLIC)
    yield server
    server.stop()
    server.directory.rename(server.directory.with_name(f"old-{id(server)}"))


def test_its_own_programs(gateway: Gateway, servers: object) -> None:
    web = servers.web  # type: ignore[attr-defined]
    done = gateway.gate("sh", "-c", f"{' '.join(CURL)} {web.big_url} | sha256sum")
    assert done.split()[0] == web.big_sha256
    gateway.gate("ping", "-n", "-c3", "-i0.05", "-W1", INTERNET)
    assert gateway.gate("dig", "+short", "+tries=1", f"@{INTERNET}", "own.lab.test").strip() == INTERNET
    assert INTERNET in gateway.gate("traceroute", "-n", "-q1", "-w1", "-m2", INTERNET)
    gateway.gate("ping", "-n", "-c1", "-W1", "192.168.0.2")


@pytest.mark.req("6888-9")
def test_pcp_is_off_by_default(gateway: Gateway) -> None:
    assert gateway.tables.manifest["pcp"]["enabled"] is False
    with gateway.udp("a-box") as client:
        client.connect(("192.168.0.1", 5351))
        client.send(b"\0\0")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)


def test_it_pings_beside_a_host_with_the_same_identifier(gateway: Gateway) -> None:
    for box in ("a-box", GATE, "b-box"):
        gateway.lab.exec(box, ["ping", "-n", "-q", "-c2", "-i0.02", "-W1", "-e1234", INTERNET])


@pytest.mark.parametrize("box", ["internet", "a-box"], ids=["from outside", "from inside"])
def test_a_web_server_on_the_public_address(gateway: Gateway, gate_web: WebServer, box: str) -> None:
    done = gateway.lab.exec(box, ["sh", "-c", f"{' '.join(CURL)} {gate_web.big_url} | sha256sum"])
    assert done.stdout.split()[0] == gate_web.big_sha256


@pytest.mark.parametrize("port", [1025, 20_000, 33_000, 61_500])
def test_incoming_on_any_port(gateway: Gateway, port: int) -> None:
    with gateway.listen(GATE, port) as listener, gateway.tcp("internet", (PUBLIC, port)) as far:
        near, _ = listener.accept()
        with near:
            far.sendall(b"hello")
            assert near.recv(10) == b"hello"
            near.sendall(b"world")
            assert far.recv(10) == b"world"


@pytest.mark.parametrize("port", [1026, 20_007, 61_507])
def test_outgoing_from_a_port_of_the_pool(gateway: Gateway, servers: object, port: int) -> None:
    web = servers.web  # type: ignore[attr-defined]
    output = gateway.gate(*CURL, "--local-port", str(port), "-o/dev/null", "-w%{local_port}", f"{web.url}?{port}")
    assert output == str(port)
    soon(lambda: f"{PUBLIC}:{port}" in {each.endpoint for each in web.clients()}, "nginx has logged it")


@pytest.mark.req("4787-3")
@pytest.mark.req("attacks-port_shadow")
def test_a_socket_on_a_port_that_a_host_is_mapped_to(gateway: Gateway) -> None:
    """Towards the same remote endpoint, too: both go on, and neither gets the other's answers."""
    with gateway.udp("a-box") as host:
        port = int(who(host).rpartition(":")[2])
        with gateway.udp(GATE, port) as own:
            for number in range(10):
                own.sendto(b"own %d" % number, ECHO)
                host.sendto(b"host %d" % number, ECHO)
                assert own.recv(100) == b"own %d" % number
                assert host.recv(100) == b"host %d" % number
        assert ask(host, b"alone again") == b"alone again"


@pytest.mark.req("attacks-port_shadow")
def test_no_mapping_takes_a_port_on_which_the_gateway_listens(gateway: Gateway) -> None:
    """A pool of few ports, most of them listened on, would show it sooner; here by chance in 36,000."""
    listening = gateway.udp(GATE, 20_001)
    with listening:
        for _ in range(30):
            assert not gateway.seen_as("b-box").endswith(":20001")
        with gateway.udp("internet") as far:
            far.sendto(b"for the gateway", (PUBLIC, 20_001))
            assert listening.recv(100) == b"for the gateway"


# --- its ICMP errors -------------------------------------------------------------------------------


@pytest.mark.req("attacks-leak")
@pytest.mark.req("attacks-loop")
def test_a_ttl_that_ends_at_the_gateway_inbound(gateway: Gateway) -> None:
    """Its Time Exceeded quotes a packet already translated: the box's address must not be in it."""
    with gateway.udp("internet") as server, gateway.udp("a-box") as client:
        client.sendto(b"?", (INTERNET, server.getsockname()[1]))
        _, source = server.recvfrom(10)
        server.connect(source)
        server.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        server.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)  # tells also of errors that are not final
        server.send(b"one hop only")
        with pytest.raises(OSError, match="No route to host"):  # what Linux makes of Time Exceeded
            server.recv(10)
        _, _, _, quoted_destination = server.recvmsg(100, 512, MSG_ERRQUEUE)
        assert quoted_destination == source


@pytest.mark.req("attacks-leak")
@pytest.mark.req("4787-13")
def test_too_big_for_the_lan(gateway: Gateway) -> None:
    """Inbound with DF; its Fragmentation Needed leads the outside to the LAN's MTU."""
    gateway.gate("ip", "link", "set", "lan0", "mtu", "1300")
    try:
        with gateway.udp("internet") as server, gateway.udp("a-box") as client:
            server.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
            for _ in range(3):
                client.sendto(b"?", (INTERNET, server.getsockname()[1]))
                _, source = server.recvfrom(10)
            server.connect(source)
            server.send(bytes(1400))
            soon(lambda: server.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1300, "the server knows the MTU")
            server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # takes the error along
            server.send(bytes(1200))
            assert len(client.recv(2000)) == 1200
    finally:
        gateway.gate("ip", "link", "set", "lan0", "mtu", "1500")
        gateway.lab.exec("internet", ["ip", "route", "flush", "cache"])


@pytest.fixture
def narrow_wan(gateway: Gateway) -> Iterator[None]:
    gateway.gate("ip", "link", "set", "wan0", "mtu", "1300")
    try:
        yield
    finally:
        gateway.gate("ip", "link", "set", "wan0", "mtu", "1500")
        gateway.lab.exec("a-box", ["ip", "route", "flush", "cache"])


@pytest.mark.req("4787-13")
@pytest.mark.usefixtures("narrow_wan")
def test_too_big_for_the_wan(gateway: Gateway) -> None:
    """Outbound with DF: the box learns the WAN's MTU, also when the flow rides XDP by then."""
    with gateway.udp("a-box") as client:
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        client.connect(ECHO)
        for _ in range(3):
            assert ask(client, b"small") == b"small"
        client.send(bytes(1400))
        soon(lambda: client.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1300, "the box knows the MTU")
        client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # takes the error along
        text = bytes(1300 - 28)
        assert ask(client, text) == text


@pytest.mark.req("4787-13a")
@pytest.mark.usefixtures("narrow_wan")
def test_too_big_for_the_wan_without_df(gateway: Gateway) -> None:
    with (
        gateway.udp("internet", address=INTERNET) as server,
        gateway.udp("a-box") as client,
        gateway.lab.capture("internet", "eth0", "ip[6:2] & 0x3fff != 0 and src host 203.0.113.1") as fragments,
    ):
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        for number in range(4):
            text = bytes([number]) * 1400
            client.sendto(text, server.getsockname())
            assert server.recv(2000) == text
        assert len(fragments.stop()) == 8


def test_hosts_talk_to_the_gateway_itself(gateway: Gateway) -> None:
    """Its LAN address, and its public one from inside."""
    for address in ("192.168.0.1", PUBLIC):
        server = EchoServer(gateway.lab, GATE, address)
        with gateway.udp("a-box") as client:
            for _ in range(5):
                assert ask(client, b"hello", (address, ECHO_PORT)) == b"hello"
            assert who(client, (address, ECHO_PORT)).startswith("192.168.0.2:")
        server.stop()
