"""The messages of H.225.0 and H.245 as values, by pycrate, which has their ASN.1 compiled; and the addresses in them.

Imported by the ALG that needs it only, as pycrate is an optional dependency. Values are pycrate's: a SEQUENCE is a
dict, a CHOICE a pair of name and value, a SEQUENCE OF a list.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from xdpmasq.alg.api import Endpoint, Unparsed
from xdpmasq.errors import ConfigError

try:
    from pycrate_asn1dir.H225 import H323_MESSAGES, MULTIMEDIA_SYSTEM_CONTROL
    from pycrate_asn1rt.asnobj import ASN1Obj
except ImportError as error:
    raise ConfigError(
        "the ALG h323 needs the Python package pycrate", str(error), "pip install 'xdpmasq[alg]'"
    ) from error

ASN1Obj._SILENT = True  # it prints what it finds unusual


class Type:
    """Values of one type, as aligned PER (X.691) has them; what is read must be written the same.

    pycrate keeps a type's last value in the type, so a value is read, changed and written before the next.
    """

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def read(self, text: bytes) -> Any:
        """Raises Unparsed: it is none, or another encoder would write it differently."""
        if self._write_read(text) != text:
            raise Unparsed("would not be written as it is")
        return self._kind.get_val()

    def write(self, value: Any, size: int) -> bytes:
        """Raises Unparsed: it is not ``size`` bytes long."""
        try:
            self._kind.set_val(value)
            text: bytes = self._kind.to_aper()
        except Exception as error:  # as in _write_read()
            raise Unparsed("cannot be written") from error
        if len(text) != size:
            raise Unparsed("would change its length")
        return text

    def _write_read(self, text: bytes) -> bytes:
        try:
            self._kind.from_aper(text)
            written: bytes = self._kind.to_aper()
        except Exception as error:  # given nonsense, pycrate raises what Python does: IndexError, RecursionError, …
            raise Unparsed("no such PER") from error
        return written


USER_INFORMATION = Type(H323_MESSAGES.H323_UserInformation)
SYSTEM_CONTROL = Type(MULTIMEDIA_SYSTEM_CONTROL.MultimediaSystemControlMessage)
OPEN_LOGICAL_CHANNEL = Type(MULTIMEDIA_SYSTEM_CONTROL.OpenLogicalChannel)


@dataclass(frozen=True)
class Place:
    """Where a value has an address and a port."""

    fields: dict[str, Any]
    address: str
    port: str

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(ip_address(self.fields[self.address]), self.fields[self.port])

    def put(self, endpoint: Endpoint) -> None:
        if endpoint.address.version != ip_address(self.fields[self.address]).version:
            raise Unparsed("an address of the other kind does not fit")
        self.fields[self.address], self.fields[self.port] = endpoint.address.packed, endpoint.port


def place(address: Any) -> Place | None:
    """Of a TransportAddress of H.225.0 or H.245, if it is one of IP."""
    match address:
        case ("ipAddress" | "ip6Address", dict(fields)):
            return Place(fields, "ip", "port")
        case ("unicastAddress", ("iPAddress" | "iP6Address", dict(fields))):
            return Place(fields, "network", "tsapIdentifier")
    return None
