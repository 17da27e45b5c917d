"""What a life that was cut short has left, by its journal.

Read without checking what is there field by field: somebody waits for the next life to answer, and
recovery is about to do that with the same entries.
"""

import os

import msgpack

from guestagent.api.layers import TARGET_ROOT
from guestagent.engine.journal import WHOLE

__all__ = ("left_behind",)

_SUFFIX = ".entry"


def left_behind(directory: str) -> dict[str, tuple[str, ...]]:
    """Return layers, overlays and what was unfinished, each as text; damaged entries are left out.

    Raises:
        OSError: the journal cannot be read.
    """
    found: dict[str, list[str]] = {"layers": [], "overlays": [], "unfinished": []}
    for file in sorted(os.listdir(directory) if os.path.isdir(directory) else ()):
        kind, _, rest = file.partition("-")
        if kind not in ("layer", "overlay") or not rest.endswith(_SUFFIX):
            continue
        try:
            entry = msgpack.unpackb(_read(f"{directory}/{file}"))
            spec = entry["live"]["spec"]
            name = spec[f"{kind}_id"]
            text = f"{name} at {spec['target'] or f'{TARGET_ROOT}/{kind}s/{name}'}"
            found[f"{kind}s" if entry["state"] == WHOLE else "unfinished"].append(text)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            continue  # recovery puts it aside, and tells
    return {part: tuple(texts) for part, texts in found.items()}


def _read(path: str) -> bytes:
    """Read a file whole; a stream around it would cost more than the reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)
