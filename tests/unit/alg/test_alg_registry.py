"""ALGs by name and by port, the house's own and others'."""

import sys
import types
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from fakes import session

from xdpmasq.alg import registry
from xdpmasq.alg.api import Alg, Side
from xdpmasq.errors import ConfigError


def installed(monkeypatch: pytest.MonkeyPatch, name: str, attributes: dict[str, Any] | None = None) -> None:
    """A package with an ALG, found by its entry point, beside those that have been installed by this before."""
    module = types.ModuleType(f"package_{name}")
    fields = {"name": name, "ports": {"tcp": (5170,)}, **(attributes or {})}
    vars(module)["Made"] = type("Made", (Alg,), fields)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    before = vars(registry)["entry_points"](group=registry.GROUP)
    there = [*before, EntryPoint(name, f"{module.__name__}:Made", registry.GROUP)]
    monkeypatch.setattr(registry, "entry_points", lambda group: there)


def test_every_one_of_the_house_is_found_by_the_name_of_its_module() -> None:
    own = registry.by_name()
    assert {"ftp", "irc", "pna", "rtsp", "sip", "tftp"} <= set(own)
    assert tuple(own) == registry.names() == tuple(sorted(registry.names()))
    for name, alg in own.items():
        assert alg.name == name == registry.find(name).name
        assert type(alg).__module__ in {f"xdpmasq.alg.{name}", f"package_{name}"}


def test_the_ports_of_the_house_s_own_do_not_collide() -> None:
    readers = registry.by_port(dict.fromkeys(registry.names()))
    assert readers["tcp", 21].name == "ftp"
    assert readers["udp", 5060] is readers["tcp", 5060]


def test_others_are_found_by_their_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "talk")
    assert "talk" in registry.names()
    assert registry.find("talk").ready(b"abc", Side.INSIDE, session(21)) == 3
    assert registry.by_port({"ftp": None, "talk": {"tcp": [2121]}})["tcp", 2121].name == "talk"


@pytest.mark.parametrize("name", ["ftp", "talk"])
def test_two_of_one_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    installed(monkeypatch, "talk")
    installed(monkeypatch, name)
    with pytest.raises(ConfigError, match=f"there are two ALGs called {name}: .* and .*; uninstall"):
        registry.names()


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match=r"there is no ALG gopher; there are .*ftp"):
        registry.find("gopher")


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"name": "other"}, "it calls itself other"),
        ({"ports": {"sctp": (1,)}}, "sctp is neither tcp nor udp"),
        ({"ports": {"tcp": (0,)}}, "cannot read port 0"),
        ({"ports": None}, "NoneType"),
        ({"__init__": lambda self: 1 / 0}, "division by zero"),
    ],
    ids=["its name", "its protocol", "its port", "no ports", "it breaks"],
)
def test_one_that_cannot_be_used_harms_who_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, Any], why: str
) -> None:
    installed(monkeypatch, "talk", attributes)
    assert "talk" in registry.names()
    assert registry.find("ftp").name == "ftp"
    with pytest.raises(ConfigError, match=why):
        registry.find("talk")


def test_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    place = EntryPoint("talk", "no_such_package:Talk", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [place])
    with pytest.raises(ConfigError, match="the ALG talk cannot be used: no_such_package:Talk: No module"):
        registry.find("talk")


def test_one_that_is_no_alg(monkeypatch: pytest.MonkeyPatch) -> None:
    place = EntryPoint("talk", "xdpmasq.alg.api:Endpoint", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [place])
    with pytest.raises(ConfigError, match="it is no subclass"):
        registry.find("talk")


@pytest.mark.parametrize(
    ("enabled", "why"),
    [
        ({"ftp": None, "irc": {"tcp": [6667, 21]}}, "the ALGs ftp and irc both read tcp port 21"),
        ({"ftp": {"udp": [21]}}, "the ALG ftp does not read udp; it reads tcp"),
        ({"ftp": {"tcp": [65536]}}, "the ALG ftp cannot read port 65536; ports are 1 to 65535"),
        ({"gopher": None}, "there is no ALG gopher"),
    ],
    ids=["the same port", "the protocol", "no port", "no ALG"],
)
def test_what_cannot_be_enabled(enabled: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        registry.by_port(enabled)


def test_a_port_named_twice_for_the_same_alg() -> None:
    assert set(registry.by_port({"ftp": {"tcp": [21, 21]}})) == {("tcp", 21)}
