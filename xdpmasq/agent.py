"""The life of the running system: attach, tick, follow the interfaces, stop, detach.

Everything the agent does is a reconciliation: it compares what should be on the interfaces with what is, and
changes the difference. So attaching, an interface that comes back, and adopting a datapath after a crash are
one and the same path. The agent can die at any moment: the programs go on without it.
"""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable
from ipaddress import IPv4Network
from typing import Any

from xdpmasq import (
    attachment,
    blocks,
    bpf,
    checks,
    datapath,
    expiry,
    forwarding,
    health,
    notify,
    pool,
    redirecting,
    reloading,
    rules,
    settings,
    sysctls,
)
from xdpmasq.addressing import Addressing
from xdpmasq.alg import registry, switches
from xdpmasq.alg.service import Service
from xdpmasq.asking import Asking
from xdpmasq.attaching import Attaching, functions
from xdpmasq.config import Config, Ports
from xdpmasq.datapath import Attached
from xdpmasq.errors import MasqError
from xdpmasq.expiry import Expiry
from xdpmasq.interfaces import Interfaces
from xdpmasq.manifest import Manifest
from xdpmasq.namespace import Name
from xdpmasq.net import monitor
from xdpmasq.nexthops import NextHops
from xdpmasq.pacing import Pacing
from xdpmasq.pinholes import Pinholes
from xdpmasq.programs import Programs
from xdpmasq.pulse import Pulse
from xdpmasq.punt import Punt
from xdpmasq.punting import Punting
from xdpmasq.reaping import Reaping
from xdpmasq.recorder import Recorder
from xdpmasq.signals import Signals
from xdpmasq.sysctls import Sysctls
from xdpmasq.tables import FEW, Tables
from xdpmasq.topology import Topology
from xdpmasq.upkeep import Upkeep

log = logging.getLogger("xdpmasq")

TICK_S = 1.0
SWEEP_S = 10.0
DISARM_ALL_S = 3600  # keeps settings.disarmed_at within reach of 32-bit jiffies


class Agent:
    """Keeps one datapath in step with its interfaces.

    Args:
        config: what the user wants; validated.
        programs: over new tables, or over the ``adopted`` ones.
        adopted: the tables that an earlier agent left, to go on with.
        recorder: logs what happens, if anything is to be logged.
        algs, port: the earlier one's, in this process: what they hold goes on.
    """

    def __init__(
        self,
        config: Config,
        programs: Programs,
        adopted: Tables | None = None,
        recorder: Recorder | None = None,
        *,
        algs: Service | None = None,
        port: Punt | None = None,
    ) -> None:
        self.config, self.programs, self.recorder = config, programs, recorder
        programs.load(functions(config))
        self.tables = tables = programs.tables
        before = adopted.manifest if adopted else None
        self.manifest = Manifest.of(config, tables, programs, before)
        self.pulse = Pulse()
        self._serving = False
        self._hz: int = self.manifest["hz"]
        self._reaper = programs["masq_reap"]
        self._selector = selectors.DefaultSelector()
        self._pacing, self._next_hops = Pacing(), NextHops()
        self._sysctls = Sysctls(self.manifest, self.manifest.save)
        self._interfaces = Interfaces(config, tables)
        self._attaching = Attaching(config, tables, programs, self.manifest, before)
        self._rules_are_put = False
        self._redirects = adopted is not None  # the LANs may bring redirected connections' answers back
        self._forwards = Upkeep(tables)
        self.algs, self.punting = self._with_algs(algs, port)
        asked = self.manifest.get("pcp", {})
        self._asking = Asking(config, tables, self._reaper, self._hz, selector=self._selector, before=asked)
        self._settings()
        reap = Reaping(tables, self._reaper, recorder)
        self._addressing = Addressing(
            config,
            tables,
            self.manifest,
            forwards=self._forwards,
            reap=reap,
            disarm=self._disarm,
            before=adopted.places if adopted else (),
        )
        self._expiry = Expiry(
            tables,
            self._reaper,
            pool.reserve(tables, self._reaper, config.ports, Ports(**before["config"]["ports"]) if before else None),
            config.timeouts.port_rest_s * self._hz,
            self._hz,
            kept=self._forwards.slots,
            reap=reap,
        )

        self._blocks = blocks.Upkeep(tables, self._reaper, self._forwards.slots)
        self._blocks.run()  # before there are packets

    def _with_algs(self, before: Service | None, port: Punt | None) -> tuple[Service, Punting]:
        """The ALGs, and the port by which they get packets."""
        tables, config = self.tables, self.config
        if before:
            before.pinholes.set(self._reaper, config.ports)  # the same for sessions that are read already
        algs = before or Service(tables, Pinholes(tables, self._reaper, config.ports, self._hz), registry.find)
        if port:
            port.set(config.timeouts.fragment_s, config.limits.refusal)
        return algs, Punting(
            tables,
            self.programs,
            self._selector,
            lambda: Punt.open(tables, config.timeouts.fragment_s, config.limits.refusal, algs.take),
            port,
        )

    def _settings(self) -> None:
        fields = settings.fields(self.config, self._hz, self.tables.further)
        port = self.punting.port
        self.tables.set_settings(
            **fields,
            disarmed_at=bpf.jiffies(),
            heartbeat=bpf.jiffies(),
            punt=port.ifindex if port else 0,
            last=False,
        )
        self.tables.set_exempts(self.config.external.exempt)

    # --- beginning

    def start(self, *, anyhow: bool = False) -> None:
        """Attaches everything, or nothing.

        Args:
            anyhow: what fails is tried again in service.

        Raises:
            MasqError: what failed; whatever was attached by then is detached again.
        """
        self._serving = anyhow
        adopted = bool(self.manifest["interfaces"])
        sysctls.inherit(self.manifest, [each.manifest for each in datapath.find_others(self.config.wans)])
        self.manifest.save()
        if self.recorder:  # before there are packets
            self.recorder.begin(Attached(self.tables.maps))
        if adopted:
            self._forwards.adopt(self._reaper)
        self._switch_algs()
        try:
            self.reconcile()
            self._route()
        except BaseException as error:
            if anyhow and isinstance(error, MasqError):
                log.warning("%s", error)
                self._pacing.retry_now()
                return
            self._let_go()
            if not adopted:
                attachment.take_down(self.manifest)
            raise
        self._serving = True

    def _switch_algs(self) -> None:
        """As the configuration has them; as they are, where the earlier agent had the same one."""
        wanted = [use.as_fields() for use in self.config.algs]
        if self.manifest.get("algs_wanted") != wanted:
            switches.replace(self.tables, self.config.algs)
            self.manifest["algs_wanted"] = wanted

    # --- in step with the interfaces

    def reconcile(self) -> None:
        """Brings programs, tables and external address in step with the interfaces as they are now."""
        here = Topology.look(self.config)
        # The gateway itself may ask for a forward by its own public address; such packets only lo sees.
        wanted = here.wanted(loopback=self._hairpins_own)
        self._attaching.leave_others([link for link, _ in wanted], here.links)
        externals = self._addressing.follow(here, anyhow=self._serving)
        self._put_rules(here)
        self._redirects = self._wants_redirects
        own = [IPv4Network(each.ip.ip) for each in here.addresses]
        redirecting.spare(self.tables, redirecting.EVERY_RULE, own)
        served = self._attaching.put(wanted, here, redirects=self._redirects, anyhow=self._serving)
        reports = self._interfaces.tell(served, here, redirects=self._redirects)
        named = [str(each) if each else None for each in externals]
        self.manifest |= {"interfaces": reports, "external": named[0], "externals": named}
        exit_ = min(here.uplinks, key=lambda link: not link.up).index if here.uplinks else 0
        self.tables.set_settings(accelerate=self._accelerates, wan=exit_)
        self._disarm()
        self.pulse.sees_wan(([link.index for link in here.uplinks], externals))
        self.punting.keep()
        self._asking.follow(here.lans, here.addresses, externals)
        self.manifest |= {"punt": self.punting.report, "pcp": self._asking.report}
        self.manifest.save()

    def _put_rules(self, here: Topology) -> None:
        """The configuration's, once: from then on the tables are the only truth."""
        if not self._rules_are_put:
            self._rules_are_put = True
            anyhow = bool(self.manifest["interfaces"])
            rules.put(self.tables, self._reaper, self.config, here, anyhow=anyhow)

    @property
    def _hairpins_own(self) -> bool:
        return forwarding.any_by_port(self.tables)

    @property
    def _wants_redirects(self) -> bool:
        """There are redirects on the LANs, or connections left of them."""
        return forwarding.any_on_lan(self.tables) or (self._redirects and redirecting.any_running(self.tables))

    @property
    def _accelerates(self) -> bool:
        return any(each["hook"] == "xdp" for each in self.manifest["interfaces"])

    def _disarm(self) -> None:
        self.pulse.disarms += 1
        self.tables.disarm()

    def _route(self) -> None:
        """Makes the host a router."""
        uplinks = [each for each in self.manifest["interfaces"] if each["role"] == "wan"]
        several = {each["index"]: each["name"] for each in uplinks} if len(self.config.wans) > 1 else {}
        self._sysctls.apply(accelerated=self._accelerates, hairpins_own=self._attaching.on_loopback, loose=several)

    # --- in service

    def serve(self, ready: Callable[[dict[str, Any]], None], signals: Signals, name: Name) -> Config | None:
        """Follows the machine until asked to stop, or until the namespace is deleted; the datapath stays.

        Returns:
            The configuration to go on with, instead of stopping.
        """
        with monitor.Watch() as watch:
            self._selector.register(watch, selectors.EVENT_READ)
            self._selector.register(signals.wake, selectors.EVENT_READ)
            self._safely(self.reconcile)  # what changed between start() and Watch()
            self._safely(self._follow_neighbours)
            ready(self.manifest)
            self._notify(notify.READY)
            next_tick = next_disarm = next_sweep = time.monotonic()
            while not signals.stop:
                if signals.reload:
                    signals.reload = False
                    if wanted := self._reread():
                        return wanted
                due_at = min(next_tick, self.punting.due_at, self._asking.due_at)
                self._selector.select(max(0.0, due_at - time.monotonic()))
                signals.awake()
                self._follow(watch)
                self._safely(self.punting.serve)
                self._safely(self._asking.serve)
                now = time.monotonic()
                if now >= next_disarm:
                    self._safely(self._disarm)
                    next_disarm = now + DISARM_ALL_S
                if now >= next_tick:
                    self._tick()
                    next_tick = now + TICK_S
                    if name.is_deleted:  # and would live on, with its interfaces, for nobody but us
                        log.warning("the network namespace has been deleted")
                        break
                if now >= next_sweep:
                    self._safely(self._sweep)
                    next_sweep = now + SWEEP_S
        return None

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
        changes, again = watch.drain(), self._pacing.is_retry_due
        if not changes and not again:
            return
        # The first change is followed at once, as a new WAN lets packets out untranslated until we are on it.
        self._pacing.rest()
        more = watch.drain()
        if again or any(c.links or c.addresses or c.routes or c.lost or c.filters for c in (changes, more)):
            with self._pacing.looking():
                if again:
                    self._attaching.forget_refusals()
                self._look()
        self._safely(self._follow_neighbours)

    def _look(self) -> None:
        done = self._safely(self.reconcile)
        self._pacing.plan(done=done and self._attaching.is_complete)

    def _follow_neighbours(self) -> None:
        if self._next_hops.changed(self._attaching.indices):
            self._disarm()

    def _tick(self) -> None:
        self.pulse.tick()
        for step in (
            self._beat,
            self._end_expired_forwards,
            self._forwards.run,
            self.algs.tick,
            self.algs.pinholes.tick,
            self._follow_wishes,
            self._route,
            self._expire,
            self._blocks.run,
            self._look_after_tcx,
            self._report,
        ):
            self._safely(step)
            self._safely(self.punting.serve)  # a host's packet waits for one of these at most, a millisecond or so
        self._notify(notify.ALIVE)

    def _follow_wishes(self) -> None:
        """Rules may have come that need a program where there is none."""
        if self._hairpins_own != self._attaching.on_loopback or self._redirects != self._wants_redirects:
            self._look()

    def _expire(self) -> None:
        with self.pulse.expiring():
            self._expiry.run()
        if self._expiry.looked_at <= FEW and not self._forwards.has_default:
            self.tables.let_go()

    def _beat(self) -> None:
        """The programs punt nothing to an agent that has not been seen for long."""
        self.tables.set_settings(heartbeat=bpf.jiffies())

    def _end_expired_forwards(self) -> None:
        forwarding.end_expired(self.tables, self._reaper)

    def _look_after_tcx(self) -> None:
        if not self._pacing.is_retrying and self._attaching.is_lost_on_tcx():
            self._look()

    def _report(self) -> None:
        reports = {"pcp": self._asking.report, "algs": self.algs.report}
        if any(self.manifest.get(name) != report for name, report in reports.items()):
            self.manifest |= reports
            self.manifest.save()

    def _notify(self, state: str) -> None:
        notify.send(state, notify.status(health.in_short(self.manifest)))

    def _sweep(self) -> None:
        expiry.forget_hosts(self.tables)
        expiry.forget_bindings(self.tables)
        self._blocks.forget()
        if self._redirects:
            redirecting.forget(self.tables)

    # --- reloading, stopping

    def _reread(self) -> Config | None:
        """The configuration file as it is now; None when it cannot be gone on with, which is said."""
        try:
            wanted = reloading.reread(self.config)
            checks.check_interfaces(wanted)
            return wanted
        except MasqError as error:
            log.warning("nothing is changed: %s", error)
            self.note_reload(error)
            return None

    def note_reload(self, error: MasqError | None = None) -> None:
        """For whoever has asked for it."""
        count = self.manifest.get("reload", {}).get("count", 0) + 1
        self.manifest["reload"] = {"count": count, "error": error.as_dict() if error else None}
        self.manifest.save()

    def give_way(self, wanted: Config) -> Punt | None:
        """To an agent of another configuration in this process: rules that it no longer has are taken out.

        Returns:
            The punt port, which is that one's now.
        """
        port = self.punting.hand_over()
        self._let_go()
        self._selector.close()
        rules.take(self.tables, self._reaper, [rule for rule in self.config.rules if rule not in wanted.rules])
        return port

    def stop(self) -> None:
        """After :meth:`serve`. With no interface left nothing holds the tables: then things are put back here."""
        self._let_go()
        self.algs.pinholes.turns.close()
        if not datapath.find_of(self.config.wans):
            attachment.take_down(self.manifest)

    def _let_go(self) -> None:
        """Of what only a living agent has."""
        self.punting.drop()
        self._asking.drop()
