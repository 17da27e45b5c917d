"""Compiling modules for an image: byte code that depends on the source and on nothing else."""

import importlib.util
import marshal
import struct

__all__ = ("compile_module",)

_UNCHECKED_HASH = 0b01  # PEP 552: the file has a hash of its source, and nobody compares it
# Later formats mark objects that may be referred to again, and decide that by reference counts,
# which differ from one compilation to the next. This one has no marks; it is a fifth larger.
_MARSHAL_VERSION = 2


def compile_module(source: bytes, name: str, optimize: int) -> bytes:
    """Return the contents of a .pyc file for ``source``; ``name`` is the path in tracebacks.

    Raises:
        SyntaxError: the source is no Python of this version.
    """
    code = compile(source, name, "exec", dont_inherit=True, optimize=optimize)
    header = struct.pack("<I", _UNCHECKED_HASH) + importlib.util.source_hash(source)
    return importlib.util.MAGIC_NUMBER + header + marshal.dumps(code, _MARSHAL_VERSION)
