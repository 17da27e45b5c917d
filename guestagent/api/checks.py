"""The checks that several records share: each raises ValueError with the field's name."""

from collections.abc import Collection

_ID_MAX = 64
_PATH_MAX = 1024
_WORD = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
_PATH = _WORD | frozenset("/@+=")
_NOT_NORMAL = frozenset(("", ".", ".."))
MAX_BYTES = (1 << 63) - 1


class FieldError(ValueError):
    """A value is refused; ``field`` says which."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


def check_word(name: str, value: str, longest: int = _ID_MAX) -> None:
    """Identifiers end up in dm names, uuids and file names: one plain word, no dot first."""
    if not 0 < len(value) <= longest:
        raise ValueError(f"{name} must have 1 to {longest} characters, got {len(value)}")
    if not _WORD.issuperset(value) or value[0] in ".-":
        raise ValueError(f"{name} must be letters, digits, '.', '_' or '-', got {value!r}")


def check_path(name: str, value: str) -> None:
    """Paths may end up in mount options: absolute, normal, from a plain alphabet.

    "/" itself is a path: the root that a machine was booted into is described by it.
    """
    if value == "/":
        return
    if not value.startswith("/") or len(value) > _PATH_MAX:
        raise ValueError(f"{name} must be absolute and at most {_PATH_MAX} long, got {value!r}")
    if not _PATH.issuperset(value):
        raise ValueError(f"{name} may hold letters, digits and '._-/@+=' only, got {value!r}")
    parts = value[1:].split("/")
    if not _NOT_NORMAL.isdisjoint(parts):
        raise ValueError(f"{name} must be normal: no '//', '.', '..' or final '/', got {value!r}")
    if max(map(len, parts)) > 255:
        raise ValueError(f"{name} has a component of over 255 characters")


def check_range(name: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def check_choice(name: str, value: str | None, choices: Collection[str]) -> None:
    if value is not None and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
