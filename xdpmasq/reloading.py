"""Changing the configuration of a running datapath: what can be, and asking its agent for it."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

from xdpmasq import configfile
from xdpmasq.config import Config, from_fields
from xdpmasq.errors import ConfigError, DatapathError, NotAttachedError, UsageError, from_dict

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached

PATIENCE_S = 60
_ANEW = "xdpmasq detach, then attach: running sessions start anew"


def reread(running: Config) -> Config:
    """The configuration file of a running agent as it is now.

    Raises:
        MasqError: it is wrong, or asks for what can only be had anew.
    """
    if running.origin is None:
        what = "there is no configuration file to read again"
        raise UsageError(what, "xdpmasq was attached with options only", "name one: xdpmasq attach --config FILE")
    wanted = configfile.from_origin(running.origin)
    if wanted.wans != running.wans:
        raise ConfigError("the WANs are others", f"{_listed(running.wans)} became {_listed(wanted.wans)}", _ANEW)
    rooms = [each.external.room(len(each.wans)) for each in (running, wanted)]
    if rooms[0] != rooms[1]:
        raise ConfigError("the tables have no room for these external addresses", "there is room for one", _ANEW)
    if wanted.further_sessions not in (None, running.further_sessions):
        raise ConfigError("the tables have another size than sessions.further", "", _ANEW)
    if wanted.ports.block_size != running.ports.block_size:
        raise ConfigError("ports are given out otherwise", "ports.block_size is another for running sessions", _ANEW)
    return wanted


def ask(attached: Attached) -> None:
    """Has the agent of a datapath read its file again, and waits until it goes by that.

    Raises:
        MasqError: what is wrong with the file, or kept it from being gone by; the old one is in force.
    """
    manifest = attached.manifest
    if not attached.agent_pid:
        raise NotAttachedError(
            "the agent is not running", "it alone can change settings", "start it: xdpmasq attach …"
        )
    reread(from_fields(manifest["config"]))
    before = manifest.get("reload", {}).get("count", 0)
    os.kill(attached.agent_pid, signal.SIGHUP)
    deadline = time.monotonic() + PATIENCE_S
    while (now := attached.manifest.get("reload", {})).get("count", 0) == before:
        if time.monotonic() > deadline:
            raise DatapathError("the agent has not read its file again", f"nothing for {PATIENCE_S} s", "see its log")
        time.sleep(0.02)
    if now["error"]:
        raise from_dict(now["error"])


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
