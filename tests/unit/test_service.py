"""The service: every method has its function, every error its form, every subscriber its bounds."""

import socket
import threading
import time
import typing
from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest

from guestagent.api import METHODS, Event
from guestagent.api.agent import AgentCancel, AgentStatus, AgentSubscribe
from guestagent.api.layers import LayerGet, LayerVerify, VerifyReply
from guestagent.api.observe import AgentLog
from guestagent.config import Problem
from guestagent.devtree.trees import DevTrees
from guestagent.engine.events import EventLog
from guestagent.engine.journal import Journal
from guestagent.inspect.methods import DEVICE_LOOKS, LOOKS, STREAMS
from guestagent.net.network import Network
from guestagent.policy.document import Exposure, Policy
from guestagent.policy.gate import Gate
from guestagent.policy.rules import Rules
from guestagent.service.agent import AgentHandlers
from guestagent.service.devices import DeviceHandlers
from guestagent.service.dispatch import QUICK_METHODS, Service
from guestagent.service.layers import LayerHandlers
from guestagent.service.policy import PolicyHandlers
from guestagent.service.streams import InspectHandlers
from guestagent.share.shares import Shares
from guestagent.thin.mounts import Mounts
from guestagent.thin.pools import Pools
from guestagent.thin.volumes import Volumes
from tests.beds.calls import call_error
from vsock.address import UnixAddress
from vsock.deadline import Deadline
from vsock.dial import listen
from vsock.errors import CallError
from vsock.rpc import Limits
from vsock.server import Server

WAIT_SECONDS = 60.0


class Layers:
    """Answers as the test says."""

    def __init__(self):
        self.answer = lambda layer_id: None

    def get(self, layer_id):
        return self.answer(layer_id)


class Engine:
    """As much of an engine as these tests ask."""

    def __init__(self, events):
        self.state = SimpleNamespace(gate=Gate())
        self.events = events
        self.layers = Layers()
        self.trouble: tuple[str, ...] = ()

    def operation(self, deadline, *, traceparent=None):
        return deadline

    def features(self):
        return ("fs-erofs",)

    def problems(self):
        return self.trouble

    def counts(self):
        return {"layers": 1, "overlays": 2, "dm_devices": 3}


class Peer:
    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(WAIT_SECONDS)
        self._socket.connect(path)
        self._unpacker = msgpack.Unpacker()
        self._msgid = 0

    def send(self, method, params):
        self._msgid += 1
        self._socket.sendall(msgpack.packb([0, self._msgid, method, [params]]))

    def next(self):
        while True:
            for message in self._unpacker:
                return message
            data = self._socket.recv(65536)
            assert data, "the connection ended"
            self._unpacker.feed(data)

    def ask(self, method, **params):
        """Return (error, result)."""
        self.send(method, params)
        while True:
            message = self.next()
            if message[0] == 1:
                assert message[1] == self._msgid
                return message[2], message[3]

    def close(self):
        self._socket.close()


class Bed:
    def __init__(self, tmp_path, **options):
        self.path = str(tmp_path / "socket")
        self.events = EventLog(Journal(str(tmp_path / "state")))
        self.engine = Engine(self.events)
        self.modes: list[str] = []
        self.service = Service(
            self.engine,
            boot={"pid1": False},
            problems=(Problem(key="a", text="a is odd", fatal=False),),
            restarts=3,
            deadline_seconds=60,
            on_shutdown=self.modes.append,
        )
        limits = options.pop("limits", None)
        self.server = Server(self.service.handle, quick=QUICK_METHODS, limits=limits)
        self.service.attach(self.server)
        self.server.add_listener(listen(UnixAddress(path=self.path)))
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.peers: list[Peer] = []

    def peer(self, *, hello=True):
        peer = Peer(self.path)
        self.peers.append(peer)
        if hello:
            assert peer.ask("agent.hello", versions=[1])[0] is None
        return peer

    def close(self):
        for peer in self.peers:
            peer.close()
        self.server.stop(1.0)
        self.thread.join(WAIT_SECONDS)
        self.events.close()


@pytest.fixture
def bed(tmp_path):
    bed = Bed(tmp_path)
    yield bed
    bed.close()


def test_each_method_has_one_handler(bed):
    parts = (
        AgentHandlers,
        LayerHandlers,
        Network,
        DevTrees,
        DeviceHandlers,
        InspectHandlers,
        Pools,
        Volumes,
        Mounts,
        Shares,
        PolicyHandlers,
    )
    declared = [
        function
        for part in parts
        for function in vars(part).values()
        if hasattr(function, "handles")
    ]
    names = [function.handles.method for function in declared]
    tables = [kind.method for table in (LOOKS, STREAMS, DEVICE_LOOKS) for kind in table]
    assert sorted([*names, *tables, "fs.checksum_device"]) == sorted(METHODS)
    for function in declared:
        hints = typing.get_type_hints(function)
        assert hints["return"] is function.handles.reply, function
        assert function.handles in hints.values(), function


def test_hello_agrees_on_a_version_and_status_tells_all(bed):
    peer = bed.peer(hello=False)
    error, _ = peer.ask("agent.hello", versions=[7, 8])
    assert error["code"] == "unsupported"
    error, hello = peer.ask("agent.hello", versions=[9, 1], client="test")
    assert error is None
    assert (hello["version"], hello["features"], hello["boot"]) == (
        1,
        ["fs-erofs"],
        {"pid1": False},
    )
    assert hello["limits"]["max_request_bytes"] == 256 << 10
    _, status = peer.ask("agent.status")
    assert (status["state"], status["problems"]) == ("degraded", ["a is odd"])
    assert (status["layers"], status["overlays"], status["dm_devices"]) == (1, 2, 3)
    assert (status["restarts"], status["connections"]) == (3, 1)
    assert status["rss_bytes"] > 1 << 20


def test_error_of_the_engine_reaches_the_client_unchanged(bed):
    def refuse(layer_id):
        raise CallError("busy", "no", errno=16, step="unmount", object=layer_id, hint="wait")

    bed.engine.layers.answer = refuse
    error, result = bed.peer().ask("layer.get", layer_id="a")
    assert result is None
    assert error == {
        "code": "busy",
        "message": "no",
        "errno": "EBUSY",
        "step": "unmount",
        "object": "a",
        "hint": "wait",
        "kernel_log": [],
    }


def test_a_bug_is_internal_and_tells_no_secrets(bed):
    def fail(layer_id):
        raise ZeroDivisionError("secret")

    bed.engine.layers.answer = fail
    peer = bed.peer()
    error, _ = peer.ask("layer.get", layer_id="a")
    assert error["code"] == "internal"
    assert "secret" not in str(error)
    assert "Traceback" not in str(error)
    bed.engine.layers.answer = lambda layer_id: LayerGet(layer_id=layer_id)
    assert peer.ask("layer.get", layer_id="a") == (None, {"layer_id": "a"})


@pytest.mark.parametrize(
    ("method", "params", "code"),
    [
        ("layer.get", {}, "invalid"),
        ("layer.get", {"layer_id": "a", "more": 1}, "invalid"),
        ("layer.get", {"layer_id": "a b"}, "invalid"),
        ("layer.fetch", {"layer_id": "a"}, "unsupported"),
        ("_answer", {}, "unsupported"),
    ],
)
def test_bad_requests(bed, method, params, code):
    peer = bed.peer()
    error, _ = peer.ask(method, **params)
    assert error["code"] == code
    assert peer.ask("agent.status")[0] is None


def test_nothing_before_hello(bed):
    error, _ = bed.peer(hello=False).ask("agent.status")
    assert error["code"] == "denied"


def test_a_subscriber_hears_and_stops_with_its_connection(bed):
    peer = bed.peer()
    bed.events.publish("agent_started")
    _, subscribed = peer.ask("agent.subscribe")
    assert subscribed == {"sequence": 1}
    assert peer.ask("agent.subscribe")[0] is None
    bed.events.publish("layer_mounted", layer_id="a")
    kind, method, (event,) = peer.next()
    assert (kind, method) == (2, "agent.event")
    assert Event.from_wire(event).layer_id == "a"
    _, caught_up = peer.ask("agent.events", since=0)
    assert [item["sequence"] for item in caught_up["events"]] == [1, 2]
    peer.close()
    end = time.monotonic() + WAIT_SECONDS
    followers = bed.service._agent._subscribers._followers
    while followers and time.monotonic() < end:
        bed.peer()
    assert not followers


def test_all_kept_events_can_be_fetched_from_the_oldest_on(bed):
    for _ in range(4096 + 5):
        bed.events.publish("layer_mounted")
    peer, numbers, pages, since = bed.peer(), [], 0, 0
    while True:
        error, reply = peer.ask("agent.events", since=since)
        assert error is None
        assert reply["sequence"] == 4101
        assert reply["dropped"] == (5 if since == 0 else 0)
        numbers += [event["sequence"] for event in reply["events"]]
        pages += 1
        if not reply["more"]:
            break
        since = numbers[-1]
    assert numbers == list(range(6, 4102))
    assert pages == 5
    assert peer.ask("agent.events", since=4101)[1]["more"] is False


def test_events_say_of_which_boot_they_are(bed):
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    peer = bed.peer()
    peer.ask("agent.subscribe")
    bed.events.publish("layer_mounted")
    assert peer.next()[2][0]["boot_id"] == boot_id
    _, reply = peer.ask("agent.events")
    assert (reply["boot_id"], reply["events"][0]["boot_id"]) == (boot_id, boot_id)


def test_subscriber_that_does_not_read_stalls_no_other_peer(tmp_path):
    """Its queue is bounded; what it missed is counted, for it and in the status."""
    bed = Bed(tmp_path, limits=Limits(max_reply_bytes=65536))
    try:
        deaf, other = bed.peer(), bed.peer()
        deaf.ask("agent.subscribe")
        for _ in range(2000):
            bed.events.publish("layer_failed", detail="x" * 1000)
        _, status = other.ask("agent.status")
        assert status["events_dropped"] > 0
        got = [deaf.next()[2][0] for _ in range(2000 - status["events_dropped"])]
        assert [event["dropped"] for event in got] == [0] * len(got)
        bed.events.publish("layer_mounted")
        last = deaf.next()[2][0]
        assert last["kind"] == "layer_mounted"
        assert last["dropped"] == status["events_dropped"]
    finally:
        bed.close()


def test_lists_are_made_one_after_the_other(bed):
    """Each holds a report of every layer while it is made; whoever waits has a deadline."""
    inside, may_go_on = threading.Semaphore(0), threading.Event()

    def listed():
        inside.release()
        assert may_go_on.wait(WAIT_SECONDS)
        return ()

    bed.engine.layers.list = listed
    first, second = bed.peer(), bed.peer()
    first.send("layer.list", {})
    assert inside.acquire(timeout=WAIT_SECONDS)
    error, _ = second.ask("layer.list", deadline_ms=50)
    assert error["code"] == "timeout"
    assert not inside.acquire(blocking=False)
    may_go_on.set()
    assert first.next()[2:] == [None, {"layers": []}]
    assert second.ask("layer.list") == (None, {"layers": []})


# --- calls from this process


def test_a_request_of_this_process_goes_the_same_way(bed):
    bed.engine.layers.answer = lambda layer_id: LayerGet(layer_id=layer_id)
    with Deadline(WAIT_SECONDS) as deadline:
        assert bed.service.call(LayerGet(layer_id="a"), deadline=deadline).layer_id == "a"
        status = bed.service.call(AgentStatus(), deadline=deadline)
    assert status.problems == ("a is odd",)


def test_an_error_in_this_process_is_a_call_error(bed):
    def refuse(layer_id):
        raise CallError("busy", "no")

    bed.engine.layers.answer = refuse
    with Deadline(WAIT_SECONDS) as deadline:
        with call_error("busy", match="no"):
            bed.service.call(LayerGet(layer_id="a"), deadline=deadline)
        bed.engine.layers.answer = lambda layer_id: 1 / 0
        with call_error("internal") as caught:
            bed.service.call(LayerGet(layer_id="a"), deadline=deadline)
        assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "request_", [AgentSubscribe(), AgentCancel(msgid=1), AgentLog(follow=True)], ids=repr
)
def test_this_process_has_no_connection_to_act_on(bed, request_):
    with Deadline(WAIT_SECONDS) as deadline, call_error("unsupported"):
        bed.service.call(request_, deadline=deadline)


def test_progress_reaches_this_process(bed):
    def verify(layer_id, operation, progress):
        progress(1, 2)
        return VerifyReply(
            layer_id=layer_id, read_bytes=2, corrupt_blocks=(), status="V", timings_ms={}
        )

    bed.engine.layers.verify = verify
    told = []
    with Deadline(WAIT_SECONDS) as deadline:
        bed.service.call(
            LayerVerify(layer_id="a"),
            deadline=deadline,
            notify=lambda method, params: told.append((method, dict(params))),
        )
    assert told == [("agent.progress", {"msgid": 0, "done_bytes": 1, "total_bytes": 2})]


def test_policy_judges_before_the_handler_and_filters_what_leaves(bed):
    asked = []

    def refuse(layer_id):
        asked.append(layer_id)
        raise CallError("busy", "process 7 uses it", step="unmount", object="/secret", hint="7")

    bed.engine.layers.answer = refuse
    peer = bed.peer()
    bed.engine.state.gate.put_in_force([Rules(Policy(name="p", svn=0))])
    error, _ = peer.ask("layer.get", layer_id="a")
    assert (error["code"], error["step"], error["object"]) == ("denied", "policy", "expose.methods")
    assert asked == []
    listed = Policy(name="p", svn=0, expose=Exposure(methods=("layer.get",)))
    bed.engine.state.gate.put_in_force([Rules(listed)])
    error, _ = peer.ask("layer.get", layer_id="a")
    assert asked == ["a"]
    assert (error["code"], error["step"], error["object"]) == ("busy", "unmount", None)
    assert (error["message"], error["hint"]) == ("not exposed by the policy", None)
    error, _ = peer.ask("layer.fetch", layer_id="a")
    assert (error["code"], error["hint"]) == ("unsupported", None)
    _, status = peer.ask("agent.status")
    assert status["problems"] == ["not exposed by the policy"]
