"""What the agent is doing and has done, kept in a tmpfs for the agent that is started after it.

A request first writes down, in one ``begun`` file, the traces of all that it may leave. For each
layer and overlay that it has mounted it writes an entry, which names that file. Dropping the file
is the one moment that decides: before, recovery undoes all that is in it, whatever entries there
are; after, each entry stands by itself. So a batch is whole, or was never there, by one unlink.

The entries of layers that were made together are one file under a name for each: a link costs a
tenth of a file, and is removed like one. What a file says of a layer counts under its name alone;
where it cannot be read, none of its names counts.
"""

import contextlib
import errno
import os
import threading

import msgpack

from guestagent.engine.inventory import LayerTraces, LiveLayer, LiveOverlay
from guestagent.engine.statedirectory import Counter, refuse_foreign
from vsock.errors import CallError
from vsock.record import Record, wire_fields

__all__ = (
    "Begun",
    "Journal",
    "LayerEntries",
    "OverlayEntry",
    "Written",
)

_LAYER, _OVERLAY = "layer-", "overlay-"
_ENTRY, _BEGUN, _DAMAGED, _DRAFT = ".entry", ".begun", ".damaged", ".new"
#: Many times what the largest batch takes.
_MAX_FILE_BYTES = 64 * 1024 * 1024

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TypeVar

    Kind = TypeVar("Kind", bound=Record)


class LayerEntries(Record):
    """Layers that are mounted; ``begun`` names the file that they were begun in."""

    begun: str
    layers: tuple[LiveLayer, ...]


class OverlayEntry(Record):
    """As ``LayerEntries``, of an overlay."""

    begun: str
    live: LiveOverlay


class Begun(Record):
    """What a request is about to make, as far as its undoing needs to know."""

    layers: tuple[LayerTraces, ...] = ()
    overlay: LiveOverlay | None = None


class Written(Record):
    """All that a journal says: what is whole, and what was begun and never decided.

    What is whole is not in ``begun``, even where an undoing that failed has left a note of it.
    """

    layers: tuple[LiveLayer, ...]
    overlays: tuple[LiveOverlay, ...]
    begun_layers: tuple[LayerTraces, ...]
    begun_overlays: tuple[LiveOverlay, ...]


class Journal:
    """The files of one directory. One writer for each id at a time."""

    def __init__(self, directory: str) -> None:
        """Make the directory if it is not there.

        Raises:
            OSError: EPERM, another user owns it or may write to it; or as mkdir(2).
        """
        self._directory = directory
        self._striking = threading.Lock()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        refuse_foreign(directory)
        for file in (files := os.listdir(directory)):
            if file.endswith(_DRAFT):  # of a writer that was killed
                os.unlink(f"{directory}/{file}")
        #: What an earlier agent has left entries of: "layer", "overlay" or the name of a part.
        self.left = frozenset(file.partition("-")[0] for file in files if file.endswith(_ENTRY))

    # --- what a request writes

    def begin(self, name: str, begun: Begun) -> None:
        """Note what a request may leave, before it makes anything. ``name`` is the request's own
        for as long as it is at work; what is noted under it already is replaced."""
        self._replace((name + _BEGUN,), begun)

    def decide(self, name: str) -> None:
        """Let the entries that were begun under ``name`` stand from now on, or, when all of it is
        undone, forget that it was begun. Idempotent."""
        self._unlink(name + _BEGUN)

    def write_layers(self, lives: "Sequence[LiveLayer]", begun: str) -> None:
        """Write the entries of layers, each of which counts once ``begun`` is decided.

        An existing entry is replaced atomically if a single layer is written.
        """
        files = [_layer_file(live.spec.layer_id) for live in lives]
        self._replace(files, LayerEntries(begun=begun, layers=tuple(lives)))

    def write_overlay(self, live: LiveOverlay, begun: str) -> None:
        """Write an overlay's entry; it counts once ``begun`` is decided."""
        self._replace((_overlay_file(live.spec.overlay_id),), OverlayEntry(begun=begun, live=live))

    def remove_layer(self, layer_id: str) -> None:
        """Forget a layer's entry. Idempotent."""
        self._unlink(_layer_file(layer_id))

    def remove_overlay(self, overlay_id: str) -> None:
        """Forget an overlay's entry. Idempotent."""
        self._unlink(_overlay_file(overlay_id))

    # --- what parts of the agent keep that are loaded when they are needed

    def write_part(self, part: str, name: str, record: Record) -> None:
        """Write a record of a part, in the place of an earlier one under the same name."""
        self._replace((f"{part}-{name}{_ENTRY}",), record)

    def remove_part(self, part: str, name: str) -> None:
        """Forget a record of a part. Idempotent."""
        self._unlink(f"{part}-{name}{_ENTRY}")

    def read_part(self, part: str, kind: "type[Kind]") -> "tuple[Kind, ...]":
        """Return the records of a part; a file that cannot be read is put aside."""
        return tuple(record for _, record in self._read(f"{part}-", _ENTRY, kind))

    # --- what the next agent reads

    def read(self) -> Written:
        """Return what can be read; a file that cannot is put aside."""
        begun = dict(self._read("", _BEGUN, Begun))
        layers = [live for name, live in self._read_layers() if name not in begun]
        overlays = [
            entry.live
            for _, entry in self._read(_OVERLAY, _ENTRY, OverlayEntry)
            if entry.begun not in begun
        ]
        layer_ids = {live.spec.layer_id for live in layers}
        overlay_ids = {live.spec.overlay_id for live in overlays}
        half = {traces.layer_id: traces for each in begun.values() for traces in each.layers}
        return Written(
            layers=tuple(layers),
            overlays=tuple(overlays),
            begun_layers=tuple(half[name] for name in half if name not in layer_ids),
            begun_overlays=tuple(
                each.overlay
                for each in begun.values()
                if each.overlay is not None and each.overlay.spec.overlay_id not in overlay_ids
            ),
        )

    def strike_layer(self, layer_id: str) -> None:
        """Forget all that is written of a layer: it is undone."""
        self._strike(_layer_file(layer_id), layer_id, None)

    def strike_overlay(self, overlay_id: str) -> None:
        """Forget all that is written of an overlay: it is undone."""
        self._strike(_overlay_file(overlay_id), None, overlay_id)

    def _strike(self, entry: str, layer_id: str | None, overlay_id: str | None) -> None:
        """The entry goes first: without what it was begun in it would count again."""
        self._unlink(entry)
        with self._striking:
            for name, begun in list(self._read("", _BEGUN, Begun)):
                overlay = begun.overlay
                left = Begun(
                    layers=tuple(each for each in begun.layers if each.layer_id != layer_id),
                    overlay=None if overlay and overlay.spec.overlay_id == overlay_id else overlay,
                )
                if left == begun:
                    continue
                if left == Begun():
                    self.decide(name)
                else:
                    self.begin(name, left)

    def damaged(self) -> tuple[str, ...]:
        """Return the paths of the files that were put aside."""
        files = sorted(os.listdir(self._directory))
        return tuple(f"{self._directory}/{file}" for file in files if file.endswith(_DAMAGED))

    def _read_layers(self) -> "Iterator[tuple[str, LiveLayer]]":
        """Yield (name of what it was begun in, layer) of each layer's entry that is listed now."""
        read: dict[int, dict[str, tuple[str, LiveLayer]]] = {}
        for file, inode in _files(self._directory, _LAYER, _ENTRY):
            path, layer_id = f"{self._directory}/{file}", file[len(_LAYER) : -len(_ENTRY)]
            if layer_id not in read.get(inode, ()):
                # its own file is read before it is judged: it may be another than was listed
                record = self._load(path, LayerEntries)
                if record is None:
                    continue
                read[inode] = {live.spec.layer_id: (record.begun, live) for live in record.layers}
            entry = read[inode].get(layer_id)
            if entry is None:
                _put_aside(path)
            else:
                yield entry

    def _read(self, prefix: str, suffix: str, kind: "type[Kind]") -> "Iterator[tuple[str, Kind]]":
        """Yield (name, record) of each file of a kind; one may go between its listing and its
        reading, and is left out."""
        for file, _ in _files(self._directory, prefix, suffix):
            record = self._load(f"{self._directory}/{file}", kind)
            if record is not None:
                yield file.removesuffix(suffix), record

    def _load(self, path: str, kind: "type[Kind]") -> "Kind | None":
        """Read a record; put a damaged one aside, so that the agent can start and undo the rest."""
        try:
            with open(path, "rb") as stream:
                if os.fstat(stream.fileno()).st_size > _MAX_FILE_BYTES:
                    raise ValueError(f"{path} is no record of this agent")
                return kind.from_wire(msgpack.unpackb(stream.read()), path)
        except FileNotFoundError:
            return None
        except (ValueError, IsADirectoryError, CallError, msgpack.UnpackException):
            _put_aside(path)
            return None

    def counter(self, name: str) -> "Counter":
        """Open a number that outlives the agent; the caller closes it."""
        return Counter(f"{self._directory}/{name}.counter")

    def _replace(self, files: "Sequence[str]", record: Record) -> None:
        """Write a file that is whole whenever we are killed; an old one of the first name stays
        until it is.

        The further names are links: what else was there under one of them goes first.
        """
        content = msgpack.packb(record, default=wire_fields)
        path, *others = (f"{self._directory}/{file}" for file in files)
        draft = path + _DRAFT
        fd = _create(draft)
        try:
            try:
                if os.write(fd, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), draft)
            finally:
                os.close(fd)
            for other in others:
                _link(draft, other)
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


def _layer_file(layer_id: str) -> str:
    return f"{_LAYER}{layer_id}{_ENTRY}"


def _overlay_file(overlay_id: str) -> str:
    return f"{_OVERLAY}{overlay_id}{_ENTRY}"


def _files(directory: str, prefix: str, suffix: str) -> list[tuple[str, int]]:
    """Return (name, inode) of the files of a kind, sorted."""
    with os.scandir(directory) as found:
        return sorted(
            (file.name, file.inode())
            for file in found
            if file.name.startswith(prefix) and file.name.endswith(suffix)
        )


def _put_aside(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # it was removed since
        os.rename(path, path + _DAMAGED)


def _create(path: str) -> int:
    """Create a file. Never write into an existing file, which may have other names."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(path, flags, 0o600)
    except FileExistsError:  # of a process that was killed
        os.unlink(path)
        return os.open(path, flags, 0o600)


def _link(path: str, name: str) -> None:
    try:
        os.link(path, name)
    except FileExistsError:  # what an undoing that failed has left
        os.unlink(name)
        os.link(path, name)
