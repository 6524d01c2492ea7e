"""Several WANs: each host is who its packets' WAN says, and what came by a WAN is answered by it.

::

    a-box .2, b-box .3 ─ lan0 masq-gate wan0 203.0.113.1 ─────── exchange ─┬─ .10 internet
                                        wan1 192.0.2.1 ─ provider ─────────┴─ transit ─ far

The default route is by wan0, one by wan1 has a higher metric. provider takes no packets with others' addresses.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from netkit import MEET, Gateway, Wire, read, rules, soon, who

from xdpmasq.config import Pcp
from xdpmasq.lab import netns
from xdpmasq.lab.servers import EchoServer
from xdpmasq.lab.topology import FAR, PROVIDER, PUBLIC, PUBLIC_TOO, TRANSIT

IP_MTU_DISCOVER, IP_PMTUDISC_DONT = 10, 0  # linux/in.h

FAR_ECHO = (FAR, 7)
BY_WAN1 = ["via", PROVIDER, "dev", "wan1"]
ADDRESSES = [PUBLIC, PUBLIC_TOO]


@pytest.fixture(
    scope="module",
    params=[pytest.param(mode, marks=pytest.mark.xdist_group(f"wans-{mode}")) for mode in ("tc", "xdp")],
)
def lab(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with Gateway.in_new_lab(request.param, wans=2) as gateway:
        for role, address in (("internet", None), ("far", FAR)):
            EchoServer(gateway.lab, role, *([address] if address else []))
        yield gateway


@pytest.fixture
def two(lab: Gateway) -> Iterator[Gateway]:
    """Attached to both; watched for leaks."""
    wire = Wire(lab.lab)
    yield lab
    lab.tables.flush(lab.tables.live_slots())
    wire.check()


@contextlib.contextmanager
def rule(gateway: Gateway, *selector: str) -> Iterator[None]:
    """What fits is routed by wan1."""
    commands = [f"rule add {' '.join(selector)} table 2", f"route add default {' '.join(BY_WAN1)} table 2"]
    netns.ip_batch(commands, gateway.lab.namespace("masq-gate"))
    try:
        yield
    finally:
        undo = [command.replace(" add ", " del ") for command in reversed(commands)]
        netns.ip_batch(undo, gateway.lab.namespace("masq-gate"))


@contextlib.contextmanager
def failed_over(gateway: Gateway) -> Iterator[None]:
    """The default route leads to wan1."""
    gateway.gate("ip", "route", "replace", "default", *BY_WAN1)
    try:
        yield
    finally:
        gateway.gate("ip", "route", "replace", "default", "via", TRANSIT, "dev", "wan0")


def addresses(gateway: Gateway, *roles: str) -> list[str]:
    return [gateway.seen_as(role).split(":")[0] for role in roles]


def test_a_rule_sends_a_host_out_of_the_second(two: Gateway) -> None:
    with rule(two, "from", "192.168.0.3"):
        assert addresses(two, "a-box", "b-box") == [PUBLIC, PUBLIC_TOO]
        with two.udp("b-box") as client:
            assert who(client) == who(client, FAR_ECHO), "one mapping for all remotes by one WAN"
        assert two.opens("a-box", FAR_ECHO)
    assert addresses(two, "b-box") == [PUBLIC]


def test_an_algs_session_by_one_that_only_marks_lead_to(two: Gateway) -> None:
    """And the data connection that it announces."""
    marks = "chain marked { type filter hook prerouting priority mangle; ip saddr 192.168.0.2 meta mark set 7; }"
    other = ["default", *BY_WAN1, "metric", "200"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(rule(two, "fwmark 7"))
        stack.enter_context(rules(two, marks))
        two.gate("ip", "route", "del", *other)
        stack.callback(two.gate, "ip", "route", "add", *other)
        door = stack.enter_context(two.listen("far", 21, FAR))
        near = stack.enter_context(two.tcp("a-box", (FAR, 21)))
        far = stack.enter_context(door.accept()[0])
        near.sendall(b"PORT 192,168,0,2,200,21\r\n")
        *host, high, low = far.recv(100).decode().split()[1].split(",")
        assert ".".join(host) == PUBLIC_TOO
        listener = stack.enter_context(two.listen("a-box", 200 << 8 | 21))
        data = stack.enter_context(two.tcp("far", (PUBLIC_TOO, int(high) << 8 | int(low))))
        end = stack.enter_context(listener.accept()[0])
        data.sendall(b"a file")
        assert read(end, 6) == b"a file"


def test_by_protocol(two: Gateway) -> None:
    with rule(two, "from", "192.168.0.3", "ipproto", "tcp"):
        assert addresses(two, "b-box") == [PUBLIC]
        with two.connection("b-box") as connection:
            assert connection.public.startswith(f"{PUBLIC_TOO}:")
            connection.talk(20)


@pytest.mark.parametrize("called", ADDRESSES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@pytest.mark.parametrize("box", ["internet", "far", "a-box", "b-box", "masq-gate"])
def test_forward_is_reached_by_every_address(two: Gateway, box: str, protocol: str, called: str) -> None:
    with two.forward(protocol, "8080", "192.168.0.2:80"):
        if box == "masq-gate":
            two.way_through_lo()
        meeting = MEET[protocol](two, box, (called, 8080), "a-box", 80)
    assert meeting.called == f"{called}:8080"
    inside = box in ("a-box", "b-box")
    assert meeting.seen.split(":")[0] == (called if inside else meeting.client.split(":")[0])


def test_the_gateway_asks_from_one_address_for_anothers_forward(two: Gateway) -> None:
    with (
        two.forward("udp", "8080", "192.168.0.2:80"),
        two.udp("a-box", 80) as far,
        two.udp("masq-gate", address=PUBLIC) as near,
    ):
        two.way_through_lo()
        near.connect((PUBLIC_TOO, 8080))
        near.send(b"to")
        text, peer = far.recvfrom(100)
        assert (text, peer[0]) == (b"to", PUBLIC)
        far.sendto(b"fro", peer)
        assert near.recv(100) == b"fro"


@pytest.mark.parametrize("called", ADDRESSES)
def test_fragments_of_an_answer_leave_together(two: Gateway, called: str) -> None:
    with (
        two.forward("udp", "8080", "192.168.0.2:80"),
        two.udp("a-box", 80) as far,
        two.udp("far") as near,
    ):
        near.connect((called, 8080))
        near.send(bytes(4000))
        text, peer = far.recvfrom(5000)
        far.sendto(text, peer)
        assert near.recv(5000) == bytes(4000)


def test_a_datagram_client_may_go_over_to_the_other_wan(two: Gateway) -> None:
    """From the same port, as a peer of a VPN does when its first way is out of order."""
    with (
        two.forward("udp", "8080", "192.168.0.2:80"),
        two.udp("a-box", 80) as far,
        two.udp("far", 5000) as near,
    ):
        for called in (PUBLIC, PUBLIC_TOO, PUBLIC):
            near.sendto(b"to", (called, 8080))
            _, peer = far.recvfrom(100)
            far.sendto(b"fro", peer)
            assert near.recvfrom(100) == (b"fro", (called, 8080))


def fly(gateway: Gateway, ask: object) -> None:
    """In XDP mode: until the flow is carried by XDP, out and in."""
    if gateway.mode != "xdp":
        return

    def is_fast() -> bool:
        with gateway.counting() as grown:
            ask()  # type: ignore[operator]
        return bool(grown["fast_outbound"] and grown["fast_inbound"])

    soon(is_fast, "XDP carries the flow", timeout_s=5)


def test_failover_takes_effect_at_once_and_back(two: Gateway) -> None:
    with two.udp("a-box") as client:

        def seen() -> str:
            return who(client, FAR_ECHO).split(":")[0]

        assert seen() == PUBLIC
        fly(two, seen)
        with failed_over(two):
            soon(lambda: seen() == PUBLIC_TOO, "the agent has seen the new route", timeout_s=2)
            fly(two, seen)
            assert seen() == PUBLIC_TOO
        soon(lambda: seen() == PUBLIC, "the agent has seen the old route", timeout_s=2)
        fly(two, seen)
        assert seen() == PUBLIC


def test_xdp_carries_a_forwards_connection_by_the_second(two: Gateway) -> None:
    with (
        two.forward("tcp", "8080", "192.168.0.2:80"),
        two.listen("a-box", 80) as listener,
        two.tcp("far", (PUBLIC_TOO, 8080)) as near,
    ):
        far, _ = listener.accept()
        with far, two.counting() as grown:
            for number in range(20):
                near.sendall(b"to %02d" % number)
                assert far.recv(100) == b"to %02d" % number
                far.sendall(b"fro %02d" % number)
                assert near.recv(100) == b"fro %02d" % number
    if two.mode == "xdp":
        assert grown["fast_outbound"] >= 15
    else:
        assert grown["exit_other_wan"] >= 20
    assert not grown["drop_exit_route"]


@pytest.fixture
def narrow(two: Gateway) -> Iterator[Gateway]:
    """wan1 takes packets of at most 1,280 bytes."""
    two.gate("ip", "link", "set", "wan1", "mtu", "1280")
    yield two
    two.gate("ip", "link", "set", "wan1", "mtu", "1500")


@pytest.mark.req("4787-13a")
def test_an_answer_too_big_for_the_wan_of_the_question(narrow: Gateway) -> None:
    """The kernel, which would send it by wan0, does not look at wan1's MTU."""
    with (
        narrow.forward("udp", "8080", "192.168.0.2:80"),
        narrow.udp("a-box", 80) as host,
        narrow.udp("far") as client,
        narrow.counting() as grown,
    ):
        host.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
        client.connect((PUBLIC_TOO, 8080))
        client.send(b"question")
        _, peer = host.recvfrom(100)
        for length in (1252, 1253, 1400):
            host.sendto(bytes(length), peer)
            assert len(client.recv(2000)) == length
    assert grown["drop_exit_too_big"] == 2


@pytest.mark.req("4787-13")
def test_of_an_answer_too_big_and_not_to_be_cut_the_host_is_told(narrow: Gateway) -> None:
    with (
        narrow.forward("tcp", "8080", "192.168.0.2:80"),
        narrow.listen("a-box", 80) as listener,
        narrow.tcp("far", (PUBLIC_TOO, 8080)) as client,
        narrow.counting() as grown,
    ):
        with listener.accept()[0] as host:
            host.sendall(bytes(200_000))
        read = client.makefile("rb").read()
    assert (len(read), grown["drop_exit_too_big"] > 0) == (200_000, True)


def test_what_has_no_way_to_its_wan_is_dropped(two: Gateway) -> None:
    with (
        two.forward("udp", "8080", "192.168.0.2:80"),
        two.udp("a-box", 80) as far,
        two.udp("far", timeout_s=0.3) as near,
    ):
        near.connect((PUBLIC_TOO, 8080))
        near.send(b"to")
        _, peer = far.recvfrom(100)
        two.gate("ip", "route", "del", "default", *BY_WAN1)
        try:
            with two.counting() as grown:
                far.sendto(b"fro", peer)
                with pytest.raises(TimeoutError):
                    near.recv(100)
        finally:
            two.gate("ip", "route", "add", "default", *BY_WAN1, "metric", "200")
        assert grown["drop_exit_route"] == 1


def test_traceroute_shows_the_way_by_the_second(two: Gateway) -> None:
    with rule(two, "from", "192.168.0.3"):
        lines = two.lab.exec("b-box", ["traceroute", "-n", "-q1", "-w1", FAR]).stdout.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["192.168.0.1", PROVIDER, "203.0.113.254", FAR]


def test_a_changed_address_ends_only_its_own_sessions(two: Gateway) -> None:
    def readdress(address: str) -> None:
        lines = ["address flush dev wan1", f"address add {address}/24 dev wan1"]
        lines += [f"route add default {' '.join(BY_WAN1)} {more}" for more in ("metric 200", "table 2")]
        netns.ip_batch(lines, two.lab.namespace("masq-gate"))

    with rule(two, "from", "192.168.0.3"), two.connection("a-box") as connection, two.udp("b-box") as client:
        assert who(client).startswith(f"{PUBLIC_TOO}:")
        try:
            readdress("192.0.2.77")
            soon(lambda: two.status()["wans"][1]["external"] == "192.0.2.77", "the address is followed")
            assert who(client).startswith("192.0.2.77:")
            assert all(each["external"]["address"] != PUBLIC_TOO for each in two.sessions())
            connection.talk(5)
        finally:
            readdress(PUBLIC_TOO)
        soon(lambda: two.status()["wans"][1]["external"] == PUBLIC_TOO, "the address is followed")
        connection.talk(5)


def test_a_wan_that_goes_away_disturbs_nobody_and_comes_back(two: Gateway) -> None:
    gate = two.lab.namespace("masq-gate")
    with two.connection("a-box") as connection, two.forward("tcp", "8080", "192.168.0.2:80"):
        two.gate("ip", "link", "set", "wan1", "down")
        connection.talk(5)
        assert MEET["tcp"](two, "b-box", (PUBLIC_TOO, 8080), "a-box", 80).called == f"{PUBLIC_TOO}:8080"
        netns.ip_batch(["link set wan1 up", f"route add default {' '.join(BY_WAN1)} metric 200"], gate)
        time.sleep(0.2)  # an acknowledgement delayed until it left by the other WAN would be reset, rightly
        two.gate("ip", "link", "set", "wan0", "down")
        soon(lambda: "wan0" in two.hooks(), "both are there")
        with rule(two, "from", "192.168.0.3"):
            soon(lambda: addresses(two, "b-box") == [PUBLIC_TOO], "the second serves alone")
        assert MEET["tcp"](two, "b-box", (PUBLIC, 8080), "a-box", 80).called == f"{PUBLIC}:8080"
        netns.ip_batch(["link set wan0 up", f"route add default via {TRANSIT} dev wan0"], gate)
        soon(lambda: addresses(two, "a-box") == [PUBLIC], "the first serves again")
        connection.talk(5)


def test_status_and_names(two: Gateway) -> None:
    status = two.status()
    assert status["wans"] == [{"name": "wan0", "external": PUBLIC}, {"name": "wan1", "external": PUBLIC_TOO}]
    assert status["working"]
    assert two.masq("sessions", "list", "--wan", "wan1").returncode == 0
    refused = two.masq("attach", "--wan", "wan1", "--lan", "lan0", check=False).stderr
    assert "xdpmasq already runs on wan1" in refused
    assert "here it runs on wan0, wan1" in two.masq("status", "--wan", "wan9", check=False).stderr


# --- attaching -------------------------------------------------------------------------------------


@pytest.fixture
def bare_two() -> Iterator[Gateway]:
    """Not attached yet."""
    with Gateway.in_new_lab("tc", attach=False, wans=2) as gateway:
        EchoServer(gateway.lab)
        yield gateway


def test_what_attach_asks_of_several(bare_two: Gateway) -> None:
    """One with an address is enough; the other is taken in when it has one. rp_filter is loose until detach."""
    gateway, namespace = bare_two, bare_two.lab.namespace("masq-gate")
    netns.ip_batch([f"address add {PUBLIC}/32 dev wan1"], namespace)
    assert f"wan0 and wan1 both have {PUBLIC}" in gateway.attach(check=False)
    netns.ip_batch(["address flush dev wan0", "address flush dev wan1"], namespace)
    assert "wan0 and wan1 have no IPv4 address" in gateway.attach(check=False)
    gateway.sysctl("net.ipv4.conf.wan1.rp_filter", 1)
    gateway.readdress(f"{PUBLIC}/24")
    assert f"out of wan0 as {PUBLIC}, wan1 once it has an address" in gateway.attach()
    assert gateway.opens()
    netns.ip_batch([f"address add {PUBLIC_TOO}/24 dev wan1"], namespace)
    with rule(gateway, "from", "192.168.0.3"):
        soon(lambda: gateway.opens("b-box") and addresses(gateway, "b-box") == [PUBLIC_TOO], "wan1 is taken in")
    soon(lambda: gateway.sysctl("net.ipv4.conf.wan1.rp_filter") == "2", "rp_filter is loose")
    gateway.kill_agent()
    refused = gateway.masq("attach", "--wan", "wan1", "--wan", "wan0", "--lan", "lan0", check=False).stderr
    assert "is in use: by the xdpmasq of WAN wan0" in refused
    gateway.masq("detach", "--wan", "wan1")
    assert not gateway.is_attached
    assert gateway.sysctl("net.ipv4.conf.wan1.rp_filter") == "1"


def test_one_without_ethernet_header() -> None:
    """A line as ppp is, beside an Ethernet: what came by either is answered by it, whichever the kernel prefers."""
    with Gateway.in_new_lab("tc", wan="tun", wans=2) as gateway, gateway.forward("tcp", "8080", "192.168.0.2:80"):
        for called in ADDRESSES:
            assert MEET["tcp"](gateway, "far", (called, 8080), "a-box", 80).called == f"{called}:8080"
        gateway.gate("ip", "route", "add", "default", "via", TRANSIT, "dev", "wan0", "metric", "300")
        with failed_over(gateway):
            for called in ADDRESSES:
                for box in ("far", "b-box"):
                    assert MEET["tcp"](gateway, box, (called, 8080), "a-box", 80).called == f"{called}:8080"


def test_hosts_are_given_ports_of_the_wan_that_they_leave_by(bare_two: Gateway) -> None:
    """By NAT-PMP (RFC 6886 sections 3.2 and 3.3), and that is where strangers reach them."""
    bare_two.attach_with(pcp=Pcp(enabled=True))
    with rule(bare_two, "from", "192.168.0.3", "iif", "lan0"):
        for box, public in (("a-box", PUBLIC), ("b-box", PUBLIC_TOO)):
            with bare_two.udp(box) as asker, bare_two.udp(box, 4000) as host, bare_two.udp("far") as stranger:
                asker.connect(("192.168.0.1", 5351))
                asker.send(bytes(2))
                assert asker.recv(20)[8:] == IPv4Address(public).packed
                asker.send(struct.pack("!BBxxHHI", 0, 1, 4000, 0, 600))
                result, port = struct.unpack_from("!2xH6xH", asker.recv(20))
                assert result == 0
                stranger.sendto(b"to", (public, port))
                _, peer = host.recvfrom(100)
                host.sendto(b"fro", peer)
                assert stranger.recvfrom(100) == (b"fro", (public, port))
