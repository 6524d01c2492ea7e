"""Sysctls of this network namespace."""

from collections.abc import Sequence
from pathlib import Path

from xdpmasq.errors import HostError


def read(name: str | Sequence[str]) -> str | None:
    """The value of a sysctl of this namespace, None when the kernel has none of that name.

    Args:
        name: ``net.ipv4.ip_forward``, or ``net/ipv4/conf/eth0.5/rp_filter``, or the parts of that path in
            a sequence: interface names may contain dots.
    """
    try:
        return _path(name).read_text().strip()
    except OSError:
        return None


def write(name: str | Sequence[str], value: str | int) -> None:
    """Sets a sysctl of this namespace; the name as in :func:`read`.

    Raises:
        HostError: there is none of that name, or the kernel refuses the value.
    """
    path = _path(name)
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        raise HostError(f"cannot set {path} to {value}", error.strerror or "", "run it as root") from error


def _path(name: str | Sequence[str]) -> Path:
    if isinstance(name, str):
        name = name.split("/") if "/" in name else name.split(".")
    return Path("/proc/sys", *name)
