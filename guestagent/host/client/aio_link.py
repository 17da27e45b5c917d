"""The connection under an asyncio handle, as ``guestagent.host.client.link`` is for threads."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from guestagent.api.agent import HelloReply
from guestagent.host.client.link import (
    FIRST_PAUSE_SECONDS,
    MOST_PAUSE_SECONDS,
    LinkCore,
    LinkSettings,
    is_lost,
)
from vsock.aio import AsyncClient, AsyncPendingCall
from vsock.client import ClosedHandleError
from vsock.deadline import Deadline
from vsock.errors import ConnectionClosed, RpcError
from vsock.retry import retry_async

__all__ = ("AsyncLink",)


class AsyncLink(LinkCore):
    """For the tasks of one event loop. With ``reconnect`` a task makes a lost connection again."""

    def __init__(
        self, settings: LinkSettings, *, on_reconnect: Callable[[AsyncClient], Awaitable[None]]
    ) -> None:
        super().__init__(settings)
        self._on_reconnect = on_reconnect
        #: Cancelled by ``close``. No thread or task waits on it, so that it has no descriptor.
        self._ending = Deadline()
        self._changed = asyncio.Condition()
        self._lost = asyncio.Event()
        self._reviver: asyncio.Task[None] | None = None
        self.client: AsyncClient | None = None
        self.hello: HelloReply | None = None

    async def open(self) -> HelloReply:
        """Connect and say hello, once."""
        if self._closed or self.client is not None:
            raise ClosedHandleError(f"the handle of {self.address} was opened before")
        self.client, self.hello = await self._connect()
        if self._settings.reconnect:
            self._reviver = asyncio.create_task(self._revive())
        return self.hello

    async def start_call(
        self, method: str, params: Mapping[str, object], *, deadline_ms: int | None = None
    ) -> AsyncPendingCall:
        """Send a request; see ``AsyncClient.start_call``."""
        params = self._params(method, params, deadline_ms)
        client = await self._usable()
        return await client.start_call(method, params, deadline_ms=deadline_ms)

    async def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._ending.cancel()
        if self._reviver is not None and self._reviver is not asyncio.current_task():
            self._reviver.cancel()
            await asyncio.wait((self._reviver,))
        if self.client is not None:
            await self.client.close()
        async with self._changed:
            self._changed.notify_all()

    async def _connect(self) -> tuple[AsyncClient, HelloReply]:
        """Connect and say hello; again where the connection is lost before hello is answered."""
        with self._ending.part(self._settings.connect_seconds) as whole:
            return await retry_async(
                partial(self._connect_once, whole),
                whole,
                when=is_lost,
                first_seconds=FIRST_PAUSE_SECONDS,
                most_seconds=MOST_PAUSE_SECONDS,
            )

    async def _connect_once(self, whole: Deadline) -> tuple[AsyncClient, HelloReply]:
        self._lost.clear()
        client = await AsyncClient.connect(
            self.address,
            connect_seconds=self._settings.connect_seconds,
            on_notification=self._settings.on_notification,
            on_end=self._ended,
            until=whole,
        )
        try:
            request = self._hello
            reply = await client.call(
                request.method, request.to_wire(), timeout_seconds=self._hello_seconds
            )
            hello = request.read_reply(reply)
            self._is_up = True
            return client, hello
        except BaseException:
            await client.close()
            raise

    async def _usable(self) -> AsyncClient:
        """Return the connection; wait for it, for as long as connecting may take.

        Raises:
            ClosedHandleError: the handle was closed, or never opened.
            ConnectionClosed: there is none, and will be none soon.
        """
        if self._closed or self.client is None:
            raise self._closed_error()
        if not self._settings.reconnect or not self.client.closed:
            return self.client
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.connect_seconds), self._changed:
                await self._changed.wait_for(lambda: self._closed or not self._is_down())
        if self._closed:
            raise self._closed_error()
        if self._is_down():
            raise self._down_error()
        return self.client

    def _is_down(self) -> bool:
        return self.client is None or self.client.closed

    def _ended(self, why: ConnectionClosed) -> None:
        self._why = why
        self._lost.set()
        if self._is_up:
            self._settings.on_disconnect(why)
        self._is_up = False

    async def _revive(self) -> None:
        while True:
            await self._lost.wait()
            client = await retry_async(
                self._make_again,
                self._ending,
                when=lambda error: isinstance(error, (RpcError, OSError)),
                first_seconds=FIRST_PAUSE_SECONDS,
                most_seconds=MOST_PAUSE_SECONDS,
            )
            # a loss meanwhile is noticed as any other
            with contextlib.suppress(RpcError, OSError):
                await self._on_reconnect(client)

    async def _make_again(self) -> AsyncClient:
        try:
            client, hello = await self._connect()
        except (RpcError, OSError) as error:
            self._why = error
            raise
        async with self._changed:
            self.client, self.hello = client, hello
            self.reconnects += 1
            self._changed.notify_all()
        return client
