"""Our programs on the interfaces: put where they are wanted, left where they are whole, else taken off."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xdpmasq import attachment, checks, datapath, drivers, hooks, vlans
from xdpmasq.abi import PORTS, Role
from xdpmasq.config import Config
from xdpmasq.datapath import Attached
from xdpmasq.errors import InterfaceError
from xdpmasq.hooks import Hook
from xdpmasq.interfaces import Served
from xdpmasq.manifest import Manifest
from xdpmasq.net import clsact, netdev
from xdpmasq.programs import Programs
from xdpmasq.tables import Tables
from xdpmasq.topology import Topology

log = logging.getLogger("xdpmasq")


def functions(config: Config) -> list[str]:
    """The programs that the interfaces as they are will want in any mode, the longest first."""
    wanted = Topology.look(config).wanted(loopback=False)
    found = [hooks.of_role(role, xdp=False, ethernet=link.ethernet) for link, role in wanted]
    return list(dict.fromkeys([each.function for some in found for each in some] + ["masq_reap"]))


class Attaching:
    """Follows the interfaces.

    Args:
        before: the manifest of an earlier agent, whose programs may be anywhere.
    """

    def __init__(
        self,
        config: Config,
        tables: Tables,
        programs: Programs,
        manifest: Manifest,
        before: Mapping[str, Any] | None,
    ) -> None:
        self._config, self._tables, self._programs, self._manifest = config, tables, programs, manifest
        self._before = dict(before) if before else None
        self._links: Sequence[netdev.Link] = []  # as they were at the last look
        self._flying: set[int] = set()  # the devices that have our XDP program since that look
        self._attached: dict[str, tuple[netdev.Link, tuple[Hook, ...]]] = {}
        self._refused: dict[netdev.Link, str] = {}  # what XDP does not work on, and why
        self._troubled = False

    @property
    def indices(self) -> set[int]:
        """Of the interfaces that have programs."""
        return {link.index for link, _ in self._attached.values()}

    @property
    def on_loopback(self) -> bool:
        return "lo" in self._attached

    @property
    def is_complete(self) -> bool:
        """At the last look every interface took what it was to have."""
        return not self._troubled and not self._refused

    def is_lost_on_tcx(self) -> bool:
        """Of programs taken off TCX netlink says nothing."""
        return attachment.uses_tcx() and not all(
            self._is_whole(link, tuple(hook for hook in wanted if hook.kind != "xdp"))
            for link, wanted in self._attached.values()
        )

    def forget_refusals(self) -> None:
        """What refused XDP may have changed its mind without a word."""
        self._refused = {}

    # --- leaving

    def leave_others(self, wanted: Sequence[netdev.Link], links: Sequence[netdev.Link]) -> None:
        """Forgets interfaces that are gone, and leaves those that are not wanted any more."""
        self._links = links
        keep, there = {link.index: link.name for link in wanted}, {link.index: link for link in links}
        below = {self._device(link) for link in wanted}
        for device in attachment.devices(self._before or self._manifest, links):
            if device.xdp_prog_id and device not in below:
                attachment.clear_device(device, self._manifest)
        for index, name in self._known(links).items():
            if keep.get(index) != name:
                self._attached.pop(name, None)
            if index in keep:  # perhaps renamed: it must not be without translation for a moment
                continue
            log.info("%s is gone, or no longer one of ours", name)
            if index < PORTS:
                self._tables.unset_interface(index)
            if index in there:
                attachment.leave(there[index], self._manifest)
        self._manifest["qdiscs"] = [index for index in self._manifest["qdiscs"] if index in there]

    def _known(self, links: Sequence[netdev.Link]) -> dict[int, str]:
        """Interfaces, by index, that may have our programs."""
        known = {entry["index"]: entry["name"] for entry in self._manifest["interfaces"]}
        if self._before:
            # What an agent killed while it attached has left may not be in its manifest yet.
            known |= {link.index: link.name for link in links if attachment.belongs(link, self._before)}
            self._before = None
        return known

    # --- putting on

    def put(
        self, wanted: Sequence[tuple[netdev.Link, Role]], here: Topology, *, redirects: bool, anyhow: bool
    ) -> list[Served]:
        """Attaches to these.

        Args:
            redirects: some of what LANs send goes to the gateway itself.
            anyhow: one that refuses XDP is left on TC until anything about it changes, and one that refuses that as
                well does not keep the others from being served.

        Raises:
            InterfaceError: one refuses.
        """
        self._troubled, self._flying = False, set()
        served = [self._serve(link, role, here.uplinks, redirects=redirects, anyhow=anyhow) for link, role in wanted]
        self._ground(self._device(link) for link, _ in wanted)
        return served

    def _serve(
        self, link: netdev.Link, role: Role, uplinks: Sequence[netdev.Link], *, redirects: bool, anyhow: bool
    ) -> Served:
        hook, why = "tc", self._refused.get(link, "")
        try:
            if not why:
                hook, why = drivers.choose(self._config.mode, link, self._links, uplinks)
            self._attach(link, role, hook, redirects=redirects)
        except InterfaceError as error:
            if not anyhow:
                raise
            log.warning("%s", error)
            self._troubled = True
            if hook == "tc":
                return Served(link, role, "none", str(error))
            others = {known: words for known, words in self._refused.items() if known.index != link.index}
            self._refused = {**others, link: str(error)}
            return self._serve(link, role, uplinks, redirects=redirects, anyhow=anyhow)
        return Served(link, role, hook, why)

    def _attach(self, link: netdev.Link, role: Role, hook: str, *, redirects: bool) -> None:
        wanted = hooks.of_role(role, xdp=hook == "xdp", ethernet=link.ethernet, redirects=redirects)
        if hook == "xdp" and (trouble := vlans.trouble(self._device(link), self._links)):
            raise trouble
        before = self._attached.get(link.name)
        if before and before[1] == wanted and before[0].index == link.index and self._is_whole(link, wanted):
            self._flying |= {self._device(link).index} if hook == "xdp" else set()
            return
        self._check_free(link.name, datapath.on_link(link))
        on_clsact = not attachment.uses_tcx() and any(each.kind != "xdp" for each in wanted)
        if on_clsact and not clsact.present(link.index):
            self._manifest["qdiscs"] = sorted({*self._manifest["qdiscs"], link.index})
            self._manifest.save()
            clsact.add(link.index)
        for each in wanted:
            if each == hooks.XDP:
                self._launch(self._device(link))
            else:
                attachment.put(link, each, self._programs)
        attachment.clear(link, keep=(*wanted, hooks.XDP))
        self._attached[link.name] = (link, wanted)
        log.info("attached to %s as %s by %s", link.name, role, hook)

    def _device(self, link: netdev.Link) -> netdev.Link:
        """Where XDP for an interface is."""
        return vlans.wire_of(link, self._links).device

    def _launch(self, device: netdev.Link) -> None:
        """Puts the XDP program on a device: once, however many VLANs it serves there."""
        if device.index not in self._flying:
            self._check_free(device.name, datapath.on_xdp(device))
            attachment.put(device, hooks.XDP, self._programs)
            self._flying.add(device.index)

    def _ground(self, devices: Iterable[netdev.Link]) -> None:
        """Takes the XDP program off those where no interface is on XDP."""
        for device in devices:
            if device.xdp_prog_id and device.index not in self._flying:
                attachment.clear_device(device, self._manifest)

    def _check_free(self, name: str, present: Sequence[Attached]) -> None:
        """Raises InterfaceError when another xdpmasq is there: two would take the place from each other for ever."""
        for other in present:
            if other.maps["manifest"].id != self._tables.maps["manifest"].id:
                raise checks.in_use(name, other.manifest["wan"])

    def _is_whole(self, link: netdev.Link, wanted: Iterable[Hook]) -> bool:
        """Nobody took our programs away, or put another in their place, meanwhile."""
        present = attachment.tc_programs(link) | {("xdp", self._device(link).xdp_prog_id)}
        return all((hook.kind, self._programs[hook.function].id) in present for hook in wanted)
