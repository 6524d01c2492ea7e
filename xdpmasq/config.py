"""What the user wants: settings, defaults with units, and checking them whole before anything changes.

A file and the command line both end in a :class:`Config` that :func:`validate` has passed. Whatever is
wrong in a file is named by line, value and what is allowed there; nothing unknown is skipped.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, Literal, get_args

from xdpmasq.errors import ConfigError, UsageError

Mode = Literal["auto", "xdp", "tc"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Timeouts:
    """Idle times after which a session ends, in seconds (RFC 5382 REQ-5, RFC 4787 REQ-5, RFC 5508 REQ-2)."""

    tcp_established_s: int = 7440
    tcp_transitory_s: int = 240
    udp_s: int = 300
    icmp_s: int = 60
    fragment_s: int = 30
    port_rest_s: int = 120  # RFC 6888 REQ-8


@dataclass(frozen=True)
class Ports:
    """External ports to choose from; the host's own ephemeral range is always left out."""

    first: int = 1024
    last: int = 65535


@dataclass(frozen=True)
class Config:
    """One gateway.

    Attributes:
        wan: the interface whose address is shared, or a wildcard of which the first that is up counts; empty
            while neither file nor options have named it.
        lans: interfaces of internal networks; shell wildcards allowed (``lan*``, ``ppp*``).
        mode: where established flows are translated.
        internal: prefixes behind the LANs that no route tells of.
        further_sessions: room for sessions beyond the first of each mapping; a power of two.
        inbound_refresh: inbound packets keep a mapping alive (RFC 4787 REQ-6).
        rearm_s: an accelerated flow shows itself to the kernel this often.
    """

    wan: str
    lans: tuple[str, ...]
    mode: Mode = "auto"
    internal: tuple[IPv4Network, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    ports: Ports = field(default_factory=Ports)
    further_sessions: int = 262144
    inbound_refresh: bool = True
    rearm_s: int = 20


def load(path: Path) -> Config:
    """Reads and checks a TOML file. WAN and LANs may be missing from it: options can still name them.

    Raises:
        ConfigError: with file, line, value and what is allowed.
    """
    document = _Document.read(path)
    document.refuse_unknown()
    get = document.get
    config = Config(
        wan=get("interfaces.wan", ""),
        lans=tuple(get("interfaces.lan", [])),
        mode=get("interfaces.mode", "auto"),
        internal=tuple(document.prefix(text) for text in get("interfaces.internal", [])),
        timeouts=Timeouts(**document.table("timeouts")),
        ports=Ports(**document.table("ports")),
        further_sessions=get("sessions.further", Config.further_sessions),
        inbound_refresh=get("sessions.inbound_refresh", Config.inbound_refresh),
    )
    for problem in _problems(config):
        raise document.error(problem)
    return config


def from_options(wan: str | None, lans: Sequence[str], mode: str | None, base: Config | None) -> Config:
    """What file and command line want together: an option given replaces what the file says.

    Raises:
        UsageError: no WAN or no LAN is named anywhere, or the mode is none.
        ConfigError: the two together are not possible.
    """
    if mode and mode not in MODES:
        raise UsageError(f"there is no mode {mode}", "", f"give one of {', '.join(MODES)}")
    base = base or Config(wan="", lans=())
    chosen: Mode = mode if mode else base.mode
    config = replace(base, wan=wan or base.wan, lans=tuple(lans) or base.lans, mode=chosen)
    if not config.wan:
        raise UsageError("no WAN interface named", "", "give --wan NAME, or wan in [interfaces] of --config FILE")
    if not config.lans:
        raise UsageError("no LAN interface named", "", "give --lan NAME, or lan in [interfaces] of --config FILE")
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    for problem in _problems(config):
        raise ConfigError(problem.what, problem.why, problem.do)


def advice(config: Config) -> list[str]:
    """Sentences about settings that are allowed but fall short of an RFC."""
    values = {key: _value(config, key) for key, bound in _BOUNDS.items() if bound.advised}
    return [
        f"{key} = {value} is less than the {_BOUNDS[key].advised} s of {_BOUNDS[key].clause}"
        for key, value in values.items()
        if value < _BOUNDS[key].advised
    ]


# --- what is allowed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """A wrong setting: its key, the value at fault, why it is wrong, what to do."""

    key: str
    value: object
    why: str
    do: str = ""

    @property
    def what(self) -> str:
        return f"{self.key} = {json.dumps(self.value, default=str, ensure_ascii=False)}"


@dataclass(frozen=True)
class _Bound:
    """From and to (both allowed) of a number, why, and what an RFC advises beyond that."""

    low: int
    high: int
    reason: str
    advised: int = 0
    clause: str = ""

    @property
    def allowed(self) -> str:
        return f"allowed is {self.low} to {self.high}, {self.reason}"


# Every flow that XDP carries shows itself to the slow path each rearm_s, and the agent looks for idle
# sessions in turns of seconds: timers near these would end sessions that are in use.
_IDLE_LOW = 3 * Config.rearm_s
_IDLE_HIGH = 1_000_000  # at 1,000 jiffies a second still far from 2³¹, where idle times would turn negative
_IDLE = f"since accelerated flows are looked at every {Config.rearm_s} s, and times are counted in 31 bits of jiffies"

_BOUNDS = {
    "timeouts.tcp_established_s": _Bound(_IDLE_LOW, _IDLE_HIGH, _IDLE, 7440, "RFC 5382 REQ-5"),
    "timeouts.tcp_transitory_s": _Bound(_IDLE_LOW, _IDLE_HIGH, _IDLE, 240, "RFC 5382 REQ-5"),
    "timeouts.udp_s": _Bound(_IDLE_LOW, _IDLE_HIGH, _IDLE, 120, "RFC 4787 REQ-5"),
    "timeouts.icmp_s": _Bound(_IDLE_LOW, _IDLE_HIGH, f"{_IDLE} (RFC 5508 REQ-2 asks for 60 s)"),
    "timeouts.fragment_s": _Bound(1, 30, "as the kernel itself waits no longer for the rest of a packet"),
    "timeouts.port_rest_s": _Bound(0, 3600, "as resting ports are lost to the pool", 120, "RFC 6888 REQ-8"),
    "ports.first": _Bound(1024, 65535, "as lower ports belong to the gateway's own services"),
    "ports.last": _Bound(1024, 65535, "as lower ports belong to the gateway's own services"),
    "sessions.further": _Bound(1024, 4194304, "and only powers of two, since the table is one of 128 B records"),
}
_PORTS_LEAST = 64  # a word of the bitmap in which ports are claimed
_NAME_BYTES = 15  # IFNAMSIZ without its NUL


def _value(config: Config, key: str) -> int:
    if key == "sessions.further":
        return config.further_sessions
    table, name = key.split(".")
    return int(getattr(getattr(config, table), name))


def _problems(config: Config) -> Iterator[_Problem]:
    yield from _interface_problems(config)
    for key, bound in _BOUNDS.items():
        value = _value(config, key)
        if not bound.low <= value <= bound.high:
            yield _Problem(key, value, bound.allowed)
    yield from _relation_problems(config)


def _interface_problems(config: Config) -> Iterator[_Problem]:
    if config.wan:
        yield from _name_problems("interfaces.wan", config.wan)
    for pattern in config.lans:
        yield from _name_problems("interfaces.lan", pattern)
        # either may be a wildcard, and a pattern fits narrower patterns, too
        if fnmatch.fnmatchcase(config.wan, pattern) or fnmatch.fnmatchcase(pattern, config.wan):
            why = f"it fits the WAN {config.wan} as well; LAN and WAN on one interface (one-armed) do not work"
            yield _Problem("interfaces.lan", pattern, why, "name interfaces other than the WAN")
    if config.mode not in MODES:
        yield _Problem("interfaces.mode", config.mode, f"allowed is {', '.join(MODES)}")
    for network in config.internal:
        if network.prefixlen == 0:
            yield _Problem("interfaces.internal", str(network), "then every address would be internal")


def _name_problems(key: str, name: str) -> Iterator[_Problem]:
    if not 1 <= len(name.encode()) <= _NAME_BYTES or name in (".", "..") or re.search(r"[/:\s]", name):
        why = f"an interface's name has 1 to {_NAME_BYTES} bytes, without blanks, slashes and colons"
        yield _Problem(key, name, why, "see `ip link`")


def _relation_problems(config: Config) -> Iterator[_Problem]:
    times, ports, further = config.timeouts, config.ports, config.further_sessions
    if times.tcp_established_s < times.tcp_transitory_s:
        why = f"it may not be less than timeouts.tcp_transitory_s = {times.tcp_transitory_s}"
        yield _Problem("timeouts.tcp_established_s", times.tcp_established_s, why)
    if ports.last - ports.first + 1 < _PORTS_LEAST:
        why = f"ports.first = {ports.first} to ports.last must be at least {_PORTS_LEAST} ports"
        yield _Problem("ports.last", ports.last, why)
    if further & (further - 1):
        lower = 1 << (further.bit_length() - 1)
        why = f"allowed are powers of two; the nearest are {lower} and {2 * lower}"
        yield _Problem("sessions.further", further, why)


# --- the file --------------------------------------------------------------------------------------

_TEXT, _TEXTS, _NUMBER, _SWITCH = "a text in quotes", "a list of texts", "a whole number", "true or false"
_KEYS: dict[str, dict[str, str]] = {
    "interfaces": {"wan": _TEXT, "lan": _TEXTS, "mode": _TEXT, "internal": _TEXTS},
    "timeouts": {each.name: _NUMBER for each in fields(Timeouts)},
    "ports": {each.name: _NUMBER for each in fields(Ports)},
    "sessions": {"further": _NUMBER, "inbound_refresh": _SWITCH},
}


def _is_a(kind: str, value: object) -> bool:
    match value:
        case bool():
            return kind == _SWITCH
        case str():
            return kind == _TEXT
        case int():
            return kind == _NUMBER
        case list():
            return kind == _TEXTS and all(isinstance(each, str) for each in value)
    return False


@dataclass(frozen=True)
class _Document:
    """A file's text beside its values, so that errors can name lines."""

    path: Path
    text: str
    tables: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> _Document:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"cannot read {path}", f"not UTF-8 at byte {error.start}") from error
        try:
            return cls(path, text, tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise _syntax_error(path, text, error) from error

    def refuse_unknown(self) -> None:
        for table, entries in self.tables.items():
            if table not in _KEYS:
                raise self._unknown_table(table, entries)
            if not isinstance(entries, dict):
                raise self.error(_Problem(table, entries, f"{table} is a table", f"begin it with [{table}]"))
            for key in entries:
                if key not in _KEYS[table]:
                    raise self._unknown_key(table, key)

    def _unknown_table(self, name: str, value: object) -> ConfigError:
        if isinstance(value, dict):
            do = _did_you_mean(name, _KEYS, "[{}]") or f"the tables are {_listed(f'[{each}]' for each in _KEYS)}"
            return self._error_at(name, f"unknown table [{name}]", "", do)
        why = "it stands before any table"
        return self._error_at(name, f"unknown key {name}", why, _elsewhere(name) or "put it under its [table]")

    def _unknown_key(self, table: str, key: str) -> ConfigError:
        do = _did_you_mean(key, _KEYS[table], "{}") or _elsewhere(key) or f"the keys are {_listed(_KEYS[table])}"
        return self._error_at(f"{table}.{key}", f"unknown key {key} in [{table}]", "", do)

    def get(self, key: str, default: Any) -> Any:
        """The value of ``table.name``, of the right type."""
        table, name = key.split(".")
        value = self.tables.get(table, {}).get(name, default)
        kind = _KEYS[table][name]
        if not _is_a(kind, value):
            raise self.error(_Problem(key, value, f"allowed is {kind}"))
        return value

    def table(self, name: str) -> dict[str, Any]:
        """Those values of a table that are given."""
        return {key: self.get(f"{name}.{key}", None) for key in self.tables.get(name, {})}

    def prefix(self, text: str) -> IPv4Network:
        try:
            return IPv4Network(text)
        except ValueError as error:
            why = f"allowed is an IPv4 prefix as 10.20.0.0/16 ({error})"
            raise self.error(_Problem("interfaces.internal", text, why)) from error

    def error(self, problem: _Problem) -> ConfigError:
        return self._error_at(problem.key, problem.what, problem.why, problem.do, problem.value)

    def _error_at(self, key: str, what: str, why: str, do: str, value: object = None) -> ConfigError:
        line = _line_of(self.text, key, value)
        return ConfigError(f"{self.path}, line {line}: {what}", why, do)


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    where = re.search(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error), re.DOTALL)
    lines = text.splitlines()
    number = int(where[2]) if where and where[2] else max(len(lines), 1)
    shown = lines[number - 1].strip() if number <= len(lines) else ""
    why = f"{where[1] if where else error}: {shown}"
    return ConfigError(f"{path}, line {number}: not valid TOML", why, "compare docs/config.example.toml")


def _line_of(text: str, key: str, value: object = None) -> int:
    """The line of ``table.name`` (or of a table), and within a longer list that of one value; 1 in doubt."""
    table, _, name = key.partition(".")
    lines = text.splitlines()
    here, found = "", 0
    for number, line in enumerate(lines, 1):
        if header := re.match(r"\s*\[+\s*([^\]\s]+)\s*\]", line):
            here = header[1].strip("\"'")
            found = number if here == table else found
        elif assigned := re.match(r"\s*([^=\s#]+)\s*=", line):
            word = assigned[1].replace('"', "").replace("'", "")
            if word == key or (here == table and word == name):
                return _line_of_value(lines, number, value)
            found = number if here == "" and word == table else found
    return found or 1


def _line_of_value(lines: Sequence[str], first: int, value: object) -> int:
    if not isinstance(value, str):
        return first
    for number, line in enumerate(lines[first - 1 :], first):
        if f'"{value}"' in line or f"'{value}'" in line:
            return number
    return first


def _did_you_mean(word: str, known: Iterable[str], form: str) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {form.format(close[0])}?" if close else ""


def _elsewhere(key: str) -> str:
    return next((f"{key} belongs in [{table}]" for table, keys in _KEYS.items() if key in keys), "")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)


def as_fields(config: Config) -> dict[str, Any]:
    """A configuration as JSON can carry it."""
    fields = asdict(config)
    return {**fields, "internal": [str(network) for network in config.internal]}


def from_fields(fields: dict[str, Any]) -> Config:
    """The inverse of :func:`as_fields`."""
    return Config(
        **{
            **fields,
            "lans": tuple(fields["lans"]),
            "internal": tuple(map(IPv4Network, fields["internal"])),
            "timeouts": Timeouts(**fields["timeouts"]),
            "ports": Ports(**fields["ports"]),
        }
    )
