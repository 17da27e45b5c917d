"""A MessagePack-RPC client for asyncio. For hosts only."""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Callable, Mapping
from typing import Self

from vsock.address import Address, parse_address
from vsock.deadline import Deadline
from vsock.dial import connect
from vsock.errors import ConnectionClosed
from vsock.protocol import ClientProtocol, NotificationCallback, answer_seconds, no_answer
from vsock.rpc import Limits
from vsock.stream import MAX_WRITE_BYTES, Stream

__all__ = ("AsyncClient", "AsyncPendingCall")

_READ_BYTES = 256 * 1024
#: With more than this to send, ``call`` waits before it adds to it.
_HIGH_WATER_BYTES = 1024 * 1024


class AsyncPendingCall:
    """A call whose answer is on its way."""

    def __init__(self, client: "AsyncClient", msgid: int, method: str) -> None:
        self.msgid = msgid
        self.method = method
        self._client = client
        self._answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    @property
    def done(self) -> bool:
        return self._answer.done()

    async def result(self, timeout_seconds: float | None = None) -> object:
        """Wait for the answer and return its result. May be awaited again.

        Raises:
            CallError: what the peer answered; or ``timeout`` if ``timeout_seconds`` passed first,
                after which the answer may still come.
            ConnectionClosed: no answer will come.
        """
        done, _ = await asyncio.wait((self._answer,), timeout=timeout_seconds)
        if not done:
            assert timeout_seconds is not None
            raise no_answer(self.method, timeout_seconds)
        return self._answer.result()

    def forget(self) -> None:
        """Give up on the answer: when it comes it is dropped. The peer is not told."""
        self._client._protocol.forget(self.msgid)

    async def cancel(self) -> None:
        """Ask the peer to stop; the call then ends as ``cancelled``, or as it ended meanwhile.

        Raises:
            ConnectionClosed: the peer cannot be asked any more.
        """
        if not self.done:
            await self._client._cancel(self.msgid)

    def settle(self, error: Exception | None, result: object) -> None:
        """Take the outcome. For the client."""
        if self._answer.done():
            return
        if error is None:
            self._answer.set_result(result)
        else:
            self._answer.set_exception(error)
            self._answer.exception()  # a call that no task awaits is no error of the loop


class AsyncClient:
    """A connection to a server, for the tasks of one event loop. Made by ``connect``."""

    def __init__(
        self,
        stream: Stream,
        address: Address,
        *,
        limits: Limits | None = None,
        on_notification: NotificationCallback | None = None,
        on_end: Callable[[ConnectionClosed], None] | None = None,
        cancel_method: str = "agent.cancel",
    ) -> None:
        """Take over ``stream``, which is connected and non-blocking. Needs a running loop."""
        self.address = address
        self._stream = stream
        self._protocol = ClientProtocol(address, limits)
        self._on_notification = on_notification
        self._on_end = on_end
        self._cancel_method = cancel_method
        self._loop = asyncio.get_running_loop()
        self._unsent = bytearray()
        self._room = asyncio.Event()
        self._room.set()
        self._loop.add_reader(stream.fileno(), self._readable)

    @classmethod
    async def connect(
        cls,
        address: "str | Address",
        *,
        connect_seconds: float = 10.0,
        limits: Limits | None = None,
        on_notification: NotificationCallback | None = None,
        on_end: Callable[[ConnectionClosed], None] | None = None,
        cancel_method: str = "agent.cancel",
        until: Deadline | None = None,
    ) -> Self:
        """Connect, trying again for ``connect_seconds`` while no server is there yet.

        Connecting ends when ``until`` passes or is cancelled. ``on_notification`` is called by the
        event loop, in the order of arrival, and ``on_end`` once when the connection has ended.

        Raises:
            ValueError: the address is not one.
            ConnectionClosed: no server was there in time, or access is denied.
        """
        where = parse_address(address) if isinstance(address, str) else address
        # a future of its own thread, which outlives the event loop: see the cancellation below
        thread = concurrent.futures.ThreadPoolExecutor(1, "rpc-connect")
        connecting = thread.submit(connect, where, connect_seconds, until)
        thread.shutdown(wait=False)
        try:
            stream = await asyncio.wrap_future(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(_close_result)
            raise
        return cls(
            stream,
            where,
            limits=limits,
            on_notification=on_notification,
            on_end=on_end,
            cancel_method=cancel_method,
        )

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more."""
        return self._protocol.closed

    async def call(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        *,
        deadline_ms: int | None = None,
        timeout_seconds: float | None = None,
    ) -> object:
        """Call ``method`` and return its result; as ``Client.call``.

        Raises:
            CallError: the peer's answer; or ``timeout`` when ours passed.
            ConnectionClosed: the connection ended before the answer.
            LocalProtocolError: the request cannot be sent.
        """
        pending = await self.start_call(method, params, deadline_ms=deadline_ms)
        try:
            return await pending.result(answer_seconds(deadline_ms, timeout_seconds))
        finally:
            pending.forget()

    async def start_call(
        self,
        method: str,
        params: Mapping[str, object] | None = None,
        *,
        deadline_ms: int | None = None,
    ) -> AsyncPendingCall:
        """Send a request; its answer is awaited by ``result`` of what is returned.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the request cannot be sent.
        """
        pending, data = self._protocol.start_call(
            method, params, deadline_ms, lambda msgid: AsyncPendingCall(self, msgid, method)
        )
        try:
            await self._send(data)
        except BaseException:
            pending.forget()
            raise
        return pending

    async def notify(self, method: str, params: Mapping[str, object] | None = None) -> None:
        """Send a notification.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the notification cannot be sent.
        """
        await self._send(self._protocol.notification(method, params))

    async def close(self) -> None:
        """End the connection; every pending call fails. Idempotent."""
        self._protocol.close()
        self._end("the client was closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _cancel(self, msgid: int) -> None:
        pending = await self.start_call(self._cancel_method, {"msgid": msgid})
        pending.forget()

    async def _send(self, data: bytes) -> None:
        while not self._room.is_set():
            await self._room.wait()
            self._protocol.check_open()
        self._write(data)

    def _write(self, data: bytes) -> None:
        """Send ``data`` or what of it fits; the rest follows when the peer reads."""
        if not self._unsent:
            try:
                taken = self._stream.send(data)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self._end(f"cannot send: {error}")
                raise self._protocol.broken(error) from error
            if taken == len(data):
                return
            data = data[taken:]
            self._loop.add_writer(self._stream.fileno(), self._writable)
        self._unsent += data
        if len(self._unsent) > _HIGH_WATER_BYTES:
            self._room.clear()

    def _writable(self) -> None:
        try:
            del self._unsent[: self._stream.send(bytes(self._unsent[:MAX_WRITE_BYTES]))]
        except BlockingIOError:
            return
        except OSError as error:
            self._end(f"cannot send: {error}")
            return
        if not self._unsent:
            self._loop.remove_writer(self._stream.fileno())
        if len(self._unsent) <= _HIGH_WATER_BYTES:
            self._room.set()

    def _readable(self) -> None:
        try:
            data = self._stream.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(str(error))
            return
        if not data:
            self._end("the peer closed the connection")
            return
        try:
            for found in self._protocol.receive(data):
                if isinstance(found, bytes):
                    self._refuse(found)
                elif self._on_notification is not None:
                    self._on_notification(found.method, found.params)
                if self._protocol.closed:
                    return
        except ConnectionClosed as error:
            self._end(str(error))

    def _end(self, why: str) -> None:
        over = self._protocol.end(why)
        if over is None:
            return
        self._loop.remove_reader(self._stream.fileno())
        self._loop.remove_writer(self._stream.fileno())
        self._stream.close()
        self._room.set()
        if self._on_end is not None:
            self._on_end(over)

    def _refuse(self, data: bytes) -> None:
        if not self._room.is_set():
            self._end("the peer asks and does not read")
            return
        with contextlib.suppress(ConnectionClosed):
            self._write(data)


def _close_result(connecting: "concurrent.futures.Future[Stream]") -> None:
    """Close the stream of a connect that no task waits for any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
