"""What every guest must see of the vsock device; see the two test files that name a bed."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable

import pytest

from tests.beds.vsock_guest import ECHO, HOLD, SINK, SOURCE
from tests.beds.vsockbed import Bed

MEBIBYTE = 1 << 20


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def echo_speed(bed: Bed, size_bytes: int) -> float:
    """Send random bytes to the echo and compare what comes back; return bytes per second."""
    block = os.urandom(MEBIBYTE)
    sent, came, total = hashlib.sha256(), hashlib.sha256(), 0
    with bed.dial(ECHO) as sock:
        started = time.monotonic()

        def send() -> None:
            for _ in range(size_bytes // MEBIBYTE):
                sock.sendall(block)
                sent.update(block)
            sock.shutdown(socket.SHUT_WR)

        sender = in_thread(send)
        buffer = memoryview(bytearray(MEBIBYTE))
        while count := sock.recv_into(buffer):
            came.update(buffer[:count])
            total += count
        sender.join()
        seconds = time.monotonic() - started
    assert total == size_bytes
    assert came.digest() == sent.digest()
    return size_bytes / seconds


class DeviceCases:
    echo_bytes: int

    def test_a_long_echo_arrives_whole(self, bed, request):
        speed = echo_speed(bed, self.echo_bytes)
        request.node.user_properties.append(("echo_mb_per_second", round(speed / 1e6, 1)))

    def test_guest_dials_host(self, bed):
        with bed.listen(6000) as listener:

            def serve() -> None:
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(b"you said " + read_all(sock))

            server = in_thread(serve)
            assert bed.order("call", 6000, "hello") == b"you said hello"
            server.join()

    def test_guest_dial_of_host_port_without_listener_is_refused_at_once(self, bed):
        started = time.monotonic()
        assert bed.order("dial", 6001) in (b"ECONNRESET", b"ECONNREFUSED")
        assert time.monotonic() - started < 1.5  # the kernel's own limit is 2 s

    def test_host_dial_of_guest_port_without_listener_is_refused_at_once(self, bed):
        started = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            bed.dial(6001)
        assert time.monotonic() - started < 1.5

    def test_host_half_closes(self, bed):
        payload = os.urandom(3 * MEBIBYTE + 17)
        with bed.dial(SINK) as sock:
            sock.sendall(payload)
            sock.shutdown(socket.SHUT_WR)
            expected = f"{len(payload)} {hashlib.sha256(payload).hexdigest()}"
            assert read_all(sock).decode() == expected

    def test_guest_half_closes(self, bed):
        with bed.dial(SOURCE) as sock:
            sock.sendall(b"%d" % (3 * MEBIBYTE + 17))
            data = read_all(sock)
            assert len(data) == 3 * MEBIBYTE + 17 + 64
            assert hashlib.sha256(data[:-64]).hexdigest().encode() == data[-64:]
            sock.sendall(b"heard-it-all")
        while (words := bed.order("words")) == b"":
            pass
        assert words == b"heard-it-all"

    def test_200_from_the_host(self, bed):
        socks = [bed.dial(ECHO) for _ in range(200)]
        for number, sock in enumerate(socks):
            sock.sendall(b"%04d" % number)
            sock.shutdown(socket.SHUT_WR)
        for number, sock in enumerate(socks):
            with sock:
                assert read_all(sock) == b"%04d" % number

    def test_200_from_the_guest(self, bed):
        with bed.listen(6002, backlog=5) as listener:

            def serve() -> None:
                socks = [listener.accept()[0] for _ in range(200)]
                for sock in socks:
                    with sock:
                        sock.sendall(sock.recv(4))

            server = in_thread(serve)
            assert bed.order("gather", 6002, 200) == b"200"
            server.join()

    def test_a_guest_that_does_not_read_stops_only_its_own_connection(self, bed):
        with bed.dial(HOLD) as stuck:
            stuck.settimeout(0.5)
            with pytest.raises(TimeoutError):
                stuck.sendall(bytes(16 * MEBIBYTE))
            echo_speed(bed, 8 * MEBIBYTE)

    def test_a_host_peer_dies_in_mid_stream(self, bed):
        with bed.listen(6003) as listener:
            assert bed.order("flood", 6003) == b"ok"
            sock, _ = listener.accept()
            assert len(sock.recv(65536)) > 0
            sock.close()
        echo_speed(bed, 8 * MEBIBYTE)

    def test_the_guest_dies_in_mid_stream(self, bed):
        """And the next one, on the same device, is served as if nothing had been."""
        pid = bed.device.pid
        with bed.listen(6004) as listener:
            assert bed.order("flood", 6004) == b"ok"
            sock, _ = listener.accept()
            with sock, bed.dial(ECHO) as idle:
                assert len(sock.recv(65536)) > 0
                bed.kill_guest()
                read_all(sock)
                assert idle.recv(1) == b""
        bed.start_guest()
        echo_speed(bed, 8 * MEBIBYTE)
        assert bed.device.pid == pid
        assert bed.device.poll() is None
