"""The command line: one verb, one file."""


def main() -> None:
    raise SystemExit("xdpmasq: not built yet")
