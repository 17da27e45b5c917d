"""What a life that was cut short has left, by its journal.

Read without checking what is there field by field: somebody waits for the next life to answer, and
recovery is about to do that with the same files.
"""

import os

import msgpack

from guestagent.api.layers import TARGET_ROOT

__all__ = ("left_behind",)

_ENTRY, _BEGUN = ".entry", ".begun"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any  # of a file that may hold anything


def left_behind(directory: str) -> dict[str, tuple[str, ...]]:
    """Return layers, overlays and what was unfinished, each as text; damaged files are left out.

    Raises:
        OSError: the journal cannot be read.
    """
    found: dict[str, list[str]] = {"layers": [], "overlays": [], "unfinished": []}
    files = sorted(os.listdir(directory) if os.path.isdir(directory) else ())
    begun = {file.removesuffix(_BEGUN) for file in files if file.endswith(_BEGUN)}
    for file in files:
        try:
            if file.endswith(_BEGUN):
                found["unfinished"] += _begun(_read(f"{directory}/{file}"))
            elif file.endswith(_ENTRY):
                kind = file.partition("-")[0]
                entry = _read(f"{directory}/{file}")
                if entry["begun"] not in begun:
                    found[f"{kind}s"].append(_place(kind, entry["live"]))
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            continue  # recovery puts it aside, and tells
    return {part: tuple(texts) for part, texts in found.items()}


def _begun(begun: "Mapping[str, Any]") -> "Iterator[str]":
    for traces in begun["layers"]:
        yield f"{traces['layer_id']} at {traces['mount_point']}"
    if begun["overlay"]:
        yield _place("overlay", begun["overlay"])


def _place(kind: str, live: "Mapping[str, Any]") -> str:
    spec = live["spec"]
    name = spec[f"{kind}_id"]
    return f"{name} at {spec['target'] or f'{TARGET_ROOT}/{kind}s/{name}'}"


def _read(path: str) -> "Mapping[str, Any]":
    """Read a file whole; a stream around it would cost more than the reading."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = msgpack.unpackb(os.read(fd, os.fstat(fd).st_size))
    finally:
        os.close(fd)
    if not isinstance(content, dict):
        raise TypeError(f"{path!r} holds no map")
    return content
