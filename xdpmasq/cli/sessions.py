"""``xdpmasq sessions``: who talks to whom, as whom; ending and watching sessions."""

import sys
import time
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from xdpmasq.cli import common
from xdpmasq.errors import UsageError

if TYPE_CHECKING:
    from xdpmasq.datapath import Attached
    from xdpmasq.events import Batch
    from xdpmasq.selection import Selection
    from xdpmasq.sessions import Table

POLL_S = 0.05
FIND_S = 5  # after which it is asked whether the datapath is still the one attached

PROTO = typer.Option("", "--proto", metavar="tcp|udp|icmp", help="Only this protocol.", show_default=False)
INTERNAL = typer.Option(
    "", "--internal", metavar="ENDPOINT", show_default=False,
    help="Only this internal endpoint: ADDR, ADDR/BITS, ADDR:PORT or :PORT.",
)  # fmt: skip
EXTERNAL = typer.Option("", "--external", metavar="ENDPOINT", help="Only this external endpoint.", show_default=False)
REMOTE = typer.Option("", "--remote", metavar="ENDPOINT", help="Only this remote endpoint.", show_default=False)
STATE = typer.Option("", "--state", metavar="STATE", help="Only this state: ESTABLISHED, …", show_default=False)
ALL = typer.Option(False, "--all", help="Every session.")
FILE = typer.Argument(..., metavar="FILE", show_default=False)

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def show(
    ctx: typer.Context,
    *,
    proto: str = PROTO,
    internal: str = INTERNAL,
    external: str = EXTERNAL,
    remote: str = REMOTE,
    state: str = STATE,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """List sessions; or end them, watch them come and go, or keep them over a reboot.

    \b
    Examples:
      xdpmasq sessions
      xdpmasq sessions --internal 192.168.0.2 --state ESTABLISHED
      xdpmasq sessions --json | jq '.[].remote.address'
    """
    if ctx.invoked_subcommand is None:
        list_(proto=proto, internal=internal, external=external, remote=remote, state=state, wan=wan, json=json)
    elif any((proto, internal, external, remote, state, wan, json)):
        verb = ctx.invoked_subcommand
        raise UsageError(f"options stand before {verb}", "", f"write them after it: xdpmasq sessions {verb} …")


@app.command("list")
def list_(
    *,
    proto: str = PROTO,
    internal: str = INTERNAL,
    external: str = EXTERNAL,
    remote: str = REMOTE,
    state: str = STATE,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """List sessions, ordered by protocol and internal endpoint.

    TCP states are seen from the internal host: FIN_WAIT, it has closed; CLOSE_WAIT, the remote has; TIME_WAIT,
    both have; CLOSE, one has reset. IDLE and LEFT are seconds since the last packet and until the session
    ends if none comes. The port of ICMP is the query's identifier.

    Beside sessions there are REDIRECTED connections from a LAN, which end at the gateway itself, and those that an
    ALG has EXPECTED: whoever is named as the remote (0.0.0.0: anybody; port 0: any) may come in.

    \b
    Examples:
      xdpmasq sessions list --proto udp --remote :53
      xdpmasq sessions list --internal 192.168.0.0/24 --json
    """
    common.require_root("sessions")
    selection = selection_of(proto, internal, external, remote, state)
    from xdpmasq import listing  # noqa: PLC0415  heavy

    table = selection(_read_all(find(wan))).ordered()
    if json:
        sys.stdout.write("[\n")
        common.print_blocks(listing.json_objects(table), ",\n")
        sys.stdout.write("]\n")
    else:
        print(listing.heading(table))
        common.print_blocks(listing.lines(table))


@app.command()
def flush(
    *,
    proto: str = PROTO,
    internal: str = INTERNAL,
    external: str = EXTERNAL,
    remote: str = REMOTE,
    state: str = STATE,
    every: bool = ALL,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """End sessions now, and what is listed beside them. Their hosts get no notice; UDP and ICMP simply open new ones.

    \b
    Examples:
      xdpmasq sessions flush --internal 192.168.0.2
      xdpmasq sessions flush --all
    """
    common.require_root("sessions flush")
    selection = selection_of(proto, internal, external, remote, state)
    if selection.is_everything != every:
        what = "both --all and a filter are given" if every else "no filter is given"
        raise UsageError(what, "", "give either filters, or --all to end every session")
    from xdpmasq import pinholes, redirecting  # noqa: PLC0415  heavy

    attached = find(wan)
    ended = attached.flush(selection(_read(attached)).slot)
    ended += redirecting.flush(attached, attached.hz, selection) + pinholes.flush(attached, selection)
    if json:
        common.print_json({"flushed": ended})
    else:
        print(f"{common.plural(ended, 'session')} ended")


@app.command()
def watch(
    *,
    proto: str = PROTO,
    internal: str = INTERNAL,
    external: str = EXTERNAL,
    remote: str = REMOTE,
    state: str = STATE,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Print a line for each session opened, closed or refused, until Ctrl-C.

    WHY is of an opened session who opened it: internal or remote; of a closed one what ended it: idle, fin or rst
    (closed or reset by TCP), flushed (by a command, or with its external address), evicted (an unanswered one from
    outside, for a newer one); of one refused the counter without drop_.

    One-to-one hosts, and protocols without ports (GRE, ESP), have no sessions: nothing is said of them.

    Several may watch at once. Should events come faster than they can be read, their number is said. With --json
    each line is an object: time, event (opened, closed, refused; lost, with count and deaf_s only), why, protocol,
    state, internal, external (null: refused), remote, out, in, duration_s.

    \b
    Examples:
      xdpmasq sessions watch --proto tcp
      xdpmasq sessions watch --json | jq -c 'select(.event == "closed")'
    """
    common.require_root("sessions watch")
    selection = selection_of(proto, internal, external, remote, state)
    from xdpmasq import events  # noqa: PLC0415  heavy

    following = Following(wan)
    watcher = events.Watcher(following())
    if not json:
        print(events.HEADING, flush=True)
    while True:
        time.sleep(POLL_S)
        attached = following()
        if not watcher.reads(attached):
            watcher = events.Watcher(attached)
        batch = watcher.read()
        if batch.lost or batch.deaf_s:
            print(_lost(batch, json))
        told = watcher.story(batch.rows, selection)
        for line in (events.json_lines if json else events.lines)(told):
            print(line)
        sys.stdout.flush()


@app.command()
def save(
    file: str = FILE,
    *,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Write all sessions into a file, to load them after a reboot. Sessions go on as they are.

    The file is root's alone: it tells who talks to whom. Not saved are connections of which an ALG has changed the
    length of texts, redirected connections, what an ALG or PCP has opened, protocols without ports, and the gateway's
    own queries.

    \b
    Example:
      xdpmasq sessions save /var/lib/xdpmasq.sessions
    """
    common.require_root("sessions save")
    from xdpmasq import keeping  # noqa: PLC0415  heavy

    saved, left_out = keeping.save(find(wan), Path(file))
    if json:
        common.print_json({"saved": saved, "left_out": left_out})
    else:
        print(f"{common.plural(saved, 'session')} saved in {file}" + (f", {left_out:,} left out" if left_out else ""))


@app.command()
def load(
    file: str = FILE,
    *,
    wan: str = common.WHICH,
    json: bool = common.JSON,
) -> None:
    """Open the sessions of a file again, with external ports, TCP states, and what is left of their idle time.

    What is there by now stays: a session whose port or internal endpoint is taken is left out and counted, as is one
    whose idle time is over, the time since it was saved included. A file that is damaged, of another format, or of
    another external address changes nothing. Load it at once: what hosts send before opens new sessions.

    \b
    Example:
      xdpmasq sessions load /var/lib/xdpmasq.sessions
    """
    common.require_root("sessions load")
    from xdpmasq import keeping  # noqa: PLC0415  heavy

    found = keeping.load(find(wan), Path(file))
    loaded = found.pop("loaded", 0)
    if json:
        common.print_json({"loaded": loaded, "left_out": dict(found.most_common())})
        return
    print(f"{common.plural(loaded, 'session')} loaded" + (f", {found.total():,} left out:" if found else ""))
    for why, count in found.most_common():
        print(f"  {count:>9,}  {why}")


def _lost(batch: "Batch", json: bool) -> str:
    now = time.time()
    if json:
        return dumps({"time": round(now, 3), "event": "lost", "count": batch.lost, "deaf_s": round(batch.deaf_s, 1)})
    deaf = f", and {batch.deaf_s:.1f} s not listened to" if batch.deaf_s else ""
    return f"{time.strftime('%H:%M:%S', time.localtime(now))} lost    {common.plural(batch.lost, 'event')}{deaf}"


def selection_of(proto: str, internal: str, external: str, remote: str, state: str) -> "Selection":
    """What the filters' options mean."""
    from xdpmasq.selection import Selection  # noqa: PLC0415  numpy takes a tenth of a second

    return Selection.parse(proto, internal, external, remote, state)


def find(wan: str) -> "Attached":
    """The datapath that is meant."""
    from xdpmasq import datapath  # noqa: PLC0415  heavy

    return datapath.find(wan or None)


class Following:
    """The datapath that is meant, looked for anew now and then: our own descriptors keep a detached one's maps."""

    def __init__(self, wan: str) -> None:
        self._wan, self._attached, self._found_at = wan, find(wan), time.monotonic()

    def __call__(self) -> "Attached":
        """Raises NotAttachedError once it is gone."""
        if time.monotonic() - self._found_at > FIND_S:
            self._attached, self._found_at = find(self._wan), time.monotonic()
        return self._attached


def _read_all(attached: "Attached") -> "Table":
    from xdpmasq import pinholes, redirecting, sessions  # noqa: PLC0415  heavy

    others = *redirecting.listed(attached, attached.hz), pinholes.expected(attached)
    return sessions.joined(_read(attached), *others)


def _read(attached: "Attached") -> "Table":
    from xdpmasq import sessions  # noqa: PLC0415  heavy

    return sessions.read(attached.sessions, attached.settings, attached.now(), attached.hz)
