"""Hash functions of the interpreter's own.

hashlib alone would bring libcrypto: 5 MiB of memory, and of every boot image. The imports are
written out, because what a boot image must hold is read from them.
"""

from collections.abc import Callable

from vsock.errors import CallError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class Hash(Protocol):
        """What every hash object can do."""

        def update(self, data: "bytes | bytearray | memoryview", /) -> None: ...

        def digest(self) -> bytes: ...

        def hexdigest(self) -> str: ...


__all__ = ("ALGORITHMS", "new_hash")


def _sha256() -> "Any":
    try:
        import _sha256 as module  # type: ignore[import-not-found]
    except ModuleNotFoundError:  # since Python 3.12
        import _sha2 as module  # type: ignore[import-not-found]
    return module.sha256()


def _sha512_module() -> "Any":
    try:
        import _sha512 as module  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        import _sha2 as module
    return module


def _sha512() -> "Any":
    return _sha512_module().sha512()


def _sha384() -> "Any":
    return _sha512_module().sha384()


def _sha1() -> "Any":
    import _sha1 as module  # type: ignore[import-not-found]

    return module.sha1()


_MAKERS: "dict[str, Callable[[], Any]]" = {
    "sha256": _sha256,
    "sha512": _sha512,
    "sha1": _sha1,
    "sha384": _sha384,
}
#: Those of hash trees.
ALGORITHMS = ("sha256", "sha512", "sha1")


def new_hash(algorithm: str) -> "Hash":
    """Return a new hash object for one of ``ALGORITHMS``, or for sha384.

    Raises:
        CallError: ``unsupported``, the interpreter was built without it.
    """
    try:
        made: Hash = _MAKERS[algorithm]()
    except ModuleNotFoundError as problem:
        text = f"this interpreter has no {algorithm}"
        raise CallError("unsupported", text, object=algorithm) from problem
    return made
