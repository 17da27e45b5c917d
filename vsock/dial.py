"""Streams and listeners from addresses: AF_VSOCK, Unix sockets, hybrid vsock, serial devices.

``dial``, ``connect`` and ``listen`` take an address and hide what kind it is.
"""

import _socket
import errno
import os
import stat
import struct

from vsock.address import (
    VMADDR_CID_ANY,
    Address,
    HybridAddress,
    SerialAddress,
    VsockAddress,
)
from vsock.deadline import Deadline
from vsock.errors import CallError, ConnectionClosed
from vsock.retry import has_errno, retry
from vsock.stream import AF_VSOCK, Listener, Stream, UnixListener

__all__ = ("connect", "dial", "listen")

_SO_VM_SOCKETS_CONNECT_TIMEOUT = 6  # include/uapi/linux/vm_sockets.h
_BACKLOG = 128
#: A hybrid back-end answers ``OK`` and a number of 32 bits; a longer line is no answer.
_MAX_HANDSHAKE_BYTES = 32
#: A dial to a full Unix backlog blocks in the kernel, in slices so that a cancel gets through.
_CONNECT_SLICE_SECONDS = 0.25
#: One attempt of ``connect``; a back-end may take a connection of a dead guest and never answer.
_ATTEMPT_SECONDS = 5.0
#: What "not there yet" looks like. A silent vsock back-end times out where others refuse.
_is_absent = has_errno(
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ENOENT,
    errno.ENODEV,
    errno.ENXIO,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.ETIMEDOUT,
)


def dial(address: Address, deadline: Deadline) -> Stream:
    """Connect to ``address`` once; the stream is blocking.

    Raises:
        OSError: with errno and the address; ECONNREFUSED, ENOENT, ENODEV and ETIMEDOUT mean that
            there is no listener, or not yet.
        ConnectionClosed: the VMM is there, but its guest has no listener on the port.
        CallError: ``timeout`` or ``cancelled``.
        ValueError: the address is for listening only.
    """
    if isinstance(address, SerialAddress):
        from vsock.serial import open_serial

        return open_serial(address)
    if isinstance(address, VsockAddress) and address.cid is None:
        raise ValueError(f"{address} can be listened on, not dialled")
    family = AF_VSOCK if isinstance(address, VsockAddress) else _socket.AF_UNIX
    sock = _open_socket(family, address)
    try:
        if isinstance(address, VsockAddress):
            _connect_vsock(sock, address, deadline)
        else:
            _connect_unix(sock, address.path, address, deadline)
        stream = Stream(sock, str(address))
        if isinstance(address, HybridAddress):
            _ask_for_port(stream, address, deadline)
    except BaseException:
        sock.close()
        raise
    return stream


def connect(address: Address, seconds: float, until: Deadline | None = None) -> Stream:
    """Dial until a server is there, for at most ``seconds``; return a non-blocking stream.

    ``until`` ends that too, when it passes or is cancelled. The server may be a guest that boots or
    an agent that restarts. Trying again is safe: nothing has been asked of it before this returns.

    Raises:
        ConnectionClosed: no server was there in time, or the address cannot be reached at all.
    """

    def attempt() -> Stream:
        with whole.part(_ATTEMPT_SECONDS) as once:
            return dial(address, once)

    with Deadline(seconds) if until is None else until.part(seconds) as whole:
        try:
            stream = retry(attempt, whole, when=_is_not_there, step=f"wait for {address}")
        except (OSError, ConnectionClosed, CallError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConnectionClosed(
                f"cannot connect to {address} within {seconds:g} s: {reason}"
            ) from error
    stream.setblocking(False)
    return stream


def _is_not_there(error: BaseException) -> bool:
    if isinstance(error, CallError):
        return error.code == "timeout"
    return isinstance(error, ConnectionClosed) or _is_absent(error)


def listen(address: Address, *, allowed_cids: "frozenset[int] | None" = None) -> Listener:
    """Listen on ``address``, for AF_VSOCK peers with ``allowed_cids``; by default the host alone.

    A Unix socket is made with mode 0600. A socket file without a listener is replaced; any
    other file stays, and the call fails with EADDRINUSE.

    Raises:
        OSError: with errno and the address.
    """
    if isinstance(address, SerialAddress):
        from vsock.serial import SerialListener

        return SerialListener(address)
    if isinstance(address, VsockAddress):
        sock = _open_socket(AF_VSOCK, address)
        cid = VMADDR_CID_ANY if address.cid is None else address.cid
        listener = Listener(address, _bind(sock, (cid, address.port), address))
        if allowed_cids is not None:
            listener.allowed_cids = allowed_cids
        return listener
    path = address.listen_path if isinstance(address, HybridAddress) else address.path
    sock = _open_socket(_socket.AF_UNIX, address)
    if path.startswith("@"):
        return Listener(address, _bind(sock, _sockaddr_path(path), address))
    try:
        _remove_stale_socket(path, address)
        # bind() gives the file the mode of the socket, less the umask: never open to others
        os.fchmod(sock.fileno(), 0o600)
    except BaseException:
        sock.close()
        raise
    return UnixListener(address, _bind(sock, path, address), path)


def _open_socket(family: int, address: Address) -> "_socket.socket":
    try:
        return _socket.socket(family, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC, 0)
    except OSError as error:
        raise _at(error, address) from None


def _bind(
    sock: "_socket.socket", where: "str | bytes | tuple[int, int]", address: Address
) -> "_socket.socket":
    try:
        sock.bind(where)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _at(error, address) from None
    return sock


def _remove_stale_socket(path: str, address: Address) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EADDRINUSE, "exists and is no socket", str(address))
    probe = _open_socket(_socket.AF_UNIX, address)
    try:
        probe.setblocking(False)
        probe.connect(path)
    except ConnectionRefusedError:
        os.unlink(path)
        return
    except BlockingIOError:
        pass  # a full backlog: there is a listener
    except FileNotFoundError:
        return
    finally:
        probe.close()
    raise OSError(errno.EADDRINUSE, "a listener is there already", str(address))


def _connect_unix(sock: "_socket.socket", path: str, address: Address, deadline: Deadline) -> None:
    step = f"connect to {address}"
    while True:
        deadline.check(step)
        left = deadline.remaining()
        seconds = _CONNECT_SLICE_SECONDS
        if left is not None:
            # the kernel reads 0 as "no limit", which a deadline about to pass must not become
            seconds = min(seconds, max(left, 0.001))
        _set_timeout(sock, _socket.SOL_SOCKET, _socket.SO_SNDTIMEO, seconds)
        try:
            sock.connect(_sockaddr_path(path))
        except BlockingIOError:
            continue
        except OSError as error:
            raise _at(error, address) from None
        _set_timeout(sock, _socket.SOL_SOCKET, _socket.SO_SNDTIMEO, 0.0)
        return


def _connect_vsock(sock: "_socket.socket", address: VsockAddress, deadline: Deadline) -> None:
    assert address.cid is not None
    step = f"connect to {address}"
    deadline.check(step)
    seconds = deadline.remaining()
    if seconds is not None:
        # the kernel gives up by itself after 2 s, which is short for a guest that is booting
        _set_timeout(sock, AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, seconds)
    sock.setblocking(False)
    error_number = sock.connect_ex((address.cid, address.port))
    if error_number == errno.EINPROGRESS:
        deadline.wait((), step, writable=(sock.fileno(),))
        error_number = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR)
    if error_number:
        raise OSError(error_number, os.strerror(error_number), str(address))
    sock.setblocking(True)


def _ask_for_port(stream: Stream, address: HybridAddress, deadline: Deadline) -> None:
    """Do the hybrid handshake: one line there, one line back, and not a byte more.

    The request goes out in one write because some VMMs take a partial line for an error; the
    answer is read to its newline exactly, because the guest's bytes may follow at once.
    """
    step = f"wait for the guest of {address}"
    request = f"CONNECT {address.port}\n".encode()
    try:
        taken = stream.send(request)
    except (BrokenPipeError, ConnectionResetError):
        taken = len(request)  # the answer, or its absence, says more
    if taken != len(request):
        raise OSError(errno.EIO, "the handshake was cut short", str(address))
    answer = b""
    while not answer.endswith(b"\n"):
        deadline.wait((stream.fileno(),), step)
        try:
            byte = stream.recv(1)
        except ConnectionResetError:
            byte = b""
        if not byte:
            raise ConnectionClosed(
                f"no listener on guest port {address.port}: "
                f"the VMM closed {address.path!r} after {answer!r}"
            )
        answer += byte
        if len(answer) > _MAX_HANDSHAKE_BYTES:
            raise ConnectionClosed(f"{address} answered CONNECT with {answer!r}, not with OK")
    if answer.split()[:1] != [b"OK"]:
        raise ConnectionClosed(f"{address} answered CONNECT with {answer!r}, not with OK")


def _set_timeout(sock: "_socket.socket", level: int, option: int, seconds: float) -> None:
    whole, rest = divmod(seconds, 1.0)
    # On an AF_VSOCK socket Python takes integers only, and this is a struct timeval: so the same
    # descriptor is dressed as a socket of another family, which is all that Python looks at.
    plain = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, sock.fileno())
    try:
        plain.setsockopt(level, option, struct.pack("ll", int(whole), int(rest * 1e6)))
    finally:
        plain.detach()


def _sockaddr_path(path: str) -> "str | bytes":
    return b"\0" + os.fsencode(path[1:]) if path.startswith("@") else path


def _at(error: OSError, address: Address) -> OSError:
    return OSError(error.errno, error.strerror, str(address))
