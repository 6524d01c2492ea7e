"""The programs of a datapath: compiled for its kind, and loaded onto its maps, new ones or those of before."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from xdpmasq import bpf, compiler, hooks, source
from xdpmasq.abi import BLOCKS, EXTERNAL_ROOM, EXTERNAL_SLOTS
from xdpmasq.errors import DatapathError
from xdpmasq.tables import Tables

TENANTS = 16384  # internal hosts that may have port blocks at once


def _defines(externals: int, wans: int, blocks: bool) -> dict[str, int]:
    """What the programs are compiled for. Of external addresses one is a case of its own, any more are another."""
    return {"EXTERNALS": 1 if externals == 1 else EXTERNAL_ROOM, "WANS": wans, "PORT_BLOCKS": int(blocks)}


def _sizes(further: int, externals: int, blocks: bool) -> dict[str, int]:
    """Entries of the tables whose size is a setting."""
    mappings = externals * EXTERNAL_SLOTS
    slots = mappings + further
    return {
        "sessions": slots,
        "claims": slots // 64,
        "mappings": mappings,
        "blocks": externals * BLOCKS if blocks else 1,
        "tenants": TENANTS if blocks else 1,
        "fronts": 8192 * externals,  # half full with all ports of one protocol
        "buckets": slots // 4,  # half full when every slot has two entries
        "overflow": slots // 64,  # one entry in a hundred then finds its bucket full
    }


def compile_ahead(externals: int = 1, wans: int = 1, *, blocks: bool = False, ethernet: bool = True) -> None:
    """Has the compiler's work for :class:`Programs`, of the most usual kind, done, and kept, before it is wanted."""
    text, defines = source.flatten(), _defines(externals, wans, blocks)
    compiler.compile(text, defines, _groups(text, ethernet=ethernet))
    compiler.compile(source.flatten(source.RESTORE), defines)


def _groups(text: str, *, ethernet: bool) -> list[list[str]]:
    """The functions for interfaces with Ethernet header, and all others, or those for interfaces without.

    In three parts that take about as long.
    """
    found = [each for each in compiler.functions_of(text) if each.endswith(hooks.WITHOUT_ETHERNET) != ethernet]
    return [[each] for each in found if "_wan_" in each] + [[each for each in found if "_wan_" not in each]]


def restorer(tables: Tables) -> bpf.Program:
    """The program that puts one saved session in place among those of a running datapath.

    Raises:
        DatapathError: that is of another version.
    """
    defines = _defines(tables.externals, tables.wans, bool(tables.settings["block_bits"]))
    compiled = bpf.compile(source.flatten(source.RESTORE), defines, tables.maps)
    if tables.manifest["layouts"] != compiled.layouts:
        what = "the running datapath is of another version"
        raise DatapathError(what, "its tables are laid out otherwise", "restart the agent, or attach anew, first")
    return compiled.load("masq_restore", "tc")


class Programs:
    """The compiled datapath: its functions are loaded when first asked for.

    Args:
        further: how many slots for further sessions.
        maps: existing maps to use.
        externals: how many external addresses.
        wans: how many WANs.
        blocks: ports are given out in blocks.
        sizes: entries of tables, by name, where they are not to be as usual.

    Attributes:
        tables: over the maps; for all in this process, as each further object would have the large ones mapped anew.
    """

    def __init__(
        self,
        further: int,
        maps: Mapping[str, bpf.Map] | None = None,
        externals: int = 1,
        wans: int = 1,
        *,
        blocks: bool = False,
        sizes: Mapping[str, int] | None = None,
    ) -> None:
        self._kind = (externals, wans, blocks)
        self._sizes = _sizes(further, externals, blocks) | dict(sizes or {})
        self.maps = dict(maps or {})
        self._object = self._compile(ethernet=True)
        self.maps |= self._object.maps
        self._loaded: dict[str, bpf.Program] = {}
        self.tables = Tables(self.maps)
        if maps is None:
            self.tables.set_settings(
                seed=[secrets.randbits(64) for _ in self.tables.settings["seed"]],
                externals=externals,
                further_base=externals * EXTERNAL_SLOTS,
                further=further,
                buckets=self._sizes["buckets"],
                fronts=self._sizes["fronts"],
            )

    def _compile(self, *, ethernet: bool) -> bpf.Object:
        text = source.flatten()
        return bpf.compile(text, _defines(*self._kind), self.maps, self._sizes, _groups(text, ethernet=ethernet))

    @cached_property
    def _without_ethernet(self) -> bpf.Object:
        """The functions for interfaces without Ethernet header; compiling takes its time, and few have such a one."""
        return self._compile(ethernet=False)

    @contextlib.contextmanager
    def being_last(self) -> Iterator[None]:
        """Inside the block a packet let through by one of the TC programs meets no other on that hook."""
        self.tables.set_settings(last=True)
        try:
            yield
        finally:
            self.tables.set_settings(last=False)

    @property
    def layouts(self) -> dict[str, list[Any]]:
        """Map name → [key, value] as JSON can carry them; see :func:`xdpmasq.compiler.layout`."""
        return self._object.layouts

    @property
    def loaded(self) -> dict[str, bpf.Program]:
        """Those that were asked for so far, by function."""
        return dict(self._loaded)

    def load(self, functions: Iterable[str]) -> None:
        """Loads several at once, each on a CPU of its own: the kernel takes up to a second to verify one."""
        wanted = list(functions)
        for function in wanted:
            self._compiled(function)  # before there are threads: the compiler does not survive a fork among them
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.__getitem__, wanted))

    def _compiled(self, function: str) -> bpf.Object:
        return self._without_ethernet if function.endswith(hooks.WITHOUT_ETHERNET) else self._object

    def __getitem__(self, function: str) -> bpf.Program:
        """The loaded program, holding every map of the datapath."""
        if function not in self._loaded:
            kind = "xdp" if function.endswith("_xdp") else "tc"
            program = self._compiled(function).load(function, kind)
            for map_ in self.maps.values():
                program.bind(map_)
            self._loaded[function] = program
        return self._loaded[function]
