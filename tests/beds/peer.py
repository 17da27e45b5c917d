"""A peer of the wire that speaks raw bytes; it knows nothing of the code under test."""

import socket

import msgpack

__all__ = ("WAIT_SECONDS", "Peer")

WAIT_SECONDS = 60.0


class Peer:
    """A socket and the messages on it; knows nothing of the code under test."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._unpacker = msgpack.Unpacker(raw=False, max_buffer_size=64 * 1024 * 1024)
        sock.settimeout(WAIT_SECONDS)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def request(self, msgid: int, method: str, /, **params: object) -> None:
        self.send(msgpack.packb([0, msgid, method, [params]]))

    def next(self) -> object:
        """Return the next message; EOFError at the end."""
        while True:
            try:
                return self._unpacker.unpack()
            except msgpack.OutOfData:
                data = self.sock.recv(65536)
                if not data:
                    raise EOFError from None
                self._unpacker.feed(data)

    def ask(self, msgid: int, method: str, /, **params: object) -> object:
        """Send a request; return the result of the next message, which must be its answer."""
        self.request(msgid, method, **params)
        kind, answered, error, result = self.next()  # type: ignore[misc]
        assert (kind, answered, error) == (1, msgid, None)
        return result

    def error(self) -> tuple[object, str]:
        """Return the msgid and the code of the next message, which must be an error response."""
        kind, msgid, error, result = self.next()  # type: ignore[misc]
        assert (kind, result) == (1, None)
        assert error["message"]
        return msgid, error["code"]

    def complaint(self) -> str:
        """Return the code of the next message, which must be ``rpc.error``."""
        kind, method, params = self.next()  # type: ignore[misc]
        assert (kind, method) == (2, "rpc.error")
        return params[0]["code"]

    def complaint_or_silence(self) -> str | None:
        """Return the code of ``rpc.error`` if that is what the server says first, else None."""
        self.sock.settimeout(0.05)
        try:
            return self.complaint()
        except TimeoutError:
            return None
        finally:
            self.sock.settimeout(WAIT_SECONDS)

    def at_end(self) -> bool:
        try:
            self.next()
        except (EOFError, ConnectionResetError):
            return True
        return False
