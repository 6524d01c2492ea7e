"""Can these interfaces be WAN and LAN, and which of them take XDP?"""

import itertools
from collections.abc import Iterator

from xdpmasq import drivers, vlans
from xdpmasq.doctor.finding import Finding, Level
from xdpmasq.doctor.host import Host
from xdpmasq.net import ethtool, netdev

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
    overlaps = list(_overlaps(host))
    if host.wans and not overlaps:
        yield Finding("address", "ok", "LAN and WAN prefixes do not overlap")
    yield from overlaps


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


CHECKS = (check_roles, check_addresses, check_driver, check_vlans, check_hook, check_offloads, check_mtu)
