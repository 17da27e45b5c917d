"""Paths as they are typed: ``ID:/path`` inside a layer or overlay, ``/path`` in the guest."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from guestagent.api.inspect import PathRequest
from guestagent.console.command import Usage, not_found
from guestagent.engine.engine import Engine
from guestagent.inspect.place import Place
from guestagent.storage.openat import Root

__all__ = ("Named", "resolve")


class _GuestRoot(Root):
    """The guest's own root, with everything that is mounted below it.

    Still nothing but regular files and directories is opened, and no magic link followed.
    """

    def __init__(self) -> None:
        self._directory_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.fd = os.dup(self._directory_fd)
        self.is_clone = False


class _GuestPlace(Place):
    """The guest as a place to look into, as a layer is one."""

    def __init__(self) -> None:
        self.name = "the guest"
        self.mount_point = "/"
        self._layers = ()
        self.root = _GuestRoot()


class Named:
    """A path and where it leads. ``request`` is what the inspection's functions want to have."""

    def __init__(self, engine: Engine, path: bytes, request: PathRequest | None) -> None:
        self.path = path
        self._engine = engine
        self._request = request

    @property
    def is_guest(self) -> bool:
        """Whether it is the guest's own path, not one of a layer or overlay."""
        return self._request is None

    @property
    def request(self) -> PathRequest:
        return self._request or PathRequest(layer_id="guest", path=self.path)

    @contextmanager
    def open(self) -> Iterator[Place]:
        """Open the place.

        Raises:
            CallError: ``not_found``, it is not mounted any more.
        """
        if self._request is None:
            place: Place = _GuestPlace()
        else:
            place = self._engine.debug.place(self._request)
        with place:
            yield place


def resolve(engine: Engine, word: str) -> Named:
    """Say what a path leads to. A layer goes before an overlay of the same id, which
    ``overlay:ID:/path`` names.

    Raises:
        CallError: ``not_found``, there is no such layer or overlay.
        Usage: it is no path.
    """
    if word.startswith("/"):
        return Named(engine, os.fsencode(word), None)
    head, colon, path = word.rpartition(":") if ":/" not in word else _split(word)
    if not colon:
        raise Usage(f"{word!r} is no path: ID:/path in a layer or overlay, /path in the guest")
    kind, _, name = head.rpartition(":")
    encoded = os.fsencode(path or "/")
    if kind in ("", "layer") and name in engine.debug.layer_ids():
        return Named(engine, encoded, PathRequest(layer_id=name, path=encoded))
    if kind in ("", "overlay") and name in engine.debug.overlay_ids():
        return Named(engine, encoded, PathRequest(overlay_id=name, path=encoded))
    raise not_found(
        f"there is no layer or overlay {head!r}", "`layers` and `overlays` list what is mounted"
    )


def _split(word: str) -> tuple[str, str, str]:
    head, _, path = word.partition(":/")
    return head, ":", "/" + path
