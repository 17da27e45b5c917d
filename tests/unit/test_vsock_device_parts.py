"""The pure parts of the vsock device: packets, memory, rings, credit, the CONNECT line."""

import contextlib
import itertools
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsock.device.connections import Connection, ConnectionTable, State, Window
from vsock.device.hybrid import parse_connect
from vsock.device.line import Limits
from vsock.device.memory import GuestMemory, MemoryFault, Region, RegionAddress
from vsock.device.packet import HEADER_BYTES, OP_RST, OP_RW, Header, drop, take
from vsock.device.vhost_user import ChannelError, Message
from vsock.device.virtqueue import RingAddress, Virtqueue, VirtqueueError

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
HEADERS = st.builds(
    Header,
    src_cid=U64, dst_cid=U64, src_port=U32, dst_port=U32, length=U32,
    type=U16, op=U16, flags=U32, buf_alloc=U32, fwd_cnt=U32,
)  # fmt: skip


def scatter(raw: bytearray, cuts: list[int]) -> list[memoryview]:
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    return [memoryview(raw)[low:high] for low, high in itertools.pairwise(edges)]


class TestPacket:
    @given(HEADERS, st.lists(st.integers(0, 60), max_size=4), st.binary(max_size=20))
    def test_round_trip_however_scattered(self, header: Header, cuts: list[int], rest: bytes):
        raw = bytearray(header.pack() + rest)
        assert len(header.pack()) == HEADER_BYTES == 44
        assert Header.parse(scatter(raw, cuts)) == header
        target = bytearray(len(raw))
        header.pack_into(scatter(target, cuts) if cuts else [memoryview(target)])
        assert target[:44] == raw[:44]
        assert not any(target[44:])

    @given(st.binary(max_size=43), st.lists(st.integers(0, 43), max_size=3))
    def test_short_is_no_header(self, raw: bytes, cuts: list[int]):
        assert Header.parse(scatter(bytearray(raw), cuts)) is None

    def test_layout_is_that_of_the_kernel_header(self):
        header = Header(1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
        assert header.pack() == struct.pack("<QQIIIHHIII", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)

    @given(HEADERS)
    def test_reset_goes_back_where_it_came_from(self, header: Header):
        reset = header.reset()
        assert (reset.op, reset.type, reset.length) == (OP_RST, header.type, 0)
        assert (reset.src_cid, reset.src_port) == (header.dst_cid, header.dst_port)
        assert (reset.dst_cid, reset.dst_port) == (header.src_cid, header.src_port)

    @given(st.binary(max_size=40), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 50))
    def test_take_and_drop_split(self, raw: bytes, cuts: list[int], at: int):
        views = scatter(bytearray(raw), cuts)
        assert b"".join(take(views, at)) == raw[:at]
        assert b"".join(drop(views, at)) == raw[at:]


def region(guest: int, size: int, *, user: int | None = None, readonly: bool = False) -> Region:
    where = RegionAddress(
        guest_address=guest,
        size_bytes=size,
        user_address=guest + 0x7000_0000 if user is None else user,
        file_offset_bytes=0,
    )
    raw = bytearray(size)
    return Region(where=where, view=memoryview(bytes(raw) if readonly else raw))


class TestMemory:
    def test_translates_both_kinds_of_address(self):
        memory = GuestMemory([region(0x1000, 0x1000)])
        memory.guest(0x1010, 4, write=True)[0][:] = b"abcd"
        assert bytes(memory.user(0x7000_1010, 4)) == b"abcd"

    def test_crosses_into_an_adjacent_region_only(self):
        memory = GuestMemory(
            [region(0x3000, 0x1000), region(0x1000, 0x1000), region(0x2000, 0x1000)]
        )
        views = memory.guest(0x1FF0, 0x1020, write=False)
        assert [len(view) for view in views] == [0x10, 0x1000, 0x10]
        with pytest.raises(MemoryFault):
            GuestMemory([region(0, 0x1000), region(0x2000, 0x1000)]).guest(0xFFF, 2, write=False)

    @given(st.integers(0, 1 << 64), st.integers(1, 1 << 32), st.booleans())
    def test_never_more_nor_less_than_asked(self, address: int, length: int, write: bool):
        memory = GuestMemory([region(0x1000, 0x1000), region(0x2000, 0x800), region(0x4000, 0x10)])
        inside = any(
            low <= address and address + length <= high
            for low, high in ((0x1000, 0x2800), (0x4000, 0x4010))
        )
        try:
            views = memory.guest(address, length, write=write)
        except MemoryFault:
            assert not inside
        else:
            assert inside
            assert sum(map(len, views)) == length

    def test_read_only_memory_is_read_only(self):
        memory = GuestMemory([region(0x1000, 0x1000, readonly=True)])
        assert memory.guest(0x1000, 8, write=False)
        with pytest.raises(MemoryFault, match="read-only"):
            memory.guest(0x1000, 8, write=True)
        with pytest.raises(MemoryFault):
            memory.user(0x7000_1000, 8)

    def test_overlap_and_wrap_are_refused(self):
        with pytest.raises(ValueError, match="overlap"):
            GuestMemory([region(0x1000, 0x1001), region(0x2000, 0x1000)])
        with pytest.raises(ValueError, match="wraps"):
            RegionAddress(
                guest_address=(1 << 64) - 1, size_bytes=2, user_address=0, file_offset_bytes=0
            )

    def test_maps_a_read_only_file(self, tmp_path):
        path = tmp_path / "pmem"
        path.write_bytes(b"x" * 8192)
        where = RegionAddress(
            guest_address=0, size_bytes=4096, user_address=0, file_offset_bytes=4096
        )
        fd = os.open(path, os.O_RDONLY)
        try:
            mapped = Region.map(where, fd)
        finally:
            os.close(fd)
        assert mapped.view.readonly
        assert len(mapped.view) == 4096

    def test_a_file_too_short_is_refused(self, tmp_path):
        where = RegionAddress(
            guest_address=0, size_bytes=1 << 40, user_address=0, file_offset_bytes=0
        )
        with open(tmp_path / "short", "w+b") as file:
            file.truncate(4096)
            with pytest.raises((ValueError, OSError)):
                Region.map(where, file.fileno())


NEXT, WRITE, INDIRECT = 1, 2, 4
SIZE = 8


class Driver:
    """A ring of 8 in fake memory: descriptors at 0, available at 0x100, used at 0x200."""

    def __init__(self, *, base: int = 0) -> None:
        where = RegionAddress(
            guest_address=0, size_bytes=0x4000, user_address=0, file_offset_bytes=0
        )
        self.raw = bytearray(0x4000)
        self.memory = GuestMemory([Region(where=where, view=memoryview(self.raw))])
        struct.pack_into("<H", self.raw, 0x102, base)
        struct.pack_into("<H", self.raw, 0x202, base)
        self.base = base
        self.queue = Virtqueue(
            self.memory,
            RingAddress(descriptors=0, available=0x100, used=0x200),
            size=SIZE,
            next_available=base,
        )

    def describe(self, slot: int, address: int, length: int, flags: int = 0, following: int = 0):
        struct.pack_into("<QIHH", self.raw, 16 * slot, address, length, flags, following)

    def publish(self, *heads: int) -> None:
        for head in heads:
            struct.pack_into("<H", self.raw, 0x104 + 2 * (self.base % SIZE), head)
            self.base = (self.base + 1) & 0xFFFF
        struct.pack_into("<H", self.raw, 0x102, self.base)

    def used(self) -> tuple[int, list[tuple[int, int]]]:
        index = struct.unpack_from("<H", self.raw, 0x202)[0]
        return index, [
            struct.unpack_from("<II", self.raw, 0x204 + 8 * slot) for slot in range(SIZE)
        ]


class TestVirtqueue:
    def test_a_chain_read_and_given_back(self):
        driver = Driver()
        driver.raw[0x1000:0x1008] = b"headdata"
        driver.describe(0, 0x1000, 4, NEXT, 3)
        driver.describe(3, 0x1004, 4, NEXT, 1)
        driver.describe(1, 0x2000, 16, WRITE)
        driver.publish(0)
        (chain,) = driver.queue.peek(4)
        assert b"".join(chain.readable) == b"headdata"
        assert (chain.head, chain.writable_bytes) == (0, 16)
        chain.writable[0][:2] = b"ok"
        driver.queue.complete((2,))
        assert driver.used()[0] == 1
        assert driver.used()[1][0] == (0, 2)
        assert driver.raw[0x2000:0x2002] == b"ok"
        assert driver.queue.peek(4) == []
        assert driver.queue.next_available == 1

    def test_peeking_takes_nothing_and_reads_each_chain_once(self):
        driver = Driver()
        driver.describe(0, 0x1000, 64, WRITE)
        driver.publish(0)
        first = driver.queue.peek(1)
        driver.describe(0, 0xFFFF_0000, 64, WRITE)
        assert driver.queue.peek(1) == first
        assert driver.queue.pending() == 1

    def test_indices_wrap(self):
        driver = Driver(base=0xFFFE)
        for slot in range(4):
            driver.describe(slot, 0x1000 + 64 * slot, 64, WRITE)
        driver.publish(0, 1, 2, 3)
        assert [chain.head for chain in driver.queue.peek(9)] == [0, 1, 2, 3]
        driver.queue.complete((1, 2, 3, 4))
        assert driver.used()[0] == 2
        assert driver.queue.next_available == 2

    def test_an_indirect_table(self):
        driver = Driver()
        struct.pack_into("<QIHH", driver.raw, 0x3000, 0x1000, 44, NEXT | WRITE, 1)
        struct.pack_into("<QIHH", driver.raw, 0x3010, 0x1100, 100, WRITE, 0)
        driver.describe(5, 0x3000, 32, INDIRECT)
        driver.publish(5)
        (chain,) = driver.queue.peek(1)
        assert (chain.head, chain.writable_bytes, len(chain.writable)) == (5, 144, 2)

    @pytest.mark.parametrize(
        ("descriptors", "reason"),
        [
            ({0: (0x1000, 4, NEXT, 0)}, "loop"),
            ({0: (0x1000, 4, NEXT, 1), 1: (0x1000, 4, NEXT, 0)}, "loop"),
            ({0: (0x1000, 4, NEXT, 8)}, "outside its table"),
            ({0: (0x1000, 4, NEXT, 65535)}, "outside its table"),
            ({0: (0x3FFF, 2, 0, 0)}, "no guest memory"),
            ({0: ((1 << 64) - 1, 0xFFFFFFFF, 0, 0)}, "no guest memory"),
            ({0: (0x1000, 4, WRITE | NEXT, 1), 1: (0x1000, 4, 0, 0)}, "to read follows"),
            ({0: (0x3000, 15, INDIRECT, 0)}, "indirect table of 15 bytes"),
            ({0: (0x3000, 0, INDIRECT, 0)}, "indirect table of 0 bytes"),
            ({0: (0x3000, 16 * 9, INDIRECT, 0)}, "indirect table of 144 bytes"),
            ({0: (0x3FF8, 16, INDIRECT, 0)}, "no guest memory"),
            ({0: (0x3000, 16, INDIRECT | NEXT, 1)}, "nested or chained"),
            # The table at 0x40 is that of descriptor 4, itself indirect.
            ({0: (0x40, 16, INDIRECT, 0), 4: (0x40, 16, INDIRECT, 0)}, "nested or chained"),
        ],
    )
    def test_malicious_chains_are_refused(self, descriptors, reason):
        driver = Driver()
        for slot, fields in descriptors.items():
            driver.describe(slot, *fields)
        driver.publish(0)
        with pytest.raises(VirtqueueError, match=reason):
            driver.queue.peek(1)

    def test_a_head_out_of_range(self):
        driver = Driver()
        driver.publish(8)
        with pytest.raises(VirtqueueError, match="outside its table of 8"):
            driver.queue.peek(1)

    @pytest.mark.parametrize("index", [9, 0x8000, 0xFFFF])
    def test_an_absurd_available_index(self, index):
        driver = Driver()
        struct.pack_into("<H", driver.raw, 0x102, index)
        with pytest.raises(VirtqueueError, match="the ring holds 8"):
            driver.queue.pending()

    def test_a_ring_outside_memory(self):
        driver = Driver()
        for address in (
            RingAddress(descriptors=0x3FF0, available=0x100, used=0x200),
            RingAddress(descriptors=0, available=0x3FFE, used=0x200),
            RingAddress(descriptors=0, available=0x100, used=1 << 63),
        ):
            with pytest.raises(MemoryFault):
                Virtqueue(driver.memory, address, size=SIZE, next_available=0)

    @pytest.mark.parametrize("size", [0, 3, 65536, -8])
    def test_an_impossible_size(self, size):
        with pytest.raises(ValueError, match="power of two"):
            Virtqueue(
                Driver().memory,
                RingAddress(descriptors=0, available=0x100, used=0x200),
                size=size,
                next_available=0,
            )

    def test_notifications_obey_the_driver(self):
        driver = Driver()
        driver.describe(0, 0x1000, 64, WRITE)
        driver.publish(0, 0)
        assert not driver.queue.take_notification()
        driver.queue.peek(2)
        driver.queue.complete((1,))
        assert driver.queue.take_notification()
        assert not driver.queue.take_notification()
        struct.pack_into("<H", driver.raw, 0x100, 1)
        driver.queue.complete((1,))
        assert not driver.queue.take_notification()
        driver.queue.want_kicks(False)
        assert driver.raw[0x200] == 1
        driver.queue.want_kicks(True)
        assert driver.raw[0x200] == 0

    @given(st.binary(min_size=0x300, max_size=0x300))
    def test_garbage_is_a_chain_or_an_error(self, raw: bytes):
        driver = Driver()
        driver.raw[:0x300] = raw
        try:
            chains = driver.queue.peek(SIZE)
        except VirtqueueError:
            return
        for chain in chains:
            assert sum(map(len, chain.writable)) == chain.writable_bytes
        driver.queue.complete([0] * len(chains))


class TestWindow:
    def test_sendable_follows_the_guest(self):
        window = Window(4096)
        assert window.sendable() == 0
        window.learn(Header(3, 2, 1, 1, buf_alloc=1000))
        assert window.sendable() == 1000
        window.send(600)
        assert window.sendable() == 400
        window.learn(Header(3, 2, 1, 1, buf_alloc=1000, fwd_cnt=600))
        assert window.sendable() == 1000

    def test_nonsense_from_the_guest_gives_no_credit(self):
        window = Window(4096)
        window.learn(Header(3, 2, 1, 1, buf_alloc=1000, fwd_cnt=1))
        assert window.sendable() == 0
        window.send(900)
        window.learn(Header(3, 2, 1, 1, buf_alloc=100))
        assert window.sendable() == 0

    def test_more_than_the_credit_is_refused(self):
        window = Window(4096)
        assert window.receive(4096)
        assert not window.receive(1)
        window.forward(1)
        assert window.receive(1)
        assert not window.receive(0xFFFFFFFF)

    @given(st.lists(st.tuples(st.integers(1, 70_000), st.floats(0, 1)), max_size=200))
    def test_a_guest_that_obeys_is_never_left_waiting(self, steps):
        """The guest's view, as virtio has it: it may send while it believes there is room."""
        window = Window(64 * 1024)
        window._received = window._forwarded = window._reported = 0xFFFF_0000
        sent = known = 0xFFFF_0000
        held = 0
        for size, drained in steps:
            room = 64 * 1024 - ((sent - known) & 0xFFFFFFFF)
            length = min(size, room)
            assert window.receive(length)
            sent = (sent + length) & 0xFFFFFFFF
            held += length
            out = int(held * drained)
            window.forward(out)
            held -= out
            if window.update_due():
                known = window.report()
            if not held:
                assert 64 * 1024 - ((sent - known) & 0xFFFFFFFF) > 0


class TestConnection:
    def make(self, state: State = State.ESTABLISHED) -> Connection:
        return Connection(host_port=1, guest_port=2, state=state, buffer_bytes=4096)

    def test_says_things_in_order_and_once(self):
        connection = self.make()
        for op in (4, 6, 2, 6, 7):
            connection.say(op)
        said = []
        while connection.has_unsaid:
            said.append(connection.next_unsaid())
        assert said == [2, 7, 6, 4]
        with pytest.raises(LookupError):
            connection.next_unsaid()

    def test_any_packet_carries_the_credit(self):
        connection = self.make()
        assert connection.window.receive(1024)
        connection.window.forward(1024)
        assert connection.window.update_due()
        connection.say(6)
        header = connection.header(OP_RW, cid=9, host_cid=2, length=3)
        assert (header.fwd_cnt, header.buf_alloc, header.length) == (1024, 4096, 3)
        assert (header.src_cid, header.dst_cid, header.src_port, header.dst_port) == (2, 9, 1, 2)
        assert not connection.has_unsaid
        assert not connection.window.update_due()

    def test_a_stall_ends_with_credit(self):
        connection = self.make()
        connection.stalled = True
        assert not connection.learn(Header(3, 2, 1, 1))
        assert connection.learn(Header(3, 2, 1, 1, buf_alloc=1))
        assert not connection.learn(Header(3, 2, 1, 1, buf_alloc=1))

    def test_host_ports_are_not_reused_while_in_use(self):
        table: ConnectionTable[Connection] = ConnectionTable()
        table._next_port = 0xFFFFFFFE
        for _ in range(3):
            connection = self.make()
            connection.host_port = table.choose_host_port(2)
            table.add(connection)
        assert [connection.host_port for connection in table] == [
            0xFFFFFFFE,
            1 << 30,
            (1 << 30) + 1,
        ]
        table._next_port = 0xFFFFFFFE
        assert table.choose_host_port(2) == (1 << 30) + 2
        table._next_port = 0xFFFFFFFE
        assert table.choose_host_port(3) == 0xFFFFFFFE


class TestConnectLine:
    @pytest.mark.parametrize(
        ("line", "port"),
        [(b"CONNECT 52\n", 52), (b"connect 0\r\n", 0), (b"Connect  4294967294 \n", 4294967294)],
    )
    def test_good(self, line, port):
        assert parse_connect(line) == port

    @pytest.mark.parametrize(
        "line",
        [b"", b"\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 1 2\n", b"GET 1\n",
         b"CONNECT 4294967295\n", b"CONNECT 99999999999999999\n", b"CONNECT \xb2\n",
         b"CONNECT 0x1\n"],
    )  # fmt: skip
    def test_bad(self, line):
        with pytest.raises(ValueError, match=r"expected|range"):
            parse_connect(line)

    @given(st.binary(max_size=40))
    def test_garbage(self, line: bytes):
        with contextlib.suppress(ValueError):
            assert 0 <= parse_connect(line) < 0xFFFFFFFF


class TestMessages:
    @given(st.integers(0, 50), st.binary(max_size=300))
    def test_garbage_payloads_are_refused_or_mean_something(self, request: int, payload: bytes):
        message = Message(request=request, flags=1, payload=payload)
        for read in (
            message.number, message.vring_state, message.vring_fd, message.vring_address,
            message.memory_table, message.memory_region, message.config_range, message.take_fd,
        ):  # fmt: skip
            try:
                read()
            except (ChannelError, ValueError):
                continue

    def test_limits_are_checked(self):
        for bad in ({"connections": 0}, {"buffer_bytes": 1}, {"answer_seconds": 0}):
            with pytest.raises(ValueError, match="limits"):
                Limits(**bad)
