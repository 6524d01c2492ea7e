"""What the log says of the NAT: a record for each session, mapping or port block that begins or ends; and refusals.

From the events of the ring (:mod:`xdpmasq.events`). A mapping's records are found out here, since the ring has
sessions only: it begins with the first of them, and has ended when its slot in the table is no longer in use. The
table is the authority, so nothing is counted, and what was missed can be made up for.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from xdpmasq import blocks, events, sessions
from xdpmasq.abi import EXTERNAL_SLOTS, LIFE_FURTHER_MASK, LIFE_LIVE, LIFE_SESSION, LIFE_STATE, PORTS
from xdpmasq.selection import Selection
from xdpmasq.sessions import ICMP, PROTOCOLS, Array, host_order

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.events import Watcher

SESSION, MAPPING, BLOCK = "session", "mapping", "block"
OPENED, CLOSED, REFUSED = "opened", "closed", "refused"
REPEATS_S = 1.0  # a host that goes on being refused for the same reason is told of once in so long

Endpoint = tuple[IPv4Address, int]
Key = tuple[int, int, int, int, int]  # class, external address and port, internal address and port


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that happened.

    Attributes:
        at: seconds since the epoch.
        kind: session, mapping or block.
        event: opened, closed or refused.
        why: as ``sessions watch`` says it; of a mapping that was there when the log began ``running``.
        remote: None where destinations are not logged.
        traffic: of a closed session, packets and bytes out, and in.
        limit: of a refusal, what there may be.
        last: of a block, its last port; the external endpoint has its first, and the internal one no port.
        wan: number of the WAN.
    """

    at: float
    kind: str
    event: str
    why: str
    protocol: str
    internal: Endpoint
    external: Endpoint | None = None
    remote: Endpoint | None = None
    duration_s: float = 0.0
    traffic: tuple[int, int, int, int] | None = None
    limit: int = 0
    wan: int = 0
    last: int = 0

    def json(self) -> str:
        """One line. Put together by hand, as there may be thousands a second, and no word in it needs an escape."""
        if self.kind == BLOCK:
            return self._block_json()
        parts = [
            f'"time": {self.at:.3f}, "record": "{self.kind}", "event": "{self.event}", "why": "{self.why}", '
            f'"protocol": "{self.protocol}", "internal": {_named(self.internal)}'
        ]
        if self.external:
            parts.append(f'"external": {_named(self.external)}')
        if self.remote:
            parts.append(f'"remote": {_named(self.remote)}')
        if self.event == CLOSED:
            parts.append(f'"duration_s": {self.duration_s:.3f}')
        if self.traffic:
            packets_out, bytes_out, packets_in, bytes_in = self.traffic
            parts.append(f'"out": {{"packets": {packets_out}, "bytes": {bytes_out}}}')
            parts.append(f'"in": {{"packets": {packets_in}, "bytes": {bytes_in}}}')
        return f"{{{', '.join(parts)}}}"

    def _block_json(self) -> str:
        assert self.external
        fields: dict[str, object] = {"time": round(self.at, 3), "record": BLOCK, "event": self.event, "why": self.why}
        ends = {"internal": {"address": str(self.internal[0])}, "external": {"address": str(self.external[0])}}
        ends["external"] |= {"first": self.external[1], "last": self.last}  # type: ignore[dict-item]
        lasted = {"duration_s": round(self.duration_s, 3)} if self.event == CLOSED else {}
        return json.dumps(fields | ends | lasted)


def _named(endpoint: Endpoint) -> str:
    return f'{{"address": "{endpoint[0]}", "port": {endpoint[1]}}}'


def remark(event: str, **fields: object) -> str:
    """A line about the log itself: ``started``, ``stopped``, and ``lost`` with a count."""
    return json.dumps({"time": round(time.time(), 3), "event": event, **fields})


class Scribe:
    """Makes records of one datapath's events.

    Args:
        what: "mappings" or "sessions".
        destinations: remotes are told (RFC 6888 REQ-12 says that they should not be).

    Attributes:
        repeated: refusals that were left out since they only repeat another.
    """

    def __init__(self, attached: Attached, watcher: Watcher, what: str, *, destinations: bool) -> None:
        self._attached, self._watcher = attached, watcher
        self._destinations = destinations
        self._mappings: dict[Key, float] | None = {} if what == "mappings" else None  # opened at, since the epoch
        self._doubtful: set[Key] = set()  # a session of theirs ended, but there were others
        self._told: dict[tuple[int, int], float] = {}
        self.repeated = 0

    def records(self, rows: Array) -> Iterator[Record]:
        """Of ``struct event``."""
        if not len(rows):
            return
        told = self._watcher.story(rows, Selection())
        settings = self._attached.settings
        places = _places(settings)
        columns = (told.kind.tolist(), told.at.tolist(), told.why, told.seconds.tolist(), _facts(rows))
        for kind, at, why, seconds, fact in zip(*columns, strict=True):
            if kind == events.REFUSED:
                record = self._refused(fact, at, why, settings)
                if record:
                    yield record
            elif self._mappings is None:
                yield self._session(fact, CLOSED if kind == events.CLOSED else OPENED, at, why, seconds)
            else:
                yield from self._mapping(fact.key, kind, at, why, places)

    def running(self) -> Iterator[Record]:
        """Mappings that are there and have not been told of: all of them at first, later those whose events were
        missed.
        """
        if self._mappings is None:
            return
        known = self._mappings
        rows = self._attached.rows(self._attached.live_slots())
        self._attached.let_go()
        ago = (np.uint32(self._attached.now()) - rows["opened_at"]).view(np.int32)
        now, places = time.time(), _places(self._attached.settings)
        keys = zip(
            (rows["mapping"] // PORTS % len(PROTOCOLS)).tolist(),
            _words(rows["out"]["new_addr"]),
            host_order(rows["out"]["new_port"]).tolist(),
            _words(rows["internal"]["addr"]),
            host_order(rows["internal"]["port"]).tolist(),
            strict=True,
        )
        for key, seconds in zip(keys, (ago / self._attached.hz).tolist(), strict=True):
            if key not in known and self._is_used(key, places):  # it may be a while since the table was read
                known[key] = now - seconds
                yield _told_of(key, known[key], OPENED, "running")

    def ended(self, *, every: bool) -> Iterator[Record]:
        """Mappings whose end was not seen: looks at every one, or at those that lost a session since."""
        if self._mappings is None:
            return
        places, now = _places(self._attached.settings), time.time()
        keys, self._doubtful = [*self._mappings] if every else self._doubtful, set()
        for key in keys:
            if key in self._mappings and not self._is_used(key, places):
                yield _told_of(key, now, CLOSED, "idle", now - self._mappings.pop(key))

    def _session(self, fact: _Fact, event: str, at: float, why: str, seconds: float) -> Record:
        _, external, external_port, _, _ = fact.key
        return Record(
            at=at, kind=SESSION, event=event, why=why, protocol=PROTOCOLS[fact.key[0]], internal=fact.internal,
            external=(IPv4Address(external), external_port), remote=fact.remote if self._destinations else None,
            duration_s=seconds, traffic=fact.traffic if event == CLOSED else None, wan=fact.wan,
        )  # fmt: skip

    def _mapping(self, key: Key, kind: int, at: float, why: str, places: dict[int, int]) -> Iterator[Record]:
        assert self._mappings is not None
        if kind == events.OPENED and key not in self._mappings:
            self._mappings[key] = at
            yield _told_of(key, at, OPENED, why)
        elif kind == events.CLOSED and key in self._mappings:
            if self._is_used(key, places):
                self._doubtful.add(key)
            else:
                yield _told_of(key, at, CLOSED, why, max(0.0, at - self._mappings.pop(key)))

    def _is_used(self, key: Key, places: dict[int, int]) -> bool:
        """Whether there are sessions in the mapping; the slot of a forward is live without any."""
        class_, external, port, *_ = key
        if external not in places:
            return False
        slot = places[external] * EXTERNAL_SLOTS + class_ * PORTS + port
        (row,) = self._attached.rows(np.array([slot], np.uint32))
        life = int(row["life"])
        return life & LIFE_STATE == LIFE_LIVE and life & (LIFE_SESSION | LIFE_FURTHER_MASK) != 0

    def _refused(self, fact: _Fact, at: float, why: str, settings: Any) -> Record | None:
        about = (fact.reason, fact.key[3])
        if at - self._told.get(about, 0.0) < REPEATS_S:
            self.repeated += 1
            return None
        if len(self._told) > PORTS:
            self._told.clear()
        self._told[about] = at
        limits = {"host_limit": "host_sessions", "host_rate": "host_rate", "sessions_full": "further"}
        return Record(
            at=at, kind=SESSION, event=REFUSED, why=why, protocol=PROTOCOLS[fact.key[0]], internal=fact.internal,
            remote=fact.remote if self._destinations else None,
            limit=int(settings[limits[why]]) if why in limits else 0, wan=fact.wan,
        )  # fmt: skip


class _Fact(NamedTuple):
    """An event's, as numbers."""

    key: Key
    remote_word: int
    remote_port: int
    wan: int
    reason: int
    traffic: tuple[int, int, int, int]

    @property
    def internal(self) -> Endpoint:
        return IPv4Address(self.key[3]), self.key[4]

    @property
    def remote(self) -> Endpoint:
        return IPv4Address(self.remote_word), self.remote_port


def _facts(rows: Array) -> Iterator[_Fact]:
    """Of ``struct event``; whole columns are read at once, as fields of single rows take many times as long."""
    inside, classes = rows["internal"], rows["internal"]["class"]
    remote_ports = np.where(classes == ICMP, 0, host_order(rows["remote_port"]))
    keys = zip(
        classes.tolist(),
        _words(rows["external"]),
        host_order(rows["external_port"]).tolist(),
        _words(inside["addr"]),
        host_order(inside["port"]).tolist(),
        strict=True,
    )
    traffic = zip(*(column.tolist() for column in sessions.traffic(rows).values()), strict=True)
    others = (_words(rows["remote"]), remote_ports.tolist(), inside["wan"].tolist(), rows["reason"].tolist())
    return map(_Fact, keys, *others, traffic)


def _words(addresses: Array) -> list[int]:
    """Of ``addr_t``, in host order."""
    words: list[int] = host_order(addresses["word"][:, 0]).tolist()
    return words


def _places(settings: Any) -> dict[int, int]:
    """The index of each external address."""
    words = _words(settings["external"][: int(settings["externals"])])
    return {word: nth for nth, word in enumerate(words) if word}


def _told_of(key: Key, at: float, event: str, why: str, duration_s: float = 0.0) -> Record:
    class_, external, external_port, inside, port = key
    return Record(
        at=at, kind=MAPPING, event=event, why=why, protocol=PROTOCOLS[class_], internal=(IPv4Address(inside), port),
        external=(IPv4Address(external), external_port), duration_s=duration_s,
    )  # fmt: skip


class Ledger:
    """Records of port blocks, by looking at their table: it is small, and a block is taken for two of the agent's
    ticks at least, so there is no event to be missed.
    """

    def __init__(self, attached: Attached) -> None:
        self._attached = attached
        self._known: dict[tuple[int, int], tuple[blocks.Block, IPv4Address, float]] = {}
        self._begun = False

    def records(self) -> Iterator[Record]:
        """What has changed since the last time; at first the blocks that there are."""
        now, jiffies, hz = time.time(), self._attached.now(), self._attached.hz
        outside = self._attached.settings["external"]
        there = {(each.external, each.first): each for each in blocks.taken(self._attached)}
        for key, (block, external, opened_at) in [*self._known.items()]:
            if there.get(key) != block:
                del self._known[key]
                yield _of_block(block, external, at=now, event=CLOSED, why="idle", duration_s=now - opened_at)
        for key in there.keys() - self._known.keys():
            block = there[key]
            opened_at = now - ((jiffies - block.taken_at) % 2**32) / hz
            external = IPv4Address(outside[block.external]["word"][:1].tobytes())
            self._known[key] = block, external, opened_at
            why = "internal" if self._begun else "running"
            yield _of_block(block, external, at=opened_at, event=OPENED, why=why)
        self._begun = True


def _of_block(block: blocks.Block, external: IPv4Address, **fields: Any) -> Record:
    ends: dict[str, Any] = {"internal": (block.owner, 0), "external": (external, block.first), "last": block.last}
    return Record(kind=BLOCK, protocol="", **ends, **fields)
