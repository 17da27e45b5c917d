"""The client's side of a connection without I/O: what to send, and what received bytes mean.

``vsock.client`` drives it from threads and ``vsock.aio`` from an event loop.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

from vsock.address import Address
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

__all__ = (
    "ClientProtocol",
    "ClosedHandleError",
    "NotificationCallback",
    "Pending",
    "answer_seconds",
    "no_answer",
)

log = logging.getLogger(__name__)

#: Beyond the deadline of a call, how long its answer may be on its way.
MARGIN_SECONDS = 5.0

#: Gets the method and the params of a notification.
NotificationCallback = Callable[[str, dict[str, object]], None]


class ClosedHandleError(ConnectionClosed):
    """The client has been closed on this side; nothing was sent."""


class Pending(Protocol):
    """A call whose answer is on its way."""

    @property
    def method(self) -> str: ...

    def settle(self, error: Exception | None, result: object) -> None:
        """Take the outcome. Called once, by whichever thread has it."""


P = TypeVar("P", bound=Pending)


class ClientProtocol:
    """Calls, their answers, and the end of the connection. Usable from several threads.

    ``pending`` holds the calls by msgid. ``over`` says why the connection ended, once it has.
    """

    def __init__(self, address: Address, limits: Limits | None) -> None:
        self.address = address
        self.limits = limits or Limits()
        self.pending: dict[int, Pending] = {}
        self.msgids: Iterator[int] = itertools.count(1)
        self.over: ConnectionClosed | None = None
        self._closed = False
        self._complaint: CallError | None = None
        self._decoder = Decoder(self.limits, of_replies=True)
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """True once no call can succeed any more."""
        return self._closed or self.over is not None

    def close(self) -> None:
        """Note that this side ends the connection."""
        with self._lock:
            self._closed = True

    def check_open(self) -> None:
        """Raise ConnectionClosed if no call can succeed any more, ClosedHandleError after close."""
        if self._closed:
            raise ClosedHandleError(f"the client of {self.address} is closed")
        if self.over is not None:
            raise ConnectionClosed(str(self.over))

    def broken(self, error: Exception) -> ConnectionClosed:
        """Return what a caller is told whose message could not be sent because of ``error``."""
        if self._closed:
            return ClosedHandleError(f"the client of {self.address} is closed")
        return ConnectionClosed(f"cannot send to {self.address}: {self.over or error}")

    def start_call(
        self,
        method: str,
        params: Mapping[str, object] | None,
        deadline_ms: int | None,
        make: Callable[[int], P],
    ) -> tuple[P, bytes]:
        """Return the call that ``make`` returns for a free msgid, now pending, and its request.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the request cannot be sent.
        """
        if deadline_ms is not None:
            params = {**(params or {}), "deadline_ms": deadline_ms}
        with self._lock:
            self.check_open()
            msgid = next(self.msgids) & MAX_MSGID
            while msgid in self.pending:
                msgid = next(self.msgids) & MAX_MSGID
            call = make(msgid)
            self.pending[msgid] = call
        try:
            return call, self._sendable(encode_request(msgid, method, params))
        except LocalProtocolError:
            self.forget(msgid)
            raise

    def notification(self, method: str, params: Mapping[str, object] | None) -> bytes:
        """Return the bytes of a notification.

        Raises:
            ConnectionClosed: the connection has ended.
            LocalProtocolError: the notification cannot be sent.
        """
        self.check_open()
        return self._sendable(encode_notification(method, params))

    def forget(self, msgid: int) -> None:
        """Give up on an answer: when it comes it is dropped."""
        call = self._take_pending(msgid)
        if call is not None:
            text = f"the answer to {call.method} was given up"
            call.settle(CallError("cancelled", text, step="wait for an answer"), None)

    def receive(self, data: bytes) -> Iterator[Notification | bytes]:
        """Settle the calls that received bytes answer; yield notifications, and bytes to send.

        Raises:
            ConnectionClosed: the connection cannot go on after these bytes.
        """
        self._decoder.feed(data)
        while (message := self._decoder.next()) is not None:
            found = self._take(message)
            if found is not None:
                yield found

    def end(self, why: str) -> ConnectionClosed | None:
        """Note the end of the connection and fail the pending calls; None if it ended before."""
        kind = ClosedHandleError if self._closed else ConnectionClosed
        if self._complaint is not None:
            why = f"{why}, after {self._complaint}"
        with self._lock:
            if self.over is not None:
                return None
            over = self.over = kind(f"connection to {self.address} ended: {why}")
            pending, self.pending = list(self.pending.values()), {}
        for call in pending:
            call.settle(kind(f"{over} (before the answer to {call.method})"), None)
        return over

    def _sendable(self, data: bytes) -> bytes:
        if len(data) > self.limits.max_request_bytes:
            raise LocalProtocolError(
                f"a message of {len(data)} bytes is over {self.limits.max_request_bytes}"
            )
        return data

    def _take_pending(self, msgid: int) -> Pending | None:
        with self._lock:
            return self.pending.pop(msgid, None)

    def _answer(self, msgid: int, error: CallError | None, result: object) -> None:
        call = self._take_pending(msgid)
        if call is None:
            log.debug("answer to msgid %d, for which no call waits", msgid)
        else:
            call.settle(error, result)

    def _take(self, message: Message) -> Notification | bytes | None:
        if isinstance(message, Response):
            error = None if message.error is None else CallError.from_wire(message.error)
            self._answer(message.msgid, error, message.result)
        elif isinstance(message, Notification):
            if message.method == ERROR_METHOD:
                self._complaint = CallError.from_wire(message.params)
                log.warning("%s complains: %s", self.address, self._complaint)
            return message
        elif isinstance(message, Request):
            refusal = CallError("unsupported", "this side answers no requests", step="take message")
            return encode_response(message.msgid, refusal.to_wire(), None, self.limits)
        else:
            self._malformed(message)
        return None

    def _malformed(self, message: Malformed) -> None:
        log.warning("%s sent what is no message: %s", self.address, message.error)
        if message.kind == "response" and message.msgid is not None:
            self._answer(message.msgid, message.error, None)
        if message.fatal:
            raise ConnectionClosed(str(message.error))


def answer_seconds(deadline_ms: int | None, timeout_seconds: float | None) -> float | None:
    """Return how long to wait for an answer: a little more than the peer has, unless told."""
    if timeout_seconds is None and deadline_ms is not None:
        return deadline_ms / 1000 + MARGIN_SECONDS
    return timeout_seconds


def no_answer(method: str, seconds: float) -> CallError:
    return CallError(
        "timeout",
        f"no answer to {method} within {seconds:g} s",
        step=f"wait for the answer to {method}",
    )
