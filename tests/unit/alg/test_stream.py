"""Streams: what the other side puts together from whatever segments a sender makes of its text."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdpmasq.alg.stream import ROUND, SHIFTS, Outcome, Piece, Shifts, Step, Stream, before

LINE = re.compile(rb"PORT (\w+)\n")
LONGEST = 64


def edit(text: bytes) -> bytes:
    """Longer, shorter, or as long, by what a line says."""
    return LINE.sub(lambda line: b"PORT " + line[1][::-1] * (len(line[1]) % 3) + b"\n", text)


def ready(text: bytes) -> int:
    """All but the beginning of a line that might be edited."""
    whole = text.rfind(b"\n") + 1
    rest = text[whole:]
    return whole if b"PORT ".startswith(rest[:5]) else len(text)


def stream(at: int = 0) -> Stream:
    """Whose other side has everything that went out."""
    made = Stream(ready, edit, LONGEST, lambda: made._held_at)
    made.begin((at - 1) % ROUND)
    return made


@dataclass
class Receiver:
    """TCP's other side: takes segments in any order, keeps the first version of each byte, acknowledges."""

    at: int
    text: bytearray = field(default_factory=bytearray)
    waiting: list[Piece] = field(default_factory=list)

    @property
    def next(self) -> int:
        return (self.at + len(self.text)) % ROUND

    def take(self, piece: Piece) -> None:
        self.waiting.append(piece)
        for each in sorted(self.waiting, key=lambda one: before(self.at, one.sequence)):
            have = before(each.sequence, self.next)
            if 0 <= have <= len(each.text):
                self.text += each.text[have:]
                self.waiting.remove(each)


def cut(piece: Piece, chance: random.Random) -> list[Piece]:
    """As packets do that have no room for all of it."""
    places = sorted({0, *(chance.randrange(len(piece.text) + 1) for _ in range(chance.choice([0, 0, 1, 3])))})
    ends = [*places[1:], len(piece.text)]
    return [Piece((piece.sequence + at) % ROUND, piece.text[at:to]) for at, to in zip(places, ends, strict=True)]


@pytest.mark.req("attacks-alg_fuzz")
@given(
    st.lists(
        st.sampled_from([b"USER me\n", b"PORT ab\n", b"PORT abc\n", b"PORT abcd\n", b"P\n", b"x\r\n"]), min_size=1
    ),
    st.integers(0, 2**32),
    st.sampled_from([0, 1000, ROUND - 20]),
    st.sampled_from([1.0, 0.5, 0.05]),
)
@settings(max_examples=600, deadline=None)
def test_whatever_the_segments(lines: list[bytes], seed: int, first: int, often: float) -> None:
    """Segments of any size are lost and repeated, with other boundaries, before us and behind; answers, too."""
    chance, text, far = random.Random(seed), b"".join(lines), Receiver(first)
    said = first  # by the other side, as far as it has come to us
    made = Stream(ready, edit, LONGEST, lambda: made.shifts.acked(said))
    made.begin((first - 1) % ROUND)
    acked = sent = 0
    for _ in range(4000):
        if acked == len(text):
            break
        if chance.random() < often:
            said = far.next
        start = chance.choice([acked, acked, sent])
        end = min(len(text), start + chance.randint(1, 12))
        sent = max(sent, end)
        if chance.random() < 0.2 or start == end:
            continue
        outcome = made.segment((first + start) % ROUND, text[start:end])
        for piece in outcome.pieces:
            for part in cut(piece, chance):
                if chance.random() < 0.8:
                    far.take(part)
        known = before(first, made.shifts.acked(said))
        assert known <= sent, "an acknowledgement of what was never sent"
        told = before(first, outcome.acked) if outcome.acked is not None else 0
        acked = max(acked, known, told)
        sent = max(sent, acked)
    assert acked == len(text)
    assert bytes(far.text) == edit(text[: text.rfind(b"\n") + 1])


def test_nothing_is_said_of_what_is_held_while_something_before_it_is_on_its_way() -> None:
    """An acknowledgement is of everything before, too."""
    delivered = 0
    made = Stream(ready, edit, LONGEST, lambda: delivered)
    made.begin(ROUND - 1)
    assert made.segment(0, b"USER me\nPORT a") == Outcome((Piece(0, b"USER me\n"),))
    delivered = 8
    assert made.segment(8, b"PORT a") == Outcome(acked=14), "sent again, after a while"


@pytest.mark.parametrize("at", range(1, 12))
def test_split_anywhere(at: int) -> None:
    made, text = stream(), b"PORT abcd\nQUIT\n"
    one, two = made.segment(0, text[:at]), made.segment(at, text[at:])
    assert b"".join(piece.text for each in (one, two) for piece in each.pieces) == b"PORT dcba\nQUIT\n"
    if at < 10:
        assert (one.pieces, one.acked) == ((), at), "its sender may wait for that before it says more"


def test_what_is_never_completed_goes_out_at_the_end() -> None:
    made = stream()
    assert made.segment(0, b"PORT ab") == Outcome(acked=7)
    assert made.segment(7, b"", last=True) == Outcome((Piece(0, b"PORT ab"),))
    assert made.segment(7, b"", last=True).pieces == (Piece(0, b"PORT ab"),), "its sender has only the FIN left"


def test_what_is_too_long_is_not_held() -> None:
    made = stream()
    assert made.segment(0, b"PORT " + bytes(LONGEST)).pieces[0].text == b"PORT " + bytes(LONGEST)
    assert made.holds == 0


def test_a_segment_that_comes_too_early_waits_for_its_sender() -> None:
    made = stream()
    assert made.segment(8, b"PORT abcd\n") == Outcome()
    assert made.segment(0, b"USER me\n").pieces == (Piece(0, b"USER me\n"),)
    assert made.segment(8, b"PORT abcd\n").pieces == (Piece(8, b"PORT dcba\n"),)


def test_what_has_gone_another_way_is_not_waited_for() -> None:
    """While no agent attended, segments have passed unread. What comes then is not read either: somebody may have
    seen to it that it looks like the beginning of a message.
    """
    delivered = 0
    made = Stream(ready, edit, LONGEST, lambda: delivered)
    made.begin(ROUND - 1)
    assert made.segment(0, b"PORT a").acked == 6
    assert made.segment(100, b"PORT abcd\n") == Outcome()
    delivered = 90
    assert made.segment(100, b"PORT abcd\n") == Outcome()
    delivered = 100
    assert made.segment(100, b"PORT abcd\n").pieces == (Piece(100, b"PORT abcd\n"),)
    assert made.jumped


def test_a_new_connection_begins_anew() -> None:
    made = stream()
    made.segment(0, b"PORT abc\n")
    assert made.shifts.now
    made.begin(999)
    assert made.segment(1000, b"x\n").pieces == (Piece(1000, b"x\n"),)


def test_after_a_restart_of_the_agent() -> None:
    """Of the earlier one's edits only the shifts are known; the same edit once more is the same."""
    first = stream()
    shifts = first.segment(0, b"PORT abc\n") and first.shifts
    made = Stream(ready, edit, LONGEST, lambda: 0, Shifts(shifts.base, list(shifts.steps)))
    assert made.segment(0, b"PORT abc\n").pieces == (Piece(0, b"PORT \n"),)
    assert made.shifts == shifts
    assert made.segment(9, b"x\n").pieces == (Piece(shifts.seen(9), b"x\n"),)


def test_more_shifts_than_are_kept() -> None:
    shifts = Shifts()
    for nth in range(SHIFTS + 3):
        shifts.add(100 * nth - 10, 100 * nth, 1)
    assert (shifts.base, len(shifts.steps), shifts.now) == (3, SHIFTS, SHIFTS + 3)
    assert [shifts.seen(at) - at for at in (0, 299, 300, 5000)] == [3, 3, 4, 11]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(0, 20)), max_size=SHIFTS),
    st.sampled_from([0, ROUND - 60]),
)
def test_of_what_was_edited_all_has_arrived_or_nothing(edits: list[tuple[int, int, int]], first: int) -> None:
    """Whatever the other side acknowledges: plain text, so many bytes edited, into so many, plain text, …"""
    shifts, begins, ends = Shifts(), {}, {}  # to what each number of the other side's has to be translated
    sent = seen = first
    for plain, before_, after in [*edits, (50, 0, 0)]:
        for nth in range(plain + 1):
            begins[seen + nth] = ends[seen + nth] = sent + nth
        sent, seen = sent + plain, seen + plain
        if before_ == after:
            continue  # nothing to be said of it
        for nth in range(1, after):
            begins[seen + nth], ends[seen + nth] = sent + before_, sent
        shifts.add(sent % ROUND, (sent + before_) % ROUND, after - before_)
        sent, seen = sent + before_, seen + after
        begins[seen] = ends[seen] = sent
    assert [each for each, to in ends.items() if shifts.acked(each % ROUND) != to % ROUND] == []
    assert [each for each, to in begins.items() if shifts.acked(each % ROUND, begins=True) != to % ROUND] == []


def test_more_edits_on_their_way_than_are_remembered() -> None:
    """The next one waits, as the oldest could not be repeated."""
    said = 0
    made = Stream(ready, edit, LONGEST, lambda: made.shifts.acked(said))
    made.begin(ROUND - 1)
    line, edited = b"PORT ab\n", b"PORT baba\n"
    for nth in range(SHIFTS):
        assert made.segment(8 * nth, line).pieces == (Piece(10 * nth, edited),)
    assert made.segment(8 * SHIFTS, line) == Outcome()
    assert made.segment(0, line).pieces == (Piece(0, edited),), "again"
    said = 8
    assert made.segment(8 * SHIFTS, line) == Outcome(), "not all of the first one has arrived"
    said = 9
    assert made.segment(8 * SHIFTS, line).pieces == (Piece(10 * SHIFTS, edited),)


def test_far_behind_an_edit_numbers_stay_shifted() -> None:
    """2 GiB further on it would seem to lie ahead, if it were still remembered."""
    made = stream(1000)
    delivered = 1000
    made._delivered = lambda: delivered
    made.segment(1000, b"PORT ab\n")
    ((_, end, more),) = made.shifts.steps
    assert not made.fold(), "it may be asked for again"
    delivered = end
    assert made.fold()
    assert (made.shifts.steps, made.settled) == ([], True)
    far = (end + 2**31 + 100) % ROUND
    assert made.shifts.seen(far) == far + more
    assert made.shifts.acked(far + more) == far
    assert made.segment(1000, b"PORT ab\n").pieces == (Piece(1000 + more, b"PORT ab\n"),), "all of it is behind"


def test_shifts_of_an_earlier_agent_are_settled_when_they_have_arrived() -> None:
    delivered = 1099
    made = Stream(ready, edit, LONGEST, lambda: delivered, Shifts(0, [Step(1090, 1100, 5)]))
    assert not made.settled
    delivered = 1100
    assert made.settled
