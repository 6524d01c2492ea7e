"""The agent's process: it begins, hands over to another agent at every reload, and ends."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

from xdpmasq import adoption, checks, datapath, notify, presence, rules
from xdpmasq.agent import Agent
from xdpmasq.alg.service import Service
from xdpmasq.config import Config
from xdpmasq.errors import DatapathError, MasqError
from xdpmasq.namespace import Name
from xdpmasq.programs import Programs
from xdpmasq.punt import Punt
from xdpmasq.recorder import recording
from xdpmasq.signals import Signals
from xdpmasq.tables import Tables

log = logging.getLogger("xdpmasq")

Begun = tuple[Agent, contextlib.ExitStack]  # and what is to be closed after it
Left = tuple[Programs | None, Service | None, Punt | None]  # and the punt port, which goes on


def run(config: Config, ready: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Attaches (or adopts what is attached), then follows the machine until told to stop.

    Raises:
        MasqError: before anything has changed, or with everything put back.
    """
    checks.check_host()
    signals, name = Signals(), Name()  # before we are seen to run: it may be deleted at once
    with presence.being_agent(config.wans):
        with presence.changing():
            begun = _begin(config, signals)
        while begun:
            agent, stack = begun
            with stack:
                wanted = agent.serve(ready, signals, name)
                if wanted is None:
                    notify.send(notify.STOPPING)
                with presence.changing():
                    if wanted is None:
                        agent.stop()
                        return
                    port = agent.give_way(wanted)
            with presence.changing():
                begun = _go_on(config, wanted, (agent.programs, agent.algs, port), signals)
            config = begun[0].config if begun else config
            del agent
            gc.collect()  # it refers to itself in many ways, and has a large table mapped


def _begin(
    config: Config,
    signals: Signals,
    left: Left = (None, None, None),
    *,
    anyhow: bool = False,
) -> Begun | None:
    """An agent at work; None: it was stopped before it had begun.

    Args:
        left: what the agent before has left in this process.
        anyhow: what cannot be attached to is tried again later.
    """
    if not anyhow:
        checks.check_interfaces(config)
    programs, algs, port = left
    with contextlib.ExitStack() as stack:
        show = stack.enter_context(_showing(config))
        recorder = stack.enter_context(recording(config.log))
        adopted: Tables | None = programs.tables if programs else datapath.find_of(config.wans)
        agent = Agent(
            config, programs or adoption.programs_for(config, adopted), adopted, recorder, algs=algs, port=port
        )
        if signals.stop:
            return None
        agent.start(anyhow=anyhow)
        show(agent)
        return agent, stack.pop_all()


def _go_on(
    config: Config, wanted: Config, left: tuple[Programs, Service, Punt | None], signals: Signals
) -> Begun | None:
    """With another configuration, or where that fails with the one that there was."""
    programs, algs, port = left
    before = {*rules.placed(programs.tables), *config.rules}
    failed: MasqError | None = None
    try:
        begun = _begin(wanted, signals, left)
    except Exception as error:
        failed = error if isinstance(error, MasqError) else DatapathError("the agent failed", repr(error))
        log.warning("going on as before: %s", failed)
        rules.take(programs.tables, programs["masq_reap"], [rule for rule in wanted.rules if rule not in before])
        left = programs, algs, port if port and port.is_open else None
        begun = _begin(config, signals, left, anyhow=True)
    if begun:
        begun[0].note_reload(failed)
    return begun


@contextlib.contextmanager
def _showing(config: Config) -> Iterator[Callable[[Agent], None]]:
    """Holds the place where metrics are served, and begins to serve those of an agent."""
    if not config.metrics.enabled:
        yield lambda agent: None
        return
    from xdpmasq import metrics  # noqa: PLC0415  heavy

    with metrics.listening(config.metrics) as show:
        yield lambda agent: show(
            metrics.Subject(agent.tables, agent.programs, agent.manifest, agent.pulse, agent.punting, agent.recorder)
        )
