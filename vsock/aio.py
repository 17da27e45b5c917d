"""A MessagePack-RPC client for asyncio: the twin of ``vsock.client.Client``. For hosts only."""

import asyncio
import concurrent.futures
import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Self

from vsock.address import Address, parse_address
from vsock.client import MARGIN_SECONDS, ClosedHandleError, NotificationCallback, given_up
from vsock.connect import connect
from vsock.errors import CallError, ConnectionClosed, LocalProtocolError
from vsock.rpc import (
    ERROR_METHOD,
    MAX_MSGID,
    Decoder,
    Limits,
    Malformed,
    Message,
    Notification,
    Request,
    Response,
    encode_notification,
    encode_request,
    encode_response,
)
from vsock.stream import MAX_WRITE_BYTES, Stream

__all__ = ("AsyncClient", "AsyncPendingCall")

log = logging.getLogger(__name__)

_READ_BYTES = 256 * 1024
#: More than this to send, and ``call`` waits before it adds to it.
_HIGH_WATER_BYTES = 1024 * 1024


class AsyncPendingCall:
    """A call whose answer is on its way."""

    def __init__(
        self, client: "AsyncClient", msgid: int, method: str, answer: "asyncio.Future[object]"
    ) -> None:
        self.msgid = msgid
        self.method = method
        self._client = client
        self._answer = answer

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
            raise CallError(
                "timeout",
                f"no answer to {self.method} within {timeout_seconds:g} s",
                step=f"wait for the answer to {self.method}",
            )
        return self._answer.result()

    def forget(self) -> None:
        """Give up on the answer: when it comes it is dropped. The peer is not told."""
        self._client._forget(self.msgid)

    async def cancel(self) -> None:
        """Ask the peer to stop; the call then ends as ``cancelled``, or as it ended meanwhile.

        Raises:
            ConnectionClosed: the peer cannot be asked any more.
        """
        if not self.done:
            await self._client._cancel(self.msgid)


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
        self._limits = limits or Limits()
        self._on_notification = on_notification
        self._on_end = on_end
        self._cancel_method = cancel_method
        self._loop = asyncio.get_running_loop()
        self._decoder = Decoder(self._limits, of_replies=True)
        self._pending: dict[int, asyncio.Future[object]] = {}
        self._msgids = itertools.count(1)
        self._unsent = bytearray()
        self._room = asyncio.Event()
        self._room.set()
        self._over: ConnectionClosed | None = None
        self._complaint: CallError | None = None
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
    ) -> Self:
        """Connect, trying again for ``connect_seconds`` while nobody is there yet.

        ``on_notification`` is called by the event loop, in the order of arrival, and ``on_end``
        once when the connection has ended.

        Raises:
            ValueError: the address is not one.
            ConnectionClosed: nobody answered in time, or access is denied.
        """
        where = parse_address(address) if isinstance(address, str) else address
        # a future of its own thread, which outlives the event loop: see the cancellation below
        thread = concurrent.futures.ThreadPoolExecutor(1, "rpc-connect")
        connecting = thread.submit(connect, where, connect_seconds)
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
        return self._over is not None

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
        if timeout_seconds is None and deadline_ms is not None:
            timeout_seconds = deadline_ms / 1000 + MARGIN_SECONDS
        pending = await self.start_call(method, params, deadline_ms=deadline_ms)
        try:
            return await pending.result(timeout_seconds)
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
        if deadline_ms is not None:
            params = {**(params or {}), "deadline_ms": deadline_ms}
        msgid = next(self._msgids) & MAX_MSGID
        while msgid in self._pending:
            msgid = next(self._msgids) & MAX_MSGID
        data = encode_request(msgid, method, params)
        answer: asyncio.Future[object] = self._loop.create_future()
        self._pending[msgid] = answer
        try:
            await self._send(data)
        except BaseException:
            self._forget(msgid)
            raise
        return AsyncPendingCall(self, msgid, method, answer)

    async def notify(self, method: str, params: Mapping[str, object] | None = None) -> None:
        """Send a notification.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the notification cannot be sent.
        """
        await self._send(encode_notification(method, params))

    async def close(self) -> None:
        """End the connection; every pending call fails. Idempotent."""
        self._end(ClosedHandleError(f"the client of {self.address} is closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _cancel(self, msgid: int) -> None:
        pending = await self.start_call(self._cancel_method, {"msgid": msgid})
        pending.forget()

    def _forget(self, msgid: int) -> None:
        answer = self._pending.pop(msgid, None)
        if answer is not None and not answer.done():
            answer.set_exception(given_up(f"msgid {msgid}"))
            answer.exception()

    def _check_open(self) -> None:
        if self._over is not None:
            raise type(self._over)(str(self._over))

    async def _send(self, data: bytes) -> None:
        if len(data) > self._limits.max_request_bytes:
            raise LocalProtocolError(
                f"a message of {len(data)} bytes is over {self._limits.max_request_bytes}"
            )
        self._check_open()
        while not self._room.is_set():
            await self._room.wait()
            self._check_open()
        self._write(data)

    def _write(self, data: bytes) -> None:
        """Send ``data`` or what of it fits; the rest follows when the peer reads."""
        if not self._unsent:
            try:
                taken = self._stream.send(data)
            except BlockingIOError:
                taken = 0
            except OSError as error:
                self._end(ConnectionClosed(f"cannot send to {self.address}: {error}"))
                self._check_open()
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
            self._end(ConnectionClosed(f"cannot send to {self.address}: {error}"))
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
            self._lost(str(error))
            return
        if not data:
            self._lost("the peer closed the connection")
            return
        self._decoder.feed(data)
        while self._over is None and (message := self._decoder.next()) is not None:
            self._take(message)

    def _lost(self, why: str) -> None:
        if self._complaint is not None:
            why = f"{why}, after {self._complaint}"
        self._end(ConnectionClosed(f"connection to {self.address} ended: {why}"))

    def _end(self, over: ConnectionClosed) -> None:
        if self._over is not None:
            return
        self._over = over
        self._loop.remove_reader(self._stream.fileno())
        self._loop.remove_writer(self._stream.fileno())
        self._stream.close()
        self._room.set()
        pending, self._pending = self._pending, {}
        for answer in pending.values():
            if not answer.done():
                answer.set_exception(type(over)(str(over)))
                answer.exception()  # a call that nobody awaits is no error of the loop
        if self._on_end is not None:
            self._on_end(over)

    def _take(self, message: Message) -> None:
        if isinstance(message, Response):
            error = None if message.error is None else CallError.from_wire(message.error)
            self._settle(message.msgid, error, message.result)
        elif isinstance(message, Notification):
            if message.method == ERROR_METHOD:
                self._complaint = CallError.from_wire(message.params)
                log.warning("%s complains: %s", self.address, self._complaint)
            if self._on_notification is not None:
                self._on_notification(message.method, message.params)
        elif isinstance(message, Request):
            refusal = CallError("unsupported", "this side answers no requests", step="take message")
            self._refuse(encode_response(message.msgid, refusal.to_wire(), None, self._limits))
        else:
            self._malformed(message)

    def _refuse(self, data: bytes) -> None:
        if not self._room.is_set():
            self._lost("the peer asks and does not read")
            return
        with contextlib.suppress(ConnectionClosed):
            self._write(data)

    def _settle(self, msgid: int, error: CallError | None, result: object) -> None:
        answer = self._pending.pop(msgid, None)
        if answer is None or answer.done():
            log.debug("answer to msgid %d, which nobody waits for", msgid)
        elif error is None:
            answer.set_result(result)
        else:
            answer.set_exception(error)
            answer.exception()

    def _malformed(self, message: Malformed) -> None:
        log.warning("%s sent what is no message: %s", self.address, message.error)
        if message.kind == "response" and message.msgid is not None:
            self._settle(message.msgid, message.error, None)
        if message.fatal:
            self._lost(str(message.error))


def _close_result(connecting: "concurrent.futures.Future[Stream]") -> None:
    """Close the stream of a connect that nobody waits for any more."""
    if not connecting.cancelled() and connecting.exception() is None:
        connecting.result().close()
