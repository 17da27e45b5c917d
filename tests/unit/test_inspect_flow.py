"""Bulk answers: at the pace of the reader, cancelled from either side, memory staying flat."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api.inspect import FsDownload, FsLs
from guestagent.host import AsyncGuestAgent, GuestAgent
from guestagent.host.client.streams import WINDOW_CHUNKS, FsStream
from guestagent.service.streams import MAX_STREAMS
from tests.beds.calls import call_error
from tests.beds.inspectbed import WAIT_SECONDS, Bed, connect, peer_of, serving
from tests.beds.loopbed import sparse_file
from tests.beds.peer import Peer
from vsock.address import UnixAddress
from vsock.deadline import Deadline
from vsock.dial import listen
from vsock.errors import CallError, ConnectionClosed
from vsock.server import Call, Outcome, Server

GIB = 1 << 30
CHUNK_BYTES = 32 * 1024


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests only read."""
    top = tmp_path_factory.mktemp("layer") / "tree"
    top.mkdir()
    with open(top / "sparse", "wb") as file:
        file.truncate(100 * GIB)
        file.seek(99 * GIB)
        file.write(b"here")
    (top / "big").write_bytes(os.urandom(8 << 20))
    (top / "small").write_bytes(b"small")
    return top


@pytest.fixture
def bed(tmp_path: Path, tree: Path) -> Iterator[Bed]:
    with serving(tmp_path / "agent.sock", {"base": tree}) as running:
        yield running


@pytest.fixture
def guest(bed: Bed) -> Iterator[GuestAgent]:
    with connect(bed) as handle:
        yield handle


@pytest.fixture
def peer(bed: Bed) -> Iterator[Peer]:
    """A client of MessagePack-RPC that knows nothing of windows."""
    with peer_of(bed) as raw:
        raw.ask(1, "agent.hello", versions=[1])
        yield raw


def chunks_until_answer(peer: Peer) -> tuple[list[dict[str, object]], object, object]:
    chunks = []
    while True:
        message = peer.next()
        assert isinstance(message, list)
        if message[0] == 1:
            return chunks, message[2], message[3]
        if message[1] == "agent.chunk":
            chunks.append(message[2][0])


def wait_until_at_rest(bed: Bed) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while bed.server.requests_in_flight:
        assert time.monotonic() < end, "a request is still in flight"
        time.sleep(0.005)


def test_chunks_are_small_numbered_and_before_the_answer(peer: Peer, tree: Path) -> None:
    peer.request(2, "fs.download", layer_id="base", path="big")
    chunks, error, result = chunks_until_answer(peer)
    assert error is None
    assert [chunk["sequence"] for chunk in chunks] == list(range(len(chunks)))
    assert isinstance(result, dict)
    assert result["chunks"] == len(chunks)
    pieces = [chunk["data"] for chunk in chunks]
    assert all(isinstance(piece, bytes) and len(piece) <= CHUNK_BYTES for piece in pieces)
    assert b"".join(pieces) == (tree / "big").read_bytes()  # type: ignore[arg-type]


def test_without_a_window_the_connection_holds_the_agent_back(peer: Peer, bed: Bed) -> None:
    peer.request(2, "fs.download", layer_id="base", path="sparse")
    # nothing is read: a request on another connection is answered all the same
    with connect(bed) as other:
        assert other.fs_read_file("small", layer_id="base") == b"small"
        sent = [connection.outbox.pending_bytes for connection in bed.connections()]
    assert max(sent) <= 256 * 1024
    peer.request(3, "agent.cancel", msgid=2)
    messages = []
    while len(messages) < 2:
        message = peer.next()
        assert isinstance(message, list)
        if message[0] == 1:
            messages.append(message)
    by_id = {message[1]: message for message in messages}
    assert by_id[3][3] == {"cancelled": True}
    assert by_id[2][2]["code"] == "cancelled"


def next_chunks(peer: Peer, count: int, answers: dict[int, object]) -> list[object]:
    """Return the sequence numbers of the next chunks; answers may come between them."""
    sequences: list[object] = []
    while len(sequences) < count:
        message = peer.next()
        assert isinstance(message, list)
        if message[0] == 1:
            answers[message[1]] = message[3]
        elif message[1] == "agent.chunk":
            sequences.append(message[2][0]["sequence"])
    return sequences


def test_a_window_holds_the_agent_back_while_the_connection_is_free(peer: Peer, bed: Bed) -> None:
    answers: dict[int, object] = {}
    peer.request(2, "fs.download", layer_id="base", path="sparse", window_chunks=5)
    assert next_chunks(peer, 5, answers) == [0, 1, 2, 3, 4]
    # the answer to this comes next, because the agent waits
    assert peer.ask(3, "agent.more", msgid=77, sequence=3) == {"known": False}
    peer.request(4, "agent.more", msgid=2, sequence=3)
    assert next_chunks(peer, 3, answers) == [5, 6, 7]
    if 4 not in answers:
        assert peer.next() == [1, 4, None, {"known": True}]
    peer.request(5, "agent.cancel", msgid=2)
    over = [peer.next(), peer.next()]
    assert [1, 5, None, {"cancelled": True}] in over
    assert [message[2]["code"] for message in over if message[1] == 2] == ["cancelled"]  # type: ignore[index]
    wait_until_at_rest(bed)


def test_a_deadline_ends_a_reader_that_does_not_ask(peer: Peer, bed: Bed) -> None:
    peer.request(2, "fs.download", layer_id="base", path="sparse", window_chunks=1, deadline_ms=200)
    peer.next()
    assert peer.error() == (2, "timeout")
    wait_until_at_rest(bed)


def test_the_end_of_the_connection_ends_the_work(bed: Bed) -> None:
    for window_chunks in (0, 1):
        with peer_of(bed) as raw:
            raw.ask(1, "agent.hello", versions=[1])
            raw.request(
                2, "fs.download", layer_id="base", path="sparse", window_chunks=window_chunks
            )
            raw.next()
        wait_until_at_rest(bed)


def test_leaving_early_cancels(guest: GuestAgent, bed: Bed) -> None:
    with guest.fs_download_stream("sparse", layer_id="base") as pieces:
        assert next(pieces) == bytes(CHUNK_BYTES - 256)
    wait_until_at_rest(bed)
    assert guest.fs_read_file("small", layer_id="base") == b"small"


def test_other_calls_go_on_while_a_stream_waits(guest: GuestAgent) -> None:
    with guest.fs_download_stream("big", layer_id="base") as pieces:
        taken = 0
        for _ in pieces:
            taken += 1
            if taken % 50 == 0:
                assert guest.fs_read_file("small", layer_id="base") == b"small"
    assert pieces.reply["size_bytes"] == 8 << 20
    assert taken > 2 * WINDOW_CHUNKS


def test_the_garbage_collector_takes_no_lock(guest: GuestAgent) -> None:
    """A stream that is forgotten half-read may be collected by any thread at any time."""
    stream = guest.fs_download_stream("sparse", layer_id="base")
    next(stream)
    msgid = stream._pending.msgid
    with guest._streams.lock:
        guest._streams._streams.pop(msgid)
        del stream
        gc.collect()
    guest.cancel(msgid)
    assert guest.fs_read_file("small", layer_id="base") == b"small"


def test_a_stream_that_was_closed_says_so(guest: GuestAgent) -> None:
    for path in ("sparse", "small"):
        with guest.fs_download_stream(path, layer_id="base") as pieces:
            pass
        with call_error("cancelled"):
            next(pieces)


def test_a_chunk_that_is_lost_on_this_side_is_told(guest: GuestAgent) -> None:
    stream = guest.fs_download_stream("sparse", layer_id="base")
    next(stream)
    stream.take({"msgid": stream._pending.msgid, "sequence": 1 << 20, "data": b"x"})
    with call_error("internal", match="lost"):
        for _ in stream:
            pass


def test_a_handle_that_is_closed_ends_its_streams(bed: Bed) -> None:
    handle = connect(bed)
    stream = handle.fs_download_stream("sparse", layer_id="base")
    next(stream)
    handle.close()
    with pytest.raises(ConnectionClosed):
        for _ in stream:
            pass
    wait_until_at_rest(bed)


def test_a_range_of_a_huge_sparse_file(guest: GuestAgent) -> None:
    assert guest.fs_pread("sparse", 99 * GIB - 2, 8, layer_id="base") == b"\0\0here\0\0"
    stream = guest.fs_download_stream(
        "sparse", layer_id="base", offset_bytes=99 * GIB, size_bytes=4
    )
    assert b"".join(stream) == b"here"
    with call_error("resource"):
        guest.fs_read_file("sparse", layer_id="base")


def test_hashing_a_huge_file_ends_with_its_deadline(guest: GuestAgent, bed: Bed) -> None:
    told: list[tuple[int, int]] = []
    with call_error("timeout"):
        guest.fs_checksum(
            "sparse",
            layer_id="base",
            deadline_ms=800,
            progress=lambda done, total: told.append((done, total)),
        )
    assert told
    assert told[-1][1] == 100 * GIB
    wait_until_at_rest(bed)


def test_streams_beyond_the_limits_of_a_connection_and_of_all_are_busy(
    bed: Bed, guest: GuestAgent
) -> None:
    def begun(by: GuestAgent) -> FsStream[bytes]:
        stream = by.fs_download_stream("sparse", layer_id="base")
        next(stream)
        return stream

    streams = [begun(guest) for _ in range(MAX_STREAMS - 1)]
    with call_error("busy", match="this connection"):
        guest.fs_du("/", layer_id="base")
    with connect(bed) as other:  # one peer cannot take them all
        assert other.fs_du("/", layer_id="base").files == 3
        streams.append(begun(other))
        with call_error("busy"):
            other.fs_du("/", layer_id="base")
    assert guest.fs_lstat("small", layer_id="base").size_bytes == 5
    for stream in streams:
        stream.close()
    wait_until_at_rest(bed)
    assert guest.fs_du("/", layer_id="base").files == 3


def test_descriptors_are_given_back(guest: GuestAgent, bed: Bed) -> None:
    guest.fs_du("/", layer_id="base")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        guest.fs_checksum("small", layer_id="base")
        guest.fs_find("/", layer_id="base").drain()
        with pytest.raises(CallError):
            guest.fs_ls("/nowhere", layer_id="base").drain()
        with guest.fs_download_stream("sparse", layer_id="base") as pieces:
            next(pieces)
        wait_until_at_rest(bed)
    assert len(os.listdir("/proc/self/fd")) == before


SERVE = """
import sys
from pathlib import Path
from tests.beds.inspectbed import serving
with serving(Path(sys.argv[1]), {"base": Path(sys.argv[2])}):
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A directory of many entries and a stream of many bytes leave the agent as large as it was."""
    tree = tmp_path / "tree"
    crowd = tree / "crowd"
    crowd.mkdir(parents=True)
    for name, size_bytes in (("sparse", 100 * GIB), ("big", 8 << 20), ("small", 5)):
        sparse_file((tree / name), size_bytes)
    os.mknod(crowd / "entry number 0")
    for number in range(1, 12_000):  # links, for some file systems are slow at so many new files
        os.link(crowd / "entry number 0", crowd / f"entry number {number}")
    socket_path = tmp_path / "other.sock"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(socket_path), str(tree)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with GuestAgent(f"unix://{socket_path}") as guest:
            guest.fs_download_stream("big", layer_id="base").drain()
            sum(1 for _ in guest.fs_ls("/", layer_id="base"))
            guest.fs_tar_out_stream("/crowd", layer_id="base").close()
            before = _peak_bytes(process.pid)
            assert sum(1 for _ in guest.fs_readdir("crowd", layer_id="base")) == 12_000
            assert sum(1 for _ in guest.fs_find(layer_id="base")) == 12_004
            assert guest.fs_du(layer_id="base").files == 12_003
            guest.fs_download_stream("sparse", layer_id="base", size_bytes=32 << 20).drain()
            assert _peak_bytes(process.pid) - before < 2 << 20
        assert process.stdin is not None
        process.stdin.close()
        process.wait(WAIT_SECONDS)


def _peak_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


# --- what a reader bounds


class _Flood:
    """An agent that sends chunks without regard to the window."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.address = f"unix://{path}"
        self._chunks = chunks
        self.sent = 0
        self._server = Server(self._handle, hello_seconds=None)
        self._server.add_listener(listen(UnixAddress(path=str(path))))
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _handle(self, call: Call) -> Outcome:
        if call.method == "agent.hello":
            hello = {"version": 1, "agent": "0", "kernel": "6", "features": [], "limits": {}}
            return Outcome(None, {**hello, "boot": {}})
        if call.method == "agent.cancel":
            return Outcome(None, {"cancelled": call.connection.cancel(call.params["msgid"])})
        if call.method == "agent.more":
            return Outcome(None, {"known": True})
        call.cancel_on_disconnect = True
        for sequence in range(self._chunks):
            chunk = {"msgid": call.msgid, "sequence": sequence, "data": bytes(CHUNK_BYTES)}
            call.connection.notify_wait("agent.chunk", chunk, call.deadline)
            self.sent += 1
        reply = {"chunks": self._chunks, "size_bytes": self._chunks * CHUNK_BYTES, "timings_ms": {}}
        return Outcome(None, reply)

    def close(self) -> None:
        self._server.stop(0.0)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


@pytest.fixture
def flood(tmp_path: Path) -> Iterator[_Flood]:
    one = _Flood(tmp_path / "flood.sock", 8 * WINDOW_CHUNKS)
    yield one
    one.close()


def test_more_than_the_window_ends_the_stream(flood: _Flood) -> None:
    with GuestAgent(flood.address) as guest, guest.fs_download_stream("x", layer_id="a") as pieces:
        assert len(next(pieces)) == CHUNK_BYTES
        end = time.monotonic() + WAIT_SECONDS
        while flood.sent <= 2 * WINDOW_CHUNKS and time.monotonic() < end:
            time.sleep(0.005)
        with call_error("resource", match="window"):
            list(pieces)


def test_more_than_the_window_ends_the_stream_of_asyncio(flood: _Flood) -> None:
    async def main() -> None:
        async with (
            AsyncGuestAgent(flood.address) as guest,
            await guest.stream(FsDownload(path="x", layer_id="a")) as pieces,
        ):
            await anext(aiter(pieces))
            while flood.sent <= 2 * WINDOW_CHUNKS:
                await asyncio.sleep(0.005)
            with pytest.raises(CallError, match="window"):
                await pieces.drain()

    asyncio.run(asyncio.wait_for(main(), WAIT_SECONDS))


@pytest.mark.parametrize("method", ["fs_download", "fs_tar_out"])
def test_reader_states_its_window_of_chunks(guest: GuestAgent, tmp_path: Path, method: str) -> None:
    target = tmp_path / "target"
    path = "big" if method == "fs_download" else "/"
    with call_error("resource", match="max_bytes"):
        getattr(guest, method)(path, target, layer_id="base", max_bytes=(1 << 20) - 1)
    assert list(tmp_path.glob("*target*")) == []
    reply = guest.fs_download("big", target, layer_id="base", max_bytes=8 << 20)
    assert reply.size_bytes == 8 << 20 == target.stat().st_size


def test_asyncio_reader_states_its_window_of_chunks(bed: Bed, tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncGuestAgent(bed.address) as guest:
            stream = await guest.stream(FsDownload(path="big", layer_id="base"))
            with pytest.raises(CallError, match="max_bytes"):
                await stream.save(tmp_path / "target", max_bytes=1 << 20)

    asyncio.run(asyncio.wait_for(main(), WAIT_SECONDS))
    assert list(tmp_path.glob("*target*")) == []


# --- in the process of the agent


def test_the_service_streams_in_its_own_process(bed: Bed, tree: Path) -> None:
    pieces: list[bytes] = []
    names: list[bytes] = []
    with Deadline(WAIT_SECONDS) as deadline:
        request = FsDownload(path="big", layer_id="base")
        reply = bed.service.stream(request, pieces.append, deadline=deadline)
        bed.service.stream(FsLs(layer_id="base"), names.append, deadline=deadline)
    assert b"".join(pieces) == (tree / "big").read_bytes()
    assert max(map(len, pieces)) <= CHUNK_BYTES
    assert (reply.size_bytes, reply.chunks) == (8 << 20, len(pieces))
    assert sorted(names) == [b"big", b"small", b"sparse"]


def test_a_stream_in_the_process_reads_no_further_than_its_reader(bed: Bed) -> None:
    taken: list[bytes] = []

    def take(piece: bytes) -> None:
        taken.append(piece)
        if len(taken) == 3:
            raise CallError("cancelled", "enough")

    with Deadline(WAIT_SECONDS) as deadline, pytest.raises(CallError, match="enough"):
        bed.service.stream(FsDownload(path="big", layer_id="base"), take, deadline=deadline)
    assert len(taken) == 3

    def take_and_cancel(piece: bytes) -> None:
        taken.append(piece)
        deadline.cancel()

    with Deadline(WAIT_SECONDS) as deadline, call_error("cancelled"):
        bed.service.stream(
            FsDownload(path="sparse", layer_id="base"), take_and_cancel, deadline=deadline
        )
    assert len(taken) == 4
