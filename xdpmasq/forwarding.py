"""Forwards in the kernel's tables, which are the only truth about them: read, checked, put there, taken out.

It all works with the agent dead. Whoever writes holds :func:`presence.changing`.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import abi, bpf, forwards, presence, redirecting, sockets
from xdpmasq.abi import (
    CLASSES,
    EXTERNAL_SLOTS,
    LIFE_FURTHER_MASK,
    LIFE_LIVE,
    LIFE_OPENING,
    LIFE_SESSION,
    LIFE_STATE,
    LIFE_STATIC,
    PORTS,
    REAP_FORCED,
    REAP_KEEP,
    REAP_YIELD,
    Slots,
)
from xdpmasq.errors import BusyError, ForwardError
from xdpmasq.expiry import age
from xdpmasq.forwards import Lease, Rule, Target
from xdpmasq.net import ifaddrs, sysctl
from xdpmasq.redirects import Redirect
from xdpmasq.sessions import Table
from xdpmasq.tables import Tables
from xdpmasq.triggers import Trigger

FLAG_DEFAULT, FLAG_TO_GATEWAY, FLAG_TRIGGERED, FLAG_FROM_INSIDE = 1, 2, 4, 8  # FORWARD_*
FLAG_EXPIRES, FLAG_LEASED = 16, 32
ON_LAN, TRIGGER = 255, 253  # FORWARD_ON_LAN, FORWARD_TRIGGER
PORT_AT, REMOTE_AT = 16, 32  # FORWARD_PORT_AT, FORWARD_REMOTE_AT
FROM_OUTSIDE = 4  # SESSION_FROM_OUTSIDE
CLOSE_TRIES = 10  # packets may join a mapping until it is closed
PUBLISH_AT_ONCE = 256
FORGET_S = 3600

Mask = npt.NDArray[np.bool_]
NONE: Slots = np.zeros(0, np.uint32)


@dataclass(frozen=True)
class Placed:
    """A rule and its place in ``forward_rules``.

    Attributes:
        opened: sessions so far.
        expires: jiffies; None: never.
        open_to: of a trigger: who has its ports until then.
    """

    index: int
    rule: Rule
    opened: int
    expires: int | None = None
    open_to: IPv4Address | None = None


def read(tables: Tables) -> list[Placed]:
    """The rules that are in place, of every kind, by protocol and port, the more specific first."""
    found = at(tables, np.flatnonzero(tables.rules["targets"]))
    return sorted(found, key=lambda each: (each.rule.protocol, each.rule.first, *_specific_first(each.rule)))


def at(tables: Tables, indices: Iterable[Any]) -> list[Placed]:
    """The rules in these places of ``forward_rules``."""
    places = [int(index) for index in indices]
    spared = redirecting.spared(tables) if places else {}
    return [_placed(tables, index, spared.get(index, ())) for index in places]


def _placed(tables: Tables, index: int, spared: tuple[IPv4Network, ...]) -> Placed:
    record, hz = tables.rules[index].copy(), int(tables.settings["hz"])
    rule, holder = _rule(record, tables.leases[index], spared, hz), _holder(record)
    expires = int(record["expires"]) if record["flags"] & FLAG_EXPIRES or holder else None
    return Placed(index, rule, int(record["opened"]), expires, holder)


def _holder(record: Any) -> IPv4Address | None:
    """To whom a triggered rule is open."""
    address, over = _address(record["target"][0]["addr"]), age(bpf.jiffies(), record["expires"].reshape(1))[0] > 0
    return address if record["flags"] & FLAG_TRIGGERED and int(address) and not over else None


def left_s(expires: int | None, hz: int) -> int | None:
    """Seconds until then; None: for ever."""
    return None if expires is None else max(0, -int(age(bpf.jiffies(), np.array([expires], np.uint32))[0]) // hz)


def any_by_port(tables: Tables) -> bool:
    """Is there a forward that the gateway itself can ask for by its public address?"""
    rules = tables.rules
    return bool(((rules["targets"] != 0) & (rules["flags"] & (FLAG_DEFAULT | FLAG_TO_GATEWAY) == 0)).any())


def is_served(attached: Tables) -> bool:
    """The gateway itself reaches its forwards, too."""
    if not any_by_port(attached):
        return True
    has_program = any(each["role"] == "lo" for each in attached.manifest["interfaces"])
    return has_program and sysctl.read("net.ipv4.conf.lo.accept_local") == "1"


def any_on_lan(tables: Tables) -> bool:
    """Is there a redirect of what comes from inside?"""
    rules = tables.rules
    return bool(((rules["targets"] != 0) & (rules["flags"] & FLAG_FROM_INSIDE != 0)).any())


def _specific_first(rule: Rule) -> tuple[bool, int]:
    return rule.is_default, -rule.source.prefixlen if rule.source else 0


# --- layouts ---------------------------------------------------------------------------------------


def _address(addr: Any) -> IPv4Address:
    return IPv4Address(np.asarray(addr["word"])[:1].tobytes())


def _rule(record: Any, lease: Any, spared: tuple[IPv4Network, ...], hz: int) -> Rule:
    """The inverse of :func:`_record`."""
    targets, before = [], 0
    for each in record["target"][: record["targets"]]:
        targets.append(Target(_address(each["addr"]), int(each["port"]), int(each["until"]) - before))
        before = int(each["until"])
    bits, flags = int(record["source_bits"]), int(record["flags"])
    ports = CLASSES[record["class"]], int(record["first"]), int(record["last"])
    source = IPv4Network((_address(record["source"]), bits)) if bits else None
    if flags & FLAG_TRIGGERED:
        called = int(record["trigger_first"]), int(record["trigger_last"])
        lasts_s = int(record["lasts"]) // hz
        return Trigger.of(ports, CLASSES[record["trigger_class"]], called, lasts_s)
    if flags & FLAG_TO_GATEWAY:
        on = "lan" if flags & FLAG_FROM_INSIDE else "wan"
        return Redirect(*ports, tuple(targets), source, on=on, spared=spared)
    leased = Lease(lease["nonce"].tobytes(), int(lease["external"])) if flags & FLAG_LEASED else None
    return Rule(*ports, tuple(targets), source, leased)


def _record(tables: Tables, rule: Rule, expires: int | None = None) -> Any:
    record = np.zeros((), tables.maps["forward_rules"].value)
    until = 0
    targets = (Target(IPv4Address(0), rule.first),) if isinstance(rule, Trigger) else rule.targets
    for number, target in enumerate(targets):
        until += target.weight
        record["target"][number] = (abi.addr(target.address), target.port, until)
    record["first"], record["last"], record["class"] = rule.first, rule.last, _class(rule)
    record["targets"], record["expires"] = len(targets), expires or 0
    record["flags"] = _flags(rule) | FLAG_EXPIRES * (expires is not None) | FLAG_LEASED * (rule.lease is not None)
    if isinstance(rule, Trigger):
        record["trigger_class"] = CLASSES.index(rule.caller_protocol)
        record["trigger_first"], record["trigger_last"] = rule.caller_first, rule.caller_last
        record["lasts"] = rule.lasts_s * int(tables.settings["hz"])
    if rule.source:
        record["source"], record["source_bits"] = abi.addr(rule.source.network_address), rule.source.prefixlen
    return record


def _flags(rule: Rule) -> int:
    match rule:
        case Trigger():
            return FLAG_TRIGGERED
        case Redirect():
            return FLAG_TO_GATEWAY | (FLAG_FROM_INSIDE if rule.from_inside else 0)
    return FLAG_DEFAULT if rule.is_default else 0


def _class(rule: Rule) -> int:
    return CLASSES.index(rule.protocol)


def _keys(rule: Rule, externals: int) -> Iterator[tuple[Any, ...]]:
    """``struct forward_key`` of each entry. The remote comes last, so a rule for some needs one for each port."""
    if isinstance(rule, Trigger):
        called = CLASSES.index(rule.caller_protocol)
        for port, bits in forwards.port_prefixes(rule.caller_first, rule.caller_last):
            yield PORT_AT + bits, TRIGGER + _class(rule), called, socket.htons(port), abi.addr(None)
    for external in (ON_LAN,) if rule.from_inside else _externals(rule, externals):
        if rule.source:
            remote, bits = abi.addr(rule.source.network_address), REMOTE_AT + rule.source.prefixlen
            for port in range(rule.first, rule.last + 1):
                yield bits, external, _class(rule), socket.htons(port), remote
        else:
            for port, bits in forwards.port_prefixes(rule.first, rule.last):
                yield PORT_AT + bits, external, _class(rule), socket.htons(port), abi.addr(None)


def _externals(rule: Rule, externals: int) -> Iterable[int]:
    """The indices of the external addresses that it is on."""
    return [rule.lease.external] if rule.lease else range(externals)


def slots_of(rule: Rule, externals: int) -> Slots:
    """The slots of its ports, which are to stay out of the pool; the default host and redirects on LANs have none."""
    if rule.is_default or rule.from_inside:
        return NONE
    ports = np.arange(rule.first, rule.last + 1, dtype=np.uint32)
    bases = [external * EXTERNAL_SLOTS + _class(rule) * PORTS for external in _externals(rule, externals)]
    return np.concatenate([ports + np.uint32(base) for base in bases])


def _slots_of_all(rules: Sequence[Rule], externals: int) -> Slots:
    return np.unique(np.concatenate([NONE, *(slots_of(rule, externals) for rule in rules)]))


def forwarded_slots(tables: Tables) -> Slots:
    """Of all rules."""
    return _slots_of_all([each.rule for each in read(tables)], tables.externals)


def _endpoints(rule: Rule, wans: Sequence[int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Slot and ``struct mapping_key`` of the internal endpoint that may use it, where there is just one.

    Args:
        wans: of each external address. Of a WAN's several, an endpoint gets its port at the first.
    """
    if rule.is_reversible:
        target = rule.targets[0]
        for slot in slots_of(rule, len(wans)).tolist():
            port, wan = target.port + slot % PORTS - rule.first, wans[slot // EXTERNAL_SLOTS]
            yield slot, (abi.addr(target.address), socket.htons(port), _class(rule), wan)


def _wans(tables: Tables) -> list[int]:
    """The WAN of each external address."""
    return [place.wan for place in tables.places]


# --- what is possible ------------------------------------------------------------------------------


def check(
    tables: Tables, rule: Rule, *, lans_known: bool = True, services: Sequence[sockets.Listener] | None = None
) -> None:
    """Raises ForwardError when a rule does not fit to those in place, the networks, or the gateway's services.

    Args:
        lans_known: every LAN is there, so that a target beyond all of them is a mistake.
        services: the gateway's own, where they are known already.
    """
    if error := forwards.contradiction(rule, [each.rule for each in read(tables)]):
        raise error
    own = {each.ip.ip for each in ifaddrs.addresses(4)}
    for target in () if isinstance(rule, Redirect) else rule.targets:
        if target.address in own or target.address.is_loopback:
            why = "a forward leads to a host behind the gateway"
            raise ForwardError(
                f"{target.address} is the gateway's own address", why, "name the host that is to answer"
            )
        if lans_known and tables.role_of(target.address) != abi.PREFIX_INTERNAL:
            inside = ", ".join(map(str, tables.prefixes_of(abi.PREFIX_INTERNAL))) or "none"
            do = "name a host in one of them, or its network in [interfaces] internal"
            raise ForwardError(f"{target.address} is behind no LAN", f"the internal networks are {inside}", do)
    if not (rule.is_default or isinstance(rule, Redirect)):
        _check_services(tables, rule, sockets.listeners() if services is None else services)


def _check_services(tables: Tables, rule: Rule, services: Iterable[sockets.Listener]) -> None:
    addresses = [place.address for place in tables.places if place.address]
    for each in services:
        if (
            each.protocol == rule.protocol
            and rule.first <= each.port <= rule.last
            and any(map(each.is_at, addresses))
        ):
            raise ForwardError(
                f"{rule.protocol} {each.port} is a port of the gateway itself",
                str(each),
                "forward another port, or have that service listen at an internal address only",
            )


# --- writing ---------------------------------------------------------------------------------------


def put(tables: Tables, reaper: bpf.Program, rule: Rule, expires: int | None = None) -> int:
    """Puts a rule in place that :func:`check` has passed; all of it or nothing.

    What had one of its ports as a mapping ends. A leased port is its host's already.

    Args:
        expires: in jiffies; None: never.

    Returns:
        Its place.

    Raises:
        ForwardError: there is no room.
    """
    free = np.flatnonzero(tables.rules["targets"] == 0)
    if not len(free):
        why = f"{forwards.RULES_MOST} are in place, which is all there is room for"
        raise ForwardError(f"{rule} has no place", why, "delete one, or join neighbouring ports to ranges")
    index = int(free[0])
    with contextlib.ExitStack() as undo:
        undo.callback(take, tables, reaper, Placed(index, rule, 0))
        if rule.lease:
            tables.leases[index] = np.frombuffer(rule.lease.nonce, np.uint8), rule.lease.external
        tables.rules[index] = _record(tables, rule, expires)
        try:
            if isinstance(rule, Redirect):
                redirecting.spare(tables, index, rule.spared)
            if not rule.lease:
                _keep(tables, reaper, rule)
            for key in _keys(rule, tables.externals):
                tables.maps["forwards"].set(key, index)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.E2BIG, errno.ENOMEM):
                raise
            why = "the table of forwarded ports is full; of a rule with --from, every port takes a place"
            raise ForwardError(f"{rule} has no place", why, "name fewer ports") from error
        undo.pop_all()
    _count_triggers(tables)
    if rule.from_inside:
        tables.disarm_flows(tables.live_slots())  # the next packet of each is to meet it
    return index


def _count_triggers(tables: Tables) -> None:
    rules = tables.rules
    count = int(((rules["targets"] != 0) & (rules["flags"] & FLAG_TRIGGERED != 0)).sum())
    tables.maps["triggers"].set(0, count)


def take(tables: Tables, reaper: bpf.Program, *placed: Placed) -> None:
    """Ends forwards for new sessions; running ones go on."""
    for each in placed:
        for key in _keys(each.rule, tables.externals):
            tables.maps["forwards"].delete(key)
        tables.rules[each.index] = np.zeros((), tables.rules.dtype)
        redirecting.spare(tables, each.index, ())
    _count_triggers(tables)
    others = [each.rule for each in read(tables)]
    leased = set(_slots_of_all([rule for rule in others if rule.lease], tables.externals).tolist())
    for each in placed:
        for slot, endpoint in _endpoints(each.rule, _wans(tables)):
            if slot not in leased:  # of a lease for several remotes, another rule is left
                withdraw(tables, slot, endpoint)
    slots = _slots_of_all([each.rule for each in placed], tables.externals)
    tables.reap(reaper, np.setdiff1d(slots, _slots_of_all(others, tables.externals)), REAP_YIELD)


def end_expired(tables: Tables, reaper: bpf.Program) -> None:
    """Takes out what is over; while a command changes forwards, that waits."""
    if not len(_expired(tables)):
        return
    with contextlib.suppress(BusyError), presence.changing(patience_s=0):
        take(tables, reaper, *at(tables, _expired(tables)))


def _expired(tables: Tables) -> Slots:
    rules = tables.rules
    over = (rules["targets"] != 0) & (rules["flags"] & FLAG_EXPIRES != 0) & (age(bpf.jiffies(), rules["expires"]) > 0)
    return np.flatnonzero(over).astype(np.uint32)


def _keep(tables: Tables, reaper: bpf.Program, rule: Rule) -> None:
    """Takes the ports out of the pool. A target that is the only one gets its port for what it sends, too."""
    slots, sessions = slots_of(rule, tables.externals), tables.sessions
    fresh = slots[sessions["life"][slots] & LIFE_STATIC == 0]
    _close(tables, reaper, fresh)
    inscribe(tables, rule, slots[_is_idle(sessions["life"][slots])])
    tables.reap(reaper, slots, REAP_KEEP)
    for slot, endpoint in _endpoints(rule, _wans(tables)):
        publish(tables, slot, endpoint)


def inscribe(tables: Tables, rule: Rule, idle: Slots) -> None:
    """Makes the idle ones of a rule's slots say whose they are."""
    sessions = tables.sessions
    sessions["mapping"][idle] = idle
    sessions["out"]["new_port"][idle] = _network_order(idle % PORTS)
    if rule.is_reversible:
        target = rule.targets[0]
        sessions["in"]["new_addr"]["word"][idle, 0] = abi.addr(target.address)[0][0]
        sessions["in"]["new_port"][idle] = _network_order(idle % PORTS - rule.first + target.port)
    readdress(tables, idle)


def _network_order(ports: Any) -> npt.NDArray[np.uint16]:
    return np.asarray(ports).astype(">u2").view(np.uint16)


def _close(tables: Tables, reaper: bpf.Program, slots: Slots) -> None:
    """Ends the mappings that have these ports, with their sessions, so that nobody's record is overwritten."""
    for _ in range(CLOSE_TRIES):
        opened = tables.open_slots()
        mine = opened[np.isin(tables.sessions["mapping"][opened], slots) | np.isin(opened, slots)]
        if not len(mine):
            break
        # Further sessions first: a mapping closes with its last session.
        for each in (mine[mine >= tables.further_base], mine[mine < tables.further_base]):
            tables.reap(reaper, each, REAP_FORCED)


def _is_idle(life: Any) -> Mask:
    """No session runs there, and none is being opened."""
    state = life & LIFE_STATE
    running = (state == LIFE_LIVE) & (life & (LIFE_SESSION | LIFE_FURTHER_MASK) != 0)
    idle: Mask = ~(running | (state == LIFE_OPENING))
    return idle


def readdress(tables: Tables, slots: Slots) -> None:
    """Idle forwarded ports of these stand for the external address as it is now."""
    rows = tables.rows(slots)
    external = tables.settings["external"]["word"][:, 0][slots // EXTERNAL_SLOTS]
    wrong = _is_idle(rows["life"]) & (rows["out"]["new_addr"]["word"][:, 0] != external)
    if wrong.any():
        tables.sessions["out"]["new_addr"]["word"][slots[wrong], 0] = external[wrong]


def publish(tables: Tables, slot: int, endpoint: tuple[Any, ...]) -> None:
    """An internal endpoint gets the slot. A mapping that it has at the moment stays: its sessions are running."""
    with contextlib.suppress(FileExistsError):
        tables.maps["mappings"].set(endpoint, slot, bpf.UPDATE_NOEXIST)


def withdraw(tables: Tables, slot: int, endpoint: tuple[Any, ...]) -> bool:
    """An internal endpoint has the forwarded port no longer; False while a session runs there."""
    if not _is_idle(tables.rows(np.array([slot]))["life"][0]):
        return False
    if tables.maps["mappings"].get(endpoint) == slot:
        tables.maps["mappings"].delete(endpoint)
        if not _is_idle(tables.rows(np.array([slot]))["life"][0]):  # one that came meanwhile is found by it
            publish(tables, slot, endpoint)
            return False
    return True


# --- sessions --------------------------------------------------------------------------------------


def running(tables: Tables, table: Table, placed: Sequence[Placed]) -> dict[int, Table]:
    """The sessions of each forward by its index, those that its targets opened from the forwarded port included."""
    free = np.ones(len(table), bool)
    externals = tables.settings["external"]["word"][:, 0]
    marks = tables.sessions["out"]["marks"][table.slot]
    found = {}
    for each in sorted(placed, key=lambda each: _specific_first(each.rule)):
        mine = free & _fits(each.rule, table, externals)
        if each.rule.is_default:
            mine &= marks & FROM_OUTSIDE != 0
        found[each.index], free = table[mine], free & ~mine
    return found


def _fits(rule: Rule, table: Table, externals: npt.NDArray[np.uint32]) -> Mask:
    fits: Mask = (table.protocol == _class(rule)) & (not rule.from_inside)
    if isinstance(rule, Redirect):
        fits &= np.isin(table.internal.addr[:, 0], externals)
    elif not isinstance(rule, Trigger):
        fits &= np.isin(table.internal.addr[:, 0], [abi.addr(each.address)[0][0] for each in rule.targets])
    fits &= (table.external.port >= rule.first) & (table.external.port <= rule.last)
    if rule.source:
        mask, network = (abi.addr(each)[0][0] for each in (rule.source.netmask, rule.source.network_address))
        fits &= table.remote.addr[:, 0] & np.uint32(mask) == network
    return fits


# --- the agent's part ------------------------------------------------------------------------------


class Upkeep:
    """What an agent does for forwarded ports, whoever put them there.

    Ports of former rules are looked after until their last session is gone and they have rested: they may lie outside
    the pool, where nobody else looks.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._seen: tuple[bytes, list[int]] = b"", []
        self._kept, self._former = NONE, NONE
        self.has_default = False
        self._endpoints: list[tuple[int, tuple[Any, ...]]] = []
        self._withdrawn: list[tuple[int, tuple[Any, ...]]] = []
        self._next = 0

    def adopt(self, reaper: bpf.Program) -> None:
        """Gives up what a command left that was killed between a rule's end and its ports'."""
        slots = self._tables.used_slots()
        static = slots[self._tables.sessions["life"][slots] & LIFE_STATIC != 0]
        held = [keys["mapping"] for keys, _ in self._tables.maps["pinholes"].items()]
        kept = np.concatenate([forwarded_slots(self._tables), *held])
        self._tables.reap(reaper, np.setdiff1d(static, kept), REAP_YIELD)

    def slots(self) -> Slots:
        """What expiry has to look at."""
        return np.union1d(self._kept, self._former)

    def readdress(self) -> None:
        """The external address may have changed."""
        self._follow()
        readdress(self._tables, self._kept)

    def run(self) -> None:
        """A tick."""
        had_default = self.has_default
        self.readdress()
        if had_default or self.has_default:  # its remotes choose the ports
            self._former = np.union1d(self._former, np.setdiff1d(self._used(), self._kept))
        self._former = self._former[self._tables.rows(self._former)["life"] != 0]
        self._withdrawn = [each for each in self._withdrawn if not withdraw(self._tables, *each)]
        self._republish()
        self._close_triggered()

    def _used(self) -> Slots:
        """Ports that are mapped or at rest."""
        return np.flatnonzero(self._tables.sessions["life"][: self._tables.further_base]).astype(np.uint32)

    def _follow(self) -> None:
        records, wans = self._tables.rules.copy(), _wans(self._tables)
        records["opened"] = records["expires"] = 0
        records["target"]["addr"]["word"][records["flags"] & FLAG_TRIGGERED != 0] = 0
        seen = records.tobytes(), wans
        if seen == self._seen:
            return
        self._seen = seen
        rules = [each.rule for each in at(self._tables, np.flatnonzero(records["targets"]))]
        self.has_default = any(rule.is_default for rule in rules)
        before, self._kept = self._kept, _slots_of_all(rules, self._tables.externals)
        self._former = np.setdiff1d(np.union1d(self._former, before), self._kept)
        endpoints = [each for rule in rules for each in _endpoints(rule, wans)]
        present = {slot: endpoint for slot, endpoint in endpoints}
        former = self._withdrawn + self._endpoints
        self._withdrawn = [each for each in former if present.get(each[0]) != each[1]]
        self._endpoints = endpoints

    def _close_triggered(self) -> None:
        """Whose time was over long ago is forgotten: when jiffies wrap round, the ports would seem open again."""
        rules, hz = self._tables.rules, int(self._tables.settings["hz"])
        over = (rules["flags"] & FLAG_TRIGGERED != 0) & (age(bpf.jiffies(), rules["expires"]) > FORGET_S * hz)
        rules["target"]["addr"]["word"][over] = 0

    def _republish(self) -> None:
        """An endpoint that had a mapping when its forward came gets its port once that has ended; a few each time."""
        some = self._endpoints[self._next : self._next + PUBLISH_AT_ONCE]
        self._next = self._next + len(some) if len(some) == PUBLISH_AT_ONCE else 0
        static = self._tables.rows(np.array([slot for slot, _ in some], np.uint32))["life"] & LIFE_STATIC
        for (slot, endpoint), is_static in zip(some, static, strict=True):
            if is_static:
                publish(self._tables, slot, endpoint)
