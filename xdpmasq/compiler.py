"""C to bytecode, by bcc, and a cache of the results; the only importer of bcc.

Compiling takes some 15 s of CPU time, on a small router a minute; what it gives depends on the text, the options, the
compiler and the headers only, so it is kept. The compiler works in a child process: clang and LLVM would otherwise
stay in the caller's memory (100 MB), and a crash of theirs would be ours.
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
import stat
import sysconfig
import tempfile
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


def compile(text: str, defines: Mapping[str, object] | None = None) -> Compiled:
    """Compiles C with bcc, or finds the result of an earlier time.

    Raises:
        HostError: bcc or the UAPI headers are missing.
        DatapathError: the compiler's messages.
    """
    if not _UAPI.exists():
        raise HostError(
            "the kernel's UAPI headers are missing", f"{_UAPI} is not there", "apt install linux-libc-dev"
        )
    cflags = [*_LEAN, *_include_flags(), *(f"-D{name}={value}" for name, value in (defines or {}).items())]
    file = _cache_file(text, cflags)
    if not file:
        return _compile(text, cflags)
    if found := _read(file):
        return found
    with _one_at_a_time(file):
        if found := _read(file):
            return found
        compiled = _compile(text, cflags)
        _write(file, compiled)
        return compiled


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


def _compile(text: str, cflags: list[str]) -> Compiled:
    said, result = os.memfd_create("stderr"), os.memfd_create("result")
    with open(said, "rb") as stderr, open(result, "rb") as answer:
        child = os.fork()
        if child == 0:
            _compile_in_child(text, cflags, said, result)
        _, status = os.waitpid(child, 0)
        stderr.seek(0)  # the child shares the position
        words = stderr.read().decode(errors="replace").strip()
        if status == 0:
            return Compiled.from_json(answer.read())
    if os.waitstatus_to_exitcode(status) == _NO_BCC:
        raise _no_bcc(words)
    raise DatapathError("the BPF programs do not compile", words or "the compiler crashed")


_FAILED, _NO_BCC = 1, 2  # exit codes of the child


def _compile_in_child(text: str, cflags: list[str], said: int, result: int) -> NoReturn:
    """Compiles, leaves a :class:`Compiled` in ``result``, or words in ``said``, and exits."""
    os.dup2(said, 2)
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
