"""Mappings that internal hosts have asked for, in the kernel's tables: forwards with a lease, of one host for a time.

A lease is one rule, or as many as it has filters. Whoever changes something holds :func:`presence.changing`.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np

from xdpmasq import bpf, datapath, forwarding, settings, sockets
from xdpmasq.config import Config
from xdpmasq.datapath import (
    CLASSES,
    EXTERNAL_SLOTS,
    LIFE_LIVE,
    LIFE_RESTING,
    LIFE_STATE,
    LIFE_STATIC,
    PORTS,
    REAP_HOLD,
    REAP_TAKE,
    REAP_YIELD,
    Slots,
    Tables,
)
from xdpmasq.forwarding import FLAG_LEASED, Placed
from xdpmasq.forwards import Lease, Rule, Target

TRIES = 8  # packets claim ports, too

Filters = Sequence[IPv4Network | None]  # remotes for whom it is; None: all
EVERYBODY: Filters = (None,)


@dataclass(frozen=True)
class Endpoint:
    """An internal endpoint; the protocol is "tcp" or "udp"."""

    protocol: str
    address: IPv4Address
    port: int


@dataclass(frozen=True)
class Held:
    """What an internal endpoint has.

    Attributes:
        port: the external one.
        nonce: None: the user's own forward.
        left_s: seconds until it ends.
    """

    endpoint: Endpoint
    port: int
    address: IPv4Address
    nonce: bytes | None = None
    left_s: int = 0
    placed: tuple[Placed, ...] = ()


class Book:
    """Finds, makes, prolongs and ends leases.

    Args:
        config: the whole: ports are shared with what internal hosts open by themselves.
        hz: jiffies a second.
        wan_of: the number of the WAN by which a host's packets leave.
    """

    def __init__(
        self,
        tables: Tables,
        reaper: bpf.Program,
        config: Config,
        hz: int,
        wan_of: Callable[[IPv4Address], int] = lambda _: 0,
    ) -> None:
        self._tables, self._reaper, self._hz, self._wan_of = tables, reaper, hz, wan_of
        self._ports = config.ports
        self._first, self._last = config.pcp.first, config.pcp.last

    # --- reading

    def external(self, host: IPv4Address) -> IPv4Address:
        """As whom a host appears."""
        return self._address(self._external_of(host))

    def _external_of(self, host: IPv4Address) -> int:
        return self._tables.external_of(host, self._wan_of(host))

    def held(self, endpoint: Endpoint) -> Held | None:
        """What an endpoint has, that is no mapping of its own making."""
        if found := next(self.held_by(endpoint.address, endpoint.protocol, endpoint.port), None):
            return found
        slot = self._mapped(endpoint)
        if slot is None or not self._tables.sessions["life"][slot] & LIFE_STATIC:
            return None
        return Held(endpoint, slot % PORTS, self._address(slot // EXTERNAL_SLOTS))

    def held_by(self, host: IPv4Address, protocol: str | None = None, port: int | None = None) -> Iterator[Held]:
        """A host's leases, of one protocol or internal port, or of all."""
        rules = self._tables.rules
        mine = self._leased() & (rules["target"]["addr"]["word"][:, 0, 0] == datapath.addr(host)[0][0])
        if protocol is not None:
            mine &= rules["class"] == CLASSES.index(protocol)
        if port is not None:
            mine &= rules["target"]["port"][:, 0] == port
        by_endpoint: dict[Endpoint, list[Placed]] = {}
        for placed in forwarding.at(self._tables, np.flatnonzero(mine)):
            target = placed.rule.targets[0]
            by_endpoint.setdefault(Endpoint(placed.rule.protocol, host, target.port), []).append(placed)
        for endpoint, rules_of_one in by_endpoint.items():
            yield self._held(endpoint, rules_of_one)

    def count(self) -> int:
        """The rules of all leases."""
        return int(self._leased().sum())

    def _leased(self) -> Any:
        rules = self._tables.rules
        return (rules["targets"] != 0) & (rules["flags"] & FLAG_LEASED != 0)

    def _held(self, endpoint: Endpoint, placed: Sequence[Placed]) -> Held:
        rule, expires = placed[0].rule, placed[0].expires
        assert rule.lease
        left = forwarding.left_s(expires, self._hz) or 0
        return Held(endpoint, rule.first, self._address(rule.lease.external), rule.lease.nonce, left, tuple(placed))

    def _address(self, external: int) -> IPv4Address:
        return IPv4Address(self._tables.settings["external"]["word"][external, :1].tobytes())

    def _mapped(self, endpoint: Endpoint) -> int | None:
        """The slot of an endpoint's mapping."""
        slot = self._tables.maps["mappings"].get(self._key(endpoint))
        return None if slot is None else int(slot)

    # --- writing

    def open(
        self, endpoint: Endpoint, suggested: int, *, exact: bool, filters: Filters, nonce: bytes, lifetime_s: int
    ) -> Held | None:
        """A lease for an endpoint that has none: of the port of its mapping, else the suggested one, else any.

        Args:
            exact: the suggested port or none.

        Returns:
            None where no port is to be had.

        Raises:
            ForwardError: there is no room for its rules.
        """
        mapped = self._mapped(endpoint)
        if exact and mapped is not None and mapped % PORTS != suggested:
            return None
        slot = None if mapped is None else self._hold(endpoint, mapped)
        if slot is None:
            slot = self._take(endpoint, suggested, exact)
        if slot is None:
            return None
        lease = Lease(nonce, slot // EXTERNAL_SLOTS)
        rules = [self._rule(endpoint, slot % PORTS, lease, source) for source in filters]
        # Idle so far, or as its own sessions have inscribed it.
        forwarding.inscribe(self._tables, rules[0], np.array([slot], np.uint32))
        try:
            self._put(rules, lifetime_s)
        except BaseException:
            self._give_back(slot)
            raise
        forwarding.publish(self._tables, slot, self._key(endpoint))
        return next(self.held_by(endpoint.address, endpoint.protocol, endpoint.port))

    def renew(self, held: Held, lifetime_s: int, filters: Filters) -> None:
        """Moves the end of a lease; ``filters`` are those that it has from now on.

        Raises:
            ForwardError: there is no room for more rules.
        """
        rule = held.placed[0].rule
        assert rule.lease
        before = {each.rule.source: each for each in held.placed}
        new = [self._rule(held.endpoint, held.port, rule.lease, each) for each in filters if each not in before]
        self._put(new, lifetime_s)
        gone = [each for source, each in before.items() if source not in filters]
        for each in held.placed:
            self._tables.rules["expires"][each.index] = self._expires(lifetime_s)
        if gone:
            forwarding.take(self._tables, self._reaper, *gone)

    def end(self, held: Iterable[Held]) -> None:
        """Ends leases; the sessions that run go on."""
        if placed := [each for one in held for each in one.placed]:
            forwarding.take(self._tables, self._reaper, *placed)

    def _rule(self, endpoint: Endpoint, port: int, lease: Lease, source: IPv4Network | None) -> Rule:
        return Rule(endpoint.protocol, port, port, (Target(endpoint.address, endpoint.port),), source, lease)

    def _expires(self, lifetime_s: int) -> int:
        return (bpf.jiffies() + lifetime_s * self._hz) % 2**32

    def _put(self, rules: Sequence[Rule], lifetime_s: int) -> None:
        """All of them or none."""
        with contextlib.ExitStack() as undo:
            for rule in rules:
                index = forwarding.put(self._tables, self._reaper, rule, self._expires(lifetime_s))
                undo.callback(forwarding.take, self._tables, self._reaper, *forwarding.at(self._tables, [index]))
            undo.pop_all()

    # --- ports

    def _hold(self, endpoint: Endpoint, slot: int) -> int | None:
        """Makes an endpoint's own mapping static, so that in and out agree; None where that cannot be."""
        if not self._is_allowed(slot % PORTS):
            return None
        self._tables.reap(self._reaper, np.array([slot], np.uint32), REAP_HOLD)
        if self._is_static(slot) and self._mapped(endpoint) == slot:
            return slot
        self._give_back(slot)  # it ended, and may be another's by now
        return None

    def _take(self, endpoint: Endpoint, suggested: int, exact: bool) -> int | None:
        """A port that is nobody's."""
        base = self._external_of(endpoint.address) * EXTERNAL_SLOTS + CLASSES.index(endpoint.protocol) * PORTS
        own = {each.port for each in sockets.listeners() if each.protocol == endpoint.protocol}
        for port in self._candidates(base, endpoint, suggested, exact):
            if port in own:
                continue
            slot = base + port
            self._tables.reap(self._reaper, np.array([slot], np.uint32), REAP_TAKE)
            if self._is_static(slot):
                return slot
        return None

    def _candidates(self, base: int, endpoint: Endpoint, suggested: int, exact: bool) -> Iterator[int]:
        if suggested and self._is_allowed(suggested) and self._is_free(base + suggested, endpoint.address):
            yield suggested
        if exact:
            return
        free = self._free(base, CLASSES.index(endpoint.protocol))
        yield from random.SystemRandom().sample(free, min(TRIES, len(free)))

    def _free(self, base: int, class_: int) -> list[int]:
        """Unclaimed ports of the pool."""
        words = self._tables.claims[base // 64 : (base + PORTS) // 64]
        claimed = np.unpackbits(words.view(np.uint8), bitorder="little")
        found: list[int] = []
        for first, count in zip(*settings.pools(self._ports)[class_], strict=True):
            start, end = max(first, self._first), min(first + count - 1, self._last)
            found += (np.flatnonzero(claimed[start : end + 1] == 0) + start).tolist()
        return found

    def _is_allowed(self, port: int) -> bool:
        first, last = settings.own_ports()
        return self._first <= port <= self._last and not first <= port <= last

    def _is_free(self, slot: int, host: IPv4Address) -> bool:
        """Nobody has it; a port at rest is its last host's (RFC 6888 REQ-8 is about others)."""
        session = self._tables.sessions[slot]
        state = session["life"] & LIFE_STATE
        last_host = IPv4Address(session["in"]["new_addr"]["word"][:1].tobytes())
        return bool(state == 0 or (state == LIFE_RESTING and last_host == host))

    def _is_static(self, slot: int) -> bool:
        life = self._tables.sessions["life"][slot]
        return bool(life & LIFE_STATIC and life & LIFE_STATE == LIFE_LIVE)

    def _give_back(self, slot: int) -> None:
        slots: Slots = np.array([slot], np.uint32)
        self._tables.reap(self._reaper, slots, REAP_YIELD)

    def _key(self, endpoint: Endpoint) -> tuple[Any, ...]:
        """``struct mapping_key``."""
        class_, wan = CLASSES.index(endpoint.protocol), self._wan_of(endpoint.address)
        return datapath.addr(endpoint.address), socket.htons(endpoint.port), class_, wan
