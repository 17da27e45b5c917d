"""Events: numbered without gaps across lives, kept within bounds, never waiting for anybody."""

import threading

import msgpack
import pytest

from guestagent.api import Event
from guestagent.engine.events import EventLog, Subscribers
from guestagent.engine.journal import Journal
from guestagent.policy.gate import Gate


@pytest.fixture
def journal(tmp_path):
    return Journal(str(tmp_path))


@pytest.fixture
def events(journal):
    events = EventLog(journal, capacity=4)
    yield events
    events.close()


class SlowPeer:
    """A connection whose queue is full whenever it is told so."""

    id = 7

    def __init__(self):
        self.got, self.full, self.closers = [], False, []

    def send_notification(self, data):
        if not self.full:
            _, method, (params,) = msgpack.unpackb(data)
            assert method == "agent.event"
            self.got.append(Event.from_wire(params))
        return not self.full

    def on_close(self, callback):
        self.closers.append(callback)


def test_numbers_go_on_in_the_next_life(journal):
    first = EventLog(journal)
    assert [first.publish("agent_started").sequence for _ in range(3)] == [1, 2, 3]
    first.close()
    second = EventLog(journal)
    assert second.sequence == 3
    assert second.publish("agent_started").sequence == 4
    assert second.since(0)[1] == 3
    second.close()


def test_since_tells_what_is_no_longer_kept(events):
    for _ in range(6):
        events.publish("layer_mounted")
    kept, dropped = events.since(0)
    assert ([event.sequence for event in kept], dropped) == ([3, 4, 5, 6], 2)
    assert events.since(4)[1] == 0
    assert [event.sequence for event in events.since(4)[0]] == [5, 6]
    assert events.since(6) == ((), 0)
    assert events.since(99) == ((), 0)
    assert events.since(-5)[1] == 2


def test_listeners_hear_in_order_until_they_stop(events):
    heard = []
    stop = events.listen(lambda event: heard.append(event.sequence))
    threads = [
        threading.Thread(target=lambda: [events.publish("layer_mounted") for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == list(range(1, 201))
    stop()
    stop()
    events.publish("layer_mounted")
    assert len(heard) == 200


def test_a_subscriber_that_lags_learns_what_it_missed(events):
    subscribers, peer = Subscribers(events, Gate()), SlowPeer()
    subscribers.add(peer)
    subscribers.add(peer)
    events.publish("layer_mounted")
    peer.full = True
    events.publish("layer_mounted")
    events.publish("layer_mounted")
    peer.full = False
    events.publish("layer_unmounted")
    events.publish("layer_mounted")
    assert [(got.sequence, got.dropped) for got in peer.got] == [(1, 0), (4, 2), (5, 0)]
    assert subscribers.dropped == 2
    for closer in peer.closers:
        closer()
    events.publish("layer_mounted")
    assert len(peer.got) == 3


def test_published_event_is_kept_unchanged(events):
    told = events.publish(
        "layer_corrupted", layer_id="a", device="/dev/dm-1", block=7, detail="data block 7"
    )
    assert events.since(0) == ((told,), 0)


def test_a_name_that_is_no_text_is_kept_as_an_answer_tells_it(events):
    events.publish("device_appeared", device="/dev/odd\udcff")
    ((event,), _) = events.since(0)
    assert event.device == "/dev/odd\\udcff"
