"""A layer or an overlay as a place to look into, and whose fault it is when that fails."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from guestagent.api.inspect import PlaceRequest
from guestagent.engine.inventory import LiveLayer, LiveOverlay
from guestagent.engine.readback import verity_status
from guestagent.engine.state import EngineState
from guestagent.storage.mountinfo import whereabouts
from guestagent.storage.openat import Root
from vsock.errors import CallError, errno_name

__all__ = ("Place", "open_place", "show_path")

#: What a file system says about bytes that are not what they must be.
_CORRUPT = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
_CODES = {
    errno.ENOENT: "not_found",
    errno.ESTALE: "not_found",
    errno.ENOTDIR: "invalid",
    errno.EISDIR: "invalid",
    errno.EINVAL: "invalid",
    errno.ELOOP: "invalid",
    errno.ENAMETOOLONG: "invalid",
    errno.EACCES: "denied",
    errno.EPERM: "denied",
    errno.EXDEV: "denied",
    errno.EMFILE: "resource",
    errno.ENFILE: "resource",
    errno.ENOMEM: "resource",
    errno.EOPNOTSUPP: "unsupported",
}
_HINTS = {
    errno.ELOOP: "symlinks in a circle, or one of the kernel's own that leads elsewhere",
    errno.EMFILE: "the agent has too many files open; try again when others are done",
}


class Place:
    """One layer or overlay, opened. A context manager. ``name`` says which, for people."""

    def __init__(
        self,
        state: EngineState,
        name: str,
        mount_point: str,
        layers: tuple[str, ...],
        mount: tuple[str, int] | None = None,
    ) -> None:
        """``mount`` is the device number (MAJOR:MINOR) and the mount id that must be there."""
        self.name = name
        self.mount_point = mount_point
        self._state = state
        self._layers = layers
        self.root = Root(mount_point, mount)

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.root.close()

    @contextmanager
    def errors(self, path: bytes) -> Iterator[None]:
        """Turn an OSError into the CallError that says where and whose fault.

        It is about ``path`` unless its own ``filename`` is bytes and says otherwise.
        """
        try:
            yield
        except OSError as error:
            inner = error.filename if isinstance(error.filename, bytes) else path
            raise self.error_of(error, inner or path) from error

    def error_of(self, error: OSError, path: bytes, offset_bytes: int | None = None) -> CallError:
        """Return what to tell about a failure at ``path``, at a byte of a file if that is known."""
        where = show_path(path)
        if offset_bytes is not None:
            where += f" at byte {offset_bytes}"
        reason = f"{_text_of(error)} ({errno_name(error.errno) or 'no errno'})"
        if error.errno in _CORRUPT:
            return self._corrupt(error, where, reason)
        return CallError(
            _CODES.get(error.errno or 0, "device"),
            f"cannot look at {where} of {self.name}: {reason}",
            errno=error.errno,
            object=show_path(path),
            hint=_HINTS.get(error.errno or 0),
        )

    def _corrupt(self, error: OSError, where: str, reason: str) -> CallError:
        bad = self._corrupt_layers()
        blamed = ", ".join(repr(layer_id) for layer_id in bad)
        text = f"cannot read {where} of {self.name}: {reason}"
        return CallError(
            "integrity" if bad else "device",
            f"{text}; corrupt: layer {blamed}" if bad else text,
            errno=error.errno,
            object=bad[0] if len(bad) == 1 else self.name,
            hint="layer.verify lists the corrupt blocks" if bad else "see the kernel's log",
        )

    def _corrupt_layers(self) -> tuple[str, ...]:
        """Return the layers of this place that dm-verity has found corrupt."""
        bad = []
        for layer_id in self._layers:
            live = self._state.inventory.layer(layer_id)
            if live is None or live.plan.verity is None:
                continue
            try:
                if verity_status(self._state.control, live.plan.verity.name) == "C":
                    bad.append(layer_id)
            except OSError:
                continue  # unmounted meanwhile: it cannot be asked any more
        return tuple(bad)


def open_place(state: EngineState, request: PlaceRequest) -> Place:
    """Open the layer or overlay that a request names.

    Raises:
        CallError: ``not_found``, it is not mounted.
    """
    if request.layer_id is not None:
        layer = state.inventory.layer(request.layer_id)
        name = f"layer {request.layer_id!r}"
        if layer is not None:
            return _open(state, name, layer, (request.layer_id,))
    else:
        assert request.overlay_id is not None
        overlay = state.inventory.overlay(request.overlay_id)
        name = f"overlay {request.overlay_id!r}"
        if overlay is not None:
            return _open(state, name, overlay, overlay.spec.layers)
    raise CallError(
        "not_found",
        f"{name} is not mounted",
        object=request.layer_id or request.overlay_id,
        hint="layer.list and overlay.list say what is",
    )


def _open(
    state: EngineState, name: str, live: LiveLayer | LiveOverlay, layers: tuple[str, ...]
) -> Place:
    mount_point = live.spec.mount_point
    try:
        return Place(state, name, mount_point, layers, (live.dev, live.mount_id))
    except OSError as error:
        if error.errno == errno.ESTALE:
            what = whereabouts(mount_point, live.dev, live.mount_id)
            raise CallError("not_found", f"{name} is {what}", object=mount_point) from error
        raise CallError(
            "not_found" if error.errno == errno.ENOENT else "mount",
            f"cannot open {mount_point!r}, where {name} is mounted: {error.strerror}",
            errno=error.errno,
            object=mount_point,
        ) from error


def _text_of(error: OSError) -> str:
    # some name the system call before the text, which is of no use here
    return (error.strerror or str(error)).rpartition(": ")[2]


def show_path(path: bytes) -> str:
    """Return a path for people: what is no printable text is escaped, and a long one is cut."""
    text = path.decode("utf-8", "backslashreplace")
    if len(text) > 512:
        text = f"{text[:250]}...{text[-250:]}"
    return "'" + "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text) + "'"
