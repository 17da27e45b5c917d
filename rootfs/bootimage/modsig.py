"""The signature that a kernel module file may end with.

Source: include/linux/module_signature.h: the signature, struct module_signature (12 bytes, the
length of the signature big-endian in its last four), and a marker.
"""

import struct

__all__ = ("without_signature",)

_MARKER = b"~Module signature appended~\n"
_TRAILER = struct.Struct(">8xI")


def without_signature(module: bytes) -> bytes:
    """Return a module without its signature; one that has none as it is.

    Raises:
        ValueError: the signature is said to be longer than the file.
    """
    if not module.endswith(_MARKER):
        return module
    end = len(module) - len(_MARKER) - _TRAILER.size
    if end < 0:
        raise ValueError("a module that is shorter than what tells of its signature")
    (size_bytes,) = _TRAILER.unpack_from(module, end)
    if size_bytes > end:
        raise ValueError(f"a module of {len(module)} bytes with a signature of {size_bytes}")
    return module[: end - size_bytes]
