"""What the text protocols have in common: numbers that are in range or nothing, and whose an endpoint is.

Patterns hold numbers to a few digits, so that int() is never given forty.
"""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address

from xdpmasq.alg.api import Address, Control, Endpoint, Openings, Refused, Unparsed

DOTTED = rb"\d{1,3}(?:\.\d{1,3}){3}"


def port(digits: bytes) -> int:
    """Raises Unparsed: it is none, or 0."""
    number = int(digits)
    if not 0 < number < 65536:
        raise Unparsed(f"no port: {number}")
    return number


def address(dotted: bytes) -> IPv4Address:
    """Raises Unparsed: also of numbers with a leading 0, which some read as octal."""
    try:
        return IPv4Address(dotted.decode("ascii"))
    except (AddressValueError, UnicodeDecodeError) as error:
        raise Unparsed(str(error)) from None


def own(control: Control, host: Address, number: int) -> Endpoint:
    """An endpoint of the session's internal host that a pinhole may lead to.

    Raises:
        Refused: it is another's, or one of the host's own services.
    """
    if host != control.internal.address:
        raise Refused(f"{host} is not {control.internal.address}")
    if number < 1024:
        raise Refused(f"port {number} is below 1024")
    return Endpoint(host, number)


def known_outside(protocol: str, internal: Endpoint, control: Control, openings: Openings) -> Endpoint | None:
    """What an endpoint of the host is known as, without opening anything; the session's own is always known."""
    if (protocol, internal) == (control.protocol, control.internal):
        return control.external
    return openings.external(protocol, internal)


def known_inside(protocol: str, external: Endpoint, control: Control, openings: Openings) -> Endpoint | None:
    """Whose an endpoint of ours is, if it is the session's own host's."""
    if external.address != control.external.address:
        return None
    if (protocol, external) == (control.protocol, control.external):
        return control.internal
    return openings.internal(protocol, external)
