"""The modules of net/, and doctor, against a real kernel, in a namespace of each test's own.

::

    nd-…      near ── far ─┐
                           br0        tun0 (no Ethernet header, point-to-point)
    10.9.0.1/24, .2/24     └ bridge   10.8.0.1 peer 10.8.0.2
"""

import ctypes
import ipaddress
import os
import platform
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
from netkit import needs_root

from xdpmasq import doctor, drivers
from xdpmasq.errors import HostError, InterfaceError
from xdpmasq.net import clsact, ethtool, ifaddrs, monitor, neighbours, netdev, routing, sysctl, xdp

pytestmark = needs_root

T = TypeVar("T")
LIBC = ctypes.CDLL(None, use_errno=True)
SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(platform.machine(), 0)
BPF_PROG_LOAD, SCHED_CLS, XDP = 5, 3, 6
XDP_PASS, TC_ACT_OK = 2, 0
CLONE_NEWNET = 0x40000000

TOPOLOGY = """
link set lo up
link add near type veth peer name far
link add br0 type bridge
link set far master br0
tuntap add tun0 mode tun
addr add 10.9.0.1/24 dev near
addr add 10.9.0.2/24 dev near
addr add 10.8.0.1 peer 10.8.0.2/32 dev tun0
link set near up
link set far up
link set br0 up
link set tun0 up
"""


class Namespace:
    """A network namespace, with one thread living in it."""

    def __init__(self) -> None:
        self.name = f"nd-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self._thread = ThreadPoolExecutor(1)
        subprocess.run(["ip", "netns", "add", self.name], check=True)

    def enter(self) -> None:
        self._thread.submit(self._enter).result()

    def _enter(self) -> None:
        fd = os.open(f"/run/netns/{self.name}", os.O_RDONLY)
        try:
            assert LIBC.setns(fd, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(fd)

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return self._thread.submit(function, *args, **kwargs).result(timeout=30)

    def run(self, command: str, stdin: str | None = None) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command.split()], input=stdin, text=True, check=True)

    def index(self, name: str) -> int:
        return self.call(netdev.link, name).index

    def remove(self) -> None:
        self._thread.shutdown()
        subprocess.run(["ip", "netns", "del", self.name], check=True)


@pytest.fixture
def ns() -> Iterator[Namespace]:
    namespace = Namespace()
    try:
        namespace.enter()
        namespace.run("ip -batch -", TOPOLOGY)
        yield namespace
    finally:
        namespace.remove()


@pytest.fixture
def load() -> Iterator[Callable[[int, int], int]]:
    """Loads `return <verdict>` as a program of a type; descriptors are closed at the end."""
    opened = []

    def loader(kind: int, verdict: int) -> int:
        code = ctypes.create_string_buffer(struct.pack("=BBhiBBhi", 0xB7, 0, 0, verdict, 0x95, 0, 0, 0))
        gpl = ctypes.create_string_buffer(b"GPL")
        fields = struct.pack("=IIQQ", kind, 2, ctypes.addressof(code), ctypes.addressof(gpl))
        attributes = ctypes.create_string_buffer(fields, 120)
        fd = LIBC.syscall(SYS_BPF, BPF_PROG_LOAD, attributes, 120)
        assert fd >= 0, os.strerror(ctypes.get_errno())
        opened.append(fd)
        return int(fd)

    yield loader
    for fd in opened:
        os.close(fd)


Load = Callable[[int, int], int]


def prog_id(fd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("prog_id"))


# --- reading ---------------------------------------------------------------------------------------


def test_links(ns: Namespace) -> None:
    found = {link.name: link for link in ns.call(netdev.links)}
    assert set(found) == {"lo", "near", "far", "br0", "tun0"}
    near, tun = found["near"], found["tun0"]
    assert (near.kind, near.driver, near.mtu, near.up, near.carrier) == ("veth", "veth", 1500, True, True)
    assert near.ethernet
    assert len(near.mac) == 6
    assert found["br0"].kind == "bridge"
    assert found["far"].master == found["br0"].index
    assert (tun.kind, tun.driver, tun.ethernet, tun.mac, tun.carrier) == ("tun", "tun", False, b"", False)
    assert {link.xdp_prog_id for link in found.values()} == {0}
    assert [drivers.xdp_policy(found[name])[0] for name in ("near", "br0", "tun0")] == ["tc"] * 3


def test_xdp_features(ns: Namespace) -> None:
    near, bridge = ns.call(netdev.link, "near"), ns.call(netdev.link, "br0")
    assert drivers.native_xdp(near)
    assert not drivers.native_xdp(bridge)


def test_no_such_link_names_those_there_are(ns: Namespace) -> None:
    with pytest.raises(InterfaceError) as caught:
        ns.call(netdev.link, "eth7")
    assert "eth7" in caught.value.what
    assert "near" in caught.value.why


def test_addresses(ns: Namespace) -> None:
    near, tun = ns.index("near"), ns.index("tun0")
    found = {str(each.ip): each for each in ns.call(ifaddrs.addresses) if each.index in (near, tun)}
    assert list(found) == ["10.9.0.1/24", "10.9.0.2/24", "10.8.0.1/32"]
    assert [each.secondary for each in found.values()] == [False, True, False]
    assert found["10.8.0.1/32"].peer == ipaddress.ip_interface("10.8.0.2/32")
    assert str(found["10.8.0.1/32"].network) == "10.8.0.2/32"
    assert any(each.index == near and each.ip.ip.is_link_local for each in ns.call(ifaddrs.addresses, 6))


def test_routes(ns: Namespace) -> None:
    ns.run("ip route add 10.20.0.0/16 via 10.9.0.7 table 77")
    ns.run("ip route add 10.21.0.0/16 nexthop via 10.9.0.7 nexthop via 10.9.0.8")
    ns.run("ip route add 10.22.0.0/16 via inet6 fe80::1 dev near")
    ns.run("ip route add blackhole 10.23.0.0/16")
    near = ns.index("near")
    found = {(str(r.prefix), r.oif, str(r.gateway), r.table) for r in ns.call(routing.routes)}
    assert found == {
        ("10.8.0.2/32", ns.index("tun0"), "None", 254),
        ("10.9.0.0/24", near, "None", 254),
        ("10.20.0.0/16", near, "10.9.0.7", 77),
        ("10.21.0.0/16", near, "10.9.0.7", 254),
        ("10.21.0.0/16", near, "10.9.0.8", 254),
        ("10.22.0.0/16", near, "fe80::1", 254),
    }
    assert all(route.prefix.version == 6 for route in ns.call(routing.routes, 6))


def test_route_to(ns: Namespace) -> None:
    route = ns.call(routing.route_to, ipaddress.ip_address("10.9.0.77"))
    assert route is not None
    assert route.oif == ns.index("near")
    assert ns.call(routing.route_to, ipaddress.ip_address("198.51.100.1")) is None


def test_neighbours(ns: Namespace) -> None:
    near = ns.index("near")
    ns.run("ip neigh add 10.9.0.3 lladdr 02:00:00:00:00:09 dev near")
    ns.run("ip neigh add 10.9.0.4 nud failed dev near")
    ns.run("ip neigh add fe80::9 lladdr 02:00:00:00:00:0a dev near")
    mac = bytes.fromhex("020000000009"), bytes.fromhex("02000000000a")
    assert ns.call(neighbours.resolved) == {(near, "10.9.0.3"): mac[0], (near, "fe80::9"): mac[1]}


def test_offloads(ns: Namespace) -> None:
    assert "tx-checksum-ip-generic" in ns.call(ethtool.offloads, "near")
    ns.run("ethtool -K near tx off gro on")
    active = ns.call(ethtool.offloads, "near")
    assert "rx-gro" in active
    assert "tx-checksum-ip-generic" not in active
    assert ns.call(ethtool.offloads, "eth7") == frozenset()


def test_sysctl_is_the_namespace_s_own(ns: Namespace) -> None:
    ns.run("ip link set near down")
    ns.run("ip link set near name near.5")
    name = ("net", "ipv4", "conf", "near.5", "rp_filter")
    ns.call(sysctl.write, name, 2)
    assert ns.call(sysctl.read, name) == "2"
    assert sysctl.read(name) is None
    with pytest.raises(HostError, match="no_such"):
        ns.call(sysctl.write, "net.ipv4.no_such", 1)


# --- XDP -------------------------------------------------------------------------------------------


def test_xdp_attach_replace_detach(ns: Namespace, load: Load) -> None:
    near, old, new = ns.index("near"), load(XDP, XDP_PASS), load(XDP, XDP_PASS)
    ns.call(xdp.attach, near, old, "native")
    link = ns.call(netdev.link, "near")
    assert (link.xdp_prog_id, link.xdp_mode) == (prog_id(old), "native")
    ns.call(xdp.attach, near, new, "native", replace_fd=old)
    assert ns.call(netdev.link, "near").xdp_prog_id == prog_id(new)
    assert ns.call(xdp.detach, near, "native", expected_fd=new)
    assert ns.call(netdev.link, "near").xdp_prog_id == 0
    assert not ns.call(xdp.detach, near, "native", expected_fd=new)


def test_xdp_generic(ns: Namespace, load: Load) -> None:
    bridge = ns.index("br0")
    ns.call(xdp.attach, bridge, load(XDP, XDP_PASS), "generic")
    assert ns.call(netdev.link, "br0").xdp_mode == "generic"
    assert ns.call(xdp.detach, bridge, "generic")


def test_a_stranger_s_xdp_program_stays(ns: Namespace, load: Load) -> None:
    near, theirs, ours, other = ns.index("near"), *(load(XDP, XDP_PASS) for _ in range(3))
    ns.call(xdp.attach, near, theirs, "native")
    with pytest.raises(InterfaceError, match="someone else"):
        ns.call(xdp.attach, near, ours, "native")
    with pytest.raises(InterfaceError, match="someone else"):
        ns.call(xdp.attach, near, ours, "generic")
    with pytest.raises(InterfaceError, match="someone else"):
        ns.call(xdp.attach, near, ours, "native", replace_fd=other)
    with pytest.raises(InterfaceError, match="someone else"):
        ns.call(xdp.detach, near, "native", expected_fd=ours)
    assert ns.call(netdev.link, "near").xdp_prog_id == prog_id(theirs)


def test_xdp_refusals_say_why(ns: Namespace, load: Load) -> None:
    fd = load(XDP, XDP_PASS)
    with pytest.raises(InterfaceError, match="no native XDP"):
        ns.call(xdp.attach, ns.index("br0"), fd, "native")
    ns.run("ip link set far mtu 9000")
    with pytest.raises(InterfaceError, match="MTU is too large"):
        ns.call(xdp.attach, ns.index("near"), fd, "native")
    with pytest.raises(InterfaceError, match="does not exist"):
        ns.call(xdp.attach, 9999, fd, "native")
    assert not ns.call(xdp.detach, 9999, "native")


# --- TC --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["near", "br0", "tun0"])
def test_clsact(ns: Namespace, name: str) -> None:
    index = ns.index(name)
    assert not ns.call(clsact.present, index)
    assert not ns.call(clsact.remove, index)
    assert ns.call(clsact.add, index)
    assert not ns.call(clsact.add, index)
    assert ns.call(clsact.present, index)
    assert ns.call(clsact.remove, index)
    assert not ns.call(clsact.present, index)


def test_clsact_refusals(ns: Namespace) -> None:
    ns.run("tc qdisc add dev near ingress")
    with pytest.raises(InterfaceError, match="ingress qdisc"):
        ns.call(clsact.add, ns.index("near"))
    with pytest.raises(InterfaceError, match="does not exist"):
        ns.call(clsact.add, 9999)


def test_tc_attach_replace_detach(ns: Namespace, load: Load) -> None:
    near, old, new = ns.index("near"), load(SCHED_CLS, TC_ACT_OK), load(SCHED_CLS, TC_ACT_OK)
    ns.call(clsact.add, near)
    ns.call(clsact.attach, near, "egress", old, "slow_outbound", 10)
    ns.call(clsact.attach, near, "ingress", old, "slow_inbound", 10)
    ns.call(clsact.attach, near, "egress", new, "slow_outbound", 10)
    assert ns.call(clsact.filters, near) == [
        clsact.Filter(near, "ingress", "slow_inbound", prog_id(old), 10, 1),
        clsact.Filter(near, "egress", "slow_outbound", prog_id(new), 10, 1),
    ]
    assert ns.call(clsact.detach, near, "ingress", 10)
    assert not ns.call(clsact.detach, near, "ingress", 10)
    assert [each.direction for each in ns.call(clsact.filters, near)] == ["egress"]
    ns.call(clsact.remove, near)
    assert ns.call(clsact.filters, near) == []


def test_tc_filters_are_direct_action_for_all_protocols(ns: Namespace, load: Load) -> None:
    near = ns.index("near")
    ns.call(clsact.add, near)
    ns.call(clsact.attach, near, "egress", load(SCHED_CLS, TC_ACT_OK), "ours", 10)
    shown = subprocess.run(
        ["tc", "-n", ns.name, "filter", "show", "dev", "near", "egress"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "protocol all pref 10 bpf" in shown
    assert "handle 0x1 ours direct-action" in shown


def test_a_stranger_s_filter_stays(ns: Namespace, load: Load) -> None:
    near, fd = ns.index("near"), load(SCHED_CLS, TC_ACT_OK)
    ns.call(clsact.add, near)
    ns.call(clsact.attach, near, "egress", fd, "theirs", 10)
    with pytest.raises(InterfaceError, match="theirs"):
        ns.call(clsact.attach, near, "egress", fd, "ours", 10)
    ns.call(clsact.attach, near, "egress", fd, "ours", 10, handle=2)
    assert [each.name for each in ns.call(clsact.filters, near)] == ["theirs", "ours"]


def test_tc_without_clsact_is_refused(ns: Namespace, load: Load) -> None:
    with pytest.raises(InterfaceError, match="kernel says"):
        ns.call(clsact.attach, ns.index("near"), "egress", load(SCHED_CLS, TC_ACT_OK), "ours", 10)


# --- changes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("ip link set br0 mtu 1400", "links"),
        ("ip addr add 10.9.7.1/24 dev near", "addresses"),
        ("ip -6 addr add fd00::1/64 dev near", "addresses"),
        ("ip route add 198.18.0.0/15 dev near", "routes"),
        ("ip -6 route add fd01::/64 dev near", "routes"),
        ("ip rule add pref 77 lookup main", "routes"),
        ("ip nexthop add id 7 dev near", "routes"),
        ("ip neigh add 10.9.0.3 lladdr 02:00:00:00:00:09 dev near", "neighbours"),
        ("tc qdisc add dev near clsact", "filters"),
    ],
)
def test_watch(ns: Namespace, command: str, kind: str) -> None:
    with ns.call(monitor.Watch) as watch:
        watch.drain()
        ns.run(command)
        assert getattr(watch.drain(), kind)


def test_watch_tells_what_it_lost(ns: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "BUFFER", 1)
    with ns.call(monitor.Watch) as watch:
        ns.run("ip -batch -", "".join(f"route add 10.30.{n}.0/24 dev near\n" for n in range(200)))
        assert watch.drain().lost
        assert not watch.drain()


def test_watch_of_the_network_namespace_it_was_made_in(ns: Namespace) -> None:
    with monitor.Watch() as elsewhere, ns.call(monitor.Watch) as watch:
        elsewhere.drain()
        ns.run("tc qdisc add dev near clsact")
        assert watch.drain().filters
        assert watch.fileno() != elsewhere.fileno()


# --- doctor ----------------------------------------------------------------------------------------


def test_doctor_on_a_good_gateway(ns: Namespace) -> None:
    ns.run("ip addr add 192.168.0.1/24 dev br0")
    ns.run("ip route add default via 10.9.0.7")
    found = ns.call(doctor.run, ["near"], ["br*"])
    assert [each for each in found if each.level == "block"] == []
    assert {each.check for each in found} >= {"kernel", "driver", "ip_forward", "rp_filter", "nat", "ports"}


def test_doctor_on_a_bad_one(ns: Namespace, load: Load) -> None:
    ns.run("ip addr add 10.9.0.3/16 dev br0")
    ns.call(xdp.attach, ns.index("near"), load(XDP, XDP_PASS), "native")
    found = ns.call(doctor.run, ["near"], ["br0", "far", "eth7", "ppp*"], "xdp")
    blocks = "\n".join(each.message for each in found if each.level == "block")
    assert "no interface eth7" in blocks
    assert "far is a port of br0" in blocks
    assert "br0's 10.9.0.0/16 overlaps near's 10.9.0.0/24" in blocks
    assert "someone else is on the XDP hook" in blocks
    assert "br0: no native XDP" in blocks
    assert all(each.do for each in found if each.level != "ok")


def test_doctor_on_two_wans(ns: Namespace) -> None:
    """What is wrong with one of them is said of that one; that the default route leaves by one only is not wrong."""
    ns.run("ip link set far nomaster")
    ns.run("ip addr add 192.0.2.1/24 dev far")
    ns.run("ip link set far up")
    ns.run("ip addr add 192.168.0.1/24 dev br0")
    ns.run("ip route add default via 10.9.0.7")
    for name in ("near", "far"):
        ns.run(f"sysctl -q -w net.ipv4.conf.{name}.rp_filter=1")
    found = ns.call(doctor.run, ["near", "far"], ["br0"])
    assert [each for each in found if each.level == "block"] == []
    assert "rp_filter is strict on near, far; attach makes it loose" in "\n".join(each.message for each in found)
    ns.run("ip addr add 192.168.0.7/25 dev far")
    ns.run(
        "nft -f -",
        'table ip nat { chain post { type nat hook postrouting priority 100; oifname "far" masquerade; }; }',
    )
    found = ns.call(doctor.run, ["near", "far"], ["br0"])
    assert [each.message for each in found if each.level == "block"] == [
        "br0's 192.168.0.0/24 overlaps far's 192.168.0.0/25"
    ]
    assert [each.level for each in found if each.check == "nat"] == ["warn"]


def test_doctor_finds_leftover_masquerade(ns: Namespace) -> None:
    ns.run("ip addr add 192.168.0.1/24 dev br0")
    ns.run(
        "nft -f -",
        """table ip nat {
            chain post {
                type nat hook postrouting priority 100
                oifname "near" masquerade
                oifname "near" ip saddr 172.17.0.0/16 masquerade
                oifname "tun0" masquerade
            }
        }""",
    )
    findings = [each for each in ns.call(doctor.run, ["near"], ["br0"]) if each.check == "nat"]
    assert [each.level for each in findings] == ["warn"]
    ns.run(findings[0].do)
    findings = [each for each in ns.call(doctor.run, ["near"], ["br0"]) if each.check == "nat"]
    assert [each.level for each in findings] == ["ok"]
