"""What an ALG itself makes sure of before it asks for a pinhole; the opener does so again."""

from ipaddress import IPv4Address

from xdpmasq.alg import words
from xdpmasq.alg.api import Control, Endpoint, Refused, Unparsed


def own(control: Control, port: int) -> Endpoint:
    """The internal host's endpoint at a port that it may have a pinhole for.

    Raises:
        Refused: system ports are not opened, and there are no others.
    """
    if port > 65535:
        raise Refused(f"there is no port {port}")
    return words.own(control, control.internal.address, port)


def addresses(control: Control) -> tuple[bytes, bytes]:
    """The internal and the external address, as fields of four bytes have them.

    Raises:
        Unparsed: such a field has no place for IPv6.
    """
    internal, external = control.internal.address, control.external.address
    if not (isinstance(internal, IPv4Address) and isinstance(external, IPv4Address)):
        raise Unparsed("addresses are IPv4 ones")
    return internal.packed, external.packed
