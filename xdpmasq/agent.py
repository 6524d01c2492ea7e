"""The life of the running system: attach, tick, follow the interfaces, stop, detach.

Everything the agent does is a reconciliation: it compares what should be on the interfaces with what is, and
changes the difference. So attaching, an interface that comes back, and adopting a datapath after a crash are
one and the same path. The agent can die at any moment: the programs go on without it.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, collapse_addresses
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import (
    __version__,
    attachment,
    bpf,
    checks,
    datapath,
    drivers,
    expiry,
    forwarding,
    health,
    notify,
    presence,
    redirecting,
    reloading,
    settings,
    sockets,
    source,
    sysctls,
    vlans,
    wans,
)
from xdpmasq import config as configuration
from xdpmasq.alg import registry, switches
from xdpmasq.alg.service import Service
from xdpmasq.asking import Asking
from xdpmasq.config import Config
from xdpmasq.datapath import Hook, Role
from xdpmasq.errors import DatapathError, ForwardError, InterfaceError, MasqError
from xdpmasq.expiry import Expiry
from xdpmasq.externals import Place
from xdpmasq.forwards import Rule
from xdpmasq.net import clsact, ifaddrs, monitor, neighbours, netdev, routing
from xdpmasq.pinholes import Pinholes
from xdpmasq.pulse import Pulse
from xdpmasq.punt import Punt
from xdpmasq.punting import Punting
from xdpmasq.recorder import TURN, Recorder, recording
from xdpmasq.sysctls import Sysctls
from xdpmasq.wans import Wan

log = logging.getLogger("xdpmasq")

TICK_S = 1.0
SWEEP_S = 10.0
SETTLE_S = 0.02  # netlink messages come in bursts: the least rest between two looks
DISARM_ALL_S = 3600  # keeps settings.disarmed_at within reach of 32-bit jiffies
RETRY_S = (1, 60)  # after something went wrong: first, and at most
BUSY_S = 0.5  # the longest one, while changes rain down


class Signals:
    """What came. It is only noted: an exception thrown by the handler would leave pyroute2's event loop, or an
    attachment, in the middle of something.

    Attributes:
        stop: SIGTERM or SIGINT.
        reload: SIGHUP.
        wake: readable when one has come.
    """

    def __init__(self) -> None:
        self.stop = self.reload = False
        self.wake, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # who waits for descriptors is woken by it
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            self.reload = True
        else:
            self.stop = True


class Agent:
    """Keeps one datapath in step with its interfaces.

    Args:
        config: what the user wants; validated.
        adopted: the datapath that an earlier agent left, to go on with.
        programs: those of the earlier one, where it was in this process.
        recorder: logs what happens, if anything is to be logged.
        algs: the earlier one's, in this process: what they hold goes on.
    """

    def __init__(
        self,
        config: Config,
        adopted: datapath.Attached | None = None,
        programs: datapath.Programs | None = None,
        recorder: Recorder | None = None,
        algs: Service | None = None,
    ) -> None:
        self.config = self._config = config
        self._recorder = recorder
        further = adopted.further if adopted else settings.further_sessions(config)
        externals = config.external.room(len(config.wans))
        if adopted and adopted.externals != externals:
            raise DatapathError(
                "the running datapath has another number of external addresses",
                f"it has {adopted.externals}, the configuration names {externals}",
                "xdpmasq detach, then attach: running sessions start anew",
            )
        self._programs = programs or datapath.Programs(
            further, adopted.maps if adopted else None, externals, len(config.wans)
        )
        if adopted and adopted.manifest["layouts"] != self._programs.layouts:
            raise DatapathError(
                "the running datapath is of another version",
                f"xdpmasq {adopted.manifest['version']} attached it, and lays out its tables otherwise",
                "xdpmasq detach, then attach: running sessions start anew",
            )
        self._programs.load(self._functions())
        self.tables = datapath.Tables(self._programs.maps)
        self._manifest = adopted.manifest if adopted else self._new_manifest()
        self._manifest |= {
            "reaper": self._programs["masq_reap"].id,
            "agent_pid": os.getpid(),
            "version": __version__,
            "restarts": self._manifest.get("restarts", -1) + 1,
        }
        self.pulse = Pulse()
        self._leftover = {**self._manifest} if adopted else None
        self._manifest |= {"lans": list(config.lans), "mode": config.mode, "config": self._kept_config()}
        self._hz: int = self._manifest["hz"]
        self._links: list[netdev.Link] = []  # as they were at the last look
        self._flying: set[int] = set()  # the devices that have our XDP program since that look
        self._attached: dict[str, tuple[netdev.Link, tuple[Hook, ...]]] = {}
        self._refused: dict[netdev.Link, str] = {}  # what XDP does not work on, and why
        self._troubled = False
        self._served: list[Place] = []  # the addresses that all sessions are of
        self._owners = {
            IPv4Network(place.address): place.wan for place in (adopted.places if adopted else ()) if place.address
        }
        self._clash = ""  # what is wrong with the WANs' networks
        self._others: set[int] = set()  # interfaces that are neither LAN nor WAN
        self._sysctls = Sysctls(self._manifest, self._save)
        self._serving = False
        self._retry_at, self._retry_s = float("inf"), 0.0
        self._rested_at = 0.0
        self._neighbours: dict[tuple[int, str], bytes] = {}
        self._selector = selectors.DefaultSelector()
        pinholes = Pinholes(self.tables, self._programs["masq_reap"], config.ports, self._hz)
        self._algs = algs or Service(self.tables, pinholes, registry.find)
        self._algs.pinholes = pinholes
        self._punting = Punting(
            self.tables,
            self._programs,
            self._selector,
            lambda: Punt.open(self.tables, config.timeouts.fragment_s, config.limits.refusal, self._algs.take),
        )
        self._reserved = self._pool(self._leftover)
        self._forwards = forwarding.Upkeep(self.tables)
        self._asking = Asking(
            config,
            self.tables,
            self._programs["masq_reap"],
            self._hz,
            selector=self._selector,
            before=self._manifest.get("pcp", {}),
        )
        self._rules_to_put = config.rules
        self._redirects = adopted is not None  # the LANs may bring redirected connections' answers back
        timeouts = config.timeouts
        self._expiry = Expiry(
            self.tables,
            self._programs["masq_reap"],
            self._reserved,
            timeouts.port_rest_s * self._hz,
            self._hz,
            kept=self._forwards.slots,
            reap=self._reap,
        )
        self._settings()
        if self._leftover:
            self._move_pool(configuration.Ports(**self._leftover["config"]["ports"]))

    def _functions(self) -> list[str]:
        """The programs that the interfaces as they are will want in any mode, the longest first."""
        links = netdev.links()
        roles: list[tuple[Role, netdev.Link]] = [
            ("wan", link) for link in checks.wans_of(self._config, links) if link
        ]
        roles += [("lan", link) for link in netdev.match_links(self._config.lans, links)]
        hooks = [datapath.hooks(role, xdp=False, ethernet=link.ethernet) for role, link in roles]
        return list(dict.fromkeys([each.function for some in hooks for each in some] + ["masq_reap"]))

    def _new_manifest(self) -> dict[str, Any]:
        config = self._config
        return {
            "wan": config.wan,
            "wans": list(config.wans),
            "lans": list(config.lans),
            "mode": config.mode,
            "interfaces": [],
            "external": None,
            "externals": [],
            "hz": bpf.tick_rate(),
            "attached_at": time.time(),
            "config": self._kept_config(),
            "counters": list(source.counters()),
            "layouts": self._programs.layouts,
            "qdiscs": [],
            "local_routes": [],
            "sysctls": {},
            "side_effects": {},
        }

    def _kept_config(self) -> dict[str, Any]:
        """The configuration for later processes. Of rules they read the tables: there could be a thousand."""
        return configuration.as_fields(replace(self._config, forwards=(), redirects=(), triggers=()))

    def _save(self) -> None:
        self.tables.manifest = self._manifest

    # --- tables

    def _settings(self) -> None:
        fields = settings.fields(self._config, self._hz, self.tables.further)
        self.tables.set_settings(**fields, disarmed_at=bpf.jiffies(), heartbeat=bpf.jiffies(), punt=0, last=False)
        self.tables.set_exempts(self._config.external.exempt)

    def _pool(self, leftover: dict[str, Any] | None) -> npt.NDArray[np.uint64]:
        """The bitmap of slots outside the pool; claims them when the tables are new."""
        outside = self._outside(self._config.ports)
        if leftover:
            # Ports that an earlier configuration gave out are reaped like any other; forwarded ones are kept.
            outside[self.tables.given_slots()] = False
        reserved = np.packbits(outside, bitorder="little").view(np.uint64)
        if not leftover:
            self.tables.claims[:] = reserved
        return reserved

    def _outside(self, ports: configuration.Ports) -> npt.NDArray[np.bool_]:
        return settings.outside(ports, len(self.tables.claims) * 64, self.tables.externals)

    def _move_pool(self, before: configuration.Ports) -> None:
        """From an earlier configuration's ports to this one's. What is in use stays so until it ends."""
        was_outside, is_outside = self._outside(before), self._outside(self._config.ports)
        reaper = self._programs["masq_reap"]
        for changed, order in (
            (is_outside & ~was_outside, datapath.REAP_CLAIM),
            (was_outside & ~is_outside, datapath.REAP_OPEN),
        ):
            self.tables.reap(reaper, np.flatnonzero(changed).astype(np.uint32), order)

    def _reap(self, slots: datapath.Slots, order: int) -> None:
        """Ends many sessions, and lets the log follow."""
        with self._recorder.aside() if self._recorder else contextlib.nullcontext():
            for start in range(0, len(slots), TURN):
                self.tables.reap(self._programs["masq_reap"], slots[start : start + TURN], order)
                if self._recorder:
                    self._recorder.listen()

    # --- following the interfaces

    def reconcile(self) -> None:
        """Brings programs, tables and external address in step with the interfaces as they are now."""
        links = self._links = netdev.links()
        addresses = [each for each in ifaddrs.addresses(4) if isinstance(each.ip, IPv4Interface)]
        outside = wans.present(self._config, links, addresses)
        uplinks = [wan.link for wan in outside if wan.link]
        lans = [link for link in netdev.match_links(self._config.lans, links) if link not in uplinks]
        wanted: list[tuple[netdev.Link, Role]] = [
            *((link, "wan") for link in uplinks),
            *((link, "lan") for link in lans),
        ]
        if self._hairpins_own:
            wanted += [(link, "lo") for link in links if link.name == "lo"]
        self._leave_unwanted([link for link, _ in wanted], links)
        externals = self._follow_addresses(outside, lans, addresses)
        self._put_rules(lans, {each.index for each in addresses})
        self._redirects = self._wants_redirects
        redirecting.spare(self.tables, redirecting.EVERY_RULE, [IPv4Network(each.ip.ip) for each in addresses])
        self._troubled, self._flying = False, set()
        chosen = [(link, role, *self._bring_in(link, role, uplinks)) for link, role in wanted]
        self._ground([self._device(link) for link, _ in wanted])
        reports = self._tell(chosen, outside, addresses)
        named = [str(each) if each else None for each in externals]
        self._manifest |= {"interfaces": reports, "external": named[0], "externals": named}
        accelerate = any(report["hook"] == "xdp" for report in reports)
        self._know_others(links, {link.index for link, _ in wanted})
        turn = min(uplinks, key=lambda link: not link.up).index if uplinks else 0
        self.tables.set_settings(accelerate=accelerate, wan=turn)
        self._disarm()
        self.pulse.sees_wan(([link.index for link in uplinks], externals))
        self._punting.keep()
        self._asking.follow(lans, addresses, externals)
        self._manifest |= {"punt": self._punting.report, "pcp": self._asking.report}
        self._save()

    @property
    def shown(
        self,
    ) -> tuple[datapath.Tables, datapath.Programs, dict[str, Any], Pulse, Punting, Recorder | None]:
        """For the metrics, which only look."""
        return self.tables, self._programs, self._manifest, self.pulse, self._punting, self._recorder

    @property
    def _hairpins_own(self) -> bool:
        """The gateway itself may ask for a forward by its own public address; such packets only lo sees."""
        return forwarding.any_by_port(self.tables)

    @property
    def _wants_redirects(self) -> bool:
        """There are redirects on the LANs, or connections left of them."""
        return forwarding.any_on_lan(self.tables) or (self._redirects and redirecting.any_running(self.tables))

    def _put_rules(self, lans: list[netdev.Link], addressed: set[int]) -> None:
        """At the start, before any interface: forwards, redirects and triggers of the configuration. What is in place
        stays as it is.
        """
        wanted, self._rules_to_put = self._rules_to_put, ()
        if not wanted:
            return
        adopted = bool(self._manifest["interfaces"])
        lans_known = all(netdev.match_links([each], lans) for each in self._config.lans)
        lans_known &= all(link.index in addressed for link in lans)
        services = list(sockets.listeners())
        present = {each.rule for each in forwarding.read(self.tables)}
        for rule in wanted:
            if rule in present:
                continue
            try:
                forwarding.check(self.tables, rule, lans_known=lans_known, services=services)
                forwarding.put(self.tables, self._programs["masq_reap"], rule)
            except ForwardError as error:
                if not adopted:
                    raise
                log.warning("not in place: %s", error)

    def _switch_algs(self) -> None:
        """At the start: as the configuration has them; as they are, where the earlier agent had the same one."""
        wanted = [use.as_fields() for use in self._config.algs]
        if self._manifest.get("algs_wanted") == wanted:
            return
        for use in switches.read(self.tables):
            switches.take(self.tables, use.name)
        for use in self._config.algs:
            switches.put(self.tables, use)
        self._manifest["algs_wanted"] = wanted

    def _bring_in(self, link: netdev.Link, role: Role, uplinks: list[netdev.Link]) -> tuple[str, str]:
        """Attaches to a link.

        In service, one that refuses XDP is left on TC until anything about it changes, and one that refuses that
        as well does not keep the others from being served.

        Returns:
            The hook ("none" after trouble) and why that one.
        """
        hook, why = "tc", self._refused.get(link, "")
        try:
            if not why:
                hook, why = self._choose(link, uplinks)
            self._attach(link, role, hook)
        except InterfaceError as error:
            if not self._serving:
                raise
            log.warning("%s", error)
            self._troubled = True
            if hook == "tc":
                return "none", str(error)
            others = {known: words for known, words in self._refused.items() if known.index != link.index}
            self._refused = {**others, link: str(error)}
            return self._bring_in(link, role, uplinks)
        return hook, why

    def _choose(self, link: netdev.Link, uplinks: list[netdev.Link]) -> tuple[str, str]:
        """The hook for a link, "xdp" or "tc", and why."""
        mode = self._config.mode
        if link.name == "lo":
            return "tc", "for the gateway's own way to its forwards"
        if mode == "tc":
            return "tc", "--mode tc"
        if link.index >= datapath.PORTS:
            return "tc", f"its interface index {link.index} is beyond {datapath.PORTS - 1}"
        if mode == "xdp":
            if not link.ethernet:
                raise InterfaceError(
                    f"{link.name} cannot do XDP", "it has no Ethernet header", "choose --mode tc or auto"
                )
            return "xdp", "--mode xdp"
        hook, why = drivers.auto(link, self._links)
        if hook == "xdp" and uplinks and all(drivers.auto(each, self._links)[0] == "tc" for each in uplinks):
            names = " and ".join(each.name for each in uplinks)
            return "tc", f"{names}, the WAN, is on TC, so nothing could be redirected to it"
        return hook, why

    def _attach(self, link: netdev.Link, role: Role, hook: str) -> None:
        hooks = datapath.hooks(role, xdp=hook == "xdp", ethernet=link.ethernet, redirects=self._redirects)
        if hook == "xdp" and (trouble := vlans.trouble(self._device(link), self._links)):
            raise trouble
        before = self._attached.get(link.name)
        if before and before[1] == hooks and before[0].index == link.index and self._is_whole(link, hooks):
            self._flying |= {self._device(link).index} if hook == "xdp" else set()
            return
        self._check_free(link.name, datapath.on_link(link))
        on_clsact = not attachment.uses_tcx() and any(each.kind != "xdp" for each in hooks)
        if on_clsact and not clsact.present(link.index):
            self._manifest["qdiscs"] = sorted({*self._manifest["qdiscs"], link.index})
            self._save()
            clsact.add(link.index)
        for each in hooks:
            if each == datapath.XDP_HOOK:
                self._launch(self._device(link))
            else:
                attachment.put(link, each, self._programs)
        attachment.clear(link, keep=(*hooks, datapath.XDP_HOOK))
        self._attached[link.name] = (link, hooks)
        log.info("attached to %s as %s by %s", link.name, role, hook)

    def _device(self, link: netdev.Link) -> netdev.Link:
        """Where XDP for an interface is."""
        return vlans.wire_of(link, self._links).device

    def _launch(self, device: netdev.Link) -> None:
        """Puts the XDP program on a device: once, however many VLANs it serves there."""
        if device.index not in self._flying:
            self._check_free(device.name, datapath.on_xdp(device))
            attachment.put(device, datapath.XDP_HOOK, self._programs)
            self._flying.add(device.index)

    def _ground(self, devices: list[netdev.Link]) -> None:
        """Takes the XDP program off those where no interface is on XDP."""
        for device in devices:
            if device.xdp_prog_id and device.index not in self._flying:
                attachment.clear_device(device, self._manifest)

    def _check_free(self, name: str, present: list[datapath.Attached]) -> None:
        """Raises InterfaceError when another xdpmasq is there: two would take the place from each other for ever."""
        for other in present:
            if other.maps["manifest"].id != self.tables.maps["manifest"].id:
                raise checks.in_use(name, other.manifest["wan"])

    def _is_whole(self, link: netdev.Link, hooks: tuple[Hook, ...]) -> bool:
        """Nobody took our programs away, or put another in their place, meanwhile."""
        present = attachment.tc_programs(link) | {("xdp", self._device(link).xdp_prog_id)}
        return all((hook.kind, self._programs[hook.function].id) in present for hook in hooks)

    def _tell(
        self, chosen: list[tuple[netdev.Link, Role, str, str]], outside: list[Wan], addresses: list[ifaddrs.Address]
    ) -> list[dict[str, Any]]:
        """Writes the interfaces' rows, by the links' features as they are with our programs attached.

        Returns:
            What the manifest and `status` say of them.
        """
        present = netdev.links()
        fresh = {link.index: link for link in present}
        routes = routing.routes(4) if self._config.mss != "off" else []
        numbers = {wan.link.index: number for number, wan in enumerate(outside) if wan.link}
        self.tables.set_settings(exit=[wan.link.index if wan.link else 0 for wan in outside])
        reports, on_xdp = [], {}
        for attached, role, hook, reason in chosen:
            link, why = fresh.get(attached.index, attached), reason
            wire = vlans.wire_of(link, present)
            xdp, takes = hook == "xdp", drivers.takes_frames(wire.device)
            if link.index < datapath.PORTS:
                mss = settings.mss(self._config, link, routes) if role == "wan" else 0
                home = _primary(link, addresses) if role == "lan" else None
                redirects = home and self._redirects and hook != "none"
                self.tables.set_interface(
                    link,
                    role,
                    xdp_from=xdp,
                    xdp_to=xdp and takes,
                    mss=mss,
                    wan=numbers.get(link.index, 0),
                    wire=wire,
                    network=IPv4Network(home.network) if home else None,
                    redirect_to=IPv4Address(home.ip.ip) if home and redirects else None,
                )
            if xdp and wire.tags:
                on_xdp[wire] = link.index
                why += f", on {wire.device.name}"
            if xdp and not takes:
                why += "; but it takes no frames from XDP (a veth needs GRO or an XDP program at its peer)"
            report = {"name": link.name, "index": link.index, "device": wire.device.index}
            reports.append({**report, "role": role, "hook": hook, "why": why})
        self.tables.set_vlans(on_xdp)
        return reports

    def _know_others(self, links: list[netdev.Link], wanted: set[int]) -> None:
        """What is neither LAN nor WAN, as a VPN: the programs tell it from a WAN made anew, see bpf/guard.h."""
        others = {link.index: link for link in links if link.index < datapath.PORTS and link.index not in wanted}
        for index in self._others - others.keys() - wanted:
            self.tables.unset_interface(index)
        for index in others.keys() - self._others:
            self.tables.set_interface(others[index], "other", xdp_from=False, xdp_to=False)
        self._others = set(others)

    def _leave_unwanted(self, wanted: list[netdev.Link], links: list[netdev.Link]) -> None:
        """Forgets interfaces that are gone, and leaves those that are no LAN or WAN any more."""
        keep, there = {link.index: link.name for link in wanted}, {link.index: link for link in links}
        below = {self._device(link) for link in wanted}
        for device in attachment.devices(self._leftover or self._manifest, links):
            if device.xdp_prog_id and device not in below:
                attachment.clear_device(device, self._manifest)
        known = {entry["index"]: entry["name"] for entry in self._manifest["interfaces"]}
        if self._leftover:
            # What an agent killed while it attached has left may not be in its manifest yet.
            known |= {link.index: link.name for link in links if attachment.belongs(link, self._leftover)}
            self._leftover = None
        for index, name in known.items():
            if keep.get(index) != name:
                self._attached.pop(name, None)
            if index in keep:  # perhaps renamed: it must not be without translation for a moment
                continue
            log.info("%s is gone, or no longer one of ours", name)
            if index < datapath.PORTS:
                self.tables.unset_interface(index)
            if index in there:
                attachment.leave(there[index], self._manifest)
        self._manifest["qdiscs"] = [index for index in self._manifest["qdiscs"] if index in there]

    def _follow_addresses(
        self, outside: list[Wan], lans: list[netdev.Link], addresses: list[ifaddrs.Address]
    ) -> list[IPv4Address | None]:
        """Makes the tables know the addresses; returns for each WAN the one that it has for its hosts."""
        external = self._config.external
        default = 0 if external.answer_arp else None
        self._owners = wans.owners(external.named(), outside, self._owners, default=default)
        self._own_externals(outside)
        self.tables.set_prefixes(self._prefixes(outside, lans, addresses))
        self.tables.set_counterparts(
            (each.internal, each.external, self._owners.get(each.external, 0)) for each in external.one_to_one
        )
        clashing = self._clashing(outside, lans, addresses)
        places, choices = external.places(wans.primaries(outside), self._owners)
        places = [Place(None, place.wan) if place.wan in clashing else place for place in places]
        now = [place.address for place in places[: len(outside)]]
        # While a WAN has none, its last address stays: it often comes back, and in the moment before we see that,
        # our own stack would answer its sessions with resets.
        before = self._served or self.tables.places
        places = [
            place if place.address or place.wan != old.wan or place.wan in clashing else old
            for place, old in zip(places, before, strict=True)
        ]
        if places != self._served:
            self._serve(places, before, choices)
        return now

    def _clashing(self, outside: list[Wan], lans: list[netdev.Link], addresses: list[ifaddrs.Address]) -> set[int]:
        """WANs, by number, with a lease that came after the start and shares addresses with a LAN: then nothing is
        masqueraded there, in words.
        """
        errors = {
            number: error
            for number, wan in enumerate(outside)
            if wan.link and (error := checks.overlap(wan.link, lans, addresses))
        }
        clash = "; ".join(map(str, errors.values()))
        if clash and clash != self._clash:
            log.error("nothing is masqueraded there: %s", clash)
        self._clash = clash
        self._manifest["trouble"] = clash if len(errors) == sum(bool(wan.own) for wan in outside) else ""
        return set(errors)

    def _serve(
        self, places: list[Place], before: list[Place], choices: dict[tuple[int, IPv4Network], list[int]]
    ) -> None:
        """Masquerades as these from now on, in place of those before."""
        if any(place.wan != old.wan for place, old in zip(places, before, strict=True)):
            # The tables name a session by its WAN, so none may outlive that.
            kept = [
                place if place.wan == old.wan else Place(None, old.wan)
                for place, old in zip(places, before, strict=True)
            ]
            self.tables.set_externals(kept, choices)
            self._end_stale(kept)
        self.tables.set_externals(places, choices)
        self._end_stale(places)
        self._served = places
        log.info("external addresses: %s", ", ".join(str(each.address) for each in places if each.address) or "none")

    def _own_externals(self, outside: list[Wan]) -> None:
        """Sees to it that packets to the named external addresses come here.

        Raises:
            InterfaceError: no WAN has one of them, and none is to answer for it.
        """
        named = self._config.external.named()
        lacking = [each for each in named if not any(wan.has(each) for wan in outside)]
        if lacking and not self._config.external.answer_arp:
            names = " and ".join(wan.name for wan in outside)
            if self._serving or not all(wan.primary for wan in outside):
                log.warning("%s does not have %s", names, ", ".join(map(str, lacking)))
                return
            has = ", ".join(sorted(str(each.ip.ip) for wan in outside for each in wan.own))
            raise InterfaceError(
                f"{lacking[0]} is no address of {names}",
                f"it has {has}",
                f"`ip addr add {lacking[0]} dev {outside[-1].name}`, or answer_arp = true in [external] for the "
                "gateway to answer for it (also where the provider routes it here)",
            )
        for network in lacking:
            link = outside[self._owners[network]].link
            if link and routing.local_route_add(network, link.index):
                self._manifest["local_routes"] = sorted({*self._manifest["local_routes"], str(network)})
                self._save()

    def _prefixes(
        self, outside: list[Wan], lans: list[netdev.Link], addresses: list[ifaddrs.Address]
    ) -> dict[IPv4Network, int]:
        """Roles of source prefixes, the more specific winning: private, internal, the WAN's own addresses."""
        inside = {link.index for link in lans}
        roles = dict.fromkeys(datapath.PRIVATE, datapath.PREFIX_PRIVATE)
        routed = [route.prefix for route in routing.routes(4) if route.oif in inside and route.prefix.prefixlen]
        connected = [each.network for each in addresses if each.index in inside]
        networks = map(IPv4Network, (*routed, *connected, *self._config.internal))
        roles |= dict.fromkeys(collapse_addresses(networks), datapath.PREFIX_INTERNAL)
        own = [each.ip.ip for wan in outside for each in wan.own]
        roles |= dict.fromkeys(map(IPv4Network, (*self._config.external.shared, *own)), datapath.PREFIX_OWN)
        return roles

    def _end_stale(self, places: list[Place]) -> None:
        """Ends the sessions and mappings of external addresses that are no longer ours."""
        ours, ended = np.array([datapath.addr(each.address)[0][0] for each in places], np.uint32), 0
        for _ in range(10):  # packets may join a stale mapping until it is closed
            slots = self.tables.open_slots()
            self._forwards.readdress()
            wanted = ours[self.tables.sessions["mapping"][slots] // datapath.EXTERNAL_SLOTS]
            stale = slots[self.tables.sessions["out"]["new_addr"]["word"][slots, 0] != wanted]
            if not len(stale):
                break
            ended += len(stale)
            # Further sessions first: a mapping closes with its last session.
            for each in (stale[stale >= self.tables.further_base], stale[stale < self.tables.further_base]):
                self._reap(each, datapath.REAP_FORCED)
        self._disarm()
        if ended:
            log.info("external addresses changed: %d sessions ended", ended)

    def _route(self) -> None:
        """Makes the host a router."""
        accelerated = any(each["hook"] == "xdp" for each in self._manifest["interfaces"])
        uplinks = [each for each in self._manifest["interfaces"] if each["role"] == "wan"]
        several = {each["index"]: each["name"] for each in uplinks} if len(self._config.wans) > 1 else {}
        self._sysctls.apply(accelerated=accelerated, hairpins_own="lo" in self._attached, loose=several)

    # --- life

    def start(self, *, anyhow: bool = False) -> None:
        """Attaches everything, or nothing.

        Args:
            anyhow: what fails is tried again in service.

        Raises:
            MasqError: what failed; whatever was attached by then is detached again.
        """
        self._serving = anyhow
        adopted = bool(self._manifest["interfaces"])
        others = [each.manifest for each in datapath.find_all() if each.wan_names != list(self._config.wans)]
        sysctls.inherit(self._manifest, others)
        self._save()
        if self._recorder:  # before there are packets
            self._recorder.begin(datapath.Attached(self.tables.maps))
        if adopted:
            self._forwards.adopt(self._programs["masq_reap"])
        self._switch_algs()
        try:
            self.reconcile()
            self._route()
        except BaseException as error:
            if anyhow and isinstance(error, MasqError):
                log.warning("%s", error)
                self._retry_at = time.monotonic()
                return
            self._punting.drop()
            self._asking.drop()
            if not adopted:
                attachment.take_down(self._manifest)
            raise
        self._serving = True

    def serve(self, ready: Callable[[dict[str, Any]], None], signals: Signals) -> Config | None:
        """Follows the machine until asked to stop; the datapath stays.

        Returns:
            The configuration to go on with, instead of stopping.
        """
        with monitor.Watch() as watch:
            self._selector.register(watch, selectors.EVENT_READ)
            self._selector.register(signals.wake, selectors.EVENT_READ)
            self._safely(self.reconcile)  # what changed between start() and Watch()
            self._safely(self._follow_neighbours)
            ready(self._manifest)
            self._notify(notify.READY)
            next_tick = next_disarm = next_sweep = time.monotonic()
            while not signals.stop:
                if signals.reload:
                    signals.reload = False
                    if wanted := self._reread():
                        return wanted
                due_at = min(next_tick, self._punting.due_at, self._asking.due_at)
                self._selector.select(max(0.0, due_at - time.monotonic()))
                with contextlib.suppress(BlockingIOError):
                    os.read(signals.wake, 64)
                self._follow(watch)
                self._safely(self._punting.serve)
                self._safely(self._asking.serve)
                now = time.monotonic()
                if now >= next_disarm:
                    self._safely(self._disarm)
                    next_disarm = now + DISARM_ALL_S
                if now >= next_tick:
                    self._tick()
                    next_tick = now + TICK_S
                if now >= next_sweep:
                    self._safely(self._sweep)
                    next_sweep = now + SWEEP_S
        return None

    def _reread(self) -> Config | None:
        """The configuration file as it is now; None when it cannot be gone on with, which is said."""
        try:
            wanted = reloading.reread(self._config)
            checks.check_interfaces(wanted)
            return wanted
        except MasqError as error:
            log.warning("nothing is changed: %s", error)
            self.note_reload(error)
            return None

    def note_reload(self, error: MasqError | None = None) -> None:
        """For whoever has asked for it."""
        count = self._manifest.get("reload", {}).get("count", 0) + 1
        self._manifest["reload"] = {"count": count, "error": error.as_dict() if error else None}
        self._save()

    @property
    def algs(self) -> Service:
        return self._algs

    def give_way(self, wanted: Config) -> datapath.Programs:
        """To an agent of another configuration in this process: rules that it no longer has are taken out.

        Returns:
            What it can go on with.
        """
        self._punting.drop()
        self._asking.drop()
        self._selector.close()
        gone = [rule for rule in self._config.rules if rule not in wanted.rules]
        _take_out(self.tables, self._programs, gone)
        return self._programs

    def _disarm(self) -> None:
        self.pulse.disarms += 1
        self.tables.disarm()

    def _tick(self) -> None:
        self.pulse.tick()
        self._safely(self._beat)
        self._safely(self._end_expired_forwards)
        self._safely(self._forwards.run)
        self._safely(self._algs.tick)
        if self._hairpins_own != ("lo" in self._attached) or self._redirects != self._wants_redirects:
            self._look()
        self._safely(self._route)
        with self.pulse.expiring():
            self._safely(self._expiry.run)
        if self._expiry.looked_at <= datapath.FEW and not self._forwards.has_default:
            self.tables.let_go()
        self._safely(self._look_after_tcx)
        self._safely(self._report)
        self._notify(notify.ALIVE)

    def _end_expired_forwards(self) -> None:
        forwarding.end_expired(self.tables, self._programs["masq_reap"])

    def _report(self) -> None:
        reports = {"pcp": self._asking.report, "algs": self._algs.report}
        if any(self._manifest.get(name) != report for name, report in reports.items()):
            self._manifest |= reports
            self._save()

    def _notify(self, state: str) -> None:
        notify.send(state, notify.status(health.in_short(self._manifest)))

    def _sweep(self) -> None:
        expiry.forget_hosts(self.tables)
        expiry.forget_bindings(self.tables)
        if self._redirects:
            redirecting.forget(self.tables)

    def _beat(self) -> None:
        """The programs punt nothing to an agent that has not been seen for long."""
        self.tables.set_settings(heartbeat=bpf.jiffies())

    def stop(self) -> None:
        """After :meth:`serve`. With no interface left nothing holds the tables: then things are put back here."""
        self._punting.drop()
        self._asking.drop()
        if not any(each.wan_names == list(self._config.wans) for each in datapath.find_all()):
            attachment.take_down(self._manifest)

    def _safely(self, step: Callable[[], None]) -> bool:
        """Whatever goes wrong in service is said and tried again: an agent that ends helps nobody."""
        try:
            step()
        except MasqError as error:
            # An interface may vanish under our hands.
            log.warning("%s", error)
        except Exception:
            log.exception("unexpected; going on")
        else:
            return True
        return False

    def _follow(self, watch: monitor.Watch) -> None:
        changes = watch.drain()
        again = time.monotonic() >= self._retry_at
        if not changes and not again:
            return
        # The first change is followed at once, as a new WAN lets packets out untranslated until we are on it.
        time.sleep(max(0.0, self._rested_at - time.monotonic()))
        more = watch.drain()
        if again or any(c.links or c.addresses or c.routes or c.lost or c.filters for c in (changes, more)):
            started = time.monotonic()
            if again:  # what refused XDP may have changed its mind without a word
                self._refused = {}
            self._look()
            ended = time.monotonic()
            # A third of the time at most goes into looks, however fast changes come.
            self._rested_at = ended + min(max(SETTLE_S, 2 * (ended - started)), BUSY_S)
        self._safely(self._follow_neighbours)

    def _look(self) -> None:
        whole = self._safely(self.reconcile)
        self._plan_retry(whole and not self._troubled and not self._refused)

    def _look_after_tcx(self) -> None:
        """Of programs taken off TCX netlink says nothing."""
        if self._retry_s or not attachment.uses_tcx():
            return
        for link, hooks in self._attached.values():
            if not self._is_whole(link, tuple(hook for hook in hooks if hook.kind != "xdp")):
                self._look()
                break

    def _plan_retry(self, done: bool) -> None:
        first, last = RETRY_S
        self._retry_s = 0 if done else min(max(first, 2 * self._retry_s), last)
        self._retry_at = time.monotonic() + self._retry_s if self._retry_s else float("inf")

    def _follow_neighbours(self) -> None:
        present = self._next_hops()
        if any(present.get(key) != mac for key, mac in self._neighbours.items()):
            self._disarm()
        self._neighbours = present

    def _next_hops(self) -> dict[tuple[int, str], bytes]:
        mine = {link.index for link, _ in self._attached.values()}
        return {key: mac for key, mac in neighbours.resolved().items() if key[0] in mine}


def _primary(link: netdev.Link, addresses: list[ifaddrs.Address]) -> ifaddrs.Address | None:
    return next((each for each in addresses if each.index == link.index and not each.secondary), None)


@contextlib.contextmanager
def _showing(config: Config) -> Iterator[Callable[[Agent], None]]:
    """Holds the place where metrics are served, and begins to serve those of an agent."""
    if not config.metrics.enabled:
        yield lambda agent: None
        return
    from xdpmasq import metrics  # noqa: PLC0415  heavy

    with metrics.listening(config.metrics) as show:
        yield lambda agent: show(metrics.Subject(*agent.shown))


def run(config: Config, ready: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Attaches (or adopts what is attached), then follows the machine until told to stop.

    Raises:
        MasqError: before anything has changed, or with everything put back.
    """
    checks.check_host()
    signals = Signals()
    with presence.being_agent(config.wans):
        with presence.changing():
            begun = _begin(config, signals)
        while begun:
            agent, stack = begun
            with stack:
                wanted = agent.serve(ready, signals)
                if wanted is None:
                    notify.send(notify.STOPPING)
                with presence.changing():
                    if wanted is None:
                        agent.stop()
                        return
                    programs = agent.give_way(wanted)
            with presence.changing():
                begun = _go_on(config, wanted, programs, agent.algs, signals)
            config = begun[0].config if begun else config
            del agent
            gc.collect()  # it refers to itself in many ways, and has a large table mapped


Begun = tuple[Agent, contextlib.ExitStack]  # and what is to be closed after it


def _go_on(
    config: Config, wanted: Config, programs: datapath.Programs, algs: Service, signals: Signals
) -> Begun | None:
    """With another configuration, or where that fails with the one that there was."""
    tables = datapath.Tables(programs.maps)
    before = [each.rule for each in forwarding.read(tables)]
    failed: MasqError | None = None
    try:
        begun = _begin(wanted, signals, programs, algs)
    except Exception as error:
        failed = error if isinstance(error, MasqError) else DatapathError("the agent failed", repr(error))
        log.warning("going on as before: %s", failed)
        _take_out(tables, programs, [rule for rule in wanted.rules if rule not in (*before, *config.rules)])
        begun = _begin(config, signals, programs, algs, anyhow=True)
    if begun:
        begun[0].note_reload(failed)
    return begun


def _take_out(tables: datapath.Tables, programs: datapath.Programs, rules: Sequence[Rule]) -> None:
    if placed := [each for each in forwarding.read(tables) if each.rule in rules]:
        forwarding.take(tables, programs["masq_reap"], *placed)


def _begin(
    config: Config,
    signals: Signals,
    programs: datapath.Programs | None = None,
    algs: Service | None = None,
    *,
    anyhow: bool = False,
) -> Begun | None:
    """An agent at work; None: it was stopped before it had begun.

    Args:
        programs, algs: of the agent before, in this process.
        anyhow: what cannot be attached to is tried again later.
    """
    if not anyhow:
        checks.check_interfaces(config)
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(_showing(config))
        recorder = stack.enter_context(recording(config.log))
        if programs:
            adopted: datapath.Attached | None = datapath.Attached(programs.maps)
        else:
            adopted = next((each for each in datapath.find_all() if each.wan_names == list(config.wans)), None)
        agent = Agent(config, adopted, programs, recorder, algs)
        if signals.stop:
            return None
        agent.start(anyhow=anyhow)
        show(agent)
        return agent, stack.pop_all()
