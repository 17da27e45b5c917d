"""Connected byte streams, and the listeners that they come from.

A stream knows nothing of messages; ``vsock.dial`` makes streams and listeners from addresses. Three
facts of vsock shape both:

- Writes are at most 32 KiB each. Guest kernels since 6.17 build non-linear buffers for larger ones,
  which several device back-ends truncate or corrupt.
- Half-close gets lost on the way in some back-ends, so nothing here depends on it.
- A back-end without a listener may stay silent instead of refusing: a dial that times out means
  the same as a refused dial.

The classes stand on ``_socket``, of which ``socket`` is a thin wrapper: the wrapper's enums alone
cost the guest more start-up time than this whole package.
"""

import _socket
import errno
import os
import struct
import time

from vsock.address import VMADDR_CID_ANY, VMADDR_CID_HOST, Address
from vsock.closeable import Closeable
from vsock.deadline import Deadline
from vsock.log import log

__all__ = ("AF_VSOCK", "MAX_WRITE_BYTES", "Listener", "Stream", "UnixListener")

MAX_WRITE_BYTES = 32 * 1024

AF_VSOCK = 40  # include/linux/socket.h; absent from _socket where the build lacked the header


_REFUSAL_LINE_SECONDS = 10.0


class Stream(Closeable):
    """A connected byte stream. Not locked: one reader and one writer at a time."""

    #: True where the other end is wired, not one of many that may connect.
    point_to_point = False

    def __init__(self, sock: "_socket.socket", peer: str) -> None:
        """Take over ``sock``; ``peer`` says in text who the other end is."""
        self._sock = sock
        self.peer = peer

    def fileno(self) -> int:
        """Return the descriptor, -1 after close."""
        return self._sock.fileno()

    def recv(self, max_bytes: int) -> bytes:
        """Return what has come, b"" at the end.

        Raises:
            BlockingIOError: nothing has come, and the stream is non-blocking.
            OSError: the connection broke.
        """
        return self._sock.recv(max_bytes)

    def send(self, data: "bytes | memoryview") -> int:
        """Write as much as fits without waiting, at most 32 KiB; return the bytes taken.

        Raises:
            BlockingIOError: nothing fits now, whether or not the stream is blocking.
            OSError: the connection broke.
        """
        if len(data) > MAX_WRITE_BYTES:
            data = memoryview(data)[:MAX_WRITE_BYTES]
        return self._sock.send(data, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)

    def sendall(self, data: "bytes | memoryview", deadline: Deadline) -> None:
        """Write all of ``data``.

        Raises:
            CallError: ``timeout`` or ``cancelled``; an unknown part has been written.
            OSError: the connection broke.
        """
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.send(rest) :]
            except BlockingIOError:
                deadline.wait((), f"write to {self.peer}", writable=(self.fileno(),))

    def setblocking(self, blocking: bool) -> None:
        """Choose whether ``recv`` waits."""
        self._sock.setblocking(blocking)

    def close(self) -> None:
        """Close both directions. Idempotent."""
        self._sock.close()


class Listener(Closeable):
    """Where streams come from. ``fileno`` is readable when ``accept`` would not block.

    An AF_VSOCK peer is served only if ``allowed_cids`` has its CID, or VMADDR_CID_ANY: by default
    the host alone, because any process of a guest may connect over the loopback transport. The
    kernel sets the CID of a peer, which cannot choose it.
    """

    allowed_cids: "frozenset[int]" = frozenset((VMADDR_CID_HOST,))
    #: How many peers were refused for their CID.
    refused = 0
    _refusal_told_at = float("-inf")

    def __init__(self, address: Address, sock: "_socket.socket") -> None:
        """Take over ``sock``, which listens and does not block."""
        self.address = address
        self._sock = sock

    def fileno(self) -> int:
        """Return the descriptor, -1 after close."""
        return self._sock.fileno()

    def accept(self) -> Stream:
        """Return the next stream, non-blocking.

        Raises:
            BlockingIOError: no peer is waiting, or one was that is not allowed.
            OSError: EMFILE and its kind: the one waiting stays in the backlog.
        """
        # ``_accept`` is what socket.accept() is made of; the stubs leave it out.
        fd, peer = self._sock._accept()  # type: ignore[attr-defined]
        sock = _socket.socket(fileno=fd)
        if sock.family == AF_VSOCK and not self.allowed_cids & {peer[0], VMADDR_CID_ANY}:
            sock.close()
            self._refused(peer[0])
            raise BlockingIOError(errno.EAGAIN, f"CID {peer[0]} is not allowed", str(self.address))
        sock.setblocking(False)
        return Stream(sock, _peer_text(sock, peer))

    def _refused(self, cid: int) -> None:
        self.refused += 1
        now = time.monotonic()
        if now >= self._refusal_told_at + _REFUSAL_LINE_SECONDS:
            self._refusal_told_at = now
            log.warning(
                "peer refused", listen=str(self.address), cid=cid, refused_so_far=self.refused
            )

    def close(self) -> None:
        """Stop listening. Idempotent."""
        self._sock.close()


class UnixListener(Listener):
    """A listener that removes its own socket file on close, and no other listener's."""

    def __init__(self, address: Address, sock: "_socket.socket", path: str) -> None:
        super().__init__(address, sock)
        self._path = path
        status = os.stat(path)
        self._identity = (status.st_dev, status.st_ino)

    def close(self) -> None:
        if self.fileno() < 0:
            return
        try:
            status = os.lstat(self._path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.unlink(self._path)
        except FileNotFoundError:
            pass
        finally:
            super().close()


def _peer_text(sock: "_socket.socket", peer: object) -> str:
    if sock.family == AF_VSOCK and isinstance(peer, tuple):
        return f"vsock://{peer[0]}:{peer[1]}"
    packed = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12)
    pid, uid, _ = struct.unpack("iII", packed)
    return f"unix:pid={pid},uid={uid}"
