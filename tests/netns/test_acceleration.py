"""What XDP carries, and when it has to ask the kernel anew.

The standard lab, its links prepared for XDP: ``LAN boxes ─ lan0 masq-gate wan0 ─ internet, transit ─ far``.
"""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from netkit import GATE, Gateway, Stream, Wire, answers, ask, seen, soon, strangers_program, who

from xdpmasq.lab.servers import ECHO_PORT, EchoServer
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC, TRANSIT
from xdpmasq.net import netdev, xdp

XDP_PASS = 2
pytestmark = pytest.mark.xdist_group("acceleration")


@contextlib.contextmanager
def new_gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("xdp", attach=False) as gateway:
        EchoServer(gateway.lab)
        EchoServer(gateway.lab, "far", FAR)
        yield gateway


@pytest.fixture(scope="module")
def _shared() -> Iterator[Gateway]:
    with new_gateway() as gateway:
        gateway.attach()
        yield gateway


@pytest.fixture
def gateway(_shared: Gateway) -> Iterator[Gateway]:
    """For tests that leave it able to accelerate."""
    wire = Wire(_shared.lab)
    yield _shared
    wire.check()


@pytest.fixture
def own_gateway() -> Iterator[Gateway]:
    with new_gateway() as gateway:
        wire = Wire(gateway.lab)
        yield gateway
        wire.check()


def fast(grown: dict[str, int]) -> int:
    return grown["fast_outbound"] + grown["fast_inbound"]


def slow(grown: dict[str, int]) -> int:
    return grown["slow_outbound"] + grown["slow_inbound"]


def rides(gateway: Gateway, client: socket.socket, server: tuple[str, int] = (INTERNET, ECHO_PORT)) -> bool:
    with gateway.counting() as grown:
        ask(client, b"does it ride?", server)
    return fast(grown) >= 2


def take_off(gateway: Gateway, client: socket.socket) -> None:
    """The first packets teach XDP the flow; an agent still busy with a change has it taught again."""
    soon(lambda: rides(gateway, client), "the flow rides XDP")


def test_established_udp_rides_xdp(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client:
        take_off(gateway, client)
        with gateway.counting() as grown:
            for _ in range(100):
                ask(client, b"fly")
    assert (grown["fast_outbound"], grown["fast_inbound"]) == (100, 100)
    assert slow(grown) == 0


def test_established_tcp_rides_xdp(gateway: Gateway) -> None:
    with gateway.connection() as connection:
        connection.talk(5)
        with gateway.counting() as grown:
            connection.talk(100)
        assert fast(grown) >= 200
        assert slow(grown) == 0
        with gateway.counting() as grown:
            connection.near.close()
            assert connection.far.recv(1) == b""
        assert grown["up_tcp_flags"] >= 1  # a FIN is shown to the kernel, and to its conntrack


def test_fragments_go_through_the_kernel(gateway: Gateway) -> None:
    with gateway.udp("a-box") as client:
        take_off(gateway, client)
        with gateway.counting() as grown:
            assert ask(client, bytes(5000)) == bytes(5000)
        assert fast(grown) == 0
        assert rides(gateway, client)


def test_what_rides_xdp_does_not_meet_the_forward_chain(gateway: Gateway) -> None:
    """As with a flowtable; new sessions do meet it."""
    with gateway.udp("a-box") as client:
        take_off(gateway, client)
        chain = "add chain ip stop f { type filter hook forward priority 0; policy drop; }"
        gateway.gate("nft", f"add table ip stop; {chain}")
        try:
            with gateway.counting() as grown:
                for _ in range(50):
                    ask(client, b"fly")
            assert grown["fast_outbound"] == 50
            assert not gateway.opens("b-box")
        finally:
            gateway.gate("nft", "delete table ip stop")


def test_a_flow_shows_itself_to_the_kernel_again_and_again(own_gateway: Gateway) -> None:
    own_gateway.attach_with(rearm_s=1)
    stream = Stream(own_gateway, gap_s=0.01)
    with own_gateway.counting() as grown:
        soon(lambda: own_gateway.counters()["up_not_armed"] >= 6, "the flow is rearmed", timeout_s=8)
    assert stream.stop() == 0
    assert slow(grown) <= 14
    assert fast(grown) > 100


@pytest.mark.parametrize(("interface", "role", "port"), [("lan0", "switch", "gate-lan0"), ("wan0", "exchange", GATE)])
def test_an_interface_that_takes_no_frames_is_not_redirected_to(
    own_gateway: Gateway, interface: str, role: str, port: str
) -> None:
    """A veth whose peer has no GRO would lose every frame: the kernel carries them, and `attach` says why."""
    own_gateway.lab.exec(role, ["ethtool", "-K", port, "gro", "off"])
    told = own_gateway.attach()
    assert [line.split()[0] for line in told.splitlines() if "takes no frames" in line] == [interface]
    with own_gateway.udp("a-box") as client:
        for _ in range(20):
            ask(client, b"?")


# --- next hops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("packets", ["rides", "is slow"])
def test_a_lan_hosts_new_mac_is_followed(gateway: Gateway, packets: str) -> None:
    mac = "02:00:00:00:0a:01" if packets == "rides" else "02:00:00:00:0a:02"
    with gateway.udp("a-box") as client:
        if packets == "rides":
            take_off(gateway, client)
        gateway.set_mac("a-box", mac)
        gateway.announce("a-box", HOSTS["a-box"], mac)
        soon(lambda: answers(client), "the new MAC is used")
        take_off(gateway, client)


def test_an_upstream_routers_new_mac_is_followed(gateway: Gateway) -> None:
    server = (FAR, ECHO_PORT)
    with gateway.udp("a-box") as client:
        soon(lambda: rides(gateway, client, server), "the flow rides XDP")
        gateway.set_mac("transit", "02:00:00:00:0b:01")
        gateway.announce("transit", TRANSIT, "02:00:00:00:0b:01")
        soon(lambda: answers(client, server), "the new MAC is used")
        soon(lambda: rides(gateway, client, server), "the flow rides XDP again")


def test_a_route_change_is_followed(gateway: Gateway) -> None:
    """The way to 198.51.100.11, which transit and internet both know, moves from one to the other."""
    address = "198.51.100.11"
    gateway.lab.exec("far", ["ip", "address", "add", f"{address}/24", "dev", "eth0"])
    gateway.lab.exec("internet", ["ip", "address", "add", f"{address}/32", "dev", "eth0"])
    there, here = EchoServer(gateway.lab, "far", address), EchoServer(gateway.lab, "internet", address)
    server = (address, ECHO_PORT)
    with gateway.udp("a-box") as client:
        soon(lambda: rides(gateway, client, server), "the flow rides XDP")
        gateway.gate("ip", "route", "add", address, "via", INTERNET)
        there.stop()
        soon(lambda: answers(client, server), "the new way is taken")
        soon(lambda: rides(gateway, client, server), "the flow rides XDP on the new way")
        gateway.gate("ip", "route", "del", address)
        here.stop()
    gateway.lab.exec("internet", ["ip", "address", "del", f"{address}/32", "dev", "eth0"])


# --- without XDP -----------------------------------------------------------------------------------


@pytest.mark.req("reliability-agent_killed")
def test_traffic_goes_on_when_somebody_detaches_xdp(own_gateway: Gateway) -> None:
    """TC alone carries everything; the agent is dead, so nobody puts XDP back."""
    own_gateway.attach()
    own_gateway.kill_agent()
    with own_gateway.connection() as connection, own_gateway.udp("a-box") as client:
        take_off(own_gateway, client)
        connection.talk(5)
        endpoint = who(client)
        for interface in ("lan0", "wan0"):
            own_gateway.gate("ip", "link", "set", interface, "xdpdrv", "off")
            connection.talk(20)
            for _ in range(20):
                assert who(client) == endpoint
            assert own_gateway.opens("b-box")
        assert not rides(own_gateway, client)


@pytest.mark.parametrize("interface", ["lan0", "wan0"])
def test_the_agent_puts_xdp_back(gateway: Gateway, interface: str) -> None:
    stream = Stream(gateway)
    with gateway.inside():
        before = netdev.link(interface).xdp_prog_id
    gateway.gate("ip", "link", "set", interface, "xdpdrv", "off")
    soon(lambda: xdp_program(gateway, interface) == before, "the program is back")
    assert stream.stop() == 0
    with gateway.udp("a-box") as client:
        take_off(gateway, client)


def xdp_program(gateway: Gateway, interface: str) -> int:
    with gateway.inside():
        return netdev.link(interface).xdp_prog_id


@pytest.mark.parametrize(("interface", "direction"), [("wan0", "ingress"), ("wan0", "egress"), ("lan0", "egress")])
def test_the_agent_puts_tc_back(gateway: Gateway, interface: str, direction: str) -> None:
    # No traffic meanwhile: what the gateway forwards without its program is not translated.
    gateway.take_off(interface, direction)
    assert direction not in gateway.on(interface)
    soon(lambda: direction in gateway.on(interface), "the program is back")
    assert gateway.opens()


def test_somebody_elses_program_in_place_of_ours_is_left_alone(own_gateway: Gateway) -> None:
    """The flows take the kernel's path then, and everything else is followed as before."""
    own_gateway.attach()
    with own_gateway.inside():
        index = netdev.link("lan0").index
        xdp.detach(index, "native")
        with strangers_program("xdp", XDP_PASS) as program:
            xdp.attach(index, program.fd, "native")
            stranger = program.id
    soon(lambda: own_gateway.hooks() == {"wan0": "xdp", "lan0": "tc"}, "the agent has noticed")
    assert own_gateway.opens()
    assert xdp_program(own_gateway, "lan0") == stranger
    own_gateway.readdress("203.0.113.99/24")
    with own_gateway.udp("b-box") as client:
        soon(lambda: seen(client).startswith("203.0.113.99:"), "the WAN's new address is followed")
    own_gateway.gate("ip", "link", "set", "lan0", "xdpdrv", "off")
    soon(lambda: own_gateway.hooks() == {"wan0": "xdp", "lan0": "xdp"}, "the hook that is free again is taken")
    with own_gateway.udp("c-box") as client:
        take_off(own_gateway, client)


def test_the_gateway_keeps_its_ears(gateway: Gateway) -> None:
    """What is addressed to the gateway itself goes past XDP to its own sockets."""
    server = EchoServer(gateway.lab, GATE, PUBLIC)
    with gateway.udp("internet") as client:
        for _ in range(5):
            assert ask(client, b"hello", (PUBLIC, ECHO_PORT)) == b"hello"
    server.stop()
