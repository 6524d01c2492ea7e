"""Who is at work: one command at a time changes a namespace, one agent runs for each WAN.

Both are files under /run that are locked while their process lives; the kernel lets go of a lock when
its holder dies, however it dies. They are root's alone, so nobody else can pretend or hold us up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from xdpmasq.errors import BusyError, MasqError

RUN = Path("/run")


def _path(name: str) -> Path:
    namespace = os.stat("/proc/self/ns/net").st_ino
    return RUN / f"xdpmasq-{namespace}-{name.replace('/', '_')}.lock"


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, or None while another process does."""
    while True:
        fd = _opened(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, fd):
                return fd
        except BlockingIOError:
            os.close(fd)
            return None
        os.close(fd)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_at(path: Path, fd: int) -> bool:
    """The last holder may have removed the file between our opening and locking it: then we hold nothing."""
    try:
        return os.fstat(fd).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _held(path: Path, fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


@contextlib.contextmanager
def changing(patience_s: float = 20) -> Iterator[None]:
    """Held while programs are attached or detached in this network namespace.

    Raises:
        BusyError: another command is still at it after ``patience_s``.
    """
    path = _path("changing")
    with _held(path, _locked(path, _try_lock, patience_s)):
        yield


def _locked(path: Path, attempt: Callable[[Path], int | None], patience_s: float) -> int:
    deadline = time.monotonic() + patience_s
    while (fd := attempt(path)) is None:
        if time.monotonic() > deadline:
            raise BusyError(
                "another xdpmasq command is changing this network namespace",
                f"it has held {path} for over {patience_s:.0f} s",
                "wait for it, or end it",
            )
        time.sleep(0.05)
    return fd


class Turns:
    """:func:`changing` for somebody who does it often: the file stays, open, until the next command removes it."""

    def __init__(self) -> None:
        self._path, self._fd = _path("changing"), -1

    @contextlib.contextmanager
    def changing(self, patience_s: float) -> Iterator[None]:
        """Raises: BusyError, see there."""
        fd = _locked(self._path, self._try_lock, patience_s)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """Removes the file; should somebody else be at work, he will."""
        if self._fd >= 0:
            with contextlib.suppress(BusyError), self.changing(0):
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
        self._fd = -1

    def _try_lock(self, path: Path) -> int | None:
        if self._fd < 0:
            self._fd = _opened(path)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not _is_at(path, self._fd):
            os.close(self._fd)
            self._fd = -1
            return self._try_lock(path)
        return self._fd


@contextlib.contextmanager
def being_agent(wans: Sequence[str]) -> Iterator[None]:
    """Held by the agent of these WANs for all its life.

    Raises:
        MasqError: one of them has one already.
    """
    with contextlib.ExitStack() as held:
        for wan in wans:
            held.enter_context(_being_agent_of(wan))
        yield


@contextlib.contextmanager
def _being_agent_of(wan: str) -> Iterator[None]:
    path = _path(f"agent-{wan}")
    fd = _try_lock(path)
    for _ in range(5):  # others only ask, by a shared lock of a moment: see agent_pid()
        if fd is None:
            time.sleep(0.02)
            fd = _try_lock(path)
    if fd is None:
        raise MasqError(
            f"xdpmasq already runs on {wan}",
            f"its agent is process {agent_pid(wan) or '?'}",
            f"see `xdpmasq status`; `xdpmasq detach --wan {wan}` ends it",
        )
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    with _held(path, fd):
        yield


def agent_pid(wan: str) -> int | None:
    """The process id of the running agent of ``wan``, None when there is none."""
    path = _path(f"agent-{wan}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 32, 0).strip()
        return int(text) if text else None
    finally:
        os.close(fd)
    return None


def agents() -> list[str]:
    """The WANs of all running agents of this network namespace."""
    start, end = str(_path("agent-")).removesuffix(".lock"), ".lock"
    names = [str(path)[len(start) : -len(end)] for path in RUN.glob(f"{Path(start).name}*{end}")]
    return [name for name in names if agent_pid(name) is not None]


def sweep() -> None:
    """Removes what killed processes left, in whatever namespace: a file that nobody holds says nothing."""
    for path in RUN.glob("xdpmasq-*.lock"):
        if (fd := _try_lock(path)) is not None:
            path.unlink(missing_ok=True)
            os.close(fd)
