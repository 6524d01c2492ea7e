"""Ending many sessions in turns, between which the log reads what the kernel says of them."""

from __future__ import annotations

import contextlib

from xdpmasq import bpf
from xdpmasq.abi import Slots
from xdpmasq.recorder import TURN, Recorder
from xdpmasq.tables import Tables


class Reaping:
    """Changes slots by an order of ``enum reap_order``, as many as there are."""

    def __init__(self, tables: Tables, reaper: bpf.Program, recorder: Recorder | None) -> None:
        self._tables, self._reaper, self._recorder = tables, reaper, recorder

    def __call__(self, slots: Slots, order: int) -> None:
        with self._recorder.aside() if self._recorder else contextlib.nullcontext():
            for start in range(0, len(slots), TURN):
                self._tables.reap(self._reaper, slots[start : start + TURN], order)
                if self._recorder:
                    self._recorder.listen()
