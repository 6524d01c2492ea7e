"""One direction of a control session over TCP: segments in, segments out, whatever the ALG does to their text.

Sequence numbers are of two kinds: the sender's own, and what the other side sees, which differ by the *shifts* of all
edits before (``struct shifts`` of bpf/types.h; the kernel shifts what does not come by here). An edit that was made
once is repeated as it was when the segment is sent again, with whatever boundaries.

Text that could be the beginning of a message is held until the rest has come. Its sender is told that it has arrived,
since it may wait for that before it sends more (Nagle's algorithm), but not before the other side has all that came
earlier. From then on the held text is ours to deliver: it goes out as one piece with what completes it, also when
that is sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

ROUND = 1 << 32
REGIONS = 32  # edits that are remembered
SHIFTS = 8  # as in bpf/types.h

Edit = Callable[[bytes], bytes]
Delivered = Callable[[], int | None]
Ready = Callable[[bytes], int]


def before(one: int, other: int) -> int:
    """How many bytes one sequence number is before another; negative: behind it (RFC 793 section 3.3)."""
    return (other - one + ROUND // 2) % ROUND - ROUND // 2


class Step(NamedTuple):
    """What stood from ``start`` to ``end``, by the sender's numbers, was edited: behind it they differ by ``by``."""

    start: int
    end: int
    by: int


@dataclass
class Shifts:
    """Of one direction; before the first step numbers differ by ``base``. As ``sequence_change`` of bpf/alg.h."""

    base: int = 0
    steps: list[Step] = field(default_factory=list)

    def add(self, start: int, end: int, more: int) -> None:
        """From ``end`` on numbers differ by ``more`` more. Said again, nothing happens."""
        if any(known.end == end for known in self.steps):
            return
        self.steps.append(Step(start, end, (self.now + more) % ROUND))
        if len(self.steps) > SHIFTS:
            self.base = self.steps.pop(0).by

    @property
    def now(self) -> int:
        return self.steps[-1].by if self.steps else self.base

    def seen(self, sequence: int) -> int:
        """A sequence number as the other side sees it."""
        by = self.base
        for step in self.steps:
            by = step.by if before(step.end, sequence) >= 0 else by
        return (sequence + by) % ROUND

    def acked(self, sequence: int, *, begins: bool = False) -> int:
        """What the other side has said of a number, as the sender sees it.

        Of an edited text the sender is told nothing before all of it has arrived: whatever lies within stands for its
        beginning, or, where a block of SACK ``begins``, for its end.
        """
        found = (sequence - self.base) % ROUND
        for start, end, by in self.steps:
            if before((end + by) % ROUND, sequence) >= 0:
                found = (sequence - by) % ROUND
            elif before(start, found) > 0:
                found = end if begins else start
        return found


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes of the sender's that go out as others, and always together."""

    start: int
    end: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """What goes out: ``sequence`` as the other side sees it."""

    sequence: int
    text: bytes


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a segment leads to.

    Attributes:
        pieces: to be sent on; none: the segment goes no further.
        acked: tell the sender that everything before has arrived (its own numbers); None: the other side will.
        shifted: :attr:`Stream.shifts` has changed; the kernel must know before the pieces go out.
    """

    pieces: tuple[Piece, ...] = ()
    acked: int | None = None
    shifted: bool = False


class Stream:
    """One direction.

    Args:
        ready: how much of some text can go on now (:meth:`xdpmasq.alg.api.Alg.ready`).
        edit: what becomes of that.
        longest: bytes that are held at most.
        delivered: up to where the other side has acknowledged, in the sender's own numbers; None: not known.
        shifts: those that the kernel has already, of the same connection.

    Attributes:
        jumped: some text was never here: what begins behind it need not be the beginning of a message.
    """

    def __init__(
        self, ready: Ready, edit: Edit, longest: int, delivered: Delivered, shifts: Shifts | None = None
    ) -> None:
        self._ready, self._edit, self._longest, self._delivered = ready, edit, longest, delivered
        self.shifts = shifts or Shifts()
        self._next: int | None = None
        self._held, self._held_at = b"", 0
        self._regions: list[Region] = []
        self._told: int | None = None  # what is before is not the sender's any more
        self.jumped = False

    @property
    def holds(self) -> int:
        return len(self._held)

    @property
    def settled(self) -> bool:
        """Nothing is held, and nothing that was edited can be asked for again."""
        edits = [each.end for each in self._regions] + [step.end for step in self.shifts.steps]
        if self._held or not edits:
            return not self._held
        delivered = self._delivered()
        return delivered is not None and all(before(each, delivered) >= 0 for each in edits)

    def fold(self) -> bool:
        """Forgets where edits were, once settled: 2 GiB further on a place that is behind would seem to lie ahead.

        Returns:
            Whether :attr:`shifts` have changed.
        """
        if not self.shifts.steps or not self.settled:
            return False
        self.shifts.base, self.shifts.steps, self._regions = self.shifts.now, [], []
        return True

    def begin(self, sequence: int, taken: int = 0) -> None:
        """A SYN with that number: a new connection. ``taken``: bytes that came with it, and have gone on."""
        self.__init__(self._ready, self._edit, self._longest, self._delivered)  # type: ignore[misc]
        self._next = (sequence + 1 + taken) % ROUND

    def segment(self, sequence: int, text: bytes, *, last: bool = False) -> Outcome:
        """Takes a segment with text.

        Args:
            last: it has a FIN: nothing will follow.
        """
        if self._next is None:
            self._next = sequence
        late = before(sequence, self._next)
        if late < 0:
            return self._too_early(sequence, text, last)
        if late >= len(text) > 0:
            return self._again(sequence, text)
        if text and self._is_full:
            return Outcome()  # it will be sent again
        return self._fresh(sequence, text, late, last)

    @property
    def _is_full(self) -> bool:
        """With one edit more the oldest would be forgotten, and it may still be asked for again."""
        edits = [self._regions[0].end] if len(self._regions) == REGIONS else []
        edits += [self.shifts.steps[0].end] if len(self.shifts.steps) == SHIFTS else []
        delivered = self._delivered() if edits else None
        return bool(edits) and (delivered is None or any(before(each, delivered) < 0 for each in edits))

    def release(self) -> tuple[Piece, ...]:
        """What is held goes on, as nothing is read any more."""
        if not self._held or self._next is None:
            return ()
        return self._fresh(self._next, b"", 0, last=False).pieces

    def _too_early(self, sequence: int, text: bytes, last: bool) -> Outcome:
        """Something is missing, and will be sent again; unless it went another way, while nobody attended here."""
        assert self._next is not None
        delivered = self._delivered()
        if delivered is None or before(self._next, delivered) <= 0:
            return Outcome()
        self._next, self._held, self.jumped = delivered, b"", True
        return self.segment(sequence, text, last=last)

    def _again(self, sequence: int, text: bytes) -> Outcome:
        """All of it has been here."""
        if self._held and before(self._held_at, sequence) >= 0:
            return Outcome(acked=self._acked())
        return Outcome(self._repeat(sequence, text))

    def _fresh(self, sequence: int, text: bytes, late: int, last: bool) -> Outcome:
        start = (sequence + late) % ROUND
        early = self._repeat(sequence, text[:late]) if late else ()
        whole = self._held + text[late:]
        at = self._held_at if self._held else start
        self._next = (start + len(text) - late + last) % ROUND
        ready = len(whole) if last or self.jumped else self._ready(whole)
        if len(whole) - ready > self._longest:
            ready = len(whole)
        joined = min(len(self._held), ready)
        self._held, self._held_at = whole[ready:], (at + ready) % ROUND
        acked = self._acked()
        if not whole:
            return Outcome(self._repeat(sequence, b"") or (Piece(self.shifts.seen(sequence), b""),))
        if not ready:
            return Outcome(early, acked)
        message = whole[:ready]
        changed = message if self.jumped else self._edit(message)
        shifted = self._remember(at, message, changed, joined)
        return Outcome((*early, Piece(self.shifts.seen(at), changed)), acked, shifted)

    def _acked(self) -> int | None:
        """What its sender may be told: of what is held, once all before has been delivered."""
        delivered = self._delivered()
        if not self._held or delivered is None or before(self._held_at, delivered) < 0:
            return None
        self._told = self._next
        return self._told

    def _remember(self, at: int, message: bytes, changed: bytes, joined: int) -> bool:
        """What differs, as narrow as it can be. What was held goes out together with what completed it."""
        if message == changed and not joined:
            return False
        head = 0 if joined else _common(message, changed)
        tail = _common(message[head:][::-1], changed[head:][::-1])
        if joined:  # up to the end of what is the sender's no more, at least
            tail = min(tail, len(message) - joined)
        if head + tail == len(message):  # a mere insertion would not be met by a segment that begins there
            head, tail = (head, tail - 1) if tail else (head - 1, tail)
        end = (at + len(message) - tail) % ROUND
        self._keep(Region((at + head) % ROUND, end, changed[head : len(changed) - tail]))
        more = len(changed) - len(message)
        if more:
            self.shifts.add((at + head) % ROUND, end, more)
        return bool(more)

    def _keep(self, region: Region) -> None:
        self._regions = [*self._regions[-REGIONS + 1 :], region]

    def _repeat(self, sequence: int, text: bytes) -> tuple[Piece, ...]:
        """The same as before, for text that has been here; regions go out whole."""
        if self._held:  # that has not gone out yet, and is the sender's no more
            text = text[: max(0, before(sequence, self._held_at))]
        start, end = sequence, (sequence + len(text)) % ROUND
        met = [
            each
            for each in self._regions
            if (before(each.start, end) > 0 and before(start, each.end) > 0) or each.end == start == self._told
        ]
        if not text and not met:
            return ()
        done, at = b"", start
        begin = met[0].start if met and before(met[0].start, start) > 0 else start
        for region in met:
            if before(at, region.start) > 0:
                done += text[before(start, at) : before(start, region.start)]
            done += region.text
            at = region.end
        if before(at, end) > 0:
            done += text[before(start, at) :]
        return (Piece(self.shifts.seen(begin), done),)


def _common(one: bytes, other: bytes) -> int:
    """Bytes at the beginning that are the same."""
    length = min(len(one), len(other))
    for at in range(length):
        if one[at] != other[at]:
            return at
    return length
