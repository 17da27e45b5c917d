"""The ``fs.`` methods: bulk answers in chunks, at the pace of who asked for them."""

import os
import sys
import threading
from collections.abc import Callable

from guestagent import __version__
from guestagent.api.agent import PROTOCOL_VERSIONS, Empty
from guestagent.api.inspect import MoreReply, MoreRequest, PlaceRequest, StreamRequest
from guestagent.api.inspect_devices import AvailableReply, AvailableRequest, VersionReply
from guestagent.engine.engine import Engine
from guestagent.engine.transaction import Operation
from guestagent.inspect.methods import LOOKS, STREAMS
from guestagent.inspect.sink import Sink
from vsock.errors import CallError
from vsock.record import Record
from vsock.server import Call

__all__ = ("InspectService",)

Function = Callable[..., Record]

#: A stream holds a worker thread while its reader takes its time; the others are for the rest.
MAX_STREAMS = 4
#: With its envelope a chunk stays within one write of 32 KiB.
_CHUNK_BYTES = 32 * 1024 - 256
#: What the fields of an entry cost on the wire beside their bytes.
_FIELD_BYTES = 9


class _Stream(Sink):
    """The chunks of one answer. Made and used by the thread of the call; ``more`` by any."""

    def __init__(self, call: Call, window_chunks: int) -> None:
        self._call = call
        self._window_chunks = window_chunks
        self._sent = 0
        self._taken = 0
        self._more_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._held = bytearray()
        self._entries: list[list[object]] = []
        self._entries_bytes = 0
        # nobody else wants what is sent here
        call.cancel_on_disconnect = True

    def more(self, sequence: int) -> None:
        """Note that all chunks before ``sequence`` were dealt with."""
        with self._lock:
            self._taken = max(self._taken, sequence)
            if self._more_fd >= 0:
                os.eventfd_write(self._more_fd, 1)

    def close(self) -> None:
        with self._lock:
            os.close(self._more_fd)
            self._more_fd = -1

    def data(self, data: "bytes | memoryview") -> None:
        """Send bytes, small pieces together."""
        self._held += data
        if len(self._held) < _CHUNK_BYTES:
            return
        with memoryview(self._held) as held:
            whole = len(held) - len(held) % _CHUNK_BYTES
            for start in range(0, whole, _CHUNK_BYTES):
                self._send("data", bytes(held[start : start + _CHUNK_BYTES]))
        del self._held[:whole]

    def entry(self, *fields: object) -> None:
        """Send an entry, with others."""
        size_bytes = _FIELD_BYTES + sum(map(_wire_bytes, fields))
        if self._entries and self._entries_bytes + size_bytes > _CHUNK_BYTES:
            self._flush()
        self._entries.append(list(fields))
        self._entries_bytes += size_bytes

    def finish(self) -> int:
        """Send what is held back; return the number of chunks."""
        if self._entries:
            self._flush()
        if self._held:
            self._send("data", bytes(self._held))
            self._held.clear()
        return self._sent

    def progress(self, done_bytes: int, total_bytes: int) -> None:
        """Tell the peer, if it keeps up."""
        place = {"msgid": self._call.msgid, "done_bytes": done_bytes, "total_bytes": total_bytes}
        self._call.connection.notify("agent.progress", place)

    def _flush(self) -> None:
        entries, self._entries, self._entries_bytes = self._entries, [], 0
        self._send("entries", entries)

    def _send(self, kind: str, content: object) -> None:
        self._wait_for_window()
        chunk = {"msgid": self._call.msgid, "sequence": self._sent, kind: content}
        self._call.connection.notify_wait("agent.chunk", chunk, self._call.deadline)
        self._sent += 1

    def _wait_for_window(self) -> None:
        while self._window_chunks and self._sent - self._taken >= self._window_chunks:
            self._call.deadline.wait((self._more_fd,), "wait until the peer asks for more")
            try:
                os.eventfd_read(self._more_fd)
            except BlockingIOError:
                continue


def _wire_bytes(value: object) -> int:
    """Return the most that a field takes on the wire."""
    if isinstance(value, bytes):
        return len(value) + _FIELD_BYTES
    if isinstance(value, str):
        return 4 * len(value) + _FIELD_BYTES
    if isinstance(value, (list, tuple)):
        return sum(map(_wire_bytes, value)) + _FIELD_BYTES
    return _FIELD_BYTES


class InspectService:
    """Offers ``functions``, one for each ``fs.`` method and for ``agent.more``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inspection = engine.inspection
        self._lock = threading.Lock()
        self._streams: dict[tuple[int, int], _Stream] = {}
        #: Method name -> function of the decoded request and the call.
        self.functions: dict[str, Function] = {
            "agent.more": self._more,
            "fs.available": self._available,
            "fs.version": self._version,
            **{f"fs.{name}": self._look(name) for name in LOOKS},
            **{f"fs.{name}": self._stream(name) for name in STREAMS},
            **self._device_functions(),
        }

    def _device_functions(self) -> dict[str, Function]:
        devices = self._inspection.devices
        return {
            "fs.list_devices": lambda request, call: devices.list_devices(),
            "fs.list_partitions": lambda request, call: devices.list_partitions(),
            "fs.list_filesystems": lambda request, call: devices.list_filesystems(
                self._operation(call)
            ),
            "fs.mountpoints": lambda request, call: devices.mountpoints(),
            "fs.vfs_type": lambda request, call: devices.vfs_type(request),
            "fs.vfs_uuid": lambda request, call: devices.vfs_uuid(request),
            "fs.vfs_label": lambda request, call: devices.vfs_label(request),
            "fs.blockdev_getsize64": lambda request, call: devices.getsize64(request),
            "fs.blockdev_getro": lambda request, call: devices.getro(request),
            "fs.checksum_device": self._long(devices.checksum),
        }

    def _operation(self, call: Call) -> Operation:
        return self._engine.operation(call.deadline, traceparent=call.traceparent)

    def _available(self, request: AvailableRequest, _call: Call) -> AvailableReply:
        features = frozenset(self._engine.features())
        return AvailableReply(
            available=tuple(name for name in request.features if name in features),
            missing=tuple(name for name in request.features if name not in features),
        )

    def _version(self, _request: Empty, _call: Call) -> VersionReply:
        system = os.uname()
        return VersionReply(
            agent=__version__,
            protocol=PROTOCOL_VERSIONS[0],
            kernel=system.release,
            machine=system.machine,
            python=sys.version.partition(" ")[0],
        )

    def _more(self, request: MoreRequest, call: Call) -> MoreReply:
        with self._lock:
            stream = self._streams.get((call.connection.id, request.msgid))
            if stream is not None:
                stream.more(request.sequence)
        return MoreReply(known=stream is not None)

    def _look(self, name: str) -> Function:
        def run(request: PlaceRequest, call: Call) -> Record:
            return self._inspection.look(name, request, self._operation(call))

        return run

    def _stream(self, name: str) -> Function:
        def run(request: PlaceRequest, op: Operation, sink: Sink) -> Record:
            return self._inspection.stream(name, request, op, sink)

        return self._long(run)

    def _long(self, function: Callable[..., Record]) -> Function:
        """Give a function that takes its time a stream to answer through."""

        def run(request: Record, call: Call) -> Record:
            stream = self._begin(request, call)
            try:
                return function(request, self._operation(call), stream)
            finally:
                with self._lock:
                    del self._streams[call.connection.id, call.msgid]
                stream.close()

        return run

    def _begin(self, request: Record, call: Call) -> _Stream:
        window_chunks = request.window_chunks if isinstance(request, StreamRequest) else 0
        with self._lock:
            if len(self._streams) >= MAX_STREAMS:
                raise CallError(
                    "busy",
                    f"{MAX_STREAMS} long answers are on their way",
                    step=call.method,
                    hint="take them, or cancel one",
                )
            stream = _Stream(call, window_chunks)
            self._streams[call.connection.id, call.msgid] = stream
        return stream
