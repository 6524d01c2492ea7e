"""Does it work? Judged by the manifest alone, for ``status`` and for the metrics."""

from collections.abc import Mapping
from typing import Any


def why_not(manifest: Mapping[str, Any]) -> str:
    """What keeps the gateway from masquerading, in words; empty when it works."""
    roles = {each["role"] for each in manifest["interfaces"]}
    refused = [each for each in manifest["interfaces"] if each["role"] == "wan" and each["hook"] == "none"]
    if refused:
        return f"cannot attach to {refused[0]['name']}: {refused[0]['why']}"
    if manifest.get("trouble"):
        return str(manifest["trouble"])
    if "wan" not in roles:
        return f"the WAN {manifest['wan']} is not there"
    if not manifest["external"]:
        return f"the WAN {manifest['wan']} has no address"
    return "" if "lan" in roles else f"no interface is there that fits {', '.join(manifest['lans'])}"
