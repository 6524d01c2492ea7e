"""The command line: one verb, one file. This one puts them together and turns errors into words.

Only :mod:`xdpmasq.errors` and :mod:`xdpmasq.config` are imported with a verb's file; what is heavy (numpy,
bcc, pyroute2) is imported by the verb once it is called, so that ``--help`` is there at once.
"""

import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command

from xdpmasq import __version__
from xdpmasq.cli import alg, forward, redirect, sessions, trigger
from xdpmasq.cli.attach import attach
from xdpmasq.cli.check import check
from xdpmasq.cli.detach import detach
from xdpmasq.cli.doctor import doctor
from xdpmasq.cli.reload import reload
from xdpmasq.cli.run import run
from xdpmasq.cli.status import status
from xdpmasq.cli.top import top
from xdpmasq.cli.trace import trace
from xdpmasq.errors import MasqError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"xdpmasq {__version__}")
        raise typer.Exit()


VERSION = typer.Option(False, "--version", help="Print the version.", callback=_print_version, is_eager=True)


@app.callback(invoke_without_command=True)
def _xdpmasq(ctx: typer.Context, version: bool = VERSION) -> None:
    """Masquerade whole networks behind one address, with eBPF at XDP and TC.

    Exit status: 0 done, 1 failed, 2 wrong usage or configuration.

    \b
    Example:
      xdpmasq attach --wan eth0 --lan eth1
      xdpmasq sessions
      xdpmasq detach
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


app.command()(attach)
app.command()(run)
app.command()(detach)
app.command()(status)
app.command()(top)
app.command()(trace)
app.command()(doctor)
app.command()(check)
app.command()(reload)
app.add_typer(sessions.app, name="sessions")
app.add_typer(forward.app, name="forward")
app.add_typer(redirect.app, name="redirect")
app.add_typer(trigger.app, name="trigger")
app.add_typer(alg.app, name="alg")


def _lab() -> typer.Typer:
    from xdpmasq.cli import lab  # noqa: PLC0415  heavy

    return lab.app


def _bench() -> typer.Typer:
    from xdpmasq.cli.bench import bench  # noqa: PLC0415  heavy

    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command()(bench)
    return alone


class _Late(TyperCommand):
    """Completes what the verb's own file knows, too."""

    verb: Callable[[], typer.Typer]

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        click = type(ctx).__module__.rpartition(".")[0]  # newer typers carry it inside
        completion = importlib.import_module(f"{click}.shell_completion")
        found = completion.get_completion_class("bash")(get_command(type(self).verb()), {}, str(ctx.info_name), "")
        return found.get_completions(ctx.args, incomplete)


LATE: dict[str, Callable[[], typer.Typer]] = {"lab": _lab, "bench": _bench}


def _register_late(name: str, find: Callable[[], typer.Typer], text: str) -> None:
    """A verb whose own file, options included, is only imported when it is called."""
    untouched = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
    cls = type(f"_Late_{name}", (_Late,), {"verb": staticmethod(find)})

    @app.command(name, cls=cls, help=text, add_help_option=False, context_settings=untouched)
    def verb(ctx: typer.Context) -> None:
        raise typer.Exit(_invoke(find(), ctx.args, f"xdpmasq {name}"))


_register_late("lab", LATE["lab"], "Build a network out of namespaces, to try xdpmasq in.")
_register_late("bench", LATE["bench"], "Measure CPU time per packet beside nftables masquerade.")


def main(args: Sequence[str] | None = None) -> None:
    """The entry point: runs a verb and exits with its status."""
    sys.exit(_status(list(sys.argv[1:] if args is None else args)))


def _invoke(verbs: typer.Typer, args: Sequence[str], name: str) -> int:
    """Runs a command and lets its exceptions out; a typer.Exit becomes the result."""
    return int(get_command(verbs).main(list(args), prog_name=name, standalone_mode=False) or 0)


COMPLETE = "_XDPMASQ_COMPLETE"  # set by the shells' completion scripts, which tools/completions.py writes


def _status(args: list[str]) -> int:
    if COMPLETE in os.environ:
        completion: Any = importlib.import_module("typer.completion")  # only then
        completion.completion_init()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no box drawing gets question marks
    try:
        code = _invoke(app, args, "xdpmasq")
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What reads us has gone, as `head` does. Nothing is to be flushed into the broken pipe at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if os.environ.get("XDPMASQ_DEBUG"):
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    """Says on stderr what happened, why and what to do; returns the exit status."""
    if isinstance(error, MasqError):
        _say(": ".join(part for part in (error.what, error.why) if part), error.do)
        return error.exit_code
    if hasattr(error, "format_message"):  # a usage error of click, which newer typers carry inside
        return _explain_usage(error)
    if isinstance(error, PermissionError):  # root without all of its power, as in a container
        _say(f"not permitted: {error}", "see `xdpmasq doctor`")
        return 1
    _say(f"unexpected error: {type(error).__name__}: {error}", "XDPMASQ_DEBUG=1 shows where; please report it")
    return 1


def _explain_usage(error: Any) -> int:
    context = getattr(error, "ctx", None)
    message = str(error.format_message())
    if "\n" in message:  # the whole help, for want of a command
        print(message, file=sys.stderr)
    elif message:  # else newer typers have printed the help themselves
        _say(message.rstrip("."), f"see `{context.command_path} --help`" if context else "")
    return int(error.exit_code)


def _say(what: str, do: str) -> None:
    typer.echo(f"{typer.style('xdpmasq:', fg='red')} {what}", err=True)
    if do:
        typer.echo(f"  → {do}", err=True)
