"""TCX (kernel 6.6): chains of programs at an interface's TC hooks, run before clsact's filters, without a qdisc.

A program attached without a bpf_link stays until it is detached or the interface goes. Netlink tells nobody.
"""

from __future__ import annotations

import errno
import functools
import struct

import numpy as np

from xdpmasq import bpf
from xdpmasq.hooks import TcHook

_ATTACH, _DETACH, _QUERY = 8, 9, 16  # commands of bpf(2)
# BPF_TCX_INGRESS, BPF_TCX_EGRESS and BPF_MPROG_MAX, which Debian 12's headers do not know
_TYPES: dict[TcHook, int] = {"ingress": 46, "egress": 47}
_ROOM = 64
_REPLACE = 4


@functools.cache
def is_there() -> bool:
    """Whether this kernel has it; asked about the loopback interface."""
    try:
        _query(1, "ingress")
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def programs(index: int, hook: TcHook) -> list[int]:
    """Ids of the programs on a hook, in their order; none where there is no such interface, or no TCX."""
    try:
        return _query(index, hook)
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.EINVAL):
            return []
        raise


def attach(index: int, hook: TcHook, program: bpf.Program, replaced: bpf.Program | None = None) -> None:
    """Puts a program behind those on a hook, or in the place of one of them: then no packet passes between.

    Raises:
        OSError: ENODEV no such interface, EEXIST it is there already, ENOENT ``replaced`` is not, ERANGE all full.
    """
    flags, old = (_REPLACE, replaced.fd) if replaced else (0, 0)
    bpf.call(_ATTACH, struct.pack("<IIIIIIQ", index, program.fd, _TYPES[hook], flags, old, 0, 0))


def detach(index: int, hook: TcHook, program: bpf.Program) -> bool:
    """Takes a program off a hook; False when it was not there."""
    try:
        bpf.call(_DETACH, struct.pack("<IIIIIIQ", index, program.fd, _TYPES[hook], 0, 0, 0, 0))
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENOENT):
            return False
        raise
    return True


def _query(index: int, hook: TcHook) -> list[int]:
    ids = np.zeros(_ROOM, np.uint32)
    attr = struct.pack("<IIIIQI36x", index, _TYPES[hook], 0, 0, ids.ctypes.data, len(ids))
    _, result = bpf.call(_QUERY, attr)
    return [int(number) for number in ids[: struct.unpack_from("<I", result, 24)[0]]]
