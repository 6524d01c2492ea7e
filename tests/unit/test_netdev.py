"""The parts of net/ and drivers that need neither root nor a kernel."""

import struct
from pathlib import Path

import pytest

from xdpmasq import drivers, kernel
from xdpmasq.net import monitor, netdev, sysctl
from xdpmasq.net.monitor import Changes
from xdpmasq.net.netdev import Link

BASIC, REDIRECT, NDO_XMIT = 1, 2, 4


def make_link(name: str = "eth0", **fields: object) -> Link:
    values: dict[str, object] = {
        "index": 2, "name": name, "mac": b"\2\0\0\0\0\1", "mtu": 1500, "up": True, "carrier": True,
        "kind": None, "driver": "", "ethernet": True, "xdp_prog_id": 0, "xdp_mode": None,
    }  # fmt: skip
    return Link(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        pytest.param(["eth1"], ["eth1"], id="a name"),
        pytest.param(["lan*"], ["lan0", "lan1"], id="wildcard"),
        pytest.param(["ppp*"], [], id="wildcard without match"),
        pytest.param(["eth?", "lan0", "eth1"], ["eth0", "eth1", "lan0"], id="each once, in their order"),
        pytest.param(["LAN*"], [], id="case counts"),
        pytest.param(["eth"], [], id="not a prefix"),
    ],
)
def test_match_links(patterns: list[str], expected: list[str]) -> None:
    present = [make_link(name) for name in ("eth0", "eth1", "lan0", "lan1")]
    assert [link.name for link in netdev.match_links(patterns, present)] == expected


@pytest.mark.parametrize(
    ("fields", "release", "hook"),
    [
        pytest.param({"driver": "ixgbe"}, (5, 15), "xdp", id="hardware, by the table"),
        pytest.param({"driver": "fec"}, (5, 15), "tc", id="hardware, kernel before its XDP"),
        pytest.param({"driver": "fec"}, (6, 2), "xdp", id="hardware, kernel with its XDP"),
        pytest.param({"driver": "e1000e"}, (6, 1), "tc", id="unknown to the table"),
        pytest.param({"driver": "new", "xdp_features": BASIC | REDIRECT}, (6, 18), "xdp", id="kernel: yes"),
        pytest.param({"driver": "nfp", "xdp_features": BASIC}, (6, 18), "tc", id="no redirect"),
        pytest.param({"driver": "ixgbe", "xdp_features": 0}, (6, 18), "tc", id="kernel: no"),
        pytest.param({"driver": "veth", "kind": "veth", "xdp_features": 7}, (6, 18), "tc", id="veth"),
        pytest.param({"driver": "virtio_net", "xdp_features": 7}, (6, 18), "tc", id="virtio"),
        pytest.param({"driver": "tun", "kind": "tun", "xdp_features": 7}, (6, 1), "tc", id="tap"),
        pytest.param({"driver": "bridge", "kind": "bridge"}, (6, 1), "tc", id="bridge"),
        pytest.param({"driver": "ixgbe", "kind": "vlan"}, (6, 1), "tc", id="vlan on hardware"),
        pytest.param({"driver": "tun", "kind": "tun", "ethernet": False}, (6, 1), "tc", id="no Ethernet"),
        pytest.param({}, (6, 1), "tc", id="no driver named"),
    ],
)  # fmt: skip
def test_policy(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], release: tuple[int, int], hook: str
) -> None:
    monkeypatch.setattr(kernel, "release", lambda: release)
    chosen, reason = drivers.xdp_policy(make_link(**fields))
    assert chosen == hook
    assert reason


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param({"driver": "mlx4_en", "xdp_features": BASIC | REDIRECT}, False, id="receives only"),
        pytest.param({"driver": "ice", "xdp_features": BASIC | REDIRECT | NDO_XMIT}, True, id="kernel: yes"),
        pytest.param({"driver": "ixgbe"}, True, id="by the table"),
        pytest.param({"driver": "tun", "kind": "tun", "ethernet": False}, False, id="tun"),
    ],
)  # fmt: skip
def test_takes_frames(fields: dict[str, object], expected: bool) -> None:
    assert drivers.takes_frames(make_link(**fields)) is expected


def message(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, 0, 0, 0) + payload + bytes(-len(payload) % 4)


@pytest.mark.parametrize(
    ("datagram", "expected"),
    [
        pytest.param(b"", set(), id="empty"),
        pytest.param(message(16), {"links"}, id="new link"),
        pytest.param(message(21, b"12345") + message(24), {"addresses", "routes"}, id="two, with padding"),
        pytest.param(message(29), {"neighbours"}, id="neighbour gone"),
        pytest.param(message(32) + message(104), {"routes"}, id="rule and next hop"),
        pytest.param(message(37), {"filters"}, id="qdisc gone"),
        pytest.param(message(3) + message(80), set(), id="others"),
        pytest.param(struct.pack("=IHHII", 0, 16, 0, 0, 0), {"links"}, id="length 0 ends"),
        pytest.param(message(16)[:10], set(), id="cut short"),
    ],
)
def test_kinds_of_messages(datagram: bytes, expected: set[str]) -> None:
    assert monitor._kinds(datagram) == expected


def test_changes_are_true_when_something_changed() -> None:
    assert not Changes()
    assert Changes(lost=True)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
        ("net/ipv4/conf/eth0.5/rp_filter", "/proc/sys/net/ipv4/conf/eth0.5/rp_filter"),
        (("net", "ipv4", "conf", "eth0.5", "rp_filter"), "/proc/sys/net/ipv4/conf/eth0.5/rp_filter"),
    ],
)
def test_sysctl_path(name: str | tuple[str, ...], path: str) -> None:
    assert sysctl._path(name) == Path(path)


def test_sysctl_get_of_an_unknown_name() -> None:
    assert sysctl.read("net.ipv4.no_such_thing") is None
