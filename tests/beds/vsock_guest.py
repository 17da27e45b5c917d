"""The guest's half of the vsock tests: services on fixed ports, and orders from the host.

Runs as a command in User Mode Linux and as PID 1 of an initramfs in QEMU, on nothing but the
standard library. It dials the host's CONTROL port and does what it is told there, a line at a time.
"""

import ctypes
import errno
import hashlib
import os
import socket
import sys
import threading

CONTROL = 900
ECHO, SINK, SOURCE, HOLD = 5000, 5001, 5002, 5003
HOST_CID, ANY_CID = 2, 0xFFFFFFFF
CHUNK_BYTES = 256 * 1024
MODULE_LIST = "/etc/guestagent/modules"
_SYS_FINIT_MODULE = 313
_POWER_OFF = 0x4321FEDC

held: list[socket.socket] = []
last_words = [b""]


def listen(port, serve) -> None:
    listener = socket.socket(socket.AF_VSOCK)
    listener.bind((ANY_CID, port))
    listener.listen(256)

    def accept() -> None:
        while True:
            sock, _ = listener.accept()
            threading.Thread(target=guarded, args=(serve, sock), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def guarded(serve, sock: socket.socket) -> None:
    try:
        serve(sock)
    except OSError:
        sock.close()


def echo(sock: socket.socket) -> None:
    """Send back what comes; end our direction when the other one has ended."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := sock.recv_into(buffer):
        sock.sendall(buffer[:count])
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)
    sock.close()


def sink(sock: socket.socket) -> None:
    """Read to the end, and only then answer: with the count and the digest."""
    digest, total = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := sock.recv_into(buffer):
        digest.update(buffer[:count])
        total += count
    sock.sendall(f"{total} {digest.hexdigest()}".encode())
    sock.close()


def source(sock: socket.socket) -> None:
    """Send as many bytes as asked, their digest, and the end; then hear what the host says."""
    left = int(sock.recv(32))
    digest, block = hashlib.sha256(), os.urandom(CHUNK_BYTES)
    while left:
        part = block[:left]
        digest.update(part)
        sock.sendall(part)
        left -= len(part)
    sock.sendall(digest.hexdigest().encode())
    sock.shutdown(socket.SHUT_WR)
    words = b""
    while part := sock.recv(4096):
        words += part
    last_words[0] = words
    sock.close()


def dial(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK)
    sock.settimeout(20)
    sock.connect((HOST_CID, port))
    return sock


def call(port: int, text: bytes) -> bytes:
    """Send text and the end to a port of the host, and return all that it answers."""
    with dial(port) as sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(4096):
            answer += part
        return answer


def flood(port: int) -> None:
    sock = dial(port)
    sock.settimeout(None)
    block = bytes(CHUNK_BYTES)

    def run(sock: socket.socket) -> None:
        while True:
            sock.sendall(block)

    threading.Thread(target=guarded, args=(run, sock), daemon=True).start()


def gather(port: int, count: int) -> int:
    """Open many connections at once; say something on each; count the right answers."""
    socks = [dial(port) for _ in range(count)]
    for number, sock in enumerate(socks):
        sock.sendall(b"%04d" % number)
    right = 0
    for number, sock in enumerate(socks):
        answer = b""
        while len(answer) < 4 and (part := sock.recv(4)):
            answer += part
        right += answer == b"%04d" % number
        sock.close()
    return right


def obey(order: list[bytes]) -> bytes:
    try:
        match order:
            case [b"dial", port]:
                dial(int(port)).close()
                return b"ok"
            case [b"call", port, text]:
                return call(int(port), text)
            case [b"flood", port]:
                flood(int(port))
                return b"ok"
            case [b"gather", port, count]:
                return b"%d" % gather(int(port), int(count))
            case [b"words"]:
                return last_words[0]
    except OSError as problem:
        return errno.errorcode.get(problem.errno or 0, repr(problem)).encode()
    return b"?"


def rebind() -> None:
    """Take the driver off the device and put it back: the rings start anew."""
    driver = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport"
    name = next(name for name in os.listdir(driver) if name.startswith("virtio"))
    for action in ("unbind", "bind"):
        with open(f"{driver}/{action}", "w") as file:
            file.write(name)


def serve() -> None:
    for port, service in ((ECHO, echo), (SINK, sink), (SOURCE, source), (HOLD, held.append)):
        listen(port, service)
    while True:
        with dial(CONTROL) as control:
            control.settimeout(None)
            control.sendall(b"ready\n")
            take_orders(control)


def take_orders(control: socket.socket) -> None:
    for line in control.makefile("rb"):
        order = line.split()
        if order == [b"rebind"]:
            rebind()
            return
        control.sendall(obey(order) + b"\n")


def main() -> None:
    """Be PID 1 of a machine that holds nothing else."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None)
        with open(MODULE_LIST) as file:
            for path in file.read().split():
                with open(path, "rb") as module:
                    libc.syscall(_SYS_FINIT_MODULE, module.fileno(), b"", 0)
        serve()
    except OSError as problem:
        sys.stderr.write(f"vsock guest: {problem}\n")
    finally:
        libc.reboot(ctypes.c_int(_POWER_OFF))


if __name__ == "__main__":
    serve()
