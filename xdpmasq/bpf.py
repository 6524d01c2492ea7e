"""Compiling, loading, maps and test runs: what any BPF program needs, nothing about NAT.

bcc compiles (:mod:`xdpmasq.compiler`); everything else goes through the ``bpf()`` system call itself, because
programs must be loadable onto maps that already exist (state outlives the process), which bcc cannot do.
Maps and programs are kept alive by their file descriptors; use :meth:`close` or let them be collected.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import functools
import mmap
import os
import platform
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import compiler
from xdpmasq.errors import DatapathError, HostError

Array = npt.NDArray[Any]
_Element = tuple[bytearray, int]
Layout = Any  # what numpy.dtype() accepts: a string or a list of fields

SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280}
PROG_TYPES = {"tc": 3, "xdp": 6}

# Commands of bpf(2), include/uapi/linux/bpf.h
(
    _MAP_CREATE,
    _MAP_LOOKUP,
    _MAP_UPDATE,
    _MAP_DELETE,
    _PROG_LOAD,
    _TEST_RUN,
    _PROG_BY_ID,
    _MAP_BY_ID,
    _OBJ_INFO,
    _LOOKUP_BATCH,
    _ENABLE_STATS,
    _BIND_MAP,
) = (0, 1, 2, 3, 5, 10, 13, 14, 15, 24, 32, 35)

_ELEMENT = struct.Struct("<I4xQQQ")  # of union bpf_attr, for one element of a map: fd, key, value, flags
_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1
_MAP_HASH, _MAP_PERCPU_ARRAY, _MAP_LRU_HASH = 1, 6, 9
UPDATE_ANY, UPDATE_NOEXIST, UPDATE_EXIST = 0, 1, 2
_LIBC = ct.CDLL(None, use_errno=True)  # once: looking for it takes as long as the call
LIVE_FRAMES = 2  # test run: send what XDP_TX and redirect decide


@functools.cache
def _syscall_number() -> int:
    number = SYSCALL.get(platform.machine())
    if number is None:
        raise HostError(f"unknown machine type {platform.machine()}", "the number of bpf(2) is not known for it")
    return number


def call(command: int, attr: bytes | bytearray) -> tuple[int, bytearray]:
    """``bpf(command, attr)``: its result and the attributes as the kernel left them. Raises OSError."""
    buffer = (ct.c_char * len(attr)).from_buffer_copy(attr)
    result = _LIBC.syscall(_syscall_number(), command, buffer, len(attr))
    if result < 0:
        code = ct.get_errno()
        raise OSError(code, os.strerror(code))
    return result, bytearray(buffer.raw)


def refusal() -> str:
    """Why the kernel (or a container's filter) lets this process do nothing with BPF; empty when it may."""
    try:
        call(_PROG_BY_ID, struct.pack("=I12x", 0))  # there is no program 0
    except OSError as error:
        return "" if error.errno == errno.ENOENT else error.strerror or str(error)
    return ""


def _address(buffer: Any) -> int:
    return ct.addressof(buffer)


class _Descriptor:
    """Owner of a file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.close()


@functools.cache
def possible_cpus() -> int:
    """How many values a per-CPU map holds for each key."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().split("-")[-1]
    return int(last) + 1


class Map(_Descriptor):
    """A map with numpy layouts for its keys and values.

    Args:
        fd: descriptor, owned by this object from now on.
        key, value: numpy dtypes (or what makes them) of exactly the map's sizes.
    """

    def __init__(self, fd: int, key: Layout = None, value: Layout = None) -> None:
        super().__init__(fd)
        info = _object_info(fd, 88)
        self.type, self.id, self.key_size, self.value_size, self.max_entries = struct.unpack_from("<5I", info)
        self.name = info[24:40].split(b"\0")[0].decode()
        self.key = np.dtype(key if key is not None else f"V{self.key_size}")
        self.value = np.dtype(value if value is not None else f"V{self.value_size}")
        for what, dtype, size in (("key", self.key, self.key_size), ("value", self.value, self.value_size)):
            if dtype.itemsize != size:
                raise DatapathError(
                    f"map {self.name} has {what}s of {size} bytes",
                    f"its layout describes {dtype.itemsize}",
                    "detach and attach again: the running datapath is of another version",
                )

    @property
    def is_hash(self) -> bool:
        return self.type in (_MAP_HASH, _MAP_LRU_HASH)

    @classmethod
    def by_id(cls, number: int, key: Layout = None, value: Layout = None) -> Map:
        return cls(call(_MAP_BY_ID, struct.pack("<III", number, 0, 0))[0], key, value)

    def _element(self, command: int, key: Any, value: int | bytes = 0, flags: int = 0) -> _Element | None:
        """In one buffer for all that the kernel reads and writes, as ALGs' packets wait for this.

        Args:
            value: its bytes, or how many to keep room for.

        Returns:
            The buffer, and where the value begins in it; None: there is no such entry.
        """
        name = key if type(key) is bytes else np.asarray(key, dtype=self.key).tobytes()
        if len(name) != self.key_size:
            raise ValueError(f"a key of {len(name)} bytes for map {self.name}, whose keys have {self.key_size}")
        start = _ELEMENT.size + -(-self.key_size // 8) * 8
        room = bytearray(start) + (value if isinstance(value, bytes) else bytearray(value))
        room[_ELEMENT.size : _ELEMENT.size + len(name)] = name
        buffer = (ct.c_char * len(room)).from_buffer(room)
        at = ct.addressof(buffer)
        _ELEMENT.pack_into(room, 0, self.fd, at + _ELEMENT.size, at + start if value else 0, flags)
        if _LIBC.syscall(_syscall_number(), command, buffer, _ELEMENT.size) < 0:
            code = ct.get_errno()
            if code == errno.ENOENT and command != _MAP_UPDATE:
                return None
            raise OSError(code, os.strerror(code))
        return room, start

    def get(self, key: Any) -> Any:
        """The value under ``key`` (or its bytes) as a numpy scalar (per-CPU maps: an array over CPUs), or None."""
        copies = possible_cpus() if self.type == _MAP_PERCPU_ARRAY else 1
        found = self._element(_MAP_LOOKUP, key, -(-self.value_size // 8) * 8 * copies)
        if found is None:
            return None
        values = np.frombuffer(found[0], self.value, copies, found[1])
        return values if copies > 1 else values[0]

    def set(self, key: Any, value: Any, flags: int = UPDATE_ANY) -> None:
        """Stores ``value``; raises OSError (E2BIG full, EEXIST, ENOENT) as the kernel's map does."""
        self._element(_MAP_UPDATE, key, np.asarray(value, dtype=self.value).tobytes(), flags)

    def delete(self, key: Any) -> bool:
        """Removes ``key``; False when it was not there."""
        return self._element(_MAP_DELETE, key) is not None

    def items(self, chunk: int = 65536) -> Iterator[tuple[Array, Array]]:
        """All entries of a hash or array, as pairs of arrays (keys, values), by BPF_MAP_LOOKUP_BATCH."""
        # The kernel insists on room for at least the entries of one hash bucket.
        keys, values = np.zeros(chunk, self.key), np.zeros(chunk, self.value)
        token = np.zeros(max(self.key_size, 4), np.uint8)
        first, done = True, False
        while not done:
            position = 0 if first else token.ctypes.data
            attr = struct.pack(
                "<QQQQIIQQ",
                position,
                token.ctypes.data,
                keys.ctypes.data,
                values.ctypes.data,
                chunk,
                self.fd,
                0,
                0,
            )
            buffer = (ct.c_char * len(attr)).from_buffer_copy(attr)
            result = _LIBC.syscall(_syscall_number(), _LOOKUP_BATCH, buffer, len(attr))
            code = ct.get_errno() if result < 0 else 0
            if code not in (0, errno.ENOENT):
                raise OSError(code, os.strerror(code))
            count = struct.unpack_from("<I", buffer.raw, 32)[0]
            first, done = False, code == errno.ENOENT
            yield keys[:count].copy(), values[:count].copy()

    def count(self) -> int:
        """How many entries a hash has, found by reading them all."""
        return sum(len(keys) for keys, _ in self.items(chunk=self.max_entries))

    def view(self, writable: bool = True) -> Array:
        """The values of a BPF_F_MMAPABLE array as one numpy array over the kernel's own memory."""
        stride = -(-self.value_size // 8) * 8
        size = -(-stride * self.max_entries // mmap.PAGESIZE) * mmap.PAGESIZE
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        memory = mmap.mmap(self.fd, size, mmap.MAP_SHARED, protection)
        return np.frombuffer(memory, self.value, self.max_entries)


@dataclass(frozen=True)
class TestRun:
    """What a program made of a packet: its return value, the packet and the context after it, ns a run."""

    __test__ = False  # not a test class, whatever pytest makes of its name
    verdict: int
    data: bytes
    context: bytes
    duration_ns: int


class Program(_Descriptor):
    """A loaded program."""

    @classmethod
    def by_id(cls, number: int) -> Program:
        return cls(call(_PROG_BY_ID, struct.pack("<III", number, 0, 0))[0])

    @property
    def id(self) -> int:
        return int(struct.unpack_from("<I", _object_info(self.fd, 232), 4)[0])

    @property
    def name(self) -> str:
        return _object_info(self.fd, 232)[64:80].split(b"\0")[0].decode()

    def runs(self) -> tuple[int, int]:
        """How often it ran and for how many nanoseconds, while the kernel counts that (kernel.bpf_stats_enabled)."""
        spent_ns, runs = struct.unpack_from("<QQ", _object_info(self.fd, 232), 192)
        return runs, spent_ns

    def map_ids(self) -> list[int]:
        """Ids of all maps the program holds, bound ones included."""
        count = struct.unpack_from("<I", _object_info(self.fd, 232), 52)[0]
        ids = np.zeros(count, np.uint32)
        request = bytearray(232)
        struct.pack_into("<IQ", request, 52, count, ids.ctypes.data)
        _object_info(self.fd, 232, request)
        return [int(number) for number in ids]

    def bind(self, map_: Map) -> None:
        """Keeps ``map_`` alive as long as the program (BPF_PROG_BIND_MAP)."""
        call(_BIND_MAP, struct.pack("<III", self.fd, map_.fd, 0))

    def test_run(
        self,
        data: bytes,
        *,
        context: bytes = b"",
        repeat: int = 1,
        flags: int = 0,
        cpu: int = 0,
        room: int = 4096,
    ) -> TestRun:
        """Runs the program on ``data`` (BPF_PROG_TEST_RUN).

        Args:
            data: the packet, from its Ethernet header on.
            context: a ``struct __sk_buff`` or ``struct xdp_md`` to start from.
            repeat: how often; with :data:`LIVE_FRAMES` the packets are really sent.
            room: bytes kept for the packet afterwards.
        """
        live = bool(flags & LIVE_FRAMES)
        packet = ct.create_string_buffer(data, len(data))
        after = ct.create_string_buffer(room)
        told = ct.create_string_buffer(context, max(len(context), 1))  # the kernel writes it back here
        attr = struct.pack(
            "<IIIIQQIIIIQQIIII",
            self.fd,
            0,
            len(data),
            0 if live else room,
            _address(packet),
            0 if live else _address(after),
            repeat,
            0,
            len(context),
            0 if live else len(context),
            _address(told) if context else 0,
            0 if live or not context else _address(told),
            flags,
            cpu,
            0,
            0,
        )
        _, result = call(_TEST_RUN, attr)
        verdict, _, size = struct.unpack_from("<III", result, 4)
        return TestRun(verdict, after.raw[:size], told.raw[: len(context)], struct.unpack_from("<I", result, 36)[0])


def _object_info(fd: int, size: int, request: bytearray | None = None) -> bytes:
    info = ct.create_string_buffer(bytes(request) if request else b"", size)
    call(_OBJ_INFO, struct.pack("<IIQ", fd, size, _address(info)))
    return info.raw


class Object:
    """Compiled C: its maps, created, and its functions, ready to be loaded.

    Args:
        maps: existing ones to use in place of new ones of the same names.
        sizes: of new ones, where it is not what the C says; entries by name.

    Attributes:
        layouts: map name → [key, value] as JSON carries them; see :func:`xdpmasq.compiler.layout`.
        maps: map name → map.
    """

    def __init__(self, compiled: compiler.Compiled, maps: Mapping[str, Map], sizes: Mapping[str, int]) -> None:
        self._code = compiled.code
        self._compiled_fds = {name: plan.fd for name, plan in compiled.maps.items()}
        self.maps = {
            name: maps.get(name) or _create(name, plan, sizes.get(name, plan.max_entries))
            for name, plan in compiled.maps.items()
        }
        self.layouts = {name: [plan.key, plan.value] for name, plan in compiled.maps.items()}

    def load(self, function: str, kind: str) -> Program:
        """Loads a function as a ``kind`` ("tc" or "xdp") program.

        Raises:
            DatapathError: with the end of the verifier's words.
        """
        code = bytearray(self._code[function])
        _redirect_maps(code, {fd: self.maps[name].fd for name, fd in self._compiled_fds.items()})
        try:
            return Program(_load(code, PROG_TYPES[kind], function))
        except OSError as error:
            why = error.strerror or ""
            if error.errno in (errno.EINVAL, errno.EACCES, errno.E2BIG, errno.EFAULT):
                why = _verifier_log(code, PROG_TYPES[kind], function)
            raise DatapathError(f"the kernel refused program {function}", why) from error


def _create(name: str, plan: compiler.MapPlan, entries: int) -> Map:
    key, value = np.dtype(compiler.layout(plan.key)), np.dtype(compiler.layout(plan.value))
    sizes = (key.itemsize, value.itemsize, entries)
    attr = struct.pack("<IIIIIII16s", plan.type, *sizes, plan.flags, 0, 0, name[:15].encode())
    try:
        return Map(call(_MAP_CREATE, attr)[0], key, value)
    except OSError as error:
        what = f"the kernel refused table {name}, {entries:,} entries of {sizes[0] + sizes[1]} bytes"
        do = "give it memory, or lower further in [sessions], or addresses in [external]"
        raise DatapathError(what, error.strerror or "", do if error.errno == errno.ENOMEM else "") from error


def _redirect_maps(code: bytearray, fds: Mapping[int, int]) -> None:
    """Replaces map descriptors inside instructions (LD_IMM64 with BPF_PSEUDO_MAP_FD)."""
    for at in range(0, len(code), 8):
        opcode, registers, _, fd = struct.unpack_from("<BBhi", code, at)
        if opcode == _LD_IMM64 and registers >> 4 == _PSEUDO_MAP_FD and fd in fds:
            struct.pack_into("<i", code, at + 4, fds[fd])


def _load(code: bytes | bytearray, kind: int, name: str, log: Any = None) -> int:
    text = (ct.c_char * len(code)).from_buffer_copy(code)
    licence = ct.create_string_buffer(b"GPL")
    attr = struct.pack(
        "<IIQQIIQII16s",
        kind,
        len(code) // 8,
        _address(text),
        _address(licence),
        1 if log else 0,
        len(log) if log else 0,
        _address(log) if log else 0,
        0,
        0,
        name[:15].encode(),
    )
    return call(_PROG_LOAD, attr)[0]


def _verifier_log(code: bytes | bytearray, kind: int, name: str) -> str:
    log = ct.create_string_buffer(16 << 20)
    with contextlib.suppress(OSError):
        os.close(_load(code, kind, name, log))
    lines = log.value.decode(errors="replace").splitlines()
    return "\n".join(lines[-40:])


def compile(
    text: str,
    defines: Mapping[str, object] | None = None,
    maps: Mapping[str, Map] | None = None,
    sizes: Mapping[str, int] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
) -> Object:
    """Compiles C (:func:`xdpmasq.compiler.compile`, which see for errors) and creates the maps that are not there."""
    return Object(compiler.compile(text, defines, groups), maps or {}, sizes or {})


@contextlib.contextmanager
def counting_runs() -> Iterator[None]:
    """Inside the block the kernel counts programs' runs and their time, machine-wide (BPF_ENABLE_STATS)."""
    fd, _ = call(_ENABLE_STATS, struct.pack("<I", 0))
    try:
        yield
    finally:
        os.close(fd)


# --- the clock -------------------------------------------------------------------------------------


@functools.cache
def _jiffies_program() -> Program:
    """``return bpf_jiffies64();`` in two instructions: reading the clock needs no compiler."""
    return Program(_load(struct.pack("<BBhiBBhi", 0x85, 0, 0, 118, 0x95, 0, 0, 0), PROG_TYPES["tc"], "jiffies"))


def jiffies() -> int:
    """The kernel's tick counter, lower 32 bits (helper bpf_jiffies64)."""
    return _jiffies_program().test_run(bytes(14)).verdict


class Clock:
    """:func:`jiffies` some seconds from now, to a few ticks.

    They are asked for once, as that takes as long as a dozen reads of a map. The kernel's two clocks drift apart, so
    this one is not for long.

    Args:
        hz: jiffies a second.
    """

    def __init__(self, hz: int) -> None:
        self._hz, self._jiffies = hz, jiffies()
        self._since = time.monotonic()  # afterwards: whoever has to wait in between is early, not late

    def ticks_in(self, seconds: float) -> int:
        """What the counter will be in so long."""
        return (self._jiffies + int((time.monotonic() - self._since + seconds) * self._hz)) % 2**32


def tick_rate() -> int:
    """Ticks a second (CONFIG_HZ), measured over 60 ms: the kernel tells it nowhere."""
    start, ticks = time.monotonic(), jiffies()
    time.sleep(0.06)
    rate = (jiffies() - ticks) % 2**32 / (time.monotonic() - start)
    return min((100, 250, 300, 1000), key=lambda hz: abs(hz - rate))
