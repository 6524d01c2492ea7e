"""Reading, checking and combining settings."""

import json
import re
import tomllib
from dataclasses import fields, replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from xdpmasq import configfile
from xdpmasq.config import (
    Config,
    Filtering,
    Limits,
    Log,
    Metrics,
    Pcp,
    Ports,
    Timeouts,
    advice,
    as_fields,
    from_fields,
    from_options,
    validate,
)
from xdpmasq.configfile import load
from xdpmasq.errors import ConfigError, UsageError
from xdpmasq.externals import Externals
from xdpmasq.forwards import parse
from xdpmasq.redirects import parse as redirect
from xdpmasq.triggers import parse as trigger

EXAMPLE = Path(__file__).parents[2] / "docs" / "config.example.toml"
HOME = Config(wans=("eth0",), lans=("eth1",))


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes a text to a file and returns its path."""

    def write(text: str | bytes) -> Path:
        path = tmp_path / "masq.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_example_is_at_the_defaults() -> None:
    assert load(EXAMPLE) == HOME


@pytest.mark.parametrize(
    ("size", "wanted", "blocks"), [(0, None, 0), (512, None, 8), (1024, None, 4), (4096, None, 1), (512, 3, 3)]
)
def test_blocks_of_a_host(size: int, wanted: int | None, blocks: int) -> None:
    config = replace(HOME, ports=Ports(block_size=size), limits=Limits(blocks_per_host=wanted))
    validate(config)
    assert config.host_blocks == blocks


def test_example_has_every_key() -> None:
    tables = tomllib.loads(example_with_rules())
    for kind, keys in RULE_KEYS.items():
        assert {key for each in tables.pop(kind) for key in each} == keys
    assert {name: set(table) for name, table in tables.items()} == {
        "interfaces": {"wan", "lan", "mode", "internal"},
        "timeouts": {each.name for each in fields(Timeouts)},
        "ports": {each.name for each in fields(Ports)},
        "external": {each.name for each in fields(Externals)},
        "filtering": {each.name for each in fields(Filtering)},
        "limits": {each.name for each in fields(Limits)},
        "sessions": {"further", "inbound_refresh"},
        "tcp": {"mss"},
        "protocols": {"other"},
        "pcp": {each.name for each in fields(Pcp)},
        "metrics": {each.name for each in fields(Metrics)},
        "log": {each.name for each in fields(Log)},
    }


RULE_KEYS = {
    "forward": {"protocol", "ports", "to", "from"},
    "redirect": {"protocol", "ports", "to", "on", "from", "not_to"},
    "trigger": {"protocol", "ports", "opens", "lasts_s"},
    "alg": {"name", "enabled", "ports", "internal"},
}


def example_with_rules() -> str:
    """What stands behind a # without a blank is a setting."""
    return re.sub(r"^#(?=\S)", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def test_rules_of_the_example(written: Any) -> None:
    assert [str(rule) for rule in load(written(example_with_rules())).rules] == [
        "tcp 8080 → 192.168.0.2:80",
        "tcp 80 → 192.168.0.2:80 192.168.0.3:80*2 from 198.51.100.0/24",
        "udp default → 192.168.0.9",
        "tcp 80 on lan but not to 198.51.100.0/24 → the gateway's 3128",
        "tcp 80 on wan from 203.0.113.0/24 → the gateway's 8080",
        "udp 6112 opens tcp 6112-6119 for 600 s",
    ]


def test_everything_is_read(written: Any) -> None:
    path = written(
        """
        [interfaces]
        wan = "wan0"
        lan = ["lan*", "ppp?"]
        mode = "tc"
        internal = ["10.20.0.0/16", "10.30.1.0/24"]
        [timeouts]
        tcp_established_s = 7441
        tcp_transitory_s = 241
        udp_s = 301
        icmp_s = 61
        fragment_s = 29
        port_rest_s = 0
        [ports]
        first = 2000
        last = 3000
        preserve = true
        parity = true
        low_ports = true
        overload = true
        [filtering]
        tcp = "address-dependent"
        udp = "endpoint-independent"
        [limits]
        sessions_per_host = 1000
        ports_per_host = 900
        new_per_second = 10
        burst = 20
        refusal = "host-unreachable"
        [sessions]
        further = 1024
        inbound_refresh = false
        [tcp]
        mss = 1400
        [protocols]
        other = "drop"
        [metrics]
        enabled = false
        listen = "[::1]:9478"
        web_config = "/etc/web.yml"
        top_hosts = 20
        [log]
        what = "sessions"
        destinations = true
        file = "/var/log/nat.json"
        syslog = "local0"
        ipfix = "[::1]:4739"
        per_second = 10
        [[forward]]
        protocol = "udp"
        ports = "5000-5010"
        to = ["192.168.0.2:6000", "192.168.0.3*3"]
        from = "198.51.100.7"
        [[redirect]]
        protocol = "udp"
        ports = "53-54"
        to = "5353-5354"
        on = "lan"
        from = "10.20.0.0/16"
        not_to = ["198.51.100.0/24", "192.0.2.1"]
        [[trigger]]
        protocol = "udp"
        ports = "6112-6113"
        opens = "tcp 7000-7010"
        lasts_s = 60
        """
    )
    assert load(path) == EVERYTHING


EVERYTHING = Config(
    wans=("wan0",),
    lans=("lan*", "ppp?"),
    mode="tc",
    internal=(IPv4Network("10.20.0.0/16"), IPv4Network("10.30.1.0/24")),
    timeouts=Timeouts(7441, 241, 301, 61, 29, 0),
    ports=Ports(2000, 3000, preserve=True, parity=True, low_ports=True, overload=True),
    filtering=Filtering("address-dependent", "endpoint-independent"),
    limits=Limits(1000, 900, 10, 20, "host-unreachable"),
    further_sessions=1024,
    inbound_refresh=False,
    mss=1400,
    other="drop",
    metrics=Metrics(enabled=False, listen="[::1]:9478", web_config="/etc/web.yml", top_hosts=20),
    log=Log("sessions", True, "/var/log/nat.json", "local0", "[::1]:4739", 10),
    forwards=(parse("udp", "5000-5010", ["192.168.0.2:6000", "192.168.0.3*3"], "198.51.100.7"),),
    redirects=(
        redirect("udp", "53-54", 5353, "lan", source="10.20.0.0/16", not_to=["192.0.2.1", "198.51.100.0/24"]),
    ),
    triggers=(trigger("udp", "6112-6113", "tcp 7000-7010", 60),),
)


@pytest.mark.parametrize("config", [HOME, EVERYTHING], ids=["defaults", "everything"])
def test_a_configuration_travels_as_json(config: Config) -> None:
    assert from_fields(json.loads(json.dumps(as_fields(config)))) == config


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("", Config(wans=(), lans=()), id="empty"),
        pytest.param("[timeouts]\nudp_s = 60", Config((), (), timeouts=Timeouts(udp_s=60)), id="lowest"),
        pytest.param("timeouts.udp_s = 90", Config((), (), timeouts=Timeouts(udp_s=90)), id="dotted"),
        pytest.param('[interfaces]\nwan = ["a", "b"]', Config(("a", "b"), ()), id="two WANs"),
        pytest.param('[interfaces]\nwan = "ppp*"', Config(("ppp*",), ()), id="wildcard WAN"),
        pytest.param('[sessions]\nfurther = "auto"', Config((), ()), id="automatic"),
        pytest.param('[tcp]\nmss = "auto"', Config((), (), mss="auto"), id="mss by the MTU"),
    ],
)
def test_parts_may_be_missing(written: Any, text: str, wanted: Config) -> None:
    assert load(written(text)) == wanted


def forward(**changes: object) -> str:
    """A table of four lines, or of more."""
    values = {"protocol": "tcp", "ports": 8080, "to": "192.168.0.2:80", **changes}
    return "[[forward]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


# text, line, words that must be in the error
BAD = [
    pytest.param("[timeouts]\n\nudp_s = 59", 3, ["timeouts.udp_s = 59", "60 to 1000000"], id="too low"),
    pytest.param("[timeouts]\nudp_s = 1000001", 2, ["timeouts.udp_s = 1000001", "60 to"], id="too high"),
    pytest.param("[timeouts]\nicmp_s = 20", 2, ["icmp_s = 20", "RFC 5508"], id="icmp"),
    pytest.param("[timeouts]\nfragment_s = 31", 2, ["fragment_s = 31", "1 to 30"], id="fragments"),
    pytest.param("[timeouts]\nport_rest_s = -1", 2, ["port_rest_s = -1", "0 to 3600"], id="negative"),
    pytest.param('[timeouts]\nudp_s = "300"', 2, ['udp_s = "300"', "a whole number"], id="text for a number"),
    pytest.param("[timeouts]\nudp_s = 300.0", 2, ["udp_s = 300.0", "a whole number"], id="fraction"),
    pytest.param("[timeouts]\nudp_s = true", 2, ["udp_s = true", "a whole number"], id="switch for a number"),
    pytest.param("[timeouts]\nudp_s = 1979-05-27", 2, ["1979-05-27", "a whole number"], id="date"),
    pytest.param(
        "[timeouts]\ntcp_established_s = 100", 2, ["tcp_established_s = 100", "tcp_transitory_s = 240"], id="order"
    ),
    pytest.param("[metrics]\ntop_hosts = 1001", 2, ["top_hosts = 1001", "0 to 1000"], id="hosts"),
    pytest.param('[metrics]\nlisten = "9477"', 2, ['listen = "9477"', "ADDR:PORT"], id="no address"),
    pytest.param('[metrics]\nlisten = "gate:9477"', 2, ["gate:9477", "ADDR:PORT"], id="a name"),
    pytest.param('[metrics]\nlisten = "127.0.0.1:65536"', 2, ["65536", "ADDR:PORT"], id="beyond the last port"),
    pytest.param('[log]\nwhat = "all"', 2, ['what = "all"', "mappings, sessions, blocks"], id="logged"),
    pytest.param(
        "[ports]\nblock_size = 500", 2, ["block_size = 500", "powers of two", "256 to 4096"], id="odd block"
    ),
    pytest.param("[ports]\nblock_size = 128", 2, ["block_size = 128", "256 to 4096"], id="small block"),
    pytest.param("[ports]\nblock_size = -512", 2, ["block_size = -512", "256 to 4096"], id="negative block"),
    pytest.param("[ports]\nblock_size = 8192", 2, ["block_size = 8192", "256 to 4096"], id="large block"),
    pytest.param(
        *("[ports]\nblock_size = 512\nfirst = 2100\nlast = 2700", 2),
        ["block_size = 512", "whole in 2100 to 2700"],
        id="no whole block",
    ),
    pytest.param(
        "[ports]\nblock_size = 512\noverload = true", 3, ["overload = true", "block_size"], id="shared block"
    ),
    pytest.param(
        "[ports]\nblock_size = 512\npreserve = true", 3, ["preserve = true", "block_size"], id="preserved block"
    ),
    pytest.param(
        *("[ports]\nblock_size = 1024\n[limits]\nblocks_per_host = 5", 4),
        ["blocks_per_host = 5", "4096", "give 4 at most"],
        id="large blocks",
    ),
    pytest.param("[limits]\nblocks_per_host = 9", 2, ["blocks_per_host = 9", "1 to 8"], id="many blocks"),
    pytest.param("[limits]\nblocks_per_host = 4", 2, ["blocks_per_host = 4", "block_size = 0"], id="no blocks"),
    pytest.param('[log]\nwhat = "blocks"', 2, ['what = "blocks"', "block_size = 0"], id="no blocks to log"),
    pytest.param('[log]\nsyslog = "here"', 2, ['syslog = "here"', '"", daemon'], id="facility"),
    pytest.param('[log]\nipfix = "collector:4739"', 2, ["collector:4739", "ADDR:PORT"], id="collector's name"),
    pytest.param('[log]\nipfix = ":4739"', 2, [":4739", "ADDR:PORT"], id="no collector"),
    pytest.param("[log]\nper_second = 0", 2, ["per_second = 0", "1 to"], id="no record a second"),
    pytest.param("[log]\ndestinations = true", 2, ["destinations", 'what = "sessions"'], id="mappings' remotes"),
    pytest.param("[metrics]\nlisten = 9477", 2, ["listen = 9477", "a text in quotes"], id="a number for an endpoint"),
    pytest.param("[sessions]\nfurther = 3000", 2, ["further = 3000", "2048 and 4096"], id="no power of two"),
    pytest.param("[sessions]\nfurther = 512", 2, ["further = 512", "1024 to 4194304"], id="too small"),
    pytest.param("[sessions]\nfurther = 8388608", 2, ["further = 8388608", "4194304"], id="too big"),
    pytest.param("[sessions]\ninbound_refresh = 1", 2, ["= 1", "true or false"], id="number for a switch"),
    pytest.param("[ports]\nfirst = 80", 2, ["ports.first = 80", "1024 to 65535"], id="privileged port"),
    pytest.param("[ports]\nlast = 65536", 2, ["ports.last = 65536", "1024 to 65535"], id="no port"),
    pytest.param("[ports]\nfirst = 5000\nlast = 5010", 3, ["last = 5010", "64 ports"], id="too few ports"),
    pytest.param("[ports]\nlast = 5000\nfirst = 6000", 2, ["ports.last = 5000", "6000"], id="ports reversed"),
    pytest.param('[interfaces]\nmode = "fast"', 2, ['mode = "fast"', "auto, xdp, tc"], id="mode"),
    pytest.param('[interfaces]\nlan = "eth1"', 2, ['lan = "eth1"', "a list of texts"], id="text for a list"),
    pytest.param("[interfaces]\nlan = [1]", 2, ["a list of texts"], id="list of numbers"),
    pytest.param('[interfaces]\nwan = "a/b"', 2, ['wan = "a/b"', "ip link"], id="slash in a name"),
    pytest.param('[interfaces]\nwan = "sixteen-letters0"', 2, ["sixteen-letters0", "15 bytes"], id="long name"),
    pytest.param('[interfaces]\nlan = ["eth1", ""]', 2, ['lan = ""', "15 bytes"], id="empty name"),
    pytest.param(
        '[interfaces]\nwan = "eth0"\nlan = [\n "eth1",\n "eth0",\n]', 5, ['lan = "eth0"', "one-armed"], id="one-armed"
    ),
    pytest.param('[interfaces]\nwan = ["eth0", "eth0"]', 2, ["each has a number"], id="a WAN twice"),
    pytest.param('[interfaces]\nwan = ["eth1", "eth*"]', 2, ['wan = "eth*"', "fits the WAN eth1"], id="WANs overlap"),
    pytest.param(
        '[interfaces]\nwan = ["eth0", "eth1"]\nlan = ["eth1"]',
        3,
        ["fits the WAN eth1", "one-armed"],
        id="second WAN is LAN",
    ),
    pytest.param(
        f"[interfaces]\nwan = {[f'eth{n}' for n in range(5)]}", 2, ["there is room for 4"], id="too many WANs"
    ),
    pytest.param('[interfaces]\nwan = "eth0"\nlan = ["eth*"]', 3, ["eth*", "one-armed"], id="by wildcard"),
    pytest.param('[interfaces]\nwan = "ppp*"\nlan = ["ppp1"]', 3, ["ppp1", "one-armed"], id="by the WAN's wildcard"),
    pytest.param(
        '[interfaces]\ninternal = [\n"10.0.0.0/8",\n"10.1.2.3/16"]', 4, ["10.1.2.3/16", "host bits"], id="host bits"
    ),
    pytest.param('[interfaces]\ninternal = ["fd00::/8"]', 2, ["fd00::/8", "IPv4 prefix"], id="not IPv4"),
    pytest.param('[interfaces]\ninternal = ["0.0.0.0/0"]', 2, ["0.0.0.0/0"], id="everything internal"),
    pytest.param("# c\n[timeout]\nudp_s = 300", 2, ["[timeout]", "did you mean [timeouts]?"], id="unknown table"),
    pytest.param(
        "[x]", 1, ["[x]", "[interfaces], [timeouts], [ports], [filtering], ", "[[forward]]"], id="unlike any table"
    ),
    pytest.param("[timeouts]\n\nudp = 300", 3, ["udp in [timeouts]", "did you mean udp_s?"], id="unknown key"),
    pytest.param("[ports]\nudp_s = 300", 2, ["udp_s belongs in [timeouts]"], id="key of another table"),
    pytest.param("[ports]\nzz = 300", 2, ["zz in [ports]", "first, last"], id="unlike any key"),
    pytest.param('wan = "eth0"', 1, ["wan belongs in [interfaces]"], id="key before any table"),
    pytest.param("ports = 5", 1, ["ports = 5", "[ports]"], id="value for a table"),
    pytest.param("[timeouts]\nudp_s = 90\nudp_s = 95", 3, ["not valid TOML"], id="twice"),
    pytest.param("[ports]\nfirst 1024\nlast = 9", 2, ["not valid TOML", "first 1024"], id="syntax"),
    pytest.param('[interfaces]\nlan = ["eth1"', 2, ["not valid TOML"], id="not closed"),
    pytest.param("timeouts.udp_s = 5", 1, ["timeouts.udp_s = 5"], id="dotted key"),
    pytest.param("\ntimeouts = { udp_s = 5 }", 2, ["timeouts.udp_s = 5"], id="inline table"),
    pytest.param('[ports]\nfirst = 1024\n[timeouts]\n"udp_s" = 5', 4, ["timeouts.udp_s = 5"], id="quoted key"),
    pytest.param('[ports]\nparity = "yes"', 2, ['parity = "yes"', "true or false"], id="text for a switch"),
    pytest.param('[filtering]\nudp = "full-cone"', 2, ['udp = "full-cone"', "endpoint-independent"], id="filtering"),
    pytest.param("[limits]\nsessions_per_host = 0", 2, ["sessions_per_host = 0", "no host"], id="no sessions"),
    pytest.param("[limits]\nports_per_host = 0", 2, ["ports_per_host = 0", "1 to 65536"], id="no ports"),
    pytest.param("[limits]\nnew_per_second = 0", 2, ["new_per_second = 0", "leave it out"], id="no rate"),
    pytest.param("[limits]\nburst = 0", 2, ["burst = 0", "leave it out"], id="no burst"),
    pytest.param('[limits]\nburst = "auto"', 2, ['burst = "auto"', "a whole number"], id="not automatic"),
    pytest.param('[limits]\nports_per_host = "many"', 2, ['"many"', '"auto" or a whole number'], id="no such word"),
    pytest.param('[limits]\nrefusal = "silent"', 2, ['"silent"', "prohibited, host-unreachable"], id="refusal"),
    pytest.param("[tcp]\nmss = 87", 2, ["mss = 87", "88 to 65495"], id="segments too small"),
    pytest.param('[tcp]\nmss = "on"', 2, ['mss = "on"', "off, auto, or a number"], id="mss by a word"),
    pytest.param('[protocols]\nother = "pass"', 2, ['"pass"', "address-only, drop"], id="other protocols"),
    pytest.param(forward(ports=0), 3, ["port 0"], id="forward of port 0"),
    pytest.param("\n" + forward(to="fd00::1"), 5, ["fd00::1 is an IPv6 address"], id="forward to IPv6"),
    pytest.param(forward(to=[]), 1, ["no target"], id="forward to nobody"),
    pytest.param(forward(to=1), 4, ["forward.to = 1", "a list of texts"], id="forward to a number"),
    pytest.param(forward() + forward() + forward(), 7, ["tcp 8080 → 192.168.0.2:80 is there already"], id="twice"),
    pytest.param(
        forward() + forward(ports="8000-8100", to="192.168.0.3"),
        7,
        ["tcp 8000-8100 → 192.168.0.3:8000-8100", "tcp 8080 → 192.168.0.2:80 is there already", "tcp 8080"],
        id="overlap",
    ),
    pytest.param(
        forward() + forward(port=1), 9, ["unknown key port in [[forward]]", "did you mean ports?"], id="fwd"
    ),
    pytest.param(
        '[[forward]]\nprotocol = "tcp"', 1, ["[[forward]] without ports", "ports = 8080"], id="half a forward"
    ),
    pytest.param(
        '[[redirect]]\nprotocol = "tcp"\nports = 80\nto = 80',
        1,
        ["[[redirect]] without on", 'on = "lan"'],
        id="half a redirect",
    ),
    pytest.param(
        f'{forward(ports=80)}[[redirect]]\nprotocol = "tcp"\nports = "70-90"\nto = 70\non = "wan"',
        *(7, ["tcp 70-90 on wan", "tcp 80 → 192.168.0.2:80 is there already, and has tcp 80"]),
        id="redirect of a forward",
    ),
    pytest.param(
        '[[trigger]]\nprotocol = "udp"\nports = 1\nopens = "tcp"',
        4,
        ['write it as "tcp 6112-6119"'],
        id="trigger",
    ),
    pytest.param('[forward]\nprotocol = "tcp"', 1, ["begin it with [[forward]]"], id="a single forward"),
    pytest.param("[[ports]]\nfirst = 1", 1, ["begin it with [ports]"], id="many ports"),
    pytest.param('[forwards]\nports = "1"', 1, ["did you mean [[forward]]?"], id="unlike the repeated table"),
    pytest.param("[ports]\n#last = 1\nlast = 1", 3, ["ports.last = 1"], id="comment before"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD)
def test_errors_name_file_line_value_and_what_is_allowed(
    written: Any, text: str, line: int, words: list[str]
) -> None:
    path = written(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert caught.value.what.startswith(f"{path}, line {line}: ")
    assert [word for word in words if word not in str(caught.value)] == []
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "why"),
    [pytest.param(b"\xff\xfe", "UTF-8", id="not text"), pytest.param(None, "No such file", id="missing")],
)
def test_unreadable(written: Any, tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "absent.toml" if content is None else written(content)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
        load(path)
    assert why in caught.value.why


BASE = Config(wans=("ppp0",), lans=("br0", "br1"), mode="tc", ports=Ports(2000, 3000))


@pytest.mark.parametrize(
    ("wans", "lans", "mode", "base", "wanted"),
    [
        pytest.param(["eth0"], ["eth1"], None, None, HOME, id="options only"),
        pytest.param([], [], None, BASE, BASE, id="file only"),
        pytest.param(["eth0"], [], None, BASE, replace(BASE, wans=("eth0",)), id="other WAN"),
        pytest.param(["a", "b"], [], None, BASE, replace(BASE, wans=("a", "b")), id="two WANs"),
        pytest.param([], ["lan*"], None, BASE, replace(BASE, lans=("lan*",)), id="other LANs"),
        pytest.param([], [], "xdp", BASE, replace(BASE, mode="xdp"), id="other mode"),
    ],
)
def test_options_win_over_the_file(
    wans: list[str], lans: list[str], mode: str | None, base: Config | None, wanted: Config
) -> None:
    assert from_options(wans, lans, mode, base) == wanted


@pytest.mark.parametrize(
    ("wans", "lans", "mode", "kind", "words"),
    [
        pytest.param([], ["eth1"], None, UsageError, "--wan", id="no WAN"),
        pytest.param(["eth0"], [], None, UsageError, "--lan", id="no LAN"),
        pytest.param(["eth0"], ["eth1"], "fast", UsageError, "auto, xdp, tc", id="no mode"),
        pytest.param(["eth0"], ["eth1", "eth0"], None, ConfigError, "one-armed", id="one-armed"),
        pytest.param(["eth0"], ["*"], None, ConfigError, "one-armed", id="any interface"),
    ],
)
def test_options_refused(
    wans: list[str], lans: list[str], mode: str | None, kind: type[ConfigError], words: str
) -> None:
    with pytest.raises(kind, match=re.escape(words)) as caught:
        from_options(wans, lans, mode, None)
    assert caught.value.exit_code == 2


def test_validate_refuses_what_no_file_said() -> None:
    validate(HOME)
    with pytest.raises(ConfigError, match=re.escape("timeouts.udp_s = 5: allowed is 60")):
        validate(replace(HOME, timeouts=Timeouts(udp_s=5)))


@pytest.mark.req("4787-5")
@pytest.mark.req("5382-5")
@pytest.mark.req("5508-2")
@pytest.mark.req("6888-8")
def test_default_times_are_those_of_the_rfcs() -> None:
    times = Timeouts()
    assert times.udp_s >= 300
    assert times.tcp_established_s >= 2 * 3600 + 4 * 60
    assert times.tcp_transitory_s >= 240
    assert times.icmp_s >= 60
    assert times.port_rest_s >= 120


@pytest.mark.parametrize(
    ("listen", "endpoint"),
    [
        ("127.0.0.1:9477", ("127.0.0.1", 9477)),
        (":9477", ("0.0.0.0", 9477)),
        ("[::1]:9100", ("::1", 9100)),
    ],
)
def test_endpoints(listen: str, endpoint: tuple[str, int]) -> None:
    assert Metrics(listen=listen).endpoint == endpoint


@pytest.mark.req("attacks-exposed")
def test_metrics_are_on_loopback_unless_told_otherwise() -> None:
    endpoint = HOME.metrics.endpoint
    assert endpoint
    assert IPv4Address(endpoint[0]).is_loopback
    assert advice(replace(HOME, metrics=Metrics(listen="[::1]:1"))) == []
    (said,) = advice(replace(HOME, metrics=Metrics(listen=":9477")))
    assert said == "metrics.listen = :9477 without web_config: whoever reaches it may read it"
    assert advice(replace(HOME, metrics=Metrics(listen=":9477", web_config="/etc/web.yml"))) == []


def test_the_file_for_tls_is_beside_the_configuration(written: Any, tmp_path: Path) -> None:
    assert load(written('[metrics]\nweb_config = "web.yml"')).metrics.web_config == str(tmp_path / "web.yml")
    assert load(written('[metrics]\nweb_config = "/etc/web.yml"')).metrics.web_config == "/etc/web.yml"


def test_advice_names_the_rfc() -> None:
    assert advice(HOME) == []
    short = replace(HOME, timeouts=Timeouts(udp_s=90, port_rest_s=0))
    assert advice(short) == [
        "timeouts.udp_s = 90 is less than the 120 s of RFC 4787 REQ-5",
        "timeouts.port_rest_s = 0 is less than the 120 s of RFC 6888 REQ-8",
    ]


TWO = '[[forward]]\nprotocol = "tcp"\nports = 80\nto = "192.168.0.2"\n# another\n[[forward]]\nprotocol = "udp"\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TWO + 'to = "192.168.0.3"\nports = 0\n', 9),
        (TWO + 'ports = 5\nto = [\n  "192.168.0.3",\n  "nohost",\n]\n', 11),
        (TWO + 'ports = 5\nto = "192.168.0.3"\nfrom = "192.0.2.7/24"\n', 10),
        ('forward = [\n{protocol="tcp", ports=80, to="10.0.0.2"},\n{protocol="tcp", ports=0, to="10.0.0.2"},\n]', 3),
        ('forward = [\n  # {one}\n  {protocol="tcp", ports=80, to="10.0.0.2", tos=1},\n]', 3),
        ("timeouts = { udp_s = 1 }", 1),
        ("# a line separator: \u2028\n[timeouts]\nudp_s = 1\n", 3),
        ("[timeouts]\r\n\r\nudp_s = 1\r\n", 3),
    ],
)
def test_the_line_is_that_of_the_value(text: str, line: int) -> None:
    """In the second rule of a kind, in a list over lines, in braces, behind letters that end lines elsewhere."""
    with pytest.raises(ConfigError, match=rf"^file, line {line}: "):
        configfile.parse(Path("file"), text)
