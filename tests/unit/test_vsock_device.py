"""The whole vsock device without a virtual machine: a simulated front-end and guest driver."""

import contextlib
import os
import socket
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.beds.vsock_frontend import (
    BUFFERS,
    CID,
    GUEST_BASE,
    INDIRECT,
    MEMORY_BYTES,
    NEXT,
    RX,
    SIZE,
    TX,
    USER_BASE,
    WRITE,
    Bench,
    FrontEnd,
    bench,
)
from vsock.device.packet import (
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    Header,
)


@pytest.fixture
def device(tmp_path):
    with bench(tmp_path) as made:
        yield made


@pytest.fixture
def guest(device: Bench) -> FrontEnd:
    return device.front_end()


def gone(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
    except BlockingIOError:
        return False


class TestDial:
    def test_host_reaches_guest(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        peer.sendall(b"hello")
        ((header, data),) = guest.collect()
        assert (header.op, header.src_port, header.dst_port, data) == (OP_RW, port, 52, b"hello")
        guest.say(OP_RW, 52, port, b"world")
        assert peer.recv(64) == b"world"

    def test_bytes_after_the_line_are_kept(self, device, guest):
        peer = device.peer(b"CONNECT 52\nearly")
        port = guest.expect(OP_REQUEST).src_port
        guest.say(OP_RESPONSE, 52, port)
        assert peer.recv(64).startswith(b"OK ")
        assert guest.receive(5) == b"early"

    def test_the_line_may_come_byte_by_byte(self, device, guest):
        peer = device.peer()
        for byte in b"CONNECT 7\n":
            assert guest.collect() == []
            peer.sendall(bytes([byte]))
        assert guest.expect(OP_REQUEST).dst_port == 7

    @pytest.mark.parametrize("line", [b"HELLO\n", b"CONNECT x\n", b"C" * 32, b"\n"])
    def test_another_line_is_the_end(self, device, guest, line):
        peer = device.peer(line)
        assert gone(peer)
        assert guest.collect() == []

    def test_guest_refuses(self, device, guest):
        peer = device.peer(b"CONNECT 52\n")
        guest.say(OP_RST, 52, guest.expect(OP_REQUEST).src_port)
        assert gone(peer)

    def test_host_peer_gives_up_first(self, device, guest):
        peer = device.peer(b"CONNECT 52\n")
        port = guest.expect(OP_REQUEST).src_port
        peer.close()
        assert guest.expect(OP_RST).src_port == port

    def test_guest_reaches_host(self, device, guest):
        listener = device.listen(80)
        guest.say(OP_REQUEST, 7000, 80)
        answer = guest.expect(OP_RESPONSE)
        assert (answer.src_port, answer.dst_port, answer.fwd_cnt) == (80, 7000, 0)
        assert answer.buf_alloc == 256 * 1024
        peer = device.accept(listener)
        guest.say(OP_RW, 7000, 80, b"ping")
        assert peer.recv(64) == b"ping"
        peer.sendall(b"pong")
        assert guest.receive(4) == b"pong"

    def test_request_to_host_port_without_listener_is_reset(self, device, guest):
        guest.say(OP_REQUEST, 7000, 80)
        reset = guest.expect(OP_RST)
        assert (reset.src_port, reset.dst_port) == (80, 7000)
        device.listen(81).close()
        guest.say(OP_REQUEST, 7000, 81)
        guest.expect(OP_RST)

    def test_a_listener_with_a_full_queue_is_waited_for(self, device, guest):
        listener = device.listen(80, backlog=0)
        for port in (7000, 7001):
            guest.say(OP_REQUEST, port, 80)
        assert guest.ops() == [OP_RESPONSE]
        first = device.accept(listener)
        device.wait(listener)
        assert guest.ops() == [OP_RESPONSE]
        device.accept(listener)
        assert not gone(first)

    def test_a_busy_listener_is_not_waited_for_for_ever(self, tmp_path):
        with bench(tmp_path, answer_seconds=0.03) as device:
            guest = device.front_end()
            device.listen(80, backlog=0)
            for port in (7000, 7001):
                guest.say(OP_REQUEST, port, 80)
            assert guest.ops() == [OP_RESPONSE]
            while not (ops := guest.ops()):
                device.device.turn(block=True)
            assert ops == [OP_RST]

    def test_a_reused_guest_port_replaces_the_old_connection(self, device, guest):
        old = device.dial_host(guest, 80)
        os.unlink(f"{device.uds}_80")
        new = device.dial_host(guest, 80)
        assert gone(old)
        guest.say(OP_RW, 7000, 80, b"x")
        assert new.recv(4) == b"x"

    def test_dials_wait_for_the_driver(self, device):
        peer = device.peer(b"CONNECT 52\n")
        guest = device.front_end()
        guest.say(OP_RESPONSE, 52, guest.expect(OP_REQUEST).src_port)
        assert peer.recv(64).startswith(b"OK ")

    @pytest.mark.parametrize("limit", ["handshake_seconds", "answer_seconds"])
    def test_deadlines(self, tmp_path, limit):
        with bench(tmp_path, **{limit: 0.02}) as device:
            guest = device.front_end()
            peer = device.peer(b"CONNECT " if limit == "handshake_seconds" else b"CONNECT 5\n")
            device.wait(peer)
            assert gone(peer)
            assert guest.ops() == ([] if limit == "handshake_seconds" else [OP_REQUEST, OP_RST])

    def test_200_at_once(self, device, guest):
        peers = [device.peer(b"CONNECT %d\n" % (1000 + n)) for n in range(200)]
        requests = []
        while len(requests) < 200:
            requests += [header for header, _ in guest.collect()]
        for header in requests:
            guest.say(OP_RESPONSE, header.dst_port, header.src_port)
        for n, peer in enumerate(peers):
            assert peer.recv(64).startswith(b"OK ")
            peer.sendall(b"%03d" % n)
        came = {}
        while len(came) < 200:
            came |= {header.dst_port - 1000: data for header, data in guest.collect()}
        assert came == {n: b"%03d" % n for n in range(200)}

    def test_the_limit_of_connections(self, tmp_path):
        with bench(tmp_path, connections=2) as device:
            guest = device.front_end()
            listener = device.listen(80)
            for port in (1, 2, 3):
                guest.say(OP_REQUEST, port, 80)
            assert guest.ops() == [OP_RESPONSE, OP_RESPONSE, OP_RST] or guest.packets[0][0].op == 3
            assert gone(device.peer())
            device.accept(listener).close()
            assert guest.expect(OP_SHUTDOWN).flags == SHUTDOWN_BOTH
            guest.say(OP_RST, 1, 80)
            device.dial_guest(guest, 9)


class TestEnds:
    def test_host_half_closes(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        peer.sendall(b"last")
        peer.shutdown(socket.SHUT_WR)
        fresh = guest.collect()
        assert [(header.op, header.flags) for header, _ in fresh] == [
            (OP_RW, 0),
            (OP_SHUTDOWN, SHUTDOWN_SEND),
        ]
        guest.say(OP_RW, 52, port, b"still here")
        assert peer.recv(64) == b"still here"
        guest.say(OP_SHUTDOWN, 52, port, flags=SHUTDOWN_BOTH)
        guest.expect(OP_RST)
        assert gone(peer)

    def test_guest_half_closes(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        guest.say(OP_RW, 52, port, b"last")
        guest.say(OP_SHUTDOWN, 52, port, flags=SHUTDOWN_SEND)
        assert peer.recv(64) == b"last"
        assert gone(peer)
        peer.sendall(b"still here")
        assert guest.receive(10) == b"still here"
        peer.close()
        assert guest.expect(OP_SHUTDOWN).flags == SHUTDOWN_BOTH
        guest.say(OP_RST, 52, port)
        guest.say(OP_RW, 52, port, b"x")
        guest.expect(OP_RST)

    def test_guest_stops_receiving(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        guest.say(OP_SHUTDOWN, 52, port, flags=SHUTDOWN_RECEIVE)
        with pytest.raises(BrokenPipeError):
            peer.sendall(b"x")
        guest.say(OP_RW, 52, port, b"out")
        assert peer.recv(64) == b"out"
        peer.close()
        assert guest.expect(OP_SHUTDOWN).flags == SHUTDOWN_BOTH

    def test_guest_stops_receiving_from_a_host_peer_that_is_gone(self, device, guest):
        peer = device.peer(b"CONNECT 52\n")
        port = guest.expect(OP_REQUEST).src_port
        guest.say(OP_RESPONSE, 52, port, buf_alloc=0)
        peer.recv(64)
        peer.sendall(b"never read for want of credit")
        peer.close()
        assert guest.ops() == [OP_CREDIT_REQUEST]
        guest.say(OP_SHUTDOWN, 52, port, flags=SHUTDOWN_RECEIVE)
        assert guest.expect(OP_SHUTDOWN).flags == SHUTDOWN_BOTH

    def test_host_stops_receiving(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        peer.shutdown(socket.SHUT_RD)
        guest.say(OP_RW, 52, port, b"unread")
        assert guest.expect(OP_SHUTDOWN).flags == SHUTDOWN_RECEIVE
        peer.sendall(b"out")
        assert guest.receive(3) == b"out"

    def test_host_closes_and_all_its_data_arrives(self, device, guest):
        peer, _port = device.dial_guest(guest, 52)
        payload = os.urandom(100_000)
        peer.sendall(payload)
        peer.close()
        data, last = b"", None
        while last is None:
            for header, part in guest.collect():
                data += part
                last = header if header.op == OP_SHUTDOWN else None
        assert data == payload
        assert last.flags == SHUTDOWN_BOTH

    def test_guest_that_does_not_answer_the_close(self, tmp_path):
        with bench(tmp_path, close_seconds=0.02) as device:
            guest = device.front_end()
            peer, _port = device.dial_guest(guest, 52)
            peer.close()
            guest.expect(OP_SHUTDOWN)
            while not (ops := guest.ops()):
                device.device.turn(block=True)
            assert ops == [OP_RST]

    def test_guest_closes_and_all_its_data_arrives(self, device, guest):
        """More than the Unix socket holds, and the guest is gone before the host reads."""
        peer, port = device.dial_guest(guest, 52)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        payload = os.urandom(256 * 1024)
        for at in range(0, len(payload), 0x8000):
            guest.say(OP_RW, 52, port, payload[at : at + 0x8000])
        guest.say(OP_SHUTDOWN, 52, port, flags=SHUTDOWN_BOTH)
        guest.collect()
        assert guest.packets[-1][0].op == OP_RST
        data = b""
        while part := peer.recv(1 << 20):
            data += part
            device.turn()
        assert data == payload
        assert len(device.device._switchboard) == 0

    def test_guest_resets(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        guest.say(OP_RST, 52, port)
        assert gone(peer)
        assert guest.collect() == []

    def test_host_peer_dies_with_data_unread(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        guest.say(OP_RW, 52, port, b"unread")
        peer.close()
        assert guest.expect(OP_SHUTDOWN).flags == SHUTDOWN_BOTH
        for _ in range(20):
            guest.say(OP_RW, 52, port, b"x" * 0x8000)
        assert set(guest.ops()) == {OP_CREDIT_UPDATE}
        guest.say(OP_RST, 52, port)
        device.dial_guest(guest, 53)


class TestCredit:
    def test_no_more_than_the_guest_has_room_for(self, device, guest):
        peer = device.peer(b"CONNECT 52\n")
        port = guest.expect(OP_REQUEST).src_port
        guest.say(OP_RESPONSE, 52, port, buf_alloc=6000)
        peer.recv(64)
        peer.sendall(b"x" * 10_000)
        fresh = guest.collect()
        assert sum(len(data) for _, data in fresh) == 6000
        assert fresh[-1][0].op == OP_CREDIT_REQUEST
        assert guest.collect() == []
        guest.say(OP_CREDIT_UPDATE, 52, port, buf_alloc=6000, fwd_cnt=1000)
        assert sum(len(data) for _, data in guest.collect()) == 1000
        guest.say(OP_CREDIT_UPDATE, 52, port, buf_alloc=6000, fwd_cnt=7000)
        assert sum(len(data) for _, data in guest.collect()) == 3000

    def test_backpressure_reaches_the_host_peer(self, device, guest):
        peer = device.peer(b"CONNECT 52\n")
        port = guest.expect(OP_REQUEST).src_port
        guest.say(OP_RESPONSE, 52, port, buf_alloc=4096)
        peer.recv(64)
        first = device.fill(peer)
        device.turn()
        # Past the 4096 bytes of credit the device reads nothing, and the peer has to wait.
        assert device.fill(peer) <= 65536 < first

    def test_buffers_run_out_and_come_back(self, device):
        guest = device.front_end(boot=False).boot(post=2)
        guest.repost = False
        peer = device.peer(b"CONNECT 52\n")
        guest.say(OP_RESPONSE, 52, guest.expect(OP_REQUEST).src_port)
        peer.recv(64)
        assert not guest.rings[RX].kicks_wanted
        payload = os.urandom(3 * 4096 + 5)
        peer.sendall(payload)
        device.turn()
        assert guest.rings[RX].kicks_wanted
        guest.repost = True
        data = b"".join(part for _, part in guest.collect())
        guest.post(3)
        assert data + guest.receive(len(payload) - len(data)) == payload

    def test_guest_hears_of_room_again(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        guest.say(OP_RW, 52, port, b"x" * 0xFFFF)
        assert guest.collect() == []
        guest.say(OP_RW, 52, port, b"x")
        assert guest.expect(OP_CREDIT_UPDATE).fwd_cnt == 0x10000
        guest.say(OP_CREDIT_REQUEST, 52, port)
        assert guest.expect(OP_CREDIT_UPDATE).buf_alloc == 256 * 1024
        assert len(peer.recv(1 << 20)) == 0x10000

    def test_a_slow_host_peer_gets_everything(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        payload = os.urandom(2 << 20)
        data, sent, known = b"", 0, 0
        while len(data) < len(payload):
            while (room := min(0x8000, len(payload) - sent, 256 * 1024 - (sent - known))) > 0:
                guest.say(OP_RW, 52, port, payload[sent : sent + room])
                sent += room
                for header, _ in guest.collect():
                    known = header.fwd_cnt
            data += peer.recv(70_000)
            for header, _ in guest.collect():
                known = header.fwd_cnt
        assert data == payload

    def test_a_guest_that_exceeds_its_credit_is_reset(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        for _ in range(40):
            guest.say(OP_RW, 52, port, b"x" * 0x8000)
        assert OP_RST in guest.ops()
        assert len(device.device._switchboard) == 1  # the host may still read what had come
        while peer.recv(1 << 20):
            device.turn()

    def test_everyone_gets_a_turn(self, device, guest):
        """A connection with much to send does not keep another from sending a little."""
        greedy, _ = device.dial_guest(guest, 1)
        modest, _ = device.dial_guest(guest, 2)
        guest.repost = False
        device.fill(greedy)
        modest.sendall(b"y")
        device.turn()
        assert 2 in {header.dst_port for header, _ in guest.collect()}

    def test_a_mebibyte_echoed(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        payload, back, sent = os.urandom(1 << 20), b"", 0
        while len(back) < len(payload):
            with contextlib.suppress(BlockingIOError):
                sent += peer.send(payload[sent:])
            for header, data in guest.collect():
                if header.op == OP_RW:
                    guest.say(OP_RW, 52, port, data)
            try:
                back += peer.recv(1 << 20)
            except BlockingIOError:
                continue
        assert back == payload


class TestHostileGuest:
    @pytest.mark.parametrize(
        "fields", [{"dst_cid": 3}, {"dst_cid": CID}, {"type": 2}, {"type": 0}, {"op": OP_RW}]
    )
    def test_packets_to_unknown_destinations_are_reset(self, device, guest, fields):
        device.listen(8)
        guest.say(**({"op": OP_REQUEST, "guest_port": 7, "host_port": 8} | fields))
        assert guest.expect(OP_RST).dst_port == 7

    def test_a_reset_is_never_answered(self, device, guest):
        guest.say(OP_RST, 7, 8)
        guest.say(OP_RST, 7, 8, dst_cid=9)
        assert guest.collect() == []

    def test_a_forged_source_is_ignored(self, device, guest):
        device.listen(80)
        guest.say(OP_REQUEST, 7, 80, src_cid=CID + 1)
        assert guest.collect() == []

    @pytest.mark.parametrize("op", [OP_REQUEST + 99, OP_RESPONSE, 0, 0xFFFF])
    def test_operations_out_of_place_end_the_connection(self, device, guest, op):
        peer, port = device.dial_guest(guest, 52)
        guest.say(op, 52, port)
        guest.expect(OP_RST)
        assert gone(peer)

    @pytest.mark.parametrize("length", [5, 0xFFFFFFFF, 300 * 1024])
    def test_a_length_that_is_not_there(self, device, guest, length):
        peer, port = device.dial_guest(guest, 52)
        guest.say(OP_RW, 52, port, b"four", length=length)
        guest.expect(OP_RST)
        assert gone(peer)

    def test_data_after_the_end(self, device, guest):
        _peer, port = device.dial_guest(guest, 52)
        guest.say(OP_SHUTDOWN, 52, port, flags=SHUTDOWN_SEND)
        guest.say(OP_RW, 52, port, b"x")
        guest.expect(OP_RST)

    def test_a_packet_shorter_than_a_header(self, device, guest):
        tx = guest.rings[TX]
        tx.describe(0, GUEST_BASE + BUFFERS, 20)
        tx.publish(0)
        device.turn()
        assert list(tx.take_used()) == [(0, 0)]
        device.dial_guest(guest, 52)

    def test_packets_stay_in_the_ring_while_resets_wait_for_buffers(self, device):
        guest = device.front_end(boot=False).boot(post=0)
        taken = 0
        for _ in range(100):
            for _ in range(SIZE // 2):
                guest.transmit(Header(CID, 2, 7, 8, op=OP_RW))
            device.turn()
            used = len(list(guest.rings[TX].take_used()))
            taken += used
            if used < SIZE // 2:
                break
        assert len(device.device._switchboard._outbox._resets) == taken == 1024
        left = SIZE // 2 - used
        answered = 0
        guest.post(16)
        while answered < taken + left:
            ops = guest.ops()
            assert ops == [OP_RST] * len(ops) != []
            answered += len(ops)

    def test_connections_that_end_unheard_leave_nothing(self, device):
        device.listen(1234)
        guest = device.front_end(boot=False).boot(post=0)
        switchboard, loop = device.device._switchboard, device.device._loop
        for port in range(2000):
            guest.say(OP_REQUEST, 10_000 + port, 1234)
            guest.say(OP_RST, 10_000 + port, 1234)
        assert len(switchboard) == 0
        outbox = switchboard._outbox
        assert (len(outbox._controls), len(outbox._ready), len(outbox._resets)) == (0, 0, 0)
        assert len(loop._timers) < 200

    def break_ring(self, guest: FrontEnd, index: int, how: str) -> None:
        ring = guest.rings[index]
        if how == "index":
            ring.set_available_index(ring.next_available + SIZE + 1)
        elif how == "address":
            flags = WRITE if index == RX else 0
            ring.describe(63, GUEST_BASE + MEMORY_BYTES - 1, 64, flags)
            ring.publish(63)
        elif how == "loop":
            flags = WRITE if index == RX else 0
            ring.describe(63, GUEST_BASE, 64, NEXT | flags, 63)
            ring.publish(63)
        elif how == "indirect":
            ring.describe(63, GUEST_BASE, 64 * 16 + 16, INDIRECT)
            ring.publish(63)
        elif how == "short":
            ring.describe(63, GUEST_BASE, 44, WRITE)
            ring.publish(63)
        guest.turn()

    @pytest.mark.parametrize("how", ["index", "address", "loop", "indirect"])
    def test_a_broken_tx_ring_stops_until_the_driver_loads_again(self, device, guest, how, caplog):
        error = os.eventfd(0, os.EFD_NONBLOCK)
        guest.send(14, struct.pack("<Q", TX), (error,))
        peer, _ = device.dial_guest(guest, 52)
        self.break_ring(guest, TX, how)
        assert "ring broken index=1" in caplog.text
        assert os.eventfd_read(error) == 1
        os.close(error)
        assert gone(peer)
        for ring in guest.rings:
            guest.stop_ring(ring)
        guest.load_driver()
        device.dial_guest(guest, 53)

    @pytest.mark.parametrize("how", ["index", "address", "loop", "short"])
    def test_a_broken_rx_ring(self, device, how, caplog):
        guest = device.front_end(boot=False).boot(post=0)
        self.break_ring(guest, RX, how)
        peer = device.peer(b"CONNECT 52\n")
        assert "ring broken index=0" in caplog.text
        peer.close()
        guest.close()
        device.open.remove(guest)
        device.turn()
        device.dial_guest(device.front_end(), 53)

    def test_buffers_of_other_shapes(self, device):
        """One descriptor for all, as Linux posts since 6.2, and an indirect table."""
        guest = device.front_end(boot=False).boot(post=0)
        rx = guest.rings[RX]
        at = GUEST_BASE + BUFFERS
        rx.describe(0, at, 44 + 1000, WRITE)
        struct.pack_into("<QIHH", guest.memory, 0x80000, at + 0x2000, 50, NEXT | WRITE, 1)
        struct.pack_into("<QIHH", guest.memory, 0x80010, at + 0x3000, 1000, WRITE, 0)
        rx.describe(1, GUEST_BASE + 0x80000, 32, INDIRECT)
        rx.publish(0)
        rx.publish(1)
        peer = device.peer(b"CONNECT 52\n")
        port = struct.unpack_from("<I", guest.memory, BUFFERS + 16)[0]
        guest.say(OP_RESPONSE, 52, port)
        peer.recv(64)
        payload = os.urandom(900)
        peer.sendall(payload)
        device.turn()
        assert [length for _, length in rx.take_used()] == [44, 44 + 900]
        came = guest.memory[BUFFERS + 0x2000 + 44 : BUFFERS + 0x2000 + 50]
        assert came + guest.memory[BUFFERS + 0x3000 : BUFFERS + 0x3000 + 894] == payload


class TestFrontEnd:
    def test_device_offers_its_features_queues_and_memory_slots(self, device):
        guest = device.front_end(boot=False)
        assert guest.ask_number(1) == 1 << 32 | 1 << 30 | 1 << 28
        assert guest.ask_number(15) == 1 << 15 | 1 << 9 | 1 << 5 | 1 << 3 | 1
        assert guest.ask_number(17) == 3
        assert guest.ask_number(36) >= 256

    def test_configuration_is_the_cid(self, device):
        guest = device.front_end(boot=False)
        for offset, size in ((0, 8), (4, 4), (0, 4)):
            head = struct.pack("<III", offset, size, 0)
            answer = guest.ask(24, head + bytes(size))
            assert answer == head + struct.pack("<Q", CID)[offset : offset + size]
        answer = guest.ask(24, struct.pack("<III", 4, 8, 0) + bytes(8))
        assert answer == struct.pack("<III", 4, 0, 0)

    def test_acknowledgements(self, device, caplog):
        guest = device.front_end(boot=False)
        guest.negotiate()
        ack = 1 | 8
        assert guest.ask(3, flags=ack) == bytes(8)
        assert guest.ask(8, struct.pack("<II", 0, 256), flags=ack) == bytes(8)
        nack = struct.pack("<Q", 1)
        assert guest.ask(8, struct.pack("<II", 0, 100), flags=ack) == nack
        assert guest.ask(8, struct.pack("<II", 9, 128), flags=ack) == nack
        assert guest.ask(2, struct.pack("<Q", 1 << 35), flags=ack) == nack
        assert guest.ask(25, struct.pack("<III", 0, 8, 0) + bytes(8), flags=ack) == nack
        assert guest.ask(99, flags=ack) == nack
        assert guest.ask(12, struct.pack("<Q", 0x100), flags=ack) == nack
        assert "request=request 99" in caplog.text
        guest.boot()
        device.dial_guest(guest, 5)

    def test_a_message_that_lacks_its_descriptor_changes_nothing(self, device):
        guest = device.front_end()
        first = os.eventfd(0)
        ack, nack = 1 | 8, struct.pack("<Q", 1)
        assert guest.ask(21, fds=(first,), flags=ack) == bytes(8)
        for request, payload in ((21, b""), (12, bytes(8)), (13, bytes(8)), (14, bytes(8))):
            assert guest.ask(request, payload, flags=ack) == nack
            assert guest.ask(request, payload, (first, first), ack) == nack
        os.close(first)
        device.dial_guest(guest, 5)

    def test_without_protocol_features_rings_are_born_enabled(self, device):
        guest = device.front_end(boot=False)
        guest.negotiate(protocol=False)
        guest.map()
        guest.load_driver()
        device.dial_guest(guest, 5)

    def test_a_disabled_ring_rests(self, device, guest):
        guest.send(18, struct.pack("<II", RX, 0))
        device.peer(b"CONNECT 5\n")
        assert guest.collect() == []
        guest.send(18, struct.pack("<II", RX, 1))
        guest.expect(OP_REQUEST)

    def test_a_guest_that_starts_afresh_knows_no_connection(self, device, guest):
        peer, _ = device.dial_guest(guest, 52)
        assert guest.stop_ring(guest.rings[RX]) == 1
        guest.stop_ring(guest.rings[TX])
        guest.load_driver()
        assert gone(peer)
        assert guest.collect() == []
        device.dial_guest(guest, 52)

    def test_a_guest_that_was_paused_keeps_its_connections(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        bases = [guest.stop_ring(ring) for ring in guest.rings]
        peer.sendall(b"meanwhile")
        assert guest.collect() == []
        guest.map()
        for ring, base in zip(guest.rings, bases, strict=True):
            guest.start_ring(ring, base)
        assert guest.receive(9) == b"meanwhile"
        guest.say(OP_RW, 52, port, b"back")
        assert peer.recv(64) == b"back"

    def test_the_owner_is_reset(self, device, guest):
        peer, _ = device.dial_guest(guest, 52)
        guest.send(4)
        assert gone(peer)
        guest.load_driver()
        device.dial_guest(guest, 52)

    def test_memory_comes_and_goes(self, device, guest):
        peer, port = device.dial_guest(guest, 52)
        ack, pad = 1 | 8, bytes(8)
        extra = struct.pack("<QQQQ", GUEST_BASE + MEMORY_BYTES, 4096, USER_BASE + MEMORY_BYTES, 0)
        with open(device.uds.parent / "pmem", "w+b") as file:
            file.truncate(4096)
            assert guest.ask(37, pad + extra, (file.fileno(),), ack) == bytes(8)
            assert guest.ask(37, pad + extra, (file.fileno(),), ack) == struct.pack("<Q", 1)
        guest.say(OP_RW, 52, port, b"mapped")
        assert peer.recv(64) == b"mapped"
        assert guest.ask(38, pad + extra, (), ack) == bytes(8)
        assert guest.ask(38, pad + extra, (), ack) == struct.pack("<Q", 1)
        peer.sendall(b"still")
        assert guest.receive(5) == b"still"

    def test_a_ring_whose_memory_goes_is_broken(self, device, guest, caplog):
        assert guest.ask(38, bytes(8) + guest.region(), (), 1 | 8) == bytes(8)
        assert "ring broken index=0" in caplog.text
        assert "ring broken index=1" in caplog.text

    def test_the_next_front_end_is_served(self, device, guest):
        peer, _ = device.dial_guest(guest, 52)
        waiting = FrontEnd(device.socket, device.turn)
        device.open.append(waiting)
        guest.close()
        device.open.remove(guest)
        device.turn()
        assert gone(peer)
        device.dial_guest(waiting.boot(), 52)

    @pytest.mark.parametrize(
        "raw",
        [
            struct.pack("<III", 1, 2, 0),
            struct.pack("<III", 1, 1, 5000),
            struct.pack("<III", 1, 5, 0),
            struct.pack("<IIIII", 11, 1, 8, 7, 0),
            struct.pack("<III", 11, 1, 0),
            struct.pack("<IIIIII", 24, 1, 12, 0, 8, 0),
        ],
    )
    def test_a_front_end_that_cannot_be_answered_is_dropped(self, device, raw):
        guest = device.front_end(boot=False)
        guest.sock.sendall(raw)
        device.turn()
        assert gone(guest.sock)
        device.dial_guest(device.front_end(), 5)

    def test_messages_may_come_byte_by_byte(self, device):
        guest = device.front_end(boot=False)
        for byte in struct.pack("<III", 1, 1, 0):
            guest.sock.sendall(bytes([byte]))
            device.turn()
        assert len(guest.sock.recv(64)) == 20

    def test_notifications(self, device, guest):
        rx, tx = guest.rings
        rx.interrupted()
        tx.interrupted()
        guest.say(OP_RST, 1, 2)
        assert tx.interrupted()
        assert tx.kicks_wanted
        assert not rx.interrupted()
        device.peer(b"CONNECT 5\n")
        assert rx.interrupted()

    def test_a_call_descriptor_may_be_a_pipe(self, device, guest):
        reader, writer = os.pipe()
        guest.send(13, struct.pack("<Q", RX), (writer,))
        os.close(writer)
        assert len(os.read(reader, 64)) == 8  # at once, lest one was missed
        device.peer(b"CONNECT 5\n")
        assert len(os.read(reader, 64)) == 8
        os.close(reader)
        device.peer(b"CONNECT 6\n")
        assert guest.ops() == [OP_REQUEST, OP_REQUEST]


SLOW = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class TestFuzz:
    def alive(self, device: Bench, guest: FrontEnd) -> None:
        guest.close()
        device.open.remove(guest)
        device.turn()
        fresh = device.front_end()
        device.dial_guest(fresh, 5)
        fresh.close()
        device.open.remove(fresh)
        device.turn()
        assert len(device.device._switchboard._table) == 0

    @SLOW
    @given(
        garbage=st.lists(
            st.tuples(st.integers(0, 2 * 0x4000 - 64), st.binary(min_size=1, max_size=64)),
            max_size=12,
        )
    )
    def test_rings_full_of_garbage(self, device, garbage):
        guest = device.front_end()
        device.peer(b"CONNECT 5\n").sendall(b"data")
        for at, raw in garbage:
            guest.memory[at : at + len(raw)] = raw
            for ring in guest.rings:
                os.eventfd_write(ring.kick, 1)
            device.turn()
        self.alive(device, guest)

    @SLOW
    @given(
        packets=st.lists(
            st.tuples(
                st.integers(0, 8), st.sampled_from([1, 2, 52]), st.sampled_from([80, 81, 1 << 30]),
                st.integers(0, 3), st.binary(max_size=100), st.sampled_from([0, 50, 1 << 18]),
                st.sampled_from([0, 7, 0xFFFFFFFF]),
            ),
            max_size=40,
        )
    )  # fmt: skip
    def test_any_order_of_packets(self, device, packets):
        guest = device.front_end()
        listener = device.listen(80)
        peer = device.peer(b"CONNECT 52\n")
        peer.sendall(b"y" * 1000)
        for op, guest_port, host_port, flags, data, room, forwarded in packets:
            guest.say(op, guest_port, host_port, data, flags=flags, buf_alloc=room,
                      fwd_cnt=forwarded)  # fmt: skip
            guest.collect()
        listener.close()
        os.unlink(f"{device.uds}_80")
        self.alive(device, guest)

    @SLOW
    @given(
        messages=st.lists(
            st.tuples(
                st.integers(1, 40), st.sampled_from([1, 9]),
                st.one_of(
                    st.binary(max_size=64),
                    st.builds(
                        struct.Struct("<IIQQQQ").pack, st.integers(0, 3), st.just(0),
                        *[st.sampled_from([0, 16, USER_BASE, USER_BASE + 0x4000, 1 << 63])] * 4,
                    ),
                    st.builds(struct.Struct("<II").pack, st.integers(0, 3), st.integers(0, 300)),
                ),
                st.booleans(),
            ),
            max_size=30,
        )
    )  # fmt: skip
    def test_any_messages(self, device, messages):
        guest = device.front_end()
        for request, flags, payload, with_fd in messages:
            fds = (guest.rings[RX].kick,) if with_fd else ()
            try:
                guest.send(request, payload, fds, flags)
                guest.sock.recv(4096)
            except BlockingIOError:
                continue
            except ConnectionError:
                break
        self.alive(device, guest)
