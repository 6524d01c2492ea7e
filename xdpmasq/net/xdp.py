"""The XDP hook of an interface: what is on it, putting a program there, taking it off."""

import errno
from typing import Any, Literal

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import ifinfmsg

from xdpmasq.errors import HostError, InterfaceError
from xdpmasq.net import netlink

Mode = Literal["native", "generic"]

# IFLA_XDP_ATTACHED, which pyroute2 shows as a number or as its own word; 4 is several, native among them
XDP_ATTACHED: dict[Any, str] = {
    1: "native", 2: "generic", 3: "offload", 4: "native",
    "xdp": "native", "xdpgeneric": "generic", "xdpoffload": "offload", "xdpmulti": "native",
}  # fmt: skip
XDP_FLAGS_MODE: dict[Mode, int] = {"generic": 1 << 1, "native": 1 << 2}
XDP_FLAGS_UPDATE_IF_NOEXIST = 1 << 0
XDP_FLAGS_REPLACE = 1 << 4

# pyroute2 0.7.2 (Debian 12) packs the flags as two bytes, which the kernel refuses with ERANGE.
ifinfmsg.ifinfbase.xdp.xdp_flags.fields = [("value", "I")]


def attached(xdp: Any) -> tuple[int, str | None]:
    """A program's id and its mode, from IFLA_XDP of a link; 0 and None where there is none."""
    if xdp is None:
        return 0, None
    values = dict(xdp["attrs"])
    # IFLA_XDP_PROG_ID is left out when more than one program is attached (native beside offload)
    ids = ("IFLA_XDP_PROG_ID", "IFLA_XDP_DRV_PROG_ID", "IFLA_XDP_SKB_PROG_ID", "IFLA_XDP_HW_PROG_ID")
    prog_id = next((values[key] for key in ids if values.get(key)), 0)
    return (prog_id, XDP_ATTACHED.get(values.get("IFLA_XDP_ATTACHED"))) if prog_id else (0, None)


def program(index: int) -> int:
    """The id of the program on the hook, 0 for none."""
    messages = netlink.dump(lambda ipr: ipr.get_links())
    return next((attached(each.get_attr("IFLA_XDP"))[0] for each in messages if each["index"] == index), 0)


def attach(index: int, fd: int, mode: Mode, replace_fd: int | None = None) -> None:
    """Puts a program on the XDP hook.

    Args:
        replace_fd: a descriptor of the program that is there now, exchanged atomically. Without it the
            hook must be empty.

    Raises:
        InterfaceError: someone else's program is there, the driver has no native XDP, the MTU is too big, …
    """
    what = f"cannot attach XDP to {netlink.name_of(index)}"
    # The kernel would tell (EBUSY), but pyroute2 0.7.2 asks it again and again for nine seconds.
    if replace_fd is None and (there := program(index)):
        raise _taken(what, index, f"program {there}")
    try:
        _set(index, fd, mode, replace_fd)
    except NetlinkError as error:
        raise _failure(what, index, error) from error


def detach(index: int, mode: Mode, expected_fd: int | None = None) -> bool:
    """Empties the XDP hook; True when there was a program.

    Args:
        expected_fd: a descriptor of the program that must be there; with any other one there nothing
            is changed. None removes whatever is there.

    Raises:
        InterfaceError: another program than the expected is on the hook.
    """
    if not program(index):
        return False
    try:
        _set(index, -1, mode, expected_fd)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return False
        raise _failure(f"cannot detach XDP from {netlink.name_of(index)}", index, error) from error
    return True


def _set(index: int, fd: int, mode: Mode, expected_fd: int | None) -> None:
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


def _failure(what: str, index: int, error: NetlinkError) -> InterfaceError | HostError:
    if error.code in (errno.EBUSY, errno.EEXIST):
        return _taken(what, index, error.args[1])
    if error.code == errno.EOPNOTSUPP:
        return InterfaceError(what, f"the driver has no native XDP ({error.args[1]})", "choose --mode tc")
    return netlink.failure(what, index, error, "lower the MTU, turn LRO off, or choose --mode tc")


def _taken(what: str, index: int, how: str) -> InterfaceError:
    return InterfaceError(
        what,
        f"someone else's program is on its XDP hook ({how})",
        f"see `ip link show {netlink.name_of(index)}`, remove that program, or choose --mode tc",
    )
