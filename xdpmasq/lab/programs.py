"""What the lab runs that is not xdpmasq's own, and the Debian package that has it."""

import os
import shutil
from collections.abc import Iterable

from xdpmasq.errors import HostError

BUILDING = {"ip": "iproute2", "ethtool": "ethtool"}
SERVING = {
    "nginx": "nginx-light",
    "dnsmasq": "dnsmasq-base",
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
}
ASKING = {
    "curl": "curl",
    "dig": "bind9-dnsutils",
    "nft": "nftables",
    "ping": "iputils-ping",
    "rsync": "rsync",
    "ssh": "openssh-client",
    "tcpdump": "tcpdump",
    "tracepath": "iputils-tracepath",
    "traceroute": "traceroute",
}


def require(what: str, *groups: Iterable[tuple[str, str]]) -> None:
    """Asks for all at once, before anything is built.

    Raises:
        HostError: some are missing; with the command that installs them.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = {name: package for group in groups for name, package in group if not shutil.which(name, path=path)}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        raise HostError(f"{what} needs programs that are not here", ", ".join(missing), f"apt install {packages}")
