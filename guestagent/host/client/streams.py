"""Answers that come in chunks, handed out at the pace of whoever iterates."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Generic, Self, TypeVar

from guestagent.api.inspect import MoreRequest
from guestagent.host.client.link import Link
from vsock.client import MARGIN_SECONDS, Client, PendingCall
from vsock.errors import CallError, ConnectionClosed, RpcError
from vsock.threads import start_thread

__all__ = ("WINDOW_CHUNKS", "FsStream", "ProgressCallback", "Streams")

#: How far the agent runs ahead of the reader: 2 MiB.
WINDOW_CHUNKS = 64
#: Once the answer is here, the chunks before it are here too, but for a hand-over between threads.
_HAND_OVER_SECONDS = 10.0
#: A request that was cancelled is answered at once, unless its disk hangs.
_CANCEL_SECONDS = 5.0

ProgressCallback = Callable[[int, int], None]
T = TypeVar("T")


class FsStream(Generic[T]):
    """What a call answers piece by piece: an iterator, and a context manager that cancels the rest.

    The agent waits while nothing is taken; other calls on the handle go on. ``reply`` is there once
    the iterator has ended. Leaving it half-read without ``close`` keeps the agent waiting until the
    deadline of the call.
    """

    def __init__(
        self,
        streams: "Streams",
        pending: PendingCall,
        unpack: Callable[[Mapping[str, object]], Iterator[T]],
        deadline_ms: int,
    ) -> None:
        self._timeout_seconds = deadline_ms / 1000 + MARGIN_SECONDS
        self._streams = streams
        self._pending = pending
        self._unpack = unpack
        self._ready = threading.Condition()
        self._chunks: deque[Mapping[str, object]] = deque()
        self._next_sequence = 0
        self._asked_at = 0
        self._lost = False
        self._answered = False
        self._error: Exception | None = None
        self._reply: dict[str, object] | None = None
        self._closed = False
        self._items: deque[T] = deque()
        self._is_dealing = False
        self._dealt_with = 0
        self._waiter = threading.Thread(target=self._await_answer, name="fs-answer", daemon=True)
        start_thread(self._waiter)

    @property
    def reply(self) -> dict[str, object]:
        """The final reply. Only after the end of the iteration."""
        if self._reply is None:
            raise RuntimeError("the answer has not been read to its end")
        return self._reply

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        """Return the next piece.

        Raises:
            CallError: what the agent answered in the end.
            ConnectionClosed: the connection ended before the answer.
        """
        # no generator: one that is left half-read would be ended by the garbage collector, on any
        # thread, whatever locks that thread holds
        try:
            while not self._items:
                if not self._refill():
                    self.close()
                    raise StopIteration
        except (RpcError, OSError):
            self.close()
            raise
        return self._items.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is still to come, and wait until the agent has let go. Idempotent."""
        if not self._pending.done:
            # where the peer cannot be asked, its answer will not come either
            with contextlib.suppress(ConnectionClosed):
                self._pending.cancel()
            self._waiter.join(_CANCEL_SECONDS)
            self._pending.forget()
        self._waiter.join()
        self._streams.drop(self._pending.msgid, self)
        self._closed = True
        with self._ready:
            self._chunks.clear()

    def drain(self) -> dict[str, object]:
        """Read to the end and return the final reply."""
        for _ in self:
            pass
        return self.reply

    def take(self, chunk: Mapping[str, object]) -> None:
        """Receive a chunk; for ``Streams``."""
        with self._ready:
            if chunk.get("sequence") == self._next_sequence:
                self._next_sequence += 1
                self._chunks.append(chunk)
            else:
                self._lost = True
            self._ready.notify()

    def _await_answer(self) -> None:
        try:
            reply = self._pending.result(self._timeout_seconds)
            assert isinstance(reply, dict)
            self._reply = reply
        except (CallError, ConnectionClosed) as error:
            self._error = error
        with self._ready:
            self._answered = True
            self._ready.notify()

    def _refill(self) -> bool:
        """Take the next chunk; return False when there is none any more."""
        if self._is_dealing:
            self._is_dealing = False
            self._dealt_with += 1
            if self._dealt_with - self._asked_at >= WINDOW_CHUNKS // 2 and not self._answered:
                self._asked_at = self._dealt_with
                self._streams.ask_for_more(self._pending.msgid, self._dealt_with)
        chunk = self._next_chunk(self._dealt_with)
        if chunk is None:
            # what it told of its progress came before the answer, and is told before it
            self._streams.settle_progress(self._pending.msgid)
            return False
        self._items.extend(self._unpacked(chunk))
        self._is_dealing = True
        return True

    def _unpacked(self, chunk: Mapping[str, object]) -> list[T]:
        try:
            return list(self._unpack(chunk))
        except (KeyError, TypeError, ValueError) as problem:
            text = f"the agent's answer to {self._pending.method} is malformed: {problem!r}"
            raise CallError("internal", text, step="take chunks") from problem

    def _next_chunk(self, dealt_with: int) -> Mapping[str, object] | None:
        with self._ready:
            self._ready.wait_for(lambda: self._chunks or self._answered or self._lost)
            if self._chunks:
                return self._chunks.popleft()
            if self._error is not None:
                raise self._error
            if self._answered and not self._lost:
                assert self._reply is not None
                if self._reply.get("chunks", 0) == dealt_with:
                    return None
                if self._closed:
                    raise CallError("cancelled", "the stream was closed", step="take chunks")
                self._ready.wait_for(lambda: self._chunks or self._lost, _HAND_OVER_SECONDS)
                if self._chunks:
                    return self._chunks.popleft()
        text = f"chunk {dealt_with} of the answer to {self._pending.method} was lost on this side"
        raise CallError("internal", text, step="take chunks")


class Streams:
    """The streams of one client by msgid."""

    def __init__(self, client: "Client | Link") -> None:
        self._client = client
        self._lock = threading.Lock()
        self._streams: dict[int, FsStream[object]] = {}
        self._progress: dict[int, ProgressCallback] = {}

    def start(
        self,
        method: str,
        params: Mapping[str, object],
        unpack: Callable[[Mapping[str, object]], Iterator[T]],
        *,
        deadline_ms: int,
        progress: ProgressCallback | None = None,
    ) -> FsStream[T]:
        """Send a request whose answer comes in chunks."""
        # held while it is sent, so that the first chunk finds its stream
        with self._lock:
            pending = self._client.start_call(method, _with_window(params), deadline_ms=deadline_ms)
            stream = FsStream(self, pending, unpack, deadline_ms)
            self._streams[pending.msgid] = stream  # type: ignore[assignment]
            if progress is not None:
                self._progress[pending.msgid] = progress
        return stream

    def chunk(self, params: Mapping[str, object]) -> None:
        """Hand on a notification ``agent.chunk``; one of a stream that was closed is dropped."""
        with self._lock:
            stream = self._streams.get(_msgid(params))
        if stream is not None:
            stream.take(params)

    def progress(self, params: Mapping[str, object]) -> None:
        """Hand on a notification ``agent.progress``."""
        with self._lock:
            callback = self._progress.get(_msgid(params))
        done_bytes, total_bytes = params.get("done_bytes"), params.get("total_bytes")
        if callback is not None and isinstance(done_bytes, int) and isinstance(total_bytes, int):
            callback(done_bytes, total_bytes)

    def settle_progress(self, msgid: int) -> None:
        """Wait until a callback for progress, if there is one, has heard of all there was."""
        with self._lock:
            has_callback = msgid in self._progress
        if has_callback:
            self._client.wait_for_callbacks(_HAND_OVER_SECONDS)

    def ask_for_more(self, msgid: int, sequence: int) -> None:
        """Tell the agent what was dealt with; its answer says nothing of use."""
        request = MoreRequest(msgid=msgid, sequence=sequence)
        self._client.start_call("agent.more", request.to_wire())

    def drop(self, msgid: int, stream: "FsStream[T]") -> None:
        """Hand on no more of a stream. On a later connection its msgid may be another's."""
        with self._lock:
            if self._streams.get(msgid) is stream:
                del self._streams[msgid]
                self._progress.pop(msgid, None)


def _with_window(params: Mapping[str, object]) -> dict[str, object]:
    if "window_chunks" not in params:  # its answer has no chunks
        return dict(params)
    return {**params, "window_chunks": WINDOW_CHUNKS}


def _msgid(params: Mapping[str, object]) -> int:
    msgid = params.get("msgid")
    return msgid if isinstance(msgid, int) else -1
