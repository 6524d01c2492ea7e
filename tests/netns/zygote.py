"""Runs the command line in a network namespace as ``ip netns exec`` does, without a second of imports each time.

One process for each pytest worker has imported everything and forks for every command, and for the agent that it
starts; from there on what runs is the program as its users have it. The demo and the benchmark, which tests run too,
start it from scratch.
"""

import array
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any, Self

from xdpmasq.lab.errors import LabError

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000  # linux/sched.h
_MS_REC, _MS_SLAVE, _MNT_DETACH = 0x4000, 1 << 19, 2  # linux/mount.h
_LONGEST_REQUEST = 1 << 20

_mother: socket.socket | None = None


def run(
    namespace: str, args: Sequence[str], timeout_s: float, config: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """``ip netns exec NAMESPACE xdpmasq ARGS``, to its end.

    Args:
        config: an agent is started with this (``config.as_fields``), for what neither options nor files can name.

    Raises:
        LabError: it took longer.
    """
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with there, open(f"/run/netns/{namespace}", "rb") as netns:
            fds = [there.fileno(), netns.fileno(), out.fileno(), err.fileno()]
            wanted = {"args": [*map(str, args)], "env": dict(os.environ), "config": config}
            request = json.dumps(wanted).encode()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
            _zygote().sendmsg([request], [rights])
        here.settimeout(timeout_s)
        pid = int(here.recv(64))
        try:
            code = int(here.recv(64))
        except TimeoutError as error:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            raise LabError(
                f"xdpmasq {' '.join(args)} did not end", f"it was stopped after {timeout_s:g} s"
            ) from error
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(["xdpmasq", *args], code, *texts)


def _zygote() -> socket.socket:
    global _mother
    if _mother is None:
        _mother, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _mother.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LONGEST_REQUEST)
        with other:
            subprocess.Popen(
                [sys.executable, __file__, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for pytest; this one ends with it, by the socket
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
    return _mother


# --- the other side --------------------------------------------------------------------------------


def _serve(requests: socket.socket) -> None:
    import xdpmasq.cli  # noqa: PLC0415
    import xdpmasq.control  # noqa: PLC0415
    import xdpmasq.daemon  # noqa: F401, PLC0415  heavy: what all this is for

    with contextlib.suppress(ImportError):
        import typer._adapters  # noqa: F401, PLC0415  what newer typers import when they first parse an option

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        text, rights, _, _ = requests.recvmsg(_LONGEST_REQUEST, socket.CMSG_SPACE(4 * 4))
        if not text:
            return
        fds = array.array("i")
        fds.frombytes(rights[0][2])
        if not os.fork():
            requests.close()
            _attend(json.loads(text), *fds)
        for fd in fds:
            os.close(fd)


def _attend(request: dict[str, Any], answer: int, netns: int, out: int, err: int) -> None:
    """One command: starts it, tells its pid, waits, tells its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(answer)
        _command(request, netns, out, err)
    with socket.socket(fileno=answer) as reply:
        reply.send(b"%d" % pid)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(BrokenPipeError):
            reply.send(b"%d" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _command(request: dict[str, Any], netns: int, out: int, err: int) -> None:
    from xdpmasq import background, cli  # noqa: PLC0415
    from xdpmasq import config as configuration  # noqa: PLC0415

    background._launch = _Agent  # type: ignore[assignment]
    code = 1
    try:
        os.environ.clear()
        os.environ.update(request["env"])
        for fd, number in ((out, 1), (err, 2)):
            os.dup2(fd, number)
        _enter(netns)
        for fd in (netns, out, err):
            os.close(fd)
        sys.argv = ["xdpmasq", *request["args"]]
        if not request["config"]:
            cli.main()
        background.start(configuration.from_fields(request["config"]))
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        sys.stderr.write(f"{error}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Agent:
    """Stands for the ``subprocess.Popen`` of ``background.start``."""

    def __init__(self) -> None:
        told, self.stdin = self._pipe()
        self.stdout, tells = self._pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            self._serve(told.fileno(), tells.fileno())
        told.close()
        tells.close()

    @staticmethod
    def _pipe() -> tuple[IO[str], IO[str]]:
        out, into = os.pipe()
        return os.fdopen(out), os.fdopen(into, "w")

    def _serve(self, told: int, tells: int) -> None:
        from xdpmasq import background  # noqa: PLC0415

        code = 1
        try:
            os.setsid()
            os.chdir("/")
            for fd, number in ((told, 0), (tells, 1), (os.open(os.devnull, os.O_RDWR), 2)):
                os.dup2(fd, number)
            os.closerange(3, 1024)
            sys.stdin = os.fdopen(0)
            background._serve()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        if self.returncode is None:
            self.wait()

    def wait(self) -> int:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def _enter(netns: int) -> None:
    """As ``ip netns exec``: the network, and a /sys that shows it, without what was mounted below the other."""
    libc = ctypes.CDLL(None, use_errno=True)
    for done in (
        libc.setns(netns, _CLONE_NEWNET),
        libc.unshare(_CLONE_NEWNS),
        libc.mount(b"", b"/", b"none", ctypes.c_ulong(_MS_SLAVE | _MS_REC), None),
        libc.umount2(b"/sys", _MNT_DETACH),
        libc.mount(b"xdpmasq", b"/sys", b"sysfs", ctypes.c_ulong(0), None),
    ):
        if done:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
