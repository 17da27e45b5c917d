"""What to do next when something failed: for errors that do not say it themselves."""

import os

from vsock.address import HybridAddress, UnixAddress, VsockAddress, parse_address
from vsock.errors import CallError

__all__ = ("advice", "unreachable")

_BY_CODE = {
    "invalid": "`guestctl {command} --help` says what it takes",
    "unsupported": "`guestctl hello` lists what this agent and its kernel can do",
    "not_found": "`guestctl layer list`, `overlay list` and `dm list` show what is there",
    "conflict": "`guestctl layer list` and `overlay list` show who has it",
    "busy": "try again when its holders are gone; `guestctl status` shows what is in use",
    "integrity": "`guestctl layer verify` on the host tells whether the digest is the image's",
    "timeout": "--deadline gives it more time; `guestctl log` says what it was waiting for",
    "device": "`guestctl fs devices` lists the disks of the guest",
    "mount": "`guestctl log --level debug` has the steps; the kernel's lines are above, if any",
    "resource": "`guestctl status` and `guestctl top` show what is used up",
    "internal": "`guestctl crashes` and `guestctl log` of the agent have the details",
}


def advice(error: CallError, command: str) -> str | None:
    """Return a sentence for a person, None where there is nothing to say."""
    text = _BY_CODE.get(error.code)
    return None if text is None else text.format(command=command)


def unreachable(address: str | None) -> str:
    """Return what to look at when nobody answers at an address."""
    try:
        place = parse_address(address or "")
    except ValueError:
        return "check the address"
    if isinstance(place, (HybridAddress, UnixAddress)):
        if not os.path.exists(place.path):
            return f"there is no socket {place.path!r}: is the machine running?"
        return "the machine may still be booting (--wait), or its agent be on another port"
    if isinstance(place, VsockAddress):
        if not os.path.exists("/dev/vsock"):
            return "this host has no vsock (/dev/vsock): use the VMM's hybrid:// socket"
        return "the machine may still be booting (--wait), or have another CID or port"
    return "is the other end of the line connected?"
