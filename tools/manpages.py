"""Writes the man pages from the help texts: `python tools/manpages.py FOLDER`. make deb calls it.

One page for xdpmasq, one for each verb (its own verbs are sections of it), and one for the configuration file.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from typer.main import get_command

import xdpmasq
from xdpmasq.cli import LATE, app

EXAMPLE = Path(__file__).parents[1] / "docs" / "config.example.toml"
AGENT = "xdpmasq"
EXIT = (("0", "done"), ("1", "failed"), ("2", "wrong usage or configuration"))
FILES = (
    ("/etc/xdpmasq/config.toml", "the configuration of xdpmasq.service; see xdpmasq.toml(5)"),
    ("/etc/xdpmasq/NAME.toml", "the configuration of xdpmasq@NAME.service"),
    ("/var/cache/xdpmasq", "compiled programs; may be deleted at any time"),
)


def pages() -> dict[str, str]:
    """File name → text."""
    root: Any = get_command(app)
    verbs = {name: get_command(LATE[name]()) if name in LATE else each for name, each in root.commands.items()}
    found = {f"{AGENT}.8": _page(AGENT, root, verbs)}
    found |= {f"{AGENT}-{name}.8": _page(f"{AGENT}-{name}", each, {}) for name, each in verbs.items()}
    return {**found, f"{AGENT}.toml.5": _configuration()}


def escape(text: str) -> str:
    """Text that roff prints as it is."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("…", "\\&...").split("\n")
    return "\n".join(f"\\&{line}" if line.startswith((".", "\\(aq")) else line for line in lines)


def _page(name: str, command: Any, verbs: dict[str, Any]) -> str:
    return "\n".join(_lines(name, command, verbs)) + "\n"


def _title(name: str, section: int) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    return f'.TH {escape(name.upper())} {section} {day} "xdpmasq {xdpmasq.__version__}" "xdpmasq"'


def _lines(name: str, command: Any, verbs: dict[str, Any]) -> Iterator[str]:
    words = name.replace("-", " ", 1)
    text = command.help or ""
    yield from (_title(name, 8), ".SH NAME", f"{escape(name)} \\- {escape(_brief(text))}")
    own = {} if verbs else dict(getattr(command, "commands", {}))
    yield ".SH SYNOPSIS"
    yield from _synopsis(words, command, not own or getattr(command, "invoke_without_command", False))
    for verb, each in own.items():
        yield ".br"
        yield from _synopsis(f"{words} {verb}", each, True)
    yield ".SH DESCRIPTION"
    yield from _prose(text)
    yield from _options(command)
    if verbs:
        yield ".SH COMMANDS"
        for verb, each in verbs.items():
            yield from (".TP", f"\\fB{AGENT}\\-{verb}\\fR(8)", escape(_brief(each.help or "")))
    for verb, each in own.items():
        yield f".SH {escape(f'{words} {verb}'.upper())}"
        yield from _prose(each.help or "")
        yield from _options(each)
    if verbs:
        yield from _table("EXIT STATUS", EXIT)
        yield from _table("FILES", FILES)
    also = [f"{AGENT}-{verb}(8)" for verb in verbs] or [f"{AGENT}(8)"]
    yield from (".SH SEE ALSO", escape(", ".join([*also, f"{AGENT}.toml(5)"])))


def _brief(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split()).rstrip(".")


def _synopsis(words: str, command: Any, runs: bool) -> Iterator[str]:
    if not runs:
        yield f"\\fB{escape(words)}\\fR \\fICOMMAND\\fR \\&..."
        return
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    required = [each for each in command.params if each.param_type_name == "option" and each.required]
    parts = [f"\\fB{escape(words)}\\fR", "[\\fIOPTION\\fR \\&...]"]
    parts += [f"\\fB{escape(each.opts[0])}\\fR \\fI{escape(_value(each))}\\fR" for each in required]
    parts += [f"\\fI{escape(_value(each) + '…' * (each.nargs == -1))}\\fR" for each in arguments]
    yield " ".join(parts)


def _value(option: Any) -> str:
    if option.metavar:
        return str(option.metavar)
    kind = getattr(option, "type", None)  # newer typers know none of some arguments
    if choices := getattr(kind, "choices", None):
        return "|".join(str(getattr(each, "value", each)) for each in choices)
    if option.param_type_name == "argument":
        return str(option.name).upper()
    return {"text": "TEXT", "float": "NUMBER"}.get(getattr(kind, "name", ""), "N")


def _options(command: Any) -> Iterator[str]:
    for each in (each for each in command.params if getattr(each, "help", None)):
        yield ".TP"
        if each.param_type_name == "argument":
            yield f"\\fI{escape(_value(each))}\\fR"
        else:
            names = ", ".join(f"\\fB{escape(name)}\\fR" for name in (*each.opts, *each.secondary_opts))
            yield names if each.is_flag else f"{names} \\fI{escape(_value(each))}\\fR"
        yield _inline(each.help)


def _prose(text: str) -> Iterator[str]:
    """Paragraphs as click has them: those after a \\b keep their lines."""
    paragraphs = [each for each in re.split(r"\n\s*\n", text.strip()) if each.strip()]
    for number, paragraph in enumerate(paragraphs):
        lines = [line for line in paragraph.split("\n") if line.strip()]
        if lines[0].strip() == "\b":
            heading, *rest = lines[1:]
            indent = min((len(line) - len(line.lstrip()) for line in rest), default=0)
            yield from (".PP", escape(heading.strip()), ".PP", ".RS 4", ".nf")
            yield from (escape(line[indent:]) for line in rest)
            yield from (".fi", ".RE")
        else:
            if number:
                yield ".PP"
            yield _inline(" ".join(line.strip() for line in lines))


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escape(text)).lstrip()


def _table(heading: str, rows: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield f".SH {heading}"
    for name, text in rows:
        yield from (".TP", f"\\fB{escape(name)}\\fR", escape(text))


def _configuration() -> str:
    """The example, table by table: its comments say all there is."""
    sections = re.split(r"\n(?=\[)|\n(?=# (?:Forwards|Redirects|Port triggering)\b)", EXAMPLE.read_text().strip())
    lines = [_title(f"{AGENT}.toml", 5), ".SH NAME", f"{AGENT}.toml \\- configuration of xdpmasq", ".SH DESCRIPTION"]
    for section in sections:
        if header := re.match(r"\[(\w+)\]", section):
            lines.append(f".SS {header[1]}")
        for blank, part in groupby(section.split("\n"), lambda line: not line.strip()):
            if not blank:
                first = lines[-1].startswith(".S")
                lines += [*[".PP"] * (not first), ".nf", *map(escape, part), ".fi"]
    return "\n".join([*lines, ".SH SEE ALSO", escape(f"{AGENT}(8), {AGENT}-check(8)")]) + "\n"


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
