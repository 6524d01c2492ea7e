"""TCP streams of messages that say how long they are."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed


class FramedAlg(Alg):
    """Messages follow one another without a gap.

    Where something else stands in place of one, the stream is not what it should be, or its beginning was not seen;
    the session is over then: who can choose where segments end could else put a message of his own into other text.

    Attributes:
        head: bytes at the beginning of a message that tell its length.
    """

    head: ClassVar[int]

    def length(self, head: bytes) -> int:
        """Of the message that begins with ``head``, of :attr:`head` bytes; 0: there are fewer, too few to tell.

        Raises:
            Unparsed: none begins so.
        """
        raise NotImplementedError

    def translate_message(self, message: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        raise NotImplementedError

    def ready(self, data: bytes, side: Side, control: Control) -> int:
        ends, lost = self._ends(data)
        return len(data) if lost else ends[-1]

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        """Message by message: one that is not understood does not keep the others from being changed.

        Raises:
            Unparsed: of one, when none was changed.
        """
        if control.memory.get("over"):
            raise Unparsed("the stream has something else in it")
        ends, _ = self._ends(data)
        done, unparsed = [], None
        for begin, end in pairwise(ends):
            message = data[begin:end]
            try:
                done.append(self.translate_message(message, side, control, openings))
            except Unparsed as error:
                unparsed = error
                done.append(message)
        if ends[-1] < len(data):
            control.memory["over"] = True
            unparsed = Unparsed("no message begins here")
        changed = b"".join([*done, data[ends[-1] :]])
        if unparsed and changed == data:
            raise unparsed
        return changed

    def _ends(self, data: bytes) -> tuple[list[int], bool]:
        """Where whole messages end, 0 before the first; and whether something else follows."""
        ends = [0]
        while True:
            try:
                length = self.length(data[ends[-1] : ends[-1] + self.head])
            except Unparsed:
                return ends, True
            if not length or ends[-1] + length > len(data):
                return ends, False
            ends.append(ends[-1] + length)
