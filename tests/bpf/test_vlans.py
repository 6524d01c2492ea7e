"""VLANs at XDP: frames come and go with the tags of their interfaces, one program serves all that passes a device.

TC sees VLAN devices as it sees any interface; here lan10 and wan20 stand for them.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
from harness import (
    ACK,
    GATEWAY,
    HOST,
    HOST_MAC,
    LAN_MAC,
    LAN_VLAN_MAC,
    NEXT_HOP_MAC,
    SERVER,
    WAN_MAC,
    WAN_VLAN_MAC,
    Gateway,
    next_tick,
    rebuilt,
    tcp,
    udp,
    wire,
)
from scapy.packet import Packet

from xdpmasq.net import netdev
from xdpmasq.net.netdev import Link, Vlan
from xdpmasq.vlans import Wire

Q, AD = 0x8100, 0x88A8
Tags = Sequence[tuple[int, int]]  # (TPID, TCI), the outermost first

UNTAGGED: Tags = ()
TEN: Tags = ((Q, 10),)
TWENTY: Tags = ((Q, 20),)
STACKED: Tags = ((AD, 100), (Q, 10))
FULL = bytes(1472)


def frame(dst: str, src: str, tags: Tags, packet: Packet | bytes, ethertype: int = 0x0800) -> bytes:
    macs = bytes.fromhex((dst + src).replace(":", ""))
    return macs + b"".join(struct.pack("!HH", *tag) for tag in tags) + struct.pack("!H", ethertype) + wire(packet)


@dataclass(frozen=True)
class Side:
    """An interface as the kernel knows it, and the device and tags by which the outside does."""

    link: Link
    device: Link
    mac: str
    tags: Tags

    @property
    def wire(self) -> Wire:
        return Wire(self.device, tuple(Vlan(self.device.index, *tag) for tag in self.tags))


class Tagged:
    """A gateway of which either side may be a VLAN, with an armed UDP flow and an armed TCP flow."""

    def __init__(self, gateway: Gateway, lan: Tags, wan: Tags, *, stick: bool = False) -> None:
        self.gateway, bench = gateway, gateway.bench
        below = bench.lan if stick else bench.wan
        self.lan = Side(netdev.link("lan10") if lan else bench.lan, bench.lan, LAN_VLAN_MAC if lan else LAN_MAC, lan)
        self.wan = Side(netdev.link("wan20") if wan else below, below, WAN_VLAN_MAC if wan else WAN_MAC, wan)
        gateway.tables.unset_interface(gateway.lan)
        gateway.tables.unset_interface(gateway.wan)
        gateway.accelerate()
        self.tell()
        self.udp_port, self.tcp_port = self.arm()

    def tell(self, mtu: int = 1500) -> None:
        tables, both = self.gateway.tables, {"xdp_from": True, "xdp_to": True}
        for role, side in (("lan", self.lan), ("wan", self.wan)):
            wire = replace(side.wire, device=replace(side.device, mtu=mtu))
            tables.set_interface(side.link, role, wire=wire, **both)  # type: ignore[arg-type]
        tables.set_vlans({side.wire: side.link.index for side in (self.lan, self.wan) if side.tags})

    def arm(self) -> tuple[int, int]:
        """As the kernel would: by TC, where no tags are."""
        up = {"ingress_ifindex": self.lan.link.index, "ifindex": self.wan.link.index}
        ports = []
        for make, remote, more in ((udp, 53, (FULL,)), (tcp, 80, ())):
            there, back = (HOST, 5000, SERVER, remote), (SERVER, remote)
            out = self.gateway.outbound(make(*there, *more), **up)
            assert out.ended == "slow_outbound"
            answer = make(*back, GATEWAY, out.port, *more)
            arrival = dict.fromkeys(up, self.wan.link.index)
            assert self.gateway.inbound(answer, **arrival).ended == "slow_inbound"
            # TCP is armed when both sides have acknowledged.
            self.gateway.outbound(make(*there, *more), **up)
            self.gateway.learn(
                make(*back, HOST, 5000, *more), came_by=self.wan.link.index, ifindex=self.lan.link.index
            )
            ports.append(out.port)
        return ports[0], ports[1]

    def from_host(self, packet: Packet, tags: Tags | None = None, mac: str = "") -> bytes:
        return frame(mac or self.lan.mac, HOST_MAC, self.lan.tags if tags is None else tags, packet)

    def from_server(self, packet: Packet, tags: Tags | None = None) -> bytes:
        return frame(self.wan.mac, NEXT_HOP_MAC, self.wan.tags if tags is None else tags, packet)

    def assert_flies(self, came: Tags | None = None, payload: bytes = b"how do you do") -> None:
        """Both ways, both protocols; ``came`` are other tags for the way out than the LAN's."""
        for make, remote, port in ((udp, 53, self.udp_port), (tcp, 80, self.tcp_port)):
            out = make(HOST, 5000, SERVER, remote, payload=payload)
            result = self.gateway.fast(self.from_host(out, came), self.lan.device.index)
            assert (result.ended, result.counted) == ("fast_outbound", {})
            translated = rebuilt(out, src=GATEWAY, sport=port, ttl=63)
            assert result.frame == frame(NEXT_HOP_MAC, self.wan.mac, self.wan.tags, translated)
            back = make(SERVER, remote, GATEWAY, port, payload=payload)
            result = self.gateway.fast(self.from_server(back), self.wan.device.index)
            assert (result.ended, result.counted) == ("fast_inbound", {})
            translated = rebuilt(back, dst=HOST, dport=5000, ttl=63)
            assert result.frame == frame(HOST_MAC, self.lan.mac, self.lan.tags, translated)


EACH = {"untagged": UNTAGGED, "802.1Q": TWENTY, "QinQ": ((AD, 200), (Q, 20)), "802.1Q twice": ((Q, 4094), (Q, 1))}


@pytest.mark.parametrize("wan", EACH.values(), ids=[f"WAN {name}" for name in EACH])
@pytest.mark.parametrize("lan", [UNTAGGED, TEN, STACKED], ids=["LAN untagged", "LAN 802.1Q", "LAN QinQ"])
def test_flies(gateway: Gateway, lan: Tags, wan: Tags) -> None:
    tagged = Tagged(gateway, lan, wan)
    for payload in (b"", b"odd", bytes(range(200))):
        tagged.assert_flies(payload=payload)


@pytest.mark.parametrize("lan", [TEN, UNTAGGED], ids=["LAN tagged", "LAN untagged"])
def test_a_router_on_a_stick(gateway: Gateway, lan: Tags) -> None:
    """LAN and WAN on one device: the VLAN says what a frame is."""
    tagged = Tagged(gateway, lan, TWENTY, stick=True)
    tagged.assert_flies()
    astray = tagged.from_host(udp(HOST, 5000, SERVER, 53), TWENTY)
    assert gateway.fast(astray, gateway.lan).ended == "up_not_for_us"


@pytest.mark.parametrize(
    ("lan", "came"),
    [
        pytest.param(TEN, ((Q, 7 << 13 | 10),), id="priority on VLAN 10"),
        pytest.param(TEN, ((Q, 1 << 12 | 10),), id="drop eligible on VLAN 10"),
        pytest.param(TEN, ((Q, 5 << 13), (Q, 10)), id="priority tag before VLAN 10"),
        pytest.param(TEN, ((AD, 0), (Q, 10)), id="802.1ad priority tag before VLAN 10"),
        pytest.param(TEN, ((Q, 10), (Q, 3 << 13)), id="priority tag within VLAN 10"),
        pytest.param(UNTAGGED, ((Q, 7 << 13),), id="priority tag"),
        pytest.param(UNTAGGED, ((AD, 0), (Q, 0)), id="two of them"),
    ],
)
def test_priority_is_no_vlan(gateway: Gateway, lan: Tags, came: Tags) -> None:
    """A tag with VLAN id 0 names none; what leaves has no priority."""
    Tagged(gateway, lan, TWENTY).assert_flies(came)


UDP_OUT = udp(HOST, 5000, SERVER, 53)

GO_UP = [
    pytest.param(lambda t: t.from_host(UDP_OUT, ((Q, 11),)), "up_vlan", id="another VLAN"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((AD, 10),)), "up_vlan", id="the same number in 802.1ad"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((Q, 10), (Q, 11))), "up_vlan", id="another VLAN within"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((Q, 11), (Q, 10))), "up_vlan", id="within another VLAN"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((Q, 20),)), "up_vlan", id="a VLAN of another device"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ()), "up_not_for_us", id="untagged"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((Q, 0),)), "up_not_for_us", id="priority tag"),
    pytest.param(lambda t: frame("00:" * 5 + "00", HOST_MAC, (), UDP_OUT), "up_not_for_us", id="untagged, MAC 0"),
    pytest.param(lambda t: t.from_host(UDP_OUT, mac=LAN_MAC), "up_not_for_us", id="the MAC of the device below"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((Q, 10),) * 3), "up_not_ip", id="three tags"),
    pytest.param(lambda t: t.from_host(UDP_OUT, ((0x9100, 10),)), "up_not_ip", id="a tag that Linux does not know"),
    pytest.param(lambda t: frame(t.lan.mac, HOST_MAC, TEN, bytes(46), 0x0806), "up_not_ip", id="ARP"),
    pytest.param(lambda t: t.from_host(udp(HOST, 5001, SERVER, 53)), "up_no_flow", id="no session"),
    pytest.param(lambda t: t.from_host(udp(HOST, 5000, SERVER, 53, bytes(1473))), "up_longer", id="too long"),
    pytest.param(lambda t: t.from_host(udp(HOST, 5000, SERVER, 53, ttl=1)), "up_ttl", id="TTL"),
]


@pytest.mark.parametrize(("make", "counter"), GO_UP)
def test_goes_up_unmodified(gateway: Gateway, make: Callable[[Tagged], bytes], counter: str) -> None:
    tagged = Tagged(gateway, TEN, TWENTY)
    result = gateway.fast(make(tagged), gateway.lan)
    assert (result.verdict, result.ended, result.counted) == ("pass", counter, {})


@pytest.mark.req("attacks-truncated")
@pytest.mark.parametrize("tags", [TEN, STACKED], ids=["802.1Q", "QinQ"])
def test_every_beginning_of_a_frame_goes_up(gateway: Gateway, tags: Tags) -> None:
    tagged = Tagged(gateway, tags, UNTAGGED)
    for packet in (udp(HOST, 5000, SERVER, 53, b""), tcp(HOST, 5000, SERVER, 80, ACK)):
        whole = tagged.from_host(packet)
        for length in range(14, len(whole)):
            assert gateway.fast(whole[:length], gateway.lan).verdict == "pass"
        assert gateway.fast(whole, gateway.lan).ended == "fast_outbound"


def test_a_vlan_that_is_not_on_xdp(gateway: Gateway) -> None:
    tagged = Tagged(gateway, TEN, UNTAGGED)
    gateway.tables.set_vlans({})
    assert gateway.fast(tagged.from_host(UDP_OUT), gateway.lan).ended == "up_vlan"


def test_a_vlan_that_is_gone(gateway: Gateway) -> None:
    """Its row goes first, what led to it only at the end of the agent's look."""
    tagged = Tagged(gateway, TEN, UNTAGGED)
    gateway.tables.unset_interface(tagged.lan.link.index)
    assert gateway.fast(tagged.from_host(UDP_OUT), gateway.lan).ended == "up_not_for_us"
    back = tagged.from_server(udp(SERVER, 53, GATEWAY, tagged.udp_port))
    assert gateway.fast(back, gateway.wan).ended == "up_not_armed"


def test_no_room_for_more_tags(gateway: Gateway) -> None:
    """Fewer tags need none."""
    tagged = Tagged(gateway, TEN, STACKED)
    taken = 204  # of the 256 bytes in front of a frame; 40 more are the kernel's own
    assert gateway.fast(tagged.from_host(UDP_OUT), gateway.lan, taken).ended == "fast_outbound"
    taken = 216
    result = gateway.fast(tagged.from_host(UDP_OUT), gateway.lan, taken)
    assert (result.verdict, result.ended, result.counted) == ("pass", "up_no_room", {})
    back = tagged.from_server(udp(SERVER, 53, GATEWAY, tagged.udp_port))
    assert gateway.fast(back, gateway.wan, taken).ended == "fast_inbound"


@pytest.mark.parametrize(
    ("wan", "mtu", "longest"),
    [
        pytest.param(TWENTY, 1500, 1500, id="one tag is beside the MTU"),
        pytest.param(STACKED, 1500, 1496, id="a second one is not"),
        pytest.param(STACKED, 1504, 1500, id="a device with room for it"),
        pytest.param(TWENTY, 1400, 1400, id="a device with a smaller MTU"),
    ],
)
def test_no_longer_than_the_device_takes_from_xdp(gateway: Gateway, wan: Tags, mtu: int, longest: int) -> None:
    """To one that is longer than the MTU and one tag the kernel's redirect would say no, and drop it."""
    tagged = Tagged(gateway, UNTAGGED, wan)
    tagged.tell(mtu)
    gateway.tables.disarm()
    next_tick()
    tagged.arm()
    for length, ended in ((longest, "fast_outbound"), (longest + 1, "up_longer")):
        packet = udp(HOST, 5000, SERVER, 53, bytes(length - 28))
        assert gateway.fast(tagged.from_host(packet), gateway.lan).ended == ended


def test_tc_keeps_to_frames_of_its_own_interface(gateway: Gateway) -> None:
    """On the device below, where it is a LAN or the WAN itself: what is tagged belongs to a VLAN device."""
    result = gateway.outbound(frame(NEXT_HOP_MAC, WAN_MAC, TEN, UDP_OUT))
    assert (result.verdict, result.ended) == ("pass", "own_not_ip")
