"""Starting an agent in the background, and ending it with everything it attached: from other processes."""

from __future__ import annotations

import contextlib
import json
import logging.handlers
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from xdpmasq import agent, attachment, checks, datapath, presence
from xdpmasq import config as configuration
from xdpmasq.config import Config
from xdpmasq.errors import DatapathError, MasqError, from_dict

START_S = 60  # what a start may take on a slow machine


def start_background(config: Config) -> dict[str, Any]:
    """Starts the agent in the background and waits until it is healthy; returns its manifest.

    Raises:
        MasqError: whatever kept the agent from starting.
    """
    checks.check_host()
    command = [sys.executable, "-m", "xdpmasq.control"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdin.write(json.dumps(configuration.as_fields(config)))
        child.stdin.close()
        if not select.select([child.stdout], [], [], START_S)[0]:
            child.kill()
            raise DatapathError("the agent did not start", f"nothing for {START_S} s", "xdpmasq run … shows more")
        answer = child.stdout.readline()
        if not answer:
            raise DatapathError(
                "the agent ended while starting", f"exit code {child.wait()}", "xdpmasq run … shows more"
            )
        report = json.loads(answer)
        if "error" in report:
            child.wait()
            raise from_dict(report["error"])
        child.returncode = 0  # it lives on: nothing to wait for
    return datapath.find(config.wan).manifest


def _log_to_syslog() -> None:
    """What the agent has to say goes to the system's log, where there is one."""
    with contextlib.suppress(OSError):
        handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("xdpmasq[%(process)d]: %(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.INFO)


def _background() -> None:
    """The other end of :func:`start_background`."""
    _log_to_syslog()
    answer = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)

    def say(report: dict[str, Any]) -> None:
        if answer.closed:  # it was healthy at first, and nobody listens any more
            return
        with contextlib.suppress(BrokenPipeError):
            answer.write(json.dumps(report) + "\n")
            answer.close()

    try:
        agent.run(configuration.from_fields(json.load(sys.stdin)), ready=lambda: say({"ok": True}))
    except MasqError as error:
        say({"error": error.as_dict()})
        sys.exit(error.exit_code)
    except Exception as error:  # said before it is raised: nobody reads this process's stderr
        say({"error": DatapathError("the agent failed", repr(error), "xdpmasq run … shows more").as_dict()})
        raise


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


if __name__ == "__main__":
    _background()
