"""C to bytecode, by bcc, and a cache of the results; the only importer of bcc.

Compiling takes some 13 s of CPU time, on a small router a minute; what it gives depends on the text, the options, the
compiler and the headers only, so it is kept. The compiler works in child processes: clang and LLVM would otherwise
stay in the caller's memory (160 MB), and a crash of theirs would be ours. There are several at once, where there are
CPUs and memory for them.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes as ct
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import signal
import stat
import sysconfig
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from xdpmasq import source
from xdpmasq.errors import DatapathError, HostError

CACHE = Path("/var/cache/xdpmasq")
_KEPT = 64  # results of half a megabyte; the oldest give way
_FORMAT = 1  # of a result: counts up when Compiled changes
_CHILD_KB = 200_000  # what one needs
_FUNCTION = re.compile(r"^int (\w+)\(", re.MULTILINE)
_UAPI = Path("/usr/include/linux/bpf.h")
# Four tenths of the time, for nothing: nobody reads the debug information, and what is to be inlined says so itself.
_LEAN = ("-g0", "-fno-inline-functions")


@dataclass(frozen=True)
class MapPlan:
    """How a map is to be created.

    Attributes:
        fd: by which the code names it.
        key, value: layouts for numpy, as JSON can carry them; see :func:`plain`.
    """

    fd: int
    type: int
    max_entries: int
    flags: int
    key: Any
    value: Any


@dataclass(frozen=True)
class Compiled:
    """The bytecode of every function, and the maps that it uses."""

    code: dict[str, bytes]
    maps: dict[str, MapPlan]

    def as_json(self) -> bytes:
        code = {name: base64.b64encode(text).decode() for name, text in self.code.items()}
        return json.dumps({"code": code, "maps": {name: asdict(plan) for name, plan in self.maps.items()}}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Compiled:
        """Raises ValueError, KeyError or TypeError when it is none."""
        fields = json.loads(text)
        code = {name: base64.b64decode(each) for name, each in fields["code"].items()}
        return cls(code, {name: MapPlan(**plan) for name, plan in fields["maps"].items()})


def plain(dtype: npt.DTypeLike) -> Any:
    """A layout as JSON can carry it."""
    dtype = np.dtype(dtype)
    return dtype.str if dtype.names is None else dtype.descr


def layout(plain: Any) -> Any:
    """The inverse of :func:`plain` after a journey through JSON, which knows no tuples; for ``numpy.dtype``."""
    if isinstance(plain, str):
        return plain
    return [(name, layout(kind), *(tuple(shape) for shape in rest)) for name, kind, *rest in plain]


def compile(
    text: str, defines: Mapping[str, object] | None = None, groups: Sequence[Sequence[str]] | None = None
) -> Compiled:
    """Compiles C with bcc, or finds the result of an earlier time.

    Args:
        groups: of functions in the text (:func:`functions_of`), each for a process of its own; default: all of them
            in one. A process more takes half a second.

    Raises:
        HostError: bcc or the UAPI headers are missing.
        DatapathError: the compiler's messages.
    """
    if not _UAPI.exists():
        raise HostError(
            "the kernel's UAPI headers are missing", f"{_UAPI} is not there", "apt install linux-libc-dev"
        )
    cflags = [*_LEAN, *_include_flags(), *(f"-D{name}={value}" for name, value in (defines or {}).items())]
    wanted = groups or [functions_of(text)]
    file = _cache_file(text, [*cflags, *(" ".join(group) for group in wanted)])
    if not file:
        return _compile(text, cflags, wanted)
    if found := _read(file):
        return found
    with _one_at_a_time(file):
        if found := _read(file):
            return found
        compiled = _compile(text, cflags, wanted)
        _write(file, compiled)
        return compiled


def functions_of(text: str) -> list[str]:
    """Those that can be loaded: ``int NAME(`` at the beginning of a line."""
    return _FUNCTION.findall(text)


def _include_flags() -> list[str]:
    triplet = sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu"
    return ["-isystem", "/usr/include", "-isystem", f"/usr/include/{triplet}"]


# --- the cache -------------------------------------------------------------------------------------


def _cache_file(text: str, cflags: Sequence[str]) -> Path | None:
    """Where the result would be; None where there is no telling, or the folder could be somebody else's."""
    with contextlib.suppress(OSError):
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = CACHE.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022:
            key = "\0".join((str(_FORMAT), platform.machine(), *_tools(), *cflags, text))
            return CACHE / hashlib.sha256(key.encode()).hexdigest()
    return None


@functools.cache
def _tools() -> tuple[str, ...]:
    """Which compiler and headers these are: by size and time, as packages tell their versions differently.

    Raises:
        HostError: there is no bcc.
    """
    bcc = importlib.util.find_spec("bcc")
    if bcc is None or bcc.origin is None:
        raise _no_bcc("No module named 'bcc'")
    standins = (source.folder() / "standin").rglob("*.h")
    files = [_UAPI, Path(bcc.origin), *sorted(Path(bcc.origin).parent.glob("version.py")), *sorted(standins)]
    return tuple(f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """Who else wants the same waits for it: that takes no longer, and half the work."""
    lock = file.with_name(f".{file.name}")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a full or read-only disk: then each for itself
            fcntl.flock(held.enter_context(lock.open("w")), fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)


def _read(file: Path) -> Compiled | None:
    """None, too, when the file is damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = Compiled.from_json(file.read_bytes())
        file.touch()
        return found
    return None


def _write(file: Path, compiled: Compiled) -> None:
    """For the next time; a full or read-only disk only means that there it is compiled again."""
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as whole:
            try:
                whole.write(compiled.as_json())
                whole.flush()
                os.replace(whole.name, file)
            except OSError:
                os.unlink(whole.name)
                raise
        kept = sorted(file.parent.glob("[0-9a-f]*"), key=lambda each: each.stat().st_mtime, reverse=True)
        for old in kept[_KEPT:]:
            old.unlink(missing_ok=True)


# --- the compiler ----------------------------------------------------------------------------------


def _no_bcc(why: str) -> HostError:
    do = "apt install python3-bpfcc and use the system's Python (PyPI's bcc is something else)"
    return HostError("bcc is missing", why, do)


def _compile(text: str, cflags: list[str], groups: Sequence[Sequence[str]]) -> Compiled:
    """As many at once as there are CPUs, and memory: with the same tables in each, they can be put together."""
    running, found = deque[_Child](), list[Compiled]()
    most = _at_once()
    try:
        for group in groups:
            if len(running) >= most:
                found.append(running.popleft().result())
            running.append(_Child(_only(text, group), cflags))
        while running:
            found.append(running.popleft().result())
    finally:
        for child in running:
            child.kill()
    if any(each.maps != found[0].maps for each in found):
        raise DatapathError("the BPF programs do not fit together", "their tables differ", "report it, please")
    return Compiled({name: code for each in found for name, code in each.code.items()}, found[0].maps)


def _only(text: str, functions: Sequence[str]) -> str:
    """The text with these functions to be loaded; of the others nothing is left when nobody calls them."""
    unused = "static inline __attribute__((unused)) "
    return _FUNCTION.sub(lambda found: found[0] if found[1] in functions else unused + found[0], text)


def _at_once() -> int:
    with contextlib.suppress(OSError, ValueError):
        (free,) = re.findall(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        return max(1, min(len(os.sched_getaffinity(0)), int(free) // _CHILD_KB))
    return 1


class _Child:
    """A process that compiles."""

    def __init__(self, text: str, cflags: list[str]) -> None:
        self._said, self._result = (open(os.memfd_create(name), "rb") for name in ("stderr", "result"))  # noqa: SIM115
        self._process = os.fork()
        if self._process == 0:
            _compile_in_child(text, cflags, self._said.fileno(), self._result.fileno())

    def result(self) -> Compiled:
        """Waits for it.

        Raises:
            HostError: there is no bcc.
            DatapathError: the compiler's words.
        """
        with self._said, self._result:
            _, status = os.waitpid(self._process, 0)
            self._said.seek(0)  # the child shares the position
            words = self._said.read().decode(errors="replace").strip()
            if status == 0:
                return Compiled.from_json(self._result.read())
        if os.waitstatus_to_exitcode(status) == _NO_BCC:
            raise _no_bcc(words)
        raise DatapathError("the BPF programs do not compile", words or "the compiler crashed")

    def kill(self) -> None:
        os.kill(self._process, signal.SIGKILL)
        with contextlib.suppress(DatapathError):
            self.result()


_FAILED, _NO_BCC = 1, 2  # exit codes of the child


def _compile_in_child(text: str, cflags: list[str], said: int, result: int) -> NoReturn:
    """Compiles, leaves a :class:`Compiled` in ``result``, or words in ``said``, and exits.

    Nothing else is open in it, so the tables have the same descriptors in every child.
    """
    os.dup2(said, 2)
    os.dup2(result, 3)
    os.closerange(4, os.sysconf("SC_OPEN_MAX"))
    said, result = 2, 3
    code = _FAILED
    try:
        import bcc  # noqa: PLC0415  only here: see the module's words

        os.environ["BCC_KERNEL_SOURCE"] = str(source.folder() / "standin")
        module = bcc.BPF(text=text, cflags=cflags)
        for name_of in (bcc.lib.bpf_table_name, bcc.lib.bpf_function_name):
            name_of.restype = ct.c_char_p  # bcc itself declares no result
        tables = _names(module, bcc.lib.bpf_num_tables, bcc.lib.bpf_table_name)
        functions = _names(module, bcc.lib.bpf_num_functions, bcc.lib.bpf_function_name)
        programs = {name: bytes(module.dump_func(name.encode())) for name in functions}
        os.pwrite(result, Compiled(programs, {name: _plan(module, name) for name in tables}).as_json(), 0)
        code = 0
    except ImportError as error:
        os.write(2, str(error).encode())
        code = _NO_BCC
    except BaseException as error:  # bcc raises plain Exception; nothing may return into the parent's code
        if not os.fstat(said).st_size:
            os.write(2, str(error).encode())
    finally:
        os._exit(code)


def _names(module: Any, count: Any, name_of: Any) -> list[str]:
    return [name_of(module.module, i).decode() for i in range(count(module.module))]


def _plan(module: Any, name: str) -> MapPlan:
    import bcc  # noqa: PLC0415

    table = module[name]
    leaf = getattr(table, "sLeaf", table.Leaf)  # of per-CPU tables the layout of one CPU's value
    tell = (bcc.lib.bpf_table_type, bcc.lib.bpf_table_max_entries, bcc.lib.bpf_table_flags)
    kind, entries, flags = (each(module.module, name.encode()) for each in tell)
    return MapPlan(table.map_fd, kind, entries, flags, plain(table.Key), plain(leaf))
