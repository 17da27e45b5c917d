"""The ``fs.`` methods: bulk answers in chunks, at the pace of their reader."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from guestagent import __version__
from guestagent.api.agent import PROTOCOL_VERSIONS, AgentMore, MoreReply
from guestagent.api.inspect import wire_bytes
from guestagent.api.inspect_devices import (
    AvailableReply,
    FsAvailable,
    FsChecksumDevice,
    FsVersion,
    VersionReply,
)
from guestagent.api.request import Request, handles
from guestagent.engine.engine import Engine
from guestagent.inspect.methods import DEVICE_LOOKS, LOOKS, STREAMS, Inspection
from guestagent.inspect.sink import Sink
from guestagent.service.context import Context, Handler, handlers_of
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("InspectHandlers",)

#: A stream holds a worker thread while its reader takes its time; the others are for the rest. The
#: last one is not for a connection that has all others.
MAX_STREAMS = 4
#: With its envelope a chunk stays within one write of 32 KiB.
_CHUNK_BYTES = 32 * 1024 - 256


class _Stream(Sink):
    """The chunks of one answer. Made and used by the thread of the call; ``more`` by any.

    Without a window each chunk goes as soon as the peer, or the caller in this process, has room.
    """

    def __init__(self, call: Context, window_chunks: int) -> None:
        self._call = call
        self._window_chunks = window_chunks
        self._sent = 0
        self._taken = 0
        self._more_fd = -1
        if window_chunks:
            self._more_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._held = bytearray()
        self._entries: list[list[object]] = []
        self._entries_bytes = 0
        if call.call is not None:  # chunks are of no use without their connection
            call.call.cancel_on_disconnect = True

    def more(self, sequence: int) -> None:
        """Note that all chunks before ``sequence`` were dealt with."""
        with self._lock:
            self._taken = max(self._taken, sequence)
            if self._more_fd >= 0:
                os.eventfd_write(self._more_fd, 1)

    def close(self) -> None:
        with self._lock:
            if self._more_fd >= 0:
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
        size_bytes = wire_bytes(fields)
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
        """Tell the caller, if it keeps up."""
        place = {"msgid": self._call.msgid, "done_bytes": done_bytes, "total_bytes": total_bytes}
        self._call.notify("agent.progress", place)

    def _flush(self) -> None:
        entries, self._entries, self._entries_bytes = self._entries, [], 0
        self._send("entries", entries)

    def _send(self, kind: str, content: object) -> None:
        self._wait_for_window()
        chunk = {"msgid": self._call.msgid, "sequence": self._sent, kind: content}
        self._call.notify_wait("agent.chunk", chunk)
        self._sent += 1

    def _wait_for_window(self) -> None:
        while self._window_chunks and self._sent - self._taken >= self._window_chunks:
            self._call.deadline.wait((self._more_fd,), "wait until the peer asks for more")
            try:
                os.eventfd_read(self._more_fd)
            except BlockingIOError:
                continue


class InspectHandlers:
    """``table`` has the handler of each ``fs.`` method and of ``agent.more``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inspection = Inspection(engine.state)
        self._lock = threading.Lock()
        self._streams: dict[tuple[int, int], _Stream] = {}
        #: Method -> handler.
        self.table: dict[str, Handler] = {
            **handlers_of(self),
            **{kind.method: self._look(self._inspection.look) for kind in LOOKS},
            **{kind.method: self._look(self._inspection.device_look) for kind in DEVICE_LOOKS},
            **{kind.method: self._stream(self._inspection.stream) for kind in STREAMS},
            FsChecksumDevice.method: self._stream(self._inspection.devices.checksum),
        }

    @handles(FsAvailable)
    def available(self, request: FsAvailable, _call: Context) -> AvailableReply:
        """Tell which features are there."""
        features = frozenset(self._engine.features())
        return AvailableReply(
            available=tuple(name for name in request.features if name in features),
            missing=tuple(name for name in request.features if name not in features),
        )

    @handles(FsVersion)
    def version(self, _request: FsVersion, _call: Context) -> VersionReply:
        """Tell the versions of agent, protocol, kernel and interpreter."""
        system = os.uname()
        return VersionReply(
            agent=__version__,
            protocol=PROTOCOL_VERSIONS[0],
            kernel=system.release,
            machine=system.machine,
            python=sys.version.partition(" ")[0],
        )

    @handles(AgentMore)
    def more(self, request: AgentMore, call: Context) -> MoreReply:
        """Let a stream of the same connection send further chunks."""
        with self._lock:
            stream = self._streams.get((call.connection.id, request.msgid))
            if stream is not None:
                stream.more(request.sequence)
        return MoreReply(known=stream is not None)

    def _look(self, function: Callable[..., Record]) -> Handler:
        return lambda request, call: function(request, call.begin(self._engine))

    def _stream(self, function: Callable[..., Record]) -> Handler:
        """Give a function that takes its time a stream to answer through."""

        def run(request: Request[Record], call: Context) -> Record:
            with self._open(request, call) as stream:
                return function(request, call.begin(self._engine), stream)

        return run

    @contextmanager
    def _open(self, request: Request[Record], call: Context) -> Iterator[_Stream]:
        """Make the stream of a call; ``agent.more`` finds that of a call from a connection."""
        if call.call is None:
            yield _Stream(call, 0)
            return
        key = call.connection.id, call.msgid
        with self._lock:
            own = sum(connection == key[0] for connection, _ in self._streams)
            if len(self._streams) >= MAX_STREAMS or own >= MAX_STREAMS - 1:
                where = "" if own < MAX_STREAMS - 1 else " on this connection"
                raise CallError(
                    "busy",
                    f"{own if where else len(self._streams)} long answers are on their way{where}",
                    step=call.method,
                    hint="take them, or cancel one",
                )
            window_chunks = getattr(request, "window_chunks", 0)
            stream = self._streams[key] = _Stream(call, window_chunks)
        try:
            yield stream
        finally:
            with self._lock:
                del self._streams[key]
            stream.close()
