"""What happens is told: corruption within a second, disks that come and go, numbered on and on."""

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import Event
from tests.beds.agentbed import AgentProcess, EngineBed, Pack, attached_pack, overlay
from tests.beds.calls import call_error, run
from vsock.errors import CallError

LOOP_CLR_FD = 0x4C01  # linux/loop.h
WAIT_SECONDS = 60.0


class Heard:
    """Events as they come, with the moment of each."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.events: list[tuple[float, Event]] = []

    def __call__(self, event: Event) -> None:
        with self._changed:
            self.events.append((time.monotonic(), event))
            self._changed.notify_all()

    def wait_for(self, kind: str) -> tuple[float, Event]:
        def found() -> tuple[float, Event] | None:
            return next((item for item in self.events if item[1].kind == kind), None)

        with self._changed:
            item = self._changed.wait_for(found, WAIT_SECONDS)
        assert item, f"no {kind} among {[event.kind for _, event in self.events]}"
        return item


@pytest.fixture
def pack(tmp_path: Path) -> Iterator[Pack]:
    with attached_pack(tmp_path / "pack", 2) as pack:
        yield pack


def corrupt(pack: Pack, number: int, block: int) -> None:
    """Flip a bit in the disk, past the page cache of what is mounted."""
    offset = pack.layers[number].mapping.offset_bytes + block * 4096 + 7
    with pack.image.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
        file.flush()
        os.fsync(file.fileno())
    run("blockdev", "--flushbufs", pack.node)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def block_of_marker(pack: Pack, number: int) -> int:
    place = pack.layers[number].mapping.offset_bytes
    data = pack.image.read_bytes()[place : place + pack.layers[number].mapping.size_bytes]
    return data.index(pack.layers[number].marker) // 4096


def test_a_corrupt_block_is_told_within_a_second(bed: EngineBed, pack: Pack) -> None:
    heard = Heard()
    bed.engine.events.listen(heard)
    report = bed.ask(bed.engine.layers.mount, pack.spec(0))
    block = block_of_marker(pack, 0)
    corrupt(pack, 0, block)
    begin = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        Path(report.target, "who").read_bytes()
    at, event = heard.wait_for("layer_corrupted")
    assert at - begin < 1.0
    assert (event.layer_id, event.block) == ("layer0", block)
    after = bed.engine.layers.get("layer0")
    assert after.state == "corrupted"
    assert after.verity is not None
    assert after.verity.status == "C"
    with bed.operation() as op:
        verified = bed.engine.layers.verify("layer0", op, lambda done, total: None)
    assert verified.corrupt_blocks == (block,)
    assert verified.status == "C"


def test_a_corrupt_block_is_published_once_and_the_limit_of_the_kernel_told(
    bed: EngineBed, pack: Pack
) -> None:
    """dm-verity reports a block at each read of it, 100 times a device, and then no more."""
    report = bed.ask(bed.engine.layers.mount, pack.spec(0))
    block = block_of_marker(pack, 0)
    corrupt(pack, 0, block)
    heard = Heard()
    bed.engine.events.listen(heard)
    for _ in range(120):
        with contextlib.suppress(OSError):
            Path(report.target, "who").read_bytes()
        Path("/proc/sys/vm/drop_caches").write_text("1")
    with heard._changed:
        assert heard._changed.wait_for(lambda: len(heard.events) > 1, WAIT_SECONDS)
    events = [each for each in bed.engine.events.since(0)[0] if each.kind == "layer_corrupted"]
    said = f"data block {block} does not verify"
    assert [each.detail for each in events] == [
        said,
        f"{said}; the kernel reports no more of this layer, layer.verify finds all",
    ]


def test_a_layer_that_is_corrupt_from_the_start_is_refused(bed: EngineBed, pack: Pack) -> None:
    corrupt(pack, 0, 0)
    with bed.operation() as op, call_error("integrity"):
        bed.engine.layers.mount(pack.spec(0), op)
    (event,) = [event for event in bed.engine.events.since(0)[0] if event.kind == "layer_failed"]
    assert event.layer_id == "layer0"


def test_verify_reads_all_tells_progress_and_can_be_cancelled(bed: EngineBed, pack: Pack) -> None:
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    places: list[tuple[int, int]] = []
    with bed.operation() as op:
        reply = bed.engine.layers.verify("layer0", op, lambda *place: places.append(place))
    assert reply.read_bytes == places[-1][0] == places[-1][1] > 0
    assert (reply.corrupt_blocks, reply.status) == ((), "V")
    with bed.operation() as op:
        op.deadline.cancel()
        with pytest.raises(CallError) as caught:
            bed.engine.layers.verify("layer0", op, lambda *place: None)
    assert caught.value.code == "cancelled"


def test_a_verify_under_way_is_cancelled_at_its_next_chunk(
    bed: EngineBed, pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestagent.engine.verity._CHUNK_BYTES", 512)
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    before = sorted(os.listdir("/proc/self/fd"))
    places: list[int] = []
    with bed.operation() as op:

        def cancel_at_the_second(done: int, total: int) -> None:
            assert total > 3 * 512
            places.append(done)
            if len(places) == 2:
                op.deadline.cancel()

        with pytest.raises(CallError) as caught:
            bed.engine.layers.verify("layer0", op, cancel_at_the_second)
    assert (caught.value.code, caught.value.step) == ("cancelled", "verify")
    assert places == [512, 1024]
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert bed.engine.layers.get("layer0").state == "mounted"


def test_verify_of_a_plain_layer_is_unsupported(bed: EngineBed, pack: Pack) -> None:
    bed.ask(bed.engine.layers.mount, pack.spec(0, verity=None))
    with bed.operation() as op, call_error("unsupported"):
        bed.engine.layers.verify("layer0", op, lambda *place: None)


def test_the_life_of_layers_and_overlays_is_told_in_order(bed: EngineBed, pack: Pack) -> None:
    since = bed.engine.events.sequence
    bed.ask(bed.engine.layers.mount, pack.spec(0))
    bed.ask(bed.engine.overlays.mount, overlay("o", "layer0"))
    bed.ask(bed.engine.overlays.unmount, "o")
    bed.ask(bed.engine.layers.unmount, "layer0")
    events = [e for e in bed.engine.events.since(since)[0] if not e.kind.startswith("device")]
    assert [(event.kind, event.layer_id or event.overlay_id) for event in events] == [
        ("layer_mounted", "layer0"),
        ("overlay_mounted", "o"),
        ("overlay_unmounted", "o"),
        ("layer_unmounted", "layer0"),
    ]
    numbers = [event.sequence for event in bed.engine.events.since(0)[0]]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_subscriber_gets_events_and_catches_up_after_a_restart(pack: Pack) -> None:
    with AgentProcess() as agent:
        heard = Heard()
        with agent.client() as guest:
            guest.subscribe(heard)
            guest.layer_mount(pack.spec(0))
            _, event = heard.wait_for("layer_mounted")
        agent.kill()
        agent.start()
        with agent.client() as guest:
            missed = guest.events(event.sequence)
            assert missed.dropped + len(missed.events) >= 1
            assert missed.events[-1].kind == "agent_started"
            assert missed.events[-1].sequence > event.sequence
            guest.shutdown("exit")


def test_a_disk_that_comes_and_goes(bed: EngineBed, tmp_path: Path) -> None:
    heard = Heard()
    bed.engine.events.listen(heard)
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    control = os.open("/dev/loop-control", os.O_RDWR)
    try:
        number = fcntl.ioctl(control, 0x4C80, 200)  # LOOP_CTL_ADD
        _, appeared = heard.wait_for("device_appeared")
        fcntl.ioctl(control, 0x4C81, number)  # LOOP_CTL_REMOVE
        _, vanished = heard.wait_for("device_vanished")
    finally:
        os.close(control)
    assert appeared.device == vanished.device == f"/dev/loop{number}"
