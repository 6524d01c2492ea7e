"""Starting an agent in the background, from another process.

Whoever starts it needs nothing of what the agent imports, so only the agent's process pays for that.
"""

from __future__ import annotations

import contextlib
import json
import logging.handlers
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from xdpmasq import config as configuration
from xdpmasq import notify
from xdpmasq.config import Config
from xdpmasq.errors import DatapathError, MasqError, from_dict

START_S = 180  # a slow machine compiles for a minute, and verifies for another


def start(config: Config) -> dict[str, Any]:
    """Starts the agent in the background and waits until it is healthy; returns its manifest.

    Raises:
        MasqError: whatever kept the agent from starting.
    """
    with _launch() as child:
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
        report: dict[str, Any] = json.loads(answer)
        if "error" in report:
            child.wait()
            raise from_dict(report["error"])
        child.returncode = 0  # it lives on: nothing to wait for
    manifest: dict[str, Any] = report["manifest"]
    return manifest


def _launch() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "xdpmasq.background"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd="/",
        text=True,
        # Where a service attaches, it is not this agent that its manager waits for and watches.
        env={k: v for k, v in os.environ.items() if k != notify.VARIABLE}
        | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )


def _log_to_syslog() -> None:
    """What the agent has to say goes to the system's log, where there is one."""
    with contextlib.suppress(OSError):
        handler = logging.handlers.SysLogHandler("/dev/log", logging.handlers.SysLogHandler.LOG_DAEMON)
        handler.setFormatter(logging.Formatter("xdpmasq[%(process)d]: %(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.INFO)


def _serve() -> None:
    """The other end of :func:`start`."""
    from xdpmasq import daemon  # noqa: PLC0415  heavy

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
        config = configuration.from_fields(json.load(sys.stdin))
        daemon.run(config, ready=lambda manifest: say({"manifest": manifest}))
    except MasqError as error:
        say({"error": error.as_dict()})
        sys.exit(error.exit_code)
    except Exception as error:  # said before it is raised: nobody reads this process's stderr
        say({"error": DatapathError("the agent failed", repr(error), "xdpmasq run … shows more").as_dict()})
        raise


if __name__ == "__main__":
    _serve()
