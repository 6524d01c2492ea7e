"""Holding later fragments: bounds, order, journeys, times. The clock is a number."""

import itertools
import random

import pytest

from xdpmasq import orphans
from xdpmasq.orphans import Key, Orphans, Part

PATIENCE_S = 30.0


def key(source: int = 1, number: int = 1) -> Key:
    return Key(source.to_bytes(4, "big"), b"\xc6\x33\x64\x0a", number.to_bytes(2, "big"), 17)


def later(offset: int) -> Part:
    return Part(offset, 8, more=True)


def held_of(source: int, waiting: Orphans, now: float) -> list[bytes]:
    """Everything of a source's first thousand datagrams, released."""
    there = [each for each in (key(source, n) for n in range(1000)) if each in waiting._all.datagrams]
    return [frame for each in there for frame in waiting.release(each, now)]


def test_released_whole_and_in_the_order_in_which_they_came() -> None:
    waiting = Orphans(PATIENCE_S)
    frames = [bytes([n]) * 60 for n in range(20)]
    random.Random(5).shuffle(frames)
    for n, frame in enumerate(frames):
        assert waiting.hold(key(), later(8 * (n + 1)), frame, 0)
        assert waiting.hold(key(number=2), later(8 * (n + 1)), b"another", 0)
    assert waiting.due(0) == [key(), key(number=2)]
    assert waiting.release(key(), 0) == frames
    assert len(waiting) == 20
    assert waiting.release(key(number=2), 0) == [b"another"] * 20
    assert waiting.pause(0) is None
    assert waiting.counts == {"held": 40, "released": 40, "expired": 0, "refused": 0}


def test_asked_about_at_growing_intervals_until_patience_ends() -> None:
    """As often as that anybody waits twice as long at most, and rarely enough that ten thousand cost little."""
    waiting = Orphans(PATIENCE_S)
    waiting.hold(key(), later(8), b"frame", 100.0)
    now, asked = 100.0, []
    while waiting.pause(now) is not None:
        if waiting.due(now):
            asked.append(now - 100)
        now += waiting.pause(now) or 0
    assert asked[:4] == pytest.approx([0, 0.005, 0.010, 0.020], abs=1e-3)
    gaps = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert max(gaps) <= orphans.POLL_MAX_S + 1e-6
    assert len(asked) < 45
    assert PATIENCE_S - 2 * orphans.POLL_S < now - 100 <= PATIENCE_S
    assert waiting.counts == {"held": 1, "released": 0, "expired": 1, "refused": 0}


@pytest.mark.parametrize(
    ("parts", "whole"),
    [
        pytest.param([(0, 8, True), (8, 8, True), (16, 5, False)], True, id="in order"),
        pytest.param([(16, 5, False), (8, 8, True), (0, 8, True)], True, id="turned"),
        pytest.param([(0, 8, True), (8, 8, True), (8, 8, True), (16, 5, False)], True, id="one repeated"),
        pytest.param([(8, 8, True), (16, 5, False)], False, id="without its first"),
        pytest.param([(0, 8, True), (8, 8, True)], False, id="without its last"),
        pytest.param([(0, 8, True), (16, 5, False)], False, id="with a gap"),
        pytest.param([(0, 8, True), (16, 5, False), (16, 5, False), (0, 8, True)], False, id="repeated, with a gap"),
    ],
)
def test_whole_when_all_parts_are_here(parts: list[tuple[int, int, bool]], whole: bool) -> None:
    """Not before the last of them has come; and with its first here, the kernel is not asked for one."""
    waiting = Orphans(PATIENCE_S)
    for nth, part in enumerate(parts):
        assert not waiting.is_whole(key())
        waiting.hold(key(), Part(*part), b"frame %d" % nth, 0)
    assert waiting.is_whole(key()) == whole
    assert waiting.due(0) == ([] if any(offset == 0 for offset, _, _ in parts) else [key()])
    waiting.due(PATIENCE_S)
    assert waiting.counts["expired"] == len(parts)


def test_a_further_piece_does_not_prolong_the_wait() -> None:
    waiting = Orphans(PATIENCE_S)
    waiting.hold(key(), later(8), b"one", 0)
    waiting.hold(key(), later(16), b"two", PATIENCE_S - 1)
    assert waiting.due(PATIENCE_S) == []
    assert waiting.counts["expired"] == 2
    assert len(waiting) == 0


def test_asked_about_at_once_when_a_further_piece_comes() -> None:
    waiting = Orphans(PATIENCE_S)
    waiting.hold(key(), later(8), b"one", 0)
    for now in (0.0, 2.0, 4.0):
        waiting.due(now)
    assert waiting.due(4.1) == []
    waiting.hold(key(), later(16), b"two", 4.1)
    assert waiting.due(4.1) == [key()]


def test_a_source_at_its_limit_loses_its_own_oldest() -> None:
    waiting = Orphans(PATIENCE_S)
    pieces = orphans.SHARE[0]
    waiting.hold(key(source=2), later(8), b"somebody else's, and older than all", 0)
    for n in range(pieces + 10):
        assert waiting.hold(key(number=n), later(8), b"%d" % n, n * 1e-3)
    assert len(waiting) == pieces + 1
    assert held_of(2, waiting, 1) == [b"somebody else's, and older than all"]
    assert held_of(1, waiting, 1) == [b"%d" % n for n in range(10, pieces + 10)]
    assert waiting.counts["refused"] == 10


def test_a_source_has_a_limit_of_bytes() -> None:
    waiting = Orphans(PATIENCE_S)
    for n in range(100):
        waiting.hold(key(number=n), later(8), bytes(60_000), 0)
    assert len(waiting) == orphans.SHARE[1] // 60_000


@pytest.mark.parametrize("size", [60, 60_000], ids=["pieces", "bytes"])
def test_forged_sources_fill_the_room_and_no_more(size: int) -> None:
    """Ten thousand of one piece each; the oldest goes, so whoever comes now has his milliseconds."""
    waiting = Orphans(PATIENCE_S)
    for n in range(10_000):
        waiting.hold(key(source=n + 10), later(8), bytes(size), n * 1e-5)
    pieces, room = orphans.ROOM
    assert len(waiting) == min(pieces, room // size)
    waiting.hold(key(), later(8), b"mine", 1)
    for n in range(min(pieces, room // size) - 1):
        waiting.hold(key(source=n + 20_000), later(8), bytes(size), 1)
    assert waiting.release(key(), 1) == [b"mine"]
    # nothing is left of those that gave way
    assert len(waiting._sources) == len(waiting._all.datagrams) <= pieces


def test_a_datagram_that_loses_a_piece_goes_whole() -> None:
    waiting = Orphans(PATIENCE_S)
    for n in range(10):
        waiting.hold(key(number=1), later(8 * (n + 1)), b"old", 0)
    for n in range(orphans.SHARE[0] - 9):
        waiting.hold(key(number=2 + n), later(8), b"new", 1)
    assert waiting.counts["refused"] == 10
    assert held_of(1, waiting, 1) == [b"new"] * (orphans.SHARE[0] - 9)


def test_no_piece_makes_more_than_two_journeys() -> None:
    waiting = Orphans(PATIENCE_S)
    for _ in range(2):
        assert waiting.hold(key(), later(8), b"frame", 0)
        assert waiting.release(key(), 0.001) == [b"frame"]
    assert not waiting.hold(key(), later(8), b"frame", 0.002)
    assert waiting.hold(key(), later(16), b"another piece", 0.002)
    assert waiting.counts == {"held": 3, "released": 2, "expired": 0, "refused": 1}


def test_journeys_are_counted_across_a_long_wait() -> None:
    waiting = Orphans(PATIENCE_S)
    waiting.hold(key(), later(8), b"frame", 0)
    waiting.release(key(), 0)
    waiting.hold(key(), later(8), b"frame", 0.01)
    waiting.release(key(), 20)
    assert not waiting.hold(key(), later(8), b"frame", 20.01)


def test_the_same_identification_is_welcome_later() -> None:
    """Sixteen bits come round soon on a busy host."""
    waiting = Orphans(PATIENCE_S)
    for now in (0.0, 0.1, 5.0):
        assert waiting.hold(key(), later(8), b"frame", now)
        waiting.release(key(), now)


def test_what_is_remembered_of_journeys_is_bounded() -> None:
    waiting = Orphans(PATIENCE_S)
    for n in range(3 * orphans.REMEMBERED):
        waiting.hold(key(source=n), later(8), b"frame", 0)
        waiting.release(key(source=n), 0)
    assert len(waiting._on_their_way) == orphans.REMEMBERED
    waiting.hold(key(), later(8), b"frame", 10)
    waiting.release(key(), 10)
    assert len(waiting._on_their_way) == 1


@pytest.mark.parametrize("seed", range(5))
def test_its_books_are_right_whatever_happens(seed: int) -> None:
    """Random calls; every piece ends in exactly one way, and what is counted is what is there."""
    chance, waiting, now, refused_at_once = random.Random(seed), Orphans(PATIENCE_S), 0.0, 0
    for _ in range(5000):
        now += chance.choice((0, 0, 1e-4, 0.01, 1))
        which = key(chance.randrange(6), chance.randrange(200))
        size = chance.choice((60, 1500, 60_000))
        refused_at_once += not waiting.hold(which, later(8 * chance.randrange(1, 4)), bytes(size), now)
        for each in waiting.due(now):
            if chance.random() < 0.05:
                assert waiting.release(each, now)
        counts, share = waiting.counts, waiting._all
        ended = counts["released"] + counts["expired"] + counts["refused"] - refused_at_once
        assert counts["held"] == ended + len(waiting)
        assert share._bytes == sum(each.size for each in share.datagrams.values()) <= orphans.ROOM[1]
        assert share._pieces == len(waiting) == sum(each._pieces for each in waiting._sources.values())
        assert all(now - each.since <= PATIENCE_S for each in share.datagrams.values())
    assert min(waiting.counts.values()) > 0
