"""``xdpmasq check``: is a configuration file good?"""

from pathlib import Path

import typer

from xdpmasq.config import advice, from_options
from xdpmasq.configfile import load
from xdpmasq.errors import ConfigError

FILE = typer.Argument(..., metavar="FILE", help="TOML file.", show_default=False)


def check(file: str = FILE) -> None:
    """Check a configuration file; change nothing.

    Exit status 2, with line, value and what is allowed, when `attach` would refuse the file.

    \b
    Example:
      xdpmasq check /etc/xdpmasq/config.toml
    """
    given = load(Path(file))
    for name, names in (("wan", given.wans), ("lan", given.lans)):
        if not names:
            raise ConfigError(f"{file}: no {name.upper()} interface named", "", f"set {name} in [interfaces]")
    config = from_options([], [], None, given)
    print(f"{file}: OK")
    for sentence in advice(config):
        print(f"  note: {sentence}")
