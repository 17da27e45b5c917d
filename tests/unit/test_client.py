import contextlib
import errno
import itertools
import os
import socket
import threading
import time

import msgpack
import pytest

from tests.beds.calls import at_once, call_error
from vsock.address import UnixAddress
from vsock.client import Client, ClosedHandleError, NotificationQueue
from vsock.deadline import Deadline
from vsock.dial import listen
from vsock.errors import CallError, ConnectionClosed, LocalProtocolError
from vsock.rpc import MAX_MSGID, Limits, Notification

WAIT_SECONDS = 60.0


@pytest.fixture
def running(serve):
    return serve()


@pytest.fixture
def client(running):
    with Client(str(running.address), cancel_method="cancel") as one:
        yield one


@contextlib.contextmanager
def scripted(tmp_path, script, **options):
    """Connect a client to a peer that does what ``script`` does with its socket."""
    path = str(tmp_path / "scripted")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def work():
            sock, _ = server.accept()
            with sock:
                sock.settimeout(WAIT_SECONDS)
                script(sock)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            with Client(UnixAddress(path=path), **options) as client:
                yield client
        finally:
            thread.join(WAIT_SECONDS)


def test_a_call_and_its_result(client):
    assert client.call("echo", {"a": [1, b"x", None]}) == {"a": [1, b"x", None]}
    assert client.call("slow_echo") == {}


def test_the_answer_may_be_large(client):
    assert client.call("big", {"bytes": 4_000_000}) == b"x" * 4_000_000


def test_the_request_may_be_large(client):
    assert client.call("slow_echo", {"a": bytes(250_000)}) == {"a": bytes(250_000)}


def test_an_error_answer_is_raised_as_it_is(client):
    with call_error("unsupported", match="no method 'nonsense'"):
        client.call("nonsense")


def test_many_threads_get_their_own_answers(client):
    wrong = []

    def work(number):
        for count in range(50):
            value = {"number": number, "count": count}
            if client.call("slow_echo" if count % 2 else "echo", value) != value:
                wrong.append(value)

    at_once(work, range(8))
    assert wrong == []


def test_calls_overtake_one_another(client, running):
    held = client.start_call("gate")
    assert client.call("echo") == {}
    assert not held.done
    running.handler.gate.set()
    assert held.result(WAIT_SECONDS) == "through"
    assert held.result() == "through"
    assert held.done


def test_the_deadline_is_that_of_the_server(client):
    with call_error("timeout", step="wait for the test"):
        client.call("wait", deadline_ms=20)


def test_our_own_timeout_leaves_the_connection_alive_and_a_late_answer_unheard(client, running):
    with call_error("timeout", match=r"no answer to gate within 0\.02 s"):
        client.call("gate", timeout_seconds=0.02)
    assert client._protocol.pending == {}
    running.handler.gate.set()
    running.handler.passed(running.handler.finished)
    assert client.call("echo") == {}
    assert client._protocol.pending == {}


def test_a_pending_call_outlasts_a_result_that_timed_out(client, running):
    held = client.start_call("gate")
    with pytest.raises(CallError, match="no answer"):
        held.result(0.01)
    running.handler.gate.set()
    assert held.result(WAIT_SECONDS) == "through"


def test_cancel(client, running):
    held = client.start_call("wait")
    running.handler.passed(running.handler.at_gate)
    held.cancel()
    with call_error("cancelled"):
        held.result(WAIT_SECONDS)
    held.cancel()  # nothing to cancel any more


def test_result_of_forgotten_call_raises_call_error(client):
    held = client.start_call("gate")
    held.forget()
    with pytest.raises(CallError, match="given up"):
        held.result(WAIT_SECONDS)


def test_a_closed_client_says_so(running):
    client = Client(running.address)
    held = client.start_call("gate")
    assert not client.closed
    client.close()
    client.close()
    assert client.closed
    with pytest.raises(ClosedHandleError):
        held.result(WAIT_SECONDS)
    for function in (client.call, client.start_call, client.notify):
        with pytest.raises(ClosedHandleError, match="is closed"):
            function("echo")
    with pytest.raises(ClosedHandleError):
        held.result()


def test_a_lost_connection_fails_what_is_pending_and_what_follows(client, running):
    held = client.start_call("wait")
    running.handler.passed(running.handler.at_gate)
    running.handler.calls[0].connection.close()
    with pytest.raises(ConnectionClosed, match="before the answer to wait") as caught:
        held.result(WAIT_SECONDS)
    assert not isinstance(caught.value, ClosedHandleError)
    with pytest.raises(ConnectionClosed):
        client.call("echo")
    assert client.closed


def test_the_refusal_of_a_server_is_in_the_error(serve):
    running = serve(max_connections=1)
    with Client(running.address) as first, Client(running.address) as second:
        first.call("echo")
        with pytest.raises(ConnectionClosed, match="1 connections are open"):
            second.call("slow_echo")


def test_connection_error_carries_last_complaint_of_peer(tmp_path):
    gone, send_failed = threading.Event(), threading.Event()

    class Late(Client):
        """Hears of nothing before it has failed to send."""

        def _received(self, data):
            assert send_failed.wait(WAIT_SECONDS)
            super()._received(data)

        def _write(self, data):
            try:
                super()._write(data)
            except OSError:
                send_failed.set()
                raise

    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()

        def script():
            sock, _ = server.accept()
            with sock:
                sock.sendall(msgpack.packb([2, "rpc.error", [{"code": "busy", "message": "why"}]]))
            gone.set()

        thread = threading.Thread(target=script)
        thread.start()
        with Late(f"unix://{path}") as client:
            assert gone.wait(WAIT_SECONDS)
            with pytest.raises(ConnectionClosed, match="after busy: why"):
                client.call("m")
        thread.join()


def test_a_msgid_that_is_pending_is_not_used_again(client, running):
    held = client.start_call("gate")
    client._protocol.msgids = itertools.count(held.msgid)
    assert client.call("echo", {"a": 1}) == {"a": 1}
    running.handler.gate.set()
    assert held.result(WAIT_SECONDS) == "through"
    client._protocol.msgids = itertools.count(MAX_MSGID)
    assert [client.call("echo", {"a": n}) for n in range(3)] == [{"a": n} for n in range(3)]


@pytest.mark.parametrize(
    "params", [{"a": object()}, {"a": 1 << 64}, {"a": bytes(1 << 20)}, {"a": "\udcff"}]
)
def test_call_with_unencodable_params_keeps_connection_usable(client, params):
    with pytest.raises(LocalProtocolError):
        client.call("echo", params)
    assert client.call("echo") == {}
    assert client._protocol.pending == {}


def test_an_answer_over_the_limit_fails_its_call_and_ends_the_connection(running):
    with Client(running.address, limits=Limits(max_reply_bytes=4096)) as client:
        with call_error("resource"):
            client.call("big", {"bytes": 100_000})
        with pytest.raises(ConnectionClosed, match="more than 4096"):
            client.call("slow_echo")


def test_notifications_come_in_order_on_a_thread_that_may_call_back(running):
    got = []
    full = threading.Event()

    def callback(method, params):
        got.append((method, params, client.call("echo", {"inside": params["n"]})))
        if len(got) == 20:
            full.set()

    with Client(running.address, on_notification=callback) as client:
        for n in range(20):
            client.call("notify", {"n": n})
        assert full.wait(WAIT_SECONDS)
    assert got == [("event", {"n": n}, {"inside": n}) for n in range(20)]


def test_a_callback_may_close_the_client(running):
    closed = threading.Event()

    def callback(method, params):
        client.close()
        closed.set()

    client = Client(running.address, on_notification=callback)
    with contextlib.suppress(ConnectionClosed):
        client.call("notify")
    assert closed.wait(WAIT_SECONDS)
    with pytest.raises(ClosedHandleError):
        client.call("echo")
    client.close()


def test_our_notifications_arrive(serve):
    taken = []
    running = serve(on_notification=lambda c, n: taken.append((n.method, n.params)))
    with Client(running.address) as client:
        client.notify("input", {"a": 1})
        client.call("echo")
    assert taken == [("input", {"a": 1})]


def test_client_ignores_reply_with_unknown_msgid(tmp_path):
    def script(sock):
        _, msgid, _, _ = msgpack.unpackb(sock.recv(1000))
        sock.sendall(msgpack.packb([1, 12345, None, "wrong"]))
        sock.sendall(msgpack.packb([7]) + msgpack.packb([0, 3, "ask", [{}]]))
        assert msgpack.unpackb(sock.recv(1000))[2]["code"] == "unsupported"
        sock.sendall(msgpack.packb([1, msgid, None, "right"]))

    with scripted(tmp_path, script) as client:
        assert client.call("m", timeout_seconds=WAIT_SECONDS) == "right"


@pytest.mark.parametrize(
    ("error", "code"),
    [("plain text", "internal"), ({"code": "busy"}, "busy"), ({"code": "new"}, "new")],
)
def test_an_odd_error_answer_still_reaches_the_caller(tmp_path, error, code):
    def script(sock):
        _, msgid, _, _ = msgpack.unpackb(sock.recv(1000))
        sock.sendall(msgpack.packb([1, msgid, error, None]))

    with scripted(tmp_path, script) as client, call_error(code):
        client.call("m", timeout_seconds=WAIT_SECONDS)


def test_bytes_that_are_no_messagepack_end_the_connection(tmp_path):
    def script(sock):
        sock.sendall(b"\xc1")
        assert over.wait(WAIT_SECONDS)

    over = threading.Event()
    with scripted(tmp_path, script) as client:
        with pytest.raises(ConnectionClosed, match="0xc1"):
            client.call("m", timeout_seconds=WAIT_SECONDS)
        over.set()


def test_close_does_not_wait_for_a_peer_that_does_not_read(tmp_path):
    done = threading.Event()

    def script(sock):
        assert done.wait(WAIT_SECONDS)

    with scripted(tmp_path, script) as client:

        def send():
            with contextlib.suppress(ConnectionClosed):
                while True:
                    client.notify("m", {"a": bytes(250_000)})

        thread = threading.Thread(target=send)
        thread.start()
        while not client._ended._parts:  # one for the send that waits
            assert thread.is_alive()
        started = time.monotonic()
        client.close()
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()
        assert time.monotonic() - started < 10
        done.set()


def test_connect_waits_for_a_server_that_comes(tmp_path):
    address = UnixAddress(path=str(tmp_path / "late"))
    accepted = []

    def serve_late():
        with listen(address) as listener:
            while not accepted:
                with contextlib.suppress(BlockingIOError):
                    accepted.append(listener.accept())

    timer = threading.Timer(0.05, serve_late)
    timer.start()
    with Client(address, connect_seconds=WAIT_SECONDS):
        timer.join()
    accepted[0].close()


def test_connect_gives_up_and_says_why(tmp_path):
    path = tmp_path / "nobody"
    with pytest.raises(ConnectionClosed, match="No such file") as caught:
        Client(f"unix://{path}", connect_seconds=0.05)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOENT


def test_connect_gives_up_when_it_has_to_and_says_why(tmp_path):
    with Deadline(0.05) as until, pytest.raises(ConnectionClosed, match="No such file"):
        Client(f"unix://{tmp_path}/nobody", connect_seconds=WAIT_SECONDS, until=until)


def test_a_pause_that_took_too_long_does_not_hide_why(tmp_path, monkeypatch):
    """On a busy machine the deadline may pass between its last look and the wait."""
    real = Deadline.wait

    def late(self, *arguments, **options):
        self.limit(0.0)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Deadline, "wait", late)
    with pytest.raises(ConnectionClosed, match="No such file"):
        Client(f"unix://{tmp_path}/nobody", connect_seconds=WAIT_SECONDS)


def test_connect_does_not_try_again_what_cannot_change(tmp_path):
    target = tmp_path / "loop"
    os.symlink(target, target)
    started = time.monotonic()
    with pytest.raises(ConnectionClosed):
        Client(f"unix://{target}", connect_seconds=WAIT_SECONDS)
    assert time.monotonic() - started < WAIT_SECONDS / 2


def test_connecting_is_given_up_from_another_thread(tmp_path):
    with Deadline() as until:
        timer = threading.Timer(0.1, until.cancel)
        timer.start()
        started = time.monotonic()
        with pytest.raises(ConnectionClosed, match="cancelled"):
            Client(f"unix://{tmp_path}/nobody", connect_seconds=WAIT_SECONDS, until=until)
        assert time.monotonic() - started < WAIT_SECONDS / 2
        timer.join()
        assert until._parts == []


def test_a_connection_is_given_up_from_another_thread(tmp_path):
    with Deadline() as until:

        def script(sock):
            while sock.recv(4096):
                until.cancel()

        with scripted(tmp_path, script, until=until) as client:
            with pytest.raises(ConnectionClosed, match="given up") as caught:
                client.call("echo")
            assert type(caught.value) is ConnectionClosed
            assert client.closed
        assert until._parts == []


def test_an_address_that_is_none_is_a_value_error():
    with pytest.raises(ValueError, match="address 'nonsense'"):
        Client("nonsense")


def test_no_thread_and_no_descriptor_is_left(running):
    threads, fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Client(running.address, on_notification=lambda *_: None) as client:
            client.call("echo")
    while running.server.connection_count:
        time.sleep(0)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == fds


def test_a_full_notification_queue_drops_the_oldest():
    queue = NotificationQueue()
    for n in range(5000):
        queue.put(Notification(str(n), {}, 10))
    assert queue.dropped == 5000 - 4096
    assert queue.get().method == str(5000 - 4096)
    queue.put(Notification("large", {}, 16 << 20))
    assert queue.get().method == "large"
    queue.close()
    assert queue.get() is None


def test_a_client_without_threads_leaves_nothing_open(tmp_path, monkeypatch):
    """Only a machine that is out of threads refuses one, so that the refusal is made up."""

    def refuse(_):
        raise RuntimeError("can't start new thread")

    with socket.socket(socket.AF_UNIX) as server:  # whose side of it is made by an accept only
        server.bind(str(tmp_path / "server"))
        server.listen()
        before = os.listdir("/proc/self/fd")
        monkeypatch.setattr("vsock.client.start_thread", refuse)
        with pytest.raises(RuntimeError):
            Client(f"unix://{tmp_path}/server", on_notification=print)
        assert os.listdir("/proc/self/fd") == before
