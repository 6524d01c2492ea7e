"""RTSP between real players and servers: GStreamer serves, ffmpeg and GStreamer play, and ffmpeg publishes to ffmpeg.

::

    a-box, b-box ─ lan0 masq-gate wan0 203.0.113.1 ─ internet .10

The sound is sent as it is, and is compared byte by byte; pictures are counted. The kernel has no helper for RTSP.
Mode: tc.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netkit import Gateway, soon

from xdpmasq import algs
from xdpmasq.lab import Lab
from xdpmasq.lab.servers import Server
from xdpmasq.lab.topology import FAR, HOSTS, INTERNET, PUBLIC

HERE = Path(__file__).parent
SECOND = 44_100 * 2
SOUND = os.urandom(5 * SECOND)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway.in_new_lab("tc", attach=False) as made:
        made.attach_with(algs=(algs.Use.parse("rtsp"),))
        yield made


@pytest.fixture
def deaf(gateway: Gateway) -> Iterator[Gateway]:
    """Without its ALG."""
    gateway.masq("alg", "disable", "rtsp")
    yield gateway
    gateway.masq("alg", "enable", "rtsp")


class FilmServer(Server):
    """GStreamer's."""

    name = "films"

    def __init__(self, lab: Lab, role: str = "internet", address: str = INTERNET) -> None:
        super().__init__(lab, role, address)
        file = self.directory / "sound"
        file.write_bytes(SOUND)
        self._start([sys.executable, HERE / "film_server.py", address, file], "tcp", 554)


@pytest.fixture(scope="module")
def outside(gateway: Gateway) -> FilmServer:
    return FilmServer(gateway.lab)


@pytest.fixture(scope="module")
def inside(gateway: Gateway) -> FilmServer:
    return FilmServer(gateway.lab, "b-box", HOSTS["b-box"])


# filter_src: what does not come from the ports that the server has named is none of its.
FFMPEG = ["-hide_banner", "-nostdin", "-rtsp_transport", "udp", "-rtsp_flags", "filter_src", "-analyzeduration", "0"]
PLAYERS: dict[str, list[str]] = {
    "ffmpeg": [
        *("ffmpeg", *FFMPEG, "-i", "{url}"),
        *("-t", "1.5", "-map", "0:a", "-c", "copy", "-f", "s16be", "{sound}"),
        *("-t", "1.5", "-map", "0:v", "-c", "copy", "-f", "mjpeg", "{pictures}"),
    ],
    "GStreamer": [sys.executable, str(HERE / "film_client.py"), "{url}", "{sound}", "{pictures}"],
}


def plays(gateway: Gateway, role: str, url: str, player: str, folder: Path) -> tuple[int, int]:
    """Bytes of sound, which are right and in a row, and pictures."""
    files = {name: folder / name for name in ("sound", "pictures")}
    argv = [word.format(url=url, **files) for word in PLAYERS[player]]
    gateway.lab.exec(role, ["timeout", "5", *argv], check=False)
    sound, pictures = (file.read_bytes() if file.exists() else b"" for file in files.values())
    assert sound in SOUND
    return len(sound), pictures.count(b"\xff\xd8\xff")


@pytest.mark.parametrize("player", PLAYERS)
def test_a_player_inside(
    gateway: Gateway, outside: FilmServer, player: str, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    heard, seen = plays(gateway, "a-box", f"rtsp://{outside.address}/film", player, tmp_path)
    assert heard > SECOND
    assert seen > 25
    tell(f"RTSP, {player} inside from GStreamer outside: {heard} bytes of sound in a row and right, {seen} pictures")


@pytest.mark.parametrize("player", PLAYERS)
def test_a_server_inside(
    gateway: Gateway, inside: FilmServer, player: str, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    with gateway.forward("tcp", "554", f"{inside.address}:554"):
        heard, seen = plays(gateway, "internet", f"rtsp://{PUBLIC}/film", player, tmp_path)
    assert heard > SECOND
    assert seen > 25
    tell(f"RTSP, {player} outside from GStreamer inside: {heard} bytes of sound in a row and right, {seen} pictures")


def test_without_the_alg_nothing_arrives(
    deaf: Gateway, outside: FilmServer, inside: FilmServer, tmp_path: Path, tell: Callable[[str], None]
) -> None:
    for player in PLAYERS:
        assert plays(deaf, "a-box", f"rtsp://{outside.address}/film", player, tmp_path) == (0, 0)
    with deaf.forward("tcp", "554", f"{inside.address}:554"):
        assert plays(deaf, "internet", f"rtsp://{PUBLIC}/film", "ffmpeg", tmp_path) == (0, 0)
    tell("RTSP without the ALG: nothing arrives at a player inside, nor from a server inside at ffmpeg")


LISTEN = ["ffmpeg", "-hide_banner", "-nostdin", "-rtsp_flags", "listen", "-analyzeduration", "0"]
PUBLISH = ["ffmpeg", "-hide_banner", "-nostdin", "-re", "-f", "s16be", "-ar", "44100", "-ac", "1"]


@pytest.mark.parametrize("publisher", ["inside", "outside"])
def test_a_film_is_published(gateway: Gateway, publisher: str, tmp_path: Path, tell: Callable[[str], None]) -> None:
    """ANNOUNCE and RECORD: it is the server who listens for the media."""
    near, far = ("a-box", HOSTS["a-box"], PUBLIC), ("far", FAR, FAR)
    (role, _, _), (other, own, called) = (near, far) if publisher == "inside" else (far, near)
    given, taken = tmp_path / "given", tmp_path / "taken"
    given.write_bytes(SOUND)
    take = [*LISTEN, "-i", f"rtsp://{own}:554/film", "-t", "1.5", "-c", "copy", "-f", "s16be", taken]
    give = [*PUBLISH, "-i", given, "-c:a", "pcm_s16be", "-f", "rtsp", "-rtsp_transport", "udp"]
    with gateway.forward("tcp", "554", f"{HOSTS['a-box']}:554"):
        taker = gateway.lab.popen(other, take)
        soon(lambda: bool(gateway.lab.exec(other, ["ss", "-Hltn", "sport = 554"]).stdout), "ffmpeg listens", 5)
        giver = gateway.lab.popen(role, [*give, f"rtsp://{called}:554/film"])
        try:
            taker.wait(timeout=8)
        finally:
            gateway.lab.stop(giver)
            gateway.lab.stop(taker)
    heard = taken.read_bytes()
    assert heard in SOUND
    assert len(heard) > SECOND
    tell(f"RTSP, ffmpeg {publisher} publishes to ffmpeg: {len(heard)} bytes of sound in a row and right")
