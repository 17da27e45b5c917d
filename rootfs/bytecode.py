"""Compiling modules for an image: byte code that depends on the source and on nothing else."""

import importlib.util
import marshal
import struct

__all__ = ("compile_module",)

_UNCHECKED_HASH = 0b01  # PEP 552: the file has a hash of its source, and nobody compares it


def compile_module(source: bytes, name: str, optimize: int) -> bytes:
    """Return the contents of a .pyc file for ``source``; ``name`` is the path in tracebacks.

    The code goes through marshal twice: what the compiler returns shares strings with whatever else
    this process has loaded, and marshal writes shared and unshared ones differently.

    Raises:
        SyntaxError: the source is no Python of this version.
    """
    code = compile(source, name, "exec", dont_inherit=True, optimize=optimize)
    data = marshal.dumps(marshal.loads(marshal.dumps(code)))
    header = struct.pack("<I", _UNCHECKED_HASH) + importlib.util.source_hash(source)
    return importlib.util.MAGIC_NUMBER + header + data
