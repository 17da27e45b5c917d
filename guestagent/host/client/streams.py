"""Answers that come in chunks: their state without input or output, and the stream for threads."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, Generic, Protocol, TypeVar

from guestagent.api.agent import AgentMore
from guestagent.api.inspect import REPLY_DATA_BYTES, StreamRequest, wire_bytes
from guestagent.host.client.link import Link
from guestagent.host.output import atomic_write
from vsock.client import MARGIN_SECONDS, PendingCall
from vsock.closeable import Closeable
from vsock.errors import CallError, ConnectionClosed, RpcError
from vsock.record import Record
from vsock.threads import start_thread

__all__ = (
    "CANCEL_SECONDS",
    "WINDOW_CHUNKS",
    "ByteCount",
    "ByteTarget",
    "Chunks",
    "FsStream",
    "ProgressCallback",
    "StreamTable",
    "stream_params",
)

#: How far the agent runs ahead of the reader: 2 MiB.
WINDOW_CHUNKS = 64
#: A chunk with all that is in it, by ``wire_bytes``.
_CHUNK_BYTES = REPLY_DATA_BYTES + 256
#: Once the answer is here, the chunks before it are here too, but for a hand-over between threads.
HAND_OVER_SECONDS = 10.0
#: A request that was cancelled is answered at once, unless its disk hangs.
CANCEL_SECONDS = 5.0

ProgressCallback = Callable[[int, int], None]
#: An open file, or a path where the file appears only once it is whole.
ByteTarget = str | os.PathLike[str] | BinaryIO
T = TypeVar("T")


class Chunks(Generic[T]):
    """The chunks of one answer in the order of their numbers: no threads, no waiting.

    ``take`` and ``answer`` note what came; once ``is_ready``, ``next_items`` has the items of the
    next chunk.
    """

    def __init__(self, request: StreamRequest[Record, T]) -> None:
        self._request = request
        self._waiting: deque[Mapping[str, object]] = deque()
        self._next_sequence = 0
        self._handled = 0
        self._is_handling = False
        self._asked_at = 0
        self._is_closed = False
        self._error: Exception | None = None
        self._reply: Mapping[str, object] | None = None

    @property
    def reply(self) -> Mapping[str, object]:
        """The final reply. Only after the end of the iteration."""
        if self._reply is None:
            raise RuntimeError("the answer has not been read to its end")
        return self._reply

    @property
    def is_answered(self) -> bool:
        """True once the reply or an error is here. Chunks may still be on their way to ``take``."""
        return self._reply is not None or self._error is not None

    @property
    def is_ready(self) -> bool:
        """True when ``next_items`` has its final say."""
        return bool(self._waiting) or self._error is not None or self._is_whole()

    def _is_whole(self) -> bool:
        return self._reply is not None and self._reply.get("chunks", 0) == self._next_sequence

    def take(self, chunk: Mapping[str, object]) -> None:
        """Note a chunk. A chunk that must not come is not kept, and ends the stream."""
        if self._error is not None:
            return
        if chunk.get("sequence") != self._next_sequence:
            self._error = self._lost()
        elif self._next_sequence - self._asked_at >= WINDOW_CHUNKS:
            text = f"the agent sent more than the window of {WINDOW_CHUNKS} chunks"
            self._error = CallError("resource", text, step="take chunks")
        elif (count := wire_bytes(chunk)) > _CHUNK_BYTES:
            text = f"the agent sent a chunk of {count} bytes; {_CHUNK_BYTES} are the most"
            self._error = CallError("resource", text, step="take chunks")
        else:
            self._next_sequence += 1
            self._waiting.append(chunk)

    def _lost(self) -> CallError:
        text = f"chunk {self._next_sequence} of the answer to {self._request.method} was lost"
        return CallError("internal", text, step="take chunks")

    def answer(self, reply: object, error: Exception | None) -> None:
        """Note the final reply, or the error instead of one."""
        self._error = self._error or error
        if isinstance(reply, Mapping):
            self._reply = reply
        elif self._error is None:
            self._error = self._malformed(f"{reply!r:.80}")

    def handled(self) -> int | None:
        """Note that the items of the last chunk were handled.

        Returns the number that ``agent.more`` is to be sent with now, None for none.
        """
        if self._is_handling:
            self._is_handling = False
            self._handled += 1
            if self._handled - self._asked_at >= WINDOW_CHUNKS // 2 and not self.is_answered:
                self._asked_at = self._handled
                return self._handled
        return None

    def next_items(self) -> list[T] | None:
        """Return the items of the next chunk, None when there is none any more.

        Raises:
            CallError: the agent's, or a chunk is lost or malformed, or the stream was closed.
            ConnectionClosed: the connection ended before the answer.
        """
        if self._waiting:
            chunk = self._waiting.popleft()
            self._is_handling = True
            return self._items(chunk)
        if self._error is not None:
            raise self._error
        if self._is_whole() and self._handled == self._next_sequence:
            return None
        if self._is_closed:
            raise CallError("cancelled", "the stream was closed", step="take chunks")
        raise self._lost()

    def _items(self, chunk: Mapping[str, object]) -> list[T]:
        try:
            return list(self._request.items(chunk))
        except (KeyError, TypeError, ValueError) as problem:
            raise self._malformed(repr(problem)) from problem

    def _malformed(self, problem: str) -> CallError:
        text = f"the agent's answer to {self._request.method} is malformed: {problem}"
        return CallError("internal", text, step="take chunks")

    def close(self) -> None:
        """Drop what is here. Idempotent."""
        self._is_closed = True
        self._waiting.clear()


class FsStream(Closeable, Generic[T]):
    """An answer piece by piece: an iterator, and a context manager that cancels the rest.

    The agent waits while nothing is taken; other calls on the handle go on. ``reply`` is there once
    the iterator has ended. Leaving it half-read without ``close`` keeps the agent waiting until the
    deadline of the call.
    """

    def __init__(
        self,
        link: Link,
        table: "StreamTable",
        request: StreamRequest[Record, T],
        *,
        deadline_ms: int,
        progress: ProgressCallback | None,
    ) -> None:
        """Send the request."""
        self._link = link
        self._table = table
        self._chunks = Chunks(request)
        self._ready = threading.Condition()
        self._items: deque[T] = deque()
        self._timeout_seconds = deadline_ms / 1000 + MARGIN_SECONDS
        self._progress = progress
        with table.lock:
            self._pending: PendingCall = link.start_call(
                request.method, stream_params(request), deadline_ms=deadline_ms
            )
            table.add(self._pending.msgid, self, progress)
        self._waiter = threading.Thread(target=self._await_answer, name="fs-answer", daemon=True)
        start_thread(self._waiter)

    @property
    def reply(self) -> Mapping[str, object]:
        """The final reply. Only after the end of the iteration."""
        return self._chunks.reply

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return the next piece.

        Raises:
            CallError: what the agent answered in the end.
            ConnectionClosed: the connection ended before the answer.
        """
        # no generator: the garbage collector would end a half-read generator on any thread,
        # whatever locks that thread holds
        try:
            while not self._items:
                items = self._next_items()
                if items is None:
                    self.close()
                    raise StopIteration
                self._items.extend(items)
        except (RpcError, OSError):
            self.close()
            raise
        return self._items.popleft()

    def close(self) -> None:
        """Cancel what is still to come, and wait until the agent has let go. Idempotent."""
        if not self._pending.done:
            # where the peer cannot be asked, its answer will not come either
            with contextlib.suppress(ConnectionClosed):
                self._pending.cancel()
            self._waiter.join(CANCEL_SECONDS)
            self._pending.forget()
        self._waiter.join()
        self._table.drop(self._pending.msgid, self)
        with self._ready:
            self._chunks.close()

    def drain(self) -> Mapping[str, object]:
        """Read to the end and return the final reply."""
        for _ in self:
            pass
        return self.reply

    def save(self, target: ByteTarget, *, max_bytes: int | None = None) -> Mapping[str, object]:
        """Write a stream of bytes to ``target``, to its end; return the final reply.

        Raises:
            CallError: as of iterating; ``resource``, there are more than ``max_bytes``;
                ``invalid``, the path is no name of a file, or of what is no regular file.
        """
        pieces = map(ByteCount(max_bytes).add, self)
        with self:
            if isinstance(target, (str, os.PathLike)):
                with atomic_write(target) as file:
                    file.writelines(pieces)
            else:
                target.writelines(pieces)
            return self.reply

    def take(self, chunk: Mapping[str, object]) -> None:
        """Receive a chunk; for ``StreamTable``."""
        with self._ready:
            self._chunks.take(chunk)
            self._ready.notify()

    def _await_answer(self) -> None:
        reply, error = None, None
        try:
            reply = self._pending.result(self._timeout_seconds)
        except (CallError, ConnectionClosed) as problem:
            error = problem
        with self._ready:
            self._chunks.answer(reply, error)
            self._ready.notify()

    def _next_items(self) -> list[T] | None:
        with self._ready:
            more = self._chunks.handled()
        if more is not None:
            request = AgentMore(msgid=self._pending.msgid, sequence=more)
            self._link.start_call(request.method, request.to_wire())  # its answer is of no use
        with self._ready:
            self._ready.wait_for(lambda: self._chunks.is_ready or self._chunks.is_answered)
            self._ready.wait_for(lambda: self._chunks.is_ready, HAND_OVER_SECONDS)
            items = self._chunks.next_items()
        if items is None and self._progress is not None:
            # progress was sent before the answer, and is told before the iteration ends
            self._link.wait_for_callbacks(HAND_OVER_SECONDS)
        return items


class _Taker(Protocol):
    def take(self, chunk: Mapping[str, object]) -> None: ...


class StreamTable:
    """The streams and progress callbacks of one handle by msgid. Thread-safe."""

    def __init__(self) -> None:
        #: Held while a request is sent and added, so that what comes first finds its place.
        self.lock = threading.Lock()
        self._streams: dict[int, _Taker] = {}
        self._progress: dict[int, ProgressCallback] = {}

    def add(self, msgid: int, stream: _Taker | None, progress: ProgressCallback | None) -> None:
        """Hand on what comes for a request. The caller holds ``lock``."""
        if stream is not None:
            self._streams[msgid] = stream
        if progress is not None:
            self._progress[msgid] = progress

    def drop(self, msgid: int, stream: _Taker | None) -> None:
        """Hand on no more. On a later connection the msgid may be another stream's."""
        with self.lock:
            if self._streams.get(msgid) is stream:
                self._streams.pop(msgid, None)
                self._progress.pop(msgid, None)

    def notified(self, method: str, params: Mapping[str, object]) -> None:
        """Take a notification ``agent.chunk`` or ``agent.progress``; others are ignored."""
        msgid = params.get("msgid")
        if not isinstance(msgid, int):
            return
        if method == "agent.chunk":
            with self.lock:
                stream = self._streams.get(msgid)
            if stream is not None:
                stream.take(params)
        elif method == "agent.progress":
            with self.lock:
                callback = self._progress.get(msgid)
            done_bytes, total_bytes = params.get("done_bytes"), params.get("total_bytes")
            if callback and isinstance(done_bytes, int) and isinstance(total_bytes, int):
                callback(done_bytes, total_bytes)


def stream_params(request: StreamRequest[Record, T]) -> dict[str, object]:
    """Return the parameters of a request whose chunks are read at the reader's pace."""
    return {**request.to_sparse_wire(), "window_chunks": WINDOW_CHUNKS}


class ByteCount:
    """Bounds how many bytes a stream gives in all."""

    def __init__(self, max_bytes: int | None) -> None:
        self._max_bytes = max_bytes
        self._count = 0

    def add(self, piece: object) -> bytes:
        """Count a piece and return it.

        Raises:
            CallError: ``resource``, there are more than ``max_bytes``.
        """
        assert isinstance(piece, bytes)
        self._count += len(piece)
        if self._max_bytes is not None and self._count > self._max_bytes:
            text = f"the answer has more than max_bytes {self._max_bytes}"
            raise CallError("resource", text, step="save the answer")
        return piece
