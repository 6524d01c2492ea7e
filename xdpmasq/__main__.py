"""``python3 -m xdpmasq``: the same command line as ``xdpmasq``."""

from xdpmasq.cli import main

main()
