"""Looks at this machine without changing it, and says what stands in the way of the NAT.

Each check yields findings. What netlink cannot tell is read under /proc and /sys, or comes from `nft` and
`iptables-save` where those exist. Nothing loads a kernel module.
"""

import contextlib
import fnmatch
import importlib
import ipaddress
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from xdpmasq import attachment, bpf, checks, drivers, kernel, vlans
from xdpmasq.errors import HostError
from xdpmasq.net import ethtool, ifaddrs, netdev, routing, sysctl

Level = Literal["ok", "warn", "block"]
Mode = Literal["auto", "xdp", "tc"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: a stable id; several findings may carry the same one.
        level: ``block`` means that the NAT cannot start or cannot work.
        do: what to do about it; empty when there is nothing to do.
    """

    check: str
    level: Level
    message: str
    do: str = ""


@dataclass(frozen=True)
class Host:
    """The gateway as the checks see it."""

    present: tuple[netdev.Link, ...]
    wans: tuple[netdev.Link, ...]
    lans: tuple[netdev.Link, ...]
    mode: Mode
    ours: Collection[int]  # ids of xdpmasq's own programs

    @property
    def ports(self) -> tuple[netdev.Link, ...]:
        return (*self.wans, *self.lans)

    @cached_property
    def addresses(self) -> list[ifaddrs.Address]:
        return ifaddrs.addresses(4)

    def networks(self, link: netdev.Link) -> list[ipaddress.IPv4Network]:
        own = [each.network for each in self.addresses if each.index == link.index]
        return [each for each in own if isinstance(each, ipaddress.IPv4Network)]

    def uses_xdp(self, link: netdev.Link) -> bool:
        return self.mode == "xdp" or (self.mode == "auto" and drivers.auto(link, self.present)[0] == "xdp")

    def device(self, link: netdev.Link) -> netdev.Link:
        """Where XDP for an interface would be."""
        return vlans.wire_of(link, self.present).device

    def devices(self, *, xdp: bool = False) -> list[netdev.Link]:
        """Those of all interfaces, or with ``xdp`` of those that are to use it, each once."""
        return list(dict.fromkeys(self.device(link) for link in self.ports if not xdp or self.uses_xdp(link)))

    @cached_property
    def ruleset(self) -> "Ruleset":
        return Ruleset.read()


def run(wans: Sequence[str], lans: Sequence[str], mode: Mode = "auto", ours: Collection[int] = ()) -> list[Finding]:
    """All findings for this machine and, where named, its interfaces.

    Args:
        wans: names or patterns of the interfaces towards the Internet, if any is meant already.
        lans: names or patterns (``lan*``) of the interfaces towards the hosts.
        mode: what `attach` would be told.
        ours: ids of xdpmasq's programs, which are no strangers on the XDP hook.
    """
    missing, host = _host(wans, lans, mode, ours)
    return [*missing, *(finding for check in CHECKS for finding in check(host))]


def _host(wans: Sequence[str], lans: Sequence[str], mode: Mode, ours: Collection[int]) -> tuple[list[Finding], Host]:
    present = netdev.links()
    missing = [name for name in (*wans, *lans) if not netdev.match_links([name], present)]
    found = Host(
        present=tuple(present),
        wans=tuple(link for name in wans for link in netdev.match_links([name], present)[:1]),
        lans=tuple(netdev.match_links(lans, present)),
        mode=mode,
        ours=ours,
    )
    return [_missing(name, present) for name in missing], found


def _missing(name: str, present: list[netdev.Link]) -> Finding:
    error = netdev.no_such_interface(name, present)
    if set(name) & set("*?["):
        return Finding("interface", "warn", f"no interface fits {name} yet", error.why)
    return Finding("interface", "block", error.what, f"{error.why}; {error.do}")


# --- the machine -----------------------------------------------------------------------------------

CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # the latter to find programs and maps by their ids
KERNELS_TESTED = "6.18"


def check_privileges(host: Host) -> Iterator[Finding]:
    status = dict(line.split(":\t", 1) for line in _read("/proc/self/status").splitlines() if ":\t" in line)
    effective = int(status.get("CapEff", "0"), 16)
    lacking = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        message = f"may not load and attach programs, without {' and '.join(lacking)}"
        yield Finding("privileges", "block", message, "run it as root, in a container with these capabilities")
    elif why := bpf.refusal():
        message = f"the kernel refuses bpf(2): {why}"
        yield Finding("privileges", "block", message, "in a container its seccomp filter has to let bpf(2) pass")
    else:
        yield Finding("privileges", "ok", "may load programs and attach them")


def check_kernel(host: Host) -> Iterator[Finding]:
    release = os.uname().release
    if kernel.release() < checks.OLDEST_KERNEL:
        needed = ".".join(map(str, checks.OLDEST_KERNEL))
        why = "its verifier gives up on programs of this length"
        yield Finding("kernel", "block", f"Linux {release} is too old: {why}", f"use {needed} or later")
    else:
        yield Finding("kernel", "ok", f"Linux {release}; tested on {KERNELS_TESTED}")


def check_tc(host: Host) -> Iterator[Finding]:
    with contextlib.suppress(OSError, HostError):  # no privileges, no bpf(2): other checks say so
        if attachment.uses_tcx():
            yield Finding("tc", "ok", "TC programs go on TCX")
        else:
            yield Finding("tc", "ok", "TC programs go on clsact; TCX, from Linux 6.6 on, would cost less")


def check_jit(host: Host) -> Iterator[Finding]:
    # the sysctl exists in the first network namespace only
    value = sysctl.read("net.core.bpf_jit_enable")
    if value == "0":
        message = "the BPF JIT is off: programs are interpreted, several times slower"
        yield Finding("jit", "warn", message, "sysctl -w net.core.bpf_jit_enable=1")
    else:
        yield Finding("jit", "ok", "the BPF JIT is on" if value else "the BPF JIT cannot be seen from here")


def check_btf(host: Host) -> Iterator[Finding]:
    if Path("/sys/kernel/btf/vmlinux").exists():
        yield Finding("btf", "ok", "the kernel has BTF")
    else:
        message = "the kernel has no BTF: xdpmasq works, bpftool shows maps without names of fields"
        yield Finding("btf", "warn", message, "use a kernel built with CONFIG_DEBUG_INFO_BTF")


def check_bpffs(host: Host) -> Iterator[Finding]:
    mounted = any(line.split()[2] == "bpf" for line in _read("/proc/self/mounts").splitlines())
    yield Finding("bpffs", "ok", f"bpffs is {'' if mounted else 'not '}mounted; xdpmasq does not need it")


def check_bcc(host: Host) -> Iterator[Finding]:
    install = "apt install python3-bpfcc (Fedora: python3-bcc), for the system's Python"
    try:
        bcc = importlib.import_module("bcc")
    except ImportError as error:
        yield Finding("bcc", "block", f"bcc cannot be imported: {error}", install)
        return
    if not hasattr(bcc, "BPF"):
        message = f"{bcc.__file__} is another package of the name bcc (PyPI's)"
        yield Finding("bcc", "block", message, f"pip uninstall bcc; {install}")
    else:
        yield Finding("bcc", "ok", f"bcc {getattr(bcc, '__version__', '(no version)')}")


def check_headers(host: Host) -> Iterator[Finding]:
    if Path("/usr/include/linux/bpf.h").exists():
        yield Finding("headers", "ok", "the user-space kernel headers are there; no others are needed")
    else:
        message = "/usr/include/linux/bpf.h is missing: programs cannot be compiled"
        yield Finding("headers", "block", message, "apt install linux-libc-dev")


# --- interfaces ------------------------------------------------------------------------------------

# A page less XDP's headroom, skb_shared_info and the Ethernet header; what veth, ena, mlx4 allow is near it.
XDP_MTU = 3498


def check_roles(host: Host) -> Iterator[Finding]:
    for link in host.ports:
        if not link.up:
            yield Finding("interface", "warn", f"{link.name} is down", f"ip link set {link.name} up")
        master = next((each for each in host.present if link.master and each.index == link.master), None)
        if master and master.kind != "vrf":
            message = f"{link.name} is a port of {master.name}, where the addresses and routes are"
            yield Finding("interface", "block", message, f"name {master.name} instead")
    for wan in set(host.wans) & set(host.lans):
        message = f"{wan.name} is both WAN and LAN: one-armed NAT is not supported"
        yield Finding("interface", "block", message, "name two interfaces")


def check_addresses(host: Host) -> Iterator[Finding]:
    none_outside = not any(map(host.networks, host.wans))
    for link in host.ports:
        if host.networks(link):
            continue
        outside = link in host.wans
        level: Level = "block" if outside and none_outside else "warn"
        message = f"{link.name} has no IPv4 address" + (" to translate to" if outside else "")
        yield Finding("address", level, message, f"ip addr add … dev {link.name}, or start its DHCP client")
    if host.wans and not any(each.check == "address" for each in _overlaps(host)):
        yield Finding("address", "ok", "LAN and WAN prefixes do not overlap")
    yield from _overlaps(host)


def _overlaps(host: Host) -> Iterator[Finding]:
    for lan, wan in itertools.product(host.lans, host.wans):
        if lan is not wan:
            for inner, outer in itertools.product(host.networks(lan), host.networks(wan)):
                if inner.overlaps(outer):
                    message = f"{lan.name}'s {inner} overlaps {wan.name}'s {outer}"
                    yield Finding("address", "block", message, "renumber one of them")


def check_driver(host: Host) -> Iterator[Finding]:
    for link in host.ports:
        hook, reason = drivers.auto(link, host.present)
        device = host.device(link)
        chosen = "native XDP" if hook == "xdp" else "TC"
        yield Finding("driver", "ok", f"{link.name}: auto takes {chosen}: {reason}")
        if host.mode == "xdp" and not (device.ethernet and drivers.native_xdp(device)):
            message = f"{link.name}: no native XDP ({device.driver or device.kind or 'no Ethernet header'})"
            yield Finding("driver", "block", message, "choose --mode auto or tc")


def check_vlans(host: Host) -> Iterator[Finding]:
    for device in host.devices():
        native = drivers.xdp_policy(device)[0] == "xdp"
        if host.mode == "tc" or not (native or host.mode == "xdp"):
            continue
        if trouble := vlans.trouble(device, host.present):
            level: Level = "block" if host.mode == "xdp" else "warn"
            yield Finding("vlans", level, f"no XDP on {device.name}: {trouble.why}", trouble.do)


def check_hook(host: Host) -> Iterator[Finding]:
    users = host.devices(xdp=True)
    for link in host.devices():
        if link.xdp_prog_id and link.xdp_prog_id not in host.ours:
            level: Level = "block" if link in users else "warn"
            message = f"{link.name}: program {link.xdp_prog_id} of someone else is on the XDP hook"
            do = f"see `bpftool prog show id {link.xdp_prog_id}`; remove it or choose --mode tc"
            yield Finding("xdp_hook", level, message, do)


def check_offloads(host: Host) -> Iterator[Finding]:
    users = host.devices(xdp=True)
    for link in host.devices():
        active = ethtool.offloads(link.name)
        if "rx-lro" in active:
            message = f"{link.name}: LRO is on, which breaks forwarding and is refused by XDP"
            yield Finding("offloads", "warn", message, f"ethtool -K {link.name} lro off")
        if link not in users:
            continue
        if link.kind == "veth":
            yield _veth(link)
        if link.driver == "virtio_net" and "rx-gro-hw" in active:
            message = f"{link.name}: the host hands over super-packets, which XDP turns off if the host lets it"
            yield Finding("offloads", "warn", message, f"ethtool -K {link.name} rx-gro-hw off, or --mode tc")


def _veth(link: netdev.Link) -> Finding:
    message = (
        f"{link.name}: XDP loses the partial checksums that the other end of a veth sends with its tx "
        "offloads on, and frames go into it only when it has GRO or XDP on; neither can be seen from here"
    )
    do = "on the other end: ethtool -K PEER tx off tso off gso off gro on"
    return Finding("offloads", "warn", message, do)


def check_mtu(host: Host) -> Iterator[Finding]:
    for link in host.devices(xdp=True):
        if link.mtu > XDP_MTU:
            message = f"{link.name}: with an MTU of {link.mtu} most drivers refuse XDP"
            yield Finding("mtu", "warn", message, f"ip link set {link.name} mtu {XDP_MTU} or less, or --mode tc")


# --- forwarding ------------------------------------------------------------------------------------

POOL = range(1024, 65536)
FEW_PORTS = 4096


def check_forwarding(host: Host) -> Iterator[Finding]:
    if sysctl.read("net.ipv4.ip_forward") == "1":
        yield Finding("ip_forward", "ok", "IPv4 forwarding is on")
    else:
        yield Finding("ip_forward", "ok", "IPv4 forwarding is off; attach turns it on, detach restores it")


def check_rp_filter(host: Host) -> Iterator[Finding]:
    everywhere = int(sysctl.read("net.ipv4.conf.all.rp_filter") or 0)
    strict = []
    for link in host.ports:
        own = int(sysctl.read(("net", "ipv4", "conf", link.name, "rp_filter")) or 0)
        if max(everywhere, own) == 1:
            strict.append(link.name)
    out = _default_route()
    wrong = [wan for wan in host.wans if wan.name in strict and out is not None and out != wan.index]
    if wrong and len(host.wans) == 1:
        name = wrong[0].name
        message = f"rp_filter is strict on {name}, but the default route leaves elsewhere: replies are dropped"
        yield Finding("rp_filter", "warn", message, f"sysctl -w net/ipv4/conf/{name}/rp_filter=2")
    elif wrong:
        names = ", ".join(wan.name for wan in host.wans if wan.name in strict)
        yield Finding("rp_filter", "ok", f"rp_filter is strict on {names}; attach makes it loose, detach restores it")
    else:
        where = f"strict on {', '.join(strict)}, where replies must use the way back" if strict else "not strict"
        yield Finding("rp_filter", "ok", f"rp_filter is {where}")
    if host.wans and out is None:
        message = "there is no default route: only directly known prefixes are reached"
        yield Finding("route", "warn", message, f"ip route add default via … dev {host.wans[0].name}")


def _default_route() -> int | None:
    # 1.1.1.1 stands for the Internet; nothing is sent
    route = routing.route_to(ipaddress.IPv4Address("1.1.1.1"))
    return route.oif if route else None


def check_ports(host: Host) -> Iterator[Finding]:
    low, high = map(int, (sysctl.read("net.ipv4.ip_local_port_range") or "32768 60999").split())
    left = len(POOL) - len(range(max(low, POOL.start), min(high + 1, POOL.stop)))
    message = f"{left} ports an address for NAT beside the gateway's own {low}–{high}"
    if left >= FEW_PORTS:
        yield Finding("ports", "ok", message)
    else:
        do = "sysctl -w net.ipv4.ip_local_port_range='32768 60999'"
        yield Finding("ports", "warn" if left else "block", message, do)


# --- the other NAT ---------------------------------------------------------------------------------

SOURCE_NAT = {"masquerade", "snat"}
SOURCE_NAT_TARGETS = {"MASQUERADE", "SNAT"}


@dataclass(frozen=True)
class NatRule:
    """A source NAT rule of the kernel's own, reduced to what decides whether it concerns us.

    Attributes:
        where: table, chain and what follows, as a person finds it.
        remove: the command that deletes it.
        out: (negated, interface patterns) of the outgoing interface; None when any.
        sources: the source prefixes; None when any, or not understood.
    """

    where: str
    remove: str
    out: tuple[bool, tuple[str, ...]] | None = None
    sources: tuple[ipaddress.IPv4Network, ...] | None = None

    def concerns(self, wan: str, inside: Sequence[ipaddress.IPv4Network]) -> bool:
        """Whether it can meet a packet from these prefixes that leaves by wan; yes when in doubt."""
        if self.out:
            negated, patterns = self.out
            if negated == any(fnmatch.fnmatchcase(wan, pattern) for pattern in patterns):
                return False
        if self.sources is None or not inside:
            return True
        return any(source.overlaps(prefix) for source in self.sources for prefix in inside)


@dataclass(frozen=True)
class Ruleset:
    """What the checks need to know of nftables and iptables."""

    nat: tuple[NatRule, ...]
    uses_conntrack: bool
    unread: str = ""

    @classmethod
    def read(cls) -> "Ruleset":
        legacy = _legacy_iptables()
        text = "" if _idle("nf_tables") else _output("nft", "-j", "list", "ruleset")
        if text is None:
            why = "`nft list ruleset` fails" if shutil.which("nft") else "nft is not installed"
            return cls(tuple(legacy), False, why)
        rules = nft_rules(text)
        nat = [rule for rule in map(nft_nat, rules) if rule]
        return cls((*nat, *legacy), any('"ct"' in json.dumps(rule) for rule in rules))


def _legacy_iptables() -> list[NatRule]:
    # asked for a table that there is not, the kernel would make it
    if "nat" not in _read("/proc/net/ip_tables_names").split():
        return []
    command = "iptables-legacy-save" if shutil.which("iptables-legacy-save") else "iptables-save"
    return iptables_nat(_output(command, "-t", "nat") or "")


def check_nat(host: Host) -> Iterator[Finding]:
    if not host.wans:
        return
    inside = [prefix for lan in host.lans for prefix in host.networks(lan)]
    rules = [rule for rule in host.ruleset.nat if any(rule.concerns(wan.name, inside) for wan in host.wans)]
    for rule in rules:
        message = f"{rule.where} also translates sources: its packets stay on the kernel's NAT"
        yield Finding("nat", "warn", message, rule.remove)
    if host.ruleset.unread:
        message = f"whether nftables rules translate the same packets is not known: {host.ruleset.unread}"
        yield Finding("nat", "warn", message, "install nftables and run doctor as root")
    elif not rules:
        yield Finding("nat", "ok", "no nftables or iptables rule would translate the same packets")


def check_conntrack(host: Host) -> Iterator[Finding]:
    liberal = sysctl.read("net.netfilter.nf_conntrack_tcp_be_liberal")
    if liberal != "0" or not any(map(host.uses_xdp, host.ports)) or not host.ruleset.uses_conntrack:
        return
    message = (
        "rules match on the state of connections, but conntrack does not see what XDP forwards and will "
        "call later segments invalid"
    )
    yield Finding("conntrack", "warn", message, "sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1")


def nft_rules(text: str) -> list[dict[str, Any]]:
    """The rules in the output of `nft -j list ruleset`; none when it is not JSON."""
    try:
        objects = json.loads(text or "{}").get("nftables", [])
    except ValueError:
        return []
    return [each["rule"] for each in objects if "rule" in each]


def nft_nat(rule: dict[str, Any]) -> NatRule | None:
    """The rule as source NAT of IPv4; None when it is something else."""
    expressions = [each for each in rule.get("expr", []) if isinstance(each, dict)]
    matches = [each["match"] for each in expressions if "match" in each]
    if rule["family"] not in ("ip", "inet") or not any(map(_translates, expressions)):
        return None
    if any(_left(match) == "nfproto" and match["right"] == "ipv6" for match in matches):
        return None
    place = f"{rule['family']} {rule['table']} {rule['chain']}"
    return NatRule(
        where=f"nftables: a rule in {place} (handle {rule['handle']})",
        remove=f"nft delete rule {place} handle {rule['handle']}",
        out=next((_out(match) for match in matches if _left(match) in ("oif", "oifname")), None),
        sources=next((_sources(match) for match in matches if _left(match) == "ip saddr"), None),
    )


def _translates(expression: dict[str, Any]) -> bool:
    xt = expression.get("xt")  # iptables-nft: nft shows the target's name only
    return bool(SOURCE_NAT & expression.keys()) or bool(xt and xt.get("name") in SOURCE_NAT_TARGETS)


def _left(match: dict[str, Any]) -> str:
    left = match["left"] if isinstance(match["left"], dict) else {}
    if "meta" in left:
        return str(left["meta"]["key"])
    payload = left.get("payload", {})
    return f"{payload.get('protocol')} {payload.get('field')}"


def _members(right: Any) -> list[Any]:
    return right["set"] if isinstance(right, dict) and "set" in right else [right]


def _out(match: dict[str, Any]) -> tuple[bool, tuple[str, ...]] | None:
    names = _members(match["right"])
    # a named set ("@wans") is not looked up: in doubt it holds the WAN
    if match["op"] not in ("==", "!=") or not all(isinstance(n, str) and n[:1] != "@" for n in names):
        return None
    return match["op"] == "!=", tuple(names)


def _sources(match: dict[str, Any]) -> tuple[ipaddress.IPv4Network, ...] | None:
    prefixes = [_prefix(member) for member in _members(match["right"])]
    if match["op"] != "==" or None in prefixes:
        return None
    return tuple(prefix for prefix in prefixes if prefix)


def _prefix(member: Any) -> ipaddress.IPv4Network | None:
    if isinstance(member, dict) and "prefix" in member:
        member = f"{member['prefix']['addr']}/{member['prefix']['len']}"
    try:
        return ipaddress.IPv4Network(member, strict=False)
    except (ValueError, TypeError):
        return None


def iptables_nat(text: str) -> list[NatRule]:
    """The source NAT rules in the output of `iptables-save -t nat`."""
    lines = (line.split() for line in text.splitlines() if line.startswith("-A "))
    return [_iptables_rule(words) for words in lines if _option(words, "-j")[1] in SOURCE_NAT_TARGETS]


def _iptables_rule(words: list[str]) -> NatRule:
    rule = " ".join(words)
    negated, out = _option(words, "-o")
    not_from, source = _option(words, "-s")
    prefix = _prefix(source) if source and not not_from else None
    return NatRule(
        where=f"iptables: {rule}",
        remove=f"iptables -t nat -D {rule.removeprefix('-A ')}",
        # "eth+" is iptables' wildcard
        out=(negated, (out[:-1] + "*" if out.endswith("+") else out,)) if out else None,
        sources=(prefix,) if prefix else None,
    )


def _option(words: list[str], option: str) -> tuple[bool, str]:
    if option not in words[:-1]:
        return False, ""
    at = words.index(option)
    return words[at - 1] == "!", words[at + 1]


# --- reading ---------------------------------------------------------------------------------------


def _idle(module: str) -> bool:
    """Whether that is a module that is not loaded: asking its subsystem anything would load it."""
    modules = _read(f"/lib/modules/{os.uname().release}/modules.dep")
    return f"/{module}.ko" in modules and not Path("/sys/module", module).exists()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


CHECKS: tuple[Callable[[Host], Iterator[Finding]], ...] = (
    check_privileges,
    check_kernel,
    check_tc,
    check_jit,
    check_btf,
    check_bpffs,
    check_bcc,
    check_headers,
    check_roles,
    check_addresses,
    check_driver,
    check_vlans,
    check_hook,
    check_offloads,
    check_mtu,
    check_forwarding,
    check_rp_filter,
    check_ports,
    check_nat,
    check_conntrack,
)
