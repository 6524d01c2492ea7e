"""Doctor's reading of rulesets, and its checks on made-up hosts."""

import ipaddress
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xdpmasq import kernel
from xdpmasq.config import Mode
from xdpmasq.doctor import forwarding, interfaces, iptables, machine, nft, queues, reading
from xdpmasq.doctor.host import Host
from xdpmasq.net import sysctl
from xdpmasq.net.ifaddrs import Address
from xdpmasq.net.netdev import Link

INSIDE = [ipaddress.IPv4Network("192.168.0.0/24")]

# what iptables-save 1.8.9 prints
IPTABLES = """*nat
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -s 172.17.0.0/16 ! -o docker+ -j MASQUERADE
-A POSTROUTING -o ppp0 -j SNAT --to-source 203.0.113.1
-A PREROUTING -i ppp0 -p tcp -j DNAT --to-destination 192.168.0.2
COMMIT
"""


def meta(key: str, right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": right}}


def source(right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": right}}


def prefix(addr: str, length: int) -> dict[str, Any]:
    return {"prefix": {"addr": addr, "len": length}}


def rule(*expr: Any, family: str = "ip") -> dict[str, Any]:
    return {"family": family, "table": "nat", "chain": "post", "handle": 7, "expr": list(expr)}


MASQUERADE = {"masquerade": None}


@pytest.mark.parametrize(
    ("given", "concerns"),
    [
        pytest.param(rule(MASQUERADE), True, id="everything"),
        pytest.param(rule(meta("oifname", "wan0"), MASQUERADE), True, id="out of the WAN"),
        pytest.param(rule(meta("oifname", "wan1"), MASQUERADE), False, id="out of another"),
        pytest.param(rule(meta("oif", "wan1"), MASQUERADE), False, id="out of another, by index"),
        pytest.param(rule(meta("oifname", "wan0", "!="), MASQUERADE), False, id="all but the WAN"),
        pytest.param(rule(meta("oifname", "docker0", "!="), MASQUERADE), True, id="all but another"),
        pytest.param(rule(meta("oifname", "wan*"), MASQUERADE), True, id="wildcard"),
        pytest.param(rule(meta("oifname", {"set": ["a", "wan0"]}), MASQUERADE), True, id="in a set"),
        pytest.param(rule(meta("oifname", {"set": ["a", "b"]}), MASQUERADE), False, id="not in a set"),
        pytest.param(rule(meta("oifname", "@wans"), MASQUERADE), True, id="named set: in doubt yes"),
        pytest.param(rule(source(prefix("172.17.0.0", 16)), MASQUERADE), False, id="other sources"),
        pytest.param(rule(source(prefix("192.168.0.0", 16)), MASQUERADE), True, id="our sources"),
        pytest.param(rule(source("192.168.0.4"), {"snat": {"addr": "203.0.113.1"}}), True, id="one host"),
        pytest.param(rule(source({"set": ["1.1.1.1", prefix("10.1.0.0", 16)]}), MASQUERADE), False, id="set"),
        pytest.param(rule(source({"range": ["10.0.0.1", "10.9.9.9"]}), MASQUERADE), True, id="range"),
        pytest.param(rule(source(prefix("10.0.0.0", 8), "!="), MASQUERADE), True, id="negated: in doubt"),
        pytest.param(rule({"xt": {"type": "target", "name": "MASQUERADE"}}), True, id="iptables-nft"),
        pytest.param(rule(MASQUERADE, family="inet"), True, id="inet table"),
    ],
)  # fmt: skip
def test_nft_source_nat(given: dict[str, Any], concerns: bool) -> None:
    found = nft.source_nat(given)
    assert found is not None
    assert found.remove == f"nft delete rule {given['family']} nat post handle 7"
    assert found.concerns("wan0", INSIDE) is concerns


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(rule({"drop": None}), id="a filter rule"),
        pytest.param(rule({"dnat": {"addr": "192.168.0.2"}}), id="destination NAT"),
        pytest.param(rule({"xt": {"type": "target", "name": "NETMAP"}}), id="another target"),
        pytest.param(rule({"xt": None}), id="a target that nft cannot name"),
        pytest.param(rule(MASQUERADE, family="ip6"), id="IPv6"),
        pytest.param(rule(meta("nfproto", "ipv6"), MASQUERADE, family="inet"), id="IPv6 in inet"),
    ],
)
def test_nft_other_rules(given: dict[str, Any]) -> None:
    assert nft.source_nat(given) is None


@pytest.mark.parametrize("text", ["", "{}", "no JSON", '{"nftables": [{"metainfo": {}}]}'])
def test_nft_without_rules(text: str) -> None:
    assert nft.rules(text) == []


def test_iptables_save() -> None:
    docker, ppp = iptables.source_nats(IPTABLES)
    assert docker.remove == "iptables -t nat -D POSTROUTING -s 172.17.0.0/16 ! -o docker+ -j MASQUERADE"
    assert not docker.concerns("ppp0", INSIDE)
    assert docker.concerns("ppp0", [ipaddress.IPv4Network("172.17.3.0/24")])
    assert not docker.concerns("docker0", [ipaddress.IPv4Network("172.17.3.0/24")])
    assert ppp.concerns("ppp0", INSIDE)
    assert not ppp.concerns("eth0", INSIDE)


def make_link(index: int, name: str, **fields: Any) -> Link:
    values = {
        "mac": b"\2\0\0\0\0\1", "mtu": 1500, "up": True, "carrier": True, "kind": None,
        "driver": "ixgbe", "ethernet": True, "xdp_prog_id": 0, "xdp_mode": None,
    }  # fmt: skip
    return Link(index=index, name=name, **{**values, **fields})


def make_host(
    wan: Link,
    lan: Link,
    *addresses: tuple[int, str],
    mode: Mode = "auto",
    others: tuple[Link, ...] = (),
) -> Host:
    host = Host(present=(wan, lan, *others), wans=(wan,), lans=(lan,), mode=mode, ours={42})
    own = [Address(index, ipaddress.ip_interface(ip), False, None) for index, ip in addresses]
    object.__setattr__(host, "addresses", own)
    return host


def levels(findings: Any) -> list[str]:
    return [finding.level for finding in findings]


WAN, LAN = make_link(1, "wan0"), make_link(2, "lan0")
PUBLIC, PRIVATE = (1, "203.0.113.1/24"), (2, "192.168.0.1/24")


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        pytest.param([PUBLIC, PRIVATE], ["ok"], id="good"),
        pytest.param([PRIVATE], ["block", "ok"], id="none on the WAN"),
        pytest.param([PUBLIC], ["warn", "ok"], id="none on the LAN"),
        pytest.param([PUBLIC, (2, "203.0.0.1/16")], ["block"], id="overlap"),
    ],
)
def test_addresses(addresses: list[tuple[int, str]], expected: list[str]) -> None:
    found = list(interfaces.check_addresses(make_host(WAN, LAN, *addresses)))
    assert sorted(levels(found)) == sorted(expected)


def test_one_armed_is_refused() -> None:
    assert "block" in levels(interfaces.check_roles(make_host(WAN, WAN, PUBLIC)))


def test_a_bridge_port_is_refused() -> None:
    bridge = make_link(9, "br0", kind="bridge", driver="bridge")
    host = make_host(WAN, make_link(2, "lan0", master=9), PUBLIC, others=(bridge,))
    (finding,) = interfaces.check_roles(host)
    assert (finding.level, finding.do) == ("block", "name br0 instead")


@pytest.mark.parametrize(
    ("prog_id", "mode", "expected"),
    [
        pytest.param(0, "auto", [], id="empty hook"),
        pytest.param(42, "auto", [], id="our own"),
        pytest.param(7, "auto", ["block"], id="someone else's"),
        pytest.param(7, "tc", ["warn"], id="someone else's, not needed"),
    ],
)
def test_programs_on_the_hook(monkeypatch: pytest.MonkeyPatch, prog_id: int, mode: Mode, expected: list[str]) -> None:
    monkeypatch.setattr(kernel, "release", lambda: (6, 1))
    host = make_host(make_link(1, "wan0", xdp_prog_id=prog_id), LAN, mode=mode)
    assert levels(interfaces.check_hook(host)) == expected


def test_forced_xdp_where_there_is_none() -> None:
    tun = make_link(1, "tun0", kind="tun", driver="tun", ethernet=False)
    assert "block" in levels(interfaces.check_driver(make_host(tun, LAN, mode="xdp")))
    assert "block" not in levels(interfaces.check_driver(make_host(tun, LAN)))


@pytest.mark.parametrize(
    ("mtu", "mode", "expected"),
    [(1500, "xdp", []), (9000, "xdp", ["warn"]), (9000, "tc", [])],
)
def test_mtu(mtu: int, mode: Mode, expected: list[str]) -> None:
    host = make_host(make_link(1, "wan0", mtu=mtu), LAN, mode=mode)
    assert levels(interfaces.check_mtu(host)) == expected


@pytest.mark.parametrize(
    ("local", "level", "left"),
    [
        pytest.param("32768\t60999", "ok", "36280", id="the kernel's default"),
        pytest.param("1024 60999", "ok", "4536", id="few"),
        pytest.param("1024 65000", "warn", "535", id="very few"),
        pytest.param("1 65535", "block", "0", id="none"),
        pytest.param("2 900", "ok", "64512", id="below the pool"),
    ],
)
def test_ports(monkeypatch: pytest.MonkeyPatch, local: str, level: str, left: str) -> None:
    monkeypatch.setattr(sysctl, "read", lambda name: local)
    (finding,) = forwarding.check_ports(make_host(WAN, LAN))
    assert finding.level == level
    assert finding.message.startswith(f"{left} ports")


@pytest.mark.parametrize(
    ("release", "level"), [((5, 19), "block"), ((6, 0), "block"), ((6, 1), "ok"), ((6, 18), "ok"), ((0, 0), "block")]
)
def test_kernel(monkeypatch: pytest.MonkeyPatch, release: tuple[int, int], level: str) -> None:
    monkeypatch.setattr(kernel, "release", lambda: release)
    assert levels(machine.check_kernel(make_host(WAN, LAN))) == [level]


@pytest.mark.parametrize(
    ("module", "level"),
    [
        pytest.param(SimpleNamespace(BPF=object, __version__="0.26.0"), "ok", id="the real one"),
        pytest.param(SimpleNamespace(__file__="/x/bcc.py"), "block", id="PyPI's impostor"),
        pytest.param(None, "block", id="missing"),
    ],
)
def test_bcc(monkeypatch: pytest.MonkeyPatch, module: Any, level: str) -> None:
    def load(name: str) -> Any:
        if module is None:
            raise ImportError(name)
        return module

    monkeypatch.setattr(machine.importlib, "import_module", load)
    assert levels(machine.check_bcc(make_host(WAN, LAN))) == [level]


@pytest.mark.parametrize(
    ("held", "refused", "level", "said"),
    [
        pytest.param(0x1FFFFFFFFFF, "", "ok", "may load", id="root"),
        pytest.param(1 << 12 | 1 << 38 | 1 << 39, "", "block", "without CAP_SYS_ADMIN", id="BPF and PERFMON only"),
        pytest.param(1 << 21, "", "block", "without CAP_NET_ADMIN", id="no NET_ADMIN"),
        pytest.param(0x1FFFFFFFFFF, "Operation not permitted", "block", "refuses bpf(2)", id="seccomp"),
    ],
)
def test_privileges(monkeypatch: pytest.MonkeyPatch, held: int, refused: str, level: str, said: str) -> None:
    monkeypatch.setattr(reading, "text_of", lambda _: f"Name:\tx\nCapEff:\t{held:016x}\n")
    monkeypatch.setattr("xdpmasq.bpf.refusal", lambda: refused)
    (found,) = machine.check_privileges(make_host(WAN, LAN))
    assert (found.level, said in found.message) == (level, True)


@pytest.mark.parametrize(
    ("interrupts", "kind", "expected"),
    [
        pytest.param(["0"], None, "wan0 has one receive queue: one CPU of 4", id="one queue"),
        pytest.param(["2", "2"], None, "all 2 queues of wan0 interrupt the same CPU, 2", id="on one CPU"),
        pytest.param(["0", "1"], None, "wan0 has 2 receive queues for 4 CPUs", id="shared out"),
        pytest.param(["0-3", "0-3"], None, "wan0 has 2 receive queues for 4 CPUs", id="anywhere"),
        pytest.param(["0"], "veth", "", id="no hardware"),
    ],
)
def test_queues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupts: list[str], kind: str | None, expected: str
) -> None:
    """A virtio card in a made-up /sys: the interrupts are those of the device above."""
    monkeypatch.setattr(queues, "NET", tmp_path / "net")
    monkeypatch.setattr(queues, "IRQ", tmp_path / "irq")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    virtio = tmp_path / "pci" / "virtio0"
    virtio.mkdir(parents=True)
    for number, cpus in enumerate(interrupts):
        (tmp_path / "net" / "wan0" / "queues" / f"rx-{number}").mkdir(parents=True)
        (tmp_path / "pci" / "msi_irqs").mkdir(exist_ok=True)
        (tmp_path / "pci" / "msi_irqs" / f"{40 + number}").touch()
        (tmp_path / "irq" / f"{40 + number}").mkdir(parents=True)
        (tmp_path / "irq" / f"{40 + number}" / "effective_affinity_list").write_text(f"{cpus}\n")
    (tmp_path / "net" / "wan0" / "device").symlink_to(virtio)
    found = [each.message for each in queues.check_queues(make_host(make_link(1, "wan0", kind=kind), LAN))]
    assert [each[: len(expected)] for each in found] == ([expected] if expected else [])
