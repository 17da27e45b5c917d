"""A virtual machine without one: speaks vhost-user to a device and plays the guest's driver.

Memory is a memfd, rings are laid out in it as a driver would, notifications are eventfds. The
device under test runs in the same thread: ``Bench.turn`` lets it serve what is due.
"""

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

from vsock.device.device import Device, Settings
from vsock.device.line import Limits
from vsock.device.packet import OP_RST, OP_RW, Header

CID = 42
SIZE = 64
GUEST_BASE = 0x4000_0000
USER_BASE = 0x7F00_0000_0000
MEMORY_BYTES = 8 << 20
RING_BYTES = 0x4000
BUFFERS = 0x10_0000
BUFFER_BYTES = 44 + 4096
NEXT, WRITE, INDIRECT = 1, 2, 4
RX, TX = 0, 1
BUFFER_ALLOC = 256 * 1024


class Ring:
    """The driver's side of a split ring in the simulated memory."""

    def __init__(self, memory: mmap, index: int) -> None:
        self.memory = memory
        self.index = index
        self.offset = index * RING_BYTES
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.reset()

    @property
    def available(self) -> int:
        return self.offset + 0x1000

    @property
    def used(self) -> int:
        return self.offset + 0x2000

    def reset(self) -> None:
        self.memory[self.offset : self.offset + RING_BYTES] = bytes(RING_BYTES)
        self.next_available = self.next_used = 0

    def describe(self, slot: int, address: int, length: int, flags: int = 0, following: int = 0):
        raw = struct.pack("<QIHH", address, length, flags, following)
        self.memory[self.offset + 16 * slot : self.offset + 16 * slot + 16] = raw

    def publish(self, head: int, *, ahead: int = 0) -> None:
        struct.pack_into(
            "<H", self.memory, self.available + 4 + 2 * (self.next_available % SIZE), head
        )
        self.next_available = (self.next_available + 1) & 0xFFFF
        self.set_available_index(self.next_available + ahead)

    def set_available_index(self, index: int) -> None:
        # by one access: the device looks at the same time
        place = memoryview(self.memory)[self.available + 2 : self.available + 4]
        place.cast("H")[0] = index & 0xFFFF
        os.eventfd_write(self.kick, 1)

    @property
    def used_index(self) -> int:
        return struct.unpack_from("<H", self.memory, self.used + 2)[0]

    @property
    def kicks_wanted(self) -> bool:
        return not self.memory[self.used] & 1

    def take_used(self) -> Iterator[tuple[int, int]]:
        while self.next_used != self.used_index:
            yield struct.unpack_from(
                "<II", self.memory, self.used + 4 + 8 * (self.next_used % SIZE)
            )
            self.next_used = (self.next_used + 1) & 0xFFFF

    def interrupted(self) -> bool:
        try:
            return os.eventfd_read(self.call) > 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)


class FrontEnd:
    """The VMM: a control socket, memory, two rings; and the guest's driver on top of them."""

    def __init__(self, path: Path, turn: Callable[[], None]) -> None:
        self.turn = turn
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        self.sock.setblocking(False)
        self.memory_fd = os.memfd_create("guest")
        os.truncate(self.memory_fd, MEMORY_BYTES)
        self.memory = mmap(self.memory_fd, MEMORY_BYTES)
        self.rings = (Ring(self.memory, RX), Ring(self.memory, TX))
        self.packets: list[tuple[Header, bytes]] = []
        self.forwarded: dict[tuple[int, int], int] = {}
        self.posted = 0
        self.repost = True
        self._tx_slot = 0

    # -- vhost-user

    def send(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1):
        raw = struct.pack("<III", request, flags, len(payload)) + payload
        socket.send_fds(self.sock, [raw], list(fds))
        self.turn()

    def ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 1):
        self.send(request, payload, fds, flags)
        raw = self.sock.recv(4096)
        assert struct.unpack_from("<III", raw) == (request, 5, len(raw) - 12)
        return raw[12:]

    def ask_number(self, request: int, payload: bytes = b"") -> int:
        return struct.unpack("<Q", self.ask(request, payload))[0]

    def region(self) -> bytes:
        return struct.pack("<QQQQ", GUEST_BASE, MEMORY_BYTES, USER_BASE, 0)

    def negotiate(self, *, protocol: bool = True) -> None:
        self.send(3)
        features = self.ask_number(1)
        if protocol:
            self.send(16, struct.pack("<Q", self.ask_number(15)))
        else:
            features &= ~(1 << 30)
        self.send(2, struct.pack("<Q", features))

    def map(self) -> None:
        self.send(5, struct.pack("<II", 1, 0) + self.region(), (self.memory_fd,))

    def start_ring(self, ring: Ring, base: int = 0) -> None:
        at = USER_BASE
        self.send(8, struct.pack("<II", ring.index, SIZE))
        self.send(10, struct.pack("<II", ring.index, base))
        self.send(
            9,
            struct.pack(
                "<IIQQQQ", ring.index, 0, at + ring.offset, at + ring.used, at + ring.available, 0
            ),
        )
        self.send(13, struct.pack("<Q", ring.index), (ring.call,))
        self.send(12, struct.pack("<Q", ring.index), (ring.kick,))
        self.send(18, struct.pack("<II", ring.index, 1))

    def stop_ring(self, ring: Ring) -> int:
        index, base = struct.unpack("<II", self.ask(11, struct.pack("<II", ring.index, 0)))
        assert index == ring.index
        return base

    def boot(self, *, post: int = SIZE // 2) -> "FrontEnd":
        """Negotiate, map, start both rings and post receive buffers: a driver has loaded."""
        self.negotiate()
        self.map()
        self.load_driver(post=post)
        return self

    def load_driver(self, *, post: int = SIZE // 2) -> None:
        self.posted = self._tx_slot = 0
        for ring in self.rings:
            ring.reset()
            self.start_ring(ring)
        self.post(post)

    def close(self) -> None:
        self.sock.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()
        os.close(self.memory_fd)

    # -- the driver

    def post(self, count: int) -> None:
        """Post receive buffers as Linux 6.1 does: a descriptor for the header, one for the data."""
        rx = self.rings[RX]
        for _ in range(count):
            slot = self.posted % (SIZE // 2)
            address = GUEST_BASE + BUFFERS + slot * 0x2000
            rx.describe(2 * slot, address, 44, NEXT | WRITE, 2 * slot + 1)
            rx.describe(2 * slot + 1, address + 64, 4096, WRITE)
            rx.publish(2 * slot)
            self.posted += 1

    def transmit(self, header: Header, data: bytes = b"") -> None:
        tx = self.rings[TX]
        slot = self._tx_slot % (SIZE // 2)
        self._tx_slot += 1
        offset = BUFFERS + 0x10_0000 + slot * 0x1_1000
        raw = header.pack() + data
        self.memory[offset : offset + len(raw)] = raw
        tx.describe(2 * slot, GUEST_BASE + offset, 44, NEXT if data else 0, 2 * slot + 1)
        if data:
            tx.describe(2 * slot + 1, GUEST_BASE + offset + 44, len(data))
        tx.publish(2 * slot)

    def say(
        self, op: int, guest_port: int, host_port: int, data: bytes = b"", **fields: int
    ) -> None:
        """Send a packet and let the device serve it."""
        values = {
            "length": len(data),
            "buf_alloc": BUFFER_ALLOC,
            "fwd_cnt": self.forwarded.get((guest_port, host_port), 0),
        } | fields
        self.transmit(
            Header(
                src_cid=values.pop("src_cid", CID),
                dst_cid=values.pop("dst_cid", 2),
                src_port=guest_port,
                dst_port=host_port,
                op=op,
                **values,
            ),
            data,
        )
        self.turn()

    def collect(self) -> list[tuple[Header, bytes]]:
        """Return what came since the last time, account for it, and post the buffers again."""
        self.turn()
        fresh = []
        for head, length in self.rings[RX].take_used():
            offset = BUFFERS + (head // 2) * 0x2000
            header = Header._make(struct.unpack_from("<QQIIIHHIII", self.memory, offset))
            data = self.memory[offset + 64 : offset + 64 + length - 44]
            assert len(data) == header.length
            key = header.dst_port, header.src_port
            self.forwarded[key] = (self.forwarded.get(key, 0) + len(data)) & 0xFFFFFFFF
            fresh.append((header, data))
            if self.repost:
                self.post(1)
        self.packets += fresh
        return fresh

    def ops(self) -> list[int]:
        return [header.op for header, _ in self.collect()]

    def expect(self, op: int) -> Header:
        """Return the only packet that came."""
        fresh = self.collect()
        assert [header.op for header, _ in fresh] == [op], fresh
        return fresh[0][0]

    def receive(self, count: int, *, update: Callable[[Header], None] | None = None) -> bytes:
        """Collect data packets until ``count`` bytes came; ``update`` sees each header."""
        data = b""
        while len(data) < count:
            fresh = self.collect()
            assert fresh, f"only {len(data)} of {count} bytes came"
            for header, payload in fresh:
                assert header.op in (OP_RW, 6, 7), header
                data += payload
                if update is not None:
                    update(header)
        return data


class Bench:
    """A device, driven by hand in this thread, with host peers and front-ends around it."""

    def __init__(self, directory: Path, **limits: float) -> None:
        self.uds = directory / "v"
        self.socket = directory / "s"
        self.settings = Settings(
            socket_path=str(self.socket),
            uds_path=str(self.uds),
            cid=CID,
            limits=Limits(**limits),  # type: ignore[arg-type]
        )
        self.device = Device(self.settings)
        self.open: list[FrontEnd | socket.socket] = []

    def turn(self) -> None:
        """Let the device serve until it has nothing more to do."""
        quiet = 0
        while quiet < 2:
            quiet = 0 if self.device.turn(block=False) else quiet + 1

    def wait(self, sock: socket.socket) -> None:
        """Run the device, timers and all, until ``sock`` can be read."""
        for _ in range(1000):
            if select.select([sock], [], [], 0)[0]:
                return
            self.device.turn(block=True)
        raise AssertionError("nothing came")

    def front_end(self, *, boot: bool = True) -> FrontEnd:
        front_end = FrontEnd(self.socket, self.turn)
        self.open.append(front_end)
        self.turn()
        return front_end.boot() if boot else front_end

    def listen(self, port: int, backlog: int = 64) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(f"{self.uds}_{port}")
        sock.listen(backlog)
        sock.settimeout(0)
        self.open.append(sock)
        return sock

    def accept(self, listener: socket.socket) -> socket.socket:
        sock, _ = listener.accept()
        return self._keep(sock)

    def peer(self, line: bytes = b"") -> socket.socket:
        """Connect a host peer, and let it send ``line``."""
        sock = self._keep(socket.socket(socket.AF_UNIX))
        sock.connect(str(self.uds))
        if line:
            sock.sendall(line)
        self.turn()
        return sock

    def dial_guest(self, guest: FrontEnd, port: int) -> tuple[socket.socket, int]:
        """Connect a host peer to a port where the guest accepts; return it and its host port."""
        sock = self.peer(b"CONNECT %d\n" % port)
        request = guest.expect(1)
        assert (request.dst_port, request.dst_cid, request.src_cid) == (port, CID, 2)
        guest.say(2, port, request.src_port)
        assert sock.recv(64) == b"OK %d\n" % request.src_port
        return sock, request.src_port

    def dial_host(self, guest: FrontEnd, port: int, guest_port: int = 7000) -> socket.socket:
        """Let the guest connect to a listener of the host; return the host's end."""
        listener = self.listen(port)
        guest.say(1, guest_port, port)
        guest.expect(2)
        return self.accept(listener)

    def fill(self, peer: socket.socket) -> int:
        """Send from a host peer until nobody takes more; return how many bytes went."""
        sent = 0
        while True:
            try:
                sent += peer.send(bytes(65536))
            except BlockingIOError:
                return sent

    def close(self) -> None:
        self.device.close()
        assert not self.device._loop._handlers
        assert not len(self.device._switchboard)
        for resource in self.open:
            resource.close()
        assert not self.uds.exists()
        assert not self.socket.exists()

    def _keep(self, sock: socket.socket) -> socket.socket:
        sock.setblocking(False)
        self.open.append(sock)
        return sock


@contextmanager
def bench(directory: Path, **limits: float) -> Iterator[Bench]:
    made = Bench(directory, **limits)
    try:
        yield made
    finally:
        made.close()


__all__ = ("CID", "OP_RST", "Bench", "FrontEnd", "Ring", "bench")
