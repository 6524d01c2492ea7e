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
from xdpmasq.forwardrecords import (
    FLAG_DEFAULT,
    FLAG_EXPIRES,
    FLAG_FROM_INSIDE,
    FLAG_TO_GATEWAY,
    FLAG_TRIGGERED,
    address_of,
    class_of,
    externals_of,
    keys_of,
    record_of,
    rule_of,
)
from xdpmasq.forwards import Rule
from xdpmasq.net import ifaddrs, sysctl
from xdpmasq.redirects import Redirect
from xdpmasq.sessions import Table
from xdpmasq.tables import Tables
from xdpmasq.triggers import Trigger

FROM_OUTSIDE = 4  # SESSION_FROM_OUTSIDE
CLOSE_TRIES = 10  # packets may join a mapping until it is closed

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
    rule, holder = rule_of(record, tables.leases[index], spared, hz), _holder(record)
    expires = int(record["expires"]) if record["flags"] & FLAG_EXPIRES or holder else None
    return Placed(index, rule, int(record["opened"]), expires, holder)


def _holder(record: Any) -> IPv4Address | None:
    """To whom a triggered rule is open."""
    address, over = address_of(record["target"][0]["addr"]), age(bpf.jiffies(), record["expires"].reshape(1))[0] > 0
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


# --- slots ----------------------------------------------------------------------------------------


def slots_of(rule: Rule, externals: int) -> Slots:
    """The slots of its ports, which are to stay out of the pool; the default host and redirects on LANs have none."""
    if rule.is_default or rule.from_inside:
        return NONE
    ports = np.arange(rule.first, rule.last + 1, dtype=np.uint32)
    bases = [external * EXTERNAL_SLOTS + class_of(rule) * PORTS for external in externals_of(rule, externals)]
    return np.concatenate([ports + np.uint32(base) for base in bases])


def slots_of_all(rules: Sequence[Rule], externals: int) -> Slots:
    return np.unique(np.concatenate([NONE, *(slots_of(rule, externals) for rule in rules)]))


def forwarded_slots(tables: Tables) -> Slots:
    """Of all rules."""
    return slots_of_all([each.rule for each in read(tables)], tables.externals)


def endpoints_of(rule: Rule, wans: Sequence[int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Slot and ``struct mapping_key`` of the internal endpoint that may use it, where there is just one.

    Args:
        wans: of each external address. Of a WAN's several, an endpoint gets its port at the first.
    """
    if rule.is_reversible:
        target = rule.targets[0]
        for slot in slots_of(rule, len(wans)).tolist():
            port, wan = target.port + slot % PORTS - rule.first, wans[slot // EXTERNAL_SLOTS]
            yield slot, (abi.addr(target.address), socket.htons(port), class_of(rule), wan)


def wans_of(tables: Tables) -> list[int]:
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
        tables.rules[index] = record_of(tables, rule, expires)
        try:
            if isinstance(rule, Redirect):
                redirecting.spare(tables, index, rule.spared)
            if not rule.lease:
                _keep(tables, reaper, rule)
            for key in keys_of(rule, tables.externals):
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
        for key in keys_of(each.rule, tables.externals):
            tables.maps["forwards"].delete(key)
        tables.rules[each.index] = np.zeros((), tables.rules.dtype)
        redirecting.spare(tables, each.index, ())
    _count_triggers(tables)
    others = [each.rule for each in read(tables)]
    leased = set(slots_of_all([rule for rule in others if rule.lease], tables.externals).tolist())
    for each in placed:
        for slot, endpoint in endpoints_of(each.rule, wans_of(tables)):
            if slot not in leased:  # of a lease for several remotes, another rule is left
                withdraw(tables, slot, endpoint)
    slots = slots_of_all([each.rule for each in placed], tables.externals)
    tables.reap(reaper, np.setdiff1d(slots, slots_of_all(others, tables.externals)), REAP_YIELD)


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
    for slot, endpoint in endpoints_of(rule, wans_of(tables)):
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


def publish(tables: Tables, slot: int, endpoint: tuple[Any, ...] | bytes) -> None:
    """An internal endpoint gets the slot. A mapping that it has at the moment stays: its sessions are running."""
    with contextlib.suppress(FileExistsError):
        tables.maps["mappings"].set(endpoint, slot, bpf.UPDATE_NOEXIST)


def withdraw(tables: Tables, slot: int, endpoint: tuple[Any, ...]) -> bool:
    """An internal endpoint has the forwarded port no longer; False while a session runs there."""
    if not _is_idle(tables.rows(np.array([slot]))["life"])[0]:
        return False
    if tables.maps["mappings"].get(endpoint) == slot:
        tables.maps["mappings"].delete(endpoint)
        if not _is_idle(tables.rows(np.array([slot]))["life"])[0]:  # one that came meanwhile is found by it
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
    fits: Mask = (table.protocol == class_of(rule)) & (not rule.from_inside)
    if isinstance(rule, Redirect):
        fits &= np.isin(table.internal.addr[:, 0], externals)
    elif not isinstance(rule, Trigger):
        fits &= np.isin(table.internal.addr[:, 0], [abi.addr(each.address)[0][0] for each in rule.targets])
    fits &= (table.external.port >= rule.first) & (table.external.port <= rule.last)
    if rule.source:
        mask, network = (abi.addr(each)[0][0] for each in (rule.source.netmask, rule.source.network_address))
        fits &= table.remote.addr[:, 0] & np.uint32(mask) == network
    return fits
