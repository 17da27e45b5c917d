import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vsock.server
from vsock.address import UnixAddress, parse_address
from vsock.dial import listen
from vsock.log import fd_sink, log
from vsock.rpc import Limits
from vsock.server import Outcome, Server
from vsock.stream import Listener, Stream

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_quick_and_a_slow_method(serve):
    peer = serve().peer()
    assert peer.ask(1, "echo", a=1) == {"a": 1}
    assert peer.ask(2, "slow_echo", a=2) == {"a": 2}


def test_quick_methods_run_on_the_thread_of_the_server_and_others_do_not(serve):
    threads = []

    class Spy:
        def __call__(self, call):
            threads.append((call.method, threading.current_thread()))
            return Outcome(None, None)

    running = serve()
    running.server._calls._handler = Spy()
    peer = running.peer()
    peer.ask(1, "echo")
    peer.ask(2, "other")
    assert threads[0] == ("echo", running.thread)
    assert threads[1][1] is not running.thread


def test_requests_are_answered_in_any_order(serve):
    running = serve()
    peer = running.peer_at_gate()
    assert peer.ask(2, "slow_echo") == {}
    running.open_gate(peer)


def test_one_byte_at_a_time(serve):
    peer = serve().peer()
    for byte in msgpack.packb([0, 1, "echo", [{"a": 1}]]):
        peer.send(bytes((byte,)))
    assert peer.next() == [1, 1, None, {"a": 1}]


def test_errors_of_the_handler_are_answers(serve):
    peer = serve().peer()
    peer.request(1, "nonsense")
    assert peer.error() == (1, "unsupported")
    peer.request(2, "odd")
    assert peer.error() == (2, "internal")
    assert peer.ask(3, "echo") == {}


def test_a_handler_that_breaks_its_contract_still_answers_and_costs_no_worker(serve, monkeypatch):
    raised = threading.Semaphore(0)
    monkeypatch.setattr(threading, "excepthook", lambda _: raised.release())
    peer = serve(workers=1).peer()
    for msgid in range(3):
        peer.request(msgid, "bug")
        assert peer.error() == (msgid, "internal")
    assert peer.ask(9, "slow_echo") == {}
    for _ in range(3):
        assert raised.acquire(timeout=20)


def test_worker_survives_handler_exception_and_runs_queued_requests(serve, monkeypatch):
    raised = threading.Semaphore(0)
    monkeypatch.setattr(threading, "excepthook", lambda _: raised.release())
    running = serve(workers=1)
    peer = running.peer()
    for msgid, method in enumerate(("gate", "bug", "slow_echo")):
        peer.request(msgid, method)
    peer.ask(3, "echo")  # so all of them wait
    running.handler.gate.set()
    assert peer.next() == [1, 0, None, "through"]
    assert peer.error() == (1, "internal")
    assert peer.next() == [1, 2, None, {}]
    assert raised.acquire(timeout=20)


def test_one_idle_thread_does_not_make_two_calls_wait_for_each_other(serve):
    running = serve()
    peer = running.peer()
    peer.ask(1, "slow_echo")
    peer.send(b"".join(msgpack.packb([0, n, "gate", [{}]]) for n in range(4)))
    running.handler.passed(running.handler.at_gate, 4)
    running.handler.gate.set()
    assert sorted(peer.next()[1] for _ in range(4)) == [0, 1, 2, 3]


def big(size_bytes):
    return msgpack.packb([0, 7, "echo", [{"a": bytes(size_bytes)}]])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (msgpack.packb([0, 7, "echo", [1]]), "invalid"),
        (msgpack.packb([0, 7, 5, [{}]]), "invalid"),
        (msgpack.packb([0, 7, "echo", [{"a": msgpack.ExtType(4, b"")}]]), "invalid"),
        (b"\x94\x00\x07\xa4echo\x91\x81\xa1k\xa1\xff", "invalid"),
        (msgpack.packb([0, 7, "echo", [{"deadline_ms": 0}]]), "invalid"),
        (msgpack.packb([0, 7, "echo", [{"deadline_ms": 600_001}]]), "invalid"),
        (msgpack.packb([0, 7, "echo", [{"deadline_ms": True}]]), "invalid"),
        (msgpack.packb([0, 7, "echo", [{"deadline_ms": "5"}]]), "invalid"),
        (msgpack.packb([0, 7, "echo", [{"traceparent": 5}]]), "invalid"),
    ],
)
def test_a_bad_request_is_answered_by_its_msgid_and_the_connection_lives(serve, data, code):
    peer = serve().peer()
    peer.send(data)
    assert peer.error() == (7, code)
    assert peer.ask(8, "echo", a=1) == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        msgpack.packb({"a": "map"}),
        msgpack.packb([9, 9]),
        msgpack.packb([0, -1, "echo", [{}]]),
        msgpack.packb([1, 3, None, None]),
        msgpack.packb([2, "event", [{}]]),
    ],
)
def test_message_without_msgid_is_answered_by_rpc_error(serve, data):
    peer = serve().peer()
    peer.send(data)
    assert peer.complaint() in ("invalid", "unsupported")
    assert peer.ask(8, "echo", a=1) == {"a": 1}


@pytest.mark.parametrize(
    "data",
    [
        big(2 << 20)[: 64 << 10],
        b"\x94\x00\x07\xa1m" + b"\x91" * 5000,
        b"\x94\x00\x07\xa1m\x91\xdd\x00\x01\x00\x00",
    ],
)
def test_a_request_past_a_limit_is_answered_and_ends_the_connection(serve, data):
    running = serve()
    peer = running.peer()
    peer.send(data)
    assert peer.error() == (7, "resource")
    assert peer.at_end()
    assert running.handler.calls == []


def test_a_client_that_sends_on_past_a_limit_still_gets_the_answer(serve):
    peer = serve().peer()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        peer.send(big(8 << 20))
    assert peer.error() == (7, "resource")


@pytest.mark.parametrize(
    ("data", "code"),
    [(b"\xc1", "invalid"), (msgpack.packb([2, "event", [{"a": bytes(1 << 20)}]])[:99], "resource")],
)
def test_fatal_protocol_error_closes_after_replies_in_flight(serve, data, code):
    running = serve()
    peer = running.peer_at_gate()
    peer.send(data)
    assert peer.complaint() == code
    running.open_gate(peer)
    assert peer.at_end()
    assert running.peer().ask(1, "echo") == {}


def test_a_truncated_message_and_then_nothing_ends_quietly(serve):
    running = serve()
    peer = running.peer()
    peer.send(msgpack.packb([0, 1, "echo", [{}]])[:-1])
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.at_end()
    assert running.handler.calls == []


def test_the_common_parameters_are_taken_out(serve):
    running = serve()
    peer = running.peer()
    assert peer.ask(1, "echo", a=1, deadline_ms=60_000, traceparent=TRACE) == {"a": 1}
    [call] = running.handler.calls
    assert call.traceparent == TRACE
    assert 0 < call.deadline.remaining() <= 60
    assert peer.ask(2, "echo", deadline_ms=None, traceparent=None) == {}
    assert running.handler.calls[1].deadline.remaining() is None


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        TRACE.upper(),
        TRACE[:-1],
        TRACE + "-00",
        "ff" + TRACE[2:],
        TRACE.replace("0af7651916cd43dd8448eb211c80319c", "0" * 32),
        TRACE.replace("b7ad6b7169203331", "0" * 16),
        TRACE.replace("b7ad", "b7ax"),
        TRACE.replace("-", "_"),
    ],
)
def test_a_traceparent_of_another_form_is_refused(serve, traceparent):
    peer = serve().peer()
    peer.request(1, "echo", traceparent=traceparent)
    assert peer.error() == (1, "invalid")
    assert peer.ask(2, "echo", traceparent="01" + TRACE[2:] + "-more") == {}


def test_a_deadline_ends_a_wait(serve):
    peer = serve().peer()
    peer.request(1, "wait", deadline_ms=20)
    assert peer.error() == (1, "timeout")


def test_a_deadline_holds_while_no_worker_is_free(serve):
    running = serve(workers=1)
    peer = running.peer_at_gate()
    peer.request(2, "slow_echo", deadline_ms=20)
    assert peer.error() == (2, "timeout")
    running.open_gate(peer)
    assert [call.msgid for call in running.handler.calls] == [1]


def test_cancel_ends_a_wait(serve):
    running = serve()
    peer = running.peer_at_gate("wait")
    peer.request(2, "cancel", msgid=1)
    answers = [peer.next(), peer.next()]
    assert [1, 2, None, True] in answers
    [(_, _, error, _)] = [one for one in answers if one[1] == 1]
    assert error["code"] == "cancelled"


def test_cancel_of_a_queued_call_is_answered_at_once(serve):
    running = serve(workers=1)
    peer = running.peer_at_gate()
    peer.request(2, "slow_echo")
    peer.request(3, "cancel", msgid=2)
    assert peer.error() == (2, "cancelled")
    assert peer.next() == [1, 3, None, True]
    running.open_gate(peer)
    assert peer.ask(4, "slow_echo") == {}
    assert [call.msgid for call in running.handler.calls] == [1, 3, 4]


def test_cancel_reaches_only_requests_of_its_own_connection(serve):
    running = serve()
    peer, other = running.peer(), running.peer()
    running.send_to_gate(peer)
    assert other.ask(2, "cancel", msgid=1) is False
    assert peer.ask(3, "cancel", msgid=77) is False
    running.open_gate(peer)


def test_a_msgid_in_flight_is_refused_and_free_again_after_the_answer(serve):
    running = serve()
    peer = running.peer_at_gate()
    peer.request(1, "echo")
    assert peer.error() == (1, "invalid")
    running.open_gate(peer)
    for _ in range(200):
        assert peer.ask(1, "slow_echo") == {}


def test_the_books_around_an_answer(serve):
    """The msgid is free before the answer goes out, and the answer is owed until it has."""
    running = serve()
    peer = running.peer()
    peer.ask(1, "echo")
    connection = running.handler.calls[0].connection
    put, seen = connection.outbox.put, []

    def spy(data, **options):
        seen.append((7 in connection._calls, connection.owes_answers))
        return put(data, **options)

    connection.outbox.put = spy
    peer.ask(7, "slow_echo")
    assert seen == [(False, True)]


def test_the_257th_request_in_flight_is_refused(serve):
    running = serve(workers=2)
    peer = running.peer()
    for msgid in range(257):
        peer.request(msgid, "gate")
    assert peer.error() == (256, "resource")
    running.handler.gate.set()
    assert sorted(peer.next()[1] for _ in range(256)) == list(range(256))
    assert peer.ask(256, "echo") == {}


def test_requests_in_flight_are_bounded_in_bytes_as_well(serve):
    running = serve(workers=1, max_memory_bytes=232 * 1024)
    peer = running.peer()
    for msgid in range(16):
        peer.request(msgid, "gate", a=bytes(3700))  # and 7 values of 64 bytes, and the call
    assert peer.error()[1] == "resource"
    running.handler.gate.set()
    assert all(peer.next()[2] is None for _ in range(15))
    for msgid in range(20):
        assert len(peer.ask(msgid, "slow_echo", a=bytes(4000))["a"]) == 4000


def test_the_65th_connection_is_refused_and_the_64_live(serve):
    running = serve()
    peers = [running.peer() for _ in range(64)]
    for peer in peers:
        assert peer.ask(1, "echo") == {}
    extra = running.peer()
    assert extra.complaint() == "resource"
    assert extra.at_end()
    for peer in peers:
        assert peer.ask(2, "slow_echo") == {}
    peers[0].sock.close()
    while running.server.connection_count == 64:
        peers[1].ask(3, "echo")
    assert running.peer().ask(1, "echo") == {}


def test_one_connection_gets_no_more_than_its_share_of_the_threads(serve):
    running = serve(workers=16)
    greedy, other = running.peer(), running.peer()
    for msgid in range(40):
        greedy.request(msgid, "gate")
    running.handler.passed(running.handler.at_gate, 12)
    assert other.ask(1, "slow_echo") == {}
    assert not running.handler.at_gate.acquire(blocking=False)
    running.handler.gate.set()
    assert sorted(greedy.next()[1] for _ in range(40)) == list(range(40))


def test_urgent_methods_run_when_several_connections_hold_the_other_threads(serve):
    running = serve(workers=16, urgent=frozenset({"slow_echo"}))
    greedy = [running.peer() for _ in range(3)]
    for peer in greedy:
        for msgid in range(12):
            peer.request(msgid, "gate")
    running.handler.passed(running.handler.at_gate, 14)
    assert running.peer().ask(1, "slow_echo") == {}
    assert greedy[0].ask(99, "slow_echo") == {}
    assert not running.handler.at_gate.acquire(blocking=False)
    running.handler.gate.set()
    for peer in greedy:
        assert sorted(peer.next()[1] for _ in range(12)) == list(range(12))


def test_connections_take_turns_for_a_thread(serve):
    running = serve(workers=1)
    greedy, other = running.peer(), running.peer()
    for msgid in range(3):
        greedy.request(msgid, "gate")
    running.handler.passed(running.handler.at_gate)
    other.request(1, "slow_echo")
    other.ask(2, "echo")  # so that it waits
    running.handler.gate.set()
    assert [greedy.next()[1] for _ in range(3)] == [0, 1, 2]
    assert other.next() == [1, 1, None, {}]
    methods = [call.method for call in running.handler.calls if call.method != "echo"]
    assert methods.index("slow_echo") < 3


def test_a_call_that_was_cancelled_before_it_ran_holds_no_memory(serve):
    running = serve(workers=1, max_memory_bytes=168 * 1024)  # 63 KiB for requests
    peer = running.peer_at_gate()
    for _ in range(10):
        peer.request(2, "slow_echo", a=bytes(30_000))
        peer.request(3, "cancel", msgid=2)
        assert peer.error() == (2, "cancelled")
        assert peer.next() == [1, 3, None, True]
    running.open_gate(peer)


def test_a_large_message_before_hello_is_refused(serve):
    running = serve(hello_seconds=60.0)
    stranger, known = running.peer(), running.peer()
    large = msgpack.packb([0, 1, "echo", [{"a": bytes(20_000)}]])
    stranger.send(large[:100])
    assert stranger.error() == (1, "resource")
    assert stranger.at_end()
    # in one write: the second message is read after the first was answered
    known.send(msgpack.packb([0, 0, "hello", []]) + large)
    assert [known.next()[1:3] for _ in range(2)] == [[0, None], [1, None]]


def test_a_message_that_is_not_whole_in_time_ends_the_connection(serve, monkeypatch):
    monkeypatch.setattr(vsock.server, "_MESSAGE_SECONDS", 0.05)
    peer = serve().peer()
    assert peer.ask(1, "echo") == {}
    peer.send(b"\x94")
    assert peer.at_end()


def test_an_unfinished_message_past_the_memory_of_all_is_refused(serve):
    running = serve(max_memory_bytes=168 * 1024)
    peers = [running.peer() for _ in range(3)]
    for peer in peers[:2]:
        peer.send(msgpack.packb([0, 1, "echo", [{"a": bytes(40_000)}]])[:-1000])
        peers[2].ask(0, "echo")
    assert peers[1].complaint() == "resource"
    assert peers[1].at_end()
    assert peers[2].ask(1, "slow_echo", a=b"short") == {"a": b"short"}


def test_unread_answers_leave_memory_for_other_answers(serve):
    running = serve(max_memory_bytes=1 << 20)
    for _ in range(3):
        running.peer().request(1, "big", bytes=900_000)
    other = running.peer()
    lines_with(running, "the memory for unsent answers is used up", other)
    assert other.ask(2, "big", bytes=10_000) == b"x" * 10_000


def test_a_connection_without_hello_makes_room_before_one_with_it(serve):
    running = serve(max_connections=2, idle_seconds=1.0, hello_seconds=60.0)
    stranger, known = running.peer(), running.peer()
    known.ask(1, "hello")
    extra = running.peer()
    while extra.complaint_or_silence() == "resource":
        known.ask(2, "echo")
        extra = running.peer()
    assert stranger.at_end()
    assert known.ask(3, "echo") == {}
    assert extra.ask(1, "hello") is None


def test_the_longest_idle_connection_makes_room_for_a_new_one(serve):
    running = serve(max_connections=3, idle_seconds=0.0)
    subscriber, busy, idle = (running.peer() for _ in range(3))
    subscriber.ask(1, "echo")
    running.handler.calls[0].connection.on_close(lambda: None)
    running.send_to_gate(busy)
    idle.ask(1, "echo")
    extra = running.peer()
    assert extra.ask(1, "echo") == {}
    assert idle.at_end()
    extra.request(2, "gate")
    running.handler.passed(running.handler.at_gate)
    assert running.peer().ask(1, "echo") == {}
    assert subscriber.at_end()
    running.open_gate(busy)


def test_silence_without_a_hello_ends_the_connection(serve):
    running = serve(hello_seconds=0.05)
    assert running.peer().at_end()
    trickle = running.peer()
    trickle.send(b"\x94\x00")
    assert trickle.at_end()


def test_hello_or_a_pending_answer_keeps_the_connection(serve):
    running = serve(hello_seconds=0.05)
    greeted, waiting, silent = running.peer(), running.peer(), running.peer()
    greeted.ask(1, "hello")
    waiting.request(1, "gate")
    assert silent.at_end()  # so the time has passed for the others, too
    running.open_gate(waiting)
    assert waiting.at_end()
    assert greeted.ask(2, "echo") == {}


def test_a_stream_that_was_dialled_owes_no_hello(serve):
    running = serve(hello_seconds=0.05)
    peer, theirs = running.pair()
    running.server.add_stream(stream_of(theirs))
    assert running.peer().at_end()
    assert peer.ask(1, "echo") == {}


def test_a_stream_that_comes_too_late_is_closed_and_its_end_is_told(serve):
    running = serve()
    running.stop()
    peer, theirs = running.pair()
    ended = threading.Event()
    running.server.add_stream(stream_of(theirs), ended.set)
    assert ended.is_set()
    assert peer.at_end()
    late = listen(UnixAddress(path=running.address.path + "-late"))
    running.server.add_listener(late)
    assert late.fileno() == -1


def test_a_stream_that_comes_while_the_server_stops_has_its_end_told(serve):
    running = serve()
    first = running.peer_at_gate()
    running.server.stop()
    peer, theirs = running.pair()
    ended = threading.Event()
    running.server.add_stream(stream_of(theirs), ended.set)
    assert peer.at_end()
    assert ended.wait(20)
    running.open_gate(first)


def test_a_wired_stream_has_a_place_of_its_own(serve):
    running = serve(max_connections=1)
    peer, theirs = running.pair()
    stream = stream_of(theirs)
    stream.point_to_point = True
    listener = OneStream(running.address, stream)
    other = running.peer()
    assert other.ask(1, "echo") == {}
    running.server.add_listener(listener)
    assert peer.ask(1, "echo") == {}
    assert running.peer().complaint() == "resource"


class OneStream(Listener):
    """Yields a stream that is there already, as a serial line does."""

    def __init__(self, address, stream):
        self.address = address
        self._streams = [stream]
        self._fd = os.eventfd(1, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self):
        return self._fd

    def accept(self):
        os.eventfd_read(self._fd)
        return self._streams.pop()

    def close(self):
        os.close(self._fd)


def test_a_connection_counts_until_it_is_closed(serve):
    running = serve()
    peer = running.peer()
    peer.ask(1, "echo")
    connection = running.handler.calls[0].connection
    seen = []
    closed = threading.Event()
    connection.on_close(
        lambda: seen.append((running.server.connection_count, connection.stream.fileno()))
    )
    connection.on_close(closed.set)
    peer.sock.close()
    assert closed.wait(20)
    assert seen == [(1, -1)]


def stream_of(sock):
    import _socket

    return Stream(_socket.socket(fileno=sock.detach()), "pair")


def test_half_close_gets_its_answers(serve):
    running = serve()
    peer = running.peer()
    peer.request(1, "gate")
    peer.request(2, "echo")
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.next() == [1, 2, None, {}]
    running.open_gate(peer)
    assert peer.at_end()


def test_a_large_answer_after_half_close_arrives_whole(serve):
    peer = serve().peer()
    peer.request(1, "big", bytes=3 << 20)
    peer.sock.shutdown(socket.SHUT_WR)
    assert peer.next() == [1, 1, None, b"x" * (3 << 20)]
    assert peer.at_end()


def test_work_in_flight_outlives_its_connection(serve):
    running = serve()
    handler = running.handler
    peer = running.peer()
    peer.request(1, "gate")
    handler.passed(handler.at_gate)
    closed = threading.Event()
    handler.calls[0].connection.on_close(closed.set)
    peer.sock.close()
    other = running.peer()
    handler.gate.set()
    handler.passed(handler.finished)
    assert closed.wait(20)
    assert other.ask(1, "slow_echo") == {}
    late = threading.Event()
    handler.calls[0].connection.on_close(late.set)
    assert late.is_set()
    assert handler.calls[0].connection.notify("event") is False


def test_a_wait_that_says_so_ends_with_its_connection(serve):
    running = serve()
    peer = running.peer()
    peer.request(1, "wait", leave=True)
    running.handler.passed(running.handler.at_gate)
    peer.sock.close()
    running.handler.passed(running.handler.finished)
    assert [error.code for error in running.handler.errors] == ["cancelled"]


def test_queued_requests_are_dropped_with_their_connection(serve):
    running = serve(workers=1)
    handler = running.handler
    first, second = running.peer(), running.peer()
    first.request(1, "gate")
    handler.passed(handler.at_gate)
    second.request(1, "slow_echo")
    second.ask(2, "echo")
    connection = handler.calls[-1].connection
    closed = threading.Event()
    connection.on_close(closed.set)
    connection.close()
    assert closed.wait(20)
    handler.gate.set()
    assert first.next() == [1, 1, None, "through"]
    assert first.ask(3, "slow_echo") == {}
    assert [call.method for call in handler.calls] == ["gate", "echo", "slow_echo"]
    assert handler.calls[-1].connection is not connection


def lines_with(running, text, other):
    """Serve ``other`` until the server has reported a line with ``text``."""
    for _ in range(20_000):
        if any(text in line for line in running.lines):
            return
        assert other.ask(1, "echo") == {}
    raise AssertionError(running.lines)


def test_peer_that_does_not_read_is_disconnected_without_stalling_other_peers(serve):
    running = serve(limits=Limits(max_reply_bytes=512 * 1024), workers=2)
    slow, other = running.peer(), running.peer()
    for msgid in range(20):
        slow.request(msgid, "late_big", bytes=500 * 1024)
    slow.ask(20, "echo")  # so all of them are in flight
    running.handler.gate.set()
    lines_with(running, "does not read its answers", other)
    assert other.ask(2, "slow_echo") == {}


def test_peer_that_stops_reading_is_disconnected_in_time(serve, monkeypatch):
    monkeypatch.setattr(vsock.server, "_STALL_SECONDS", 0.05)
    running = serve()
    slow, other = running.peer(), running.peer()
    slow.request(1, "big", bytes=2 << 20)
    lines_with(running, "it took nothing for", other)


def test_peer_that_reads_late_gets_all_replies(serve):
    running = serve(limits=Limits(max_reply_bytes=128 * 1024))
    peer, other = running.peer(), running.peer()

    def ask():
        for msgid in range(150):
            peer.request(msgid, "echo", a=bytes(100 * 1024))

    asker = threading.Thread(target=ask)
    asker.start()
    for msgid in range(100):
        other.ask(msgid, "echo")
    assert [peer.next()[1] for _ in range(150)] == list(range(150))
    asker.join()


def test_small_requests_with_large_answers_wait_for_the_reader(serve):
    running = serve(quick=frozenset({"big", "echo"}), limits=Limits(max_reply_bytes=64 * 1024))
    peer, other = running.peer(), running.peer()
    peer.send(b"".join(msgpack.packb([0, n, "big", [{"bytes": 60_000}]]) for n in range(300)))
    peer.sock.shutdown(socket.SHUT_WR)
    other.ask(1, "echo")
    assert [peer.next()[1] for _ in range(300)] == list(range(300))
    assert peer.at_end()


def test_notifications_reach_fast_peers_and_are_dropped_for_slow_peers(serve):
    running = serve(limits=Limits(max_reply_bytes=64 * 1024))
    reader, slow = running.peer(), running.peer()
    reader.ask(1, "hello")
    slow.ask(1, "hello")
    to_reader, to_slow = (call.connection for call in running.handler.calls)
    taken = 0
    for _ in range(100):
        assert to_reader.notify("event", {"a": bytes(32 * 1024)})
        assert reader.next()[0] == 2
        taken += to_slow.notify("event", {"a": bytes(32 * 1024)})
    assert 0 < taken < 100
    for _ in range(taken):
        assert slow.next()[0] == 2
    assert slow.ask(2, "echo") == {}


def test_notifications_leave_room_for_answers(serve):
    running = serve(limits=Limits(max_reply_bytes=512 * 1024))
    peer = running.peer()
    peer.ask(1, "hello")
    peer.request(2, "late_big", bytes=500 * 1024)
    peer.ask(3, "echo")
    while running.handler.calls[0].connection.notify("event", {"a": bytes(32 * 1024)}):
        pass
    running.handler.gate.set()
    other = running.peer()
    while running.server.requests_in_flight:
        other.ask(1, "echo")
    while (message := peer.next())[0] == 2:
        pass
    assert message == [1, 2, None, b"x" * (500 * 1024)]


def test_a_handler_can_notify_its_peer(serve):
    peer = serve().peer()
    peer.request(1, "notify", a=1)
    assert peer.next() == [2, "event", [{"a": 1}]]
    assert peer.next() == [1, 1, None, True]


def test_notifications_can_be_taken(serve):
    taken = []
    peer = serve(on_notification=lambda c, n: taken.append((n.method, n.params))).peer()
    peer.send(msgpack.packb([2, "input", [{"a": 1}]]))
    assert peer.ask(1, "echo") == {}
    assert taken == [("input", {"a": 1})]


def test_stop_lets_work_end_and_refuses_new(serve):
    running = serve()
    peer = running.peer_at_gate()
    running.server.stop(20.0)
    while True:
        peer.request(2, "slow_echo")
        _, msgid, error, _ = peer.next()
        assert msgid == 2
        if error is not None:
            break
    assert error["code"] == "busy"
    assert peer.ask(3, "cancel", msgid=77) is False
    running.open_gate(peer)
    assert peer.at_end()
    running.thread.join(20)
    assert not os.path.exists(running.address.path)


def test_stop_cancels_what_does_not_end(serve):
    running = serve()
    peer = running.peer_at_gate("wait")
    running.server.stop(20.0)
    running.server.stop(0.0)  # only ever shorter
    assert peer.error() == (1, "cancelled")
    assert peer.at_end()
    running.thread.join(20)
    assert not running.thread.is_alive()


def test_stop_from_a_signal_handler(tmp_path):
    address = UnixAddress(path=str(tmp_path / "s"))
    server = Server(lambda call: Outcome(None, None))
    server.add_listener(listen(address))
    before = signal.signal(signal.SIGUSR1, lambda *_: server.stop(1.0))

    def client():
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address.path)
            sock.sendall(msgpack.packb([0, 1, "m", []]))
            assert sock.recv(100) == msgpack.packb([1, 1, None, None])
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        server.serve_forever()
    finally:
        signal.signal(signal.SIGUSR1, before)
        thread.join()


def test_close_of_a_server_that_never_ran(tmp_path):
    address = parse_address(f"unix://{tmp_path}/s")
    server = Server(lambda call: Outcome(None, None))
    server.add_listener(listen(address))
    server.close()
    server.close()
    server.stop()
    assert os.listdir(tmp_path) == []


def test_no_descriptor_left_does_not_spin_and_passes(serve):
    running = serve()
    first = running.peer()
    assert first.ask(1, "echo") == {}
    waiting = socket.socket(socket.AF_UNIX)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.dup(0)
    # every number below the limit is in use
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 1, hard))
    try:
        fillers = []
        try:
            while True:
                fillers.append(os.dup(0))
        except OSError:
            pass
        waiting.connect(running.address.path)
        lines_with(running, "cannot accept", first)
        for _ in range(200):
            first.ask(1, "echo")
        assert sum("cannot accept" in line for line in running.lines) <= 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in (*fillers, held):
            os.close(fd)
    assert running.adopt(waiting).ask(1, "echo") == {}


def test_a_console_that_takes_nothing_stops_no_answer(serve):
    """As a serial console at its speed, while a quick method of one peer is refused again."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(4096)):
            pass
    os.set_blocking(writer, True)
    stop = log.add_sink(fd_sink(writer), is_slow=True)
    running = serve()
    running.handler.do_log = lambda call: log.warning("x" * 2000, number=call.msgid)
    running.server._calls._quick = frozenset({"echo", "log"})
    noisy, other = running.peer(), running.peer()
    try:
        for msgid in range(500):
            noisy.ask(msgid, "log")
        assert other.ask(1, "echo") == {}
    finally:
        stop()
        os.close(reader)  # the write that waits fails
        running.stop(0.0)
        os.close(writer)


def test_threads_come_with_work_only(serve):
    running = serve(workers=3)
    peer = running.peer()
    before = threading.active_count()
    peer.ask(1, "echo")
    assert threading.active_count() == before
    for msgid in range(8):
        peer.request(msgid, "gate")
    running.handler.passed(running.handler.at_gate, 3)
    assert threading.active_count() == before + 3
    running.handler.gate.set()
    for _ in range(8):
        peer.next()


def test_the_server_is_cheap_to_import():
    """What a guest under emulation cannot afford at its start, in milliseconds or in memory."""
    dear = [
        "asyncio",
        "cryptography",
        "ctypes",
        "dataclasses",
        "enum",
        "inspect",
        "json",
        "logging",
        "pathlib",
        "pyroute2",
        "re",
        "selectors",
        "socket",
        "subprocess",
        "tempfile",
        "tenacity",
        "typing",
        "urllib",
    ]
    code = f"import sys; sys.path = {sys.path!r}; import vsock.server; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert set(dear) & set(done.stdout.split()) == set()


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.binary(min_size=1, max_size=40), max_size=8),
    st.sampled_from(
        [b"", b"\x94\x00\x01", b"\x94\x00\x01\xa4echo", b"\x94\x00\x01\xa4echo\x91\x81"]
    ),
)
def test_garbage_gets_only_valid_messages_and_leaves_other_peers_served(fuzzed, pieces, prefix):
    running, other = fuzzed
    peer, theirs = running.pair()
    running.server.add_stream(stream_of(theirs))
    with contextlib.suppress(BrokenPipeError):  # it ends the connection where framing is lost
        for piece in pieces:
            peer.send(prefix + piece)
        peer.sock.shutdown(socket.SHUT_WR)
    try:
        while True:
            message = peer.next()
            assert isinstance(message, list)
            assert message[0] in (1, 2)
    except (EOFError, ConnectionResetError):
        pass
    peer.sock.close()
    assert other.ask(1, "echo") == {}
    assert running.thread.is_alive()


@pytest.fixture
def fuzzed(serve):
    running = serve()
    return running, running.peer()


def test_signal_byte_at_the_waker_stops_the_server(serve):
    """As a signal does whose handler ran just before the server began to wait."""
    running = serve()
    waker_fd = os.dup(running.server.waker_fd)
    running.server._stop_at = time.monotonic()  # what the handler has done
    with contextlib.suppress(BrokenPipeError):  # unless the server was about to look by itself
        os.write(waker_fd, bytes([signal.SIGTERM]))
    os.close(waker_fd)
    running.thread.join(60)
    assert not running.thread.is_alive()
    assert running.server.waker_fd == -1
