"""What XDP carries, and when it has to ask the kernel anew.

The standard lab, its links prepared for XDP: ``LAN boxes ─ lan0 masq-gate wan0 ─ internet, transit ─ far``.
"""

import socket
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from netkit import GATE, Connection, Gateway, Stream, Wire, ask, soon, who

from xdpmasq import netdev
from xdpmasq.lab.servers import ECHO_PORT, EchoServer
from xdpmasq.lab.topology import FAR, INTERNET, PUBLIC, TRANSIT


@pytest.fixture
def fresh() -> Iterator[Gateway]:
    with Gateway.in_new_lab("xdp") as gateway:
        EchoServer(gateway.lab)
        wire = Wire(gateway.lab)
        yield gateway
        wire.check()


def fast(grown: dict[str, int]) -> int:
    return grown["fast_outbound"] + grown["fast_inbound"]


def slow(grown: dict[str, int]) -> int:
    return grown["slow_outbound"] + grown["slow_inbound"]


def warm_up(client: socket.socket) -> None:
    """The first packets teach XDP the flow."""
    for _ in range(3):
        ask(client, b"warm up")


def rides(gateway: Gateway, client: socket.socket) -> bool:
    with gateway.counting() as grown:
        ask(client, b"does it ride?")
    return fast(grown) >= 2


def set_mac(gateway: Gateway, role: str, mac: str, interface: str = "eth0") -> None:
    """The address changes; what the kernel flushes by that, addresses' routes, is put back. Nobody is told."""
    routes = gateway.lab.exec(role, ["ip", "route", "show", "default"]).stdout.split("\n")[0]
    gateway.lab.exec(role, ["ip", "link", "set", interface, "down"])
    gateway.lab.exec(role, ["ip", "link", "set", interface, "address", mac, "up"])
    if routes:
        gateway.lab.exec(role, ["ip", "route", "replace", *routes.split()])


def announce(gateway: Gateway, role: str, address: str) -> None:
    """Gratuitous ARP, as a router that took over an address sends it."""
    gateway.lab.exec(role, ["arping", "-q", "-U", "-c1", "-w1", "-I", "eth0", address], check=False)


def test_established_udp_rides_xdp(fresh: Gateway) -> None:
    with fresh.udp("a-box") as client:
        warm_up(client)
        with fresh.counting() as grown:
            for _ in range(100):
                ask(client, b"fly")
    assert (grown["fast_outbound"], grown["fast_inbound"]) == (100, 100)
    assert slow(grown) == 0


def test_established_tcp_rides_xdp(fresh: Gateway) -> None:
    with fresh.connection() as connection:
        connection.talk(5)
        with fresh.counting() as grown:
            connection.talk(100)
        assert fast(grown) >= 200
        assert slow(grown) == 0
        with fresh.counting() as grown:
            connection.near.close()
            soon(lambda: connection.far.recv(1) == b"", "the end is seen")
            connection.far.close()
        assert slow(grown) >= 2  # FINs are shown to the kernel, and to its conntrack


def test_ping_and_fragments_leave_xdp_alone(fresh: Gateway) -> None:
    with fresh.udp("a-box") as client:
        warm_up(client)
        with fresh.counting() as grown:
            assert ask(client, bytes(5000)) == bytes(5000)
        assert fast(grown) == 0
        assert rides(fresh, client)


def test_no_kernel_no_forwarding_yet_xdp_carries(fresh: Gateway) -> None:
    """A forward chain that drops everything does not see what XDP carries, as with a flowtable."""
    with fresh.udp("a-box") as client:
        warm_up(client)
        with fresh.counting() as grown:
            fresh.gate("nft", "add table ip stop; add chain ip stop f { type filter hook forward priority 0; policy drop; }")
            for _ in range(50):
                ask(client, b"fly")
        assert grown["fast_outbound"] == 50
        assert not fresh.opens("b-box")


def test_a_flow_shows_itself_to_the_kernel_again_and_again() -> None:
    with Gateway.in_new_lab("xdp", attach=False) as gateway:
        EchoServer(gateway.lab)
        gateway.attach_with(rearm_s=1)
        stream = Stream(gateway, gap_s=0.01)
        with gateway.counting() as grown:
            soon(lambda: gateway.counters()["up_not_armed"] >= 6, "the flow is rearmed", timeout_s=6)
        sent, received = stream.stop()
        assert sent == received
        assert slow(grown) <= 12
        assert fast(grown) > 100


# --- next hops -------------------------------------------------------------------------------------


def test_a_lan_hosts_new_mac_is_followed(fresh: Gateway) -> None:
    with fresh.udp("a-box") as client:
        warm_up(client)
        assert rides(fresh, client)
        set_mac(fresh, "a-box", "02:00:00:00:0a:01")
        # The host speaks first (a new ARP entry is learned from its request), as hosts do.
        fresh.lab.exec("a-box", ["arping", "-q", "-U", "-c1", "-w1", "-I", "eth0", "192.168.0.2"], check=False)
        soon(lambda: _answers(client), "the new MAC is used")
        warm_up(client)
        assert rides(fresh, client)


def test_an_upstream_routers_new_mac_is_followed(fresh: Gateway) -> None:
    EchoServer(fresh.lab, "far", FAR)
    server = (FAR, ECHO_PORT)
    with fresh.udp("a-box") as client:
        for _ in range(3):
            ask(client, b"warm up", server)
        set_mac(fresh, "transit", "02:00:00:00:0b:01")
        announce(fresh, "transit", TRANSIT)
        soon(lambda: _answers(client, server), "the new MAC is used")
        with fresh.counting() as grown:
            for _ in range(10):
                ask(client, b"again", server)
        assert fast(grown) >= 16


def _answers(client: socket.socket, server: tuple[str, int] = (INTERNET, ECHO_PORT)) -> bool:
    client.settimeout(0.2)
    try:
        return ask(client, b"?", server) == b"?"
    except TimeoutError:
        return False
    finally:
        client.settimeout(2)


def test_a_route_change_is_followed(fresh: Gateway) -> None:
    """far moves behind another router: internet takes its address, and a host route leads there."""
    fresh.lab.exec("internet", ["ip", "address", "add", f"{FAR}/32", "dev", "eth0"])
    EchoServer(fresh.lab, "far", FAR)
    EchoServer(fresh.lab, "internet", FAR)
    with fresh.udp("a-box") as client, fresh.lab.capture("far", "eth0", "udp") as at_far:
        for _ in range(5):
            ask(client, b"?", (FAR, ECHO_PORT))
        fresh.gate("ip", "route", "add", FAR, "via", INTERNET)
        # The kernel tells the agent of the change, which takes it a moment.
        soon(lambda: fresh.tables.settings["disarmed_at"] == max_armed(fresh), "", 0.1) if False else None
        soon(lambda: _route_is(fresh, INTERNET), "the route is there")
        for _ in range(50):
            ask(client, b"?", (FAR, ECHO_PORT))
        before = len(at_far.stop())
    with fresh.lab.capture("far", "eth0", "udp") as at_far, fresh.udp("a-box") as client:
        for _ in range(10):
            ask(client, b"?", (FAR, ECHO_PORT))
        assert at_far.stop() == []
    assert before < 2 * 55  # not all of them went the old way


def max_armed(gateway: Gateway) -> int:
    tables = gateway.tables
    return int(tables.sessions["out"]["armed_at"][tables.live_slots()].max())


def _route_is(gateway: Gateway, via: str) -> bool:
    with gateway.inside():
        route = netdev.route_to(IPv4Address(FAR))
    return route is not None and str(route.gateway) == via


# --- without XDP -----------------------------------------------------------------------------------


@pytest.mark.req("reliability-agent_killed")
@pytest.mark.parametrize("interface", ["lan0", "wan0"])
def test_traffic_goes_on_when_somebody_detaches_xdp(fresh: Gateway, interface: str) -> None:
    fresh.kill_agent()  # so that nobody puts it back
    with fresh.connection() as connection, fresh.udp("a-box") as client:
        warm_up(client)
        connection.talk(5)
        endpoint = who(client)
        fresh.gate("ip", "link", "set", interface, "xdpdrv", "off")
        connection.talk(20)
        for _ in range(20):
            assert who(client) == endpoint
        assert fresh.opens("b-box")


@pytest.mark.parametrize("interface", ["lan0", "wan0"])
def test_the_agent_puts_xdp_back(fresh: Gateway, interface: str) -> None:
    def program() -> int:
        with fresh.inside():
            return netdev.link(interface).xdp_prog_id

    stream = Stream(fresh)
    before = program()
    fresh.gate("ip", "link", "set", interface, "xdpdrv", "off")
    soon(lambda: program() == before, "the program is back")
    sent, received = stream.stop()
    assert sent == received
    with fresh.udp("a-box") as client:
        warm_up(client)
        assert rides(fresh, client)


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_the_agent_puts_tc_back(fresh: Gateway, direction: str) -> None:
    def present() -> bool:
        with fresh.inside():
            programs = netdev.tc_programs(netdev.link("wan0").index)
        return direction in {each.direction for each in programs if each.name == "xdpmasq"}

    fresh.gate("tc", "filter", "del", "dev", "wan0", direction)
    soon(present, "the filter is back")
    assert fresh.opens()


def test_somebody_elses_program_replacing_ours_does_not_stop_the_agent(fresh: Gateway, tmp_path: object) -> None:
    """Forced onto the hook, it stays; the flows then take the kernel's path, and all else goes on as before."""
    with fresh.inside():
        index = netdev.link("lan0").index
        netdev.xdp_detach(index, "native")
        netdev.xdp_attach(index, _pass_program(), "native")
    soon(lambda: fresh.hooks()["lan0"] == "tc", "the agent has noticed")
    fresh.gate("ip", "address", "add", "203.0.113.99/24", "dev", "wan0")
    fresh.gate("ip", "address", "del", f"{PUBLIC}/24", "dev", "wan0")
    fresh.gate("ip", "route", "replace", "default", "via", TRANSIT)
    soon(lambda: fresh.opens() and fresh.seen_as("b-box").startswith("203.0.113.99:"), "the new address is used")


def _pass_program() -> int:
    import struct  # noqa: PLC0415

    from xdpmasq import bpf  # noqa: PLC0415

    # r0 = XDP_PASS; exit
    code = struct.pack("<BBhiBBhi", 0xB7, 0, 0, 2, 0x95, 0, 0, 0)
    return bpf._load(code, bpf.PROG_TYPES["xdp"], "somebody")


def test_a_veth_without_gro_is_not_redirected_to() -> None:
    """It would lose every frame: the flows go through the kernel, and `status` says why."""
    with Gateway.in_new_lab("xdp", attach=False) as gateway:
        EchoServer(gateway.lab)
        gateway.lab.exec("exchange", ["ethtool", "-K", "masq-gate", "gro", "off"])
        assert "takes no frames" in gateway.attach()
        with gateway.udp("a-box") as client:
            for _ in range(20):
                ask(client, b"?")


def test_gate_keeps_its_ears(fresh: Gateway) -> None:
    """What is addressed to the gateway itself goes past XDP to its own sockets."""
    EchoServer(fresh.lab, GATE, PUBLIC)
    with fresh.udp("internet") as client:
        for _ in range(5):
            assert ask(client, b"hello", (PUBLIC, ECHO_PORT)) == b"hello"


__all__ = ["Connection"]
