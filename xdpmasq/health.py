"""Does it work? Judged by the manifest alone, for ``status`` and for the metrics."""

from collections.abc import Mapping
from typing import Any


def wans_of(manifest: Mapping[str, Any]) -> list[tuple[str, str | None]]:
    """Each WAN's name and address; a former version's manifest has one."""
    if not manifest.get("externals"):
        return [(manifest["wan"], manifest.get("external"))]
    return [*zip(manifest["wans"], manifest["externals"], strict=True)]


def why_not(manifest: Mapping[str, Any]) -> str:
    """What keeps the gateway from masquerading, in words; empty when it works."""
    roles = {each["role"] for each in manifest["interfaces"]}
    refused = [each for each in manifest["interfaces"] if each["role"] == "wan" and each["hook"] == "none"]
    if refused:
        return f"cannot attach to {refused[0]['name']}: {refused[0]['why']}"
    if manifest.get("trouble"):
        return str(manifest["trouble"])
    names = " and ".join(name for name, _ in wans_of(manifest))
    if "wan" not in roles:
        return f"the WAN {names} is not there"
    if not any(address for _, address in wans_of(manifest)):
        return f"the WAN {names} has no address"
    return "" if "lan" in roles else f"no interface is there that fits {', '.join(manifest['lans'])}"


def in_short(manifest: Mapping[str, Any]) -> str:
    """In one line: who is masqueraded as whom, or what keeps that from working."""
    if trouble := why_not(manifest):
        return f"not masquerading: {trouble}"
    outside = ", ".join(f"{name} as {address or 'nothing yet'}" for name, address in wans_of(manifest))
    return f"masquerading {', '.join(manifest['lans'])} out of {outside}"
