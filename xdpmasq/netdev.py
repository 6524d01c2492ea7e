"""Interfaces, addresses, routes, XDP and TC hooks of this network namespace: the only importer of pyroute2.

Every call opens its own netlink socket in the namespace of the calling process and closes it, so
nothing here keeps state and `ip netns exec` works. Failures come out as :mod:`xdpmasq.errors`.
"""

import array
import errno
import fcntl
import fnmatch
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Literal, Self, TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink import genlmsg
from pyroute2.netlink.exceptions import NetlinkDumpInterrupted, NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket
from pyroute2.netlink.rtnl import ifinfmsg, tcmsg
from pyroute2.netlink.rtnl.tcmsg import sched_bpf

from xdpmasq.errors import HostError, InterfaceError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
XdpMode = Literal["native", "generic"]
Direction = Literal["ingress", "egress"]

PUNT_PORT = "masq-punt"  # how the names of our own TAPs begin

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
T = TypeVar("T")


# --- netlink ---------------------------------------------------------------------------------------


class _BpfOptions(sched_bpf.options):  # type: ignore[misc]
    # pyroute2 up to 0.9.7 stops at TCA_BPF_FLAGS; the program's id comes after it.
    nla_map = (
        *sched_bpf.options.nla_map[:9],
        ("TCA_BPF_FLAGS_GEN", "uint32"),
        ("TCA_BPF_TAG", "hex"),
        ("TCA_BPF_ID", "uint32"),
    )


tcmsg.plugins["bpf"] = SimpleNamespace(**{**vars(sched_bpf), "options": _BpfOptions})


# pyroute2 0.7.2 (Debian 12) packs the flags as two bytes, which the kernel refuses with ERANGE.
ifinfmsg.ifinfbase.xdp.xdp_flags.fields = [("value", "I")]


def _dump(request: Callable[[Any], Iterable[T]]) -> list[T]:
    """All messages of a dump, asked again when the kernel's table changed during it."""
    for _ in range(5):
        with suppress(NetlinkDumpInterrupted), IPRoute() as ipr:
            return list(request(ipr))
    raise HostError("the kernel's interface tables keep changing", "five dumps were interrupted", "try again")


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"


def _failure(what: str, index: int, error: NetlinkError, do: str = "") -> InterfaceError | HostError:
    """The kernel's answer in our words; ``error.args[1]`` is its extack text where it gave one."""
    if error.code == errno.EPERM:
        return HostError(what, "the kernel refused it: CAP_NET_ADMIN is needed", "run it as root")
    if error.code == errno.ENODEV:
        return InterfaceError(what, f"{_name(index)} does not exist any more", "see `ip link`")
    return InterfaceError(what, f"the kernel says: {error.args[1]}", do)


# --- links -----------------------------------------------------------------------------------------

IFF_UP = 0x1
ARPHRD_ETHER = 1
SIOCETHTOOL = 0x8946
ETHTOOL_GDRVINFO = 0x3
ETHTOOL_GSTRINGS = 0x1B
ETHTOOL_GSSET_INFO = 0x37
ETHTOOL_GFEATURES = 0x3A
ETH_SS_FEATURES = 4
ETH_GSTRING_LEN = 32

XDP_FEATURE_BASIC = 1
XDP_FEATURE_REDIRECT = 2
XDP_FEATURE_NDO_XMIT = 4
# IFLA_XDP_ATTACHED, which pyroute2 shows as a number or as its own word; 4 is several, native among them
XDP_ATTACHED: dict[Any, str] = {
    1: "native", 2: "generic", 3: "offload", 4: "native",
    "xdp": "native", "xdpgeneric": "generic", "xdpoffload": "offload", "xdpmulti": "native",
}  # fmt: skip


@dataclass(frozen=True)
class Vlan:
    """What makes a link a VLAN device.

    Attributes:
        parent: index of the device below, 0 when that is in another network namespace.
        tpid: EtherType of the tag: 0x8100 (802.1Q) or 0x88a8 (802.1ad).
        vid: the VLAN's number.
    """

    parent: int
    tpid: int
    vid: int


@dataclass(frozen=True)
class Link:
    """A network interface.

    Attributes:
        mac: six bytes, or none on links without an Ethernet header.
        kind: rtnetlink's kind (``veth``, ``tun``, ``bridge``), None for hardware.
        driver: the driver's name as `ethtool -i` has it, empty when it names none.
        xdp_prog_id: the program on the XDP hook, 0 for none.
        xdp_features: NETDEV_XDP_ACT_* bits that the kernel reports (6.3 and later), else None.
        master: index of the bridge, bond or VRF that this link is a port of, or 0.
        vlan: set on VLAN devices.
    """

    index: int
    name: str
    mac: bytes
    mtu: int
    up: bool
    carrier: bool
    kind: str | None
    driver: str
    ethernet: bool
    xdp_prog_id: int
    xdp_mode: str | None
    xdp_features: int | None = None
    master: int = 0
    vlan: Vlan | None = None


def links() -> list[Link]:
    """Every interface of this namespace, by index."""
    messages = _dump(lambda ipr: ipr.get_links())
    reported = _xdp_features()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        found = [_link(message, _driver(control, message.get_attr("IFLA_IFNAME"))) for message in messages]
    return sorted((_with_features(each, reported.get(each.index)) for each in found), key=lambda each: each.index)


@dataclass(frozen=True)
class Traffic:
    """What an interface has carried since it was made, as the kernel counts, and how often its carrier changed."""

    rx_packets: int
    rx_bytes: int
    rx_dropped: int
    tx_packets: int
    tx_bytes: int
    tx_dropped: int
    carrier_changes: int


def traffic() -> dict[int, Traffic]:
    """Of every interface of this namespace, by index."""
    counted = [each.name for each in fields(Traffic) if each.name != "carrier_changes"]
    found = {}
    for message in _dump(lambda ipr: ipr.get_links()):
        counts = message.get_attr("IFLA_STATS64")
        changes = message.get_attr("IFLA_CARRIER_CHANGES") or 0
        found[int(message["index"])] = Traffic(**{name: counts[name] for name in counted}, carrier_changes=changes)
    return found


def link(name: str) -> Link:
    """The interface of that name.

    Raises:
        InterfaceError: there is none; the text names those there are.
    """
    present = links()
    for each in present:
        if each.name == name:
            return each
    raise no_such_interface(name, present)


def no_such_interface(name: str, present: Iterable[Link]) -> InterfaceError:
    """The error for a name or pattern that fits none of the interfaces present."""
    names = ", ".join(each.name for each in present if each.name != "lo") or "none but lo"
    return InterfaceError(f"no interface {name}", f"here are: {names}", "name one of these, or create it")


def match_links(patterns: Sequence[str], links: Iterable[Link]) -> list[Link]:
    """The links that any of the patterns (``eth1``, ``lan*``, ``ppp?``) fits, each once, in their order.

    No pattern fits a punt port, which is no network.
    """
    networks = (each for each in links if not is_punt_port(each))
    return [each for each in networks if any(fnmatch.fnmatchcase(each.name, pattern) for pattern in patterns)]


def is_punt_port(link: Link) -> bool:
    """Whether it is one of our own making: see punt.py."""
    return link.kind == "tun" and link.name.startswith(PUNT_PORT)


def _link(message: Any, driver: str) -> Link:
    ethernet = message["ifi_type"] == ARPHRD_ETHER
    info = message.get_attr("IFLA_LINKINFO")
    prog_id, mode = _xdp_of(message.get_attr("IFLA_XDP"))
    mac = message.get_attr("IFLA_ADDRESS") if ethernet else None
    return Link(
        index=int(message["index"]),
        name=str(message.get_attr("IFLA_IFNAME")),
        mac=bytes.fromhex(mac.replace(":", "")) if mac else b"",
        mtu=int(message.get_attr("IFLA_MTU") or 0),
        up=bool(message["flags"] & IFF_UP),
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        kind=info.get_attr("IFLA_INFO_KIND") if info else None,
        driver=driver,
        ethernet=ethernet,
        xdp_prog_id=prog_id,
        xdp_mode=mode,
        master=int(message.get_attr("IFLA_MASTER") or 0),
        vlan=_vlan(message, info) if info and info.get_attr("IFLA_INFO_KIND") == "vlan" else None,
    )


def _vlan(message: Any, info: Any) -> Vlan:
    data = info.get_attr("IFLA_INFO_DATA")
    elsewhere = message.get_attr("IFLA_LINK_NETNSID") is not None
    return Vlan(
        parent=0 if elsewhere else int(message.get_attr("IFLA_LINK") or 0),
        tpid=int(data.get_attr("IFLA_VLAN_PROTOCOL")),
        vid=int(data.get_attr("IFLA_VLAN_ID")),
    )


def _with_features(link: Link, bits: int | None) -> Link:
    return Link(**{**vars(link), "xdp_features": bits})


def _xdp_of(xdp: Any) -> tuple[int, str | None]:
    if xdp is None:
        return 0, None
    values = dict(xdp["attrs"])
    # IFLA_XDP_PROG_ID is left out when more than one program is attached (native beside offload)
    ids = ("IFLA_XDP_PROG_ID", "IFLA_XDP_DRV_PROG_ID", "IFLA_XDP_SKB_PROG_ID", "IFLA_XDP_HW_PROG_ID")
    prog_id = next((values[key] for key in ids if values.get(key)), 0)
    return (prog_id, XDP_ATTACHED.get(values.get("IFLA_XDP_ATTACHED"))) if prog_id else (0, None)


def _ethtool(control: socket.socket, name: str, request: "array.array[int]") -> bool:
    """SIOCETHTOOL in place; False when the device does not answer it."""
    try:
        fcntl.ioctl(control, SIOCETHTOOL, struct.pack("16sP", name.encode(), request.buffer_info()[0]))
    except OSError:
        return False
    return True


def _driver(control: socket.socket, name: str) -> str:
    drvinfo = array.array("B", struct.pack("=I192x", ETHTOOL_GDRVINFO))
    if not _ethtool(control, name, drvinfo):
        return ""
    return drvinfo[4:36].tobytes().split(b"\0")[0].decode(errors="replace")


def offloads(name: str) -> frozenset[str]:
    """The features that are on, under ethtool's names (``rx-gro``, ``rx-lro``); empty when not told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        info = array.array("B", struct.pack("=IIQI", ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0))
        if not _ethtool(control, name, info):
            return frozenset()
        count = struct.unpack_from("=I", info, 16)[0]
        strings = array.array(
            "B", struct.pack(f"=III{count * ETH_GSTRING_LEN}x", ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count)
        )
        blocks = (count + 31) // 32
        state = array.array("B", struct.pack(f"=II{blocks * 16}x", ETHTOOL_GFEATURES, blocks))
        if not (_ethtool(control, name, strings) and _ethtool(control, name, state)):
            return frozenset()
    active = [block[2] for block in struct.iter_unpack("=IIII", state[8:].tobytes())]
    names = [text[0].split(b"\0")[0].decode() for text in struct.iter_unpack("32s", strings[12:].tobytes())]
    return frozenset(text for bit, text in enumerate(names) if active[bit // 32] >> bit % 32 & 1)


class _DevMessage(genlmsg):  # type: ignore[misc]
    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "hex"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def kernel_release() -> tuple[int, int]:
    """The running kernel's major and minor number."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _xdp_features() -> dict[int, int]:
    """NETDEV_XDP_ACT_* bits by interface index, from the generic netlink family `netdev` (kernel 6.3)."""
    if kernel_release() < (6, 3):
        return {}
    netdev_cmd_dev_get, nlm_f_request_dump = 1, 0x301
    try:
        with GenericNetlinkSocket() as netlink:
            netlink.bind("netdev", _DevMessage)
            query = _DevMessage()
            query["cmd"], query["version"] = netdev_cmd_dev_get, 1
            answers = netlink.nlm_request(query, msg_type=netlink.prid, msg_flags=nlm_f_request_dump)
            keys = ("NETDEV_A_DEV_IFINDEX", "NETDEV_A_DEV_XDP_FEATURES")
            return dict(tuple(each.get_attr(key) for key in keys) for each in answers)
    except (NetlinkError, NetlinkDumpInterrupted):
        return {}


TUN = "/dev/net/tun"
TUNSETIFF = 0x400454CA
IFF_TAP = 0x2
IFF_NO_PI = 0x1000


@dataclass(frozen=True)
class Tap:
    """A TAP device of this process; it is there until ``fd`` is closed."""

    fd: int
    name: str
    index: int


def tap_create(name: str, mtu: int, queue: int) -> Tap:
    """A TAP, non-blocking and up, without IPv6: the kernel itself sends nothing into it.

    Args:
        name: may have a ``%d``, for which the kernel puts the first free number.
        queue: frames that wait to be read, at most.

    Raises:
        HostError: there are no TAPs here, or not for us.
        InterfaceError: it does not come up.
    """
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _no_tap(error) from error
    try:
        return _tap_of(fd, name, mtu, queue)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _no_tap(error) from error
        raise


def _tap_of(fd: int, name: str, mtu: int, queue: int) -> Tap:
    request = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
    made = fcntl.ioctl(fd, TUNSETIFF, request)[:16].split(b"\0")[0].decode()
    index = socket.if_nametoindex(made)
    if sysctl_get(without_ipv6 := ("net", "ipv6", "conf", made, "disable_ipv6")) == "0":
        sysctl_set(without_ipv6, 1)
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.link("set", index=index, mtu=mtu, txqlen=queue, state="up")
    except NetlinkError as error:
        raise _failure(f"cannot bring {made} up", index, error) from error
    return Tap(fd, made, index)


def _no_tap(error: OSError) -> HostError:
    do = "modprobe tun; a container must be given that device"
    return HostError("cannot create a TAP", f"{TUN}: {error.strerror}", do)


# --- addresses, routes, neighbours -----------------------------------------------------------------

IFA_F_SECONDARY = 0x01
RTN_UNICAST = 1
# reachable, stale, delay, probe, permanent; NUD_NOARP is multicast and loopback, which comes and goes
NUD_RESOLVED = 0x02 | 0x04 | 0x08 | 0x10 | 0x80


@dataclass(frozen=True)
class Address:
    """An address of an interface.

    Attributes:
        ip: the address with its on-link prefix; a host prefix where there is a peer.
        secondary: a further address in the prefix of another one (IPv4), or a temporary one (IPv6).
        peer: the far end and its prefix, on point-to-point links.
    """

    index: int
    ip: IPInterface
    secondary: bool
    peer: IPInterface | None

    @property
    def network(self) -> IPNetwork:
        """The prefix that is reached directly through this address."""
        return (self.peer or self.ip).network


@dataclass(frozen=True)
class Route:
    """A unicast route; one of several next hops makes one each.

    Attributes:
        mtu: RTAX_MTU in bytes; 0: the interface's.
    """

    prefix: IPNetwork
    oif: int
    gateway: IPAddress | None
    table: int
    mtu: int = 0


def addresses(family: Literal[4, 6] = 4) -> list[Address]:
    """All addresses of that family, in the kernel's order (the primary one of a prefix comes first)."""
    return [_address(message) for message in _dump(lambda ipr: ipr.get_addr(family=FAMILIES[family]))]


def _address(message: Any) -> Address:
    far, local = message.get_attr("IFA_ADDRESS"), message.get_attr("IFA_LOCAL")
    length = message["prefixlen"]
    peer = None if local in (None, far) else ipaddress.ip_interface(f"{far}/{length}")
    return Address(
        index=int(message["index"]),
        ip=ipaddress.ip_interface(local if peer else f"{far}/{length}"),
        secondary=bool(message["flags"] & IFA_F_SECONDARY),
        peer=peer,
    )


def routes(family: Literal[4, 6] = 4) -> list[Route]:
    """All unicast routes of all tables. Slow where a full BGP table is: about 0.1 ms a route."""
    messages = _dump(lambda ipr: ipr.get_routes(family=FAMILIES[family]))
    return [hop for message in messages if message["type"] == RTN_UNICAST for hop in _routes_of(message)]


def route_to(target: IPAddress, source: IPAddress | None = None, iif: int = 0) -> Route | None:
    """The route that the kernel would take to that address; None when unreachable.

    Args:
        source, iif: as for a packet of that source, that came in by the interface of that index; default: from here.
    """
    came = {"src": str(source), "iif": iif} if source else {}
    try:
        with IPRoute() as ipr:
            return next(iter(_routes_of(next(iter(ipr.route("get", dst=str(target), **came))))), None)
    except NetlinkError:
        return None


def local_route_add(network: ipaddress.IPv4Network, index: int) -> bool:
    """Makes these addresses the host's own, so that it answers ARP for them; False when they are."""
    try:
        with IPRoute() as ipr:
            ipr.route("add", dst=str(network), oif=index, **_LOCAL)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise _failure(f"cannot take {network} over", index, error) from error
        return False
    return True


def local_route_del(network: ipaddress.IPv4Network) -> bool:
    """False when there is none."""
    try:
        with IPRoute() as ipr:
            ipr.route("del", dst=str(network), **_LOCAL)
    except NetlinkError:
        return False
    return True


_LOCAL = {"type": "local", "table": 255, "scope": "host"}


def _routes_of(message: Any) -> list[Route]:
    any_address = "::/0" if message["family"] == socket.AF_INET6 else "0.0.0.0/0"
    destination = message.get_attr("RTA_DST")
    prefix = ipaddress.ip_network(f"{destination}/{message['dst_len']}" if destination else any_address)
    table = int(message.get_attr("RTA_TABLE") or message["table"])
    metrics = message.get_attr("RTA_METRICS")
    mtu = int(metrics.get_attr("RTAX_MTU") or 0) if metrics else 0
    hops = message.get_attr("RTA_MULTIPATH")
    if hops:
        return [Route(prefix, int(hop["oif"]), _gateway(hop), table, mtu) for hop in hops]
    return [Route(prefix, int(message.get_attr("RTA_OIF") or 0), _gateway(message), table, mtu)]


def _gateway(hop: Any) -> IPAddress | None:
    via = hop.get_attr("RTA_VIA")  # an IPv4 route over an IPv6 next hop
    gateway = hop.get_attr("RTA_GATEWAY") or (via and via["addr"])
    return ipaddress.ip_address(gateway) if gateway else None


def neighbours() -> dict[tuple[int, str], bytes]:
    """Link-layer addresses by (interface index, IP address), of both families; resolved entries only."""
    messages = _dump(lambda ipr: ipr.get_neighbours(family=socket.AF_UNSPEC))
    return {
        (int(message["ifindex"]), str(message.get_attr("NDA_DST"))): bytes.fromhex(mac.replace(":", ""))
        for message in messages
        if message["state"] & NUD_RESOLVED and (mac := message.get_attr("NDA_LLADDR"))
    }


# --- XDP -------------------------------------------------------------------------------------------

XDP_FLAGS_MODE: dict[XdpMode, int] = {"generic": 1 << 1, "native": 1 << 2}
XDP_FLAGS_UPDATE_IF_NOEXIST = 1 << 0
XDP_FLAGS_REPLACE = 1 << 4


def xdp_attach(index: int, fd: int, mode: XdpMode, replace_fd: int | None = None) -> None:
    """Puts a program on the XDP hook.

    Args:
        replace_fd: a descriptor of the program that is there now, exchanged atomically. Without it the
            hook must be empty.

    Raises:
        InterfaceError: someone else's program is there, the driver has no native XDP, the MTU is too big, …
    """
    what = f"cannot attach XDP to {_name(index)}"
    # The kernel would tell (EBUSY), but pyroute2 0.7.2 asks it again and again for nine seconds.
    if replace_fd is None and (there := _xdp_program(index)):
        raise _xdp_taken(what, index, f"program {there}")
    try:
        _xdp_set(index, fd, mode, replace_fd)
    except NetlinkError as error:
        raise _xdp_failure(what, index, error) from error


def xdp_detach(index: int, mode: XdpMode, expected_fd: int | None = None) -> bool:
    """Empties the XDP hook; True when there was a program.

    Args:
        expected_fd: a descriptor of the program that must be there; with any other one there nothing
            is changed. None removes whatever is there.

    Raises:
        InterfaceError: another program than the expected is on the hook.
    """
    if not _xdp_program(index):
        return False
    try:
        _xdp_set(index, -1, mode, expected_fd)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise _xdp_failure(f"cannot detach XDP from {_name(index)}", index, error) from error
    return True


def _xdp_program(index: int) -> int:
    return next((each.xdp_prog_id for each in links() if each.index == index), 0)


def _xdp_set(index: int, fd: int, mode: XdpMode, expected_fd: int | None) -> None:
    flags = XDP_FLAGS_MODE[mode]
    attributes: list[tuple[str, int]] = [("IFLA_XDP_FD", fd)]
    if expected_fd is not None:
        flags |= XDP_FLAGS_REPLACE
        attributes.append(("IFLA_XDP_EXPECTED_FD", expected_fd))
    elif fd >= 0:
        flags |= XDP_FLAGS_UPDATE_IF_NOEXIST
    attributes.append(("IFLA_XDP_FLAGS", flags))
    with IPRoute(ext_ack=True) as ipr:
        ipr.link("set", index=index, xdp={"attrs": attributes})


def _xdp_failure(what: str, index: int, error: NetlinkError) -> InterfaceError | HostError:
    if error.code in (errno.EBUSY, errno.EEXIST):
        return _xdp_taken(what, index, error.args[1])
    if error.code == errno.EOPNOTSUPP:
        return InterfaceError(what, f"the driver has no native XDP ({error.args[1]})", "choose --mode tc")
    return _failure(what, index, error, "lower the MTU, turn LRO off, or choose --mode tc")


def _xdp_taken(what: str, index: int, how: str) -> InterfaceError:
    return InterfaceError(
        what,
        f"someone else's program is on its XDP hook ({how})",
        f"see `ip link show {_name(index)}`, remove that program, or choose --mode tc",
    )


# --- TC --------------------------------------------------------------------------------------------

CLSACT_PARENTS: dict[Direction, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
CLSACT_HANDLE = 0xFFFF0000
ETH_P_ALL = 3


@dataclass(frozen=True)
class TcProgram:
    """A bpf filter on a clsact hook; name is the filter's, not the program's."""

    index: int
    direction: Direction
    name: str
    prog_id: int
    priority: int
    handle: int


def clsact_present(index: int) -> bool:
    """Whether the link has a clsact qdisc, whoever made it."""
    return _ingress_qdisc(index) == "clsact"


def clsact_add(index: int) -> bool:
    """Gives the link a clsact qdisc; True when it had none.

    Raises:
        InterfaceError: the link has an `ingress` qdisc in its place, or is gone.
    """
    what = f"cannot add a clsact qdisc to {_name(index)}"
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.tc("add", "clsact", index)
    except NetlinkError as error:
        if error.code not in (errno.EEXIST, errno.EINVAL):
            raise _failure(what, index, error) from error
        kind = _ingress_qdisc(index)
        if kind == "clsact":
            return False
        if kind is None:
            raise _failure(what, index, error) from error
        raise InterfaceError(
            what,
            f"it has an {kind} qdisc, which takes the same place and has no egress hook",
            f"`tc qdisc del dev {_name(index)} ingress`, and put its filters on clsact instead",
        ) from error
    return True


def clsact_del(index: int) -> bool:
    """Takes the clsact qdisc with all filters off the link; False when there was none."""
    if not clsact_present(index):
        return False
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.tc("del", "clsact", index)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT):
            return False
        raise _failure(f"cannot remove the clsact qdisc of {_name(index)}", index, error) from error
    return True


def clsact_is_empty(index: int) -> bool:
    """Whether no filter of any kind is on the link's clsact hooks."""
    return not any(_filters_on(index, direction) for direction in CLSACT_PARENTS)


def _ingress_qdisc(index: int) -> str | None:
    for qdisc in _dump(lambda ipr: ipr.get_qdiscs()):
        if qdisc["index"] == index and qdisc["handle"] == CLSACT_HANDLE:
            return str(qdisc.get_attr("TCA_KIND"))
    return None


def tc_attach(index: int, direction: Direction, fd: int, name: str, priority: int, *, handle: int = 1) -> None:
    """Puts a direct-action program for all protocols on a clsact hook.

    Our own filter (same name, priority and handle) is exchanged atomically: no packet passes between.

    Raises:
        InterfaceError: a filter of another name has that priority and handle, or there is no clsact.
    """
    what = f"cannot attach {name} to TC {direction} of {_name(index)}"
    there = _tc_program_at(index, direction, priority, handle)
    if there and there.name != name:
        raise InterfaceError(
            what,
            f"someone else's filter {there.name!r} has priority {priority}",
            f"see `tc filter show dev {_name(index)} {direction}`",
        )
    try:
        with IPRoute(ext_ack=True) as ipr:
            where = _filter(direction, priority, handle)
            ipr.tc("replace-filter", "bpf", index, **where, fd=fd, name=name, direct_action=True)
    except NetlinkError as error:
        raise _failure(what, index, error, f"see `tc filter show dev {_name(index)} {direction}`") from error


def tc_detach(index: int, direction: Direction, priority: int, handle: int = 1) -> bool:
    """Takes a bpf filter off a clsact hook; False when it was not there."""
    if not _tc_program_at(index, direction, priority, handle):
        return False
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.tc("del-filter", "bpf", index, **_filter(direction, priority, handle))
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT):
            return False
        raise _failure(f"cannot remove a filter from {_name(index)}", index, error) from error
    return True


def tc_programs(index: int) -> list[TcProgram]:
    """All bpf filters on the clsact hooks of a link, ours and others'; ingress first, by priority."""
    if not clsact_present(index):
        return []
    return [program for direction in CLSACT_PARENTS for program in _tc_programs(index, direction)]


def _filter(direction: Direction, priority: int, handle: int) -> dict[str, int]:
    return {"parent": CLSACT_PARENTS[direction], "prio": priority, "handle": handle, "protocol": ETH_P_ALL}


def _tc_program_at(index: int, direction: Direction, priority: int, handle: int) -> TcProgram | None:
    at = [each for each in tc_programs(index) if each.direction == direction]
    return next((each for each in at if (each.priority, each.handle) == (priority, handle)), None)


def _filters_on(index: int, direction: Direction) -> list[Any]:
    return _dump(lambda ipr: ipr.get_filters(index=index, parent=CLSACT_PARENTS[direction]))


def _tc_programs(index: int, direction: Direction) -> list[TcProgram]:
    found = []
    for message in _filters_on(index, direction):
        options = message.get_attr("TCA_OPTIONS")
        # the first message of each priority is its empty head
        if message.get_attr("TCA_KIND") != "bpf" or not message["handle"] or options is None:
            continue
        prog_id, name = options.get_attr("TCA_BPF_ID") or 0, options.get_attr("TCA_BPF_NAME") or ""
        found.append(TcProgram(index, direction, name, prog_id, message["info"] >> 16, message["handle"]))
    return sorted(found, key=lambda each: (each.priority, each.handle))


# --- changes ---------------------------------------------------------------------------------------

NLMSG_HEADER = struct.Struct("=IHHII")
SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
SO_RCVBUFFORCE = 33
WATCH_BUFFER = 4 << 20  # bytes; a burst of some ten thousand messages
WATCH_DATAGRAMS = 1024  # read in one drain, so that a storm cannot hold the agent's loop

# RTNLGRP_*: link, neigh, tc, v4 address, route, rule, v6 address, route, rule, nexthop
WATCH_GROUPS = (1, 3, 4, 5, 7, 8, 9, 11, 19, 32)
# RTM_* types come in fours from RTM_NEWLINK = 16
WATCH_KINDS = {
    0: "links", 1: "addresses", 2: "routes", 3: "neighbours", 4: "routes", 22: "routes",
    5: "filters", 7: "filters",
}  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """What kinds of things changed; rules and next-hop objects count as routes, qdiscs as filters.

    ``lost`` means that messages were dropped: everything has to be read again.
    """

    links: bool = False
    addresses: bool = False
    routes: bool = False
    neighbours: bool = False
    lost: bool = False
    filters: bool = False

    def __bool__(self) -> bool:
        return any(vars(self).values())


class Watch:
    """A netlink socket that becomes readable when the kernel's network configuration changes.

    Own changes (attaching programs) are reported like anyone's. Neighbour messages come for every
    state change; compare :func:`neighbours` to see real ones.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0
        )
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WATCH_BUFFER)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WATCH_BUFFER)
        self._socket.bind((0, 0))
        for group in WATCH_GROUPS:
            with suppress(OSError):  # a kernel without this group
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def drain(self) -> Changes:
        """Reads what is pending, without blocking, and says which kinds came."""
        kinds: set[str] = set()
        for _ in range(WATCH_DATAGRAMS):
            try:
                kinds |= _kinds(self._socket.recv(1 << 16))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                kinds.add("lost")
        return Changes(**dict.fromkeys(kinds, True))


def _kinds(datagram: bytes) -> set[str]:
    kinds, offset = set(), 0
    while offset + NLMSG_HEADER.size <= len(datagram):
        length, kind, *_ = NLMSG_HEADER.unpack_from(datagram, offset)
        if name := WATCH_KINDS.get((kind - 16) // 4):
            kinds.add(name)
        offset += max((length + 3) & ~3, NLMSG_HEADER.size)
    return kinds


# --- sysctl ----------------------------------------------------------------------------------------


def sysctl_get(name: str | Sequence[str]) -> str | None:
    """The value of a sysctl of this namespace, None when the kernel has none of that name.

    Args:
        name: ``net.ipv4.ip_forward``, or ``net/ipv4/conf/eth0.5/rp_filter``, or the parts of that path in
            a sequence: interface names may contain dots.
    """
    try:
        return _sysctl_path(name).read_text().strip()
    except OSError:
        return None


def sysctl_set(name: str | Sequence[str], value: str | int) -> None:
    """Sets a sysctl of this namespace; the name as in :func:`sysctl_get`.

    Raises:
        HostError: there is none of that name, or the kernel refuses the value.
    """
    path = _sysctl_path(name)
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        raise HostError(f"cannot set {path} to {value}", error.strerror or "", "run it as root") from error


def _sysctl_path(name: str | Sequence[str]) -> Path:
    if isinstance(name, str):
        name = name.split("/") if "/" in name else name.split(".")
    return Path("/proc/sys", *name)
