"""What the user wants: settings, defaults with units, and checking them whole before anything changes.

A file (:mod:`xdpmasq.configfile`) and the command line both end in a :class:`Config` that passed :func:`validate`.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address
from typing import Any, Literal, get_args

from xdpmasq import forwards, redirects, triggers
from xdpmasq.algs import Use, default
from xdpmasq.errors import ConfigError, UsageError
from xdpmasq.externals import Externals
from xdpmasq.forwards import Rule
from xdpmasq.redirects import Redirect
from xdpmasq.triggers import Trigger

Mode = Literal["auto", "xdp", "tc"]
MODES: tuple[Mode, ...] = get_args(Mode)
# How strictly a mapping looks at who answers, in the order of enum filtering (RFC 4787 section 5).
FILTERINGS = ("address-and-port-dependent", "address-dependent", "endpoint-independent")
LOGGED = ("mappings", "sessions", "blocks")
FACILITIES = ("", "daemon", "user", "auth", "authpriv", *(f"local{nth}" for nth in range(8)))
REFUSALS = ("prohibited", "host-unreachable")
OTHERS = ("address-only", "drop")
WANS_MOST = 4
HOST_BLOCKS = 8  # that of bpf/types.h; abi.py has numpy with it, and --help is to be quick
BLOCK_PORTS_LEAST = 256  # a packet that needs another block may look at each
BLOCK_PORTS_MOST = 4096  # of all blocks of a host: a packet that opens a mapping may look at each


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
    """External ports to choose from, and how; the host's own ephemeral range is always left out.

    Attributes:
        preserve: an internal port is kept where it is free.
        parity: even to even, odd to odd (RFC 4787 REQ-4).
        low_ports: internal ports below 1024 get external ones below 1024 (RFC 4787 REQ-3a).
        overload: a used-up pool shares its ports among hosts, for different remotes.
        block_size: hosts get their ports in blocks of so many (RFC 6888 REQ-14); a power of two; 0: one by one.
    """

    first: int = 1024
    last: int = 65535
    preserve: bool = False
    parity: bool = False
    low_ports: bool = False
    overload: bool = False
    block_size: int = 0


@dataclass(frozen=True)
class Filtering:
    """Which remotes may use a mapping: one of :data:`FILTERINGS`."""

    tcp: str = FILTERINGS[0]
    udp: str = FILTERINGS[0]


@dataclass(frozen=True)
class Limits:
    """What one internal host may have open (RFC 6888 REQ-4), and how it is told that it may not have more.

    Attributes:
        sessions_per_host: None: a quarter of all room for further sessions.
        ports_per_host: external ports, for each protocol; None: three quarters of the pool.
        new_per_second, burst: sessions that it may open, lastingly and at once.
        refusal: one of :data:`REFUSALS`, ICMP 3/13 and 3/1.
        blocks_per_host: blocks of external ports; None: as many as may be.
    """

    sessions_per_host: int | None = None
    ports_per_host: int | None = None
    new_per_second: int = 50_000
    burst: int = 100_000
    refusal: str = REFUSALS[0]
    blocks_per_host: int | None = None


@dataclass(frozen=True)
class Pcp:
    """Mappings that internal hosts ask for (RFC 6887; NAT-PMP, RFC 6886).

    Attributes:
        internal: who may ask; none: every internal host.
        lifetime_min_s, lifetime_max_s: what is asked for is brought within these.
        per_host: mappings of one host.
        in_all: rules that they may take; a mapping with filters takes one for each.
        first, last: external ports.
    """

    enabled: bool = False
    internal: tuple[IPv4Network, ...] = ()
    lifetime_min_s: int = 120
    lifetime_max_s: int = 86400
    per_host: int = 128
    in_all: int = 512
    first: int = 1024
    last: int = 65535


def _endpoint(text: str) -> tuple[str, int] | None:
    """Of ADDR:PORT, [ADDR]:PORT or :PORT; None: it is none."""
    match = re.fullmatch(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[^:\[\]]*)):(?P<port>\d{1,5})", text)
    if not match or not 0 < int(match["port"]) < 65536:
        return None
    try:
        address = IPv6Address(match["v6"]) if match["v6"] else IPv4Address(match["v4"] or 0)
    except ValueError:
        return None
    return str(address), int(match["port"])


@dataclass(frozen=True)
class Log:
    """A record of who had which external port (RFC 6888 section 4); nothing unless a target is named.

    Attributes:
        what: one of :data:`LOGGED`.
        destinations: with the remotes, which RFC 6888 REQ-12 advises against.
        file: absolute path of a file of JSON lines.
        syslog: the facility, one of :data:`FACILITIES`.
        ipfix: ADDR:PORT of a collector, of IPv6 [ADDR]:PORT.
        per_second: records at most; more wait.
    """

    what: str = LOGGED[0]
    destinations: bool = False
    file: str = ""
    syslog: str = ""
    ipfix: str = ""
    per_second: int = 20_000

    @property
    def is_on(self) -> bool:
        return bool(self.file or self.syslog or self.ipfix)

    @property
    def collector(self) -> tuple[str, int] | None:
        """Address and port of ``ipfix``, or None where it is none."""
        found = _endpoint(self.ipfix)
        return found if found and not ip_address(found[0]).is_unspecified else None


@dataclass(frozen=True)
class Metrics:
    """How the agent shows itself to Prometheus.

    Attributes:
        listen: ADDR:PORT, of IPv6 [ADDR]:PORT; without ADDR on every address.
        web_config: absolute path of a file for TLS and passwords; empty: neither.
        top_hosts: that many internal hosts have series of their own.
    """

    enabled: bool = True
    listen: str = "127.0.0.1:9477"
    web_config: str = ""
    top_hosts: int = 0

    @property
    def endpoint(self) -> tuple[str, int] | None:
        """Address and port of ``listen``, or None where it is none."""
        return _endpoint(self.listen)

    @property
    def is_for_all(self) -> bool:
        """Others than this machine's users can reach it, and need no password."""
        return self.enabled and not self.web_config and not ip_address(self.endpoint[0]).is_loopback  # type: ignore[index]


@dataclass(frozen=True)
class Origin:
    """Where a configuration is from: a file, and the options that win over it."""

    file: str
    wans: tuple[str, ...] = ()
    lans: tuple[str, ...] = ()
    mode: str = ""


@dataclass(frozen=True)
class Config:
    """One gateway.

    Attributes:
        wans: the interfaces towards the Internet, by number; of a wildcard the first that is up counts. None while
            neither file nor options have named one.
        lans: interfaces of internal networks; shell wildcards allowed (``lan*``, ``ppp*``).
        mode: where established flows are translated.
        internal: prefixes behind the LANs that no route tells of.
        further_sessions: room for sessions beyond the first of each mapping; a power of two; None: by the machine's
            memory.
        inbound_refresh: inbound packets keep a mapping alive (RFC 4787 REQ-6).
        mss: to what new TCP connections are clamped: ``off``, ``auto`` (by the WAN's MTUs) or bytes (RFC 6691).
        other: what becomes of protocols without ports; one of :data:`OTHERS`.
        forwards, redirects, triggers: rules to be there from the start.
        algs: what is on of them from the start.
        external: as whom the internal hosts appear.
        pcp: whether they may ask for mappings, and which.
        metrics: what Prometheus is shown.
        log: what is written of sessions or mappings, and where.
        rearm_s: an accelerated flow shows itself to the kernel this often.
        origin: None where there is no file.
    """

    wans: tuple[str, ...]
    lans: tuple[str, ...]
    mode: Mode = "auto"
    internal: tuple[IPv4Network, ...] = ()
    timeouts: Timeouts = field(default_factory=Timeouts)
    ports: Ports = field(default_factory=Ports)
    filtering: Filtering = field(default_factory=Filtering)
    limits: Limits = field(default_factory=Limits)
    further_sessions: int | None = None
    inbound_refresh: bool = True
    mss: int | str = "off"
    other: str = OTHERS[0]
    forwards: tuple[Rule, ...] = ()
    redirects: tuple[Redirect, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    algs: tuple[Use, ...] = field(default_factory=default)
    external: Externals = field(default_factory=Externals)
    pcp: Pcp = field(default_factory=Pcp)
    metrics: Metrics = field(default_factory=Metrics)
    log: Log = field(default_factory=Log)
    rearm_s: int = 20
    origin: Origin | None = None

    @property
    def rules(self) -> tuple[Rule, ...]:
        return (*self.forwards, *self.redirects, *self.triggers)

    @property
    def host_blocks(self) -> int:
        """Port blocks that a host may have; 0 where there are none."""
        size = self.ports.block_size
        return (self.limits.blocks_per_host or min(HOST_BLOCKS, BLOCK_PORTS_MOST // size)) if size else 0

    @property
    def wan(self) -> str:
        """The name that the gateway goes by: its first WAN's."""
        return self.wans[0]


def from_options(wans: Sequence[str], lans: Sequence[str], mode: str | None, base: Config | None) -> Config:
    """What file and command line want together: an option given replaces what the file says.

    Raises:
        UsageError: no WAN or no LAN is named anywhere, or the mode is none.
        ConfigError: the two together are not possible.
    """
    if mode and mode not in MODES:
        raise UsageError(f"there is no mode {mode}", "", f"give one of {', '.join(MODES)}")
    base = base or Config(wans=(), lans=())
    chosen: Mode = mode if mode else base.mode
    config = replace(base, wans=tuple(wans) or base.wans, lans=tuple(lans) or base.lans, mode=chosen)
    if not config.wans:
        raise UsageError("no WAN interface named", "", "give --wan NAME, or wan in [interfaces] of --config FILE")
    if not config.lans:
        raise UsageError("no LAN interface named", "", "give --lan NAME, or lan in [interfaces] of --config FILE")
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raises ConfigError for the first thing that is wrong."""
    for problem in problems(config):
        raise ConfigError(problem.what, problem.why, problem.do)


def advice(config: Config) -> list[str]:
    """Sentences about settings that are allowed but fall short of an RFC."""
    sentences = [
        f"{key} = {value} is less than the {bound.advised} s of {bound.clause}"
        for key, bound in _BOUNDS.items()
        if (value := _number(config, key)) is not None and value < bound.advised
    ]
    if config.metrics.is_for_all:
        sentences.append(
            f"metrics.listen = {config.metrics.listen} without web_config: whoever reaches it may read it"
        )
    return sentences


# --- what is allowed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A wrong setting: its key, the value at fault, why it is wrong, what to do; of a repeated table, which one."""

    key: str
    value: object
    why: str
    do: str = ""
    nth: int = 0

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
_LIMIT = "as with none no host could open anything; leave it out for the default, which a household never meets"
_IDLE = f"since accelerated flows are looked at every {Config.rearm_s} s, and times are counted in 31 bits of jiffies"

_TICKS = "since times are counted in 31 bits of jiffies"
_RULES = "as there is room for so many forwards"

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
    "limits.sessions_per_host": _Bound(1, 8388608, _LIMIT),
    "limits.ports_per_host": _Bound(1, 65536, _LIMIT),
    "limits.blocks_per_host": _Bound(1, HOST_BLOCKS, "as there is room for so many"),
    "limits.new_per_second": _Bound(1, 10_000_000, _LIMIT),
    "limits.burst": _Bound(1, 10_000_000, _LIMIT),
    "pcp.lifetime_min_s": _Bound(1, 1_000_000, _TICKS, 120, "RFC 6887 section 15"),
    "pcp.lifetime_max_s": _Bound(1, 1_000_000, _TICKS),
    "pcp.per_host": _Bound(1, forwards.RULES_MOST, _RULES),
    "pcp.in_all": _Bound(1, forwards.RULES_MOST, _RULES),
    "pcp.first": _Bound(1, 65535, "and ports below 1024 are what services are expected at"),
    "pcp.last": _Bound(1, 65535, "and not below pcp.first"),
    "metrics.top_hosts": _Bound(0, 1000, "as each host has several series"),
    "log.per_second": _Bound(1, 1_000_000, "and what is more waits, up to a bound"),
    "tcp.mss": _Bound(88, 65495, "as a segment of less does not fit, with headers, what every host takes (RFC 6691)"),
}
_CHOICES: dict[str, Sequence[str]] = {
    "interfaces.mode": MODES,
    "filtering.tcp": FILTERINGS,
    "filtering.udp": FILTERINGS,
    "limits.refusal": REFUSALS,
    "log.what": LOGGED,
    "log.syslog": FACILITIES,
    "protocols.other": OTHERS,
}
# Keys whose fields stand in Config itself.
_FIELDS = {
    "interfaces.mode": "mode",
    "sessions.further": "further_sessions",
    "tcp.mss": "mss",
    "protocols.other": "other",
}
_PORTS_LEAST = 64  # a word of the bitmap in which ports are claimed
_NAME_BYTES = 15  # IFNAMSIZ without its NUL


def _value(config: Config, key: str) -> Any:
    if key in _FIELDS:
        return getattr(config, _FIELDS[key])
    table, name = key.split(".")
    return getattr(getattr(config, table), name)


def _number(config: Config, key: str) -> int | None:
    """None where the setting is automatic, or switched off by a word."""
    value = _value(config, key)
    return value if isinstance(value, int) else None


def problems(config: Config) -> Iterator[Problem]:
    """Everything that is wrong."""
    yield from _interface_problems(config)
    for key, bound in _BOUNDS.items():
        value = _number(config, key)
        if value is not None and not bound.low <= value <= bound.high:
            yield Problem(key, value, bound.allowed)
    for key, words in _CHOICES.items():
        if _value(config, key) not in words:
            yield Problem(key, _value(config, key), "allowed is " + ", ".join(word or '""' for word in words))
    yield from _relation_problems(config)
    yield from _rule_problems(config)
    for key, wrong, why in config.external.contradictions():
        yield Problem(f"external.{key}", wrong, why)


def _interface_problems(config: Config) -> Iterator[Problem]:
    if len(config.wans) > WANS_MOST:
        yield Problem("interfaces.wan", list(config.wans), f"there is room for {WANS_MOST}")
    for nth, name in enumerate(config.wans):
        yield from _name_problems("interfaces.wan", name)
        for other in config.wans[:nth]:
            if _may_be_one(name, other):
                why = f"it fits the WAN {other} as well; each has a number and addresses of its own"
                yield Problem("interfaces.wan", name, why, "name each interface once")
    for pattern in config.lans:
        yield from _name_problems("interfaces.lan", pattern)
        for wan in config.wans:
            if _may_be_one(wan, pattern):
                why = f"it fits the WAN {wan} as well; LAN and WAN on one interface (one-armed) do not work"
                yield Problem("interfaces.lan", pattern, why, "name interfaces other than the WAN")
    for network in config.internal:
        if network.prefixlen == 0:
            yield Problem("interfaces.internal", str(network), "then every address would be internal")


def _may_be_one(name: str, other: str) -> bool:
    """Either may be a wildcard, and a pattern fits narrower patterns, too."""
    return fnmatch.fnmatchcase(name, other) or fnmatch.fnmatchcase(other, name)


def _name_problems(key: str, name: str) -> Iterator[Problem]:
    if not 1 <= len(name.encode()) <= _NAME_BYTES or name in (".", "..") or re.search(r"[/:\s]", name):
        why = f"an interface's name has 1 to {_NAME_BYTES} bytes, without blanks, slashes and colons"
        yield Problem(key, name, why, "see `ip link`")


def _relation_problems(config: Config) -> Iterator[Problem]:
    times, ports, further = config.timeouts, config.ports, config.further_sessions
    if times.tcp_established_s < times.tcp_transitory_s:
        why = f"it may not be less than timeouts.tcp_transitory_s = {times.tcp_transitory_s}"
        yield Problem("timeouts.tcp_established_s", times.tcp_established_s, why)
    if ports.last - ports.first + 1 < _PORTS_LEAST:
        why = f"ports.first = {ports.first} to ports.last must be at least {_PORTS_LEAST} ports"
        yield Problem("ports.last", ports.last, why)
    yield from _block_problems(config)
    if further and further & (further - 1):
        lower = 1 << (further.bit_length() - 1)
        why = f"allowed are powers of two; the nearest are {lower} and {2 * lower}"
        yield Problem("sessions.further", further, why)
    for low, high in (("first", "last"), ("lifetime_min_s", "lifetime_max_s")):
        least, most = getattr(config.pcp, low), getattr(config.pcp, high)
        if most < least:
            yield Problem(f"pcp.{high}", most, f"it may not be less than pcp.{low} = {least}")
    if isinstance(config.mss, str) and config.mss not in ("off", "auto"):
        yield Problem("tcp.mss", config.mss, "allowed is off, auto, or a number of bytes")
    if config.metrics.endpoint is None:
        yield Problem("metrics.listen", config.metrics.listen, "allowed is ADDR:PORT, of IPv6 [ADDR]:PORT")
    if config.log.ipfix and config.log.collector is None:
        yield Problem("log.ipfix", config.log.ipfix, "allowed is a collector's ADDR:PORT, of IPv6 [ADDR]:PORT")
    if config.log.destinations and config.log.what != "sessions":
        why = f"{config.log.what} are for all destinations"
        yield Problem("log.destinations", True, why, 'log them by what = "sessions"')


def _block_problems(config: Config) -> Iterator[Problem]:
    ports, each_host = config.ports, config.limits.blocks_per_host
    size = ports.block_size
    if not size:
        if each_host:
            yield Problem("limits.blocks_per_host", each_host, "there are no blocks: ports.block_size = 0")
        if config.log.what == "blocks":
            yield Problem("log.what", "blocks", "there are none: ports.block_size = 0", "set that, or log mappings")
        return
    if size & (size - 1) or not BLOCK_PORTS_LEAST <= size <= BLOCK_PORTS_MOST:
        why = f"allowed are powers of two from {BLOCK_PORTS_LEAST} to {BLOCK_PORTS_MOST}, and 0 for no blocks"
        yield Problem("ports.block_size", size, why)
        return
    if (ports.last + 1) // size <= -(-ports.first // size):
        why = f"no block, which begins at a multiple of that, is whole in {ports.first} to {ports.last}"
        yield Problem("ports.block_size", size, why)
    for key in ("preserve", "low_ports", "overload"):
        if getattr(ports, key):
            why = "ports then come from their host's blocks alone: ports.block_size"
            yield Problem(f"ports.{key}", True, why, "leave one of them out")
    if each_host and each_host * size > BLOCK_PORTS_MOST:
        why = f"so many blocks of ports.block_size = {size} are more than {BLOCK_PORTS_MOST} ports for one host"
        yield Problem("limits.blocks_per_host", each_host, why, f"give {BLOCK_PORTS_MOST // size} at most")


def _rule_problems(config: Config) -> Iterator[Problem]:
    rules, counts = config.rules, Counter[str]()
    for place, rule in enumerate(rules):
        nth = counts[rule.kind]
        counts[rule.kind] += 1
        if error := forwards.contradiction(rule, rules[:place]):
            why = f"{error.what}: {error.why}"
            yield Problem(f"{rule.kind}.ports", rule.as_fields()["ports"], why, "change or remove one", nth)
    if len(rules) > forwards.RULES_MOST:
        last = rules[-1]
        why = f"{len(rules)} forwards, redirects and triggers are more than {forwards.RULES_MOST}"
        yield Problem(f"{last.kind}.ports", last.as_fields()["ports"], why, nth=counts[last.kind] - 1)


_KINDS: dict[str, Callable[..., Rule]] = {
    "forwards": forwards.parse,
    "redirects": redirects.parse,
    "triggers": triggers.parse,
}


def as_fields(config: Config) -> dict[str, Any]:
    """A configuration as JSON can carry it."""
    return {
        **asdict(config),
        "internal": [str(network) for network in config.internal],
        **{kind: [rule.as_fields() for rule in getattr(config, kind)] for kind in _KINDS},
        "algs": [use.as_fields() for use in config.algs],
        "external": config.external.as_fields(),
        "pcp": {**asdict(config.pcp), "internal": [str(network) for network in config.pcp.internal]},
    }


def from_fields(fields: dict[str, Any]) -> Config:
    """The inverse of :func:`as_fields`."""
    return Config(
        **{
            **fields,
            "wans": tuple(fields["wans"]),
            "lans": tuple(fields["lans"]),
            "internal": tuple(map(IPv4Network, fields["internal"])),
            "timeouts": Timeouts(**fields["timeouts"]),
            "ports": Ports(**fields["ports"]),
            "filtering": Filtering(**fields["filtering"]),
            "limits": Limits(**fields["limits"]),
            **{kind: tuple(parse(**each) for each in fields[kind]) for kind, parse in _KINDS.items()},
            "algs": tuple(Use.parse(**each) for each in fields["algs"]),
            "external": Externals.parse(**fields["external"]),
            "pcp": Pcp(**{**fields["pcp"], "internal": tuple(map(IPv4Network, fields["pcp"]["internal"]))}),
            "metrics": Metrics(**fields["metrics"]),
            "log": Log(**fields["log"]),
            "origin": _origin(fields["origin"]),
        }
    )


def _origin(fields: dict[str, Any] | None) -> Origin | None:
    if not fields:
        return None
    return Origin(fields["file"], tuple(fields["wans"]), tuple(fields["lans"]), fields["mode"])
