"""The host's side: Unix sockets, and the line with which a host peer names a guest port.

A host peer connects and sends ``CONNECT <port>\\n``; when the guest accepts it reads ``OK <n>\\n``
(n is the host port that the connection was given) and from then on the stream is the guest's. When
the guest refuses, the socket just closes. Whatever follows the newline is kept for the guest.

Source: the hybrid vsock protocol as Firecracker documents it (docs/vsock.md).
"""

import errno
import os
import socket
import stat
from collections.abc import Sequence

from vsock.device.packet import drop

__all__ = ("MAX_LINE_BYTES", "HostStream", "ListenerInUse", "dial", "listen", "parse_connect")

#: "CONNECT 4294967295\\n" is 19 bytes; the rest is room for odd spacing.
MAX_LINE_BYTES = 32
#: What one sendmsg takes of the backlog.
_FLUSH_BYTES = 64 * 1024
#: What one call takes of a scattered buffer; the guest decides how much it is scattered.
_IOV_MAX = os.sysconf("SC_IOV_MAX")
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)


class ListenerInUse(Exception):
    """Some other process listens on that path."""


def parse_connect(line: bytes) -> int:
    """Return the port of ``CONNECT <port>``; the command may be in any case.

    Raises:
        ValueError: it is anything else.
    """
    words = line.split()
    if len(words) != 2 or words[0].upper() != b"CONNECT" or not words[1].isdigit():
        raise ValueError(f"expected CONNECT and a port, got {line!r}")
    port = int(words[1])
    if port >= 0xFFFFFFFF:
        raise ValueError(f"port {port} is out of range")
    return port


def listen(path: str, backlog: int = 128) -> socket.socket:
    """Listen on ``path``, in place of a socket that has no listener any more.

    Raises:
        ListenerInUse: a live listener is there.
        OSError: the path cannot be bound (a file that is no socket is never removed).
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # bind() gives the file the mode of the socket, less the umask: never open to others
        os.fchmod(sock.fileno(), 0o600)
        try:
            sock.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _remove_stale(path):
                raise
            sock.bind(path)
        sock.listen(backlog)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def dial(path: str) -> socket.socket | None:
    """Connect to a listener without waiting; None when its queue is full just now.

    Raises:
        OSError: there is no listener.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except BlockingIOError:
        sock.close()
        return None
    except OSError:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> bool:
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return True
        except BlockingIOError:
            pass  # its queue is full: it is alive
    raise ListenerInUse(f"another process listens on {path!r}")


class HostStream:
    """A host peer's socket that never blocks, with a backlog of what it has not taken yet.

    Readiness is edge-triggered: the owner sets ``readable`` on an event, a read that finds nothing
    clears it. The backlog never grows past the credit that the guest was given.
    """

    __slots__ = ("_backlog", "_finish", "_sock", "eof", "gone", "hung_up", "readable")

    def __init__(self, sock: socket.socket) -> None:
        """Own ``sock`` from now on."""
        sock.setblocking(False)
        self._sock = sock
        self._backlog = bytearray()
        self._finish = False
        self.readable = False
        #: The peer will send nothing more, and all it sent is read.
        self.eof = False
        #: The peer ended both directions (its data may still wait to be read).
        self.hung_up = False
        #: The peer takes nothing more; what is sent is dropped.
        self.gone = False

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def backlog_bytes(self) -> int:
        return len(self._backlog)

    def read_connect_line(self) -> int | None:
        """Return the port that the peer asks for, or None while the line is not whole.

        Nothing past the newline is read.

        Raises:
            ValueError: it is no such line.
            ConnectionError: the peer has gone.
        """
        try:
            data = self._sock.recv(MAX_LINE_BYTES, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError("the peer closed before it named a port")
        end = data.find(b"\n")
        if end < 0:
            if len(data) >= MAX_LINE_BYTES:
                raise ValueError(f"no line end in {data!r}")
            return None
        return parse_connect(self._sock.recv(end + 1))

    def receive_into(self, views: Sequence[memoryview]) -> int | None:
        """Read what is there; 0 is the end of the stream, None means nothing now."""
        try:
            count = self._sock.recvmsg_into(views[:_IOV_MAX])[0]
        except BlockingIOError:
            self.readable = False
            return None
        except OSError:
            # A peer that closed with data unread, most often; it will not read more either.
            self.hung_up = self.gone = True
            count = 0
        if not count:
            self.eof, self.readable = True, False
        return count

    def send(self, views: Sequence[memoryview], length: int) -> int:
        """Send ``length`` bytes or keep them; return how many left, which includes those dropped
        because the peer takes nothing more."""
        if self._backlog:
            sent = 0
        else:
            sent = self._write(views)
            if sent == length:
                return length
        if self.gone:
            return self._discard() + length
        for view in drop(views, sent):
            self._backlog += view
        return sent

    def flush(self) -> int:
        """Send from the backlog; return how many bytes left it."""
        total = 0
        while self._backlog:
            with memoryview(self._backlog)[:_FLUSH_BYTES] as view:
                sent = self._write((view,))
            if self.gone:
                return total + self._discard()
            if not sent:
                break
            del self._backlog[:sent]
            total += sent
        if self._finish and not self._backlog:
            self._shutdown(socket.SHUT_WR)
        return total

    def finish_writing(self) -> None:
        """End our direction once the backlog is sent."""
        self._finish = True
        self.flush()

    def stop_reading(self) -> None:
        """Refuse more from the peer: its writes fail from now on."""
        self._shutdown(socket.SHUT_RD)
        self.eof, self.readable = True, False

    def close(self) -> None:
        self._sock.close()

    def _write(self, views: Sequence[memoryview]) -> int:
        if len(views) > _IOV_MAX:
            # In one piece, since what a part leaves over must mean that the socket is full.
            views = (memoryview(b"".join(views)),)
        try:
            return self._sock.sendmsg(views, (), socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.gone = True
            return 0

    def _discard(self) -> int:
        count = len(self._backlog)
        self._backlog.clear()
        return count

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError as exc:
            if exc.errno not in _GONE:
                raise
            self.gone = True
