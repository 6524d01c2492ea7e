"""Ending an agent with everything it attached, from another process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from typing import Any

from xdpmasq import attachment, checks, datapath, presence
from xdpmasq.errors import NotAttachedError


def detach(wan: str | None = None) -> dict[str, Any]:
    """Ends the agent and removes every trace of the datapath.

    Returns:
        ``{"interfaces": [names], "sessions": number ended, "sysctls": {name: value put back}}``

    Raises:
        NotAttachedError: nothing is attached.
    """
    checks.check_host()
    if (waiting := _agent_without_interfaces(wan)) is not None:
        _end_agent(waiting)
        return {"interfaces": [], "sessions": 0, "sysctls": {}}
    wan = datapath.find(wan).manifest["wan"]
    _end_agent(wan)
    with presence.changing():
        attached = datapath.find(wan)  # as the agent left it; another detach may have been first
        sessions, manifest = len(attached.live_slots()), attached.manifest
        interfaces, sysctls = attachment.take_down(manifest)
    presence.sweep()
    return {"interfaces": interfaces, "sessions": sessions, "sysctls": sysctls}


def served_by(agent: int) -> str:
    """A WAN of the xdpmasq that a process looks after.

    Raises:
        NotAttachedError: it is no agent of this network namespace.
    """
    for wan in presence.agents():
        if presence.agent_pid(wan) == agent:
            return wan
    raise NotAttachedError(f"process {agent} is no agent of xdpmasq", "or of another network namespace")


def running() -> list[str]:
    """A WAN of each xdpmasq of this network namespace, by which :func:`detach` knows it."""
    found = datapath.find_all()
    attached = {name for each in found for name in each.wan_names}
    waiting = {presence.agent_pid(each): each for each in presence.agents() if each not in attached}
    return [*(each.manifest["wan"] for each in found), *waiting.values()]


def _agent_without_interfaces(wan: str | None) -> str | None:
    """The WAN of an agent that waits for its interfaces to come back, and so has no programs to be found by."""
    attached = {name for each in datapath.find_all() for name in each.wan_names}
    waiting = [each for each in presence.agents() if each not in attached and wan in (None, each)]
    agents = {presence.agent_pid(each) for each in waiting}  # one has several WANs
    return waiting[0] if len(agents) == 1 and (wan or not attached) else None


def _end_agent(wan: str, patience_s: float = 10) -> None:
    """Until its process is gone, and all that it held with it."""
    pid = presence.agent_pid(wan)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError), open(os.pidfd_open(pid), "rb", buffering=0) as agent:
        asked = signal.SIGTERM
        while True:
            signal.pidfd_send_signal(agent.fileno(), asked)
            if select.select([agent], [], [], patience_s)[0]:
                return
            asked = signal.SIGKILL
