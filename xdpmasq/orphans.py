"""Later fragments that came before their first: held until that one has told where they belong.

Only the first fragment has ports, so the kernel can translate none of a datagram before it. Here the others wait;
this module decides about them and touches neither network nor tables. First ones wait here, too, where an ALG is to
read the datagram: until all are there. Both share the room: a datagram of an ALG in pieces, too, is there for
milliseconds, and what pushes that out would push out the others.

Room is bounded, and what gives way is always the oldest: of the same source where that has its share, of all where
everything is full. Refusing the newcomer would be an invitation: 256 forged pieces, sent once, would shut out the
source they name for as long as pieces are held. What is in order waits for milliseconds, so that to push it out of
here somebody must fill the share, or the whole room, anew every few milliseconds.
"""

from __future__ import annotations

import heapq
import itertools
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

POLL_S = 0.005
POLL_MAX_S = 1.0
ROOM = (2048, 4 << 20)  # pieces and bytes, of all sources
SHARE = (256, 512 << 10)  # of one; a datagram of 64 KiB in Ethernet's pieces is 45
JOURNEYS = 2
RETURN_S = 1.0  # a piece that the kernel could not place is back at once, if at all
REMEMBERED = 4096  # pieces on their way


class Key(NamedTuple):
    """Which datagram a fragment is of (RFC 791), as its header has it."""

    src: bytes
    dst: bytes
    id: bytes
    protocol: int


class Part(NamedTuple):
    """Which part of a datagram's payload a fragment has; ``more``: others follow behind it."""

    offset: int
    length: int
    more: bool


@dataclass
class _Piece:
    frame: bytes
    offset: int
    journeys: int


@dataclass(eq=False)
class _Datagram:
    """What is held of one, in the order in which it came.

    Attributes:
        size: bytes of all frames.
        lengths: of the payload's parts, by offset; what is repeated is there once.
        total: bytes of the payload; None: its last part has not come.
    """

    since: float
    due: float
    pieces: list[_Piece] = field(default_factory=list)
    size: int = 0
    lengths: dict[int, int] = field(default_factory=dict)
    covered: int = 0
    total: int | None = None

    def add(self, piece: _Piece, part: Part) -> None:
        self.pieces.append(piece)
        self.size += len(piece.frame)
        self.covered += part.length - self.lengths.get(part.offset, 0)
        self.lengths[part.offset] = part.length
        if not part.more:
            self.total = part.offset + part.length

    @property
    def has_first(self) -> bool:
        return 0 in self.lengths


class _Share:
    """A bounded part of the room; its datagrams stand in the order in which they came."""

    def __init__(self, pieces: int, size: int) -> None:
        self._most_pieces, self._most_bytes = pieces, size
        self._pieces = self._bytes = 0
        self.datagrams: OrderedDict[Key, _Datagram] = OrderedDict()

    def is_full_for(self, size: int) -> bool:
        return self._pieces >= self._most_pieces or self._bytes + size > self._most_bytes

    def oldest(self) -> Key:
        return next(iter(self.datagrams))

    def add(self, key: Key, datagram: _Datagram, size: int) -> None:
        self.datagrams[key] = datagram
        self._pieces += 1
        self._bytes += size

    def remove(self, key: Key) -> _Datagram:
        datagram = self.datagrams.pop(key)
        self._pieces -= len(datagram.pieces)
        self._bytes -= datagram.size
        return datagram


class Orphans:
    """Frames with later fragments, by datagram.

    Args:
        patience_s: how long a datagram is held after its first piece.

    Attributes:
        counts: pieces held so far, and what became of them: released, expired, refused (they gave way, or came back
            once too often).
    """

    def __init__(self, patience_s: float) -> None:
        self.patience_s = patience_s
        self._all = _Share(*ROOM)
        self._sources: dict[bytes, _Share] = {}
        self._schedule: list[tuple[float, int, Key, _Datagram]] = []
        self._numbers = itertools.count()  # equal times stay in order
        self._on_their_way: OrderedDict[tuple[Key, int], tuple[int, float]] = OrderedDict()
        self.counts = dict.fromkeys(("held", "released", "expired", "refused"), 0)

    def __len__(self) -> int:
        return sum(len(datagram.pieces) for datagram in self._all.datagrams.values())

    def hold(self, key: Key, part: Part, frame: bytes, now: float) -> bool:
        """Takes a piece in, behind the others of its datagram; :meth:`due` names it at once.

        Returns:
            Whether it is held. It is not when it was released twice already: then the kernel and we do not agree
            about its first fragment, and it would go round for ever.
        """
        journeys, at = self._on_their_way.get((key, part.offset), (0, now))
        if now - at > RETURN_S:
            journeys = 0
        if journeys >= JOURNEYS:
            self.counts["refused"] += 1
            return False
        self._make_room(key.src, len(frame))
        source = self._sources.setdefault(key.src, _Share(*SHARE))
        datagram = self._all.datagrams.get(key) or _Datagram(now, now)
        for share in (source, self._all):
            share.add(key, datagram, len(frame))
        datagram.add(_Piece(frame, part.offset, journeys), part)
        self._plan(key, datagram, now)
        self.counts["held"] += 1
        return True

    def is_whole(self, key: Key) -> bool:
        """Whether all of a datagram is held here, its first fragment, too; if no parts of it overlap."""
        datagram = self._all.datagrams.get(key)
        return datagram is not None and datagram.has_first and datagram.covered == datagram.total

    def due(self, now: float) -> list[Key]:
        """Datagrams to ask the kernel about: those with new pieces, and others at growing intervals.

        An interval is as long as the wait so far: most first fragments come within a moment, and those that never
        come must not keep us busy. What has waited too long is dropped here. What has its first fragment here is none
        of them: a first that the kernel knows is that of an earlier datagram, which had the same identification.
        """
        asked = []
        while self._next() <= now:
            _, _, key, datagram = heapq.heappop(self._schedule)
            waited = now - datagram.since
            left = self.patience_s - waited
            if left < POLL_S:
                self.counts["expired"] += self._remove(key)
                continue
            self._plan(key, datagram, now + max(POLL_S, min(waited, POLL_MAX_S, left)))
            if not datagram.has_first:
                asked.append(key)
        return asked

    def release(self, key: Key, now: float) -> list[bytes]:
        """The frames of a datagram, in the order in which they came; no longer held."""
        datagram = self._all.datagrams[key]
        self.counts["released"] += self._remove(key)
        for piece in datagram.pieces:
            self._on_their_way[key, piece.offset] = (piece.journeys + 1, now)
            self._on_their_way.move_to_end((key, piece.offset))
        self._forget(now)
        return [piece.frame for piece in datagram.pieces]

    def pause(self, now: float) -> float | None:
        """Seconds until :meth:`due` is to be asked again; None while nothing is held."""
        return max(POLL_S, self._next() - now) if self._all.datagrams else None

    def _plan(self, key: Key, datagram: _Datagram, at: float) -> None:
        datagram.due = at
        heapq.heappush(self._schedule, (at, next(self._numbers), key, datagram))

    def _next(self) -> float:
        """When the next datagram is due; infinity when none is held."""
        while self._schedule:
            at, _, key, datagram = self._schedule[0]
            if self._all.datagrams.get(key) is datagram and datagram.due == at:
                return at
            heapq.heappop(self._schedule)  # released, dropped, or planned anew since
        return float("inf")

    def _make_room(self, source: bytes, size: int) -> None:
        share = self._sources.get(source)
        while share and share.is_full_for(size):
            self.counts["refused"] += self._remove(share.oldest())
        while self._all.is_full_for(size):
            self.counts["refused"] += self._remove(self._all.oldest())

    def _remove(self, key: Key) -> int:
        """Drops a datagram, whole: what is left of one that lost a piece serves nobody. Returns its pieces."""
        source = self._sources[key.src]
        source.remove(key)
        if not source.datagrams:
            del self._sources[key.src]
        return len(self._all.remove(key).pieces)

    def _forget(self, now: float) -> None:
        while self._on_their_way:
            _, at = next(iter(self._on_their_way.values()))
            if now - at <= RETURN_S and len(self._on_their_way) <= REMEMBERED:
                break
            self._on_their_way.popitem(last=False)
