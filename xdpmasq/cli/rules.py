"""What `forward`, `redirect` and `trigger` share: rules of one kind are put in place, taken out and listed alike.

`alg` has changes saved as they do.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from xdpmasq import forwards
from xdpmasq.cli import common
from xdpmasq.errors import ForwardError, UsageError
from xdpmasq.forwards import Rule

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.forwarding import Placed
    from xdpmasq.saving import Draft
    from xdpmasq.sessions import Table

PROTOCOL = typer.Argument(..., metavar="tcp|udp", show_default=False)
T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]
KILL = typer.Option(False, "--kill", help="End its running sessions, too.")
SAVE = typer.Option(False, "--save", help="Change the configuration file as well, for the next start.")
SOON_S = 5  # the agent looks every second
CONFIG = typer.Option(
    "", "--config", metavar="FILE", show_default=False, help="With --save: this file, not that of the running agent."
)


def bare(ctx: typer.Context, list_: Callable[..., None], *, wan: str, json: bool) -> None:
    """The command without a verb lists."""
    if ctx.invoked_subcommand is None:
        list_(wan=wan, json=json)
    elif wan or json:
        command, verb = ctx.info_name, ctx.invoked_subcommand
        raise UsageError(f"options stand before {verb}", "", f"write them after it: xdpmasq {command} {verb} …")


@dataclass(frozen=True)
class Saving:
    """Whether the configuration file is to change, too; ``file`` is empty for the running agent's."""

    wanted: bool
    file: str

    def __post_init__(self) -> None:
        if self.file and not self.wanted:
            raise UsageError("--config is given without --save", "", "add --save, or leave it out")

    def draft(self, attached: "Attached", make: "Callable[[Path, T], Draft]", what: T) -> "Draft | None":
        """What ``make`` makes of the file that is meant."""
        from xdpmasq import saving  # noqa: PLC0415  heavy

        return make(saving.file_of(attached, self.file), what) if self.wanted else None


@dataclass(frozen=True)
class Saved:
    """What became of a file; ``changed`` is False where it said so already. Without --save: no file."""

    file: str | None = None
    changed: bool = False

    @classmethod
    def of(cls, draft: "Draft | None") -> "Saved":
        return cls(str(draft.file), draft.changes) if draft else cls()

    def words(self, unchanged: str) -> str:
        if not self.file:
            return ""
        return f"; saved in {self.file}" if self.changed else f"; {self.file} {unchanged}"

    def fields(self) -> dict[str, Any]:
        return {"saved": self.changed, "file": self.file} if self.file else {}


def put(wan: str, rule: Rule, saving_: Saving) -> "tuple[Attached, Saved]":
    """Puts a rule in place, and in the file if wanted: both or neither. What is to be saved may be there already."""
    from xdpmasq import datapath, forwarding, presence, saving  # noqa: PLC0415  heavy

    with presence.changing(), contextlib.ExitStack() as undo:
        attached = datapath.find(wan or None)
        draft = saving_.draft(attached, saving.with_rule, rule)
        if draft:
            undo.enter_context(draft)
        if not (draft and rule in [each.rule for each in forwarding.read(attached)]):
            forwarding.check(attached, rule)
            placed = forwarding.Placed(forwarding.put(attached, attached.reaper, rule), rule, 0)
            undo.callback(forwarding.take, attached, attached.reaper, placed)
        if draft:
            draft.keep()
        undo.pop_all()
    return attached, Saved.of(draft)


def await_agent(attached: "Attached", is_served: "Callable[[Attached], bool]", what: str) -> None:
    """Waits until the agent has prepared what a rule needs, or says that it has not."""
    deadline = time.monotonic() + SOON_S * attached.agent_alive
    while not is_served(attached):
        if time.monotonic() >= deadline:
            why = "takes its time" if attached.agent_alive else "is not running"
            print(f"note: the agent, which has to prepare {what}, {why}", file=sys.stderr)
            break
        time.sleep(0.05)


def take(wan: str, wanted: Rule, saving_: Saving, *, kill: bool) -> tuple[Rule, int, int, Saved]:
    """Takes out the rule of that kind and name, and out of the file if wanted; there it may be alone.

    Returns:
        The rule, how many sessions go on, how many were ended, and what became of the file.
    """
    from xdpmasq import datapath, forwarding, presence, redirecting, saving  # noqa: PLC0415  heavy

    with presence.changing(), contextlib.ExitStack() as undo:
        attached = datapath.find(wan or None)
        present = forwarding.read(attached)
        draft = saving_.draft(attached, saving.without_rule, wanted)
        if draft:
            undo.enter_context(draft)
        try:
            rule = forwards.find([each.rule for each in present if each.rule.kind == wanted.kind], wanted)
        except ForwardError:
            if not (draft and draft.taken):
                raise
            draft.keep()
            return draft.taken, 0, 0, Saved.of(draft)
        if draft:
            draft.keep()
        placed = next(each for each in present if each.rule == rule)
        # Which sessions are its own is known only while it is there.
        mine = _running(attached, present)[placed.index]
        count = _count(attached, placed, mine)
        forwarding.take(attached, attached.reaper, placed)
        ended = 0
        if kill:
            ended = redirecting.end(attached, placed.index) if rule.from_inside else attached.flush(mine.slot)
    return rule, max(count - ended, 0), ended, Saved.of(draft)


def listed(wan: str, kind: str) -> "list[tuple[Placed, int, int | None]]":
    """The rules of a kind, each with its running sessions and the seconds that it has left; None: it stays."""
    from xdpmasq import datapath, forwarding  # noqa: PLC0415  heavy

    attached = datapath.find(wan or None)
    present = forwarding.read(attached)
    mine = _running(attached, present)
    return [
        (each, _count(attached, each, mine[each.index]), forwarding.left_s(each.expires, attached.hz))
        for each in present
        if each.rule.kind == kind
    ]


def _running(attached: "Attached", present: "list[Placed]") -> "dict[int, Table]":
    from xdpmasq import forwarding, sessions  # noqa: PLC0415  heavy

    table = sessions.read(attached.sessions, attached.settings, attached.now(), attached.hz)
    return forwarding.running(attached, table, present)


def _count(attached: "Attached", placed: "Placed", mine: "Table") -> int:
    from xdpmasq import redirecting  # noqa: PLC0415  heavy

    return int(redirecting.running(attached)[placed.index]) if placed.rule.from_inside else len(mine)


def print_added(rule: Rule, fields: dict[str, Any], saved: Saved, *, json: bool, done: str) -> None:
    if json:
        common.print_json({**fields, **saved.fields()})
    else:
        print(f"{done}: {rule}{saved.words('has it already')}")


def print_taken(
    rule: Rule, fields: dict[str, Any], left: int, ended: int, saved: Saved, *, done: str, kill: bool, json: bool
) -> None:
    running = (
        f"{common.plural(ended, 'session')} ended" if kill else f"{common.plural(left, 'session')} still running"
    )
    if json:
        common.print_json({**fields, "running": left, "ended": ended, **saved.fields()})
    else:
        print(f"{done}: {rule}" + (f"; {running}" if kill or left else "") + saved.words("did not have it"))


def print_list(rows: Rows, table: Callable[[Rows], Iterable[str]], *, json: bool, none: str) -> None:
    if json:
        common.print_json(rows)
    else:
        print("\n".join(table(rows)) if rows else none)
