"""Redirected connections from the LANs, and the destinations that redirects spare, in the kernel's tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Network
from typing import Any

import numpy as np
import numpy.typing as npt

from xdpmasq import abi, bpf, sessions
from xdpmasq.datapath import Attached
from xdpmasq.expiry import age, idle_limits
from xdpmasq.forwards import RULES_MOST
from xdpmasq.sessions import Table
from xdpmasq.tables import Tables

EVERY_RULE = RULES_MOST  # FORWARDS, as the rule of a spared destination
_RULE_BITS = 32  # of struct spared_key, before the address


# --- destinations left alone -----------------------------------------------------------------------


def spared(tables: Tables) -> dict[int, tuple[IPv4Network, ...]]:
    """By rule, what its redirect spares."""
    found: dict[int, list[IPv4Network]] = {}
    for keys, _ in tables.maps["spared"].items(chunk=tables.maps["spared"].max_entries):
        for key in keys:
            network = IPv4Network((key["addr"]["word"][:1].tobytes(), int(key["bits"]) - _RULE_BITS))
            found.setdefault(int(key["rule"]), []).append(network)
    return {rule: tuple(sorted(networks)) for rule, networks in found.items()}


def spare(tables: Tables, rule: int, wanted: Iterable[IPv4Network]) -> None:
    """Makes these, and no others, the destinations that a rule spares; what stays is never absent meanwhile."""
    keep = set(wanted)
    present = set(spared(tables).get(rule, ()))
    for network in keep - present:
        tables.maps["spared"].set(_spared_key(rule, network), 1)
    for network in present - keep:
        tables.maps["spared"].delete(_spared_key(rule, network))


def _spared_key(rule: int, network: IPv4Network) -> tuple[Any, ...]:
    return _RULE_BITS + network.prefixlen, rule, abi.addr(network.network_address)


def is_served(attached: Attached) -> bool:
    """All LANs bring answers back, so redirects work."""
    lans = [each for each in attached.manifest["interfaces"] if each["role"] == "lan" and each["hook"] != "none"]
    rows = [attached.maps["interfaces"].get(each["index"]) for each in lans]
    return all(int(row["redirect_to"]["word"][0]) for row in rows)


# --- connections -----------------------------------------------------------------------------------


def running(tables: Tables) -> npt.NDArray[np.intp]:
    """How many connections each rule has."""
    rules = [values["rule"][~_expired(tables, keys, values)] for keys, values in _connections(tables)]
    return np.bincount(np.concatenate([np.zeros(0, np.uint16), *rules]), minlength=RULES_MOST)


def end(tables: Tables, rule: int) -> int:
    """Ends the connections of a rule; returns how many."""
    return sum(_remove(tables, keys, values, values["rule"] == rule) for keys, values in _connections(tables))


def forget(tables: Tables) -> None:
    """Removes connections that are expired."""
    for keys, values in _connections(tables):
        _remove(tables, keys, values, _expired(tables, keys, values))


def listed(tables: Tables, hz: int) -> Iterator[Table]:
    """Connections as rows beside sessions; the external endpoint is the gateway's own."""
    for keys, values in _connections(tables):
        yield _rows(tables, keys, values, hz)[~_expired(tables, keys, values)]


def flush(tables: Tables, hz: int, choice: Callable[[Table], Table]) -> int:
    """Ends the connections that are chosen from their rows; returns how many."""
    ended = 0
    for keys, values in _connections(tables):
        rows = _rows(tables, keys, values, hz)
        chosen = choice(rows[~_expired(tables, keys, values)]).slot
        ended += _remove(tables, keys, values, np.isin(rows.slot, chosen))
    return ended


def _rows(tables: Tables, keys: Any, values: Any, hz: int) -> Table:
    idle = np.maximum(age(bpf.jiffies(), values["last_seen"]), 0)
    seen = values["tcp_seen"]
    limits = idle_limits(tables.settings, seen[:, 0], seen[:, 1], keys["class"] * abi.PORTS)
    ends = (
        sessions.endpoints(keys["client"], keys["client_port"]),
        sessions.endpoints(values["local"], values["local_port"]),
        sessions.endpoints(keys["server"], keys["server_port"]),
    )
    sent, left = (values["packets"], values["bytes"]), (limits - idle) / hz
    return sessions.beside("REDIRECTED", keys["class"], ends, sent=sent, idle_s=idle / hz, remaining_s=left)


def any_running(tables: Tables) -> bool:
    return any(len(keys) for keys, _ in _connections(tables))


def _connections(tables: Tables) -> Iterator[tuple[Any, Any]]:
    """Keys and values of ``redirects``."""
    table = tables.maps["redirects"]
    yield from table.items(chunk=table.max_entries)


def _expired(tables: Tables, keys: Any, values: Any) -> npt.NDArray[np.bool_]:
    now = bpf.jiffies()
    client, gateway = values["tcp_seen"][:, 0], values["tcp_seen"][:, 1]
    limits = idle_limits(tables.settings, client, gateway, keys["class"] * abi.PORTS)
    expired: npt.NDArray[np.bool_] = age(now, values["last_seen"]) > limits
    return expired


def _remove(tables: Tables, keys: Any, values: Any, which: npt.NDArray[np.bool_]) -> int:
    answers = tables.maps["answers"]
    for key, value in zip(keys[which], values[which], strict=True):
        tables.maps["redirects"].delete(key)
        answer = (key["client"], value["local"], value["client_port"], value["local_port"], key["class"])
        found = answers.get(answer)
        if found is not None and found.tobytes() == key.tobytes():  # else another connection has it by now
            answers.delete(answer)
    return int(which.sum())
