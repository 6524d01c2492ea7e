"""Where a VLAN's frames pass, and whether XDP may have them there."""

from dataclasses import replace
from typing import Any

import pytest

from xdpmasq import drivers, kernel, vlans
from xdpmasq.config import Mode
from xdpmasq.doctor import interfaces
from xdpmasq.doctor.host import Host
from xdpmasq.net import ethtool
from xdpmasq.net.netdev import Link, Vlan
from xdpmasq.vlans import Wire

Q, AD = 0x8100, 0x88A8


def link(index: int, name: str, vlan: Vlan | None = None, **fields: Any) -> Link:
    values = {
        "mac": b"\2\0\0\0\0\1", "mtu": 1500, "up": True, "carrier": True, "kind": "vlan" if vlan else None,
        "driver": "802.1Q VLAN Support" if vlan else "ixgbe", "ethernet": True, "xdp_prog_id": 0, "xdp_mode": None,
    }  # fmt: skip
    return Link(index=index, name=name, vlan=vlan, **{**values, **fields})


ETH = link(2, "eth1")
TEN, OUTER, FOREIGN = Vlan(2, Q, 10), Vlan(2, AD, 30), Vlan(0, Q, 10)
INNER, THIRD = Vlan(4, Q, 40), Vlan(5, Q, 50)
LINKS = (ETH, link(3, "eth1.10", TEN), link(4, "eth1.30", OUTER), link(5, "eth1.30.40", INNER))
DEEP, ELSEWHERE = link(6, "eth1.30.40.50", THIRD), link(7, "eth0.10", FOREIGN)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        pytest.param(ETH, Wire(ETH), id="no VLAN"),
        pytest.param(LINKS[1], Wire(ETH, (TEN,)), id="VLAN"),
        pytest.param(LINKS[3], Wire(ETH, (OUTER, INNER)), id="QinQ, the outer tag first"),
        pytest.param(DEEP, Wire(DEEP), id="three tags"),
        pytest.param(ELSEWHERE, Wire(ELSEWHERE), id="the device is in another namespace"),
    ],
)
def test_wire(of: Link, expected: Wire) -> None:
    assert vlans.wire_of(of, (*LINKS, DEEP, ELSEWHERE)) == expected


@pytest.mark.parametrize(("tags", "mtu"), [((), 1500), ((TEN,), 1500), ((OUTER, INNER), 1496)])
def test_longest(tags: tuple[Vlan, ...], mtu: int) -> None:
    assert Wire(ETH, tags).mtu == mtu


@pytest.mark.parametrize(
    ("features", "links", "hook", "do"),
    [
        pytest.param({"rx-gro"}, LINKS, "xdp", "", id="tags stay"),
        pytest.param({"rx-vlan-hw-parse"}, LINKS[:1], "xdp", "", id="no VLANs there"),
        pytest.param({"rx-vlan-hw-parse"}, LINKS, "tc", "rx-vlan-hw-parse off", id="802.1Q tags are taken off"),
        pytest.param({"rx-vlan-stag-hw-parse"}, LINKS, "tc", "rx-vlan-stag-hw-parse off", id="802.1ad tags are"),
        pytest.param(
            {"rx-vlan-hw-parse", "rx-vlan-stag-hw-parse"},
            LINKS,
            "tc",
            "rx-vlan-hw-parse off rx-vlan-stag-hw-parse off",
            id="both",
        ),
    ],
)
def test_a_device_that_takes_tags_off_is_left_to_tc(
    monkeypatch: pytest.MonkeyPatch, features: set[str], links: tuple[Link, ...], hook: str, do: str
) -> None:
    """Also where it is LAN or WAN itself: a VLAN's frames would seem to be its own."""
    monkeypatch.setattr(ethtool, "offloads", lambda name: frozenset(features))
    monkeypatch.setattr(kernel, "release", lambda: (6, 1))
    for each in links:
        chosen, why = drivers.auto(each, links)
        assert chosen == hook
        if do:
            assert f"`ethtool -K eth1 {do}`" in why


@pytest.mark.parametrize(("mode", "levels"), [("xdp", ["block"]), ("auto", ["warn"]), ("tc", [])])
def test_doctor(monkeypatch: pytest.MonkeyPatch, mode: Mode, levels: list[str]) -> None:
    monkeypatch.setattr(ethtool, "offloads", lambda name: frozenset({"rx-vlan-hw-parse"}))
    monkeypatch.setattr(kernel, "release", lambda: (6, 1))
    host = Host(present=LINKS, wans=(LINKS[1],), lans=(LINKS[3],), mode=mode, ours=())
    assert [each.level for each in interfaces.check_vlans(host)] == levels


def test_a_vlan_of_a_virtual_device() -> None:
    """What is below decides, by kind and driver."""
    links = (replace(ETH, kind="veth", driver="veth"), *LINKS[1:])
    assert drivers.auto(LINKS[1], links)[0] == "tc"
