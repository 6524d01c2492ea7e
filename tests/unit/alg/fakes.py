"""The NAT's side, without a NAT: keeps the rules of :class:`xdpmasq.alg.api.Openings`, and records what is asked."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address

from xdpmasq.alg.api import Address, Control, Endpoint, Refused

HOST = IPv4Address("192.168.1.10")
GATEWAY = IPv4Address("203.0.113.1")
REMOTE = IPv4Address("198.51.100.7")


@dataclass(frozen=True)
class Pinhole:
    protocol: str
    internal: Endpoint
    external: Endpoint
    remote: Address | None
    remote_port: int | None = None
    lasts_s: float = 120.0
    sessions: int = 1
    pair: bool = False


class FakeOpenings:
    """External ports are handed out from ``first`` on, an even one to whom asks for a pair.

    Attributes:
        opened: the pinholes, in their order; the same internal endpoint is there once.
        asked: calls of :meth:`open`, refused ones, too.
        looked_up: calls of :meth:`external` and :meth:`internal`.
        followed: endpoints of calls of :meth:`follow`.
        mappings: internal endpoint to external one, by protocol; those of pinholes are among them.
    """

    def __init__(self, control: Control, pinholes: int = 1, *, first: int = 40000) -> None:
        self.control = control
        self.limit = pinholes
        self.next = first
        self.opened: list[Pinhole] = []
        self.asked = 0
        self.looked_up = 0
        self.followed: list[Endpoint] = []
        self.mappings: dict[tuple[str, Endpoint], Endpoint] = {
            (control.protocol, control.internal): control.external,
        }

    def open(
        self,
        protocol: str,
        internal: Endpoint,
        *,
        remote: Address | None,
        remote_port: int | None = None,
        lasts_s: float = 120.0,
        sessions: int = 1,
        pair: bool = False,
    ) -> Endpoint:
        self.asked += 1
        assert protocol in {"tcp", "udp", "gre"}, f"no such protocol: {protocol}"
        assert 0 < lasts_s <= 300, f"a pinhole of {lasts_s} s"
        assert sessions >= 0
        assert isinstance(internal, Endpoint)
        assert 0 <= internal.port <= 65535, f"no port: {internal.port}"
        assert remote_port is None or 0 < remote_port <= 65535, f"no port: {remote_port}"
        if internal.address != self.control.internal.address:
            raise Refused(f"{internal} is not the host's own")
        if internal.port < 1024 and protocol != "gre":
            raise Refused(f"port {internal.port} is below 1024")
        if pair and internal.port % 2:
            raise Refused(f"no pair begins with {internal.port}")
        neighbour = Endpoint(internal.address, internal.port + 1)
        known, beside = self.mappings.get((protocol, internal)), self.mappings.get((protocol, neighbour))
        if pair and (known or beside) and (not known or known.port % 2 or (beside and beside.port != known.port + 1)):
            raise Refused("its ports are mapped to others than neighbours")
        for pinhole in self.opened:
            if (pinhole.protocol, pinhole.internal) == (protocol, internal):
                return pinhole.external
        if sum(1 + each.pair for each in self.opened) + 1 + pair > self.limit:
            raise Refused(f"{self.limit} ports are open")
        external = known or self._fresh(pair)
        self.opened.append(Pinhole(protocol, internal, external, remote, remote_port, lasts_s, sessions, pair))
        self.mappings[protocol, internal] = external
        if pair:
            self.mappings[protocol, Endpoint(internal.address, internal.port + 1)] = Endpoint(
                external.address, external.port + 1
            )
        return external

    def external(self, protocol: str, internal: Endpoint) -> Endpoint | None:
        self.looked_up += 1
        return self.mappings.get((protocol, internal))

    def internal(self, protocol: str, external: Endpoint) -> Endpoint | None:
        self.looked_up += 1
        for (spoken, internal), known in self.mappings.items():
            if (spoken, known) == (protocol, external):
                return internal
        return None

    def follow(self, endpoint: Endpoint) -> None:
        opened = [pinhole.internal for pinhole in self.opened if pinhole.protocol == "tcp"]
        assert endpoint in opened or endpoint.address == self.control.remote.address, f"{endpoint} is neither's"
        self.followed.append(endpoint)

    def _fresh(self, pair: bool) -> Endpoint:
        if self.next > 65000:
            raise Refused("no port is left")
        port = self.next + (self.next % 2 if pair else 0)
        self.next = port + (2 if pair else 1)
        return Endpoint(self.control.external.address, port)


def session(
    server_port: int, protocol: str = "tcp", *, from_outside: bool = False, internal_port: int | None = None
) -> Control:
    """A session of :data:`HOST` with :data:`REMOTE`: to a server outside, or of a server inside, behind a forward."""
    if from_outside:
        return Control(
            protocol,
            Endpoint(HOST, server_port),
            Endpoint(GATEWAY, server_port),
            Endpoint(REMOTE, internal_port or 52000),
            from_outside=True,
        )
    return Control(
        protocol,
        Endpoint(HOST, internal_port or 50000),
        Endpoint(GATEWAY, 30000),
        Endpoint(REMOTE, server_port),
    )
