"""TC programs on an interface's clsact qdisc, and that qdisc."""

import errno
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import tcmsg
from pyroute2.netlink.rtnl.tcmsg import sched_bpf

from xdpmasq.errors import InterfaceError
from xdpmasq.net import netlink

Direction = Literal["ingress", "egress"]

CLSACT_PARENTS: dict[Direction, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
CLSACT_HANDLE = 0xFFFF0000
ETH_P_ALL = 3


class _BpfOptions(sched_bpf.options):  # type: ignore[misc]
    # pyroute2 up to 0.9.7 stops at TCA_BPF_FLAGS; the program's id comes after it.
    nla_map = (
        *sched_bpf.options.nla_map[:9],
        ("TCA_BPF_FLAGS_GEN", "uint32"),
        ("TCA_BPF_TAG", "hex"),
        ("TCA_BPF_ID", "uint32"),
    )


tcmsg.plugins["bpf"] = SimpleNamespace(**{**vars(sched_bpf), "options": _BpfOptions})


@dataclass(frozen=True)
class Filter:
    """A bpf filter on a clsact hook; name is the filter's, not the program's."""

    index: int
    direction: Direction
    name: str
    prog_id: int
    priority: int
    handle: int


def present(index: int) -> bool:
    """Whether the link has a clsact qdisc, whoever made it."""
    return _ingress_qdisc(index) == "clsact"


def add(index: int) -> bool:
    """Gives the link a clsact qdisc; True when it had none.

    Raises:
        InterfaceError: the link has an `ingress` qdisc in its place, or is gone.
    """
    what = f"cannot add a clsact qdisc to {netlink.name_of(index)}"
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.tc("add", "clsact", index)
    except NetlinkError as error:
        if error.code not in (errno.EEXIST, errno.EINVAL):
            raise netlink.failure(what, index, error) from error
        kind = _ingress_qdisc(index)
        if kind == "clsact":
            return False
        if kind is None:
            raise netlink.failure(what, index, error) from error
        raise InterfaceError(
            what,
            f"it has an {kind} qdisc, which takes the same place and has no egress hook",
            f"`tc qdisc del dev {netlink.name_of(index)} ingress`, and put its filters on clsact instead",
        ) from error
    return True


def remove(index: int) -> bool:
    """Takes the clsact qdisc with all filters off the link; False when there was none."""
    return present(index) and _delete("the clsact qdisc", "del", "clsact", index)


def is_empty(index: int) -> bool:
    """Whether no filter of any kind is on the link's clsact hooks."""
    return not any(_messages(index, direction) for direction in CLSACT_PARENTS)


def _ingress_qdisc(index: int) -> str | None:
    for qdisc in netlink.dump(lambda ipr: ipr.get_qdiscs()):
        if qdisc["index"] == index and qdisc["handle"] == CLSACT_HANDLE:
            return str(qdisc.get_attr("TCA_KIND"))
    return None


def attach(index: int, direction: Direction, fd: int, name: str, priority: int, *, handle: int = 1) -> None:
    """Puts a direct-action program for all protocols on a clsact hook.

    Our own filter (same name, priority and handle) is exchanged atomically: no packet passes between.

    Raises:
        InterfaceError: a filter of another name has that priority and handle, or there is no clsact.
    """
    interface = netlink.name_of(index)
    what = f"cannot attach {name} to TC {direction} of {interface}"
    see = f"see `tc filter show dev {interface} {direction}`"
    there = _filter_at(index, direction, priority, handle)
    if there and there.name != name:
        raise InterfaceError(what, f"someone else's filter {there.name!r} has priority {priority}", see)
    try:
        with IPRoute(ext_ack=True) as ipr:
            where = _where(direction, priority, handle)
            ipr.tc("replace-filter", "bpf", index, **where, fd=fd, name=name, direct_action=True)
    except NetlinkError as error:
        raise netlink.failure(what, index, error, see) from error


def detach(index: int, direction: Direction, priority: int, handle: int = 1) -> bool:
    """Takes a bpf filter off a clsact hook; False when it was not there."""
    if not _filter_at(index, direction, priority, handle):
        return False
    return _delete("a filter", "del-filter", "bpf", index, **_where(direction, priority, handle))


def filters(index: int) -> list[Filter]:
    """All bpf filters on the clsact hooks of a link, ours and others'; ingress first, by priority."""
    if not present(index):
        return []
    return [program for direction in CLSACT_PARENTS for program in _filters(index, direction)]


def _delete(what: str, command: str, kind: str, index: int, **where: int) -> bool:
    """False when it is gone already, perhaps with its link."""
    try:
        with IPRoute(ext_ack=True) as ipr:
            ipr.tc(command, kind, index, **where)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT):
            return False
        raise netlink.failure(f"cannot remove {what} from {netlink.name_of(index)}", index, error) from error
    return True


def _where(direction: Direction, priority: int, handle: int) -> dict[str, int]:
    return {"parent": CLSACT_PARENTS[direction], "prio": priority, "handle": handle, "protocol": ETH_P_ALL}


def _filter_at(index: int, direction: Direction, priority: int, handle: int) -> Filter | None:
    at = [each for each in filters(index) if each.direction == direction]
    return next((each for each in at if (each.priority, each.handle) == (priority, handle)), None)


def _messages(index: int, direction: Direction) -> list[Any]:
    return netlink.dump(lambda ipr: ipr.get_filters(index=index, parent=CLSACT_PARENTS[direction]))


def _filters(index: int, direction: Direction) -> list[Filter]:
    found = []
    for message in _messages(index, direction):
        options = message.get_attr("TCA_OPTIONS")
        # the first message of each priority is its empty head
        if message.get_attr("TCA_KIND") != "bpf" or not message["handle"] or options is None:
            continue
        prog_id, name = options.get_attr("TCA_BPF_ID") or 0, options.get_attr("TCA_BPF_NAME") or ""
        found.append(Filter(index, direction, name, prog_id, message["info"] >> 16, message["handle"]))
    return sorted(found, key=lambda each: (each.priority, each.handle))
