"""Our programs on the hooks of interfaces: putting them there, finding whose they are, taking them off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from xdpmasq import bpf, datapath, netdev, sysctls
from xdpmasq.datapath import Hook


@contextlib.contextmanager
def _current(index: int) -> Iterator[int | None]:
    """A descriptor of the program on the XDP hook, None when it is empty."""
    number = next((each.xdp_prog_id for each in netdev.links() if each.index == index), 0)
    if not number:
        yield None
        return
    with bpf.Program.by_id(number) as program:
        ours = program.name.startswith(datapath.PROGRAM)
        yield program.fd if ours else None


def put(link: netdev.Link, hook: Hook, program: bpf.Program) -> None:
    """Attaches, or replaces our own program without a gap."""
    if hook.kind == "xdp":
        with _current(link.index) as there:
            netdev.xdp_attach(link.index, program.fd, "native", there)
    else:
        netdev.tc_attach(link.index, hook.kind, program.fd, datapath.FILTER, datapath.PRIORITY)


def clear(link: netdev.Link, keep: tuple[Hook, ...] = ()) -> bool:
    """Takes our programs off a link, except where ``keep`` wants one. True when there were any."""
    kept = {hook.kind for hook in keep}
    found = False
    if "xdp" not in kept:
        with _current(link.index) as there:
            found = there is not None and netdev.xdp_detach(link.index, "native", there)
    for each in netdev.tc_programs(link.index):
        if each.name == datapath.FILTER and each.direction not in kept:
            found |= netdev.tc_detach(link.index, each.direction, each.priority, each.handle)
    return found


def take_down(manifest: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """Puts sysctls back first, so that no packet is forwarded untranslated; then removes programs."""
    put_back = sysctls.restore(manifest)
    cleared = []
    # The WAN's translation goes last.
    for link in sorted(netdev.links(), key=lambda link: bool(netdev.match_links([manifest["wan"]], [link]))):
        if belongs(link, manifest) and leave(link, manifest):
            cleared.append(link.name)
    return cleared, put_back


def leave(link: netdev.Link, manifest: dict[str, Any]) -> bool:
    """Takes everything of ours off a link; True when there were programs."""
    found = clear(link)
    if link.index in manifest["qdiscs"] and not netdev.tc_programs(link.index):
        netdev.clsact_del(link.index)
        manifest["qdiscs"].remove(link.index)
    return found


def belongs(link: netdev.Link, manifest: dict[str, Any]) -> bool:
    mine = {entry["index"] for entry in manifest["interfaces"]} | set(manifest["qdiscs"])
    return link.index in mine or bool(netdev.match_links([manifest["wan"], *manifest["lans"]], [link]))
