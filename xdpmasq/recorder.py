"""The log of sessions or mappings: one more watcher of the ring of events, in a thread of the agent's. Of port blocks
it looks at the table instead, and nobody has to write events.

The thread says that it watches, reads, makes records and hands them to the targets, at a bounded pace; it does not
wait for the agent, nor the agent for it. Only where the agent itself ends many sessions at once it does the reading
in between (:meth:`Recorder.listen`), or the ring would be written over. Meanwhile the thread waits
(:meth:`Recorder.aside`): they share an interpreter, and each of these thousands of system calls would be a turn to
wait for.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from xdpmasq import __version__, events, targets
from xdpmasq.config import Log
from xdpmasq.records import Ledger, Record, Scribe, remark
from xdpmasq.sessions import Array

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached

log = logging.getLogger("xdpmasq")

POLL_S = (0.02, 0.1)  # busy, and else
BUSY = 1024  # events at once
ROOM = 262144  # events that wait to be made records of
CHECK_S = 30.0  # mappings are held against the table so often
MAKE_UP_S = 5.0  # after events were missed, at least
PARTING_S = 2.0  # at the end for what still waits
TURN = 4096  # sessions that the agent may end before it listens; a quarter of the ring


class Recorder:
    """Opened at once, begun later: a target that cannot be used is said before anything is attached.

    Attributes:
        targets: where records go.
        missed: events that were written over, or found no room, before they became records.

    Raises:
        HostError: a target cannot be used.
    """

    def __init__(self, config: Log) -> None:
        self._config = config
        self.targets = targets.opened(config)
        self.missed = 0
        self._repeated = 0
        self._watcher: events.Watcher | None = None
        self._reading = threading.Lock()
        self._heard: deque[Array] = deque()
        self._waiting = 0
        self._gap = 0  # missed since it was last said
        self._stopping = threading.Event()
        self._reopen = self._is_aside = False
        self._thread: threading.Thread | None = None

    @property
    def repeated(self) -> int:
        """Refusals that only repeated another."""
        return self._repeated

    def begin(self, attached: Attached) -> None:
        """Reads from now on.

        Raises:
            DatapathError: there is nothing to read.
        """
        if self._config.what == "blocks":
            self._start(self._run_ledger, Ledger(attached))
            return
        self._watcher = events.Watcher(attached)
        destinations = self._config.destinations
        scribe = Scribe(attached, self._watcher, self._config.what, destinations=destinations)
        self._start(self._run, scribe)

    def _start(self, run: Callable[..., None], *args: object) -> None:
        self._thread = threading.Thread(target=run, args=args, name="log", daemon=True)
        self._thread.start()

    def listen(self) -> int:
        """Takes what is in the ring; returns how much that was. By whichever thread."""
        with self._reading:
            if not self._watcher:
                return 0
            batch = self._watcher.read()
            lost, rows = batch.lost, batch.rows
            if self._waiting + len(rows) > ROOM:
                lost, rows = lost + len(rows), rows[:0]
            if len(rows):
                self._heard.append(rows)
                self._waiting += len(rows)
            if lost or batch.deaf_s:
                self.missed += lost
                self._gap += max(1, lost)
            return len(batch.rows)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Inside the block the thread leaves the interpreter to the agent, which listens in its place."""
        self._is_aside = True
        try:
            yield
        finally:
            self._is_aside = False

    def reopen(self) -> None:
        """Has the file opened anew; may be called by a signal's handler."""
        self._reopen = True

    def close(self) -> None:
        """Writes what waits, for a moment at most."""
        self._stopping.set()
        if self._thread:
            self._thread.join(2 * PARTING_S)
        for each in self.targets:
            each.close()

    # --- in the thread

    def _run(self, scribe: Scribe) -> None:
        self._remark(remark("started", version=__version__, what=self._config.what))
        extra = deque([scribe.running()])
        check_at, make_up_at, poll_s = time.monotonic() + CHECK_S, float("inf"), POLL_S[1]
        while not self._stopping.wait(poll_s):
            if self._is_aside:
                continue
            try:
                poll_s = POLL_S[0] if self.listen() >= BUSY or self._waiting else POLL_S[1]
                if self._gap:
                    self._remark(remark("lost", count=self._gap))
                    self._gap, make_up_at = 0, min(make_up_at, time.monotonic() + MAKE_UP_S)
                if time.monotonic() >= make_up_at:
                    extra += (scribe.ended(every=True), scribe.running())
                    make_up_at = float("inf")
                if time.monotonic() >= check_at:
                    extra.append(scribe.ended(every=False))
                    check_at = time.monotonic() + CHECK_S
                self._write(scribe, extra, max(1, int(self._config.per_second * poll_s)))
            except Exception:
                log.exception("log: unexpected; going on")
        with contextlib.suppress(Exception):
            self.listen()
            deadline = time.monotonic() + PARTING_S
            while self._waiting and time.monotonic() < deadline:
                self._write(scribe, extra, BUSY)
            self._part(deadline)

    def _run_ledger(self, ledger: Ledger) -> None:
        self._remark(remark("started", version=__version__, what=self._config.what))
        while not self._stopping.wait(POLL_S[1]):
            try:
                self._hand_over([*ledger.records()])
            except Exception:
                log.exception("log: unexpected; going on")
        with contextlib.suppress(Exception):
            self._hand_over([*ledger.records()])
            self._part(time.monotonic() + PARTING_S)

    def _part(self, deadline: float) -> None:
        """The last word, and what waits."""
        self._remark(remark("stopped"))
        while any(each.backlog for each in self.targets) and time.monotonic() < deadline:
            time.sleep(POLL_S[0])
            for each in self.targets:
                each.flush()

    def _write(self, scribe: Scribe, extra: deque[Iterator[Record]], most: int) -> None:
        """So many records, at most, to every target: what happens before what is made up for."""
        rows = self._next(most)
        records = [*scribe.records(rows)] if rows is not None else []
        while extra and len(records) < most:
            record = next(extra[0], None)
            if record:
                records.append(record)
            else:
                extra.popleft()
        self._repeated = scribe.repeated
        self._hand_over(records)

    def _hand_over(self, records: Sequence[Record]) -> None:
        if self._reopen:
            self._reopen = False
            for each in self.targets:
                each.reopen()
        for each in self.targets:
            each.take(records)
            each.flush()

    def _next(self, most: int) -> Array | None:
        with self._reading:
            if not self._heard:
                return None
            rows = self._heard.popleft()
            if len(rows) > most:
                self._heard.appendleft(rows[most:])
                rows = rows[:most]
            self._waiting -= len(rows)
            return rows

    def _remark(self, line: str) -> None:
        for each in self.targets:
            each.remark(line)


@contextlib.contextmanager
def recording(config: Log) -> Iterator[Recorder | None]:
    """Holds the targets; None where nothing is logged.

    Raises:
        HostError: a target cannot be used.
    """
    if not config.is_on:
        yield None
        return
    recorder = Recorder(config)
    signal.signal(signal.SIGUSR1, lambda *_: recorder.reopen())
    try:
        yield recorder
    finally:
        recorder.close()
