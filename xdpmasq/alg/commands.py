"""Protocols of command lines over TCP, where a line is read only if all that the client has sent looks like them.

A browser can be made to send any lines it likes to any port, as the body of an HTTP request, and in pieces of any
size (NAT slipstreaming). So lines are waited for, whatever they begin with; what is left of one that was too long is
no line; and after the first line of the client that is no command nothing in the session is read again. The same
is done after TLS, which has no lines to wait for. Of the server nothing of that counts: it may repeat what anybody
has said.
"""

from __future__ import annotations

import re
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed

LONGEST_LINE = 2048  # without its LF; a longer one passes
_TLS = b"\x14\x15\x16\x17"  # what a record begins with (RFC 8446 section 5.1)
_LINES = re.compile(rb"[^\n]*\n|[^\n]+")


class CommandAlg(Alg):
    """Lines, which end with LF.

    Attributes:
        command: every line that a client may send, with its end.
        binary: bytes that are in no line.
    """

    command: ClassVar[re.Pattern[bytes]]
    binary: ClassVar[re.Pattern[bytes]]

    def translate_line(self, line: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        """A line with its LF, as it is to go on.

        Raises:
            Unparsed: it passes unchanged.
        """
        raise NotImplementedError

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        whole = data.rfind(b"\n") + 1
        if len(data) - whole > LONGEST_LINE or data[whole : whole + 1] in _TLS or self.binary.search(data, whole):
            return len(data)
        return whole

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        """Line by line: one that is not understood does not keep the others from being changed.

        Raises:
            Unparsed: one was not understood, and none was changed.
        """
        done, unparsed = [], None
        for line in _LINES.findall(data):
            try:
                done.append(self._line(line, side, control, openings))
            except Unparsed as error:
                unparsed = error
                done.append(line)
        changed = b"".join(done)
        if unparsed and changed == data:
            raise unparsed
        return changed

    def _line(self, line: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        memory, inside_a_line = control.memory, f"{side.value} is inside a line"
        if memory.get("over"):
            return line
        whole = line.endswith(b"\n") and not memory.get(inside_a_line)
        binary = self.binary.search(line) or (line[:1] in _TLS and not memory.get(inside_a_line))
        if side is control.client and binary:
            memory["over"] = True
        memory[inside_a_line] = not line.endswith(b"\n")
        if not whole or binary or len(line) > LONGEST_LINE + 1:
            return line
        if side is control.client and not self.command.fullmatch(line):
            memory["over"] = True
        if memory.get("over"):
            return line
        return self.translate_line(line, side, control, openings)
