"""The least that a Quake server needs to run: a world without a wall, and rules that do nothing.

Quake's own are not free. The formats are those of id Software's sources (bspfile.h, pr_comp.h, progdefs.h, wad.h).
"""

import struct
from pathlib import Path

_GLOBALS, _FIELDS, _CLASSNAME = 92, 105, 28  # of progdefs.h, whose checksum is PROGHEADER_CRC
_PROGHEADER_CRC = 5927
_FUNCTIONS = (  # the last of the globals
    *(b"main", b"StartFrame", b"PlayerPreThink", b"PlayerPostThink", b"ClientKill", b"ClientConnect"),
    *(b"PutClientInServer", b"ClientDisconnect", b"SetNewParms", b"SetChangeParms"),
)
_STRING = 1  # ev_string


def write(folder: Path) -> None:
    """A game directory, ``id1``."""
    game = folder / "id1"
    (game / "maps").mkdir(parents=True)
    (game / "gfx.wad").write_bytes(struct.pack("<4sii", b"WAD2", 0, 12))
    # Public, it would wait for the name of a list of servers; and whoever has just joined would have to wait.
    lines = ["sv_public 0", "net_connectfloodblockingtimeout 0", "deathmatch 1", "map start", ""]
    (game / "quake.rc").write_text("\n".join(lines))
    (game / "progs.dat").write_bytes(_rules())
    (game / "maps/start.bsp").write_bytes(_world())


def _rules() -> bytes:
    """Every function returns at once."""
    names = [b"", *_FUNCTIONS, b"worldspawn", b"classname"]
    strings = b"".join(name + b"\0" for name in names)
    at = {name: strings.index(b"\0" + name + b"\0") + 1 for name in names[1:]}
    statements = struct.pack("<Hhhh", 0, 0, 0, 0) * 2
    functions = bytes(36) + b"".join(struct.pack("<7i8x", 1, 0, 0, 0, at[name], 0, 0) for name in names[1:-1])
    fields = struct.pack("<HHi", _STRING, _CLASSNAME, at[b"classname"])
    values = [0] * (_GLOBALS - len(_FUNCTIONS)) + list(range(1, len(_FUNCTIONS) + 1))
    parts = [statements, bytes(8), fields, functions, strings, struct.pack(f"<{_GLOBALS}i", *values)]
    counts = [2, 1, 1, len(names) - 1, len(strings), _GLOBALS]
    header, start = [6, _PROGHEADER_CRC], 60
    for part, count in zip(parts, counts, strict=True):
        header += [start, count]
        start += len(part)
    return struct.pack("<15i", *header, _FIELDS) + b"".join(parts)


def _world() -> bytes:
    """Half of space is solid, the rest is empty."""
    box = (-1000, -1000, -1000, 1000, 1000, 1000)
    leaf = struct.Struct("<ii6hHH4x")
    lumps = {
        0: b'{\n"classname" "worldspawn"\n}\n\0',
        1: struct.pack("<4fi", 0, 0, 1, 0, 2),  # a plane: z = 0
        5: struct.pack("<ihh6hHH", 0, -2, -1, *box, 0, 0),  # a node: above it leaf 1, below it leaf 0
        9: struct.pack("<ihh", 0, -1, -2),  # the same for those who move: empty, solid
        10: leaf.pack(-2, -1, *box, 0, 0) + leaf.pack(-1, -1, *box, 0, 0),
        14: struct.pack("<9f4iiii", *box, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0),
    }
    directory, body, at = b"", b"", 4 + 15 * 8
    for nth in range(15):
        text = lumps.get(nth, b"")
        text += bytes(-len(text) % 4)
        directory += struct.pack("<ii", at + len(body), len(text))
        body += text
    return struct.pack("<i", 29) + directory + body
