"""The one list of the metrics there are: names, labels, help texts, and how many series each may have.

docs/metrics.md is made from it. Counters of the programs stand in bpf/counters.h; those that tell why a packet ended
somewhere, or on which path it was translated, are series of one family here, the others families of their own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from xdpmasq import source

PREFIX = "xdpmasq_"

Kind = Literal["counter", "gauge", "info", "summary"]


@dataclass(frozen=True)
class Family:
    """Metrics of one name.

    Attributes:
        name: without :data:`PREFIX`, and as Prometheus' rules want it: base units, counters end in ``_total``.
        most: how many series there are at most, in words.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    most: str = "1"


def _counter(name: str, help: str, *labels: str, most: object = 1) -> Family:
    return Family(f"{name}_total", "counter", help, labels, str(most))


def _gauge(name: str, help: str, *labels: str, most: object = 1) -> Family:
    return Family(name, "gauge", help, labels, str(most))


_COUNTERS = source.counters()
_KINDS = Counter(name.partition("_")[0] for name in _COUNTERS)

_TRANSLATED_BY = ("interface", "path", "direction", "kind")
_MOST_TRANSLATED = f"{_KINDS['fast'] + _KINDS['slow']} × WANs"
TRANSLATED = _counter(
    "translated_packets",
    "Packets translated, fast by XDP or slow by TC, by WAN. Hairpinned and redirected ones pass none and have "
    "another direction. A super-packet (GRO, GSO) counts as one.",
    *_TRANSLATED_BY,
    most=_MOST_TRANSLATED,
)
TRANSLATED_BYTES = _counter(
    "translated_bytes", "The same in bytes, by the length in the IP header.", *_TRANSLATED_BY, most=_MOST_TRANSLATED
)
# By the first word of a counter's name; the rest of it is the label.
BY_REASON = {
    "up": _counter("passed_up_packets", "Packets that XDP left to the slow path.", "reason", most=_KINDS["up"]),
    "own": _counter("own_packets", "Packets that are not ours to translate.", "reason", most=_KINDS["own"]),
    "punt": _counter("punted_packets", "Packets that went by way of the agent.", "reason", most=_KINDS["punt"]),
    "drop": _counter("dropped_packets", "Packets dropped.", "reason", most=_KINDS["drop"]),
}
# The turns of a session's life, by their help texts.
TURNS = {
    name: _counter(name, f"{text[0].upper()}{text[1:]}.")
    for name, text in _COUNTERS.items()
    if name.partition("_")[0] not in (*BY_REASON, "fast", "slow")
}


def _agent() -> Iterator[Family]:
    yield Family("build_info", "info", "The running agent's version.", ("version",))
    yield _gauge("working", "Whether hosts can be masqueraded: the WAN, its address and a LAN are there.")
    yield _gauge("attach_time_seconds", "When the datapath was attached, since the epoch.")
    yield _gauge("agent_start_time_seconds", "When the agent was started, since the epoch.")
    yield _gauge("agent_last_tick_time_seconds", "When the agent last did its round, since the epoch.")
    yield _counter("agent_restarts", "Agents that went on with what an earlier one had left.")
    yield Family("expiry_duration_seconds", "summary", "What the agent's passes over the session table take.")
    yield _gauge("collect_duration_seconds", "What collecting these metrics took.")
    yield _counter("collect_errors", "Parts of a collection that failed and were left out.")


def _interfaces() -> Iterator[Family]:
    one, all_ = "interface", "interfaces, and the punt port"
    yield _gauge("interface_hook", "1 for the hook that translates.", one, "role", "hook", most="3 × interfaces")
    yield _counter("interface_receive_packets", "Packets of any kind that came in.", one, most=all_)
    yield _counter("interface_receive_bytes", "Bytes that came in.", one, most=all_)
    yield _counter("interface_receive_dropped", "Packets that the device dropped coming in.", one, most=all_)
    yield _counter("interface_transmit_packets", "Packets of any kind that went out.", one, most=all_)
    yield _counter("interface_transmit_bytes", "Bytes that went out.", one, most=all_)
    yield _counter("interface_transmit_dropped", "Packets that the device dropped going out.", one, most=all_)
    yield _counter("interface_carrier_changes", "How often the link has come or gone.", one, most=all_)
    yield _counter("wan_changes", "How often the WAN came, went or got another address.")


def _sessions() -> Iterator[Family]:
    ports = "3 × external addresses"
    yield _gauge("sessions", "Sessions in the table.", "protocol", "state", most=11)
    yield _gauge("carried_packets", "Packets carried by the sessions in the table.", "protocol", "direction", most=6)
    yield _gauge("carried_bytes", "IP bytes carried by the sessions in the table.", "protocol", "direction", most=6)
    yield _gauge("further_sessions", "Sessions beyond the first of their mapping, just ended ones included.")
    yield _gauge("further_sessions_room", "Places for further sessions.")
    yield _gauge("external_ports", "External ports in use.", "address", "protocol", "use", most=f"3 × {ports}")
    yield _gauge("external_ports_pool", "External ports to choose from.", "address", "protocol", most=ports)
    yield _gauge(
        "port_blocks", "Port blocks that hosts have, and free ones, where ports are given out in blocks.",
        *("address", "use"), most="2 × external addresses",
    )  # fmt: skip
    rule = ("kind", "side", "protocol", "ports", "source")
    yield _counter(
        "forward_sessions", "Sessions by way of a forward, redirect or trigger.", *rule, most="1,024 rules"
    )
    yield _gauge("leased_forwards", "Forwards that hosts have asked for.")
    yield _counter("next_hop_disarms", "How often all accelerated flows were to ask the kernel for their next hop.")


def _kernel() -> Iterator[Family]:
    yield _gauge("map_entries", "Entries of a BPF map.", "map", most="hashes that are counted")
    yield _gauge("map_max_entries", "Entries that a BPF map has room for.", "map", most="hashes that are counted")
    yield _counter("program_runs", "Runs of a BPF program.", "program", most=11)
    yield _counter("program_run_time_seconds", "Time spent in a BPF program.", "program", most=11)


def _punts() -> Iterator[Family]:
    yield _gauge("punt_port_up", "Whether the agent has its port for what the programs cannot settle.")
    yield _gauge("fragments_held", "Fragments that wait in the agent for their first.")
    yield _counter("held_fragments", "Fragments that came to the agent, and what became of them.", "outcome", most=4)
    yield _counter("refusals", "Senders of refused packets, told by ICMP or not.", "outcome", most=2)


def _algs() -> Iterator[Family]:
    yield _counter("alg_messages", "Messages that an ALG has been given to read.", "alg", most="ALGs")
    outcomes = "edited; or passed unchanged: unparsed, refused (no pinhole), failed, late, unasked (it pauses)"
    yield _counter("alg_outcomes", f"What became of them: {outcomes}.", "alg", "outcome", most="6 × ALGs")
    yield _gauge("pinholes", "Pinholes that are open.", "protocol", most=2)


def _log() -> Iterator[Family]:
    yield _counter("log_records", "Records of sessions or mappings handed over.", "target", most=3)
    yield _counter("log_lost_records", "Records lost, as a target took none for too long.", "target", most=3)
    yield _gauge("log_waiting_records", "Records that wait for a target.", "target", most=3)
    yield _counter("log_missed_events", "Events that came too fast to become records.")
    yield _counter("log_repeated_refusals", "Refusals left out of the log, as they repeated another within a second.")


def _hosts() -> Iterator[Family]:
    yield _gauge("host_sessions", "Sessions of an internal host.", "host", most="top_hosts")
    yield _counter("host_bytes", "IP bytes its sessions have carried.", "host", "direction", most="2 × top_hosts")
    yield _gauge("host_external_ports", "External ports that it has.", "host", "protocol", most="3 × top_hosts")
    yield _counter("host_refused_sessions", "Sessions refused to it.", "host", most="top_hosts")


FAMILIES = {
    family.name: family
    for family in (
        *(*_agent(), *_interfaces(), TRANSLATED, TRANSLATED_BYTES, *BY_REASON.values(), *TURNS.values()),
        *(*_sessions(), *_kernel(), *_punts(), *_algs(), *_log(), *_hosts()),
    )
}
