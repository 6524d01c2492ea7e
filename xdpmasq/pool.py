"""The pool of external ports in the tables: what lies outside it is claimed for ever."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from xdpmasq import bpf, settings
from xdpmasq.abi import REAP_CLAIM, REAP_OPEN
from xdpmasq.config import Ports
from xdpmasq.tables import Tables

Bitmap = npt.NDArray[np.uint64]


def reserve(tables: Tables, reaper: bpf.Program, ports: Ports, before: Ports | None) -> Bitmap:
    """Claims what is outside the pool; returns the bitmap of those slots that expiry need not look at.

    Args:
        before: those that an earlier agent gave out; None: the tables are new.
    """
    outside = _outside(tables, ports)
    if before is None:
        tables.claims[:] = reserved = _bits(outside)
        return reserved
    expected = outside.copy()
    # Ports that an earlier configuration gave out are reaped like any other; forwarded ones are kept.
    expected[tables.given_slots()] = False
    _move(tables, reaper, _outside(tables, before), outside)
    return _bits(expected)


def _move(
    tables: Tables, reaper: bpf.Program, was_outside: npt.NDArray[np.bool_], is_outside: npt.NDArray[np.bool_]
) -> None:
    """From an earlier pool to another. What is in use stays so until it ends."""
    for changed, order in ((is_outside & ~was_outside, REAP_CLAIM), (was_outside & ~is_outside, REAP_OPEN)):
        tables.reap(reaper, np.flatnonzero(changed).astype(np.uint32), order)


def _outside(tables: Tables, ports: Ports) -> npt.NDArray[np.bool_]:
    return settings.outside(ports, len(tables.claims) * 64, tables.externals)


def _bits(slots: npt.NDArray[np.bool_]) -> Bitmap:
    return np.packbits(slots, bitorder="little").view(np.uint64)
