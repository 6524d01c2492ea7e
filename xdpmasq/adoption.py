"""Going on with what an earlier agent has left: programs that fit its tables, or the reason why there are none."""

from __future__ import annotations

from xdpmasq import settings
from xdpmasq.config import Config
from xdpmasq.errors import DatapathError
from xdpmasq.programs import Programs
from xdpmasq.tables import Tables

_ANEW = "xdpmasq detach, then attach: running sessions start anew"


def programs_for(config: Config, adopted: Tables | None) -> Programs:
    """Programs over the maps of a running datapath, or over new ones.

    Raises:
        DatapathError: the configuration, or this version of xdpmasq, does not go with the tables that there are.
    """
    externals, wans, blocks = config.external.room(len(config.wans)), len(config.wans), bool(config.ports.block_size)
    if not adopted:
        return Programs(settings.further_sessions(config), None, externals, wans, blocks=blocks)
    if adopted.externals != externals:
        raise DatapathError(
            "the running datapath has another number of external addresses",
            f"it has {adopted.externals}, the configuration names {externals}",
            _ANEW,
        )
    programs = Programs(adopted.further, adopted.maps, externals, wans, blocks=blocks)
    if (manifest := adopted.manifest)["layouts"] != programs.layouts:
        raise DatapathError(
            "the running datapath is of another version",
            f"xdpmasq {manifest['version']} attached it, and lays out its tables otherwise",
            _ANEW,
        )
    if (size := manifest["config"]["ports"]["block_size"]) != config.ports.block_size:
        raise DatapathError(
            "the running datapath gives out ports otherwise",
            f"it has ports.block_size = {size}, the configuration {config.ports.block_size}",
            _ANEW,
        )
    return programs
