"""What this kernel and this agent can do, by name, and why a thing cannot be done."""

import sys
from collections.abc import Callable

from guestagent.api.agent import FEATURES
from guestagent.engine.plan import SIGNATURES_SINCE, Version, verity_options
from guestagent.storage import filesystems, overlayfs
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.keyring import checks_signatures

__all__ = ("find_missing", "missing_of")

#: Since when the kernel carries overlays in each way.
_WAYS_SINCE = {"fsconfig-fd": "6.13", "fsconfig-path": "6.5", "mount": "3.18"}


def find_missing(control: Control) -> dict[str, str]:
    """Ask the kernel; return as ``missing_of``."""
    known = filesystems.registered()
    return missing_of(
        control.list_versions(),
        known,
        overlayfs.available_ways() if "overlay" in known else (),
        knows_signatures=checks_signatures(),
        flattens_erofs=filesystems.has_flattened_erofs(),
        has_network_child=_has_network_child(),
    )


def _has_network_child() -> bool:
    """Say whether what sets up the network, in a child, is in this guest."""
    from importlib.machinery import PathFinder

    places = [f"{directory}/guestagent/net" for directory in sys.path]
    return all(
        PathFinder.find_spec(name, path) is not None
        for name, path in (("pyroute2", None), ("child", places))
    )


def missing_of(
    versions: dict[str, Version],
    known: frozenset[str],
    overlay_ways: tuple[str, ...],
    *,
    knows_signatures: bool,
    flattens_erofs: bool,
    has_network_child: bool = True,
) -> dict[str, str]:
    """Return those of ``FEATURES`` that are not there, each with the reason.

    ``versions`` are those of the kernel's device-mapper targets, ``known`` its file systems;
    ``knows_signatures`` is true where its dm-verity was built to check signatures,
    ``flattens_erofs`` where it mounts erofs images with a device table; ``has_network_child`` is
    true where this guest has the modules that set up its network.
    """

    def target(name: str) -> str:
        module = "dm-mod" if name == "linear" else f"dm-{name}"
        text = f"the kernel has no device-mapper target {name}: load the module {module}"
        return "" if name in versions else text

    def preset(name: str) -> str:
        without = target("verity")
        if without:
            return without
        dropped = verity_options(name, versions["verity"], None).dropped
        return "; ".join(f"{each.option}: {each.reason}" for each in dropped)

    def filesystem(name: str) -> str:
        row = filesystems.TABLE.get(name)
        module = name if row is None else row.modules[0]
        text = f"the kernel has no file system {name}: load the module {module}"
        return "" if name in known else text

    def way(name: str) -> str:
        since = f"the kernel cannot; Linux {_WAYS_SINCE[name]} and later can"
        return filesystem("overlay") or ("" if name in overlay_ways else since)

    def scratch(name: str) -> str:
        own = "" if name == "directory" else filesystem(name.removeprefix("device-"))
        return filesystem("overlay") or own

    def signatures() -> str:
        without = target("verity")
        if without:
            return without
        if versions["verity"] < SIGNATURES_SINCE:
            has, needs = (".".join(map(str, v)) for v in (versions["verity"], SIGNATURES_SINCE))
            return f"the kernel's verity target is {has}, this needs {needs}"
        text = "the kernel is built without CONFIG_DM_VERITY_VERIFY_ROOTHASH_SIG"
        return "" if knows_signatures else text

    def flattened() -> str:
        text = "the kernel mounts no erofs image with a device table; Linux 6.4 and later do"
        return filesystem("erofs") or ("" if flattens_erofs else text)

    def network() -> str:
        text = "the guest has no pyroute2: build the boot image with the feature net"
        return "" if has_network_child else text

    kinds: dict[str, Callable[[str], str]] = {
        "verity": lambda _: signatures(),
        "erofs": lambda _: flattened(),
        "net": lambda _: network(),
        "dm": target,
        "preset": preset,
        "fs": filesystem,
        "share": filesystem,
        "overlay": way,
        "scratch": scratch,
    }
    missing = {}
    for feature in FEATURES:
        kind, _, name = feature.partition("-")
        why = kinds[kind](name) if kind in kinds and name else ""  # the agent's own are there
        if why:
            missing[feature] = why
    return missing
