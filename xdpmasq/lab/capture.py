"""Captures: what really was on a wire, as raw frames, without a race at either end.

tcpdump is asked twice over the whole truth: a capture has begun only when tcpdump says that it listens,
and it ends only when tcpdump has read every packet that its filter let through.
"""

import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from xdpmasq.lab.errors import LabError, wait_until

_PCAP_MAGIC = 0xA1B2C3D4
_FILE_HEADER = struct.Struct("=IHHiIII")
_FRAME_HEADER = struct.Struct("=IIII")  # seconds, microseconds, captured, on the wire
_REPORT = re.compile(r"(\d+) packets? captured, (\d+) packets? received by filter")


class Capture:
    """A running tcpdump; `frames` are complete when :meth:`stop` returns.

    Frames begin with the link's own header: Ethernet on veth, IP itself on tun.
    """

    def __init__(self, process: subprocess.Popen[bytes], path: Path, log: Path) -> None:
        self.path = path
        self._process = process
        self._log = log
        self._counts: tuple[str, ...] | None = None  # of tcpdump's last report: read, counted by the kernel
        wait_until(self._is_listening, "tcpdump listens")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.stop()
        else:
            self._process.kill()

    def stop(self) -> list[bytes]:
        """End the capture when tcpdump has written all that passed so far, and return the frames."""
        if self._process.poll() is None:
            wait_until(self._has_read_all, "tcpdump has read all packets")
            self._process.send_signal(signal.SIGINT)
            self._process.wait(timeout=5)
        return self.frames

    @property
    def frames(self) -> list[bytes]:
        """The frames written so far."""
        return list(read_pcap(self.path))

    def _is_listening(self) -> bool:
        if self._process.poll() is not None:
            raise LabError("tcpdump did not start", self._log.read_text().strip())
        return "listening on" in self._log.read_text()

    def _has_read_all(self) -> bool:
        """SIGUSR1 makes tcpdump report; the kernel counts a packet before tcpdump has read it.

        Traffic that was under way when tcpdump started is counted before the filter is in place, and never
        read: then two equal reports say that nothing more comes.
        """
        before = self._log.stat().st_size
        self._process.send_signal(signal.SIGUSR1)
        wait_until(lambda: self._report_after(before) is not None, "tcpdump reports its counts")
        report = self._report_after(before)
        before_that, self._counts = self._counts, report.groups() if report else None
        return self._counts is not None and (self._counts == before_that or len(set(self._counts)) == 1)

    def _report_after(self, position: int) -> re.Match[str] | None:
        return _REPORT.search(self._log.read_text(), position)


def read_pcap(path: Path) -> Iterator[bytes]:
    """The frames of a pcap file written on this machine; a last frame cut short is left out."""
    data = path.read_bytes()
    if len(data) < _FILE_HEADER.size:
        return
    if _FILE_HEADER.unpack_from(data)[0] != _PCAP_MAGIC:
        raise LabError(f"{path} cannot be read", "it is not a pcap file of this machine's byte order")
    position = _FILE_HEADER.size
    while position + _FRAME_HEADER.size <= len(data):
        length = _FRAME_HEADER.unpack_from(data, position)[2]
        position += _FRAME_HEADER.size + length
        if position <= len(data):
            yield data[position - length : position]
