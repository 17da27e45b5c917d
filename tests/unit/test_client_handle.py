"""Both handles: requests, events by mask, closed handles, reconnecting, newer agents."""

import asyncio
import inspect
import os
import pydoc
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

import guestagent.host
from guestagent.api import METHODS, Event
from guestagent.api.agent import AgentStatus, StatusReply
from guestagent.api.inspect import FoundEntry, FsChecksums, FsFind, FsLs, FsReaddir, FsReadFile
from guestagent.api.layers import LayerVerify
from guestagent.api.observe import AgentMetrics, MetricsReply
from guestagent.host.client import (
    ALL_EVENTS,
    EVENT_BITS,
    HANDLE_EVENTS,
    ClosedHandleError,
    GuestAgent,
    event_mask,
)
from guestagent.host.client.aio import AsyncGuestAgent
from guestagent.host.client.events import Feeds
from guestagent.host.client.streams import Chunks
from tests.beds.calls import call_error
from tests.beds.consolebed import wait_until
from tests.beds.handlebed import WAIT_SECONDS, Agent
from vsock.client import ClosedHandleError as LowerClosedHandleError
from vsock.errors import CallError, ConnectionClosed

PROJECT = Path(__file__).parents[2]
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    one = Agent(tmp_path / "agent")
    yield one
    one.stop()


@pytest.fixture
def guest(agent: Agent) -> Iterator[GuestAgent]:
    with GuestAgent(agent.address) as guest:
        yield guest


def run(
    agent: Agent, scenario: Callable[[AsyncGuestAgent], Awaitable[None]], **how: object
) -> None:
    async def main() -> None:
        async with AsyncGuestAgent(agent.address, **how) as guest:  # type: ignore[arg-type]
            await asyncio.wait_for(scenario(guest), WAIT_SECONDS)

    asyncio.run(main())


# --- methods


def test_both_handles_are_importable_from_the_host_package() -> None:
    assert guestagent.host.GuestAgent is GuestAgent
    assert guestagent.host.AsyncGuestAgent is AsyncGuestAgent
    assert set(guestagent.host.__all__) >= {"ClosedHandleError", "event_mask"}
    with pytest.raises(AttributeError):
        _ = guestagent.host.nothing  # type: ignore[attr-defined]


def test_threads_need_no_asyncio() -> None:
    code = (
        "import sys, guestagent.host; guestagent.host.GuestAgent; print('asyncio' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_both_handles_share_what_they_can_do() -> None:
    """The asyncio handle has no method for each RPC: its call takes any request."""
    shared = {name for name in vars(AsyncGuestAgent) if not name.startswith("_")} - {"open"}
    for name in shared - {"hello"}:
        member, other = getattr(GuestAgent, name), getattr(AsyncGuestAgent, name)
        if not isinstance(member, property):
            ours, theirs = inspect.signature(member), inspect.signature(other)
            assert list(ours.parameters) == list(theirs.parameters), name


def test_every_method_of_the_contract_has_one() -> None:
    inside = {"agent.hello", "agent.more"}
    for method in set(METHODS) - inside:
        name = method.removeprefix("agent.").replace(".", "_")
        assert callable(getattr(GuestAgent, name, None)), method


def test_help_is_a_manual() -> None:
    text = pydoc.plain(pydoc.render_doc(GuestAgent))
    for word in ("CallError", "ConnectionClosed", "ClosedHandleError", "reconnect", "layer_mount"):
        assert word in text


# --- a newer agent


def test_a_reply_may_have_more_fields_than_are_known_here(agent: Agent) -> None:
    agent.more_fields = {"newer": {"any": ["thing"]}}
    with GuestAgent(agent.address) as guest:
        assert guest.status().state == "ready"
        agent.layers["base"] = "mounted"
        assert guest.layer_list()[0].layer_id == "base"
        with call_error("not_found"):
            guest.layer_get("x")

    async def scenario(other: AsyncGuestAgent) -> None:
        assert (await other.call(AgentStatus())).state == "ready"

    run(agent, scenario)


def test_a_status_may_count_less_than_this_client_knows() -> None:
    status = StatusReply.from_wire({"state": "ready", "pid": 7}, "reply", strict=False)
    assert (status.pid, status.threads) == (7, 0)


def test_an_event_may_be_newer_than_this_client(agent: Agent) -> None:
    seen: queue.Queue[tuple[int, str]] = queue.Queue()
    agent.more_fields = {"newer": 1}
    with GuestAgent(agent.address, reconnect=True) as guest:
        guest.set_event_callback(lambda event: seen.put((event.sequence, event.kind)))
        guest.set_event_callback(lambda event: seen.put((0, "")), event_mask("layer_failed"))
        agent.publish("layer_mounted")
        assert seen.get(timeout=WAIT_SECONDS) == (1, "layer_mounted")
        agent.publish("layer_polished")
        assert seen.get(timeout=WAIT_SECONDS) == (2, "layer_polished")
        agent.log()
        guest.follow_log(lambda line: seen.put((line.number, line.text)))
        agent.log()
        assert seen.get(timeout=WAIT_SECONDS) == (2, "line 2")
        agent.stop()
        agent.publish("layer_polished")
        agent.start()
        assert seen.get(timeout=WAIT_SECONDS) == (3, "layer_polished")


def test_a_malformed_reply_is_an_error_of_the_agent(agent: Agent) -> None:
    """Not of the caller, whose request was right."""
    agent.more_fields = {"text": 5}
    with (
        GuestAgent(agent.address) as guest,
        call_error(
            "internal", match=r"agent\.metrics is malformed: reply\.text", object="reply.text"
        ),
    ):
        guest.metrics()


def test_an_answer_that_is_no_map_ends_the_stream() -> None:
    chunks = Chunks(FsLs(layer_id="a"))
    chunks.answer([], None)
    assert chunks.is_ready
    with call_error("internal", match="malformed"):
        chunks.next_items()


@pytest.mark.parametrize(
    "content",
    [
        {"data": bytes(40_000)},
        {"entries": [[bytes(1000)]] * 40},
        {"entries": [[]] * 4000},
        {"data": b"", "entries": [["a" * 10_000]]},
        {"data": b"", "more": {"a": bytes(40_000)}},
    ],
    ids=["bytes", "entries", "empty entries", "text", "a field that is unknown"],
)
def test_a_chunk_past_its_bound_is_not_kept(content: dict[str, object]) -> None:
    """With the window of 64 chunks this bounds what an agent makes a handle hold."""
    chunks = Chunks(FsLs(layer_id="a"))
    chunks.take({"msgid": 1, "sequence": 0, **content})
    with call_error("resource", match=r"a chunk of \d+ bytes; 33024 are the most"):
        chunks.next_items()


def test_the_largest_chunks_of_an_agent_are_taken() -> None:
    data = Chunks(FsReadFile(layer_id="a", path="x"))
    data.take({"msgid": 2**32 - 1, "sequence": 0, "data": bytes(32 * 1024)})
    assert data.next_items() == [bytes(32 * 1024)]
    names = [[bytes(255)] for _ in range((32 * 1024 - 256) // (255 + 2 * 9))]
    entries = Chunks(FsLs(layer_id="a"))
    entries.take({"msgid": 2**32 - 1, "sequence": 0, "entries": names})
    assert entries.next_items() == [bytes(255)] * len(names)


def test_an_entry_may_be_longer_than_is_known_here() -> None:
    status = [b"a", "f", 0o644, 0, 0, 5, 1, 2, 3, None, None]
    (entry,) = FsReaddir.items({"entries": [[*status, "newer"]]})
    assert (entry.name, entry.target) == (b"a", None)
    assert list(FsLs.items({"entries": [[b"a", 1]]})) == [b"a"]
    assert list(FsFind.items({"entries": [[b"a", "f", 1]]})) == [FoundEntry(path=b"a", kind="f")]
    (checksum,) = FsChecksums.items({"entries": [[b"a", "f", 5, "ab", 1]]})
    assert checksum.digest == "ab"
    with pytest.raises(TypeError, match="target"):
        list(FsReaddir.items({"entries": [status[:-1]]}))


def test_a_request_with_a_field_that_is_unknown_is_refused() -> None:
    for method, request in METHODS.items():
        with pytest.raises(CallError, match="newer: unknown parameter") as caught:
            request.from_wire({"newer": 1})
        assert caught.value.object == "params.newer", method


# --- errors


def test_an_error_keeps_all_it_says(guest: GuestAgent) -> None:
    with pytest.raises(CallError) as caught:
        guest.layer_get("x")
    error = caught.value
    assert (error.code, error.errno, error.step) == ("not_found", 2, "look")
    assert (error.object, error.hint) == ("x", "list")


def test_a_closed_handle_says_so(agent: Agent) -> None:
    with GuestAgent(agent.address) as guest:
        assert not guest.closed
    assert guest.closed
    guest.close()
    with pytest.raises(ClosedHandleError):
        guest.metrics()
    with pytest.raises(ClosedHandleError):
        guest.layer_verify("x")
    assert ClosedHandleError is LowerClosedHandleError
    assert issubclass(ClosedHandleError, ConnectionClosed)


def test_a_closed_asyncio_handle_says_so(agent: Agent) -> None:
    async def main() -> None:
        guest = AsyncGuestAgent(agent.address)
        for _ in range(2):
            with pytest.raises(ClosedHandleError):
                await guest.call(AgentMetrics())
            with pytest.raises(ClosedHandleError):
                assert guest.hello
            await guest.close()
        with pytest.raises(ClosedHandleError):
            await guest.open()

    asyncio.run(main())


def test_a_lost_connection_is_not_made_again_unasked(agent: Agent, guest: GuestAgent) -> None:
    agent.stop()
    agent.start()
    for _ in range(2):
        with pytest.raises(ConnectionClosed) as caught:
            guest.metrics()
        assert not isinstance(caught.value, ClosedHandleError)
    assert guest.reconnects == 0


# --- events


def test_callbacks_get_what_their_mask_says(agent: Agent, guest: GuestAgent) -> None:
    seen: queue.Queue[tuple[str, str]] = queue.Queue()
    corrupted = event_mask("layer_corrupted")
    guest.set_event_callback(lambda event: seen.put(("all", event.kind)))
    guest.set_event_callback(lambda event: seen.put(("some", event.kind)), corrupted)
    agent.publish("layer_mounted")
    agent.publish("layer_corrupted")
    got = [seen.get(timeout=WAIT_SECONDS) for _ in range(3)]
    assert got == [
        ("all", "layer_mounted"),
        ("all", "layer_corrupted"),
        ("some", "layer_corrupted"),
    ]
    assert len(agent.subscribers) == 1


def test_a_deleted_callback_is_called_no_more(agent: Agent, guest: GuestAgent) -> None:
    seen: queue.Queue[str] = queue.Queue()
    first = guest.set_event_callback(lambda event: seen.put("first"))
    guest.set_event_callback(lambda event: seen.put("second"))
    assert guest.delete_event_callback(first)
    assert not guest.delete_event_callback(first)
    agent.publish("layer_mounted")
    assert seen.get(timeout=WAIT_SECONDS) == "second"
    assert seen.empty()


def test_a_callback_may_call_and_delete_itself(agent: Agent, guest: GuestAgent) -> None:
    seen: queue.Queue[str] = queue.Queue()

    def callback(_event: Event) -> None:
        guest.delete_event_callback(number)
        seen.put(guest.metrics())

    number = guest.set_event_callback(callback)
    agent.publish("layer_mounted")
    agent.publish("layer_mounted")
    assert seen.get(timeout=WAIT_SECONDS) == "guestagent_up 1\n"
    guest.metrics()
    assert seen.empty()


def test_a_callback_whose_subscription_fails_is_not_kept(agent: Agent) -> None:
    seen: queue.Queue[str] = queue.Queue()
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        agent.refusal = CallError("resource", "no room")
        with pytest.raises(CallError, match="no room"):
            guest.set_event_callback(lambda event: seen.put("first"))
        agent.refusal = None
        guest.set_event_callback(lambda event: seen.put("second"))
        agent.publish("layer_mounted")
        assert seen.get(timeout=WAIT_SECONDS) == "second"
        assert seen.empty()


@pytest.mark.parametrize("mask", [0, -1, 1 << len(EVENT_BITS)])
def test_a_mask_of_no_events_is_refused(guest: GuestAgent, mask: int) -> None:
    with pytest.raises(ValueError, match="mask"):
        guest.set_event_callback(print, mask)


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="layer_mounted"):
        event_mask("layer_munted")


def test_asyncio_callbacks_get_what_their_mask_says(agent: Agent) -> None:
    async def scenario(guest: AsyncGuestAgent) -> None:
        seen: asyncio.Queue[str] = asyncio.Queue()
        number = await guest.set_event_callback(lambda event: seen.put_nowait("all"))
        await guest.set_event_callback(
            lambda event: seen.put_nowait(event.kind), event_mask("layer_failed")
        )
        assert guest.delete_event_callback(number)
        agent.publish("layer_mounted")
        agent.publish("layer_failed")
        assert await seen.get() == "layer_failed"
        assert seen.empty()

    run(agent, scenario)


# --- progress, traces


def test_progress_is_told(agent: Agent, guest: GuestAgent) -> None:
    places: list[tuple[int, int]] = []
    guest.layer_verify("x", progress=lambda *place: places.append(place))
    assert places == [(1, 2), (2, 2)]

    async def scenario(other: AsyncGuestAgent) -> None:
        again: list[tuple[int, int]] = []
        await other.call(LayerVerify(layer_id="x"), progress=lambda *place: again.append(place))
        assert again == [(1, 2), (2, 2)]

    run(agent, scenario)


def test_a_trace_is_on_every_request(agent: Agent) -> None:
    with GuestAgent(agent.address, traceparent=TRACE) as guest:
        guest.metrics()
        guest.layer_verify("x")
    assert agent.traces[-2:] == [TRACE, TRACE]
    traces = iter((None, TRACE))
    with GuestAgent(agent.address, traceparent=lambda: next(traces)) as guest:
        guest.metrics()
        guest.metrics()
    assert agent.traces[-2:] == [None, TRACE]

    async def scenario(other: AsyncGuestAgent) -> None:
        await other.call(AgentMetrics())

    run(agent, scenario, traceparent=TRACE)
    assert agent.traces[-1] == TRACE


# --- connecting


@pytest.fixture
def hanging_up(tmp_path: Path) -> Iterator[tuple[str, list[int]]]:
    """Takes two connections and ends them unheard; then an agent is there."""
    path = tmp_path / "agent"
    taken: list[int] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        agents: list[Agent] = []

        def work() -> None:
            for number in range(2):
                sock, _ = listener.accept()
                taken.append(number)
                sock.close()
            agents.append(Agent(path))

        thread = threading.Thread(target=work)
        thread.start()
        yield f"unix://{path}", taken
        thread.join(WAIT_SECONDS)
        agents[0].stop()


def test_connecting_goes_on_after_a_hang_up_before_hello(hanging_up: tuple[str, list[int]]) -> None:
    address, taken = hanging_up
    with GuestAgent(address, connect_seconds=WAIT_SECONDS) as guest:
        assert guest.metrics()
    assert taken == [0, 1]


def test_asyncio_tries_again_after_a_hang_up_before_hello(
    hanging_up: tuple[str, list[int]],
) -> None:
    address, taken = hanging_up

    async def main() -> None:
        async with AsyncGuestAgent(address, connect_seconds=WAIT_SECONDS) as guest:
            assert (await guest.call(AgentMetrics())).text

    asyncio.run(main())
    assert taken == [0, 1]


# --- reconnecting


def test_handle_with_reconnect_connects_again_after_a_loss(agent: Agent) -> None:
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.metrics()
        agent.stop()
        agent.start()
        # a call before the loss is noticed is lost as well
        wait_until(lambda: guest.closed or guest.reconnects, "the loss is not noticed")
        assert guest.metrics() == "guestagent_up 1\n"
        assert guest.reconnects == 1
    with pytest.raises(ClosedHandleError):
        guest.metrics()


def test_missed_events_come_once_and_in_order(agent: Agent) -> None:
    seen: queue.Queue[int] = queue.Queue()
    agent.publish("agent_started")
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.set_event_callback(lambda event: seen.put(event.sequence))
        agent.publish("layer_mounted")
        assert seen.get(timeout=WAIT_SECONDS) == 2
        agent.stop()
        agent.publish("layer_mounted")
        agent.publish("layer_corrupted")
        agent.start()
        assert [seen.get(timeout=WAIT_SECONDS) for _ in range(2)] == [3, 4]
        agent.publish("layer_mounted")
        assert seen.get(timeout=WAIT_SECONDS) == 5
        assert seen.empty()


def test_events_before_the_callback_are_not_missed(agent: Agent) -> None:
    seen: queue.Queue[int] = queue.Queue()
    for _ in range(5):
        agent.publish("layer_mounted")
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.set_event_callback(lambda event: seen.put(event.sequence))
        agent.stop()
        agent.publish("layer_mounted")
        agent.start()
        assert seen.get(timeout=WAIT_SECONDS) == 6
        assert seen.empty()


def test_an_event_that_is_both_caught_up_on_and_sent_comes_once() -> None:
    feeds, seen = Feeds(), []
    feeds.add(lambda event: seen.append(event.sequence), ALL_EVENTS)
    for sequence in (1, 2, 2, 1, 3):
        event = Event(sequence=sequence, kind="layer_mounted", unix_ms=0)
        feeds.notified("agent.event", event.to_wire())
    assert seen == [1, 2, 3]


def test_another_boot_counts_anew(agent: Agent) -> None:
    seen: queue.Queue[tuple[int, str]] = queue.Queue()
    for _ in range(5):
        agent.publish("agent_started")
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.set_event_callback(lambda event: seen.put((event.sequence, event.kind)))
        agent.stop()
        agent.events.clear()
        agent.publish("agent_started")
        agent.start()
        assert seen.get(timeout=WAIT_SECONDS) == (1, "agent_started")
        agent.publish("layer_mounted")
        assert seen.get(timeout=WAIT_SECONDS) == (2, "layer_mounted")


def test_nothing_of_another_boot_is_missed(agent: Agent) -> None:
    """The new boot has numbered further than the client had come in the old one."""
    seen: queue.Queue[tuple[str, int]] = queue.Queue()
    agent.publish("agent_started")
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.set_event_callback(lambda event: seen.put(("event", event.sequence)))
        guest.follow_log(lambda line: seen.put(("line", line.number)))
        agent.publish("layer_mounted")
        assert seen.get(timeout=WAIT_SECONDS) == ("event", 2)
        agent.log()
        assert seen.get(timeout=WAIT_SECONDS) == ("line", 1)
        agent.stop()
        agent.reboot()
        got = {seen.get(timeout=WAIT_SECONDS) for _ in range(7)}
        assert got == {("event", n) for n in (1, 2, 3, 4)} | {("line", n) for n in (1, 2, 3)}


def test_nothing_of_another_boot_is_missed_with_asyncio(agent: Agent) -> None:
    agent.publish("agent_started")

    async def scenario(guest: AsyncGuestAgent) -> None:
        seen: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        await guest.set_event_callback(lambda event: seen.put_nowait(("event", event.sequence)))
        await guest.follow_log(lambda line: seen.put_nowait(("line", line.number)))
        agent.log()
        assert await seen.get() == ("line", 1)
        await asyncio.to_thread(agent.stop)
        agent.reboot()
        got = {await seen.get() for _ in range(7)}
        assert got == {("event", n) for n in (1, 2, 3, 4)} | {("line", n) for n in (1, 2, 3)}

    run(agent, scenario, reconnect=True)


def test_missed_events_are_fetched_page_by_page(agent: Agent) -> None:
    seen: queue.Queue[int] = queue.Queue()
    agent.events_per_page = 3
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.set_event_callback(lambda event: seen.put(event.sequence))
        agent.stop()
        for _ in range(10):
            agent.publish("layer_mounted")
        agent.start()
        assert [seen.get(timeout=WAIT_SECONDS) for _ in range(10)] == list(range(1, 11))
        reply = guest.events(since=2)
        assert [event.sequence for event in reply.events] == list(range(3, 11))
        assert not reply.more


def test_a_loss_while_catching_up_loses_no_event(agent: Agent) -> None:
    """Events come on the new connection, which ends before the missed ones are told."""
    seen: queue.Queue[int] = queue.Queue()
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.set_event_callback(lambda event: seen.put(event.sequence))
        agent.stop()
        agent.publish("layer_mounted")
        agent.hang_ups = 1
        agent.start()
        assert [seen.get(timeout=WAIT_SECONDS) for _ in range(2)] == [1, 2]
        assert guest.reconnects == 2


def test_pages_of_events_end(agent: Agent, guest: GuestAgent) -> None:
    """An agent that says that there is more, and sends the same again."""
    agent.publish("layer_mounted")
    agent.more_fields = {"more": True}
    assert len(guest.events().events) < 100


def test_the_log_goes_on_over_a_lost_connection(agent: Agent) -> None:
    seen: queue.Queue[int] = queue.Queue()
    agent.log()
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        guest.follow_log(lambda line: seen.put(line.number))
        agent.log()
        assert seen.get(timeout=WAIT_SECONDS) == 2
        agent.stop()
        agent.log()
        agent.start()
        assert seen.get(timeout=WAIT_SECONDS) == 3
        agent.log()
        assert seen.get(timeout=WAIT_SECONDS) == 4
        assert seen.empty()


def test_handle_without_agent_raises_and_closes_at_once(agent: Agent) -> None:
    guest = GuestAgent(agent.address, reconnect=True, connect_seconds=0.3)
    with guest:
        agent.stop()
        with pytest.raises(ConnectionClosed):
            guest.metrics()
        begin = time.monotonic()
    assert time.monotonic() - begin < 5
    agent.start()


def lose_one_hello(path: str) -> threading.Thread:
    """Listen at ``path``; take one connection, close it and the listener."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()

    def lose() -> None:
        with server:
            server.accept()[0].close()
            os.unlink(path)

    thread = threading.Thread(target=lose)
    thread.start()
    return thread


def test_an_agent_that_cannot_be_reached_is_told_with_the_whole_wait(tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    thread = lose_one_hello(path)
    with pytest.raises(ConnectionClosed, match=r"within 0\.4 s: .*No such file"):
        GuestAgent(f"unix://{path}", connect_seconds=0.4)
    thread.join(WAIT_SECONDS)

    async def main() -> None:
        await AsyncGuestAgent(f"unix://{path}", connect_seconds=0.4).open()

    thread = lose_one_hello(path)
    with pytest.raises(ConnectionClosed, match=r"within 0\.4 s: .*No such file"):
        asyncio.run(main())
    thread.join(WAIT_SECONDS)


def test_threads_share_a_handle_over_a_lost_connection(agent: Agent) -> None:
    answers: list[str] = []
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:

        def work() -> None:
            for _ in range(20):
                try:
                    answers.append(guest.metrics())
                except ConnectionClosed:
                    continue  # in flight when it was lost

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        agent.stop()
        agent.start()
        for thread in threads:
            thread.join(WAIT_SECONDS)
        assert guest.metrics()
    assert len(answers) >= 8 * 18


def test_asyncio_reconnects_and_catches_up(agent: Agent) -> None:
    async def scenario(guest: AsyncGuestAgent) -> None:
        events: asyncio.Queue[int] = asyncio.Queue()
        lines: asyncio.Queue[int] = asyncio.Queue()
        await guest.set_event_callback(lambda event: events.put_nowait(event.sequence))
        await guest.follow_log(lambda line: lines.put_nowait(line.number))
        await asyncio.to_thread(agent.stop)
        agent.publish("layer_mounted")
        agent.log()
        agent.start()
        assert await events.get() == 1
        assert await lines.get() == 1
        agent.publish("layer_mounted")
        assert await events.get() == 2
        assert (await guest.call(AgentMetrics())).text
        assert guest.reconnects == 1

    run(agent, scenario, reconnect=True)


def test_asyncio_waits_no_longer_than_asked(agent: Agent) -> None:
    async def scenario(guest: AsyncGuestAgent) -> None:
        await asyncio.to_thread(agent.stop)
        with pytest.raises(ConnectionClosed):
            await guest.call(AgentMetrics())

    run(agent, scenario, reconnect=True, connect_seconds=0.3)
    agent.start()


def test_any_request_can_be_sent(agent: Agent, guest: GuestAgent) -> None:
    assert guest.call(AgentMetrics()) == MetricsReply(text="guestagent_up 1\n")

    async def scenario(other: AsyncGuestAgent) -> None:
        assert await other.call(AgentMetrics()) == MetricsReply(text="guestagent_up 1\n")

    run(agent, scenario)


def test_no_time_left_is_a_timeout_and_nothing_is_sent(agent: Agent, guest: GuestAgent) -> None:
    sent = len(agent.traces)
    for ask in (
        lambda: guest.call(AgentMetrics(), deadline_ms=0),
        lambda: guest.layer_verify("x", deadline_ms=0),
        lambda: guest.fs_ls(layer_id="x", deadline_ms=0),
    ):
        with call_error("timeout", errno=None):
            ask()

    async def scenario(other: AsyncGuestAgent) -> None:
        with call_error("timeout"):
            await other.call(AgentMetrics(), deadline_ms=0)

    run(agent, scenario)
    assert len(agent.traces) == sent + 1  # the hello of the second handle


def test_a_request_is_cancelled_from_another_thread(agent: Agent, guest: GuestAgent) -> None:
    pending = guest.start(LayerVerify(layer_id="slow"))
    assert agent.waiting.wait(WAIT_SECONDS)
    assert not pending.done
    outcomes: queue.Queue[str] = queue.Queue()

    def wait() -> None:
        try:
            pending.result()
        except CallError as error:
            outcomes.put(error.code)

    thread = threading.Thread(target=wait)
    thread.start()
    pending.cancel()
    assert outcomes.get(timeout=WAIT_SECONDS) == "cancelled"
    thread.join(WAIT_SECONDS)
    assert pending.done
    pending.cancel()


def test_a_request_that_was_started_gives_its_typed_reply(guest: GuestAgent) -> None:
    with guest.start(AgentMetrics()) as pending:
        assert pending.result() == MetricsReply(text="guestagent_up 1\n")
        assert pending.result().text


def test_leaving_the_block_of_a_started_request_cancels_it(agent: Agent, guest: GuestAgent) -> None:
    with guest.start(LayerVerify(layer_id="slow")):
        assert agent.waiting.wait(WAIT_SECONDS)
    assert agent.cancelled.wait(WAIT_SECONDS)


def test_the_end_of_a_connection_is_told(agent: Agent) -> None:
    told: queue.Queue[ConnectionClosed] = queue.Queue()
    with GuestAgent(agent.address, on_disconnect=told.put) as guest:
        agent.stop()
        why = told.get(timeout=WAIT_SECONDS)
        assert not isinstance(why, ClosedHandleError)
        assert guest.closed
    agent.start()
    with GuestAgent(agent.address, on_disconnect=told.put):
        pass
    assert isinstance(told.get(timeout=WAIT_SECONDS), ClosedHandleError)
    with GuestAgent(
        agent.address, on_disconnect=told.put, reconnect=True, connect_seconds=10
    ) as guest:
        for _ in range(2):
            agent.stop()
            assert not isinstance(told.get(timeout=WAIT_SECONDS), ClosedHandleError)
            agent.start()
            assert guest.metrics()
    assert isinstance(told.get(timeout=WAIT_SECONDS), ClosedHandleError)
    assert told.empty()


def test_the_end_of_a_connection_is_told_to_asyncio(agent: Agent) -> None:
    told: asyncio.Queue[ConnectionClosed] = asyncio.Queue()

    async def scenario(guest: AsyncGuestAgent) -> None:
        await asyncio.to_thread(agent.stop)
        assert not isinstance(await told.get(), ClosedHandleError)

    run(agent, scenario, on_disconnect=told.put_nowait)
    agent.start()


def test_callbacks_for_events_get_those_of_the_handle(agent: Agent) -> None:
    """Those that ask for them, each with the reason; the agent is not asked for these alone."""
    told: queue.Queue[Event] = queue.Queue()
    asked: queue.Queue[Event] = queue.Queue()
    mask = event_mask(*HANDLE_EVENTS)
    with GuestAgent(agent.address, reconnect=True, connect_seconds=10) as guest:
        assert guest.set_event_callback(told.put, mask)
        assert agent.subscribers == []
        guest.set_event_callback(asked.put)
        deleted = guest.set_event_callback(asked.put, mask)
        assert guest.delete_event_callback(deleted)
        agent.stop()
        event = told.get(timeout=WAIT_SECONDS)
        assert (event.kind, event.sequence) == ("connection_lost", 0)
        assert "closed the connection" in event.detail
        assert event.unix_ms > 0
        agent.start()
        assert guest.metrics()
    event = told.get(timeout=WAIT_SECONDS)
    assert event.kind == "handle_closed"
    assert event.detail
    assert told.empty()
    assert asked.empty()


def test_a_callback_that_closes_its_handle_is_told_so(agent: Agent) -> None:
    """The end comes while that callback runs, and does not wait for it."""
    told: queue.Queue[str] = queue.Queue()
    guest = GuestAgent(agent.address)

    def close(event: Event) -> None:
        guest.close()
        told.put(event.kind)

    guest.set_event_callback(lambda event: told.put(event.kind), event_mask("handle_closed"))
    guest.set_event_callback(close, event_mask("layer_mounted"))
    agent.publish("layer_mounted")
    assert [told.get(timeout=WAIT_SECONDS) for _ in range(2)] == ["handle_closed", "layer_mounted"]


def test_asyncio_callbacks_get_the_events_of_the_handle(agent: Agent) -> None:
    told: asyncio.Queue[Event] = asyncio.Queue()

    async def scenario(guest: AsyncGuestAgent) -> None:
        await guest.set_event_callback(told.put_nowait, event_mask(*HANDLE_EVENTS))
        assert agent.subscribers == []
        await asyncio.to_thread(agent.stop)
        event = await told.get()
        assert event.kind == "connection_lost"
        assert "closed the connection" in event.detail

    run(agent, scenario)
    agent.start()

    async def closing(guest: AsyncGuestAgent) -> None:
        await guest.set_event_callback(told.put_nowait, event_mask("handle_closed"))

    run(agent, closing)
    assert told.get_nowait().kind == "handle_closed"
    assert told.empty()


def test_a_connection_that_never_said_hello_is_not_told_of(tmp_path: Path) -> None:
    told: list[ConnectionClosed] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        with pytest.raises(ConnectionClosed):
            GuestAgent(f"unix://{tmp_path}/socket", connect_seconds=0.1, on_disconnect=told.append)
    assert told == []


def test_a_cancelled_task_cancels_its_request(agent: Agent) -> None:
    async def scenario(guest: AsyncGuestAgent) -> None:
        task = asyncio.create_task(guest.call(LayerVerify(layer_id="slow")))
        await asyncio.to_thread(agent.waiting.wait, WAIT_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(agent.cancelled.wait, WAIT_SECONDS)

    run(agent, scenario)
