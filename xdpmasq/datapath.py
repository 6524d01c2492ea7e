"""A running datapath, found by whichever process from the programs on the interfaces.

The programs attached to the interfaces hold the maps, and nothing else does: nothing is pinned, so a
datapath lives until the last of its programs is detached, and a later process finds it from their ids.
What that process must know (layouts, settings, what to put back) stands as JSON in the map ``manifest``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np

from xdpmasq import bpf, compiler, hooks, presence, tcx
from xdpmasq.abi import REAP_FORCED, Slots
from xdpmasq.errors import NotAttachedError
from xdpmasq.net import clsact, netdev
from xdpmasq.programs import Programs
from xdpmasq.tables import Tables


class Attached(Tables):
    """A running datapath, found from its programs; works with the agent dead."""

    agent_pid: int | None = None

    @property
    def agent_alive(self) -> bool:
        return self.agent_pid is not None

    @property
    def wan_names(self) -> list[str]:
        """Its WANs by number, as they were named."""
        return wan_names(self.manifest)

    @property
    def hz(self) -> int:
        """Jiffies a second."""
        return int(self.manifest["hz"])

    def now(self) -> int:
        """Jiffies."""
        return bpf.jiffies()

    @classmethod
    def from_program(cls, program: bpf.Program) -> Self | None:
        """The datapath that a program of ours belongs to, or None when it is not ours."""
        raw = {}
        for number in program.map_ids():
            map_ = bpf.Map.by_id(number)
            raw[map_.name] = map_
        if "manifest" not in raw:
            return None
        text = {"manifest": _with_layout(raw["manifest"], "<u4", [("text", "u1", (65536,))])}
        layouts = cls(text).manifest.get("layouts", {})
        maps = {
            # the kernel cuts names to 15 characters
            name: _with_layout(raw[name[:15]], *map(compiler.layout, layout))
            for name, layout in layouts.items()
            if name[:15] in raw
        }
        return cls(maps) if maps else None

    def flush(self, slots: Slots) -> int:
        """Ends the sessions in ``slots`` now; returns how many of them were there."""
        before = len(np.intersect1d(self.live_slots(), slots))
        self.reap(self.reaper, slots, REAP_FORCED)
        self.disarm_flows(slots)
        return before - len(np.intersect1d(self.live_slots(), slots))

    @cached_property
    def reaper(self) -> bpf.Program:
        """The agent's own, or, when it is dead, one compiled for the occasion."""
        if self.agent_alive:
            return bpf.Program.by_id(self.manifest["reaper"])
        return Programs(self.further, self.maps, self.externals, self.wans)["masq_reap"]


def wan_names(manifest: Mapping[str, Any]) -> list[str]:
    """The WANs of a datapath by number, as they were named; of a former version's the only one."""
    return list(manifest.get("wans") or [manifest["wan"]])


def _with_layout(map_: bpf.Map, key: Any, value: Any) -> bpf.Map:
    map_.key, map_.value = np.dtype(key), np.dtype(value)
    return map_


def program_ids(link: netdev.Link) -> list[int]:
    """Ids of the programs on a link that may be ours: our filters', and whatever is on TCX and the XDP hook."""
    ids = [each.prog_id for each in clsact.filters(link.index) if each.name == hooks.FILTER]
    ids += [number for hook in hooks.TC for number in tcx.programs(link.index, hook)]
    return ids + ([link.xdp_prog_id] if link.xdp_prog_id else [])


def on_link(link: netdev.Link) -> list[Attached]:
    """The datapaths that have programs on a link; more than one only where one has it and another a VLAN of it."""
    return _of_programs(program_ids(link))


def on_xdp(link: netdev.Link) -> list[Attached]:
    """The datapath whose program is on the XDP hook of a link, if any."""
    return _of_programs([link.xdp_prog_id] if link.xdp_prog_id else [])


def _of_programs(numbers: Iterable[int]) -> list[Attached]:
    found: dict[int, Attached] = {}
    for number in numbers:
        # A program, or a map of its, may go while we look.
        with contextlib.suppress(FileNotFoundError), bpf.Program.by_id(number) as program:
            attached = Attached.from_program(program) if program.name.startswith(hooks.PROGRAM) else None
            if attached:
                found.setdefault(attached.maps["manifest"].id, attached)
    return list(found.values())


def find_all() -> list[Attached]:
    """Every datapath in this network namespace.

    One of which only the punt port is left has no interface, and goes with its agent.
    """
    links = [link for link in netdev.links() if not netdev.is_punt_port(link)]
    found = {each.maps["manifest"].id: each for link in links for each in on_link(link)}
    for attached in found.values():
        attached.agent_pid = presence.agent_pid(attached.manifest["wan"])
    return list(found.values())


def find_of(wans: Sequence[str]) -> Attached | None:
    """The running datapath of these WANs, if there is one."""
    return next((each for each in find_all() if each.wan_names == list(wans)), None)


def find_others(wans: Sequence[str]) -> list[Attached]:
    """Every other one."""
    return [each for each in find_all() if each.wan_names != list(wans)]


def find(wan: str | None = None) -> Attached:
    """The running datapath, the one with this WAN when there are several.

    Raises:
        NotAttachedError: there is none, or no telling which is meant.
    """
    running = find_all()
    found = [each for each in running if wan is None or wan in each.wan_names]
    if running and not found:
        others = ", ".join(name for each in running for name in each.wan_names)
        raise NotAttachedError(f"xdpmasq is not attached to {wan}", f"here it runs on {others}", f"--wan {others}")
    if not found:
        why = "no program of ours is on an interface here"
        raise NotAttachedError("xdpmasq is not attached", why, "xdpmasq attach --wan … --lan …")
    if len(found) > 1:
        names = ", ".join(each.manifest["wan"] for each in found)
        raise NotAttachedError("xdpmasq runs more than once here", f"on {names}", "name one with --wan")
    return found[0]
