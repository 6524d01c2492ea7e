"""Interfaces and addresses that come, go and change while xdpmasq is attached.

The standard lab, ``LAN boxes ─ lan0 masq-gate wan0 ─ internet (echo on .10)``, and variants:

* two LANs: d-box .2 ─ switch ─ lan1 192.168.1.1 masq-gate
* a WAN without Ethernet header: masq-gate wan0 ═ tun ═ ppp0 transit
"""

import time
from collections.abc import Iterator
from functools import partial

import pytest
from netkit import GATE, Gateway, Stream, Wire, answers, ask, internal, read, seen, soon, who

from xdpmasq.lab.servers import ECHO_PORT, EchoServer
from xdpmasq.lab.snapshot import differences, snapshot
from xdpmasq.lab.topology import INTERNET, PUBLIC, TRANSIT
from xdpmasq.net import netdev

in_tc = pytest.mark.parametrize("mode", ["tc"], indirect=True)


@pytest.fixture(scope="module")
def unwatched(request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with Gateway.in_new_lab(request.param) as gateway:
        EchoServer(gateway.lab)
        yield gateway


@pytest.fixture
def moving(unwatched: Gateway) -> Iterator[Gateway]:
    """A gateway whose interfaces tests change and put back."""
    wire = Wire(unwatched.lab)
    yield unwatched
    wire.check()
    assert unwatched.agent_pid


both = pytest.mark.parametrize(
    "unwatched",
    [pytest.param(mode, marks=pytest.mark.xdist_group(f"interfaces-{mode}")) for mode in ("tc", "xdp")],
    indirect=True,
    ids=["tc", "xdp"],
)


# --- addresses -------------------------------------------------------------------------------------


@both
@pytest.mark.req("reliability-address")
def test_a_new_wan_address_is_used_within_a_second(moving: Gateway) -> None:
    with moving.connection() as connection, moving.udp("b-box") as client:
        old = who(client)
        connection.talk()
        moving.readdress("203.0.113.77/24")
        soon(lambda: seen(client).startswith("203.0.113.77:"), "the new address is used", timeout_s=1)
        assert connection.public not in moving.mappings().values()
        assert old not in moving.mappings().values()
        assert moving.status()["external"] == "203.0.113.77"
        moving.readdress(f"{PUBLIC}/24")
        soon(lambda: seen(client).startswith(f"{PUBLIC}:"), "the first address is used again", timeout_s=1)


@both
@pytest.mark.req("4787-7")
def test_a_lease_that_overlaps_the_lan(unwatched: Gateway) -> None:
    """Under a running agent: nobody can tell inside from outside, so nothing is masqueraded, and it says why.

    Unwatched, as ARP rightly asks for the router with the WAN's new address.
    """
    unwatched.gate("ip", "address", "flush", "dev", "wan0")
    unwatched.gate("ip", "address", "add", "192.168.0.129/25", "dev", "wan0")
    soon(lambda: not unwatched.status()["working"], "it is noticed")
    assert "lan0 and wan0 overlap" in unwatched.status()["why_not"]
    assert "lan0 and wan0 overlap" in unwatched.masq("status").stdout
    assert not unwatched.opens("c-box")
    unwatched.readdress(f"{PUBLIC}/24")
    soon(lambda: unwatched.opens("c-box"), "sessions open again")
    assert unwatched.status()["working"]


@both
@pytest.mark.req("reliability-address")
def test_the_same_address_again_keeps_sessions(moving: Gateway) -> None:
    """A DHCP client that is started anew: for a moment there is no address at all."""
    with moving.connection() as connection, moving.udp("b-box") as client:
        endpoint = who(client)
        connection.talk()
        moving.readdress()
        soon(lambda: moving.status()["external"] is None, "it is noticed")
        assert not moving.status()["working"]
        assert not moving.opens("c-box")
        connection.far.sendall(b"on its way")  # and sent again and again, also right after the address is back
        moving.readdress(f"{PUBLIC}/24")
        soon(lambda: moving.opens("c-box"), "sessions open again")
        assert who(client) == endpoint
        assert read(connection.near, 10) == b"on its way"
        connection.talk(5)
        assert internal("b-box", client) in moving.mappings()


@both
@pytest.mark.req("reliability-address")
def test_a_further_address_changes_nothing(moving: Gateway) -> None:
    with moving.udp("a-box") as client:
        endpoint = who(client)
        for change in ("add", "del"):
            moving.gate("ip", "address", change, "203.0.113.88/24", "dev", "wan0")
            moving.gate("ip", "address", change, "198.18.0.1/24", "dev", "wan0")
            time.sleep(0.2)
            assert who(client) == endpoint
            assert moving.seen_as("b-box").startswith(f"{PUBLIC}:")


@in_tc
@pytest.mark.req("reliability-address")
def test_an_address_that_changed_while_the_agent_was_dead(fresh: Gateway) -> None:
    with fresh.udp("a-box") as client:
        who(client)
        fresh.kill_agent()
        fresh.readdress("203.0.113.77/24")
        fresh.attach()
        assert who(client).startswith("203.0.113.77:")
        assert len(fresh.mappings()) == 1


@both
def test_a_new_lan_prefix_is_masqueraded(moving: Gateway) -> None:
    """An address added to the LAN interface, and a route to a network behind one of its hosts."""
    moving.gate("ip", "address", "add", "10.9.9.1/24", "dev", "lan0")
    moving.gate("ip", "route", "add", "10.8.0.0/16", "via", "192.168.0.3")
    moving.lab.exec("a-box", ["ip", "address", "add", "10.9.9.2/24", "dev", "eth0"])
    moving.lab.exec("b-box", ["ip", "address", "add", "10.8.1.2/32", "dev", "lo"])
    try:
        for box, address in (("a-box", "10.9.9.2"), ("b-box", "10.8.1.2")):
            with moving.udp(box, address=address) as client:
                soon(partial(answers, client), f"{address} is masqueraded")
                assert who(client).startswith(f"{PUBLIC}:")
    finally:
        moving.gate("ip", "address", "del", "10.9.9.1/24", "dev", "lan0")
        moving.gate("ip", "route", "del", "10.8.0.0/16")


@both
@pytest.mark.req("attacks-leak")
@pytest.mark.req("attacks-spoof")
def test_a_foreign_source_does_not_get_out(moving: Gateway) -> None:
    """Private or not: what is in no prefix of the LANs is neither translated nor let out."""
    for address, counter in (("172.20.0.9", "drop_source_private"), ("9.9.9.9", "drop_source_foreign")):
        moving.lab.exec("a-box", ["ip", "address", "add", f"{address}/32", "dev", "lo"])
        moving.sysctl("net.ipv4.conf.all.rp_filter", 0)
        moving.sysctl("net.ipv4.conf.lan0.rp_filter", 0)
        with moving.lab.capture("exchange", GATE, f"host {address}") as capture, moving.counting() as grown:
            with moving.udp("a-box", address=address) as client:
                client.sendto(b"spoofed", (INTERNET, ECHO_PORT))
                time.sleep(0.1)
            assert capture.stop() == []
        assert grown[counter] == 1


# --- links -----------------------------------------------------------------------------------------


@both
@pytest.mark.req("attacks-spoof")
def test_a_foreign_source_does_not_reach_another_host(moving: Gateway) -> None:
    """From LAN to LAN, or back into the same one, no WAN sees it pass; and the kernel is told not to mind."""
    moving.gate("ip", "address", "add", "10.7.7.1/24", "dev", "lan0")
    moving.lab.exec("b-box", ["ip", "address", "add", "10.7.7.3/24", "dev", "eth0"])
    moving.lab.exec("a-box", ["ip", "address", "add", "9.9.9.8/32", "dev", "lo"])
    try:
        for name in ("all", "lan0"):
            moving.sysctl(f"net.ipv4.conf.{name}.rp_filter", 0)
        with moving.udp("b-box", address="10.7.7.3", timeout_s=0.3) as server:
            for address, comes in (("0.0.0.0", True), ("9.9.9.8", False)):
                with moving.udp("a-box", address=address) as client, moving.counting() as grown:
                    client.sendto(address.encode(), server.getsockname())
                    if comes:
                        assert server.recv(20) == address.encode()
                    else:
                        with pytest.raises(TimeoutError):
                            server.recv(20)
                assert grown["drop_source_foreign"] == (not comes)
    finally:
        moving.gate("ip", "address", "del", "10.7.7.1/24", "dev", "lan0")


@in_tc
@pytest.mark.req("attacks-leak")
def test_a_wan_made_anew_while_the_agent_is_dead(fresh: Gateway) -> None:
    """As a ppp0 that dials again: untranslated nothing gets out by it; then the next agent takes it in."""
    with fresh.udp("a-box") as client:
        assert answers(client)
        fresh.kill_agent()
        fresh.gate("ip", "link", "add", "vpn0", "type", "veth", "peer", "name", "vpn1")
        with fresh.counting() as grown:
            recreate(fresh, "wan0", index=False)
            for _ in range(3):
                assert not answers(client)
        assert grown["drop_unguarded"] >= 3
        fresh.attach()
        soon(lambda: answers(client), "it is masqueraded again")


@both
@pytest.mark.req("reliability-link")
@pytest.mark.parametrize("interface", ["wan0", "lan0"])
def test_an_interface_down_and_up(moving: Gateway, interface: str) -> None:
    with moving.connection() as connection, moving.udp("b-box") as client:
        endpoint = who(client)
        connection.talk()
        moving.gate("ip", "link", "set", interface, "down")
        time.sleep(0.2)
        moving.gate("ip", "link", "set", interface, "up")
        moving.gate("ip", "route", "replace", "default", "via", TRANSIT)
        soon(lambda: answers(client), "traffic flows again")
        assert who(client) == endpoint
        connection.talk(5)


@both
@pytest.mark.req("attacks-leak")
def test_what_comes_for_a_lan_that_is_gone_does_not_turn_round(unwatched: Gateway) -> None:
    """Translated, it has no way but the default route: neither it nor a redirect about it may leave the WAN."""
    with unwatched.udp("internet") as server, unwatched.udp("a-box") as client:
        client.sendto(b"?", (INTERNET, server.getsockname()[1]))
        _, source = server.recvfrom(10)
        wire = Wire(unwatched.lab)
        unwatched.gate("ip", "link", "set", "lan0", "down")
        for number in range(10):
            server.sendto(b"!", source)
            time.sleep(0.2 * (number == 5))  # half of them after the agent has looked
        unwatched.gate("ip", "link", "set", "lan0", "up")
        soon(lambda: answers(client), "traffic flows again")
        wire.check()


def recreate(gateway: Gateway, interface: str, *, index: bool) -> None:
    """Deletes a veth of masq-gate and makes it anew, with the same index or another, as cable and address were."""
    role, port, bridge, address = {
        "wan0": ("exchange", GATE, "br0", f"{PUBLIC}/24"),
        "lan0": ("switch", "gate-lan0", "br0", "192.168.0.1/24"),
    }[interface]
    with gateway.inside():
        before = netdev.link(interface)
    gateway.gate("ip", "link", "del", interface)
    number = ["index", str(before.index)] if index else []
    peer = ["peer", "name", port, "netns", gateway.lab.namespace(role)]
    mac = ["address", before.mac.hex(":")]
    gateway.gate("ip", "link", "add", interface, *number, *mac, "type", "veth", *peer)
    gateway.lab.exec(role, ["ip", "link", "set", port, "master", bridge, "up"])
    if interface == "wan0" and index:  # nothing tells the programs this one from that which they were on
        soon(lambda: {"ingress", "egress"} <= gateway.on("wan0"), "it is attached to")
    gateway.gate("ip", "address", "add", address, "dev", interface)
    gateway.gate("ip", "link", "set", interface, "up")
    if interface == "wan0":
        gateway.gate("ip", "route", "add", "default", "via", TRANSIT)
    gateway.lab.set_offloads(gateway.mode != "xdp")


@both
@pytest.mark.req("reliability-link")
@pytest.mark.req("attacks-leak")
@pytest.mark.parametrize("index", [True, False], ids=["same index", "new index"])
@pytest.mark.parametrize("interface", ["wan0", "lan0"])
def test_an_interface_deleted_and_recreated(moving: Gateway, interface: str, index: bool) -> None:
    with moving.connection() as connection, moving.udp("b-box") as client:
        endpoint = who(client)
        connection.talk()
        with moving.lab.capture("internet", "eth0", "net 192.168.0.0/16") as private:
            # goes on, so that a gap without translation would be seen
            stream = Stream(moving) if interface == "wan0" else None
            recreate(moving, interface, index=index)
            soon(lambda: answers(client), "traffic flows again")
            assert private.stop() == []
        if stream:
            stream.stop()
        hook = {"xdp": "xdp", "tc": "tc"}[moving.mode]
        # A veth restarts its queues for an XDP program and may lose what is in them; after that nothing is lost.
        soon(lambda: moving.hooks() == {"wan0": hook, "lan0": hook}, "it is on its hook again")
        assert who(client) == endpoint
        connection.talk(5)
        soon(lambda: moving.opens("c-box"), "the LAN's prefix is internal again")


@pytest.mark.req("reliability-link")
def test_a_wildcard_wan_comes_back_under_another_name(bare: Gateway) -> None:
    """As ppp0 and ppp1 do."""
    before = snapshot(bare.lab)
    bare.masq("attach", "--wan", "wan*", "--lan", "lan0", "--mode", bare.mode)
    with bare.udp("a-box") as client:
        endpoint = who(client)
        stream = Stream(bare)
        bare.gate("ip", "link", "set", "wan0", "name", "wan7")
        soon(lambda: set(bare.hooks()) == {"wan7", "lan0"}, "it is followed")
        assert who(client) == endpoint
        bare.gate("ip", "link", "set", "wan7", "name", "wan0")
        soon(lambda: set(bare.hooks()) == {"wan0", "lan0"}, "it is followed")
        assert who(client) == endpoint
        assert stream.stop() == 0
    bare.detach()
    assert differences(before, snapshot(bare.lab)) == []


@in_tc
@pytest.mark.req("reliability-link")
@pytest.mark.req("reliability-detach")
@pytest.mark.parametrize("gone", [("wan0",), ("wan0", "lan0")], ids=["the WAN", "both"])
def test_detach_while_interfaces_are_gone(bare: Gateway, gone: tuple[str, ...]) -> None:
    """With neither there is no program left to find the datapath by; its agent puts things back."""
    kinds = ("sysctl", "process")
    before = {line for line in snapshot(bare.lab) if line.startswith(kinds) and not any(n in line for n in gone)}
    bare.attach()
    assert bare.opens()
    for name in gone:
        bare.gate("ip", "link", "del", name)
    soon(lambda: bare.is_attached is (len(gone) == 1), "what is left is known")
    time.sleep(0.2)
    assert bare.agent_pid
    assert bare.sysctl("net.ipv4.ip_forward") == "1"
    bare.detach()
    assert bare.agent_pid is None
    after = {line for line in snapshot(bare.lab) if line.startswith(kinds)}
    assert differences(before, after) == []


@pytest.mark.req("reliability-link")
def test_several_lans_named_by_one_wildcard(mode: str) -> None:
    """lan1 comes up only after attach; d-box behind it gets out and does not see the other LAN's addresses."""
    with Gateway.in_new_lab(mode, attach=False, lans=2) as gateway:
        EchoServer(gateway.lab)
        wire = Wire(gateway.lab)
        gateway.gate("ip", "link", "set", "lan1", "name", "later")
        gateway.attach(lans=["lan*"])
        assert set(gateway.hooks()) == {"wan0", "lan0"}
        with gateway.udp("a-box") as first, gateway.udp("d-box") as second:
            endpoint = who(first)
            gateway.gate("ip", "link", "set", "later", "name", "lan1")
            soon(lambda: answers(second), "d-box gets out")
            soon(lambda: set(gateway.hooks()) == {"wan0", "lan0", "lan1"}, "it is told")
            assert who(second) != who(first) == endpoint
            gateway.gate("ip", "link", "set", "lan1", "name", "gone")
            soon(lambda: set(gateway.hooks()) == {"wan0", "lan0"}, "it is left")
            assert gateway.on("gone") == set()
            assert who(first) == endpoint
        wire.check()


# --- a WAN without Ethernet header -----------------------------------------------------------------


def test_a_tun_wan_in_tc_mode() -> None:
    with Gateway.in_new_lab("tc", wan="tun", attach=False) as gateway:
        EchoServer(gateway.lab)
        wire = Wire(gateway.lab)
        before = snapshot(gateway.lab)
        gateway.attach("--mode", "auto")
        assert gateway.hooks() == {"wan0": "tc", "lan0": "tc"}
        stream = Stream(gateway)
        with gateway.connection() as connection, gateway.udp("b-box") as client:
            connection.talk(20, size=20_000)
            for size in (10, 1400, 5000):
                assert ask(client, bytes(size)) == bytes(size)
            assert who(client).startswith(f"{PUBLIC}:")
        output = gateway.lab.exec("a-box", ["traceroute", "-n", "-q1", "-N1", "-w2", "-m4", INTERNET]).stdout
        assert TRANSIT in output
        assert stream.stop() == 0
        gateway.lab.exec("c-box", ["ping", "-c2", "-i0.05", "-W1", INTERNET])
        with gateway.listen("internet", 21, INTERNET) as listener, gateway.tcp("a-box", (INTERNET, 21)) as client:
            server, _ = listener.accept()
            with server:
                client.sendall(b"PORT 192,168,0,2,200,21\r\n")
                assert server.recv(100).startswith(b"PORT 203,0,113,1,")
        wire.check()
        gateway.detach()
        assert differences(before, snapshot(gateway.lab)) == []


@pytest.mark.req("reliability-address")
def test_a_new_address_on_a_tun_wan() -> None:
    """As pppd gets one when the line was down for a moment."""
    with Gateway.in_new_lab("tc", wan="tun") as gateway:
        EchoServer(gateway.lab)
        wire = Wire(gateway.lab)
        gateway.lab.exec("transit", ["ip", "route", "add", "203.0.113.77", "dev", "ppp0"])
        with gateway.udp("a-box") as client:
            old = who(client)
            gateway.gate("ip", "address", "flush", "dev", "wan0")
            gateway.gate("ip", "address", "add", "203.0.113.77", "peer", TRANSIT, "dev", "wan0")
            gateway.gate("ip", "route", "replace", "default", "via", TRANSIT, "dev", "wan0")
            soon(lambda: seen(client).startswith("203.0.113.77:"), "the new address is used", timeout_s=1)
            assert old not in gateway.mappings().values()
        wire.check()


def test_a_tun_wan_refuses_xdp() -> None:
    with Gateway.in_new_lab("xdp", wan="tun", attach=False) as gateway:
        before = snapshot(gateway.lab)
        assert "wan0 cannot do XDP: it has no Ethernet header" in gateway.attach(check=False)
        assert differences(before, snapshot(gateway.lab)) == []
