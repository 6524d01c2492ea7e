"""Having a punt port: made, given its program, looked after, and served. The gateway works without one, too."""

from __future__ import annotations

import logging
import selectors
import time
from collections.abc import Callable
from typing import Any

from xdpmasq import attachment, hooks
from xdpmasq.errors import MasqError
from xdpmasq.net import clsact, netdev
from xdpmasq.programs import Programs
from xdpmasq.punt import Punt
from xdpmasq.tables import Tables

log = logging.getLogger("xdpmasq")

RETRY_S = 60  # trying is itself a change of interfaces that makes the agent look: no sooner, or it would never rest
PAUSE_S = 1.0  # after something went wrong


class Punting:
    """Keeps a punt port while that is possible.

    Args:
        make: opens one; raises MasqError where there can be none.
        port: one to go on with.

    Attributes:
        due_at: when :meth:`serve` is needed next if nothing comes before; monotonic seconds.
        port: the punt port, if there is one.
        report: for the manifest: the port's name, or why there is none.
    """

    def __init__(
        self,
        tables: Tables,
        programs: Programs,
        selector: selectors.BaseSelector,
        make: Callable[[], Punt],
        port: Punt | None = None,
    ) -> None:
        self._tables, self._programs, self._selector, self._make = tables, programs, selector, make
        self._retry_at = 0.0
        self.due_at = 0.0 if port else float("inf")
        self.port = port
        if port:
            selector.register(port, selectors.EVENT_READ)
        self.report: dict[str, Any] = {"name": None, "why_not": ""}

    def keep(self) -> None:
        """Makes a port, at the start and when somebody has changed ours; says once why there is none."""
        if self.port and self._is_whole():
            self.report = {"name": self.port.name, "why_not": ""}
            return
        if time.monotonic() < self._retry_at:
            return
        self.drop()
        before = self.report["why_not"]
        try:
            self.port = self._make()
            self._put_to_use(self.port)
            self.report = {"name": self.port.name, "why_not": ""}
        except MasqError as error:
            self.drop()
            self._retry_at = time.monotonic() + RETRY_S
            self.report = {"name": None, "why_not": f"{error.what}: {error.why}"}
            if self.report["why_not"] != before:
                log.warning("no punt port: %s", error)

    def serve(self) -> None:
        """Does what has come, and what is due."""
        now = time.monotonic()
        self.due_at = now + PAUSE_S if self.port else float("inf")
        if not self.port:
            return
        try:
            self.port.receive(now)
        except OSError as error:  # somebody deleted it; the reconciliation that follows makes another
            log.warning("the punt port %s is gone: %s", self.port.name, error)
            self.drop()
            return
        pause = self.port.tick(now)
        self.due_at = float("inf") if pause is None else now + pause

    def hand_over(self) -> Punt | None:
        """The port, for somebody else to serve: what comes meanwhile waits in it."""
        port, self.port = self.port, None
        if port:
            self._selector.unregister(port)
        return port

    def drop(self) -> None:
        """Has none any more."""
        if self.port:
            self._tables.set_settings(punt=0)
            self._selector.unregister(self.port)
            self.port.close()
        self.port, self.due_at = None, float("inf")

    def _put_to_use(self, port: Punt) -> None:
        self._selector.register(port, selectors.EVENT_READ)
        link = netdev.link(port.name)
        if not attachment.uses_tcx():
            clsact.add(link.index)
        attachment.put(link, hooks.PUNT, self._programs)
        self._tables.set_settings(punt=link.index)

    def _is_whole(self) -> bool:
        if not self.port:
            return False
        hook, index = hooks.PUNT, self.port.ifindex
        link = next((link for link in netdev.links() if link.index == index and link.up), None)
        wanted = (hook.kind, self._programs[hook.function].id)
        return link is not None and wanted in attachment.tc_programs(link)
