"""External ports that the agent takes for internal endpoints: nobody else's, and in and out the same.

Such a port's slot is static: it stays without sessions, until it is given back and is a mapping like any other.
Whoever changes something holds :func:`presence.changing`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any

import numpy as np

from xdpmasq import abi, blocks, bpf, config, forwarding, settings, sockets
from xdpmasq.abi import (
    CLASSES,
    EXTERNAL_SLOTS,
    LIFE_LIVE,
    LIFE_RESTING,
    LIFE_STATE,
    LIFE_STATIC,
    PORTS,
    REAP_HOLD,
    REAP_YIELD,
)
from xdpmasq.tables import Tables

TRIES = 8  # packets claim ports, too
DRAWS = 32  # before all ports are looked at


@dataclass(frozen=True)
class Endpoint:
    """An internal endpoint; the protocol is "tcp" or "udp"."""

    protocol: str
    address: IPv4Address
    port: int


class Ports:
    """Finds, takes and gives back.

    Args:
        pools: how the pools are cut.
        wan_of: the number of the WAN by which a host's packets leave.
        first, last: ports that may be taken.
    """

    def __init__(
        self,
        tables: Tables,
        reaper: bpf.Program,
        pools: config.Ports,
        wan_of: Callable[[IPv4Address], int],
        *,
        first: int = 1024,
        last: int = PORTS - 1,
    ) -> None:
        self._tables, self._reaper, self._pools, self._wan_of = tables, reaper, pools, wan_of
        self._first, self._last = first, last

    # --- reading

    def external(self, host: IPv4Address) -> IPv4Address:
        """As whom a host appears."""
        return self.address(self._external_of(host) * EXTERNAL_SLOTS)

    def address(self, slot: int) -> IPv4Address:
        """The external address that a slot is of."""
        return IPv4Address(self._tables.settings["external"]["word"][slot // EXTERNAL_SLOTS, :1].tobytes())

    def mapped(self, endpoint: Endpoint) -> int | None:
        """The slot of an endpoint's mapping."""
        slot = self._tables.maps["mappings"].get(self._key(endpoint))
        return None if slot is None else int(slot)

    def is_static(self, slot: int) -> bool:
        life = int(self._row(slot)["life"])
        return bool(life & LIFE_STATIC and life & LIFE_STATE == LIFE_LIVE)

    # --- writing

    def hold(self, endpoint: Endpoint, slot: int) -> int | None:
        """Makes an endpoint's own mapping static, so that in and out agree; None where that cannot be."""
        if not self._is_allowed(slot % PORTS):
            return None
        self._reap(slot, REAP_HOLD)
        if self.is_static(slot) and self.mapped(endpoint) == slot:
            return slot
        self.give_back(slot)  # it ended, and may be another's by now
        return None

    def take(self, endpoint: Endpoint, suggested: int = 0, *, exact: bool = False) -> int | None:
        """A port that is nobody's, inscribed as the endpoint's; the suggested one, or with ``exact`` that or none."""
        base = self._base(endpoint)
        self._provide(endpoint)
        for port in self._candidates(base, endpoint, suggested, exact):
            if self._take(endpoint, base + port):
                return base + port
        return None

    def take_pair(self, one: Endpoint, other: Endpoint) -> tuple[int, int] | None:
        """Two neighbouring ports that are nobody's, the first one even."""
        base = self._base(one)
        self._provide(one)
        for port in self._pairs(base, self._ranges(one)):
            if not self._take(one, base + port):
                continue
            if self._take(other, base + port + 1):
                return base + port, base + port + 1
            self.give_back(base + port)
        return None

    def publish(self, endpoint: Endpoint, slot: int) -> bool:
        """From now on what the endpoint sends leaves from there; False: it has another mapping."""
        forwarding.publish(self._tables, slot, self._key(endpoint))
        return self.mapped(endpoint) == slot

    def give_back(self, slot: int) -> None:
        """Static no more: sessions that run go on."""
        self._reap(slot, REAP_YIELD)

    def _take(self, endpoint: Endpoint, slot: int) -> bool:
        if sockets.is_taken(endpoint.protocol, slot % PORTS):
            return False
        return self._tables.take(self._reaper, slot, endpoint.address, endpoint.port)

    def _candidates(self, base: int, endpoint: Endpoint, suggested: int, exact: bool) -> Iterator[int]:
        host = endpoint.address
        if suggested and self._may_have(host, suggested) and self._is_free(base + suggested, host):
            yield suggested
        if exact:
            return
        ranges = self._ranges(endpoint)
        yield from filter(lambda port: not self._is_claimed(base + port), _drawn(ranges))
        free = self._free(base, ranges)
        yield from random.SystemRandom().sample(free, min(TRIES, len(free)))

    def _pairs(self, base: int, ranges: list[range]) -> Iterator[int]:
        """Even ports that are free with the next one, in the same way."""
        for port in _drawn(ranges):
            even = port & ~1
            claimed = self._is_claimed(base + even) or self._is_claimed(base + even + 1)
            if not claimed and any(even in ports and even + 1 in ports for ports in ranges):
                yield even
        free = set(self._free(base, ranges))
        pairs = [port for port in free if port % 2 == 0 and port + 1 in free]
        yield from random.SystemRandom().sample(pairs, min(TRIES, len(pairs)))

    def _is_claimed(self, slot: int) -> bool:
        return bool(int(self._tables.claims[slot // 64]) >> slot % 64 & 1)

    def _provide(self, endpoint: Endpoint) -> None:
        """A block with a free port for its host, where ports are given out in blocks."""
        if self._pools.block_size and not self._free(self._base(endpoint), self._ranges(endpoint)):
            blocks.take(self._tables, self._reaper, endpoint.address, self._external_of(endpoint.address))

    def _ranges(self, endpoint: Endpoint) -> list[range]:
        """Of the ports that an endpoint may have."""
        if self._pools.block_size:
            held = blocks.of_host(self._tables, endpoint.address, self._external_of(endpoint.address))
            return [self._allowed(each) for each in held]
        return self._pool[CLASSES.index(endpoint.protocol)]

    @functools.cached_property
    def _pool(self) -> list[list[range]]:
        """Of each class, what may be taken."""
        return [
            [self._allowed(range(first, first + count)) for first, count in zip(*pool, strict=True)]
            for pool in settings.pools(self._pools)
        ]

    def _allowed(self, ports: range) -> range:
        return range(max(ports.start, self._first), min(ports.stop, self._last + 1))

    def _free(self, base: int, ranges: list[range]) -> list[int]:
        """Unclaimed ones of these."""
        words = self._tables.claims[base // 64 : (base + PORTS) // 64]
        claimed = np.unpackbits(words.view(np.uint8), bitorder="little")
        found: list[int] = []
        for ports in ranges:
            found += (np.flatnonzero(claimed[ports.start : ports.stop] == 0) + ports.start).tolist()
        return found

    def _is_allowed(self, port: int) -> bool:
        first, last = settings.own_ports()
        return self._first <= port <= self._last and not first <= port <= last

    def _may_have(self, host: IPv4Address, port: int) -> bool:
        """Whether a port that is suggested is one that the host could get."""
        if not self._is_allowed(port):
            return False
        return not self._pools.block_size or any(
            port in ports for ports in blocks.of_host(self._tables, host, self._external_of(host))
        )

    def _is_free(self, slot: int, host: IPv4Address) -> bool:
        """Nobody has it; a port at rest is its last host's (RFC 6888 REQ-8 is about others)."""
        session = self._row(slot)
        state = int(session["life"]) & LIFE_STATE
        last_host = IPv4Address(session["in"]["new_addr"]["word"][:1].tobytes())
        return bool(state == 0 or (state == LIFE_RESTING and last_host == host))

    def _row(self, slot: int) -> Any:
        return self._tables.maps["sessions"].get(slot)

    def _reap(self, slot: int, order: int) -> None:
        self._tables.reap(self._reaper, np.array([slot], np.uint32), order)

    def _external_of(self, host: IPv4Address) -> int:
        return self._tables.external_of(host, self._wan_of(host))

    def _base(self, endpoint: Endpoint) -> int:
        return self._external_of(endpoint.address) * EXTERNAL_SLOTS + CLASSES.index(endpoint.protocol) * PORTS

    def _key(self, endpoint: Endpoint) -> bytes:
        class_, wan = CLASSES.index(endpoint.protocol), self._wan_of(endpoint.address)
        return abi.mapping_key(endpoint.address, endpoint.port, class_, wan)


def _drawn(ranges: list[range]) -> Iterator[int]:
    """Some at random: of an empty pool nearly all are free, of a full one hardly any."""
    several, total = random.SystemRandom(), sum(map(len, ranges))
    for _ in range(DRAWS if total else 0):
        nth = several.randrange(total)
        for ports in ranges:
            if nth < len(ports):
                yield ports[nth]
                break
            nth -= len(ports)
