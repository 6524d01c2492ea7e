"""Our programs on the hooks of interfaces: putting them there, finding whose they are, taking them off.

TC programs go on TCX; where the kernel has none (before 6.6) they are filters on a clsact qdisc, as they also are
with ``XDPMASQ_TC=clsact`` in the environment, for comparison and for tests.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network
from typing import Any

from xdpmasq import bpf, datapath, hooks, sysctls, tcx, vlans
from xdpmasq.errors import InterfaceError
from xdpmasq.hooks import Hook
from xdpmasq.net import clsact, netdev, routing, xdp
from xdpmasq.programs import Programs


@functools.cache
def uses_tcx() -> bool:
    """Whether this process attaches TC programs by TCX."""
    return os.environ.get("XDPMASQ_TC") != "clsact" and tcx.is_there()


@contextlib.contextmanager
def _current(index: int) -> Iterator[int | None]:
    """A descriptor of the program on the XDP hook, None when it is empty."""
    number = xdp.program(index)
    if not number:
        yield None
        return
    with bpf.Program.by_id(number) as program:
        ours = program.name.startswith(hooks.PROGRAM)
        yield program.fd if ours else None


def _ours_on_tcx(index: int, hook: hooks.TcHook) -> list[bpf.Program]:
    found = []
    for number in tcx.programs(index, hook):
        with contextlib.suppress(FileNotFoundError):  # gone meanwhile
            found.append(bpf.Program.by_id(number))
    return [program for program in found if program.name.startswith(hooks.PROGRAM)]


def _our_filters(index: int, hook: hooks.TcHook) -> list[clsact.Filter]:
    return [each for each in clsact.filters(index) if (each.name, each.direction) == (hooks.FILTER, hook)]


def tc_programs(link: netdev.Link) -> set[tuple[str, int]]:
    """(hook, program's id) of all programs where ours would be attached, others' included."""
    if uses_tcx():
        return {(hook, number) for hook in hooks.TC for number in tcx.programs(link.index, hook)}
    return {(each.direction, each.prog_id) for each in clsact.filters(link.index)}


def put(link: netdev.Link, hook: Hook, programs: Programs) -> None:
    """Attaches, or replaces our own program without a gap.

    Raises:
        InterfaceError: the hook is taken, or the kernel refuses for another reason.
    """
    program = programs[hook.function]
    if hook.kind == "xdp":
        with _current(link.index) as there:
            xdp.attach(link.index, program.fd, "native", there)
        return
    # No packet may be translated twice, nor never. As clsact's filters run after TCX, a move between the two, either
    # way, is covered by a program on TCX after which they do not run. For that moment others' filters do not either.
    moves = _our_filters(link.index, hook.kind) if uses_tcx() else _ours_on_tcx(link.index, hook.kind)
    with programs.being_last() if moves else contextlib.nullcontext():
        if moves or uses_tcx():
            _put_on_tcx(link, hook.kind, program)
        if uses_tcx():
            _clear_clsact(link, hook.kind)
        else:
            clsact.attach(link.index, hook.kind, program.fd, hooks.FILTER, hooks.PRIORITY)
            _clear_tcx(link, hook.kind)


def _put_on_tcx(link: netdev.Link, hook: hooks.TcHook, program: bpf.Program) -> None:
    there = next(iter(_ours_on_tcx(link.index, hook)), None)
    if there and there.id == program.id:
        return
    try:
        tcx.attach(link.index, hook, program, there)
    except OSError as error:
        what = f"cannot attach {program.name} to TCX {hook} of {link.name}"
        full = "no more programs fit there; " if error.errno == errno.ERANGE else ""
        why = f"{full}the kernel says: {error.strerror}"
        raise InterfaceError(what, why, "see `bpftool net` of a release as new as the kernel") from error


def clear(link: netdev.Link, keep: tuple[Hook, ...] = ()) -> bool:
    """Takes our programs off a link, except where ``keep`` wants one. True when there were any."""
    kept = {hook.kind for hook in keep}
    found = "xdp" not in kept and _clear_xdp(link)
    for hook in hooks.TC:
        if hook not in kept:
            found |= _clear_clsact(link, hook)
            found |= _clear_tcx(link, hook)
    return found


def clear_device(device: netdev.Link, manifest: dict[str, Any]) -> bool:
    """Takes our XDP program off a device, unless it serves another WAN's VLANs there."""
    others = [each for each in datapath.on_xdp(device) if each.manifest["wan"] != manifest["wan"]]
    return bool(device.xdp_prog_id) and not others and _clear_xdp(device)


def _clear_xdp(link: netdev.Link) -> bool:
    with _current(link.index) as there:
        return there is not None and xdp.detach(link.index, "native", there)


def _clear_clsact(link: netdev.Link, hook: hooks.TcHook) -> bool:
    filters = _our_filters(link.index, hook)
    return any([clsact.detach(link.index, hook, each.priority, each.handle) for each in filters])


def _clear_tcx(link: netdev.Link, hook: hooks.TcHook) -> bool:
    return any([tcx.detach(link.index, hook, program) for program in _ours_on_tcx(link.index, hook)])


def take_down(manifest: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Puts sysctls back first, so that no packet is forwarded untranslated; then removes programs."""
    others = [each.manifest for each in datapath.find_all() if each.manifest["wan"] != manifest["wan"]]
    put_back = sysctls.restore(manifest, others)
    for each in manifest.get("local_routes", ()):
        routing.local_route_del(IPv4Network(each))
    cleared = []
    links = netdev.links()
    for device in devices(manifest, links):
        clear_device(device, manifest)
    # The WANs' translation goes last.
    outside = datapath.wan_names(manifest)
    for link in sorted(links, key=lambda link: bool(netdev.match_links(outside, [link]))):
        if belongs(link, manifest) and leave(link, manifest):
            cleared.append(link.name)
    return cleared, put_back


def leave(link: netdev.Link, manifest: dict[str, Any]) -> bool:
    """Takes everything of ours off a link; True when there were programs."""
    found = clear(link)
    # Not when moving to TCX: while a qdisc comes or goes, even this one, the kernel drops what is to be sent.
    if link.index in manifest["qdiscs"] and clsact.is_empty(link.index):
        clsact.remove(link.index)
        manifest["qdiscs"].remove(link.index)
    return found


def devices(manifest: dict[str, Any], links: Sequence[netdev.Link]) -> list[netdev.Link]:
    """Those on which the datapath's XDP programs may be."""
    known = {entry.get("device", entry["index"]) for entry in manifest["interfaces"]}
    known |= {vlans.wire_of(link, links).device.index for link in links if belongs(link, manifest)}
    return [link for link in links if link.index in known]


def belongs(link: netdev.Link, manifest: dict[str, Any]) -> bool:
    mine = {entry["index"] for entry in manifest["interfaces"]} | set(manifest["qdiscs"])
    return link.index in mine or bool(netdev.match_links([*datapath.wan_names(manifest), *manifest["lans"]], [link]))
