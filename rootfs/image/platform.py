"""Choosing one of several images: by platform, and by name.

Source: OCI image specification 1.1 (image-index: "Platform Variants"); containerd's default
variants.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from vsock.errors import CallError

__all__ = ("Platform", "default_platform", "fitting", "listed", "same_name")

Image = TypeVar("Image")
#: What uname(2) calls a machine, and how images call it.
_MACHINES = {
    "x86_64": "amd64",
    "aarch64": "arm64",
    "armv7l": "arm",
    "i686": "386",
    "riscv64": "riscv64",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
}
#: The variant that is meant where none is stated.
_VARIANTS = {"amd64": "v1", "arm64": "v8", "arm": "v7"}
_MAX_LISTED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """``variant`` is empty where none is stated."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> "Platform":
        """Read ``OS/ARCHITECTURE[/VARIANT]``.

        Raises:
            CallError: ``invalid``.
        """
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(parts):
            raise CallError(
                "invalid",
                f"the platform {text!r} is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT",
                step="read the image",
                object="platform",
            )
        return cls(os=parts[0], architecture=parts[1], variant=parts[2] if parts[2:] else "")

    @classmethod
    def of(cls, value: object) -> "Platform | None":
        """Return the platform of a descriptor or of an image's configuration, None without one."""
        if not isinstance(value, Mapping):
            return None
        system, architecture = value.get("os"), value.get("architecture")
        variant = value.get("variant") or ""
        if not isinstance(system, str) or not isinstance(architecture, str):
            return None
        return cls(os=system, architecture=architecture, variant=str(variant))

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    @property
    def full(self) -> "Platform":
        """This platform with the variant that is meant."""
        variant = self.variant or _VARIANTS.get(self.architecture, "")
        return Platform(os=self.os, architecture=self.architecture, variant=variant)


def default_platform() -> str:
    """Return the platform of this machine as images name it, such as ``linux/amd64``."""
    machine = os.uname().machine
    return f"linux/{_MACHINES.get(machine, machine)}"


def fitting(
    images: Sequence[tuple[Platform | None, Image]], wanted: Platform
) -> list[tuple[Platform | None, Image]]:
    """Return the images for a platform; an image that states none fits any.

    Without an image of the very variant, any variant will do if none was asked for.
    """
    same = [each for each in images if each[0] is None or each[0].full == wanted.full]
    if same or wanted.variant:
        return same
    kind = (wanted.os, wanted.architecture)
    return [each for each in images if each[0] and (each[0].os, each[0].architecture) == kind]


def same_name(one: object, other: str) -> bool:
    """Compare names of images; the registry ``docker.io`` and ``library/`` may be left out."""
    return isinstance(one, str) and _short(one) == _short(other)


def _short(name: str) -> str:
    return name.removeprefix("docker.io/").removeprefix("library/")


def listed(what: Iterable[object]) -> str:
    """Return names or platforms for a message: each once, at most 20, what they are unsaid."""
    texts = list(dict.fromkeys(str(each)[:200] for each in what))
    more = f" and {len(texts) - _MAX_LISTED} more" if len(texts) > _MAX_LISTED else ""
    return ", ".join(map(repr, texts[:_MAX_LISTED])) + more or "none"
