"""Amanda (its protocol's wiki page): a backup client's reply names the TCP ports where the server is to fetch data.

Only the client, which listens at UDP 10080, names ports; of one that is inside, behind a forward, they are opened for
the server that has asked. A server inside opens its connections itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from xdpmasq.alg.api import Alg, Control, Openings, Side, Unparsed
from xdpmasq.alg.checks import own

_HEADER = rb"Amanda [0-9]{1,3}\.[0-9]{1,3} P?REP HANDLE [^\s\0]{1,64} SEQ [0-9]{1,20}\n(?:SECURITY [^\n\0]{0,256}\n)?"
_STREAMS = rb"(?: (?:DATA|MESG|INDEX|STATE|CTL) (?:-1|[0-9]{1,5}))"
_CONNECT = re.compile(rb"(%s)(CONNECT%s{1,4} ?)(?=\n)" % (_HEADER, _STREAMS))
_PORT = re.compile(rb"(?<= )[0-9]+")


class Amanda(Alg):
    """What nf_conntrack_amanda and nf_nat_amanda do; there is no stream where the port is 0 or -1."""

    name = "amanda"
    ports: ClassVar[Mapping[str, tuple[int, ...]]] = {"udp": (10080,)}
    pinholes = 4

    def translate(self, data: bytes, side: Side, control: Control, openings: Openings) -> bytes:
        if side is not Side.INSIDE or control.server is not Side.INSIDE:
            return data
        reply = _CONNECT.match(data)
        if reply is None:
            if b"\nCONNECT " in data:
                raise Unparsed("no Amanda reply with streams to connect to")
            return data
        # all of them are looked at before the first is opened
        inside = [own(control, port) for port in map(int, _PORT.findall(reply[2])) if port]
        outside = iter([openings.open("tcp", port, remote=control.remote.address) for port in inside])
        streams = _PORT.sub(lambda port: b"%d" % next(outside).port if int(port[0]) else port[0], reply[2])
        return reply[1] + streams + data[reply.end() :]
