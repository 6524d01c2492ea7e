"""Mutated packets, many and seeded, by fuzz.c: whatever comes, no rule is broken, the tables agree with each other,
and XDP does as TC would. `make fuzz-packets` does the same for longer, and for two WANs.
"""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import FuzzBench, Fuzzed, build, fuzz, stand
from harness import NETWORK

from xdpmasq.lab import netns

ROUNDS, PACKETS = 4, 250_000


@pytest.fixture(scope="module")
def bench(as_root: None) -> Iterator[tuple[str, FuzzBench]]:
    """A bench of its own, whose counters can be seen by fuzz.c."""
    with stand(NETWORK) as made:
        yield made


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.req("attacks-leak")
@pytest.mark.req("reliability-fuzz")
def test_mutated_packets(bench: tuple[str, FuzzBench], program: Path) -> None:
    ends: Counter[str] = Counter()
    with netns.entered(bench[0]):
        for seed in range(ROUNDS):
            ends += fuzz(program, Fuzzed(bench[1], random.Random(seed)), seed, PACKETS)
    met = {name for name in ends if name != "runs"}
    assert len(met) >= 45, f"the packets meet few turns of the walk: {sorted(met)}"


def test_what_is_wrong_is_found(bench: tuple[str, FuzzBench], program: Path) -> None:
    """Told that another address is the only external one, fuzz.c finds the first packet translated to be wrong."""
    with netns.entered(bench[0]):
        gateway = Fuzzed(bench[1], random.Random(0))
        orders = [each for each in gateway.orders() if not each.startswith("external")]
        with pytest.raises(AssertionError, match="the new source is not an external address"):
            fuzz(program, gateway, 0, PACKETS, orders=[*orders, "external c0a80001"])
