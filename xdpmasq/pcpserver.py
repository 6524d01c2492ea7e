"""What a PCP server answers (RFC 6887), and a NAT-PMP one (RFC 6886): request and sender in, response out.

The sender is known to be an internal host by now, on the interface by which its packets come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

from xdpmasq import natpmp, pcp
from xdpmasq.config import FILTERINGS, Config
from xdpmasq.errors import ForwardError
from xdpmasq.leases import EVERYBODY, Endpoint, Filters, Held
from xdpmasq.pcp import Refused, Result

FILTERS_MOST = 8  # of one mapping: each is a rule

_PMP_RESULTS = {
    Result.NETWORK_FAILURE: natpmp.Result.NETWORK_FAILURE,
    Result.NO_RESOURCES: natpmp.Result.OUT_OF_RESOURCES,
    Result.USER_EX_QUOTA: natpmp.Result.OUT_OF_RESOURCES,
}


class Book(Protocol):
    """Where the mappings are: :class:`xdpmasq.leases.Book`."""

    def external(self, host: IPv4Address) -> IPv4Address: ...
    def held(self, endpoint: Endpoint) -> Held | None: ...
    def held_by(self, host: IPv4Address, protocol: str | None = None) -> Iterator[Held]: ...
    def count(self) -> int: ...
    def open(
        self, endpoint: Endpoint, suggested: int, *, exact: bool, filters: Filters, nonce: bytes, lifetime_s: int
    ) -> Held | None: ...
    def renew(self, held: Held, lifetime_s: int, filters: Filters) -> None: ...
    def end(self, held: Iterable[Held]) -> None: ...


@dataclass(frozen=True)
class _Wish:
    """A mapping that is asked for, by either protocol.

    Attributes:
        exact: the suggested external endpoint or none.
    """

    endpoint: Endpoint
    nonce: bytes
    lifetime_s: int
    suggested_port: int
    suggested_address: IPv4Address | None = None
    exact: bool = False
    filters: Sequence[pcp.Filter] = ()


@dataclass(frozen=True)
class _Granted:
    port: int
    address: IPv4Address
    lifetime_s: int


class Server:
    """One for all LANs.

    Args:
        epoch_s: tells the seconds since the state was last lost or the external address changed (section 8.5).
        is_connected: whether the WAN by which a host's packets leave has an address at the moment.
    """

    def __init__(
        self, config: Config, book: Book, epoch_s: Callable[[], int], is_connected: Callable[[IPv4Address], bool]
    ) -> None:
        self._config, self._book, self._epoch_s, self._is_connected = config, book, epoch_s, is_connected

    def answer(self, message: bytes, client: IPv4Address) -> bytes | None:
        """The response to a message, None where there is none to be given.

        Raises:
            MasqError: it cannot be done at the moment; the client will ask again.
        """
        if len(message) < 2 or message[1] & pcp.RESPONSE:
            return None
        if message[0] == natpmp.VERSION:
            return self._answer_natpmp(message, client)
        try:
            if message[0] != pcp.VERSION:
                raise Refused(Result.UNSUPP_VERSION)  # the answer's version is the one to come back with (section 9)
            return self._answer_pcp(pcp.Request.parse(message, client), client)
        except Refused as refused:
            return pcp.refusal(message, refused, self._epoch_s())

    def announcements(self) -> tuple[bytes, bytes]:
        """What tells everybody that the epoch has begun anew: by NAT-PMP (section 3.2.1) and PCP (section 14.1)."""
        epoch = self._epoch_s()
        return natpmp.address(self._external(IPv4Address(0)), epoch), pcp.answer(
            pcp.Opcode.ANNOUNCE, Result.SUCCESS, 0, epoch
        )

    # --- PCP

    def _answer_pcp(self, request: pcp.Request, client: IPv4Address) -> bytes:
        if request.opcode is pcp.Opcode.ANNOUNCE:
            pcp.parse_options(request.body, {})
            return pcp.answer(request.opcode, Result.SUCCESS, 0, self._epoch_s())
        asked = pcp.Map.parse(request.body)
        self._authorize(client)
        protocol = pcp.PROTOCOLS.get(asked.protocol)
        if not protocol and (asked.protocol or request.lifetime_s):
            raise Refused(Result.UNSUPP_PROTOCOL)
        if request.lifetime_s == 0:
            if asked.prefer_failure or asked.filters:
                raise Refused(Result.MALFORMED_OPTION)
            self._end(client, protocol, asked.internal_port if protocol else 0, asked.nonce)
            body = asked.answer(asked.suggested_port, asked.suggested_address)
            return pcp.answer(request.opcode, Result.SUCCESS, 0, self._epoch_s(), body)
        if not protocol or not asked.internal_port:
            raise Refused(Result.UNSUPP_PROTOCOL)  # all ports, or all protocols: that is a default host
        wish = _Wish(
            Endpoint(protocol, client, asked.internal_port),
            asked.nonce,
            request.lifetime_s,
            asked.suggested_port,
            asked.suggested_address,
            asked.prefer_failure,
            asked.filters,
        )
        granted = self._grant(wish)
        body = asked.answer(granted.port, granted.address)
        return pcp.answer(request.opcode, Result.SUCCESS, granted.lifetime_s, self._epoch_s(), body)

    # --- NAT-PMP

    def _answer_natpmp(self, message: bytes, client: IPv4Address) -> bytes | None:
        opcode, epoch = message[1], self._epoch_s()
        if opcode == natpmp.Opcode.ADDRESS:
            return natpmp.address(self._external(client), epoch)
        if opcode not in list(natpmp.Opcode):
            return natpmp.header(opcode, natpmp.Result.UNSUPPORTED_OPCODE, epoch)
        asked = natpmp.Map.parse(message)
        if not asked:
            return None
        try:
            self._authorize(client)
            granted = self._serve_natpmp(asked, client)
        except Refused as refused:
            result = _PMP_RESULTS.get(refused.result, natpmp.Result.NOT_AUTHORIZED)
            return natpmp.mapping(message, result, epoch)
        port, lifetime_s = (granted.port, granted.lifetime_s) if granted else (0, 0)
        return natpmp.mapping(message, natpmp.Result.SUCCESS, epoch, port, lifetime_s)

    def _serve_natpmp(self, asked: natpmp.Map, client: IPv4Address) -> _Granted | None:
        if asked.lifetime_s == 0:
            self._end(client, asked.protocol, asked.internal_port, natpmp.NONCE)
            return None
        if not asked.internal_port:
            raise Refused(Result.NOT_AUTHORIZED)
        endpoint = Endpoint(asked.protocol, client, asked.internal_port)
        return self._grant(_Wish(endpoint, natpmp.NONCE, asked.lifetime_s, asked.suggested_port))

    # --- both

    def _external(self, client: IPv4Address) -> IPv4Address | None:
        return self._book.external(client) if self._is_connected(client) else None

    def _authorize(self, client: IPv4Address) -> None:
        allowed = self._config.pcp.internal
        own_address = any(client in each.internal for each in self._config.external.one_to_one)
        if (allowed and not any(client in each for each in allowed)) or own_address:
            raise Refused(Result.NOT_AUTHORIZED)

    def _grant(self, wish: _Wish) -> _Granted:
        """Section 11.3."""
        if not self._is_connected(wish.endpoint.address):
            raise Refused(Result.NETWORK_FAILURE)
        limits = self._config.pcp
        lifetime_s = min(max(wish.lifetime_s, limits.lifetime_min_s), limits.lifetime_max_s)
        held = self._book.held(wish.endpoint)
        if held and held.nonce not in (None, wish.nonce):
            raise Refused(Result.NOT_AUTHORIZED, held.left_s)
        filters = self._filters(wish, held)
        self._check_exact(wish, held)
        try:
            if not held:
                self._check_room(wish.endpoint.address, len(filters), new=True)
                held = self._book.open(
                    wish.endpoint,
                    wish.suggested_port,
                    exact=wish.exact,
                    filters=filters,
                    nonce=wish.nonce,
                    lifetime_s=lifetime_s,
                )
            elif held.nonce is not None:
                self._check_room(wish.endpoint.address, len(filters) - len(held.placed), new=False)
                self._book.renew(held, lifetime_s, filters)
        except ForwardError as error:
            raise Refused(Result.NO_RESOURCES) from error
        if not held:
            raise Refused(Result.CANNOT_PROVIDE_EXTERNAL if wish.exact else Result.NO_RESOURCES)
        return _Granted(held.port, held.address, lifetime_s)

    def _check_exact(self, wish: _Wish, held: Held | None) -> None:
        """PREFER_FAILURE (section 13.2)."""
        address = held.address if held else self._book.external(wish.endpoint.address)
        wanted = (wish.suggested_port, wish.suggested_address or address)
        if wish.exact and wanted != (held.port if held else wish.suggested_port or None, address):
            raise Refused(Result.CANNOT_PROVIDE_EXTERNAL)

    def _check_room(self, host: IPv4Address, rules: int, *, new: bool) -> None:
        if rules > 0 and self._book.count() + rules > self._config.pcp.in_all:
            raise Refused(Result.NO_RESOURCES)
        if new and sum(1 for _ in self._book.held_by(host)) >= self._config.pcp.per_host:
            raise Refused(Result.USER_EX_QUOTA)

    def _filters(self, wish: _Wish, held: Held | None) -> Filters:
        """For whom the mapping is to be: new filters add to those that it has (section 13.3)."""
        some: list[IPv4Network] = [each.rule.source for each in held.placed if each.rule.source] if held else []
        for each in wish.filters:
            if each.network is None:
                some = []
            elif each.network not in some:
                some.append(each.network)
        # Rules know remote addresses only; and where everybody may use a mapping, no rule could keep anybody out.
        cannot = any(each.network and each.port for each in wish.filters) or len(some) > FILTERS_MOST
        open_to_all = getattr(self._config.filtering, wish.endpoint.protocol) == FILTERINGS[-1]
        if cannot or (some and (open_to_all or (held and held.nonce is None))):
            raise Refused(Result.EXCESSIVE_REMOTE_PEERS)
        return some or EVERYBODY

    def _end(self, client: IPv4Address, protocol: str | None, port: int, nonce: bytes) -> None:
        """Ends what the client has there, port 0 being all (section 15.1). Nothing there is no error."""
        if protocol and port:
            held = self._book.held(Endpoint(protocol, client, port))
            found = [held] if held else []
        else:
            found = list(self._book.held_by(client, protocol))
        mine = [each for each in found if each.nonce == nonce]
        if found and not mine:
            raise Refused(Result.NOT_AUTHORIZED, max(each.left_s for each in found))
        self._book.end(mine)
