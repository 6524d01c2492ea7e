"""A configuration's TOML file: reading it, and naming file, line, value and what is allowed in whatever is wrong."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any, TypeVar

from xdpmasq import algs, forwards, redirects, triggers
from xdpmasq.config import (
    Config,
    Filtering,
    Limits,
    Log,
    Metrics,
    Origin,
    Pcp,
    Ports,
    Problem,
    Timeouts,
    from_options,
    problems,
)
from xdpmasq.errors import ConfigError, UsageError
from xdpmasq.externals import Externals
from xdpmasq.forwards import Rule
from xdpmasq.redirects import Redirect
from xdpmasq.triggers import Trigger

_R = TypeVar("_R", bound=Rule)


def load(path: Path) -> Config:
    """Reads and checks a TOML file. WAN and LANs may be missing from it: options can still name them.

    Raises:
        ConfigError: with file, line, value and what is allowed.
    """
    return parse(path, read(path))


def read(path: Path) -> str:
    """A file's text, its ends of lines as they are.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"cannot read {path}", error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"cannot read {path}", f"not UTF-8 at byte {error.start}") from error


def parse(path: Path, text: str) -> Config:
    """What the text of a file says; ``path`` is for the words of errors.

    Raises:
        ConfigError: as of :func:`load`.
    """
    document = _Document.of(path, text)
    document.refuse_unknown()
    get = document.get
    config = Config(
        wans=document.names("interfaces.wan"),
        lans=tuple(get("interfaces.lan", [])),
        mode=get("interfaces.mode", "auto"),
        internal=document.prefixes("interfaces.internal"),
        timeouts=Timeouts(**document.table("timeouts")),
        ports=Ports(**document.table("ports")),
        filtering=Filtering(**document.table("filtering")),
        limits=Limits(**document.table("limits")),
        further_sessions=document.table("sessions").get("further"),
        inbound_refresh=get("sessions.inbound_refresh", Config.inbound_refresh),
        mss=get("tcp.mss", Config.mss),
        other=get("protocols.other", Config.other),
        forwards=tuple(document.rules("forward", _forward, 'ports = 8080, to = "192.168.0.2:80"')),
        redirects=tuple(document.rules("redirect", _redirect, 'ports = 80, to = 3128, on = "lan"')),
        triggers=tuple(document.rules("trigger", _trigger, 'ports = 6112, opens = "tcp 6112-6119"')),
        algs=document.algs(),
        external=document.externals(),
        pcp=Pcp(**{**document.table("pcp"), "internal": document.prefixes("pcp.internal")}),
        metrics=Metrics(**document.beside("metrics", "web_config")),
        log=Log(**document.beside("log", "file")),
    )
    for problem in problems(config):
        raise document.error(problem)
    return config


def from_origin(origin: Origin) -> Config:
    """What a file, as it is now, and the options of old want together.

    Raises:
        ConfigError, UsageError: it is wrong.
    """
    config = from_options(origin.wans, origin.lans, origin.mode or None, load(Path(origin.file)))
    return replace(config, origin=origin)


_TEXT, _TEXTS, _NUMBER, _SWITCH = "a text in quotes", "a list of texts", "a whole number", "true or false"
_AUTO = '"auto"'
_AUTO_OR_NUMBER = f"{_AUTO} or {_NUMBER}"
_SWITCHES = ("preserve", "parity", "low_ports", "overload")
_KEYS: dict[str, dict[str, str]] = {
    "interfaces": {"wan": f"{_TEXT} or {_TEXTS}", "lan": _TEXTS, "mode": _TEXT, "internal": _TEXTS},
    "timeouts": {each.name: _NUMBER for each in fields(Timeouts)},
    "ports": {"first": _NUMBER, "last": _NUMBER, "block_size": _NUMBER, **dict.fromkeys(_SWITCHES, _SWITCH)},
    "filtering": {"tcp": _TEXT, "udp": _TEXT},
    "limits": {
        **dict.fromkeys(("sessions_per_host", "ports_per_host", "blocks_per_host"), _AUTO_OR_NUMBER),
        **{"new_per_second": _NUMBER, "burst": _NUMBER, "refusal": _TEXT},
    },
    "sessions": {"further": _AUTO_OR_NUMBER, "inbound_refresh": _SWITCH},
    "tcp": {"mss": f"{_TEXT} or {_NUMBER}"},
    "protocols": {"other": _TEXT},
    "pcp": {
        **dict.fromkeys((each.name for each in fields(Pcp)), _NUMBER),
        **{"enabled": _SWITCH, "internal": _TEXTS},
    },
    "external": {
        **dict.fromkeys(("addresses", "choices", "one_to_one", "exempt"), _TEXTS),
        "answer_arp": _SWITCH,
    },
    "metrics": {"enabled": _SWITCH, "listen": _TEXT, "web_config": _TEXT, "top_hosts": _NUMBER},
    "log": {
        **dict.fromkeys(("what", "file", "syslog", "ipfix"), _TEXT),
        **{"destinations": _SWITCH, "per_second": _NUMBER},
    },
    "forward": {"protocol": _TEXT, "ports": f"{_TEXT} or {_NUMBER}", "to": f"{_TEXT} or {_TEXTS}", "from": _TEXT},
    "redirect": {
        **{"protocol": _TEXT, "ports": f"{_TEXT} or {_NUMBER}", "to": f"{_TEXT} or {_NUMBER}", "on": _TEXT},
        **{"from": _TEXT, "not_to": f"{_TEXT} or {_TEXTS}"},
    },
    "trigger": {"protocol": _TEXT, "ports": f"{_TEXT} or {_NUMBER}", "opens": _TEXT, "lasts_s": _NUMBER},
    "alg": {"name": _TEXT, "enabled": _SWITCH, "ports": f"{_TEXT} or {_TEXTS}", "internal": f"{_TEXT} or {_TEXTS}"},
}
_REPEATED = {"forward", "redirect", "trigger", "alg"}  # tables of which there may be many: [[forward]]


def _forward(given: Mapping[str, Any]) -> Rule:
    return forwards.parse(given["protocol"], given["ports"], _several(given["to"]), given.get("from", ""))


def _redirect(given: Mapping[str, Any]) -> Redirect:
    source, spared = given.get("from", ""), _several(given.get("not_to", []))
    return redirects.parse(given["protocol"], given["ports"], given["to"], given["on"], source=source, not_to=spared)


def _trigger(given: Mapping[str, Any]) -> Trigger:
    return triggers.parse(**given)


def _several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _is_a(kind: str, value: object) -> bool:
    match value:
        case bool():
            return kind == _SWITCH
        case str():
            return _TEXT in kind or f'"{value}"' in kind
        case int():
            return kind.endswith(_NUMBER)
        case list():
            return kind.endswith(_TEXTS) and all(isinstance(each, str) for each in value)
    return False


@dataclass(frozen=True)
class _Document:
    """A file's text beside its values, so that errors can name lines."""

    path: Path
    text: str
    tables: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, text: str) -> _Document:
        try:
            return cls(path, text, tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise _syntax_error(path, text, error) from error

    def refuse_unknown(self) -> None:
        for table, entries in self.tables.items():
            if table not in _KEYS:
                raise self._unknown_table(table, entries)
            for nth, each in enumerate(self._each(table, entries)):
                for key in each:
                    if key not in _KEYS[table]:
                        raise self._unknown_key(table, key, nth)

    def _each(self, table: str, entries: object) -> list[dict[str, Any]]:
        """The tables of that name."""
        found: list[Any] = entries if isinstance(entries, list) and table in _REPEATED else [entries]
        wrong = isinstance(entries, dict) is (table in _REPEATED) or not all(isinstance(each, dict) for each in found)
        if wrong:
            header = _header(table)
            raise self.error(Problem(table, entries, f"{table} is a table", f"begin it with {header}"))
        return found

    def _unknown_table(self, name: str, value: object) -> ConfigError:
        if isinstance(value, dict):
            do = _did_you_mean(name, _KEYS, _header) or f"the tables are {_listed(map(_header, _KEYS))}"
            return self._error_at(Problem(name, None, "", do), f"unknown table [{name}]")
        why = "it stands before any table"
        do = _elsewhere(name) or "put it under its [table]"
        return self._error_at(Problem(name, None, why, do), f"unknown key {name}")

    def _unknown_key(self, table: str, key: str, nth: int) -> ConfigError:
        do = _did_you_mean(key, _KEYS[table]) or _elsewhere(key) or f"the keys are {_listed(_KEYS[table])}"
        return self._error_at(Problem(f"{table}.{key}", None, "", do, nth), f"unknown key {key} in {_header(table)}")

    def get(self, key: str, default: Any) -> Any:
        """The value of ``table.name``, of the right type."""
        table, name = key.split(".")
        return self._value(table, name, self.tables.get(table, {}).get(name, default), 0)

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts, or the only one of them."""
        given = self.get(key, [])
        return (given,) if isinstance(given, str) else tuple(given)

    def table(self, name: str) -> dict[str, Any]:
        """Those values of a table that are given, and are not automatic."""
        kinds, given = _KEYS[name], {key: self.get(f"{name}.{key}", None) for key in self.tables.get(name, {})}
        return {key: value for key, value in given.items() if not (value == "auto" and _AUTO in kinds[key])}

    def _value(self, table: str, name: str, value: Any, nth: int) -> Any:
        kind = _KEYS[table][name]
        if not _is_a(kind, value):
            raise self.error(Problem(f"{table}.{name}", value, f"allowed is {kind}", nth=nth))
        return value

    def rules(self, kind: str, parse: Callable[[Mapping[str, Any]], _R], example: str) -> Iterator[_R]:
        """The rules of ``[[kind]]``; the keys of the example are those that it cannot do without."""
        for nth, entries in enumerate(self.tables.get(kind, ())):
            given = {name: self._value(kind, name, value, nth) for name, value in entries.items()}
            for name in ("protocol", *re.findall(r"(\w+) = ", example)):
                if name not in given:
                    why = f'a {kind} needs it, as protocol = "tcp", {example}'
                    raise self._error_at(Problem(kind, None, why, nth=nth), f"[[{kind}]] without {name}")
            try:
                yield parse(given)
            except UsageError as error:
                key, value = _blamed(kind, given, error.what)
                raise self._error_at(Problem(key, value, error.why, error.do, nth), error.what) from error

    def algs(self) -> tuple[algs.Use, ...]:
        """``[[alg]]``, and what is on by default."""
        uses = {use.name: use for use in algs.default()}
        places: dict[str, int] = {}
        for nth, entries in enumerate(self.tables.get("alg", ())):
            given = {name: self._value("alg", name, value, nth) for name, value in entries.items()}
            if "name" not in given:
                raise self._error_at(
                    Problem("alg", None, 'it says which, as name = "sip"', nth=nth), "[[alg]] without name"
                )
            try:
                use = algs.Use.parse(given["name"], *(_several(given.get(key, [])) for key in ("ports", "internal")))
            except UsageError as error:
                raise self._error_at(Problem("alg", None, error.why, error.do, nth), error.what) from error
            uses.pop(use.name, None)
            if given.get("enabled", True):
                uses[use.name], places[use.name] = use, nth
        found = tuple(uses.values())
        for number, use in enumerate(found, 1):
            try:
                algs.check(found[:number])
            except UsageError as error:
                at = places[use.name]
                raise self._error_at(Problem("alg", None, error.why, error.do, at), error.what) from error
        return found

    def externals(self) -> Externals:
        """``[external]``."""
        given = self.table("external")
        for key, value in given.items():
            for text in value if isinstance(value, list) else ():
                try:
                    Externals.parse(**{key: [text]})  # type: ignore[arg-type]
                except UsageError as error:
                    raise self._error_at(Problem(f"external.{key}", text, error.why, error.do), error.what) from error
        return Externals.parse(**given)

    def beside(self, table: str, key: str) -> dict[str, Any]:
        """A table's values; the file that it names is looked for beside this one."""
        given = self.table(table)
        if given.get(key):
            given[key] = str(self.path.absolute().parent / given[key])
        return given

    def prefixes(self, key: str) -> tuple[IPv4Network, ...]:
        """A list of internal prefixes."""
        return tuple(self._prefix(key, text) for text in self.get(key, []))

    def _prefix(self, key: str, text: str) -> IPv4Network:
        try:
            return IPv4Network(text)
        except ValueError as error:
            why = f"allowed is an IPv4 prefix as 10.20.0.0/16 ({error})"
            raise self.error(Problem(key, text, why)) from error

    def error(self, problem: Problem) -> ConfigError:
        return self._error_at(problem, problem.what)

    def _error_at(self, problem: Problem, what: str) -> ConfigError:
        line = _line_of(self.text, problem.key, problem.value, problem.nth)
        return ConfigError(f"{self.path}, line {line}: {what}", problem.why, problem.do)


def _header(table: str) -> str:
    return f"[[{table}]]" if table in _REPEATED else f"[{table}]"


def _syntax_error(path: Path, text: str, error: tomllib.TOMLDecodeError) -> ConfigError:
    where = re.search(r"^(.*) \(at (?:line (\d+), column (\d+)|end of document)\)$", str(error), re.DOTALL)
    lines = text.removesuffix("\n").split("\n")
    number = int(where[2]) if where and where[2] else max(len(lines), 1)
    shown = lines[number - 1].strip() if number <= len(lines) else ""
    why = f"{where[1] if where else error}: {shown}"
    return ConfigError(f"{path}, line {number}: not valid TOML", why, "compare docs/config.example.toml")


def _line_of(text: str, key: str, value: object = None, nth: int = 0) -> int:
    """The line of ``table.name`` (or of a table, the nth of its name), in a longer list that of one value; or 1."""
    table, _, name = key.partition(".")
    lines = text.split("\n")
    here, found, before = "", 0, nth
    for number, line in enumerate(lines, 1):
        if header := re.match(r"\s*\[+\s*([^\]\s]+)\s*\]", line):
            here = header[1].strip("\"'")
            if here == table:
                here, before = ("", before - 1) if before else (here, 0)
            found = number if here == table else found
        elif assigned := re.match(r"\s*([^=\s#]+)\s*=", line):
            word = assigned[1].replace('"', "").replace("'", "")
            if word == key or (here == table and word == name):
                return _line_of_value(lines, number, value)
            found = _line_of_inline(lines, number, nth) if here == "" and word == table else found
    return found or 1


def _line_of_inline(lines: Sequence[str], first: int, nth: int) -> int:
    """Of the nth table in braces where a list of them is written as one value."""
    if not re.search(r"=\s*\[", lines[first - 1]):
        return first
    for number, line in enumerate(lines[first - 1 :], first):
        nth -= line.partition("#")[0].count("{")
        if nth < 0:
            return number
    return first


def _blamed(kind: str, given: Mapping[str, Any], what: str) -> tuple[str, str | None]:
    """The key of a rule, and the value, with which the words of an error begin; the rule's kind where it is none."""
    for key, value in given.items():
        for each in map(str, value if isinstance(value, list) else [value]):
            if each and what.startswith(f"{each} "):
                return f"{kind}.{key}", each
    return kind, None


def _line_of_value(lines: Sequence[str], first: int, value: object) -> int:
    if not isinstance(value, str):
        return first
    for number, line in enumerate(lines[first - 1 :], first):
        if f'"{value}"' in line or f"'{value}'" in line:
            return number
    return first


def _did_you_mean(word: str, known: Iterable[str], show: Callable[[str], str] = str) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {show(close[0])}?" if close else ""


def _elsewhere(key: str) -> str:
    return next((f"{key} belongs in {_header(table)}" for table, keys in _KEYS.items() if key in keys), "")


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)
