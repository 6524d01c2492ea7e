"""The fields of the session table and of the settings that Python reads; the true layout is the business of
test_sessions.py.
"""

import numpy as np

ADDR = [("word", "u4", (1,))]
FLOW = [
    *(("remote_addr", ADDR), ("new_addr", ADDR), ("remote_port", "u2"), ("new_port", "u2")),
    *(("last_seen", "u4"), ("tcp_seen", "u1")),
]
TRAFFIC = [("packets", "u8"), ("bytes", "u8")]
SESSION = np.dtype(
    [
        *(("out", FLOW), ("opened_at", "u4"), ("sent", TRAFFIC)),
        *(("in", FLOW), ("mapping", "u4"), ("life", "u8"), ("received", TRAFFIC)),
    ]
)
SETTINGS = np.dtype(
    [
        *(
            ("externals", "u4"),
            ("external", ADDR, (1,)),
            ("pool", [("first", "u4", (2,)), ("count", "u4", (2,))], (3,)),
        ),
        *((name, "u4") for name in ("tcp_established", "tcp_transitory", "udp", "icmp", "hz")),
        ("inbound_refresh", "u1"),
    ]
)
