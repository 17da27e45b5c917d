"""The host's handle on one agent for asyncio: one ``call`` for every request of the contract.

async with AsyncGuestAgent("hybrid:///run/vm.vsock:1023") as guest:
    report = await guest.call(LayerSpec(layer_id="base", device=PmemDevice(number=0), ...))
    async for name in await guest.stream(FsLs(path="/", layer_id="base")):
        ...
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, BinaryIO, Generic, Self, TypeVar

from guestagent import __version__
from guestagent.api.agent import AgentMore, EventsReply, HelloReply, SubscribeReply
from guestagent.api.inspect import StreamRequest
from guestagent.api.observe import LogReply
from guestagent.api.request import Request
from guestagent.host.client.aio_link import AsyncLink
from guestagent.host.client.events import ALL_EVENTS, EventCallback, Following, LogCallback, Steps
from guestagent.host.client.link import HELLO_MS, DisconnectCallback, LinkSettings, Traceparent
from guestagent.host.client.methods import STREAM_DEADLINE_MS
from guestagent.host.client.streams import (
    CANCEL_SECONDS,
    ByteCount,
    ByteTarget,
    Chunks,
    ProgressCallback,
    StreamTable,
    stream_params,
)
from guestagent.host.output import atomic_write
from vsock.address import Address
from vsock.aio import AsyncClient, AsyncPendingCall
from vsock.client import MARGIN_SECONDS, ClosedHandleError
from vsock.errors import CallError, ConnectionClosed, RpcError
from vsock.record import Record

__all__ = ("AsyncFsStream", "AsyncGuestAgent")

R = TypeVar("R", bound=Record)
T = TypeVar("T")


class AsyncFsStream(Generic[T]):
    """An answer piece by piece: an asynchronous iterator and context manager.

    As ``FsStream``: the agent waits while nothing is taken, and leaving the block cancels the rest.
    """

    def __init__(
        self,
        link: AsyncLink,
        table: StreamTable,
        request: StreamRequest[Record, T],
        pending: AsyncPendingCall,
        timeout_seconds: float,
    ) -> None:
        self._link = link
        self._table = table
        self._pending = pending
        self._chunks = Chunks(request)
        self._items: deque[T] = deque()
        self._changed = asyncio.Event()
        self._waiter = asyncio.create_task(self._await_answer(timeout_seconds))

    @property
    def reply(self) -> Mapping[str, object]:
        """The final reply. Only after the end of the iteration."""
        return self._chunks.reply

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
                items = await self._next_items()
                if items is None:
                    await self.aclose()
                    raise StopAsyncIteration
                self._items.extend(items)
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
            await asyncio.wait((self._waiter,), timeout=CANCEL_SECONDS)
            self._pending.forget()
        await asyncio.wait((self._waiter,))
        self._table.drop(self._pending.msgid, self)
        self._chunks.close()
        self._items.clear()

    async def drain(self) -> Mapping[str, object]:
        """Read to the end and return the final reply."""
        async for _ in self:
            pass
        return self.reply

    async def save(
        self, target: ByteTarget, *, max_bytes: int | None = None
    ) -> Mapping[str, object]:
        """Write a stream of bytes to ``target``, to its end; return the final reply.

        Raises:
            CallError: as of iterating; ``resource``, there are more than ``max_bytes``;
                ``invalid``, the path is no name of a file, or of what is no regular file.
        """
        async with self:
            if isinstance(target, (str, os.PathLike)):
                with atomic_write(target) as file:
                    await self._write_to(file, max_bytes)
                    # the long part of an atomic write, where the event loop would wait for a disk
                    await asyncio.to_thread(_flush_to_disk, file)
            else:
                await self._write_to(target, max_bytes)
            return self.reply

    async def _write_to(self, file: BinaryIO, max_bytes: int | None) -> None:
        count = ByteCount(max_bytes)
        async for piece in self:
            file.write(count.add(piece))

    def take(self, chunk: Mapping[str, object]) -> None:
        """Receive a chunk; for ``StreamTable``."""
        self._chunks.take(chunk)
        self._changed.set()

    async def _await_answer(self, timeout_seconds: float) -> None:
        reply, error = None, None
        try:
            reply = await self._pending.result(timeout_seconds)
        except (CallError, ConnectionClosed) as problem:
            error = problem
        self._chunks.answer(reply, error)
        self._changed.set()

    async def _next_items(self) -> list[T] | None:
        more = self._chunks.handled()
        if more is not None:
            request = AgentMore(msgid=self._pending.msgid, sequence=more)
            await self._link.start_call(request.method, request.to_wire())
        while not self._chunks.is_ready and not self._chunks.is_answered:
            self._changed.clear()
            await self._changed.wait()
        return self._chunks.next_items()


class AsyncGuestAgent(Following):
    """A connection to an agent, for the tasks of one event loop. Connects when it is entered.

    ``call`` sends any request; errors and reconnecting are as of ``GuestAgent``. A task that is
    cancelled while it waits cancels its request. Callbacks are plain functions, called by the event
    loop.
    """

    def __init__(
        self,
        address: str | Address,
        *,
        connect_seconds: float = 10.0,
        deadline_ms: int = 60_000,
        reconnect: bool = False,
        traceparent: Traceparent = None,
        name: str = f"guestctl/{__version__}",
        on_disconnect: DisconnectCallback | None = None,
    ) -> None:
        """As ``GuestAgent``, but for connecting.

        Raises:
            ValueError: the address is none.
        """
        super().__init__(on_disconnect)
        self._deadline_ms = deadline_ms
        settings = LinkSettings(
            address=address,
            name=name,
            connect_seconds=connect_seconds,
            reconnect=reconnect,
            traceparent=traceparent,
            on_notification=self._notified,
            on_disconnect=self._disconnected,
        )
        self._link = AsyncLink(settings, on_reconnect=self._catch_up)

    @property
    def hello(self) -> HelloReply:
        """What the agent answered to hello: version, features, limits, boot."""
        if self._link.hello is None:
            raise ClosedHandleError(f"the handle of {self._link.address} is not open")
        return self._link.hello

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> Self:
        """Connect and say hello, trying for ``connect_seconds``.

        Raises:
            ConnectionClosed: no agent answered in time.
        """
        await self._link.open()
        self._feeds.connected(self.hello.boot.get("boot_id"))
        return self

    async def close(self) -> None:
        """End the connection; calls in flight raise ``ClosedHandleError``. Idempotent."""
        await self._link.close()

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more; with ``reconnect``, while not connected."""
        return self._link.client is None or self._link.client.closed

    @property
    def reconnects(self) -> int:
        """How often a lost connection was made again."""
        return self._link.reconnects

    async def call(
        self,
        request: Request[R],
        *,
        deadline_ms: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> R:
        """Send a request and return its reply.

        ``deadline_ms`` is the handle's by default; with 0 nothing is sent, and the error is
        ``timeout``. ``progress`` gets (done_bytes, total_bytes), where 0 in all means unknown.
        """
        deadline_ms = self._deadline_ms if deadline_ms is None else deadline_ms
        pending = await self._link.start_call(
            request.method, request.to_sparse_wire(), deadline_ms=deadline_ms
        )
        with self._streams.lock:
            self._streams.add(pending.msgid, None, progress)
        try:
            value = await pending.result(deadline_ms / 1000 + MARGIN_SECONDS)
        except asyncio.CancelledError:
            with contextlib.suppress(ConnectionClosed):
                await pending.cancel()
            raise
        finally:
            pending.forget()
            self._streams.drop(pending.msgid, None)
        return request.read_reply(value)

    async def stream(
        self,
        request: StreamRequest[Record, T],
        *,
        deadline_ms: int = STREAM_DEADLINE_MS,
        progress: ProgressCallback | None = None,
    ) -> AsyncFsStream[T]:
        """Send a request whose answer comes in chunks; iterate over its items."""
        pending = await self._link.start_call(
            request.method, stream_params(request), deadline_ms=deadline_ms
        )
        seconds = deadline_ms / 1000 + MARGIN_SECONDS
        stream = AsyncFsStream(self._link, self._streams, request, pending, seconds)
        with self._streams.lock:
            self._streams.add(pending.msgid, stream, progress)
        return stream

    # --- events

    async def events(self, since: int = 0) -> EventsReply:
        """As ``GuestAgent.events``."""
        return await self._run(self._feeds.kept_events(since))

    async def subscribe(self, callback: EventCallback, mask: int = ALL_EVENTS) -> SubscribeReply:
        """As ``GuestAgent.subscribe``."""
        _, reply = await self._run(self._feeds.subscribe(callback, mask, always=True))
        assert reply is not None
        return reply

    async def set_event_callback(self, callback: EventCallback, mask: int = ALL_EVENTS) -> int:
        """As ``GuestAgent.set_event_callback``."""
        return (await self._run(self._feeds.subscribe(callback, mask, always=False)))[0]

    async def follow_log(
        self, callback: LogCallback, *, since: int | None = None, level: str = "info"
    ) -> LogReply:
        """As ``GuestAgent.follow_log``."""
        return await self._run(self._feeds.follow_log(callback, since, level))

    # --- inside

    async def _run(self, steps: Steps[T], client: AsyncClient | None = None) -> T:
        """Send the requests of some steps, on a new connection where one is given."""
        with contextlib.closing(steps):
            go_on: Callable[[Any], Request[Record]] = steps.send
            answer: object = None
            while True:
                try:
                    request = go_on(answer)
                except StopIteration as end:
                    return end.value  # type: ignore[no-any-return]
                try:
                    go_on, answer = steps.send, await self._answer(request, client)
                except RpcError as error:
                    go_on, answer = steps.throw, error

    async def _answer(self, request: Request[Record], client: AsyncClient | None) -> Record:
        if client is None:
            return await self.call(request)
        params = request.to_sparse_wire()
        return request.read_reply(await client.call(request.method, params, deadline_ms=HELLO_MS))

    async def _catch_up(self, client: AsyncClient) -> None:
        self._feeds.connected(self.hello.boot.get("boot_id"))
        await self._run(self._feeds.catch_up(), client)


def _flush_to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
