"""The text of a configuration file with one rule more or less, and all else as it was: comments, order, blank lines.

No library for it: tomlkit (0.15) loses comments, and moves others to another table, where ``[[forward]]`` and
``[[alg]]`` take turns. Instead, lines are put in or left out where that looks right, and TOML's own reader decides:
the first text that says exactly what is wanted is taken.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from xdpmasq.errors import ConfigError

_HEADER = re.compile(r"[ \t]*\[")
_INLINE = re.compile(r"\{[^{}]*\}")
_COMMA_AFTER, _COMMA_BEFORE = re.compile(r"[ \t]*,[ \t]*"), re.compile(r",\s*$")
_REST_OF_LINE = re.compile(r"[ \t]*,?[ \t]*\r?\n")


def added(text: str, kind: str, entry: Mapping[str, Any]) -> str:
    """With a ``[[kind]]`` more, behind all others.

    Raises:
        ConfigError: there is no telling where it could stand.
    """
    tables = tomllib.loads(text)
    wanted = {**tables, kind: [*tables.get(kind, ()), dict(entry)]}
    return _first([wanted], (_at_the_end(text, kind, entry), *_in_an_array(text, entry)), kind)


def removed(text: str, kind: str, nth: int) -> str:
    """Without the nth ``[[kind]]``. Comments before and behind it stay; one among its keys goes with it.

    Raises:
        ConfigError: there is no telling where it stands.
    """
    tables = tomllib.loads(text)
    left = [each for number, each in enumerate(tables[kind]) if number != nth]
    wanted = [{**tables, kind: left}]
    if not left:  # the last block takes the name with it
        wanted.append({name: each for name, each in tables.items() if name != kind})
    return _first(wanted, (*_without_block(text, kind, nth), *_without_inline(text, nth)), kind)


def _first(wanted: Sequence[Mapping[str, Any]], texts: Iterable[str], kind: str) -> str:
    for text in texts:
        try:
            if tomllib.loads(text) in wanted:
                return text
        except tomllib.TOMLDecodeError:
            continue
    what = f"this way of writing a {kind} cannot be changed by a command"
    raise ConfigError(
        what, "its place in the file is not found", f"change it with an editor, or write it as [[{kind}]]"
    )


# --- one more --------------------------------------------------------------------------------------


def _at_the_end(text: str, kind: str, entry: Mapping[str, Any]) -> str:
    end = "\r\n" if "\r\n" in text else "\n"
    block = end.join([f"[[{kind}]]", *_assignments(entry), ""])
    before = text if text.endswith("\n") or not text else text + end
    return before + (end if before else "") + block


def _in_an_array(text: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """In every place before a closing bracket."""
    table = "{ " + ", ".join(_assignments(entry)) + " }"
    for bracket in re.finditer(r"(?P<own_line>(?<=\n)[ \t]*)?\]", text):
        if bracket["own_line"] is not None:
            end = "\r\n" if text[: bracket.start()].endswith("\r\n") else "\n"
            more = [f"    {table},{end}", f"    , {table}{end}"]
            at = bracket.start()
        else:
            more = [f", {table}", f" {table}"]
            at = len(text[: bracket.start()].rstrip(" \t"))
        yield from (text[:at] + each + text[at:] for each in more)


def _assignments(entry: Mapping[str, Any]) -> Iterator[str]:
    for key, value in entry.items():
        yield f"{key} = {json.dumps(value)}"  # TOML's and JSON's texts, numbers and lists are written alike


# --- one less --------------------------------------------------------------------------------------


def _without_block(text: str, kind: str, nth: int) -> Iterator[str]:
    """Without a header and ever more lines behind it, up to the next header. The nth header comes first."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    header = re.compile(rf"[ \t]*\[\[[ \t]*[\"']?{kind}[\"']?[ \t]*\]\]")
    starts = [number for number, line in enumerate(lines) if header.match(line)]
    for start in sorted(starts, key=lambda each: each != starts[min(nth, len(starts) - 1)]):
        for end in range(start + 1, len(lines) + 1):
            yield "".join(_closed_up(lines[:start], lines[end:]))
            if end < len(lines) and _HEADER.match(lines[end]):
                break


def _closed_up(before: list[str], after: list[str]) -> list[str]:
    """With one of two blank lines that now meet, and none at the end."""
    if before and not before[-1].strip() and not (after and after[0].strip()):
        before = before[:-1]
    return before + after


def _without_inline(text: str, nth: int) -> Iterator[str]:
    """Without one of the tables in braces, its comma, and its line where nothing else is on it."""
    tables = list(_INLINE.finditer(text))
    for table in sorted(tables, key=lambda each: each is not tables[min(nth, len(tables) - 1)]):
        before, after = text[: table.start()], text[table.end() :]
        bare = before.rstrip(" \t")
        if bare.endswith("\n") and (rest := _REST_OF_LINE.match(after)):
            yield bare + after[rest.end() :]
        if comma := _COMMA_AFTER.match(after):
            yield before + after[comma.end() :]
        yield _COMMA_BEFORE.sub("", before) + after
        yield before + after
