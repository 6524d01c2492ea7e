"""Packets on two CPUs and the reaper at once: whatever the order, the tables agree with each other afterwards."""

import os
import random
import struct
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
from harness import GATEWAY, HOST, OTHER_HOST, SERVER, Bench, Gateway, age, udp, wan_frame, wire

from xdpmasq import bpf, source
from xdpmasq.abi import (
    FURTHER_BASE,
    LIFE_FURTHER_MASK,
    LIFE_LIVE,
    LIFE_STATE,
    PORTS,
    REAP_EXPIRED,
    REAP_FORCED,
    REAP_RESTED,
)
from xdpmasq.lab import netns

two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
RUNS, HOSTS, ENDPOINTS, REMOTES = 15_000, 2, 20, 3


# Claims used as locks: whoever has one must be alone. Eight of them, within one word.
LOCKS = """
BPF_TABLE("array", u32, u64, guards, 8);
BPF_TABLE("percpu_array", u32, u64, tally, 2); /* taken, taken by two */

int take_and_put_back(struct __sk_buff *skb)
{
	u32 at[2] = { 0, 1 };
	u64 *taken = tally.lookup(&at[0]), *twice = tally.lookup(&at[1]);

	if (!taken || !twice)
		return 0;
#pragma clang loop unroll(disable)
	for (u32 i = 0; i < 512; i++) {
		u32 slot = i % 8;
		volatile u64 *guard = guards.lookup(&slot);

		if (!guard || !slot_claim(slot))
			continue;
		++*guard;
		if (*guard != 1)
			++*twice;
		--*guard;
		++*taken;
		slot_release(slot);
	}
	return 0;
}
"""


def _packets(bench: Bench, seed: int) -> None:
    """A CPU's share outbound: few endpoints, so that they meet; results are not looked at."""
    rng = random.Random(seed)
    context = bytearray(192)
    struct.pack_into("<II", context, 36, bench.lan.index, bench.wan.index)
    frame = bytearray(wan_frame(udp(HOST, 0, SERVER, 53)))
    program = bench.programs["masq_wan_out"]
    for _ in range(RUNS):
        frame[29] = 2 + rng.randrange(HOSTS)
        frame[35], frame[37] = rng.randrange(ENDPOINTS), rng.randrange(REMOTES)
        program.test_run(bytes(frame), context=bytes(context), room=256)


def _knocks(bench: Bench, seed: int) -> None:
    """A CPU's share inbound, at a forward with two targets."""
    rng = random.Random(seed)
    context = bytearray(192)
    struct.pack_into("<II", context, 36, bench.wan.index, bench.wan.index)
    frame = bytearray(bytes(12) + b"\x08\x00" + wire(udp("45.0.0.0", 0, GATEWAY, 3000)))
    program = bench.programs["masq_wan_in"]
    for _ in range(RUNS):
        frame[29], frame[35], frame[37] = rng.randrange(8), rng.randrange(REMOTES), 0xB8 + rng.randrange(4)
        program.test_run(bytes(frame), context=bytes(context), room=256)


def _reaps(gateway: Gateway, seed: int) -> None:
    rng = random.Random(seed)
    reaper = gateway.bench.programs["masq_reap"]
    for _ in range(RUNS // 20):
        slots = np.array(gateway.slots(), np.uint32)
        if len(slots):
            age(gateway.tables.sessions[rng.choice(slots)], 301)
            order = rng.choice((REAP_FORCED, REAP_EXPIRED, REAP_RESTED))
            gateway.tables.reap(reaper, slots[:: rng.randrange(1, 4)], order)


def _in_namespace(name: str, cpu: int, *what: object) -> threading.Thread:
    def work() -> None:
        os.sched_setaffinity(0, {cpu})
        with netns.entered(name):
            what[0](*what[1:])  # type: ignore[operator]

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.req("4787-3")
@two_cpus
def test_no_two_cpus_claim_one_slot(namespace: str) -> None:
    compiled = bpf.compile(
        source.flatten(source.DATAPATH[: source.DATAPATH.index("mapping.h") + 1]) + LOCKS,
        {"EXTERNALS": 1, "FURTHER": 64},
    )
    program = compiled.load("take_and_put_back", "tc")
    first, second = sorted(os.sched_getaffinity(0))[:2]
    run = partial(program.test_run, bytes(14), repeat=3000)
    for thread in [_in_namespace(namespace, cpu, run) for cpu in (first, second)]:
        thread.join()
    taken, twice = (compiled.maps["tally"].get(i) for i in (0, 1))
    assert (taken > 100_000).sum() == 2
    assert twice.sum() == 0
    assert compiled.maps["claims"].get(0) == 0


@pytest.mark.req("4787-3")
@two_cpus
@pytest.mark.parametrize(
    ("first_port", "choice"),
    [
        pytest.param(3000, {}, id="random"),
        pytest.param(0, {"preserve": 1}, id="preserved, two hosts after each port"),
        pytest.param(3000, {"parity": 1}, id="parity"),
    ],
)
def test_tables_agree_afterwards(gateway: Gateway, namespace: str, first_port: int, choice: dict[str, int]) -> None:
    gateway.pool(udp=((first_port, 100),))
    gateway.tables.set_settings(**choice)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    threads = [
        _in_namespace(namespace, first, _packets, gateway.bench, 1),
        _in_namespace(namespace, second, _packets, gateway.bench, 2),
        _in_namespace(namespace, second, _reaps, gateway, 3),
    ]
    for thread in threads:
        thread.join()
    counted = gateway.counted()
    ended = {name: n for name, n in counted.items() if name.startswith(("slow", "own", "drop"))}
    assert sum(ended.values()) == 2 * RUNS
    assert ended["slow_outbound"] > RUNS / 10

    sessions = gateway.tables.sessions
    life = {slot: int(sessions["life"][slot]) for slot in gateway.slots()}
    live = {slot for slot, each in life.items() if each & LIFE_STATE == LIFE_LIVE}
    mapped = []
    for keys, slots in gateway.tables.maps["mappings"].items(16384):
        mapped += [int(slot) for slot in slots]
        theirs = sessions["in"][slots]
        assert (theirs["new_port"] == keys["port"]).all(), "and its slot tells whose it is"
        assert (theirs["new_addr"] == keys["addr"]).all()
    further = {slot for slot in live if slot >= FURTHER_BASE}
    assert Counter(mapped) == Counter(slot for slot in live if slot < FURTHER_BASE), "each mapping has its own slot"
    counts = Counter(int(sessions["mapping"][slot]) for slot in further)
    for slot in mapped:
        assert (life[slot] & LIFE_FURTHER_MASK) >> 8 == counts[slot]
    claimed = np.unpackbits(gateway.tables.claims.view(np.uint8), bitorder="little")
    pool = [*range(PORTS + first_port, PORTS + first_port + 100), *range(FURTHER_BASE, FURTHER_BASE + 256)]
    assert {slot for slot in pool if claimed[slot]} == set(life), "claimed is what is not free"
    opened = counted["session_opened"] + counted.get("session_reopened", 0)
    assert opened >= len(live)
    gateway.assert_tables_agree()


@two_cpus
@pytest.mark.parametrize("filtering", [0, 2], ids=["forwards", "open ports"])
def test_both_directions_and_the_reaper(gateway: Gateway, namespace: str, filtering: int) -> None:
    """Remotes knock at forwarded and at mapped ports while hosts open, embryos give way, and all is reaped."""
    gateway.pool(udp=((3000, 100),))
    gateway.tables.set_settings(filtering=(0, filtering, 0, 0), overload=1)
    gateway.forward("udp", 3000, (HOST, 1), (OTHER_HOST, 2))
    gateway.forward("udp", 3001, (HOST, 3))
    for place in range(4096):
        gateway.tables.maps["embryos"].set(place, PORTS + 3000 + place % 2)
    first, second = sorted(os.sched_getaffinity(0))[:2]
    threads = [
        _in_namespace(namespace, first, _packets, gateway.bench, 1),
        _in_namespace(namespace, second, _knocks, gateway.bench, 2),
        _in_namespace(namespace, second, _reaps, gateway, 3),
    ]
    for thread in threads:
        thread.join()
    counted = gateway.counted()
    ended = {name: n for name, n in counted.items() if name.startswith(("slow", "own", "drop"))}
    assert sum(ended.values()) == 2 * RUNS
    # How many forwards were opened depends on who is given the CPUs when.
    assert min(ended["slow_outbound"], ended["slow_inbound"], counted["forward_opened"]) > RUNS / 100
    gateway.assert_tables_agree()
