"""Which ALGs there are: the house's own, and those of other packages, by the entry point group ``xdpmasq.alg``.

An ALG is loaded when it is asked for by name: a package that is broken harms nobody who does not use its ALG.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points

from xdpmasq.alg.api import Alg
from xdpmasq.errors import ConfigError

GROUP = "xdpmasq.alg"

# Modules of this package, whose names are the ALGs' names: one a line.
BUILT_IN = (
    "amanda:Amanda",
    "cuseeme:Cuseeme",
    "ftp:Ftp",
    "h323:H323",
    "icq:Icq",
    "irc:Irc",
    "netbios:Netbios",
    "pna:Pna",
    "pptp:Pptp",
    "quake:Quake",
    "rtsp:Rtsp",
    "sane:Sane",
    "sip:Sip",
    "snmp:Snmp",
    "tftp:Tftp",
    "vdolive:Vdolive",
)


def names() -> tuple[str, ...]:
    """Of all ALGs that can be enabled, in alphabetical order; none is loaded.

    Raises:
        ConfigError: two have the same name.
    """
    return tuple(sorted(_places()))


def find(name: str) -> Alg:
    """Raises ConfigError: there is none of that name, or it cannot be used."""
    places = _places()
    if name not in places:
        raise ConfigError(f"there is no ALG {name}", do=f"there are {', '.join(sorted(places))}")
    return _load(name, places[name])


def by_name() -> dict[str, Alg]:
    """All of them, loaded.

    Raises:
        ConfigError: two have the same name, or one cannot be used.
    """
    return {name: _load(name, place) for name, place in sorted(_places().items())}


def by_port(enabled: Mapping[str, Mapping[str, Iterable[int]] | None]) -> dict[tuple[str, int], Alg]:
    """Who reads the sessions with a server's port: (protocol, port) to ALG.

    Args:
        enabled: name to ports by protocol; None: the ports that the ALG itself names.

    Raises:
        ConfigError: there is no such ALG or port, or two would read the same sessions.
    """
    readers: dict[tuple[str, int], Alg] = {}
    for name, ports in enabled.items():
        alg = find(name)
        for protocol, numbers in (alg.ports if ports is None else ports).items():
            if protocol not in alg.ports:
                raise ConfigError(f"the ALG {name} does not read {protocol}", do=f"it reads {', '.join(alg.ports)}")
            for number in numbers:
                _check_port(name, number)
                other = readers.setdefault((protocol, number), alg)
                if other.name != name:
                    raise ConfigError(
                        f"the ALGs {other.name} and {name} both read {protocol} port {number}",
                        do="enable one of them, or give one other ports",
                    )
    return readers


def _places() -> dict[str, EntryPoint]:
    places: dict[str, EntryPoint] = {}
    for place in [*_built_in(), *entry_points(group=GROUP)]:
        if place.name in places:
            raise ConfigError(
                f"there are two ALGs called {place.name}",
                f"{places[place.name].value} and {place.value}",
                "uninstall the package of one of them",
            )
        places[place.name] = place
    return places


def _built_in() -> list[EntryPoint]:
    return [EntryPoint(each.partition(":")[0], f"{__package__}.{each}", GROUP) for each in BUILT_IN]


def _load(name: str, place: EntryPoint) -> Alg:
    try:
        kind = getattr(importlib.import_module(place.module), place.attr)
        if not (isinstance(kind, type) and issubclass(kind, Alg)):
            raise TypeError("it is no subclass of xdpmasq.alg.api.Alg")
        alg = kind()
        if alg.name != name:
            raise ValueError(f"it calls itself {alg.name}")
        for protocol, numbers in alg.ports.items():
            if protocol not in {"tcp", "udp"}:
                raise ValueError(f"{protocol} is neither tcp nor udp")
            for number in numbers:
                _check_port(name, number)
    except ConfigError:
        raise
    except Exception as error:  # it is somebody else's code: whatever it raises is said in words
        raise ConfigError(f"the ALG {name} cannot be used", f"{place.value}: {error}") from error
    return alg


def _check_port(name: str, number: int) -> None:
    if not 0 < number < 65536:
        raise ConfigError(f"the ALG {name} cannot read port {number}", do="ports are 1 to 65535")
