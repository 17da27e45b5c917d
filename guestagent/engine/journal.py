"""What the agent is doing and has done, kept in a tmpfs so that its next life can go on.

One small file for each layer and overlay, replaced by rename. An entry is ``begun`` before the
first change to the kernel and ``whole`` after the last; recovery undoes what is begun and adopts
what is whole. Entries of one batch become whole together: a commit file with the batch's name, and
all that it made, is the one moment that decides.
"""

import errno
import os

import msgpack

from guestagent.engine.inventory import LiveLayer, LiveOverlay
from vsock.errors import CallError
from vsock.record import Record, wire_fields

__all__ = ("BEGUN", "WHOLE", "Counter", "Decision", "Journal", "LayerEntry", "OverlayEntry")

BEGUN, WHOLE = "begun", "whole"
_SUFFIX, _COMMIT, _DAMAGED, _DRAFT = ".entry", ".commit", ".damaged", ".new"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import TypeVar

    Entry = TypeVar("Entry", bound=Record)


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


class Decision(Record):
    """What a batch has made, complete: an entry ``begun`` cannot know how its mount came out."""

    layers: tuple[LiveLayer, ...]
    overlay: LiveOverlay | None


class Journal:
    """Entries are plain maps; ``kind`` is layer or overlay. One writer for each id at a time."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for file in os.listdir(directory):
            if file.endswith(_DRAFT):  # of a writer that was killed
                os.unlink(f"{directory}/{file}")

    def write_layer(self, live: LiveLayer, state: str, *, batch: str | None = None) -> None:
        """Replace a layer's entry; the old one stays whole until the new one is."""
        entry = LayerEntry(state=state, batch=batch, live=live)
        self._replace(f"layer-{live.spec.layer_id}{_SUFFIX}", entry)

    def write_overlay(self, live: LiveOverlay, state: str, *, batch: str | None = None) -> None:
        """Replace an overlay's entry."""
        entry = OverlayEntry(state=state, batch=batch, live=live)
        self._replace(f"overlay-{live.spec.overlay_id}{_SUFFIX}", entry)

    def remove(self, kind: str, name: str) -> None:
        """Forget the entry. Idempotent."""
        self._unlink(f"{kind}-{name}{_SUFFIX}")

    def read_layers(self) -> tuple[LayerEntry, ...]:
        """Return every layer's entry that can be read; one that cannot is put aside."""
        return tuple(self._read("layer-", LayerEntry))

    def read_overlays(self) -> tuple[OverlayEntry, ...]:
        """Return every overlay's entry that can be read; one that cannot is put aside."""
        return tuple(self._read("overlay-", OverlayEntry))

    def damaged(self) -> tuple[str, ...]:
        """Return the paths of the entries that were put aside."""
        files = sorted(os.listdir(self._directory))
        return tuple(f"{self._directory}/{file}" for file in files if file.endswith(_DAMAGED))

    def _read(self, prefix: str, kind: "type[Entry]") -> "Iterator[Entry]":
        for file in sorted(os.listdir(self._directory)):
            if not (file.startswith(prefix) and file.endswith(_SUFFIX)):
                continue
            entry = self._load(f"{self._directory}/{file}", kind)
            if entry is not None:
                yield entry

    def _load(self, path: str, kind: "type[Entry]") -> "Entry | None":
        """Read a record; put it aside if that fails: who will not start cannot clean up either."""
        try:
            with open(path, "rb") as stream:
                return kind.from_wire(msgpack.unpackb(stream.read()), path)
        except (ValueError, CallError, msgpack.UnpackException):
            os.rename(path, path + _DAMAGED)
            return None

    def commit_batch(self, batch: str, decision: Decision) -> None:
        """Decide that everything the batch made is whole from now on, whatever its entries say."""
        self._replace(f"{batch}{_COMMIT}", decision)

    def settle_batch(self, batch: str, decision: Decision) -> None:
        """Let each entry of a decided batch say so by itself, then drop the decision.

        For the request that decided, and still keeps others from what it made.
        """
        for layer in decision.layers:
            self.write_layer(layer, WHOLE)
        if decision.overlay is not None:
            self.write_overlay(decision.overlay, WHOLE)
        self._unlink(f"{batch}{_COMMIT}")

    def settle_all(self) -> None:
        """Settle what an earlier life decided and did not come to settle."""
        for file in sorted(os.listdir(self._directory)):
            if not file.endswith(_COMMIT):
                continue
            decision = self._load(f"{self._directory}/{file}", Decision)
            if decision is not None:
                batch = file[: -len(_COMMIT)]
                self.settle_batch(batch, self._still_of(batch, decision))

    def _still_of(self, batch: str, decision: Decision) -> Decision:
        """Leave out of a decision what has changed hands since."""
        layers = (
            layer
            for layer in decision.layers
            if self._is_begun_by(batch, "layer", layer.spec.layer_id)
        )
        overlay = decision.overlay
        if overlay and not self._is_begun_by(batch, "overlay", overlay.spec.overlay_id):
            overlay = None
        return Decision(layers=tuple(layers), overlay=overlay)

    def _is_begun_by(self, batch: str, kind: str, name: str) -> bool:
        """Say whether the entry is this batch's still: it may be gone, or another request's."""
        try:
            with open(f"{self._directory}/{kind}-{name}{_SUFFIX}", "rb") as stream:
                entry = msgpack.unpackb(stream.read())
        except FileNotFoundError:
            return False
        return (entry["state"], entry["batch"]) == (BEGUN, batch)

    def counter(self, name: str) -> "Counter":
        """Open a number that outlives the agent; the caller closes it."""
        return Counter(f"{self._directory}/{name}.counter")

    def _replace(self, file: str, record: Record) -> None:
        content = msgpack.packb(record, default=wire_fields)
        path = f"{self._directory}/{file}"
        draft = path + _DRAFT
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            try:
                if os.write(fd, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), draft)
            finally:
                os.close(fd)
            os.rename(draft, path)
        except OSError as error:
            error.filename = error.filename or draft
            os.unlink(draft)
            raise

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
