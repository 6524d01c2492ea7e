"""xdpmasq: a masquerading router for Linux on XDP and TC."""

__version__ = "0.1.0"
