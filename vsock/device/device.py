"""The whole device: two listeners, one front-end at a time, one thread."""

import errno
import logging
import os
import select
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from vsock.device.backend import RX, TX, Backend
from vsock.device.hybrid import listen
from vsock.device.line import Limits
from vsock.device.switchboard import Switchboard
from vsock.device.vhost_user import Channel, ChannelError
from vsock.device.virtqueue import Virtqueue, VirtqueueError
from vsock.device.vring import Vring
from vsock.loop import Loop

__all__ = ("Device", "Settings")

_log = logging.getLogger(__name__)

_ACCEPT_BATCH = 32
#: How long to leave a listener alone when this process has no descriptors left.
_ACCEPT_PAUSE_SECONDS = 0.5
#: sizeof sun_path, with the NUL that ends it.
_UNIX_PATH_BYTES = 108
#: CIDs that name no guest: 0 hypervisor, 1 local, 2 host, and the two wildcards.
_RESERVED_CIDS = (0, 1, 2, 0xFFFFFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Where the device listens, for which guest, and within which limits.

    Every process that may write to ``uds_path`` reaches every guest port: protect its directory.
    """

    socket_path: str
    uds_path: str
    cid: int
    once: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.cid in _RESERVED_CIDS or not 0 < self.cid < 1 << 32:
            raise ValueError(f"CID {self.cid} is reserved or out of range")
        if self.socket_path == self.uds_path:
            raise ValueError(f"both sockets at {self.socket_path!r}")
        longest = f"{self.uds_path}_{0xFFFFFFFF}"
        if len(os.fsencode(longest)) >= _UNIX_PATH_BYTES:
            raise ValueError(f"no Unix socket can have a name as long as {longest!r}")


class Device:
    """Listens once constructed; ``run`` serves until ``stop``; ``close`` removes the sockets."""

    def __init__(self, settings: Settings) -> None:
        """Raises OSError or ListenerInUse when a socket cannot be had."""
        self._settings = settings
        self._loop = Loop()
        self._stopping = False
        self._backend: Backend | None = None
        self._backend_fd = -1
        self._switchboard = Switchboard(
            self._loop, cid=settings.cid, uds_path=settings.uds_path, limits=settings.limits
        )
        self._front_ends = _Listener(settings.socket_path, self._loop, self._on_front_end)
        try:
            self._callers = _Listener(settings.uds_path, self._loop, self._switchboard.take_call)
        except BaseException:
            self._front_ends.close()
            self._loop.close()
            raise
        self._front_ends.resume()
        self._callers.resume()

    def watch(self, fd: int) -> None:
        """Stop when ``fd`` becomes readable."""
        self._loop.add(fd, select.EPOLLIN, lambda _events: self.stop())

    def run(self) -> None:
        """Serve until ``stop`` is called, or with ``once`` until the front-end leaves."""
        busy = False
        while not self._stopping:
            busy = self.turn(block=not busy)

    def turn(self, *, block: bool) -> bool:
        """Serve what is due, having waited for it if ``block``; True when more is due at once."""
        self._loop.poll(block=block)
        return self._work()

    def stop(self) -> None:
        self._stopping = True

    def close(self) -> None:
        """Close every socket and remove the two paths."""
        self._drop_front_end()
        self._switchboard.close()
        self._callers.close()
        self._front_ends.close()
        self._loop.close()

    def _work(self) -> bool:
        """Move packets both ways; True when there is more to do at once."""
        if self._backend is None:
            return False
        rx, tx = self._backend.rings[RX], self._backend.rings[TX]
        busy = self._serve(tx, self._switchboard.serve_tx)
        busy |= self._serve(rx, self._switchboard.serve_rx)
        tx.interrupt()
        rx.interrupt()
        return busy

    def _serve(self, ring: Vring, serve: Callable[[Virtqueue], bool]) -> bool:
        queue = ring.live
        if queue is None:
            return False
        try:
            return serve(queue)
        except VirtqueueError as exc:
            ring.fail(exc)
            self._switchboard.guest_restarted()
            return False

    def _on_front_end(self, sock: socket.socket) -> None:
        _log.info("front-end connected")
        # The next one waits in the queue of the listener until this one has left.
        self._front_ends.pause()
        self._backend = Backend(
            Channel(sock),
            self._loop,
            cid=self._settings.cid,
            on_restart=self._switchboard.guest_restarted,
        )
        self._backend_fd = sock.fileno()
        self._loop.add(self._backend_fd, select.EPOLLIN, self._on_message)

    def _on_message(self, _events: int) -> None:
        assert self._backend is not None
        try:
            self._backend.serve()
            return
        except ConnectionError as exc:
            _log.info("front-end gone: %s", exc)
        except ChannelError as exc:
            _log.error("front-end dropped: %s", exc)
        self._drop_front_end()
        if self._settings.once:
            self.stop()
        else:
            self._front_ends.resume()

    def _drop_front_end(self) -> None:
        if self._backend is None:
            return
        self._loop.remove(self._backend_fd)
        self._backend.close()
        self._backend = None
        self._switchboard.guest_restarted()


class _Listener:
    """A listening Unix socket that hands each connection on, and removes its path in the end."""

    def __init__(self, path: str, loop: Loop, take: Callable[[socket.socket], None]) -> None:
        self._path = path
        self._loop = loop
        self._take = take
        self._sock = listen(path)
        self._identity = _identity(path)
        self._active = False

    def resume(self) -> None:
        if not self._active and self._sock.fileno() >= 0:
            self._active = True
            self._loop.add(self._sock.fileno(), select.EPOLLIN, self._on_event)

    def pause(self) -> None:
        if self._active:
            self._active = False
            self._loop.remove(self._sock.fileno())

    def close(self) -> None:
        self.pause()
        self._sock.close()
        # Not if another process has put a socket there since.
        if self._identity is not None and _identity(self._path) == self._identity:
            os.unlink(self._path)

    def _on_event(self, _events: int) -> None:
        for _ in range(_ACCEPT_BATCH):
            if not self._active:
                return
            try:
                sock, _peer = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:
                if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                _log.error("cannot accept on %r: %s", self._path, exc.strerror)
                self.pause()
                self._loop.call_later(_ACCEPT_PAUSE_SECONDS, self.resume)
                return
            self._take(sock)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None
