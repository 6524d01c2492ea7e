"""The agent's part of forwards: what becomes of their ports when rules, addresses and mappings come and go."""

from __future__ import annotations

from typing import Any

import numpy as np

from xdpmasq import bpf, forwarding
from xdpmasq.abi import LIFE_STATIC, REAP_YIELD, Slots
from xdpmasq.expiry import age
from xdpmasq.forwardrecords import FLAG_TRIGGERED
from xdpmasq.tables import Tables

PUBLISH_AT_ONCE = 256
FORGET_S = 3600


class Upkeep:
    """What an agent does for forwarded ports, whoever put them there.

    Ports of former rules are looked after until their last session is gone and they have rested: they may lie outside
    the pool, where nobody else looks.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._seen: tuple[bytes, list[int]] = b"", []
        self._kept, self._former = forwarding.NONE, forwarding.NONE
        self.has_default = False
        self._endpoints: list[tuple[int, tuple[Any, ...]]] = []
        self._withdrawn: list[tuple[int, tuple[Any, ...]]] = []
        self._next = 0

    def adopt(self, reaper: bpf.Program) -> None:
        """Gives up what a command left that was killed between a rule's end and its ports'."""
        slots = self._tables.used_slots()
        static = slots[self._tables.sessions["life"][slots] & LIFE_STATIC != 0]
        held = [keys["mapping"] for keys, _ in self._tables.maps["pinholes"].items()]
        kept = np.concatenate([forwarding.forwarded_slots(self._tables), *held])
        self._tables.reap(reaper, np.setdiff1d(static, kept), REAP_YIELD)

    def slots(self) -> Slots:
        """What expiry has to look at."""
        return np.union1d(self._kept, self._former)

    def readdress(self) -> None:
        """The external address may have changed."""
        self._follow()
        forwarding.readdress(self._tables, self._kept)

    def run(self) -> None:
        """A tick."""
        had_default = self.has_default
        self.readdress()
        if had_default or self.has_default:  # its remotes choose the ports
            self._former = np.union1d(self._former, np.setdiff1d(self._used(), self._kept))
        self._former = self._former[self._tables.rows(self._former)["life"] != 0]
        self._withdrawn = [each for each in self._withdrawn if not forwarding.withdraw(self._tables, *each)]
        self._republish()
        self._close_triggered()

    def _used(self) -> Slots:
        """Ports that are mapped or at rest."""
        return np.flatnonzero(self._tables.sessions["life"][: self._tables.further_base]).astype(np.uint32)

    def _follow(self) -> None:
        records, wans = self._tables.rules.copy(), forwarding.wans_of(self._tables)
        records["opened"] = records["expires"] = 0
        records["target"]["addr"]["word"][records["flags"] & FLAG_TRIGGERED != 0] = 0
        seen = records.tobytes(), wans
        if seen == self._seen:
            return
        self._seen = seen
        rules = [each.rule for each in forwarding.at(self._tables, np.flatnonzero(records["targets"]))]
        self.has_default = any(rule.is_default for rule in rules)
        before, self._kept = self._kept, forwarding.slots_of_all(rules, self._tables.externals)
        self._former = np.setdiff1d(np.union1d(self._former, before), self._kept)
        endpoints = [each for rule in rules for each in forwarding.endpoints_of(rule, wans)]
        present = {slot: endpoint for slot, endpoint in endpoints}
        former = self._withdrawn + self._endpoints
        self._withdrawn = [each for each in former if present.get(each[0]) != each[1]]
        self._endpoints = endpoints

    def _close_triggered(self) -> None:
        """Whose time was over long ago is forgotten: when jiffies wrap round, the ports would seem open again."""
        rules, hz = self._tables.rules, int(self._tables.settings["hz"])
        over = (rules["flags"] & FLAG_TRIGGERED != 0) & (age(bpf.jiffies(), rules["expires"]) > FORGET_S * hz)
        rules["target"]["addr"]["word"][over] = 0

    def _republish(self) -> None:
        """An endpoint that had a mapping when its forward came gets its port once that has ended; a few each time."""
        some = self._endpoints[self._next : self._next + PUBLISH_AT_ONCE]
        self._next = self._next + len(some) if len(some) == PUBLISH_AT_ONCE else 0
        static = self._tables.rows(np.array([slot for slot, _ in some], np.uint32))["life"] & LIFE_STATIC
        for (slot, endpoint), is_static in zip(some, static, strict=True):
            if is_static:
                forwarding.publish(self._tables, slot, endpoint)
