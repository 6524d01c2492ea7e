#!/usr/bin/env python3
"""What a scrape costs beside many sessions, and whether the agent waits for it: seconds of both, as JSON.

    tools/scrape.py [SESSIONS] [TOP_HOSTS]

The sessions are written into the tables of a gateway in the lab; the agent and the scrapes are real.
"""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from xdpmasq import datapath
from xdpmasq.abi import EXTERNAL_SLOTS, LIFE_LIVE, LIFE_SESSION
from xdpmasq.lab import Lab, netns

NAME, GATE = "masq-scrape", "masq-gate"
HOSTS = 5000
ROUNDS, WATCHED_S = 10, 15.0


def fill(tables: datapath.Attached, sessions: int) -> None:
    """Idle UDP sessions of many hosts, at ports of the pool first and as further ones then."""
    room = np.flatnonzero(np.unpackbits(tables.claims.view(np.uint8), bitorder="little") == 0)
    slots = room[room >= EXTERNAL_SLOTS // 3][:sessions].astype(np.uint32)
    assert len(slots) == sessions, f"there is room for {len(slots)}"
    table, now = tables.sessions, tables.now()
    for side in ("out", "in"):
        table[side]["last_seen"][slots] = now
    table["in"]["new_addr"]["word"][slots, 0] = np.arange(sessions) % HOSTS + 1
    table["mapping"][slots] = EXTERNAL_SLOTS // 3 + 2000
    table["opened_at"][slots] = now
    table["life"][slots] = LIFE_LIVE | LIFE_SESSION
    bits = np.unpackbits(tables.claims.view(np.uint8), bitorder="little")
    bits[slots] = 1
    tables.claims[:] = np.packbits(bits, bitorder="little").view(np.uint64)


def scrape(lab: Lab) -> float:
    """Seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", 9477, timeout=60)
    with netns.entered(lab.namespace(GATE)):
        connection.connect()
    started = time.monotonic()
    connection.request("GET", "/metrics")
    connection.getresponse().read()
    return round(time.monotonic() - started, 3)


def cpu_s(pid: int | None) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_a_scrape_s(lab: Lab, pid: int | None) -> float:
    """CPU time, which tells more than seconds on a busy machine; without what the agent needs meanwhile."""
    before, started = cpu_s(pid), time.monotonic()
    time.sleep(ROUNDS)
    idle = (cpu_s(pid) - before) / (time.monotonic() - started)
    before, started = cpu_s(pid), time.monotonic()
    for _ in range(ROUNDS):
        scrape(lab)
    return round((cpu_s(pid) - before - idle * (time.monotonic() - started)) / ROUNDS, 3)


def ticks(tables: datapath.Attached, beside: Callable[[], object]) -> list[float]:
    """The longest and the mean time between the agent's rounds, while something goes on again and again."""
    over = threading.Event()

    def keep_on() -> None:
        while not over.wait(0.001):
            beside()

    thread = threading.Thread(target=keep_on)
    thread.start()
    beats, until = [], time.monotonic() + WATCHED_S
    seen = int(tables.settings["heartbeat"])
    while time.monotonic() < until:
        if (beat := int(tables.settings["heartbeat"])) != seen:
            seen = beat
            beats.append(time.monotonic())
        time.sleep(0.005)
    over.set()
    thread.join()
    between = np.diff(beats)
    return [round(float(between.max()), 3), round(float(between.mean()), 3)]


def main(sessions: int, top_hosts: int) -> None:
    with Lab(NAME) as lab:
        config = lab.directory / "masq.toml"
        config.write_text(f"[metrics]\ntop_hosts = {top_hosts}\n")
        wanted = ["attach", "--wan", "wan0", "--lan", "lan0", "--config", config]
        lab.exec(GATE, [sys.executable, "-m", "xdpmasq", *wanted], timeout_s=300)
        with netns.entered(lab.namespace(GATE)):
            tables = datapath.find()
        fill(tables, sessions)
        scrape(lab)
        result = {
            "sessions": len(tables.live_slots()),
            "top_hosts": top_hosts,
            "scrape_s": sorted(scrape(lab) for _ in range(ROUNDS)),
            "scrape_cpu_s": cpu_of_a_scrape_s(lab, tables.agent_pid),
            "ticks_s": ticks(tables, lambda: time.sleep(0.1)),
            "ticks_while_scraped_each_second_s": ticks(tables, lambda: (scrape(lab), time.sleep(1))),
            "ticks_while_scraped_without_pause_s": ticks(tables, lambda: scrape(lab)),
            "load": subprocess.run(["uptime"], capture_output=True, text=True, check=True).stdout.split("average: ")[
                1
            ],
        }
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(int((sys.argv[1:2] or ["500000"])[0]), int((sys.argv[2:3] or ["0"])[0]))
