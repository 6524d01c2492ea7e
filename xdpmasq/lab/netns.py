"""Named network namespaces: make, enter, empty and delete them, each by its exact name.

Nothing here knows the lab's network. Every function takes full namespace names and touches only those;
the namespace this process runs in is never emptied, whatever name is given.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from xdpmasq.errors import HostError
from xdpmasq.lab.errors import LabError, wait_until

_MOUNTS = Path("/run/netns")
_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns() came only with Python 3.12

_libc = ctypes.CDLL(None, use_errno=True)


def exists(name: str) -> bool:
    return (_MOUNTS / name).exists()


def ip_batch(commands: Iterable[str], namespace: str | None = None) -> None:
    """Run `ip` commands in one process, which stops at the first that fails.

    Raises:
        LabError: with iproute2's own words.
    """
    where = ["-n", namespace] if namespace else []
    script = "\n".join(commands) + "\n"
    argv = ["ip", *where, "-batch", "-"]
    done = subprocess.run(argv, input=script, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError("the lab's network could not be built", f"ip: {done.stderr.strip()}")


def ip_batches(batches: Mapping[str, Iterable[str]]) -> None:
    """Run a batch in each of these namespaces, at once; when one fails the others still run to their end."""
    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(ip_batch, batches.values(), batches.keys()))


@contextlib.contextmanager
def entered(name: str) -> Iterator[None]:
    """The calling thread, and children it forks, work in the namespace; other threads stay outside.

    A socket or a /dev/net/tun opened inside keeps belonging there afterwards (setns(2)).
    """
    with open("/proc/thread-self/ns/net", "rb") as home, open(_MOUNTS / name, "rb") as there:
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def set_sysctls(name: str, values: Mapping[str, int]) -> None:
    """Write `{"net/ipv4/ip_forward": 1}` in the namespace; what this kernel does not have is skipped."""
    with entered(name):
        for key, value in values.items():
            with contextlib.suppress(FileNotFoundError):
                Path("/proc/sys", key).write_text(str(value))


def get_sysctl(name: str, key: str) -> int:
    with entered(name):
        return int(Path("/proc/sys", key).read_text())


def processes_in(names: Iterable[str]) -> list[int]:
    """The ids of all processes whose network is one of these namespaces (missing names have none)."""
    wanted = {_identity(_MOUNTS / name) for name in names} - {None, _identity(Path("/proc/self/ns/net"))}
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if _identity(Path(f"/proc/{pid}/ns/net")) in wanted]


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells one namespace from another; None for a zombie, a vanished process, a missing name."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def end_processes(names: Iterable[str]) -> None:
    """End every process in these namespaces: SIGTERM, and after a second SIGKILL.

    Raises:
        LabError: one survives even that, hanging in the kernel.
    """
    names = tuple(names)
    _signal(processes_in(names), signal.SIGTERM)
    with contextlib.suppress(LabError):
        wait_until(lambda: not processes_in(names), "", timeout_s=1)
    _signal(processes_in(names), signal.SIGKILL)
    wait_until(lambda: not processes_in(names), "all processes in the lab have ended")


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def delete(names: Iterable[str]) -> None:
    """Delete those of the namespaces that exist; their links, routes and rules go with them."""
    if present := [name for name in names if exists(name)]:
        ip_batch(f"netns del {name}" for name in present)


def require_root() -> None:
    """Raises: HostError when this process may not make network namespaces."""
    if os.geteuid() != 0:
        raise HostError("the lab cannot be built", "network namespaces need root", "run it with sudo")
