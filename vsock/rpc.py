"""MessagePack-RPC without I/O: bytes in, messages out, and bytes of messages to send.

    [0, msgid, method, [params]]     request; params is one map, or the array is empty
    [1, msgid, error, result]        response; error is nil or one map
    [2, method, [params]]            notification, which is not answered

A ``Decoder`` is total: whatever the bytes, it returns messages and ``Malformed`` values and raises
nothing. It walks the headers of a message as they come, and decodes the message only once it is
whole and within its limits of bytes, depth and number of values. A message past a limit ends the
decoder at the first header that says so, as the byte 0xc1 does, which MessagePack never uses. A
message that is only of the wrong shape is answered, and the next one is read.

The answer to a ``Malformed`` request is an error response where the msgid could be read, else the
notification ``rpc.error`` with the error map, because MessagePack-RPC has no response without a
msgid. A run of values that are no messages is reported once.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md and
https://github.com/msgpack-rpc/msgpack-rpc/blob/master/spec.md
"""

from collections.abc import Callable, Mapping

import msgpack

from vsock.errors import CallError, LocalProtocolError
from vsock.record import Record, wire_fields

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
_MAX_METHOD_CHARACTERS = 128
#: Enough of a message to hold its type and its msgid, however wastefully they are encoded.
_HEAD_BYTES = 32
#: A message that takes less is decoded whether or not there is room for requests.
_SMALL_BYTES = 16 * 1024
#: What a decoded value takes at most beside its own bytes: an empty map, one byte on the wire.
_VALUE_BYTES = 64


class Limits(Record):
    """What one connection may ask of us; past a limit the answer is a ``resource`` error.

    ``max_hello_bytes`` bounds a message of a peer that has yet to say hello. The ``values`` are the
    items of arrays and the keys and values of maps, at all depths of a message: an empty map takes
    a byte on the wire and 64 bytes of memory, so that their number is bounded as well.
    """

    max_request_bytes: int = 256 * 1024
    max_hello_bytes: int = 16 * 1024
    max_request_values: int = 32 * 1024
    max_reply_bytes: int = 4 * 1024 * 1024
    max_reply_values: int = 128 * 1024
    max_depth: int = 32
    max_deadline_ms: int = 600_000

    def check(self) -> None:
        if min(self.max_request_bytes, self.max_hello_bytes, self.max_reply_bytes) < 1024:
            raise ValueError("a limit below 1024 bytes leaves no room for an error reply")
        if not 4 <= self.max_depth <= 256:
            raise ValueError(f"max_depth {self.max_depth} is outside of 4..256")
        if not 1 <= self.max_deadline_ms <= 86_400_000:
            raise ValueError(f"max_deadline_ms {self.max_deadline_ms} is outside of 1..86400000")


class Request:
    """A call; ``params`` is {} where the peer sent none, ``memory_bytes`` what it takes decoded."""

    __slots__ = ("memory_bytes", "method", "msgid", "params")

    def __init__(
        self, msgid: int, method: str, params: dict[str, object], memory_bytes: int
    ) -> None:
        self.msgid = msgid
        self.method = method
        self.params = params
        self.memory_bytes = memory_bytes


class Response:
    """The answer to a call: ``error`` is None on success."""

    __slots__ = ("error", "msgid", "result")

    def __init__(self, msgid: int, error: object, result: object) -> None:
        self.msgid = msgid
        self.error = error
        self.result = result


class Notification:
    """A message that is not answered; ``memory_bytes`` is what it takes decoded."""

    __slots__ = ("memory_bytes", "method", "params")

    def __init__(self, method: str, params: dict[str, object], memory_bytes: int) -> None:
        self.method = method
        self.params = params
        self.memory_bytes = memory_bytes


class Malformed:
    """What was not a message.

    ``msgid`` is that of the request (``kind`` "request") or response (``kind`` "response") that it
    was to be, None where that could not be read. After ``fatal`` the decoder takes nothing more.
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
    """Turns a byte stream into messages, within limits. Not locked.

    Undecoded bytes are all that it holds: ``next`` decodes one message at a time, so that a caller
    without room for another message leaves it in bytes.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        of_replies: bool = False,
        has_room: "Callable[[int], bool] | None" = None,
    ) -> None:
        """Hold each message to the limits of a request, or ``of_replies`` to those of a reply.

        A large message for whose bytes in memory ``has_room`` is False is refused undecoded.
        """
        #: May be changed between messages.
        self.max_bytes = limits.max_reply_bytes if of_replies else limits.max_request_bytes
        self._max_values = limits.max_reply_values if of_replies else limits.max_request_values
        self._max_depth = limits.max_depth
        self._has_room = has_room
        self._buffer = bytearray()
        self._ended = False
        self._in_junk = False
        self._start_message()

    def _start_message(self) -> None:
        self._at = 0  # offset of the next header; once the message is whole, of its end
        self._values = 0
        self._left = 1  # values that are missing at this level
        self._levels: list[int] = []  # and at each level around it
        self._has_extension = False

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: "bytes | memoryview") -> None:
        """Take bytes in; ask ``next`` until it returns None before the next ones."""
        if not self._ended:
            self._buffer += data

    def clear(self) -> None:
        """Take no more bytes; the rest of a message will not come."""
        self._ended = True
        self._buffer.clear()

    def next(self) -> Message | None:
        """Return the next message, None when there is no whole one."""
        while self._buffer:
            try:
                if not self._walk():
                    return None
            except _Refused as refusal:
                message: Message = _malformed(refusal, self._buffer, fatal=True)
                self.clear()
            else:
                message = self._take()
            is_junk = isinstance(message, Malformed) and message.msgid is None
            if not (is_junk and self._in_junk) or self._ended:
                self._in_junk = is_junk
                return message
        return None

    def _walk(self) -> bool:
        """Walk headers as far as the bytes go; True when the message is whole.

        Raises:
            _Refused: a limit is passed, or the framing is lost.
        """
        buffer, sizes, at, left, levels = (
            self._buffer,
            _FIXED_SIZES,
            self._at,
            self._left,
            self._levels,
        )
        end = len(buffer)
        while left and at < end:
            first = buffer[at]
            count = 0
            if size := sizes[first]:  # most headers are of these
                at += size
            elif first < 0xA0:  # fixmap, fixarray
                at += 1
                count = first & 0x0F if first >= 0x90 else 2 * (first & 0x0F)
            else:
                header = self._sized_header(at)
                if header is None:
                    break
                at, count = header
            left -= 1
            if count:
                self._values += count
                if self._values > self._max_values:
                    raise _Refused("resource", f"more than {self._max_values} values")
                if len(levels) >= self._max_depth:
                    raise _Refused("resource", f"deeper than {self._max_depth} levels")
                levels.append(left)
                left = count
            while not left and levels:
                left = levels.pop()
        self._at, self._left = at, left
        if at > self.max_bytes:
            raise _Refused("resource", f"at least {at} bytes, more than {self.max_bytes}")
        return not left and at <= end

    def _sized_header(self, at: int) -> tuple[int, int] | None:
        """Return the end of a value with a length, and how many values are inside it.

        None if the header is not whole.
        """
        first = self._buffer[at]
        if first == _NEVER_USED:
            raise _Refused("invalid", "byte 0xc1 is not MessagePack, the framing is lost")
        if first in _FIXED_EXTENSIONS:
            self._has_extension = True
            return at + _FIXED_EXTENSIONS[first], 0
        width, rest = _SIZED.get(first) or _COUNTED[first]
        after = at + 1 + width
        if after > len(self._buffer):
            return None
        number = int.from_bytes(self._buffer[at + 1 : after], "big")
        if first in _COUNTED:
            return after, number * rest
        self._has_extension |= rest > 0
        return after + rest + number, 0

    def _take(self) -> Message:
        """Cut the whole message off the buffer and decode it."""
        size_bytes = self._at
        memory_bytes = size_bytes + self._values * _VALUE_BYTES
        body = bytes(memoryview(self._buffer)[:size_bytes])
        del self._buffer[:size_bytes]
        try:
            if self._has_extension:
                raise _Refused("invalid", "extension types are not part of this protocol")
            if self._has_room and memory_bytes > _SMALL_BYTES and not self._has_room(memory_bytes):
                raise _Refused("resource", f"no memory for its {memory_bytes} bytes decoded")
            return _message(_decode(body), memory_bytes)
        except _Refused as refusal:
            return _malformed(refusal, body)
        finally:
            self._start_message()


def _fixed_sizes() -> bytes:
    """Return the size of a value by its first byte, 0 where that alone does not tell."""
    sizes = bytearray(256)
    sizes[0x00:0x80] = b"\x01" * 0x80  # positive fixint
    sizes[0xE0:0x100] = b"\x01" * 0x20  # negative fixint
    for length in range(32):
        sizes[0xA0 + length] = 1 + length  # fixstr
    for first, size in {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9}.items():
        sizes[first] = size  # nil, false, true, float 32, float 64
    for first in (0xCC, 0xD0):
        sizes[first : first + 4] = b"\x02\x03\x05\x09"  # unsigned and signed integers
    return bytes(sizes)


_FIXED_SIZES = _fixed_sizes()
#: First byte -> (bytes of its length field, bytes between that and the payload).
_SIZED = {
    0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0),  # bin
    0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1),  # ext, with its type byte
    0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),  # str
}  # fmt: skip
#: First byte -> (bytes of its count field, values for each counted item).
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
#: First byte -> size of the whole value, for the extension types of fixed size.
_FIXED_EXTENSIONS = {0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}
_NEVER_USED = 0xC1
_TEXT = frozenset((str,))


class _Refused(Exception):
    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


class _BadKey(Exception):
    pass


def _decode(body: bytes) -> object:
    try:
        return msgpack.unpackb(body, strict_map_key=False, object_pairs_hook=_strict_map)
    except (ValueError, msgpack.UnpackException, _BadKey) as problem:
        text = "text is not UTF-8" if isinstance(problem, UnicodeDecodeError) else str(problem)
        raise _Refused("invalid", text) from None


def _strict_map(pairs: list[tuple[str, object]]) -> dict[str, object]:
    try:
        result = dict(pairs)
    except TypeError:
        raise _BadKey("a map key is not text") from None
    if not _TEXT.issuperset(map(type, result)):
        bad = next(key for key in result if type(key) is not str)
        raise _BadKey(f"map key {_brief(bad)} is not text")
    if len(result) != len(pairs):
        raise _BadKey("a map holds the same key twice")
    return result


def _message(value: object, memory_bytes: int) -> Message:
    if not isinstance(value, list):
        raise _Refused("invalid", f"expected an array, got {_brief(value)}")
    kind = value[0] if value else None
    if isinstance(kind, bool) or not isinstance(kind, int) or kind not in _LENGTHS:
        raise _Refused("invalid", f"message type {_brief(kind)} is none of 0, 1, 2")
    if len(value) != _LENGTHS[kind]:
        raise _Refused("invalid", f"{len(value)} elements where type {kind} has {_LENGTHS[kind]}")
    if kind == _NOTIFICATION:
        return Notification(_method(value[1]), _params(value[2]), memory_bytes)
    msgid = value[1]
    if not _is_msgid(msgid):
        raise _Refused("invalid", f"msgid {_brief(msgid)} is not a number of 32 bits")
    if kind == _RESPONSE:
        return Response(msgid, value[2], value[3])
    return Request(msgid, _method(value[2]), _params(value[3]), memory_bytes)


def _method(value: object) -> str:
    if not isinstance(value, str):
        raise _Refused("invalid", f"method {_brief(value)} is not text")
    if len(value) > _MAX_METHOD_CHARACTERS:
        raise _Refused("invalid", f"a method name of {len(value)} characters")
    return value


def _params(value: object) -> dict[str, object]:
    if isinstance(value, list):
        if not value:
            return {}
        if len(value) == 1 and isinstance(value[0], dict):
            return value[0]
    raise _Refused("invalid", "params are not an array of one map")


def _is_msgid(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_MSGID


def _brief(value: object) -> str:
    """Return what a value is, short enough for an error."""
    if isinstance(value, (list, dict, bytes)):
        return f"of type {type(value).__name__}"
    if isinstance(value, str):
        value = value[:40]
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _malformed(
    refusal: _Refused, message: "bytes | bytearray", *, fatal: bool = False
) -> Malformed:
    """Read from the first bytes of a message which request or response it was to be."""
    error = CallError(refusal.code, f"message refused: {refusal}", step="decode")
    unpacker = msgpack.Unpacker(max_buffer_size=_HEAD_BYTES)
    unpacker.feed(message[:_HEAD_BYTES])
    kind = msgid = None
    try:
        if unpacker.read_array_header() >= 1:
            kind = unpacker.unpack()
            msgid = unpacker.unpack() if kind in (_REQUEST, _RESPONSE) else None
    except (ValueError, msgpack.UnpackException):
        pass
    if type(kind) is not int or kind not in _LENGTHS:
        return Malformed(error, None, None, fatal=fatal)
    if kind == _NOTIFICATION:
        return Malformed(error, "notification", None, fatal=fatal)
    name = "request" if kind == _REQUEST else "response"
    return Malformed(error, name, msgid if _is_msgid(msgid) else None, fatal=fatal)


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

    A reply over ``max_reply_bytes`` becomes ``resource``, a reply that MessagePack cannot hold
    becomes ``internal``.
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
