"""Mappings that internal hosts have asked for, in the kernel's tables: forwards with a lease, of one host for a time.

A lease is one rule, or as many as it has filters. Whoever changes something holds :func:`presence.changing`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import numpy as np

from xdpmasq import abi, bpf, forwarding
from xdpmasq.abi import CLASSES, EXTERNAL_SLOTS, PORTS
from xdpmasq.config import Config
from xdpmasq.forwarding import Placed
from xdpmasq.forwardrecords import FLAG_LEASED
from xdpmasq.forwards import Lease, Rule, Target
from xdpmasq.ports import Endpoint, Ports
from xdpmasq.tables import Tables

Filters = Sequence[IPv4Network | None]  # remotes for whom it is; None: all
EVERYBODY: Filters = (None,)


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
        self._tables, self._reaper, self._hz = tables, reaper, hz
        self._ports = Ports(tables, reaper, config.ports, wan_of, first=config.pcp.first, last=config.pcp.last)

    # --- reading

    def external(self, host: IPv4Address) -> IPv4Address:
        """As whom a host appears."""
        return self._ports.external(host)

    def held(self, endpoint: Endpoint) -> Held | None:
        """What an endpoint has, that is no mapping of its own making."""
        if found := next(self.held_by(endpoint.address, endpoint.protocol, endpoint.port), None):
            return found
        slot = self._ports.mapped(endpoint)
        if slot is None or not self._ports.is_static(slot):
            return None
        return Held(endpoint, slot % PORTS, self._ports.address(slot))

    def held_by(self, host: IPv4Address, protocol: str | None = None, port: int | None = None) -> Iterator[Held]:
        """A host's leases, of one protocol or internal port, or of all."""
        rules = self._tables.rules
        mine = self._leased() & (rules["target"]["addr"]["word"][:, 0, 0] == abi.addr(host)[0][0])
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
        address = self._ports.address(rule.lease.external * EXTERNAL_SLOTS)
        return Held(endpoint, rule.first, address, rule.lease.nonce, left, tuple(placed))

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
        mapped = self._ports.mapped(endpoint)
        if exact and mapped is not None and mapped % PORTS != suggested:
            return None
        slot = None if mapped is None else self._ports.hold(endpoint, mapped)
        if slot is None:
            slot = self._ports.take(endpoint, suggested, exact=exact)
        if slot is None:
            return None
        lease = Lease(nonce, slot // EXTERNAL_SLOTS)
        try:
            self._put([self._rule(endpoint, slot % PORTS, lease, source) for source in filters], lifetime_s)
        except BaseException:
            self._ports.give_back(slot)
            raise
        self._ports.publish(endpoint, slot)
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
