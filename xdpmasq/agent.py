"""The life of the running system: attach, tick, follow the interfaces, stop, detach.

Everything the agent does is a reconciliation: it compares what should be on the interfaces with what is, and
changes the difference. So attaching, an interface that comes back, and adopting a datapath after a crash are
one and the same path. The agent can die at any moment: the programs go on without it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import signal
import time
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, collapse_addresses
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import __version__, attachment, bpf, checks, datapath, drivers, netdev, presence, source
from xdpmasq import config as configuration
from xdpmasq.config import Config
from xdpmasq.datapath import Hook, Role
from xdpmasq.errors import DatapathError, HostError, InterfaceError, MasqError
from xdpmasq.expiry import Expiry
from xdpmasq.punt import Punt
from xdpmasq.punting import Punting
from xdpmasq.sysctls import Sysctls

log = logging.getLogger("xdpmasq")

TICK_S = 1.0
SETTLE_S = 0.02  # netlink messages come in bursts: the least rest between two looks
DISARM_ALL_S = 3600  # keeps settings.disarmed_at within reach of 32-bit jiffies
RETRY_S = (1, 60)  # after something went wrong: first, and at most
BUSY_S = 0.5  # the longest one, while changes rain down


class StopSignal:
    """SIGTERM or SIGINT came. It is only noted: an exception thrown by the handler would leave pyroute2's event loop,
    or an attachment, in the middle of something.
    """

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.asked = True


class Agent:
    """Keeps one datapath in step with its interfaces.

    Args:
        config: what the user wants; validated.
        adopted: the datapath that an earlier agent left, to go on with.
    """

    def __init__(self, config: Config, adopted: datapath.Attached | None = None) -> None:
        self._config = config
        further = config.further_sessions
        if adopted:
            further = adopted.maps["remotes"].max_entries
        self._programs = datapath.Programs(further, adopted.maps if adopted else None)
        if adopted and adopted.manifest["layouts"] != _through_json(self._programs.layouts):
            raise DatapathError(
                "the running datapath is of another version",
                f"xdpmasq {adopted.manifest['version']} attached it, and lays out its tables otherwise",
                "xdpmasq detach, then attach: running sessions start anew",
            )
        self.tables = datapath.Tables(self._programs.maps)
        self._manifest = adopted.manifest if adopted else self._new_manifest()
        self._manifest |= {
            "reaper": self._programs["masq_reap"].id,
            "agent_pid": os.getpid(),
            "version": __version__,
        }
        self._leftover = {**self._manifest} if adopted else None
        self._manifest |= {"lans": list(config.lans), "mode": config.mode, "config": configuration.as_fields(config)}
        self._hz: int = self._manifest["hz"]
        self._attached: dict[str, tuple[netdev.Link, tuple[Hook, ...]]] = {}
        self._refused: dict[netdev.Link, str] = {}  # what XDP does not work on, and why
        self._troubled = False
        self._served: IPv4Address | None = None  # the address that all sessions are of
        self._sysctls = Sysctls(self._manifest, self._save)
        self._serving = False
        self._retry_at, self._retry_s = float("inf"), 0.0
        self._rested_at = 0.0
        self._neighbours: dict[tuple[int, str], bytes] = {}
        self._selector = selectors.DefaultSelector()
        self._punting = Punting(
            self.tables,
            self._programs,
            self._selector,
            lambda: Punt.open(self.tables, config.timeouts.fragment_s),
        )
        self._reserved = self._pool(fresh=adopted is None)
        timeouts = config.timeouts
        self._expiry = Expiry(
            self.tables,
            self._programs["masq_reap"],
            self._reserved,
            timeouts.port_rest_s * self._hz,
            self._hz,
        )
        self._settings()

    def _new_manifest(self) -> dict[str, Any]:
        config = self._config
        return {
            "wan": config.wan,
            "lans": list(config.lans),
            "mode": config.mode,
            "interfaces": [],
            "external": None,
            "hz": bpf.tick_rate(),
            "attached_at": time.time(),
            "config": configuration.as_fields(config),
            "counters": list(source.counters()),
            "layouts": _through_json(self._programs.layouts),
            "qdiscs": [],
            "sysctls": {},
            "side_effects": {},
        }

    def _save(self) -> None:
        self.tables.manifest = self._manifest

    # --- tables

    def _settings(self) -> None:
        timeouts, hz = self._config.timeouts, self._hz
        self.tables.set_settings(
            tcp_established=timeouts.tcp_established_s * hz,
            tcp_transitory=timeouts.tcp_transitory_s * hz,
            udp=timeouts.udp_s * hz,
            icmp=timeouts.icmp_s * hz,
            fragment=timeouts.fragment_s * hz,
            rearm=self._config.rearm_s * hz,
            inbound_refresh=self._config.inbound_refresh,
            pool=[(first, count) for first, count in self._ranges()],
            disarmed_at=bpf.jiffies(),
            heartbeat=bpf.jiffies(),
            punt=0,
        )

    def _ranges(self) -> list[tuple[list[int], list[int]]]:
        """``struct pool`` for each class: (first, count) of two ranges, the fuller one first."""
        low, high = self._config.ports.first, self._config.ports.last
        ephemeral = netdev.sysctl_get("net.ipv4.ip_local_port_range") or "32768 60999"
        start, end = map(int, ephemeral.split())
        ranges = [(low, min(high, start - 1)), (max(low, end + 1), high)]
        ranges = sorted(((a, max(0, b - a + 1)) for a, b in ranges), key=lambda pair: -pair[1])
        if not ranges[0][1]:
            raise HostError(
                f"no external ports between {low} and {high}",
                f"the gateway's own connections may use {start} to {end} (net.ipv4.ip_local_port_range)",
                "narrow that range, or widen [ports]",
            )
        tcp_udp = ([a for a, _ in ranges], [count for _, count in ranges])
        return [tcp_udp, tcp_udp, ([0, 0], [datapath.PORTS, 0])]

    def _pool(self, fresh: bool) -> npt.NDArray[np.uint64]:
        """The bitmap of slots outside the pool; claims them when the tables are new."""
        outside = np.ones(len(self.tables.claims) * 64, bool)
        outside[datapath.FURTHER_BASE :] = False
        for class_, (firsts, counts) in enumerate(self._ranges()):
            for first, count in zip(firsts, counts, strict=True):
                start = class_ * datapath.PORTS + first
                outside[start : start + count] = False
        if not fresh:
            # Ports that an earlier configuration gave out are reaped like any other.
            outside[self.tables.live_slots()] = False
        reserved = np.packbits(outside, bitorder="little").view(np.uint64)
        if fresh:
            self.tables.claims[:] = reserved
        return reserved

    # --- following the interfaces

    def reconcile(self) -> None:
        """Brings programs, tables and external address in step with the interfaces as they are now."""
        links = netdev.links()
        wan = checks.wan_of(self._config, links)
        lans = [link for link in netdev.match_links(self._config.lans, links) if link != wan]
        wanted: list[tuple[netdev.Link, Role]] = [(link, "lan") for link in lans]
        if wan:
            wanted.insert(0, (wan, "wan"))
        self._leave_unwanted([link for link, _ in wanted], links)
        addresses = [each for each in netdev.addresses(4) if isinstance(each.ip, IPv4Interface)]
        external = self._follow_addresses(wan, lans, addresses)
        self._troubled = False
        chosen = [(link, role, *self._bring_in(link, role, wan)) for link, role in wanted]
        reports = self._tell(chosen)
        self._manifest |= {"interfaces": reports, "external": str(external) if external else None}
        accelerate = any(report["hook"] == "xdp" for report in reports)
        self.tables.set_settings(accelerate=accelerate, disarmed_at=bpf.jiffies())
        self._punting.keep()
        self._manifest["punt"] = self._punting.report
        self._save()

    def _bring_in(self, link: netdev.Link, role: Role, wan: netdev.Link | None) -> tuple[str, str]:
        """Attaches to a link.

        In service, one that refuses XDP is left on TC until anything about it changes, and one that refuses that
        as well does not keep the others from being served.

        Returns:
            The hook ("none" after trouble) and why that one.
        """
        hook, why = "tc", self._refused.get(link, "")
        try:
            if not why:
                hook, why = self._choose(link, wan)
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
            return self._bring_in(link, role, wan)
        return hook, why

    def _choose(self, link: netdev.Link, wan: netdev.Link | None) -> tuple[str, str]:
        """The hook for a link, "xdp" or "tc", and why."""
        mode = self._config.mode
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
        hook, why = drivers.xdp_policy(link)
        if hook == "xdp" and wan and drivers.xdp_policy(wan)[0] == "tc":
            return "tc", f"{wan.name}, the WAN, is on TC, so nothing could be redirected to it"
        return hook, why

    def _attach(self, link: netdev.Link, role: Role, hook: str) -> None:
        hooks = datapath.hooks(role, xdp=hook == "xdp", ethernet=link.ethernet)
        before = self._attached.get(link.name)
        if before and before[1] == hooks and before[0].index == link.index and self._is_whole(link, hooks):
            return
        self._check_free(link)
        if any(each.kind != "xdp" for each in hooks) and not netdev.clsact_present(link.index):
            self._manifest["qdiscs"] = sorted({*self._manifest["qdiscs"], link.index})
            self._save()
            netdev.clsact_add(link.index)
        for each in hooks:
            attachment.put(link, each, self._programs[each.function])
        attachment.clear(link, keep=hooks)
        self._attached[link.name] = (link, hooks)
        log.info("attached to %s as %s by %s", link.name, role, hook)

    def _check_free(self, link: netdev.Link) -> None:
        """Raises InterfaceError when another xdpmasq has the link: two would take it from each other for ever."""
        for other in datapath.on_link(link):
            if other.maps["manifest"].id != self.tables.maps["manifest"].id:
                raise checks.in_use(link.name, other.manifest["wan"])

    def _is_whole(self, link: netdev.Link, hooks: tuple[Hook, ...]) -> bool:
        """Nobody took our programs away, or put another in their place, meanwhile."""
        present = {(each.direction, each.prog_id) for each in netdev.tc_programs(link.index)}
        present.add(("xdp", link.xdp_prog_id))  # type: ignore[arg-type]
        return all((hook.kind, self._programs[hook.function].id) in present for hook in hooks)

    def _tell(self, chosen: list[tuple[netdev.Link, Role, str, str]]) -> list[dict[str, Any]]:
        """Writes the interfaces' rows, by the links' features as they are with our programs attached.

        Returns:
            What the manifest and `status` say of them.
        """
        fresh = {link.index: link for link in netdev.links()}
        reports = []
        for attached, role, hook, reason in chosen:
            link, why = fresh.get(attached.index, attached), reason
            xdp, takes = hook == "xdp", drivers.takes_frames(link)
            if link.index < datapath.PORTS:
                self.tables.set_interface(link, role, xdp_from=xdp, xdp_to=xdp and takes)
            if xdp and not takes:
                why += "; but it takes no frames from XDP (a veth needs GRO or an XDP program at its peer)"
            reports.append({"name": link.name, "index": link.index, "role": role, "hook": hook, "why": why})
        return reports

    def _leave_unwanted(self, wanted: list[netdev.Link], links: list[netdev.Link]) -> None:
        """Forgets interfaces that are gone, and leaves those that are no LAN or WAN any more."""
        keep, there = {link.index: link.name for link in wanted}, {link.index: link for link in links}
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
        self, wan: netdev.Link | None, lans: list[netdev.Link], addresses: list[netdev.Address]
    ) -> IPv4Address | None:
        """Makes the tables know the addresses; returns the one to masquerade as."""
        own = [each for each in addresses if wan and each.index == wan.index]
        primary = next((each for each in own if not each.secondary), None)
        external = IPv4Address(primary.ip.ip) if primary else None
        self.tables.set_prefixes(self._prefixes(own, lans, addresses))
        # While there is none, the last address stays: it often comes back, and in the moment before we see that,
        # our own stack would answer its sessions with resets.
        if external and external != self._served:
            self.tables.set_settings(external=[datapath.addr(external)])
            self._end_stale(external)
            self._served = external
            log.info("external address: %s", external)
        return external

    def _prefixes(
        self, own: list[netdev.Address], lans: list[netdev.Link], addresses: list[netdev.Address]
    ) -> dict[IPv4Network, int]:
        """Roles of source prefixes, the more specific winning: private, internal, the WAN's own addresses."""
        inside = {link.index for link in lans}
        roles = dict.fromkeys(datapath.PRIVATE, datapath.PREFIX_PRIVATE)
        routed = [route.prefix for route in netdev.routes(4) if route.oif in inside and route.prefix.prefixlen]
        connected = [each.network for each in addresses if each.index in inside]
        networks = map(IPv4Network, (*routed, *connected, *self._config.internal))
        roles |= dict.fromkeys(collapse_addresses(networks), datapath.PREFIX_INTERNAL)
        for each in own:
            roles[IPv4Network(each.ip.ip)] = datapath.PREFIX_OWN
        return roles

    def _end_stale(self, external: IPv4Address) -> None:
        """Ends the sessions and mappings of external addresses that are no longer ours."""
        ours, ended = datapath.addr(external)[0][0], 0
        for _ in range(10):  # packets may join a stale mapping until it is closed
            slots = self.tables.open_slots()
            stale = slots[self.tables.sessions["out"]["new_addr"]["word"][slots, 0] != ours]
            if not len(stale):
                break
            ended += len(stale)
            # Further sessions first: a mapping closes with its last session.
            for each in (stale[stale >= datapath.FURTHER_BASE], stale[stale < datapath.FURTHER_BASE]):
                self.tables.reap(self._programs["masq_reap"], each, datapath.REAP_FORCED)
        self.tables.disarm()
        if ended:
            log.info("the WAN address changed to %s: %d sessions ended", external, ended)

    def _route(self) -> None:
        """Makes the host a router."""
        self._sysctls.apply(accelerated=any(each["hook"] == "xdp" for each in self._manifest["interfaces"]))

    # --- life

    def start(self) -> None:
        """Attaches everything, or nothing.

        Raises:
            MasqError: what failed; whatever was attached by then is detached again.
        """
        adopted = bool(self._manifest["interfaces"])
        self._save()
        try:
            self.reconcile()
            self._route()
        except BaseException:
            self._punting.drop()
            if not adopted:
                attachment.take_down(self._manifest)
            raise
        self._serving = True

    def serve(self, ready: Callable[[], None], stop: StopSignal) -> None:
        """Follows the machine until asked to stop; the datapath stays."""
        wake, _ = _wakeup_on_signals()
        with netdev.Watch() as watch:
            self._selector.register(watch, selectors.EVENT_READ)
            self._selector.register(wake, selectors.EVENT_READ)
            self._safely(self.reconcile)  # what changed between start() and Watch()
            self._safely(self._follow_neighbours)
            ready()
            next_tick = next_disarm = time.monotonic()
            while not stop.asked:
                self._selector.select(max(0.0, min(next_tick, self._punting.due_at) - time.monotonic()))
                with contextlib.suppress(BlockingIOError):
                    os.read(wake, 64)
                self._follow(watch)
                self._safely(self._punting.serve)
                now = time.monotonic()
                if now >= next_disarm:
                    self._safely(self.tables.disarm)
                    next_disarm = now + DISARM_ALL_S
                if now >= next_tick:
                    self._safely(self._beat)
                    self._safely(self._expiry.run)
                    self._safely(self._route)
                    next_tick = now + TICK_S

    def _beat(self) -> None:
        """The programs punt nothing to an agent that has not been seen for long."""
        self.tables.set_settings(heartbeat=bpf.jiffies())

    def stop(self) -> None:
        """After :meth:`serve`. With no interface left nothing holds the tables: then things are put back here."""
        self._punting.drop()
        if not any(each.manifest["wan"] == self._config.wan for each in datapath.find_all()):
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

    def _follow(self, watch: netdev.Watch) -> None:
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
            self._plan_retry(self._safely(self.reconcile) and not self._troubled)
            ended = time.monotonic()
            # A third of the time at most goes into looks, however fast changes come.
            self._rested_at = ended + min(max(SETTLE_S, 2 * (ended - started)), BUSY_S)
        self._safely(self._follow_neighbours)

    def _plan_retry(self, done: bool) -> None:
        first, last = RETRY_S
        self._retry_s = 0 if done else min(max(first, 2 * self._retry_s), last)
        self._retry_at = time.monotonic() + self._retry_s if self._retry_s else float("inf")

    def _follow_neighbours(self) -> None:
        present = self._next_hops()
        if any(present.get(key) != mac for key, mac in self._neighbours.items()):
            self.tables.disarm()
        self._neighbours = present

    def _next_hops(self) -> dict[tuple[int, str], bytes]:
        mine = {link.index for link, _ in self._attached.values()}
        return {key: mac for key, mac in netdev.neighbours().items() if key[0] in mine}


def _wakeup_on_signals() -> tuple[int, int]:
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader, writer


def _through_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def run(config: Config, ready: Callable[[], None] = lambda: None) -> None:
    """Attaches (or adopts what is attached), then follows the machine until told to stop.

    Raises:
        MasqError: before anything has changed, or with everything put back.
    """
    checks.check_host()
    stop = StopSignal()
    with presence.being_agent(config.wan):
        with presence.changing():
            checks.check_interfaces(config)
            running = [each for each in datapath.find_all() if each.manifest["wan"] == config.wan]
            agent = Agent(config, running[0] if running else None)
            if stop.asked:
                return
            agent.start()
        agent.serve(ready, stop)
        with presence.changing():
            agent.stop()
