"""What happens to sessions, as it happens: the ring that programs write while somebody watches (bpf/events.h).

Reading takes nothing out, so any number of watchers read side by side, each at its own pace. They say that they are
there by a word in the kernel that lapses by itself, and so does the programs' work when the last of them is gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from xdpmasq import listing, sessions
from xdpmasq.errors import DatapathError
from xdpmasq.selection import Selection
from xdpmasq.sessions import TCP, Array, Table

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached

# enum and #define values of bpf/types.h and events.h
KINDS = ("void", "opened", "closed", "refused")
VOID, OPENED, CLOSED, REFUSED = range(4)
EXPIRED, FORCED, EVICTED = range(3)
FROM_OUTSIDE = 4
WATCH_MOST = 4096  # jiffies

HERE_S = 3  # a watcher that has not read for so long is gone
_FIN, _RST = 0x01, 0x04


@dataclass(frozen=True)
class Batch:
    """What has come since the last one.

    Attributes:
        rows: ``struct event``.
        lost: how many events were written over, or said nothing, before they were read.
        deaf_s: for how long this watcher was taken for gone: what happened then was perhaps not written at all.
    """

    rows: Array
    lost: int = 0
    deaf_s: float = 0.0


@dataclass(frozen=True)
class Story:
    """Events as columns.

    Attributes:
        at: seconds since the epoch.
        kind: index into :data:`KINDS`.
        why: in a word: who opened a session, what ended it, or for what it was refused.
        seconds: how long a session lasted.
    """

    table: Table
    at: Array
    kind: Array
    why: Sequence[str]
    seconds: Array

    def __len__(self) -> int:
        return len(self.kind)


class Watcher:
    """Reads one datapath's events from now on; :meth:`read` wants to be called some times a second.

    Raises:
        DatapathError: it has none to tell.
    """

    def __init__(self, attached: Attached) -> None:
        if "events" not in attached.maps:
            why = "another version attached the running datapath"
            raise DatapathError("no events to watch", why, "xdpmasq detach, then attach: running sessions start anew")
        self._attached, self._hz, self._counters = attached, attached.hz, attached.counter_names
        self._ring = attached.maps["events"].view(writable=False)
        self._watch = attached.maps["watch"].view()
        self._here_until = time.monotonic() + HERE_S
        self._stay()
        self._next = self._head

    def reads(self, attached: Attached) -> bool:
        """Whether it is this one's events."""
        return bool(attached.maps["events"].id == self._attached.maps["events"].id)

    def read(self) -> Batch:
        """Those that have been written completely, in their order."""
        deaf_s = self._stay()
        head, room = self._head, len(self._ring)
        start = max(self._next, head - room)
        numbers = np.arange(start, head, dtype=np.uint64)
        places = (numbers % np.uint64(room)).astype(np.intp)
        whole = self._ring["number"][places] == numbers + np.uint64(1)
        count = len(whole) if whole.all() else int(np.argmin(whole))
        rows = self._ring[places[:count]]
        gone = min(max(0, self._head - room - start), count)  # written over while they were copied
        void = rows["kind"] == VOID
        void[:gone] = True
        lost = start - self._next + int(np.count_nonzero(void))
        self._next = start + count
        return Batch(rows[~void], lost, deaf_s)

    def story(self, rows: Array, selection: Selection) -> Story:
        """What those events that fit say."""
        table = _table(rows)
        fits = selection.mask(table)
        rows, table = rows[fits], table[fits]
        ago, lasted = np.uint32(self._attached.now()) - rows["at"], rows["at"] - rows["opened_at"]
        why = [_why(row, protocol, self._counters) for row, protocol in zip(rows, table.protocol, strict=True)]
        seconds = np.maximum(lasted.view(np.int32) / self._hz, 0)
        return Story(table, time.time() - ago.view(np.int32) / self._hz, rows["kind"], why, seconds)

    @property
    def _head(self) -> int:
        return int(self._watch["next"][0])

    def _stay(self) -> float:
        """Says that somebody watches; returns for how many seconds this was not said any more."""
        now, hz = time.monotonic(), self._hz
        ticks = min(HERE_S * hz, WATCH_MOST - 1)
        self._watch["until"][0] = (self._attached.now() + ticks) % 2**32
        deaf_s = max(0.0, now - self._here_until)
        self._here_until = now + ticks / hz
        return deaf_s


# --- what they say ---------------------------------------------------------------------------------


def _table(rows: Array) -> Table:
    protocol, seen, none = rows["internal"]["class"], rows["tcp_seen"], np.zeros(len(rows))
    return Table(
        slot=none,
        opened_at=rows["opened_at"],
        protocol=protocol,
        state=sessions.states(protocol, seen[:, 0], seen[:, 1], rows["received"]["packets"]),
        internal=sessions.endpoints(rows["internal"]["addr"], rows["internal"]["port"]),
        external=sessions.endpoints(rows["external"], rows["external_port"]),
        remote=sessions.endpoints(rows["remote"], rows["remote_port"]),
        **sessions.traffic(rows),
        idle_s=none,
        remaining_s=none,
    )


def _why(row: Any, protocol: int, counters: Sequence[str]) -> str:
    kind, reason, (out, in_) = int(row["kind"]), int(row["reason"]), row["tcp_seen"].tolist()
    if kind == OPENED:
        return "remote" if row["marks"] & FROM_OUTSIDE else "internal"
    if kind == REFUSED:
        return counters[reason].removeprefix("drop_") if reason < len(counters) else str(reason)
    if reason != EXPIRED:
        return "flushed" if reason == FORCED else "evicted"
    if protocol != TCP:
        return "idle"
    return "rst" if (out | in_) & _RST else "fin" if out & in_ & _FIN else "idle"


_ROW = "%-8s %-7s %-5s %-21s %-21s %-21s %-15s %9s %11s %13s %11s %13s"
HEADING = _ROW % (
    *("TIME", "EVENT", "PROTO", "INTERNAL", "EXTERNAL", "REMOTE", "WHY"),
    *("DURATION", "OUT-PACKETS", "OUT-BYTES", "IN-PACKETS", "IN-BYTES"),
)


def lines(told: Story) -> Iterator[str]:
    """A line of :data:`HEADING` for each event."""
    protocols, _, internal, external, remote = listing.ends(told.table)
    for nth, kind in enumerate(told.kind.tolist()):
        clock = time.strftime("%H:%M:%S", time.localtime(told.at[nth]))
        as_whom = "-" if kind == REFUSED else external[nth]
        numbers: tuple[object, ...] = ("",) * 5
        if kind == CLOSED:
            numbers = (f"{told.seconds[nth]:.1f}", *(getattr(told.table, name)[nth] for name in sessions.TRAFFIC))
        ends = (protocols[nth], internal[nth], as_whom, remote[nth])
        yield (_ROW % (clock, KINDS[kind], *ends, told.why[nth], *numbers)).rstrip()


def json_lines(told: Story) -> Iterator[str]:
    """A JSON object (as text) for each event."""
    texts = [text for block in listing.json_objects(told.table) for text in block]
    for nth, (kind, text) in enumerate(zip(told.kind.tolist(), texts, strict=True)):
        fields = json.loads(text)
        if kind == REFUSED:
            fields["external"] = None
        for name in ("idle_s", "remaining_s"):
            del fields[name]
        start = {"time": round(float(told.at[nth]), 3), "event": KINDS[kind], "why": told.why[nth]}
        yield json.dumps({**start, **fields, "duration_s": round(float(told.seconds[nth]), 3)})
