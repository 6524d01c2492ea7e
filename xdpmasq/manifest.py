"""What an agent leaves for later processes: JSON in a map that lives as long as the programs do."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

from xdpmasq import __version__, bpf, source
from xdpmasq import config as configuration
from xdpmasq.config import Config
from xdpmasq.programs import Programs
from xdpmasq.tables import Tables


class Manifest(dict[str, Any]):
    """The agent's own copy, which it alone changes and saves.

    Args:
        fields: to begin with.
    """

    def __init__(self, tables: Tables, fields: Mapping[str, Any]) -> None:
        super().__init__(fields)
        self._tables = tables

    @classmethod
    def of(cls, config: Config, tables: Tables, programs: Programs, before: Mapping[str, Any] | None) -> Self:
        """That of an agent which begins.

        Args:
            before: the one that an earlier agent of the same datapath left.
        """
        made = cls(tables, before or _new(config, programs))
        made.update(
            reaper=programs["masq_reap"].id,
            agent_pid=os.getpid(),
            version=__version__,
            restarts=made.get("restarts", -1) + 1,
            lans=list(config.lans),
            mode=config.mode,
            config=_kept(config),
        )
        return made

    def save(self) -> None:
        """Makes it outlive this process."""
        self._tables.manifest = self


def _new(config: Config, programs: Programs) -> dict[str, Any]:
    return {
        "wan": config.wan,
        "wans": list(config.wans),
        "interfaces": [],
        "external": None,
        "externals": [],
        "hz": bpf.tick_rate(),
        "attached_at": time.time(),
        "attached_boot_s": time.clock_gettime(time.CLOCK_BOOTTIME),  # whatever becomes of the clock
        "counters": list(source.counters()),
        "layouts": programs.layouts,
        "qdiscs": [],
        "local_routes": [],
        "sysctls": {},
        "side_effects": {},
    }


def _kept(config: Config) -> dict[str, Any]:
    """The configuration for later processes. Of rules they read the tables: there could be a thousand."""
    return configuration.as_fields(replace(config, forwards=(), redirects=(), triggers=()))
