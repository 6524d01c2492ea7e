"""Our network namespace by its name: `ip netns delete` takes that away, but the namespace lives as long as we do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NAMES = Path("/run/netns")  # ip-netns(8)
OURS = Path("/proc/self/ns/net")


class Name:
    """The name that our namespace had at first, if any."""

    def __init__(self) -> None:
        self._path = next(_names(), None)

    @property
    def is_deleted(self) -> bool:
        """It had a name, and has none any more."""
        if self._path and not _is_ours(self._path):
            self._path = next(_names(), self._path)  # it may have another
        return self._path is not None and not _is_ours(self._path)


def _names() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from filter(_is_ours, NAMES.iterdir())


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(path, OURS)
    return False
