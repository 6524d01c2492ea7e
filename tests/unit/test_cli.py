"""The command line, with agent and datapath replaced: words, JSON, exit status."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import typer
from records import ADDR, SESSION, SETTINGS
from rich.console import Console

import xdpmasq.pinholes
import xdpmasq.redirecting  # noqa: F401
from xdpmasq import __version__, cli, rates, source
from xdpmasq.cli import common
from xdpmasq.cli import sessions as sessions_cli
from xdpmasq.cli.top import BESIDE, KEYS, View, screen
from xdpmasq.config import Config, Origin
from xdpmasq.errors import DatapathError, NotAttachedError
from xdpmasq.events import CLOSED, OPENED, Batch, Story
from xdpmasq.selection import Selection
from xdpmasq.sessions import read as read_table

EXAMPLE = str(Path(__file__).parents[2] / "docs" / "config.example.toml")
RULES = ("forward", "redirect", "trigger")
VERBS = ("attach", "run", "detach", "status", "top", "trace", "sessions", "doctor", "check", *RULES, "lab", "bench")

NOW, HZ = 500_000, 100


def table() -> Any:
    """One session each of TCP and UDP."""
    array = np.zeros(3 * 65536 + 64, SESSION)
    for slot, host in ((2000, 2), (65536 + 3000, 3)):
        row = array[slot]
        for flow in (row["out"], row["in"]):
            flow["remote_addr"]["word"] = int.from_bytes(bytes([198, 51, 100, 10]), sys.byteorder)
            flow["new_addr"]["word"] = int.from_bytes(bytes([192, 168, 0, host]), sys.byteorder)
            flow["last_seen"], flow["tcp_seen"] = NOW, 0x12
        row["sent"]["packets"] = row["received"]["packets"] = 1
        row["life"], row["mapping"], row["opened_at"] = 5, slot, NOW
    return array


def settings() -> Any:
    values = np.zeros(1, SETTINGS)
    for name in ("tcp_established", "tcp_transitory", "udp", "icmp"):
        values[name] = 100 * HZ
    values["pool"]["count"], values["externals"], values["hz"] = 30000, 1, HZ
    return values[0]


def manifest() -> dict[str, Any]:
    return {
        "version": "0.1.0",
        "wan": "eth0",
        "lans": ["eth1", "ppp*"],
        "mode": "auto",
        "interfaces": [
            {"name": "eth0", "index": 2, "role": "wan", "hook": "xdp", "why": "driver ixgbe has native XDP"},
            {"name": "eth1", "index": 3, "role": "lan", "hook": "tc", "why": "a veth"},
        ],
        "external": "203.0.113.1",
        "punt": {"name": "masq-punt0", "why_not": ""},
        "pcp": {"enabled": False, "listening": [], "answered": 0, "dropped": 0},
        "hz": HZ,
        "attached_at": time.time() - 3725,
        "agent_pid": 4711,
        "config": {"metrics": {"enabled": True, "listen": "127.0.0.1:9477"}},
    }


TWO_WANS = {"wans": ["eth0", "eth9"]}


class Empty:
    """A table with nothing in it."""

    max_entries = 1

    def items(self, chunk: int) -> Iterator[Any]:
        yield from ()


class NoPinholes(Empty):
    def items(self, chunk: int) -> Iterator[Any]:
        value = [("left", "u8"), ("counted", "u4"), ("expires", "u4"), ("internal", ADDR)]
        value += [("internal_port", "u2"), ("remote_port", "u2")]
        yield np.zeros(0, [("mapping", "u4"), ("remote", ADDR)]), np.zeros(0, value)


@dataclass
class Running:
    """Stands for datapath.Attached."""

    manifest: dict[str, Any] = field(default_factory=manifest)
    wan_names: tuple[str, ...] = ("eth0",)
    sessions: Any = field(default_factory=table)
    settings: Any = field(default_factory=settings)
    hz: int = HZ
    agent_alive: bool = True
    flushed: list[int] = field(default_factory=list)
    further_base: int = 3 * 65536
    further: int = 64
    dropped: dict[str, int] = field(default_factory=lambda: {"drop_rewrite": 0, "drop_protocol": 7})

    def now(self) -> int:
        return NOW

    @property
    def maps(self) -> dict[str, Any]:
        """Neither pinholes nor redirected connections."""
        return {"pinholes": NoPinholes(), "redirects": Empty()}

    def counters(self) -> dict[str, int]:
        return {"fast_outbound": 900, "slow_outbound": 90, "slow_inbound": 10, **self.dropped}

    def translations(self) -> dict[tuple[int, str], tuple[int, int]]:
        return {
            (0, "fast_outbound"): (900, 3_000_000),
            (0, "slow_outbound"): (90, 900_000),
            (0, "slow_inbound"): (10, 100_000),
        }

    def flush(self, slots: Any) -> int:
        self.flushed = slots.tolist()
        return len(slots)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(args)
    assert isinstance(ended.value.code, int)
    return ended.value.code


Replace = Callable[..., SimpleNamespace]


@pytest.fixture
def replace_module(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """Puts a made-up module in the place of xdpmasq.NAME."""

    def replace(name: str, **attributes: Any) -> SimpleNamespace:
        module = SimpleNamespace(**attributes)
        package, _, last = f"xdpmasq.{name}".rpartition(".")
        monkeypatch.setitem(sys.modules, f"xdpmasq.{name}", module)
        monkeypatch.setattr(importlib.import_module(package), last, module, raising=False)
        return module

    return replace


@pytest.fixture(autouse=True)
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("XDPMASQ_DEBUG", raising=False)


@pytest.fixture
def running(replace_module: Replace) -> Running:
    attached = Running()
    replace_module("datapath", find=lambda wan=None: attached)
    return attached


@pytest.fixture
def asked(replace_module: Replace, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the agent was called with."""
    calls: list[Any] = []

    def start(config: Config) -> dict[str, Any]:
        calls.append(config)
        return manifest()

    def detach(wan: str | None) -> dict[str, Any]:
        calls.append(wan)
        return {"interfaces": ["eth0", "eth1"], "sessions": 1, "sysctls": {"net.ipv4.ip_forward": "0"}}

    replace_module("daemon", run=calls.append)
    replace_module("control", detach=detach)
    monkeypatch.setattr("xdpmasq.background.start", start)
    return calls


# --- as a whole ------------------------------------------------------------------------------------


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"xdpmasq {__version__}\n"


@pytest.mark.parametrize("args", [[], ["--help"]], ids=["bare", "--help"])
def test_help_names_every_verb(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run(*args) == 0
    out = capsys.readouterr().out
    assert [verb for verb in VERBS if not re.search(rf"\b{verb}\b", out)] == []


@pytest.mark.parametrize(
    "verb",
    ["", "attach", "run", "detach", "status", "top", "trace", "doctor", "check", "sessions", "sessions list",
     "sessions flush", "sessions watch"],
)  # fmt: skip
def test_help_has_an_example(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert run(*verb.split(), "--help") == 0
    assert re.search(rf"Examples?:\s+xdpmasq {verb.removesuffix(' list')}", capsys.readouterr().out)


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom xdpmasq.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print({'numpy', 'bcc', 'pyroute2', 'prometheus_client', 'xdpmasq.lab'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(["frob"], "xdpmasq: No such command 'frob'\n  → see `xdpmasq --help`\n", id="verb"),
        pytest.param(
            ["status", "--x"], "xdpmasq: No such option: --x\n  → see `xdpmasq status --help`\n", id="option"
        ),
        pytest.param(["check"], "xdpmasq: Missing argument 'FILE'\n  → see `xdpmasq check --help`\n", id="argument"),
        pytest.param(
            ["attach", "--lan", "eth1"],
            "xdpmasq: no WAN interface named\n  → give --wan NAME, or wan in [interfaces] of --config FILE\n",
            id="no WAN",
        ),
        pytest.param(
            ["attach", "--wan", "a", "--lan", "b", "--mode", "q"],
            "xdpmasq: there is no mode q\n  → give one of auto, xdp, tc\n",
            id="mode",
        ),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert run(*args) == 2
    assert capsys.readouterr() == ("", said)


@pytest.mark.parametrize(
    "verb",
    ["attach", "run", "detach", "status", "top", "trace --internal 192.168.0.2", "sessions", "sessions list",
     "sessions flush", "sessions watch"],
)  # fmt: skip
def test_root_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run(*verb.split()) == 1
    out, err = capsys.readouterr()
    assert (out, re.fullmatch(r"xdpmasq: .*must be run as root.*\n  → .*sudo\n", err) is not None) == ("", True)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        pytest.param(
            DatapathError("what", "why", "do"), 1, "xdpmasq: what: why\n  → do\n", id="error with what to do"
        ),
        pytest.param(DatapathError("what"), 1, "xdpmasq: what\n", id="error alone"),
        pytest.param(KeyboardInterrupt(), 130, "", id="Ctrl-C"),
        pytest.param(typer.Abort(), 130, "", id="abort"),
        pytest.param(
            KeyError("x"),
            1,
            "xdpmasq: unexpected error: KeyError: 'x'\n  → XDPMASQ_DEBUG=1 shows where; please report it\n",
            id="bug",
        ),
    ],
)
def test_errors(
    capsys: pytest.CaptureFixture[str], replace_module: Replace, raised: BaseException, code: int, said: str
) -> None:
    def find(wan: str | None = None) -> None:
        raise raised

    replace_module("datapath", find=find)
    assert run("status") == code
    out, err = capsys.readouterr()
    # older clicks go to a new line after ^C
    assert (out, err.removeprefix("\n") if code == 130 else err) == ("", said)


def test_debug_shows_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, replace_module: Replace
) -> None:
    monkeypatch.setenv("XDPMASQ_DEBUG", "1")
    replace_module("datapath", find=lambda wan=None: json.loads("?"))
    assert run("status") == 1
    assert "Traceback" in capsys.readouterr().err


def test_broken_pipe_is_quiet() -> None:
    """The output is shorter than a buffer, so that only flushing it meets the broken pipe."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        command = [sys.executable, "-m", "xdpmasq", "--help"]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_lab_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    lab = typer.Typer(rich_markup_mode=None)

    @lab.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
    def execute(ctx: typer.Context, role: str, command: list[str], name: str = "n") -> None:
        seen.append((ctx.command_path, role, command, name))
        raise typer.Exit(3)

    @lab.command()
    def other() -> None:
        pass

    monkeypatch.setitem(sys.modules, "xdpmasq.cli.lab", SimpleNamespace(app=lab))
    monkeypatch.setattr(cli, "lab", SimpleNamespace(app=lab), raising=False)
    assert run("lab", "exec", "--name", "x", "a-box", "--", "curl", "-I", "--help") == 3
    assert seen == [("xdpmasq lab exec", "a-box", ["--", "curl", "-I", "--help"], "x")]


# --- verbs -----------------------------------------------------------------------------------------


def test_attach(capsys: pytest.CaptureFixture[str], asked: list[Any]) -> None:
    assert run("attach", "--wan", "eth0", "--lan", "eth1", "--lan", "ppp*", "--mode", "tc") == 0
    assert asked == [Config(wans=("eth0",), lans=("eth1", "ppp*"), mode="tc")]
    assert capsys.readouterr().out == (
        "masquerading eth1, ppp* out of eth0 as 203.0.113.1\n"
        "  eth0  wan  xdp  driver ixgbe has native XDP\n"
        "  eth1  lan  tc   a veth\n"
    )


def test_attach_json(capsys: pytest.CaptureFixture[str], asked: list[Any]) -> None:
    assert run("attach", "--config", EXAMPLE, "--json") == 0
    assert asked == [Config(wans=("eth0",), lans=("eth1",), origin=Origin(EXAMPLE))]
    assert json.loads(capsys.readouterr().out)["external"] == "203.0.113.1"


def test_run_with_a_file_and_an_option(asked: list[Any]) -> None:
    assert run("run", "--config", EXAMPLE, "--lan", "br0") == 0
    assert asked == [Config(wans=("eth0",), lans=("br0",), origin=Origin(EXAMPLE, lans=("br0",)))]


def test_nothing_is_started_with_a_bad_file(
    capsys: pytest.CaptureFixture[str], asked: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text("[timeouts]\nudp_s = 1\n")
    assert run("attach", "--config", str(path), "--wan", "eth0", "--lan", "eth1") == 2
    assert (asked, f"{path}, line 2: timeouts.udp_s = 1" in capsys.readouterr().err) == ([], True)


@pytest.mark.parametrize(("args", "wan"), [([], None), (["--wan", "eth0"], "eth0")], ids=["the one", "by WAN"])
def test_detach(capsys: pytest.CaptureFixture[str], asked: list[Any], args: list[str], wan: str | None) -> None:
    assert run("detach", *args) == 0
    assert asked == [wan]
    expected = "detached from eth0, eth1; 1 session ended\n  net.ipv4.ip_forward is 0 again\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        pytest.param('[interfaces]\nwan = "a"\nlan = ["b"]', 0, "OK", id="good"),
        pytest.param(
            '[interfaces]\nwan = "a"\nlan = ["b"]\n[timeouts]\nudp_s = 60', 0, "note: .*RFC 4787", id="below an RFC"
        ),
        pytest.param('[interfaces]\nwan = "a"\nlam = ["b"]', 2, "line 3: .*\n.*mean lan", id="bad"),
        pytest.param('[interfaces]\nwan = "a"', 2, "no LAN", id="incomplete"),
    ],
)
def test_check(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, code: int, said: str) -> None:
    path = tmp_path / "masq.toml"
    path.write_text(text)
    assert run("check", str(path)) == code
    printed = capsys.readouterr()
    assert re.search(said, printed.err if code else printed.out)


@pytest.fixture
def busy(running: Running, monkeypatch: pytest.MonkeyPatch) -> Running:
    """While somebody waits, each session carries a packet out of 1,000 bytes, and five in of 100,000."""

    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += 1
        for slot in (2000, 65536 + 3000):
            for way, packets, size in (("sent", 1, 1000), ("received", 5, 100_000)):
                running.sessions[way]["packets"][slot] += packets
                running.sessions[way]["bytes"][slot] += size

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    return running


@pytest.mark.usefixtures("busy")
def test_status(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    assert run("status") == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0].startswith("xdpmasq 0.1.0: working since ")
    assert out.splitlines()[0].endswith("(1 h 2 min)")
    assert [" ".join(line.split()) for line in out.splitlines()[2:]] == [
        "agent running, process 4711",
        "metrics 127.0.0.1:9477",
        "external 203.0.113.1 on eth0",
        "internal eth1, ppp*",
        "mode auto eth0 wan xdp driver ixgbe has native XDP",
        "eth1 lan tc a veth",
        "traffic out 16.0 kbit/s 2 pps, in 1.60 Mbit/s 10 pps",
        "sessions 2: TCP 1, UDP 1, ICMP 0",
        "0 of 64 (0.0%) places for further ones of a mapping taken",
        "ports TCP 1 of 60,000 (0.0%) in use",
        "UDP 1 of 60,000 (0.0%) in use",
        "ICMP 0 of 60,000 (0.0%) in use",
        "packets XDP 900, TC 100, 90.0% on the fast path",
        "bytes XDP 3.00 MB, TC 1.00 MB, 75.0% on the fast path",
        "drops 7 a protocol that is not to be translated, from inside (drop_protocol)",
    ]


@pytest.mark.usefixtures("busy")
def test_status_is_one_screen(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    """However many reasons there were to drop: those with most come first."""
    names = [name for name in source.counters() if name.startswith("drop_")]
    running.dropped = {name: number for number, name in enumerate(names, 1)}
    assert run("status") == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) < 24
    assert f"({names[-1]})" in shown[-7]
    assert shown[-1].split() == f"and for {len(names) - 6} more reasons, see --json".split()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        pytest.param({"external": None}, "not working: the WAN eth0 has no address", id="no address"),
        pytest.param({**TWO_WANS, "externals": [None, "192.0.2.1"]}, "no address yet on eth0", id="one of two"),
        pytest.param(
            {**TWO_WANS, "externals": [None, None]},
            "not working: the WAN eth0 and eth9 has no address",
            id="none of two",
        ),
        pytest.param({"interfaces": []}, "not working: the WAN eth0 is not there", id="no WAN"),
        pytest.param(
            {"interfaces": manifest()["interfaces"][:1]},
            "not working: no interface is there that fits eth1, ppp*",
            id="no LAN",
        ),
    ],
)
def test_status_of_what_does_not_work(
    capsys: pytest.CaptureFixture[str], running: Running, changed: dict[str, Any], said: str
) -> None:
    running.manifest |= changed
    assert run("status") == 0
    assert said in capsys.readouterr().out


def test_status_with_the_agent_dead(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    running.agent_alive = False
    assert run("status") == 0
    out = capsys.readouterr().out
    assert ": working since" in out
    assert "agent     not running" in out
    assert "punt port" not in out


def test_status_of_pcp(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    running.manifest["pcp"] = {"enabled": True, "listening": ["192.168.0.1"], "answered": 1234, "dropped": 5}
    assert run("status") == 0
    said = "pcp       listening at 192.168.0.1; 1,234 requests answered, 5 dropped"
    assert said in [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_status_without_a_punt_port(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    why = "cannot create a TAP: /dev/net/tun: No such file or directory"
    running.manifest["punt"] = {"name": None, "why_not": why}
    assert run("status") == 0
    said = f"no punt port: {why}; out-of-order fragments are dropped, refusals are silent"
    assert said in [line.strip() for line in capsys.readouterr().out.splitlines()]


def test_status_json(capsys: pytest.CaptureFixture[str], running: Running) -> None:
    assert run("status", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == [
        *("version", "working", "why_not", "attached_at", "uptime_s", "agent", "wan", "external", "wans"),
        *("lans", "mode", "interfaces", "punt", "pcp", "metrics", "sessions", "further_sessions", "ports"),
        *("port_blocks", "packets", "bytes", "drops", "counters"),
    ]
    assert found["working"] is True
    assert found["wans"] == [{"name": "eth0", "external": "203.0.113.1"}]
    assert found["agent"] == {"alive": True, "pid": 4711}
    assert found["punt"] == {"name": "masq-punt0", "why_not": ""}
    assert found["metrics"] == "127.0.0.1:9477"
    assert found["sessions"] == {"total": 2, "tcp": 1, "udp": 1, "icmp": 0}
    assert found["packets"] == {"fast": 900, "slow": 100}
    assert found["drops"] == {"drop_protocol": 7}
    assert found["counters"]["drop_rewrite"] == 0


def test_status_of_nothing(capsys: pytest.CaptureFixture[str], replace_module: Replace) -> None:
    def find(wan: str | None = None) -> None:
        raise NotAttachedError("not attached", f"to {wan}")

    replace_module("datapath", find=find)
    assert run("status", "--wan", "eth7") == 1
    assert capsys.readouterr().err == "xdpmasq: not attached: to eth7\n"


TOP = """\
out 16.0 kbit/s 2 pps   in 1.60 Mbit/s 10 pps
sessions 2   ports tcp 0.0%  udp 0.0%  icmp 0.0%   further 0.0%
drops none
"""


@pytest.mark.usefixtures("busy")
def test_top(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("top", "--once", "--sort", "host") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{TOP}2 of 2 hosts by host, 1.0 s until ")
    assert [line.split() for line in out.splitlines()[5:]] == [
        ["HOST", "SESSIONS", "OUT", "IN", "OUT-PACKETS", "IN-PACKETS"],
        ["192.168.0.2", "1", "8.00", "kbit/s", "800", "kbit/s", "1", "pps", "5", "pps"],
        ["192.168.0.3", "1", "8.00", "kbit/s", "800", "kbit/s", "1", "pps", "5", "pps"],
    ]
    assert run("top", "--count", "2", "--sessions", "--proto", "tcp") == 0
    assert capsys.readouterr().out.count("1 of 1 sessions by rate") == 2


@pytest.mark.usefixtures("busy")
def test_top_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("top", "--count", "2", "--json", "--internal", "192.168.0.3") == 0
    for line in capsys.readouterr().out.splitlines():
        found = json.loads(line)
        assert found["in"] == {"bytes_per_s": 200_000, "packets_per_s": 10}
        assert [(each["host"], each["sessions"]) for each in found["top"]] == [("192.168.0.3", 1)]


@pytest.mark.parametrize("each", [False, True], ids=["hosts", "sessions"])
@pytest.mark.parametrize("sort", ["rate", "packets"])
@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)], ids=["80x24", "120x40", "200x60"])
def test_top_fits_the_terminal(busy: Running, size: tuple[int, int], sort: str, each: bool) -> None:
    """With more sessions than lines, each with addresses of full length."""
    for slot in range(4000, 4100):
        row = busy.sessions[slot] = busy.sessions[2000]
        row["mapping"], row["in"]["new_port"] = slot, 0xFFFF
        row["in"]["new_addr"]["word"] = int.from_bytes(bytes([192, 168, 111, slot - 3900]), sys.byteorder)
        row["out"]["remote_addr"]["word"] = int.from_bytes(bytes([198, 151, 100, 210]), sys.byteorder)
        row["out"]["remote_port"] = row["out"]["new_port"] = 0xFFFF
    width, height = size
    console = Console(width=width, height=height, file=io.StringIO())
    view = View(Selection(), sort, not each, height - BESIDE)
    before = rates.look(busy)  # type: ignore[arg-type]
    busy.sessions["received"]["bytes"] += 999_000_000_000
    busy.sessions["received"]["packets"] += 99_000_000
    time.sleep(1)
    measured = rates.between(before, rates.look(busy))  # type: ignore[arg-type]
    with console.capture() as drawn:
        console.print(screen(measured, view.first(measured), view, width), KEYS, sep="\n", end="")
    lines = drawn.get().split("\n")
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)
    assert all(re.search(r"[0-9] (Tbit/s|Mpps)", line) for line in lines[6:-1]), lines


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(["--sort", "size"], "there is no order size", id="order"),
        pytest.param(["--proto", "sctp"], "there is no protocol sctp", id="protocol"),
        pytest.param(["--interval", "0"], "0", id="interval"),
    ],
)
def test_top_refused(capsys: pytest.CaptureFixture[str], running: Running, args: list[str], said: str) -> None:
    assert run("top", *args) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(["--internal", "192.168.0.0/24"], "192.168.0.0/24 is no host", id="a network"),
        pytest.param(["--internal", "192.168.0.2", "--port", "65536"], "ports end at 65535", id="port"),
        pytest.param(["--internal", "192.168.0.2", "--seconds", "0"], "above 0", id="seconds"),
        pytest.param(["--internal", "192.168.0.2", "--remote", "x"], "x is not an endpoint", id="remote"),
        pytest.param(["--internal", "192.168.0.2", "--protocol", "x"], "there is no protocol x", id="protocol"),
        pytest.param([], "--internal", id="no host"),
    ],
)
def test_trace_refused(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert run("trace", *args) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bit/s"), (999.4, "999 bit/s"), (999.5, "1.00 kbit/s"), (99_951, "100 kbit/s"), (5e15, "5000 Tbit/s")],
)
def test_scaled(value: float, text: str) -> None:
    assert common.scaled(value, "bit/s") == text


@pytest.mark.parametrize("args", [["sessions"], ["sessions", "list"]], ids=["bare", "list"])
@pytest.mark.parametrize(
    ("filters", "protocols"),
    [
        pytest.param([], ["tcp", "udp"], id="all"),
        pytest.param(["--proto", "udp"], ["udp"], id="one"),
        pytest.param(["--internal", "192.168.0.2", "--state", "established"], ["tcp"], id="two filters"),
        pytest.param(["--remote", "9.9.9.9", "--external", ":1"], [], id="none"),
    ],
)
def test_sessions(
    capsys: pytest.CaptureFixture[str], running: Running, args: list[str], filters: list[str], protocols: list[str]
) -> None:
    assert run(*args, *filters) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["PROTO", *protocols]
    assert run(*args, *filters, "--json") == 0
    assert [each["protocol"] for each in json.loads(capsys.readouterr().out)] == protocols


@pytest.mark.parametrize(
    ("args", "said"),
    [
        pytest.param(["--proto", "sctp"], "there is no protocol sctp", id="protocol"),
        pytest.param(["--internal", "box"], "box is not an endpoint", id="endpoint"),
        pytest.param(["--proto", "tcp", "flush"], "options stand before flush", id="filter before flush"),
        pytest.param(["--json", "watch"], "options stand before watch", id="option before watch"),
        pytest.param(["flush"], "no filter is given", id="flush of nothing in particular"),
        pytest.param(["flush", "--all", "--proto", "tcp"], "both --all and a filter", id="flush of all and some"),
    ],
)
def test_sessions_refused(capsys: pytest.CaptureFixture[str], running: Running, args: list[str], said: str) -> None:
    assert run("sessions", *args) == 2
    assert (said in capsys.readouterr().err, running.flushed) == (True, [])


@pytest.mark.parametrize(
    ("args", "slots", "said"),
    [
        pytest.param(["--all"], [2000, 68536], "2 sessions ended\n", id="all"),
        pytest.param(["--proto", "tcp"], [2000], "1 session ended\n", id="some"),
        pytest.param(["--proto", "tcp", "--json"], [2000], '{\n  "flushed": 1\n}\n', id="JSON"),
        pytest.param(["--proto", "icmp"], [], "0 sessions ended\n", id="none that fits"),
    ],
)
def test_flush(
    capsys: pytest.CaptureFixture[str], running: Running, args: list[str], slots: list[int], said: str
) -> None:
    assert run("sessions", "flush", *args) == 0
    assert (running.flushed, capsys.readouterr().out) == (slots, said)


class Watcher:
    """Stands for events.Watcher: nothing; two events and others lost; Ctrl-C."""

    made: ClassVar[list["Watcher"]] = []

    def __init__(self, attached: Running) -> None:
        self.made.append(self)
        table = read_table(attached.sessions, attached.settings, NOW, HZ)
        two = (np.array([time.time()] * 2), np.array([OPENED, CLOSED]), ["remote", "idle"], np.array([0.0, 7.0]))
        self._story, self._reads = Story(table, *two), iter([Batch([]), Batch([1, 2], 1234, 0.5)])

    def reads(self, attached: Running) -> bool:
        return self is not self.made[0] or attached.wan_names == ("eth0",)

    def read(self) -> Batch:
        batch = next(self._reads, None)
        if batch is None:
            raise KeyboardInterrupt
        return batch

    def story(self, rows: Any, selection: Selection) -> Story:
        fits = selection.mask(self._story.table) & bool(len(rows))
        told = self._story
        why = [each for each, fit in zip(told.why, fits, strict=True) if fit]
        return Story(told.table[fits], told.at[fits], told.kind[fits], why, told.seconds[fits])


@pytest.fixture
def watcher(running: Running, monkeypatch: pytest.MonkeyPatch) -> type[Watcher]:
    monkeypatch.setattr("xdpmasq.events.Watcher", Watcher)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Watcher, "made", [])
    return Watcher


@pytest.mark.usefixtures("watcher")
def test_watch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sessions", "watch") == 130
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:3] for line in lines] == [
        *(["EVENT", "PROTO"], ["lost", "1,234"], ["opened", "tcp"], ["closed", "udp"])
    ]
    assert " ".join(lines[1][2:]) == "1,234 events, and 0.5 s not listened to"


@pytest.mark.usefixtures("watcher")
@pytest.mark.parametrize(
    ("args", "events"),
    [
        pytest.param([], [("lost", None), ("opened", "tcp"), ("closed", "udp")], id="all"),
        pytest.param(["--proto", "tcp"], [("lost", None), ("opened", "tcp")], id="filtered"),
    ],
)
def test_watch_json(capsys: pytest.CaptureFixture[str], args: list[str], events: list[Any]) -> None:
    assert run("sessions", "watch", "--json", *args) == 130
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(each["event"], each.get("protocol")) for each in found] == events
    assert (found[0]["count"], found[0]["deaf_s"]) == (1234, 0.5)
    assert all(abs(each["time"] - time.time()) < 60 for each in found)


def test_watch_goes_on_with_another_datapath(running: Running, watcher: type[Watcher]) -> None:
    running.wan_names = ("eth9",)
    assert run("sessions", "watch") == 130
    assert len(watcher.made) == 2


@pytest.mark.usefixtures("watcher")
def test_watch_ends_with_the_datapath(
    capsys: pytest.CaptureFixture[str], replace_module: Replace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([Running()])

    def find(wan: str | None = None) -> Running:
        if (attached := next(found, None)) is None:
            raise NotAttachedError("gone")
        return attached

    replace_module("datapath", find=find)
    monkeypatch.setattr(sessions_cli, "FIND_S", 0)
    assert run("sessions", "watch") == 1
    assert capsys.readouterr().err == "xdpmasq: gone\n"


@dataclass(frozen=True)
class Finding:
    """As doctor.finding.Finding."""

    check: str
    level: str
    message: str
    do: str = ""


@pytest.fixture
def doctor(replace_module: Replace) -> SimpleNamespace:
    """A doctor that notes what it was called with; ``findings`` can be set."""
    module = replace_module("doctor", findings=[Finding("jit", "ok", "on")], calls=[])

    def examine(wans: Any, lans: Any, mode: str, ours: Any) -> list[Finding]:
        module.calls.append((tuple(wans), tuple(lans), mode, set(ours)))
        return list(module.findings)

    module.run = examine
    names = {1: "masq_xdp", 2: "somebody"}

    class Program:
        def __init__(self, number: int) -> None:
            self.name = names[number]

        def __enter__(self) -> "Program":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        @staticmethod
        def by_id(number: int) -> "Program":
            return Program(number)

    replace_module("bpf", Program=Program)
    replace_module("net.netdev", links=lambda: ["a link"])
    replace_module("datapath", find=lambda wan=None: Running(), program_ids=lambda link: [1, 2], PROGRAM="masq_")
    return module


@pytest.mark.parametrize(
    ("args", "call"),
    [
        pytest.param(
            ["--wan", "eth0", "--lan", "a", "--lan", "b"], (("eth0",), ("a", "b"), "auto", {1}), id="options"
        ),
        pytest.param(["--config", EXAMPLE, "--mode", "xdp"], (("eth0",), ("eth1",), "xdp", {1}), id="file"),
        pytest.param([], (("eth0",), ("eth1", "ppp*"), "auto", {1}), id="what runs"),
    ],
)
def test_doctor_looks_at(doctor: SimpleNamespace, args: list[str], call: tuple[Any, ...]) -> None:
    assert run("doctor", *args) == 0
    assert doctor.calls == [call]


def test_doctor_without_anything_running(doctor: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(wan: str | None = None) -> None:
        raise NotAttachedError("nothing")

    monkeypatch.setattr(sys.modules["xdpmasq.datapath"], "find", find)
    assert run("doctor") == 0
    assert doctor.calls == [((), (), "auto", {1})]


def test_doctor_says_what_to_do(capsys: pytest.CaptureFixture[str], doctor: SimpleNamespace) -> None:
    doctor.findings = [
        Finding("jit", "ok", "on"),
        Finding("offloads", "warn", "LRO is on", "ethtool -K eth0 lro off"),
        Finding("kernel", "block", "too old", "use 5.15"),
    ]
    assert run("doctor") == 1
    assert capsys.readouterr().out == (
        "ok     jit       on\n"
        "warn   offloads  LRO is on\n"
        "                 → ethtool -K eth0 lro off\n"
        "block  kernel    too old\n"
        "                 → use 5.15\n"
        "1 blocking, 1 warning\n"
    )
    assert run("doctor", "--json") == 1
    expected = {"check": "kernel", "level": "block", "message": "too old", "do": "use 5.15"}
    assert json.loads(capsys.readouterr().out)[2] == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        pytest.param(-1, "0 s", id="clock set back"),
        pytest.param(59.9, "59 s", id="seconds"),
        pytest.param(61, "1 min 1 s", id="minutes"),
        pytest.param(7199, "1 h 59 min", id="hours"),
        pytest.param(90000, "1 d 1 h", id="days"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert common.duration(seconds) == text
