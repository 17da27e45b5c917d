"""Answers that come in chunks, for asyncio: the twin of ``guestagent.host.client.streams``."""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Generic, Self, TypeVar

from guestagent.api.inspect import MoreRequest
from guestagent.host.client.landing import landing
from guestagent.host.client.streams import WINDOW_CHUNKS, ProgressCallback
from vsock.aio import AsyncPendingCall
from vsock.client import MARGIN_SECONDS
from vsock.errors import CallError, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from guestagent.host.client.aio_link import AsyncLink

__all__ = ("AsyncFsStream", "AsyncStreams", "save")

#: A request that was cancelled is answered at once, unless its disk hangs.
_CANCEL_SECONDS = 5.0

T = TypeVar("T")
Unpack = Callable[[Mapping[str, object]], Iterator[T]]


class AsyncFsStream(Generic[T]):
    """What a call answers piece by piece: an asynchronous iterator and context manager.

    As ``FsStream``: the agent waits while nothing is taken, and leaving the block cancels the rest.
    """

    def __init__(
        self, streams: "AsyncStreams", pending: AsyncPendingCall, unpack: Unpack[T], seconds: float
    ) -> None:
        self._streams = streams
        self._pending = pending
        self._unpack = unpack
        self._changed = asyncio.Event()
        self._chunks: deque[Mapping[str, object]] = deque()
        self._items: deque[T] = deque()
        self._next_sequence = 0
        self._dealt_with = 0
        self._asked_at = 0
        self._is_lost = False
        self._error: Exception | None = None
        self._reply: dict[str, object] | None = None
        self._waiter = asyncio.create_task(self._await_answer(seconds))

    @property
    def reply(self) -> dict[str, object]:
        """The final reply. Only after the end of the iteration."""
        if self._reply is None:
            raise RuntimeError("the answer has not been read to its end")
        return self._reply

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        """Return the next piece.

        Raises:
            CallError: what the agent answered in the end.
            ConnectionClosed: the connection ended before the answer.
        """
        try:
            while not self._items:
                if not await self._refill():
                    await self.aclose()
                    raise StopAsyncIteration
        except (RpcError, OSError):
            await self.aclose()
            raise
        return self._items.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Cancel what is still to come, and wait until the agent has let go. Idempotent."""
        if not self._pending.done:
            # where the peer cannot be asked, its answer will not come either
            with contextlib.suppress(ConnectionClosed):
                await self._pending.cancel()
            await asyncio.wait((self._waiter,), timeout=_CANCEL_SECONDS)
            self._pending.forget()
        await asyncio.wait((self._waiter,))
        self._streams.drop(self._pending.msgid, self)
        self._chunks.clear()
        self._items.clear()
        if self._reply is None and self._error is None:
            self._error = CallError("cancelled", "the stream was closed", step="take chunks")

    async def drain(self) -> dict[str, object]:
        """Read to the end and return the final reply."""
        async for _ in self:
            pass
        return self.reply

    def take(self, chunk: Mapping[str, object]) -> None:
        """Receive a chunk; for ``AsyncStreams``."""
        if chunk.get("sequence") == self._next_sequence:
            self._next_sequence += 1
            self._chunks.append(chunk)
        else:
            self._is_lost = True
        self._changed.set()

    async def _await_answer(self, seconds: float) -> None:
        try:
            reply = await self._pending.result(seconds)
            assert isinstance(reply, dict)
            self._reply = reply
        except (CallError, ConnectionClosed) as error:
            self._error = error
        self._changed.set()

    async def _refill(self) -> bool:
        """Take the next chunk; return False when there is none any more."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._is_lost or self._reply is not None:
                break
            self._changed.clear()
            await self._changed.wait()
        if not self._chunks:
            if self._reply is not None and self._reply.get("chunks", 0) == self._dealt_with:
                return False
            text = f"chunk {self._dealt_with} of the answer to {self._pending.method} was lost"
            raise CallError("internal", text, step="take chunks")
        self._items.extend(self._unpacked(self._chunks.popleft()))
        self._dealt_with += 1
        if self._dealt_with - self._asked_at >= WINDOW_CHUNKS // 2 and not self._pending.done:
            self._asked_at = self._dealt_with
            await self._streams.ask_for_more(self._pending.msgid, self._dealt_with)
        return True

    def _unpacked(self, chunk: Mapping[str, object]) -> list[T]:
        try:
            return list(self._unpack(chunk))
        except (KeyError, TypeError, ValueError) as problem:
            text = f"the agent's answer to {self._pending.method} is malformed: {problem!r}"
            raise CallError("internal", text, step="take chunks") from problem


class AsyncStreams:
    """The streams of one handle by msgid."""

    def __init__(self, link: "AsyncLink") -> None:
        self._link = link
        self._streams: dict[int, AsyncFsStream[object]] = {}
        self._progress: dict[int, ProgressCallback] = {}

    async def start(
        self,
        method: str,
        params: Mapping[str, object],
        unpack: Unpack[T],
        *,
        deadline_ms: int,
        progress: ProgressCallback | None = None,
    ) -> AsyncFsStream[T]:
        """Send a request whose answer comes in chunks."""
        sent = dict(params)
        if "window_chunks" in sent:
            sent["window_chunks"] = WINDOW_CHUNKS
        pending = await self._link.start_call(method, sent, deadline_ms=deadline_ms)
        stream = AsyncFsStream(self, pending, unpack, deadline_ms / 1000 + MARGIN_SECONDS)
        self._streams[pending.msgid] = stream  # type: ignore[assignment]
        if progress is not None:
            self._progress[pending.msgid] = progress
        return stream

    def chunk(self, params: Mapping[str, object]) -> None:
        """Hand on a notification ``agent.chunk``; one of a stream that was closed is dropped."""
        stream = self._streams.get(_msgid(params))
        if stream is not None:
            stream.take(params)

    def progress(self, params: Mapping[str, object]) -> None:
        """Hand on a notification ``agent.progress``."""
        callback = self._progress.get(_msgid(params))
        done_bytes, total_bytes = params.get("done_bytes"), params.get("total_bytes")
        if callback is not None and isinstance(done_bytes, int) and isinstance(total_bytes, int):
            callback(done_bytes, total_bytes)

    async def ask_for_more(self, msgid: int, sequence: int) -> None:
        """Tell the agent what was dealt with; its answer says nothing of use."""
        request = MoreRequest(msgid=msgid, sequence=sequence)
        await self._link.start_call("agent.more", request.to_wire())

    def drop(self, msgid: int, stream: AsyncFsStream[T]) -> None:
        """Hand on no more of a stream. On a later connection its msgid may be another's."""
        if self._streams.get(msgid) is stream:
            del self._streams[msgid]
            self._progress.pop(msgid, None)


async def save(
    stream: AsyncFsStream[bytes], target: "str | os.PathLike[str] | BinaryIO"
) -> dict[str, object]:
    """Write a stream to an open file, or to a path, where it appears only once it is whole."""
    async with stream:
        if isinstance(target, (str, os.PathLike)):
            with landing(Path(target)) as file:
                async for piece in stream:
                    file.write(piece)
                # the long part of landing, where the event loop would wait for a disk
                await asyncio.to_thread(_write_out, file)
        else:
            async for piece in stream:
                target.write(piece)
        return stream.reply


def _write_out(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _msgid(params: Mapping[str, object]) -> int:
    msgid = params.get("msgid")
    return msgid if isinstance(msgid, int) else -1
