"""Messages of the vhost-user control socket, and the channel that carries them with descriptors.

Source: QEMU docs/interop/vhost-user.rst (message layout, numbers, protocol feature bits).
"""

import array
import os
import socket
import struct
from dataclasses import dataclass, field
from enum import IntEnum

from vsock.device.memory import RegionAddress
from vsock.device.virtqueue import RingAddress

__all__ = (
    "MAX_PAYLOAD_BYTES",
    "Channel",
    "ChannelError",
    "ConfigRange",
    "Message",
    "Request",
    "VringState",
)


class Request(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


_HEADER = struct.Struct("<III")
_U64 = struct.Struct("<Q")
_STATE = struct.Struct("<II")
_ADDRESS = struct.Struct("<IIQQQQ")
_REGION = struct.Struct("<QQQQ")
_CONFIG = struct.Struct("<III")

_VERSION = 1
_VERSION_MASK = 3
_FLAG_REPLY = 1 << 2
_FLAG_NEED_REPLY = 1 << 3

#: The longest message that we take: a table of 8 regions is 264 bytes, a configuration 268.
MAX_PAYLOAD_BYTES = 4096
#: The most regions, and so descriptors, of one SET_MEM_TABLE.
MAX_TABLE_REGIONS = 8
_VRING_INDEX_MASK = 0xFF
_VRING_NO_FD = 1 << 8


class ChannelError(Exception):
    """The front-end broke the framing of the control socket, or a message has a wrong shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VringState:
    """Payload of the messages that carry one number about one ring."""

    index: int
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigRange:
    """Payload of GET_CONFIG and SET_CONFIG: a range of the configuration space, and its bytes."""

    offset_bytes: int
    size_bytes: int
    flags: int
    data: bytes

    def pack(self) -> bytes:
        return _CONFIG.pack(self.offset_bytes, self.size_bytes, self.flags) + self.data


@dataclass(slots=True, kw_only=True)
class Message:
    """One request. It owns its descriptors until they are taken; ``close`` frees the rest."""

    request: int
    flags: int
    payload: bytes
    fds: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"

    @property
    def needs_reply(self) -> bool:
        return bool(self.flags & _FLAG_NEED_REPLY)

    def take_fd(self) -> int:
        """Hand over the one descriptor of this message, which the caller now owns."""
        if len(self.fds) != 1:
            raise ChannelError(f"{self.name} came with {len(self.fds)} descriptors instead of 1")
        return self.fds.pop()

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())

    def number(self) -> int:
        return self._unpack(_U64)[0]

    def vring_state(self) -> VringState:
        index, value = self._unpack(_STATE)
        return VringState(index=index, value=value)

    def vring_fd(self) -> tuple[int, bool]:
        """Return the index of the ring, and whether a descriptor comes with the message."""
        value = self.number()
        return value & _VRING_INDEX_MASK, not value & _VRING_NO_FD

    def vring_address(self) -> tuple[int, RingAddress]:
        index, _flags, descriptors, used, available, _log = self._unpack(_ADDRESS)
        return index, RingAddress(descriptors=descriptors, available=available, used=used)

    def memory_table(self) -> list[RegionAddress]:
        """Return the regions of SET_MEM_TABLE; each belongs to the descriptor of its position."""
        count = self._unpack(_STATE, exact=False)[0]
        if not 0 < count <= MAX_TABLE_REGIONS or count != len(self.fds):
            raise ChannelError(f"{count} memory regions with {len(self.fds)} descriptors")
        table = self.payload[_STATE.size :]
        if len(table) < count * _REGION.size:
            raise ChannelError(f"{count} memory regions in {len(table)} bytes")
        return [_region(table, position * _REGION.size) for position in range(count)]

    def memory_region(self) -> RegionAddress:
        """Return the region of ADD_MEM_REG or REM_MEM_REG (after 8 bytes of padding)."""
        if len(self.payload) < _U64.size + _REGION.size:
            raise ChannelError(f"{self.name} of {len(self.payload)} bytes")
        return _region(self.payload, _U64.size)

    def config_range(self) -> ConfigRange:
        offset, size, flags = self._unpack(_CONFIG, exact=False)
        data = self.payload[_CONFIG.size :]
        if size != len(data):
            raise ChannelError(f"{self.name} of {size} bytes carries {len(data)}")
        return ConfigRange(offset_bytes=offset, size_bytes=size, flags=flags, data=data)

    def _unpack(self, layout: struct.Struct, *, exact: bool = True) -> tuple[int, ...]:
        if len(self.payload) < layout.size or (exact and len(self.payload) != layout.size):
            raise ChannelError(f"{self.name} of {len(self.payload)} bytes, {layout.size} expected")
        fields: tuple[int, ...] = layout.unpack_from(self.payload)
        return fields


class Channel:
    """The control socket: whole messages in, replies out, never blocking."""

    def __init__(self, sock: socket.socket) -> None:
        """Own ``sock`` from now on."""
        sock.setblocking(False)
        self._sock = sock
        self._received = bytearray()
        self._fds: list[int] = []

    def fileno(self) -> int:
        return self._sock.fileno()

    def receive(self) -> Message | None:
        """Return the next message, or None when it has not come whole yet.

        Raises:
            ChannelError: the framing is broken.
            ConnectionError: the front-end has gone.
        """
        while True:
            wanted = self._wanted_bytes()
            if not wanted:
                return self._message()
            try:
                # No more than this message: what descriptors come along then belong to it.
                data, ancillary, flags, _ = self._sock.recvmsg(
                    wanted, socket.CMSG_SPACE(4 * MAX_TABLE_REGIONS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return None
            self._keep_fds(ancillary)
            if not data:
                raise ConnectionResetError("the front-end closed the control socket")
            if flags & socket.MSG_CTRUNC:
                raise ChannelError("a message with too many descriptors")
            self._received += data

    def reply(self, message: Message, payload: bytes) -> None:
        """Answer a request.

        Raises:
            ConnectionError: the front-end has gone, or does not read what it asked for.
        """
        raw = _HEADER.pack(message.request, _VERSION | _FLAG_REPLY, len(payload)) + payload
        try:
            sent = self._sock.send(raw, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent != len(raw):
            raise ConnectionAbortedError(f"the front-end does not read the reply to {message.name}")

    def reply_number(self, message: Message, value: int) -> None:
        self.reply(message, _U64.pack(value))

    def reply_vring_state(self, message: Message, state: VringState) -> None:
        self.reply(message, _STATE.pack(state.index, state.value))

    def close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())
        self._sock.close()

    def _wanted_bytes(self) -> int:
        if len(self._received) < _HEADER.size:
            return _HEADER.size - len(self._received)
        size: int
        _request, flags, size = _HEADER.unpack_from(self._received)
        if flags & _VERSION_MASK != _VERSION or flags & _FLAG_REPLY or size > MAX_PAYLOAD_BYTES:
            raise ChannelError(f"a message with flags {flags:#x} and {size} bytes")
        return _HEADER.size + size - len(self._received)

    def _message(self) -> Message:
        request, flags, _size = _HEADER.unpack_from(self._received)
        payload = bytes(self._received[_HEADER.size :])
        message = Message(request=request, flags=flags, payload=payload, fds=self._fds)
        self._received, self._fds = bytearray(), []
        return message

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]]) -> None:
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)


def _region(payload: bytes, offset: int) -> RegionAddress:
    guest, size, user, file_offset = _REGION.unpack_from(payload, offset)
    return RegionAddress(
        guest_address=guest, size_bytes=size, user_address=user, file_offset_bytes=file_offset
    )
