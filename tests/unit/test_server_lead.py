"""Which thread serves the connections: a worker while it is alone, else that of the server."""

import contextlib
import select
import threading

import msgpack
import pytest

from vsock.connection import Later
from vsock.lead import Lead
from vsock.loop import Loop
from vsock.server import Outcome
from vsock.threads import Waker


def lent(running, peer=None):
    """Return a peer of a server whose connections a worker serves, and that worker's thread."""
    threads = []
    peer = peer or running.peer()
    handler = running.server._calls._handler

    def spy(call):
        threads.append(threading.current_thread())
        return handler(call)

    running.server._calls._handler = spy
    while not threads or threads[-1] is running.thread:
        peer.ask(1, "slow_echo")  # a worker asks for the lead after its answer
        peer.ask(2, "echo")
    running.server._calls._handler = handler
    return peer, threads[-1]


def spied(running, threads):
    handler = running.server._calls._handler

    def spy(call):
        threads.append((call.method, threading.current_thread()))
        return handler(call)

    running.server._calls._handler = spy


def test_one_thread_reads_works_and_answers_one_request_after_the_other(serve):
    running = serve()
    peer, _ = lent(running)
    one_thread_serves(running, peer)


def one_thread_serves(running, peer):
    _, worker = lent(running, peer)
    threads = []
    spied(running, threads)
    for msgid in range(50):
        peer.ask(msgid, "slow_echo")
        peer.ask(msgid, "echo")
    assert {thread for _, thread in threads} == {worker}


def test_others_are_served_while_that_thread_works(serve):
    running = serve()
    peer, worker = lent(running)
    threads = []
    spied(running, threads)
    peer.request(7, "gate")
    running.handler.passed(running.handler.at_gate)
    assert threads == [("gate", worker)]
    assert peer.ask(8, "echo") == {}
    assert peer.ask(9, "slow_echo") == {}
    assert running.peer().ask(1, "slow_echo") == {}
    assert worker not in [thread for method, thread in threads if method != "gate"]
    running.handler.gate.set()
    assert peer.next() == [1, 7, None, "through"]
    one_thread_serves(running, peer)


def test_a_call_that_waits_leaves_the_thread_to_others(serve):
    running = serve(workers=1)
    peer, worker = lent(running)
    handler, waits = running.server._calls._handler, []

    def wait_once(call):
        if call.method == "later" and not waits:
            waits.append(Later())
            return waits[0]
        return Outcome(None, "came") if call.method == "later" else handler(call)

    running.server._calls._handler = wait_once
    peer.request(7, "later")
    assert peer.ask(8, "slow_echo") == {}
    assert worker.is_alive()
    waits[0].resume()
    assert peer.next() == [1, 7, None, "came"]
    one_thread_serves(running, peer)


def test_a_cancel_reaches_the_call_of_that_thread(serve):
    running = serve()
    peer, _ = lent(running)
    peer.request(7, "wait")
    peer.request(8, "cancel", msgid=7)
    answers = [peer.next(), peer.next()]
    assert {answer[1] for answer in answers} == {7, 8}
    assert peer.ask(9, "slow_echo") == {}


def test_requests_that_come_together_run_beside_each_other(serve):
    running = serve(workers=4)
    peer, _ = lent(running)
    peer.send(b"".join(msgpack.packb([0, msgid, "gate", [{}]]) for msgid in range(6)))
    running.handler.passed(running.handler.at_gate, 3)  # of one connection
    assert peer.ask(9, "echo") == {}
    running.handler.gate.set()
    assert sorted(peer.next()[1] for _ in range(6)) == list(range(6))


def test_a_single_worker_serves_and_works(serve):
    running = serve(workers=1)
    peer, worker = lent(running)
    for msgid, method in enumerate(("gate", "slow_echo")):
        peer.request(msgid, method)
    running.handler.passed(running.handler.at_gate)
    assert peer.ask(5, "echo") == {}
    peer.request(6, "slow_echo", deadline_ms=1)
    assert peer.error() == (6, "timeout")  # before a thread was free for it
    running.handler.gate.set()
    assert [peer.next()[1] for _ in range(2)] == [0, 1]
    assert worker.is_alive()


def test_timers_run_while_that_thread_works(serve):
    running = serve(hello_seconds=0.05)
    peer, _ = lent_with_hello(running)
    peer.request(7, "gate")
    running.handler.passed(running.handler.at_gate)
    assert running.peer().at_end()  # it says no hello
    running.handler.gate.set()
    assert peer.next() == [1, 7, None, "through"]


def test_timers_of_connections_that_are_there_run_while_that_thread_works(serve):
    running = serve(hello_seconds=0.5)
    peer, _ = lent_with_hello(running)
    silent = running.peer()
    while running.server.connection_count < 2:
        peer.ask(3, "echo")
    peer.request(7, "gate")
    running.handler.passed(running.handler.at_gate)
    assert silent.at_end()
    running.handler.gate.set()
    assert peer.next() == [1, 7, None, "through"]
    one_thread_serves(running, peer)


def lent_with_hello(running):
    handler = running.server._calls._handler

    def greet(call):
        call.connection.said_hello = True
        return handler(call)

    running.server._calls._handler = greet
    peer, worker = lent(running)
    running.server._calls._handler = handler
    return peer, worker


def test_stop_while_a_worker_serves(serve):
    running = serve()
    peer, worker = lent(running)
    running.stop(5.0)
    assert peer.at_end()
    worker.join(20)
    assert not worker.is_alive()


def test_stop_while_that_thread_works(serve):
    running = serve()
    peer, _ = lent(running)
    peer.request(7, "wait")
    running.handler.passed(running.handler.at_gate)
    running.server.stop(0.0)
    assert peer.error() == (7, "cancelled")
    running.stop()


def test_stop_of_a_call_that_never_ends(serve, monkeypatch):
    """It hangs, as in the kernel: the server ends all the same."""
    monkeypatch.setattr("vsock.server._UNDO_SECONDS", 0.05)
    running = serve()
    peer, _ = lent(running)
    peer.request(7, "gate")
    running.handler.passed(running.handler.at_gate)
    running.stop(0.0)
    running.handler.gate.set()


def test_a_call_that_breaks_its_contract_gives_the_lead_back(serve, monkeypatch):
    raised = threading.Semaphore(0)
    monkeypatch.setattr(threading, "excepthook", lambda _: raised.release())
    running = serve(workers=1)
    peer, _ = lent(running)
    for msgid in range(3):
        peer.request(msgid, "bug")
        assert peer.error() == (msgid, "internal")
        assert raised.acquire(timeout=20)
        assert peer.ask(5, "echo") == {}
        assert peer.ask(6, "slow_echo") == {}


def test_a_worker_leaves_the_loop_alone_when_the_server_ends_by_an_exception():
    """A Ctrl-C, for one, while the thread of the server waits for the lead to come back."""
    with contextlib.closing(Loop()) as loop, Waker() as waker:
        loop.add(waker.fd, select.EPOLLIN, lambda _events: waker.clear())
        lead = Lead(loop, waker, is_over=lambda: False)
        served = []

        def work():
            if lead.ask():
                while lead.serve():
                    served.append(True)

        worker = threading.Thread(target=work)
        worker.start()
        watched, lead._watched = lead._watched, Interrupted()
        while lead._asker is None:
            assert worker.is_alive()
        with pytest.raises(KeyboardInterrupt):
            lead.lend()
        lead._watched = watched
        lead.close()
        worker.join(20)
        assert not worker.is_alive()
        assert not lead.ask()


def test_a_lead_that_was_taken_back_is_whole_again():
    """Or the next worker to get it would be taken for one that is at work."""
    with contextlib.closing(Loop()) as loop, Waker() as waker:
        loop.add(waker.fd, select.EPOLLIN, lambda _events: None)
        lead = Lead(loop, waker, is_over=lambda: False)
        taken = threading.Event()
        held = []

        def work():
            assert lead.ask()  # which leaves an event in the loop
            lead.begin()
            assert taken.wait(20)
            lead.end()
            held.append(lead.is_held_here())

        worker = threading.Thread(target=work)
        worker.start()
        while not lead.is_asked_for():
            assert worker.is_alive()
        lead.lend()
        assert (lead._holder, lead._is_working) == (None, False)
        taken.set()
        worker.join(20)
        assert held == [False]
        lead.close()


class Interrupted:
    def poll(self, _seconds):
        raise KeyboardInterrupt


def test_many_peers_at_once(serve):
    """Leads change hands all the time; no answer is lost or doubled."""
    running = serve(workers=4)
    peers = [running.peer() for _ in range(6)]
    problems = []

    def talk(peer):
        try:
            for msgid in range(150):
                method = ("echo", "slow_echo")[msgid % 3 > 0]
                if peer.ask(msgid, method, a=msgid) != {"a": msgid}:
                    problems.append(msgid)
        except AssertionError as error:
            problems.append(error)

    threads = [threading.Thread(target=talk, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert problems == []
    running.stop()
