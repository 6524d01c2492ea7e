"""Who may change a namespace: one at a time, whichever way the turn is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from xdpmasq import presence
from xdpmasq.errors import BusyError


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(presence, "RUN", tmp_path)
    return tmp_path


def test_a_command_leaves_no_file(run: Path) -> None:
    with presence.changing(0):
        assert len(list(run.iterdir())) == 1
        with pytest.raises(BusyError), presence.changing(0):
            pass
    assert list(run.iterdir()) == []


def test_turns_keep_the_file(run: Path) -> None:
    turns = presence.Turns()
    for _ in range(2):
        with turns.changing(0), pytest.raises(BusyError), presence.changing(0):
            pass
        (kept,) = run.iterdir()
    with presence.changing(0):
        assert list(run.iterdir()) == [kept]
        with pytest.raises(BusyError), turns.changing(0):
            pass
    turns.close()


def test_a_file_that_a_command_has_removed_is_no_turn(run: Path) -> None:
    """It would be held by one, and another could make a new one."""
    turns = presence.Turns()
    with turns.changing(0):
        pass
    with presence.changing(0):
        pass
    assert list(run.iterdir()) == []
    with turns.changing(0), pytest.raises(BusyError), presence.changing(0):
        pass
    turns.close()


def test_the_file_goes_at_the_end(run: Path) -> None:
    turns = presence.Turns()
    with turns.changing(0):
        pass
    turns.close()
    assert list(run.iterdir()) == []
    with turns.changing(0):
        pass
    with presence.changing(0):
        turns.close()
        assert len(list(run.iterdir())) == 1, "somebody is at work, and removes it himself"
    assert list(run.iterdir()) == []


def test_a_turn_ends_with_an_error(run: Path) -> None:
    turns = presence.Turns()
    with pytest.raises(ZeroDivisionError), turns.changing(0):
        raise ZeroDivisionError
    with presence.changing(0):
        pass
    turns.close()
