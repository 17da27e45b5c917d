"""One byte stream over a character device: a virtio-serial port, or a tty.

A device has no connections. Its stream starts when the other side is there and ends when that
hangs up; the listener then yields the next stream in its time. A virtio-serial port stays open for
it: closing a port discards what the next peer may have sent already. Any other device, and a port
whose stream was ended on this side, is opened anew.
"""

import errno
import os
import select
import stat
from collections.abc import Callable

from vsock.address import SerialAddress
from vsock.stream import MAX_WRITE_BYTES, Listener, Stream

__all__ = ("SerialListener", "SerialStream", "find_device", "open_serial")

_NAMED = "/dev/virtio-ports/"
#: PORT_UNKNOWN of linux/serial_core.h: the kernel makes nodes for UARTs that it might yet find.
_NO_UART = "0"


class SerialStream(Stream):
    """A stream over the descriptor of a character device."""

    point_to_point = True

    def __init__(self, fd: int, peer: str, on_close: "Callable[[int], None] | None" = None) -> None:
        """Take over ``fd``.

        ``on_close`` is called once, at the end. It is given the descriptor, which it then owns,
        where the peer hung up and all that it sent was read, unless the device is a tty, which
        stays hung up; otherwise -1.
        """
        self._fd = fd
        self._is_tty = os.isatty(fd)
        self.peer = peer
        self._on_close = on_close
        self._ended = False

    def fileno(self) -> int:
        return self._fd

    def recv(self, max_bytes: int) -> bytes:
        try:
            data = os.read(self._fd, max_bytes)
            self._ended = not data
            return data
        except OSError as error:
            if error.errno == errno.EIO:  # how a tty says that it was hung up
                return b""
            raise

    def send(self, data: "bytes | memoryview") -> int:
        blocking = os.get_blocking(self._fd)
        if blocking:
            os.set_blocking(self._fd, False)
        try:
            return os.write(self._fd, memoryview(data)[:MAX_WRITE_BYTES])
        finally:
            if blocking:
                os.set_blocking(self._fd, True)

    def setblocking(self, blocking: bool) -> None:
        os.set_blocking(self._fd, blocking)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        if self._on_close is None or self._is_tty or not self._ended:
            os.close(fd)
            fd = -1
        if self._on_close is not None:
            self._on_close(fd)


class SerialListener(Listener):
    """Yields the one stream of a device, again and again.

    ``fileno`` is an epoll descriptor that watches the device by edges: a port whose host side is
    away is hung up all the time, and only the change is news.
    """

    def __init__(self, address: SerialAddress) -> None:
        self.address = address
        self._serial = address
        self._device_fd = -1
        self._failed = False
        self._epoll = select.epoll()
        self._failure_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._failure_fd, select.EPOLLIN)
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return -1 if self._epoll.closed else self._epoll.fileno()

    def accept(self) -> Stream:
        if self._failed:
            self._open()  # a later accept tries to open again
            self._failed = False
            os.eventfd_read(self._failure_fd)
        if self._device_fd < 0:
            raise BlockingIOError(errno.EAGAIN, "the stream is in use", str(self.address))
        ready = dict(self._epoll.poll(0)).get(self._device_fd, 0)
        if not ready or ready & (select.EPOLLHUP | select.EPOLLERR):
            raise BlockingIOError(errno.EAGAIN, "no peer has the port open", str(self.address))
        fd, self._device_fd = self._device_fd, -1
        self._epoll.unregister(fd)
        return SerialStream(fd, str(self.address), self._reopen)

    def close(self) -> None:
        if self._epoll.closed:
            return
        self._epoll.close()
        os.close(self._failure_fd)
        if self._device_fd >= 0:
            os.close(self._device_fd)
            self._device_fd = -1

    def _open(self, fd: int = -1) -> None:
        """Watch the device for a peer, by ``fd`` where it is open already."""
        self._device_fd = fd if fd >= 0 else _open_device(self._serial)
        self._epoll.register(self._device_fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    def _reopen(self, fd: int) -> None:
        if fd >= 0 and self._epoll.closed:
            os.close(fd)
        if self._epoll.closed:
            return
        try:
            if fd >= 0:
                os.set_blocking(fd, False)
            self._open(fd)
        except OSError:
            # accept() is where it can be told
            self._failed = True
            os.eventfd_write(self._failure_fd, 1)


def open_serial(address: SerialAddress) -> SerialStream:
    """Open the device as a blocking stream.

    Raises:
        OSError: with errno and the path; EBUSY if a virtio-serial port is in use.
    """
    fd = _open_device(address)
    os.set_blocking(fd, True)
    return SerialStream(fd, str(address))


def find_device(path: str, *, sys_root: str = "/sys") -> str:
    """Return the path of a serial device's node.

    udev makes ``/dev/virtio-ports/NAME``, and a boot image has no udev: the kernel says which port
    has that name (drivers/char/virtio_console.c, attribute ``name``). Any other path, and a name
    that no port has, is returned as it is.

    Raises:
        OSError: ENXIO, the node is there but no UART behind it. It could be opened all the same,
            and every read would fail.
    """
    if _uart_type(path, sys_root) == _NO_UART:
        raise OSError(errno.ENXIO, "no UART is there", path)
    if not path.startswith(_NAMED) or os.path.exists(path):
        return path
    wanted = path[len(_NAMED) :]
    directory = f"{sys_root}/class/virtio-ports"
    try:
        ports = sorted(os.listdir(directory))
    except OSError:  # no virtio-serial device
        return path
    for port in ports:
        try:
            with open(f"{directory}/{port}/name", encoding="utf-8", errors="replace") as stream:
                if stream.read().strip() == wanted:
                    return f"/dev/{port}"
        except OSError:  # a port without a name
            continue
    return path


def _uart_type(path: str, sys_root: str) -> str | None:
    """Return the kernel's number for the kind of a UART, None for what is none."""
    name = os.path.basename(os.path.realpath(path))
    try:
        with open(f"{sys_root}/class/tty/{name}/type", encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return None


def _open_device(address: SerialAddress) -> int:
    """Return a non-blocking descriptor; the caller owns it."""
    fd = os.open(find_device(address.path), os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISCHR(os.fstat(fd).st_mode):
            raise OSError(errno.ENODEV, "not a character device", address.path)
        if os.isatty(fd):
            _make_raw(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _make_raw(fd: int) -> None:
    """Take every byte as it is: a line discipline would echo, translate and kill."""
    import termios

    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = termios.tcgetattr(fd)
    iflag &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP | termios.INLCR
        | termios.IGNCR | termios.ICRNL | termios.IXON | termios.IXOFF | termios.INPCK
    )  # fmt: skip
    oflag &= ~termios.OPOST
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8 | termios.CLOCAL
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, [iflag, oflag, cflag, lflag, ispeed, ospeed, cc])
