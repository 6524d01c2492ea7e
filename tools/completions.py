"""Writes the completions of bash, zsh and fish: `python tools/completions.py FOLDER`. make deb calls it."""

import sys
from pathlib import Path

from typer.completion import get_completion_script

from xdpmasq.cli import COMPLETE

NAME = "xdpmasq"
FILES = {"bash": NAME, "zsh": f"_{NAME}", "fish": f"{NAME}.fish"}  # as each shell looks for them


def script(shell: str) -> str:
    """What asks the command itself at each TAB."""
    text = get_completion_script(prog_name=NAME, complete_var=COMPLETE, shell=shell)
    # zsh loads the file as the function that completes; typer's only announces one, for the next TAB.
    return text.replace(f"compdef _{NAME}_completion {NAME}", f'_{NAME}_completion "$@"') + "\n"


def write(folder: Path) -> None:
    for shell, file in FILES.items():
        path = folder / shell / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script(shell))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
