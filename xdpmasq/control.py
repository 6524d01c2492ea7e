"""Ending an agent with everything it attached, from another process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any

from xdpmasq import attachment, checks, datapath, presence


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


def _agent_without_interfaces(wan: str | None) -> str | None:
    """The WAN of an agent that waits for its interfaces to come back, and so has no programs to be found by."""
    attached = {name for each in datapath.find_all() for name in each.wan_names}
    waiting = [each for each in presence.agents() if each not in attached and wan in (None, each)]
    agents = {presence.agent_pid(each) for each in waiting}  # one has several WANs
    return waiting[0] if len(agents) == 1 and (wan or not attached) else None


def _end_agent(wan: str, patience_s: float = 10) -> None:
    deadline = time.monotonic() + patience_s
    asked = signal.SIGTERM
    while (pid := presence.agent_pid(wan)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, asked)
        if time.monotonic() > deadline:
            asked = signal.SIGKILL
        time.sleep(0.05)
