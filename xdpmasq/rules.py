"""The configuration's forwards, redirects and triggers: put in place when it comes, taken out when it goes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from xdpmasq import bpf, forwarding, sockets
from xdpmasq.config import Config
from xdpmasq.errors import ForwardError
from xdpmasq.forwards import Rule
from xdpmasq.net import netdev
from xdpmasq.tables import Tables
from xdpmasq.topology import Topology

log = logging.getLogger("xdpmasq")


def put(tables: Tables, reaper: bpf.Program, config: Config, here: Topology, *, anyhow: bool) -> None:
    """Before any interface is attached to. What is in place stays as it is.

    Args:
        anyhow: a rule that does not fit keeps nobody from going on.

    Raises:
        ForwardError: it does not, and nothing runs yet.
    """
    if not config.rules:
        return
    addressed = {each.index for each in here.addresses}
    lans_known = all(netdev.match_links([each], here.lans) for each in config.lans)
    lans_known &= all(link.index in addressed for link in here.lans)
    services = list(sockets.listeners())
    present = placed(tables)
    for rule in config.rules:
        if rule in present:
            continue
        try:
            forwarding.check(tables, rule, lans_known=lans_known, services=services)
            forwarding.put(tables, reaper, rule)
        except ForwardError as error:
            if not anyhow:
                raise
            log.warning("not in place: %s", error)


def placed(tables: Tables) -> set[Rule]:
    """All that are in place, whoever put them there."""
    return {each.rule for each in forwarding.read(tables)}


def take(tables: Tables, reaper: bpf.Program, rules: Sequence[Rule]) -> None:
    """Those of these that are in place."""
    if found := [each for each in forwarding.read(tables) if each.rule in rules]:
        forwarding.take(tables, reaper, *found)
