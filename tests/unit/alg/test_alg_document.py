"""The example of docs/alg.md works, and its table tells the truth."""

import functools
import random
import re
import sys
import tomllib
import types
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from talks import Talk, check, inside, outside
from test_alg_fuzz import one_input

from xdpmasq.alg import registry
from xdpmasq.alg.api import Alg

DOCUMENT = (Path(__file__).parents[3] / "docs" / "alg.md").read_text()
Said = functools.partial(Talk, port=5170)

CONVERSATIONS = [
    Said(
        "an invitation",
        [inside(b"HELLO a\r\nTALK 192.168.1.10 5000\r\n", b"HELLO a\r\nTALK 203.0.113.1 40000\r\n")],
        ["tcp 5000 at 40000 for 198.51.100.7"],
    ),
    Said("another host's", [inside(b"TALK 192.168.1.11 5000\r\n")]),
    Said("below 1024", [inside(b"TALK 192.168.1.10 1023\r\n")]),
    Said("from outside", [outside(b"TALK 192.168.1.10 5000\r\n")]),
    Said("a browser's request", [inside(b"POST / HTTP/1.1\r\nHost: a\r\n\r\nTALK 192.168.1.10 5000\r\n")]),
]


def block(language: str) -> str:
    [text] = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return str(text)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Alg:
    """As it is found when its package has been installed."""
    points = tomllib.loads(block("toml"))["project"]["entry-points"][registry.GROUP]
    places = [EntryPoint(name, value, registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: places)
    module = types.ModuleType(places[0].module)
    exec(block("python"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return registry.find("talk")


def test_the_example_is_short() -> None:
    assert len(block("python").splitlines()) < 40


@pytest.mark.parametrize("said", CONVERSATIONS, ids=lambda said: said.id)
def test_the_example_works(talk: Alg, said: Talk) -> None:
    check(talk, said)


def test_the_example_does_no_harm(talk: Alg) -> None:
    chance = random.Random(1)
    for _ in range(1000):
        one_input(talk, chance.choice(CONVERSATIONS), bytes, chance)


def test_the_table_has_every_alg_with_its_ports_and_pinholes() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \| (\d+) \|", DOCUMENT, re.MULTILINE)
    told = {name: (ports, int(pinholes)) for name, ports, pinholes in rows}
    for line in registry.BUILT_IN:
        alg = registry.find(line.partition(":")[0])
        ports = {number for numbers in alg.ports.values() for number in numbers}
        assert {int(number) for number in re.findall(r"\d+", told[alg.name][0])} == ports
        assert {each.lower() for each in re.findall("TCP|UDP", told[alg.name][0])} == set(alg.ports)
        assert told[alg.name][1] == alg.pinholes
