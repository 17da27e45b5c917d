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
    files = _files(directory)
    begun = {file.removesuffix(_BEGUN) for file, _ in files if file.endswith(_BEGUN)}
    #: By inode: what it was begun in, and the places by id. Entries may be one file of many names.
    read: dict[int, tuple[str, dict[str, str]]] = {}
    for file, inode in files:
        try:
            if file.endswith(_BEGUN):
                found["unfinished"] += _begun(_read(f"{directory}/{file}"))
            elif file.endswith(_ENTRY):
                kind, _, name = file.removesuffix(_ENTRY).partition("-")
                if inode not in read:
                    read[inode] = _entries(kind, _read(f"{directory}/{file}"))
                begun_in, places = read[inode]
                if begun_in not in begun:
                    found[f"{kind}s"].append(places[name])
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            continue  # recovery puts it aside, and tells
    return {part: tuple(texts) for part, texts in found.items()}


def _files(directory: str) -> list[tuple[str, int]]:
    if not os.path.isdir(directory):
        return []
    with os.scandir(directory) as found:
        return sorted((file.name, file.inode()) for file in found)


def _entries(kind: str, content: "Mapping[str, Any]") -> "tuple[str, dict[str, str]]":
    lives = content["layers"] if kind == "layer" else (content["live"],)
    return content["begun"], {live["spec"][f"{kind}_id"]: _place(kind, live) for live in lives}


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
