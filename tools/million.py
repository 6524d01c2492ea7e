#!/usr/bin/env python3
"""Holds many sessions at once in the benchmark's network, and says what they cost: memory, listing, expiring them.

    tools/million.py [SESSIONS] [xdp|tc]

Every session has been used in both directions, and every packet was right, or it fails. What is printed is JSON.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from xdpmasq import bpf, datapath
from xdpmasq.bench import Bench, Settings, chosen
from xdpmasq.bench.generator import DIRECTIONS
from xdpmasq.expiry import Expiry


def locked(map_: bpf.Map) -> int:
    """What the kernel charges for a map, in bytes."""
    found = re.search(r"memlock:\s+(\d+)", Path(f"/proc/self/fdinfo/{map_.fd}").read_text())
    return int(found[1]) if found else 0


def seconds(work: object, *args: object) -> float:
    started = time.monotonic()
    work(*args)  # type: ignore[operator]
    return round(time.monotonic() - started, 3)


def main(sessions: int, mode: str) -> None:
    (contestant,) = chosen([f"xdpmasq-{mode}"])
    with Bench(Settings(flows=sessions), [contestant]) as bench:
        traffic = bench._traffic
        traffic.begin_turn()
        with contestant.running(traffic):
            for direction in DIRECTIONS * 2:
                problems = traffic.send(direction, sessions, contestant.expected).problems
                assert not problems, problems
            with bench.topology.inside("gate"):
                tables = datapath.find()
            maps = {name: locked(map_) for name, map_ in tables.maps.items()}
            room = len(tables.sessions)
            agents = Expiry(tables, tables.reaper, np.zeros(len(tables.claims), np.uint64), 0, 0)
            listing = ["ip", "netns", "exec", bench.topology.namespace("gate"), sys.executable, "-m", "xdpmasq"]
            listing += ["sessions", "list", "--json"]
            result = {
                "sessions": len(tables.live_slots()),
                "mode": mode,
                "room": room,
                "tables_bytes": sum(maps.values()),
                "tables_bytes_per_place": round(sum(maps.values()) / room, 1),
                "largest_tables": dict(sorted(maps.items(), key=lambda each: -each[1])[:5]),
                "expiry_pass_s": seconds(agents.run),
                "list_json_s": seconds(lambda: subprocess.run(listing, stdout=subprocess.DEVNULL, check=True)),
            }
            assert result["sessions"] == sessions, result
            print(json.dumps(result, indent=2))  # noqa: T201


if __name__ == "__main__":
    main(int((sys.argv[1:2] or ["1000000"])[0]), (sys.argv[2:3] or ["xdp"])[0])
