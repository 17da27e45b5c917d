"""MessagePack-RPC without I/O: bytes in, messages out, and bytes of messages to send.

    [0, msgid, method, [params]]     request; params is one map, or the array is empty
    [1, msgid, error, result]        response; error is nil or one map
    [2, method, [params]]            notification, answered by nobody

``Decoder.feed`` is total: whatever the bytes, it returns messages and ``Malformed`` values and
raises nothing. Where anything is wrong with a message, or it is large, it finds where that ends by
walking the headers itself. So a message that is too large or too deep is skipped without more of it
being stored than a message of ordinary size, and the connection lives on. Only the byte 0xc1, which
MessagePack never uses, loses the framing.

What a ``Malformed`` request gets as its answer: an error response where the msgid could be read,
else the notification ``rpc.error`` with the error map, because MessagePack-RPC has no response
without a msgid. A run of values that are no messages is reported once.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md and
https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md
"""

from collections.abc import Mapping

import msgpack

from vsock.errors import CallError, LocalProtocolError
from vsock.record import Record, wire_fields
from vsock.scanner import Scanner
from vsock.unpacker import BadKey, Unpacker, Unusual, brief, strict_map

__all__ = (
    "ERROR_METHOD",
    "MAX_MSGID",
    "Decoder",
    "Limits",
    "Malformed",
    "Message",
    "Notification",
    "Request",
    "Response",
    "encode_notification",
    "encode_request",
    "encode_response",
)

#: The notification that carries an error which belongs to no request.
ERROR_METHOD = "rpc.error"
MAX_MSGID = (1 << 32) - 1

_REQUEST, _RESPONSE, _NOTIFICATION = 0, 1, 2
_LENGTHS = {_REQUEST: 4, _RESPONSE: 4, _NOTIFICATION: 3}
#: Enough of a message to hold its type and its msgid, however wastefully they are encoded.
_HEAD_BYTES = 32


class Limits(Record):
    """What one connection may ask of us; past them the answer is a ``resource`` error."""

    max_request_bytes: int = 1024 * 1024
    max_reply_bytes: int = 4 * 1024 * 1024
    max_depth: int = 32
    #: A byte of an empty map becomes 64 bytes of memory; so their number is bounded as well.
    max_values: int = 128 * 1024

    def check(self) -> None:
        if self.max_request_bytes < 1024 or self.max_reply_bytes < 1024:
            raise ValueError("a limit below 1024 bytes leaves no room for an error reply")
        if not 4 <= self.max_depth <= 256:
            raise ValueError(f"max_depth {self.max_depth} is outside of 4..256")


class Request:
    """A call; ``params`` is {} where the peer sent none, ``size_bytes`` what it took to say."""

    __slots__ = ("method", "msgid", "params", "size_bytes")

    def __init__(self, msgid: int, method: str, params: dict[str, object], size_bytes: int) -> None:
        self.msgid = msgid
        self.method = method
        self.params = params
        self.size_bytes = size_bytes


class Response:
    """The answer to a call: ``error`` is None on success."""

    __slots__ = ("error", "msgid", "result")

    def __init__(self, msgid: int, error: object, result: object) -> None:
        self.msgid = msgid
        self.error = error
        self.result = result


class Notification:
    """A message that nobody answers; ``size_bytes`` is what it took on the wire."""

    __slots__ = ("method", "params", "size_bytes")

    def __init__(self, method: str, params: dict[str, object], size_bytes: int) -> None:
        self.method = method
        self.params = params
        self.size_bytes = size_bytes


class Malformed:
    """What was not a message.

    ``msgid`` is that of the request (``kind`` "request") or response (``kind`` "response") that it
    was to be, None where that could not be read. After ``fatal`` the decoder is dead.
    """

    __slots__ = ("error", "fatal", "kind", "msgid")

    def __init__(
        self, error: CallError, kind: str | None, msgid: int | None, *, fatal: bool = False
    ) -> None:
        self.error = error
        self.kind = kind
        self.msgid = msgid
        self.fatal = fatal


Message = Request | Response | Notification | Malformed


class Decoder:
    """Turns a byte stream into messages, within limits. Not locked."""

    def __init__(self, limits: Limits, *, max_message_bytes: int | None = None) -> None:
        """Refuse messages over ``max_message_bytes``; by default the limit of a request."""
        self._limits = limits
        self._max_bytes = (
            limits.max_request_bytes if max_message_bytes is None else max_message_bytes
        )
        self._buffer = bytearray()
        self._dead = False
        self._in_junk = False
        #: Reads what is usual, from the first byte of a message on to the end of what has come;
        #: None once it has met something else, for the rest of that.
        self._unpacker: Unpacker | None = None
        self._start()

    def _start(self) -> None:
        """Forget the message before: the next header is the first of a new one."""
        self._scanner = Scanner(self._limits.max_depth, self._limits.max_values)
        self._dropped_bytes = 0  # of this message, already taken out of the buffer
        self._head: bytes | None = None  # its first bytes, once any have been dropped

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: "bytes | memoryview") -> list[Message]:
        """Take bytes in; return every message that they complete."""
        messages: list[Message] = []
        if self._dead:
            return messages
        if not self._buffer and not self._size_bytes():
            self._unpacker = self._new_unpacker()
        self._buffer += data
        while self._buffer and (message := self._next(data)) is not None:
            data = b""
            is_junk = isinstance(message, Malformed) and message.msgid is None
            if not (is_junk and self._in_junk):
                messages.append(message)
            self._in_junk = is_junk
        if self._scanner.lost:
            self._dead = True
            messages.append(self._fatal())
        elif self._scanner.problem or self._size_bytes() > self._max_bytes:
            self._skip()
        return messages

    def _new_unpacker(self) -> Unpacker:
        # each of its values takes a byte at least
        max_bytes = min(self._max_bytes, self._limits.max_values)
        return Unpacker(max_bytes=max_bytes, max_depth=self._limits.max_depth)

    def _next(self, data: "bytes | memoryview") -> Message | None:
        """Return the next message if it is whole; ``data`` is what has just been buffered."""
        if self._unpacker is not None:
            try:
                found = self._unpacker.next(data)
                if found is None:
                    return None
                value, size_bytes = found
                message = _message(value, size_bytes)
            except (Unusual, _WrongShape):
                self._unpacker = None  # walk it from its start, to say what is wrong
            else:
                del self._buffer[:size_bytes]
                if not self._buffer:
                    self._unpacker = None  # with the memory that it has
                return message
        return self._take() if self._scanner.walk(self._buffer) else None

    def _size_bytes(self) -> int:
        return self._dropped_bytes + self._scanner.at

    def _skip(self) -> None:
        """Throw away what has been walked of a message that is refused already."""
        if not self._dropped_bytes:
            if len(self._buffer) < _HEAD_BYTES:
                return  # this much may stay, until the head is whole
            self._head = bytes(self._buffer[:_HEAD_BYTES])
        count = min(self._scanner.at, len(self._buffer))
        del self._buffer[:count]
        self._scanner.at -= count
        self._dropped_bytes += count

    def _take(self) -> Message:
        """Cut the whole message off the buffer and decode it."""
        size_bytes, at = self._size_bytes(), self._scanner.at
        error = self._refusal(size_bytes)
        if error is None:
            with memoryview(self._buffer) as view, view[:at] as body:
                message = _decode(body, size_bytes)
        else:
            message = _malformed(error, self._first_bytes())
        del self._buffer[:at]
        self._start()
        return message

    def _refusal(self, size_bytes: int) -> CallError | None:
        if size_bytes > self._max_bytes:
            return _refused("resource", f"{size_bytes} bytes, more than {self._max_bytes}")
        if self._scanner.problem:
            return _refused(
                "resource" if self._scanner.too_much else "invalid", self._scanner.problem
            )
        return None

    def _first_bytes(self) -> bytes:
        return self._head or bytes(self._buffer[: min(self._scanner.at, _HEAD_BYTES)])

    def _fatal(self) -> Malformed:
        error = _refused("invalid", "byte 0xc1 is not MessagePack, the framing is lost")
        malformed = _malformed(error, self._first_bytes())
        malformed.fatal = True
        self._buffer.clear()
        return malformed


def _decode(body: memoryview, size_bytes: int) -> Message:
    """Decode one whole value, whose extent and depth have been checked."""
    try:
        value = msgpack.unpackb(body, raw=False, strict_map_key=False, object_pairs_hook=strict_map)
    except (ValueError, msgpack.UnpackException, BadKey) as problem:
        text = "text is not UTF-8" if isinstance(problem, UnicodeDecodeError) else str(problem)
        return _malformed(_refused("invalid", text), bytes(body[:_HEAD_BYTES]))
    try:
        return _message(value, size_bytes)
    except _WrongShape as problem:
        return _malformed(_refused("invalid", str(problem)), bytes(body[:_HEAD_BYTES]))


def _refused(code: str, problem: str) -> CallError:
    return CallError(code, f"message refused: {problem}", step="decode")


class _WrongShape(Exception):
    pass


def _message(value: object, size_bytes: int) -> Message:
    if not isinstance(value, list):
        raise _WrongShape(f"expected an array, got {brief(value)}")
    kind = value[0] if value else None
    if isinstance(kind, bool) or not isinstance(kind, int) or kind not in _LENGTHS:
        raise _WrongShape(f"message type {brief(kind)} is none of 0, 1, 2")
    if len(value) != _LENGTHS[kind]:
        raise _WrongShape(f"{len(value)} elements where type {kind} has {_LENGTHS[kind]}")
    if kind == _NOTIFICATION:
        return Notification(_method(value[1]), _params(value[2]), size_bytes)
    msgid = value[1]
    if not _is_msgid(msgid):
        raise _WrongShape(f"msgid {brief(msgid)} is not a number of 32 bits")
    if kind == _RESPONSE:
        return Response(msgid, value[2], value[3])
    return Request(msgid, _method(value[2]), _params(value[3]), size_bytes)


def _method(value: object) -> str:
    if not isinstance(value, str):
        raise _WrongShape(f"method {brief(value)} is not text")
    return value


def _params(value: object) -> dict[str, object]:
    if isinstance(value, list):
        if not value:
            return {}
        if len(value) == 1 and isinstance(value[0], dict):
            return value[0]
    raise _WrongShape("params are not an array of one map")


def _is_msgid(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MSGID


def _malformed(error: CallError, head: bytes) -> Malformed:
    """Read from the first bytes of a message whose answer it would be."""
    unpacker = msgpack.Unpacker(max_buffer_size=_HEAD_BYTES)
    unpacker.feed(head[:_HEAD_BYTES])
    kind = msgid = None
    try:
        if unpacker.read_array_header() >= 1:
            kind = unpacker.unpack()
            msgid = unpacker.unpack() if kind in (_REQUEST, _RESPONSE) else None
    except (ValueError, msgpack.UnpackException):
        pass
    if type(kind) is not int or kind not in _LENGTHS:
        return Malformed(error, None, None)
    if kind == _NOTIFICATION:
        return Malformed(error, "notification", None)
    name = "request" if kind == _REQUEST else "response"
    return Malformed(error, name, msgid if _is_msgid(msgid) else None)


def encode_request(msgid: int, method: str, params: Mapping[str, object] | None = None) -> bytes:
    """Return the bytes of a request.

    Raises:
        LocalProtocolError: a value has no place in MessagePack.
    """
    return _encode([_REQUEST, msgid, method, [params or {}]])


def encode_notification(method: str, params: Mapping[str, object] | Record | None = None) -> bytes:
    """Return the bytes of a notification; a name that is no UTF-8 is told as a response tells it.

    Raises:
        LocalProtocolError: a value has no place in MessagePack.
    """
    return _encode([_NOTIFICATION, method, [params or {}]], "backslashreplace")


def encode_response(
    msgid: int, error: Mapping[str, object] | None, result: object, limits: Limits
) -> bytes:
    """Return the bytes of a response, always: a reply that cannot go out becomes an error.

    One over ``max_reply_bytes`` is answered ``resource``, one that MessagePack cannot hold
    ``internal``.
    """
    try:
        data = _encode([_RESPONSE, msgid, error, result], "backslashreplace")
    except LocalProtocolError as problem:
        failure = CallError("internal", f"the answer cannot be sent: {problem}", step="encode")
    else:
        if len(data) <= limits.max_reply_bytes:
            return data
        failure = CallError(
            "resource",
            f"the answer takes {len(data)} bytes, more than {limits.max_reply_bytes}",
            step="encode",
        )
    return _encode([_RESPONSE, msgid, failure.to_wire(), None], "backslashreplace")


def _encode(message: list[object], unicode_errors: str = "strict") -> bytes:
    try:
        data: bytes = msgpack.packb(message, default=wire_fields, unicode_errors=unicode_errors)
    except (TypeError, ValueError, OverflowError) as problem:
        raise LocalProtocolError(f"not MessagePack: {problem}") from None
    return data
