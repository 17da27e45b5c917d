import _socket
import contextlib
import ctypes
import errno
import os
import select
import socket
import stat
import threading
from pathlib import Path

import pytest

from tests.beds.calls import call_error
from vsock.address import HybridAddress, SerialAddress, UnixAddress, VsockAddress
from vsock.deadline import Deadline
from vsock.dial import _SO_VM_SOCKETS_CONNECT_TIMEOUT, _set_timeout, dial, listen
from vsock.errors import CallError, ConnectionClosed
from vsock.stream import AF_VSOCK, MAX_WRITE_BYTES


@pytest.fixture
def deadline():
    one = Deadline(20)
    yield one
    one.close()


@pytest.fixture
def address(tmp_path):
    return UnixAddress(path=str(tmp_path / "s"))


def accept(listener, deadline):
    deadline.wait((listener.fileno(),), "accept")
    return listener.accept()


def read_exactly(stream, size, deadline):
    data = b""
    while len(data) < size:
        deadline.wait((stream.fileno(),), "read")
        piece = stream.recv(size - len(data))
        assert piece
        data += piece
    return data


@contextlib.contextmanager
def both_ends(address, deadline, dialled=None):
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(address))
        near = stack.enter_context(dial(dialled or address, deadline))
        yield near, stack.enter_context(accept(listener, deadline))


def test_bytes_go_both_ways_and_end(address, deadline):
    with listen(address) as listener, dial(address, deadline) as near:
        near.setblocking(False)
        with pytest.raises(BlockingIOError):
            near.recv(1)
        with accept(listener, deadline) as far:
            assert far.peer == f"unix:pid={os.getpid()},uid={os.getuid()}"
            assert near.peer == str(address)
            near.sendall(b"there", deadline)
            assert read_exactly(far, 5, deadline) == b"there"
            far.sendall(b"back", deadline)
            assert read_exactly(near, 4, deadline) == b"back"
        deadline.wait((near.fileno(),), "read")
        assert near.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            near.send(b"x")


def test_accept_without_pending_connection_does_not_block(address):
    with listen(address) as listener, pytest.raises(BlockingIOError):
        listener.accept()


def test_a_write_is_never_larger_than_the_limit(address, deadline):
    with both_ends(address, deadline) as (near, _):
        assert near.send(bytes(10 * MAX_WRITE_BYTES)) == MAX_WRITE_BYTES
        assert near.send(memoryview(bytes(10 * MAX_WRITE_BYTES))) == MAX_WRITE_BYTES


@pytest.mark.parametrize("blocking", [True, False])
def test_sendall_waits_for_the_reader(address, deadline, blocking):
    data = os.urandom(3 << 20)
    with listen(address) as listener, dial(address, deadline) as near:
        near.setblocking(blocking)
        with accept(listener, deadline) as far:
            received = []
            reader = threading.Thread(
                target=lambda: received.append(read_exactly(far, len(data), deadline))
            )
            reader.start()
            near.sendall(data, deadline)
            reader.join()
            assert received == [data]


def test_sendall_gives_up_at_the_deadline(address, deadline):
    short = Deadline(0.02)
    with both_ends(address, deadline) as (near, _), pytest.raises(CallError) as caught:
        near.sendall(bytes(8 << 20), short)
    short.close()
    assert caught.value.code == "timeout"


def test_close_is_idempotent(address, deadline):
    listener = listen(address)
    near = dial(address, deadline)
    for one in (near, listener):
        one.close()
        one.close()
        assert one.fileno() == -1


def test_the_socket_file_is_private_and_goes_with_the_listener(address):
    with listen(address):
        mode = os.stat(address.path).st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) & 0o077 == 0
    assert not os.path.exists(address.path)


def test_listen_replaces_stale_socket_file(address, deadline):
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(address.path)
    with listen(address), dial(address, deadline):
        pass


def test_listen_keeps_socket_file_of_living_listener(address, deadline):
    with listen(address) as first:
        with pytest.raises(OSError, match="a listener is there already") as caught:
            listen(address)
        assert caught.value.errno == errno.EADDRINUSE
        assert caught.value.filename == str(address)
        with accept(first, deadline), dial(address, deadline):
            pass


def test_any_other_file_stays(address):
    Path(address.path).write_text("precious")
    with pytest.raises(OSError, match="is no socket"):
        listen(address)
    assert Path(address.path).read_text() == "precious"


def test_the_file_of_a_successor_is_not_removed(address, deadline):
    first = listen(address)
    os.unlink(address.path)
    with listen(address):
        first.close()
        with dial(address, deadline):
            pass


def test_an_abstract_socket_leaves_no_file(deadline):
    address = UnixAddress(path=f"@wire-test-{os.getpid()}")
    with both_ends(address, deadline) as (near, far):
        near.send(b"x")
        assert read_exactly(far, 1, deadline) == b"x"


@pytest.mark.parametrize("make", [None, "stale", "directory"])
def test_a_failed_dial_names_the_address_and_the_errno(address, deadline, make):
    if make == "stale":
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(address.path)
    if make == "directory":
        os.mkdir(address.path)
    with pytest.raises(OSError, match="unix://") as caught:
        dial(address, deadline)
    assert caught.value.errno == (errno.ECONNREFUSED if make else errno.ENOENT)
    assert caught.value.filename == str(address)


def test_a_dial_to_a_full_backlog_ends_at_the_deadline_or_the_cancel(address):
    with socket.socket(socket.AF_UNIX) as full:
        full.bind(address.path)
        full.listen(0)
        held = dial(address, Deadline(20))
        short = Deadline(0.02)
        with call_error("timeout"):
            dial(address, short)
        cancelled = Deadline(20)
        timer = threading.Timer(0.02, cancelled.cancel)
        timer.start()
        with call_error("cancelled"):
            dial(address, cancelled)
        timer.join()
        held.close()
    # a full backlog means a listener, too
    with socket.socket(socket.AF_UNIX) as full:
        os.unlink(address.path)
        full.bind(address.path)
        full.listen(0)
        with dial(address, Deadline(20)), pytest.raises(OSError, match="a listener is there"):
            listen(address)


def test_dial_with_passed_deadline_fails(address):
    with listen(address), pytest.raises(CallError):
        dial(address, Deadline(0.0))


def test_dial_refuses_vsock_address_without_cid(deadline):
    with pytest.raises(ValueError, match="vsock://any:5"):
        dial(VsockAddress(cid=None, port=5), deadline)


def test_the_connect_timeout_reaches_a_vsock_socket():
    """Python's own setsockopt takes no struct on such a socket, and getsockopt gives none."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        sock = _socket.socket(AF_VSOCK, _socket.SOCK_STREAM, 0)
    except OSError as error:
        pytest.skip(f"this kernel has no AF_VSOCK: {error}")
    _set_timeout(sock, AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, 7.25)
    value, size = (ctypes.c_long * 2)(), ctypes.c_uint(16)
    status = libc.getsockopt(
        sock.fileno(), AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, value, ctypes.byref(size)
    )
    sock.close()
    assert status == 0
    assert 7.25 <= value[0] + value[1] / 1e6 < 7.3  # the kernel rounds up to its ticks


# --- hybrid


@pytest.fixture
def vmm(tmp_path):
    """Return an address, and a function that answers one dial of it."""
    path = str(tmp_path / "v.sock")
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    threads = []

    def answer(*pieces, requests):
        def work():
            sock, _ = server.accept()
            with sock:
                sock.settimeout(20)
                requests.append(sock.recv(100))
                for piece in pieces:
                    sock.sendall(piece)
                if pieces and pieces[0].startswith(b"O"):
                    sock.recv(1)

        threads.append(threading.Thread(target=work))
        threads[-1].start()

    yield HybridAddress(path=path, port=1024), answer
    for thread in threads:
        thread.join()
    server.close()


def test_hybrid_asks_once_and_reads_no_byte_too_many(vmm, deadline):
    address, answer = vmm
    requests = []
    answer(b"OK 5\nfirst bytes", requests=requests)
    with dial(address, deadline) as stream:
        assert requests == [b"CONNECT 1024\n"]
        assert read_exactly(stream, 11, deadline) == b"first bytes"


def test_hybrid_answer_in_pieces(vmm, deadline):
    address, answer = vmm
    answer(b"O", b"K 1073741824", b"\n", b"x", requests=[])
    with dial(address, deadline) as stream:
        assert read_exactly(stream, 1, deadline) == b"x"


def test_hybrid_dial_of_guest_port_without_listener_names_the_port(vmm, deadline):
    address, answer = vmm
    answer(requests=[])
    with pytest.raises(ConnectionClosed, match="no listener on guest port 1024"):
        dial(address, deadline)


@pytest.mark.parametrize("text", [b"NO\n", b"ERR 5\n", b"\n", b"OKAY 5\n", b"x" * 100])
def test_hybrid_with_another_answer_is_refused(vmm, deadline, text):
    address, answer = vmm
    answer(text, requests=[])
    with pytest.raises(ConnectionClosed, match="answered CONNECT with"):
        dial(address, deadline)


def test_hybrid_with_no_answer_ends_at_the_deadline(tmp_path):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "v"))
        silent.listen()
        short = Deadline(0.02)
        with pytest.raises(CallError) as caught:
            dial(HybridAddress(path=str(tmp_path / "v"), port=7), short)
        short.close()
        assert caught.value.code == "timeout"


def test_hybrid_listens_where_the_vmm_will_connect(tmp_path, deadline):
    address = HybridAddress(path=str(tmp_path / "v"), port=52)
    dialled = UnixAddress(path=str(tmp_path / "v_52"))
    with both_ends(address, deadline, dialled) as (near, far):
        near.send(b"x")
        assert read_exactly(far, 1, deadline) == b"x"
    assert os.listdir(tmp_path) == []


# --- serial, over a pseudo-terminal, which is a tty as good as any


@pytest.fixture
def tty():
    near, far = os.openpty()
    yield near, SerialAddress(path=os.ttyname(far))
    os.close(far)
    os.close(near)


EVERY_BYTE = bytes(range(256))


def test_serial_carries_every_byte_as_it_is(tty, deadline):
    host, address = tty
    with dial(address, deadline) as stream:
        assert stream.point_to_point
        stream.sendall(EVERY_BYTE, deadline)
        assert read_exactly(_Fd(host), 256, deadline) == EVERY_BYTE
        os.write(host, EVERY_BYTE)
        assert read_exactly(stream, 256, deadline) == EVERY_BYTE
        stream.setblocking(False)
        with pytest.raises(BlockingIOError):
            stream.recv(1)


class _Fd:
    def __init__(self, fd):
        self.fileno = lambda: fd
        self.recv = lambda size: os.read(fd, size)


def test_serial_listener_yields_one_stream_at_a_time(tty, deadline):
    host, address = tty
    with listen(address) as listener:
        first = accept(listener, deadline)
        with pytest.raises(BlockingIOError):
            listener.accept()
        assert select.select([listener.fileno()], [], [], 0)[0] == []
        first.close()
        first.close()
        with accept(listener, deadline) as second:
            os.write(host, b"x")
            assert read_exactly(second, 1, deadline) == b"x"


def test_serial_hang_up_is_the_end_and_a_device_that_went_is_reported(tmp_path):
    host, far = os.openpty()
    deadline = Deadline(20)
    link = tmp_path / "port"
    link.symlink_to(os.ttyname(far))
    with listen(SerialAddress(path=str(link))) as listener:
        with accept(listener, deadline) as stream:
            link.unlink()
            os.close(far)
            os.close(host)
            deadline.wait((stream.fileno(),), "hang up")
            assert stream.recv(10) == b""
        for _ in range(2):
            deadline.wait((listener.fileno(),), "the failure to show")
            with pytest.raises(FileNotFoundError):
                listener.accept()
        host, far = os.openpty()
        link.symlink_to(os.ttyname(far))
        with accept(listener, deadline):
            pass
    deadline.close()
    os.close(far)
    os.close(host)


def test_serial_refuses_what_is_no_character_device(tmp_path, deadline):
    (tmp_path / "file").write_bytes(b"")
    for function in (listen, lambda address: dial(address, deadline)):
        with pytest.raises(OSError, match="not a character device"):
            function(SerialAddress(path=str(tmp_path / "file")))
        with pytest.raises(FileNotFoundError):
            function(SerialAddress(path=str(tmp_path / "nothing")))
