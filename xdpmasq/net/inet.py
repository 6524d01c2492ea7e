"""IP of either version."""

import ipaddress
import socket
from typing import Literal

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPInterface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Version = Literal[4, 6]

FAMILIES: dict[Version, int] = {4: socket.AF_INET, 6: socket.AF_INET6}
