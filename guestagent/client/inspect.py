"""The handle's methods for looking into layers, overlays and devices."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from guestagent.api.inspect import ChecksumsRequest
from guestagent.client.streams import ProgressCallback, Streams

__all__ = ("Checksum", "InspectMethods")

#: Reading a whole layer takes as long as it takes; an hour is a hang.
STREAM_DEADLINE_MS = 3_600_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Checksum:
    """An entry of a tree. ``kind`` is a letter of ``api.inspect.ENTRY_TYPES``.

    ``digest`` (hexadecimal digits) is that of a regular file. ``target`` is that of a symlink, as
    ``os.fsdecode`` has it: ``os.fsencode`` gives the bytes. ``device`` is MAJOR:MINOR of a node.
    """

    path: bytes
    kind: str
    size_bytes: int
    digest: str | None = None
    target: str | None = None
    device: str | None = None


class InspectMethods:
    """Part of ``GuestAgent``. Paths are text or bytes, and start at the root of the layer or
    overlay; exactly one of ``layer_id`` and ``overlay_id`` says which."""

    _streams: Streams

    def fs_checksums(
        self,
        *,
        layer_id: str | None = None,
        overlay_id: str | None = None,
        path: str | bytes = "/",
        algorithm: str = "sha256",
        progress: ProgressCallback | None = None,
        deadline_ms: int = STREAM_DEADLINE_MS,
    ) -> dict[bytes, Checksum]:
        """Hash every regular file below a directory; return path (relative to it) -> entry.

        ``progress`` gets (done_bytes, 0): how much there is in all is not known before.
        """
        request = ChecksumsRequest(
            layer_id=layer_id, overlay_id=overlay_id, path=path, algorithm=algorithm
        )
        with self._streams.start(
            "fs.checksums",
            request.to_wire(),
            _checksums,
            deadline_ms=deadline_ms,
            progress=progress,
        ) as entries:
            return {entry.path: entry for entry in entries}


def _checksums(chunk: Mapping[str, object]) -> Iterator[Checksum]:
    entries = chunk["entries"]
    assert isinstance(entries, list)
    for path, kind, size_bytes, value in entries:
        yield Checksum(
            path=path,
            kind=kind,
            size_bytes=size_bytes,
            digest=value if kind == "f" else None,
            target=os.fsdecode(value) if kind == "l" else None,
            device=value if kind in "bc" else None,
        )
