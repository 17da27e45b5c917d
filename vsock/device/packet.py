"""The header of a virtio-vsock packet: 44 bytes, little-endian.

Source: struct virtio_vsock_hdr, include/uapi/linux/virtio_vsock.h; VIRTIO 1.2, section 5.10.6.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple, Self

__all__ = (
    "CID_HOST",
    "HEADER_BYTES",
    "MAX_PAYLOAD_BYTES",
    "OP_CREDIT_REQUEST",
    "OP_CREDIT_UPDATE",
    "OP_REQUEST",
    "OP_RESPONSE",
    "OP_RST",
    "OP_RW",
    "OP_SHUTDOWN",
    "SHUTDOWN_BOTH",
    "SHUTDOWN_RECEIVE",
    "SHUTDOWN_SEND",
    "TYPE_STREAM",
    "Header",
    "drop",
    "take",
)

CID_HOST = 2
TYPE_STREAM = 1

OP_REQUEST = 1
OP_RESPONSE = 2
OP_RST = 3
OP_SHUTDOWN = 4
OP_RW = 5
OP_CREDIT_UPDATE = 6
OP_CREDIT_REQUEST = 7

#: Flags of OP_SHUTDOWN: what the sender of the packet will not do any more.
SHUTDOWN_RECEIVE = 1
SHUTDOWN_SEND = 2
SHUTDOWN_BOTH = SHUTDOWN_RECEIVE | SHUTDOWN_SEND

_LAYOUT = struct.Struct("<QQIIIHHIII")
HEADER_BYTES = _LAYOUT.size
#: VIRTIO_VSOCK_MAX_PKT_BUF_SIZE: no peer need take a bigger payload in one packet.
MAX_PAYLOAD_BYTES = 64 * 1024


class Header(NamedTuple):
    """One header, as it travels; any 44 bytes are a header, its meaning is checked by the user."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int = 0
    type: int = TYPE_STREAM
    op: int = 0
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0

    @classmethod
    def parse(cls, views: Sequence[memoryview]) -> Self | None:
        """Read the first 44 bytes of a scattered packet; None when there are fewer."""
        if views and len(views[0]) >= HEADER_BYTES:
            return cls._make(_LAYOUT.unpack_from(views[0]))
        raw = b"".join(take(views, HEADER_BYTES))
        return cls._make(_LAYOUT.unpack(raw)) if len(raw) == HEADER_BYTES else None

    def pack(self) -> bytes:
        return _LAYOUT.pack(*self)

    def pack_into(self, views: Sequence[memoryview]) -> None:
        """Write the header to the start of a scattered buffer of at least 44 bytes."""
        if len(views[0]) >= HEADER_BYTES:
            _LAYOUT.pack_into(views[0], 0, *self)
            return
        raw = self.pack()
        for view in take(views, HEADER_BYTES):
            view[:] = raw[: len(view)]
            raw = raw[len(view) :]

    def reset(self) -> "Header":
        """Return the RST that answers this packet, whatever its addresses and type."""
        return Header(
            src_cid=self.dst_cid,
            dst_cid=self.src_cid,
            src_port=self.dst_port,
            dst_port=self.src_port,
            type=self.type,
            op=OP_RST,
        )


def take(views: Sequence[memoryview], length: int) -> list[memoryview]:
    """Return the first ``length`` bytes of a scattered buffer (fewer, if it is shorter)."""
    taken = []
    for view in views:
        if length <= 0:
            break
        taken.append(view[:length] if len(view) > length else view)
        length -= len(view)
    return taken


def drop(views: Sequence[memoryview], length: int) -> list[memoryview]:
    """Return a scattered buffer without its first ``length`` bytes."""
    rest = []
    for view in views:
        if length >= len(view):
            length -= len(view)
        else:
            rest.append(view[length:] if length else view)
            length = 0
    return rest
