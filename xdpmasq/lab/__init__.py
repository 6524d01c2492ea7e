"""The lab: the IP-Masquerade HOWTO's network out of namespaces, with real programs in it.

A command of the product (`xdpmasq lab`), and the ground of all end-to-end tests::

    with Lab("my-lab") as lab:
        lab.exec("a-box", ["ping", "-c1", "192.168.0.1"])
"""

from xdpmasq.lab.capture import Capture
from xdpmasq.lab.errors import LabError
from xdpmasq.lab.lab import Lab

__all__ = ["Capture", "Lab", "LabError"]
