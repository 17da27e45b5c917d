"""What the agent is doing and has done, kept in a tmpfs so that its next life can go on.

One small file for each layer and overlay, replaced by rename. An entry is ``begun`` before the
first change to the kernel and ``whole`` after the last; recovery undoes what is begun and adopts
what is whole. Entries of one batch become whole together: a commit file with the batch's name is
the one moment that decides.
"""

import os

import msgpack

from guestagent.engine.inventory import LiveLayer, LiveOverlay
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("Counter", "Journal", "LayerEntry", "OverlayEntry")

BEGUN, WHOLE = "begun", "whole"
_SUFFIX = ".entry"


class LayerEntry(Record):
    """``state`` is begun or whole; ``batch`` is that of the request, if it was one."""

    state: str
    batch: str | None
    live: LiveLayer


class OverlayEntry(Record):
    """As ``LayerEntry``, of an overlay."""

    state: str
    batch: str | None
    live: LiveOverlay


class Journal:
    """Entries are plain maps; ``kind`` is layer or overlay. One writer for each id at a time."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)

    def write_layer(self, live: LiveLayer, state: str, *, batch: str | None = None) -> None:
        """Replace a layer's entry; the old one stays whole until the new one is."""
        entry = LayerEntry(state=state, batch=batch, live=live)
        self._replace(f"layer-{live.spec.layer_id}{_SUFFIX}", msgpack.packb(entry.to_wire()))

    def write_overlay(self, live: LiveOverlay, state: str, *, batch: str | None = None) -> None:
        """Replace an overlay's entry."""
        entry = OverlayEntry(state=state, batch=batch, live=live)
        self._replace(f"overlay-{live.spec.overlay_id}{_SUFFIX}", msgpack.packb(entry.to_wire()))

    def remove(self, kind: str, name: str) -> None:
        """Forget the entry. Idempotent."""
        self._unlink(f"{kind}-{name}{_SUFFIX}")

    def read_layers(self) -> tuple[LayerEntry, ...]:
        """Return every layer's entry.

        Raises:
            CallError: ``internal`` or ``invalid``, naming the file that is damaged.
        """
        return tuple(
            LayerEntry.from_wire(value, where) for where, value in self._read("layer-").items()
        )

    def read_overlays(self) -> tuple[OverlayEntry, ...]:
        """Return every overlay's entry; errors as ``read_layers``."""
        return tuple(
            OverlayEntry.from_wire(value, where) for where, value in self._read("overlay-").items()
        )

    def _read(self, prefix: str) -> dict[str, object]:
        entries: dict[str, object] = {}
        for file in sorted(os.listdir(self._directory)):
            if not (file.startswith(prefix) and file.endswith(_SUFFIX)):
                continue
            path = f"{self._directory}/{file}"
            with open(path, "rb") as stream:
                try:
                    entry = msgpack.unpackb(stream.read())
                except ValueError as error:
                    raise CallError(
                        "internal", f"journal entry {path!r} is damaged: {error}", object=path
                    ) from None
            entries[path] = entry
        return entries

    def commit_batch(self, batch: str) -> None:
        """Decide that every ``begun`` entry of the batch counts as whole from now on."""
        self._replace(f"{batch}.commit", b"")

    def forget_batch(self, batch: str) -> None:
        """Drop the decision, once every entry of the batch says whole by itself."""
        self._unlink(f"{batch}.commit")

    def committed_batches(self) -> frozenset[str]:
        files = os.listdir(self._directory)
        return frozenset(file[: -len(".commit")] for file in files if file.endswith(".commit"))

    def counter(self, name: str) -> "Counter":
        """Open a number that outlives the agent; the caller closes it."""
        return Counter(f"{self._directory}/{name}.counter")

    def _replace(self, file: str, content: bytes) -> None:
        path = f"{self._directory}/{file}"
        draft = f"{path}.new"
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, content)
        finally:
            os.close(fd)
        os.rename(draft, path)

    def _unlink(self, file: str) -> None:
        try:
            os.unlink(f"{self._directory}/{file}")
        except FileNotFoundError:
            return


class Counter:
    """One number in a file, written in place: a single 8-byte write, whole whenever we are killed.

    Not thread-safe.
    """

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.value = int.from_bytes(os.pread(self._fd, 8, 0), "little")

    def store(self, value: int) -> None:
        self.value = value
        os.pwrite(self._fd, value.to_bytes(8, "little"), 0)

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
