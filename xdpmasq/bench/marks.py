"""What the project promises of its speed and size, in one table; the benchmark says beside each whether it is met.

They hold for 64-byte frames in both directions on veth. Quotients are speeds: the other's cost by ours.
"""

from xdpmasq.bench.contestants import BEST, RIVAL
from xdpmasq.bench.report import Mark

_XDP, _TC = "xdpmasq-xdp", "xdpmasq-tc"

MARKS = (
    Mark("forward/1000/64", _XDP, f"of {BEST}", "XDP by the bare redirect, 1,000 flows", least=0.85),
    Mark("forward/1000/64", _XDP, "share by nftables'", "XDP's share by nftables', 1,000 flows", most=0.1),
    Mark("forward/1000/64", _TC, f"× {RIVAL}", "TC by nftables, 1,000 flows", least=1.25),
    Mark("scale/redirect", _XDP, "1", "XDP by the bare redirect, one flow", least=0.85),
    Mark("scale/redirect", _XDP, "1,000", "XDP by the bare redirect, 1,000 flows", least=0.85),
    Mark("scale/redirect", _XDP, "100,000", "XDP by the bare redirect, 100,000 flows", least=0.62),
    Mark("scale/redirect", _XDP, "1,000,000", "XDP by the bare redirect, a million flows", least=0.58),
    Mark("scale/nftables", _XDP, "1,000,000", "XDP by nftables, a million flows", least=4.8),
    Mark("scale/nftables", _TC, "1,000", "TC by nftables, 1,000 flows", least=1.25),
    Mark("scale/nftables", _TC, "1,000,000", "TC by nftables, a million flows", least=1.45),
    Mark("setup/1", _XDP, f"× {RIVAL}", "XDP by nftables, new flows", least=1.5),
    Mark("setup/1", _TC, f"× {RIVAL}", "TC by nftables, new flows", least=1.5),
    Mark("setup/4", _XDP, f"× {RIVAL}", "XDP by nftables, new flows, four addresses", least=1.5),
    Mark("setup/4", _TC, f"× {RIVAL}", "TC by nftables, new flows, four addresses", least=1.5),
    Mark("latency", _XDP, f"p50 × {RIVAL}", "XDP's median round trip by nftables'", least=1.0),
    Mark("latency", _XDP, f"p99 × {RIVAL}", "XDP's slowest of 100 round trips by nftables'", least=1.0),
    Mark("latency", _TC, f"p50 × {RIVAL}", "TC's median round trip by nftables'", least=1.0),
    Mark("latency", _TC, f"p99 × {RIVAL}", "TC's slowest of 100 round trips by nftables'", least=1.0),
    Mark("tcp/on", _TC, f"1 × {RIVAL}", "TC by nftables, bulk TCP, offloads", least=1.0),
    Mark("tcp/on", _TC, f"8 × {RIVAL}", "TC by nftables, bulk TCP, offloads, 8 streams", least=1.0),
    Mark("tcp/off", _XDP, f"1 × {RIVAL}", "XDP by nftables, bulk TCP, no offloads", least=0.8),
    Mark("tcp/off", _XDP, f"8 × {RIVAL}", "XDP by nftables, bulk TCP, no offloads, 8 streams", least=0.8),
    Mark("memory/1000000", _XDP, "B/session", "memory of a session, XDP", most=384),
    Mark("memory/1000000", _TC, "B/session", "memory of a session, TC", most=384),
    Mark("control/1000000", _XDP, "attach s", "from attach to the first packet, XDP, s", most=2),
    Mark("control/1000000", _TC, "attach s", "from attach to the first packet, TC, s", most=2),
    Mark("control/1000000", _XDP, "list s", "listing all sessions to a file, s", most=5),
    Mark("control/1000000", _XDP, "expiry s", "looking for expired ones among them, s", most=1),
)
