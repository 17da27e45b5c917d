"""Hash functions of the interpreter's own.

hashlib alone would bring libcrypto: 5 MiB of memory, and of every boot image.
"""

from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Hash(Protocol):
        """What every hash object can do."""

        def update(self, data: "bytes | bytearray | memoryview", /) -> None: ...

        def hexdigest(self) -> str: ...


__all__ = ("ALGORITHMS", "new_hash")

#: algorithm -> modules that may have it; _sha2 holds them since Python 3.12.
_MODULES = {
    "sha256": ("_sha256", "_sha2"),
    "sha512": ("_sha512", "_sha2"),
    "sha1": ("_sha1",),
}
ALGORITHMS = tuple(_MODULES)


def new_hash(algorithm: str) -> "Hash":
    """Return a new hash object.

    Raises:
        LookupError: the interpreter was built without it.
    """
    for module in _MODULES[algorithm]:
        try:
            make: Callable[[], Hash] = getattr(__import__(module), algorithm)
        except (ImportError, AttributeError):
            continue
        return make()
    raise LookupError(f"this interpreter has no {algorithm}")
