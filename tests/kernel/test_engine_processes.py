"""Batches that are worked on by several processes: whole or not at all, whoever of them fails."""

import errno
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import LayersMountReply, LayersMountRequest, LayersUnmountRequest
from guestagent.engine.state import Rules
from tests.beds.agentbed import EngineBed, Pack, World, attached_pack, overlay, settled_world
from vsock.errors import CallError

LAYERS = 12
#: What each of the two has for its own: the agent the first of the layers, the process the next. Of
#: the rest each takes what it comes to.
OWN = 4
RULES = Rules(processes=2)
#: Where it counts which layer comes to a step as the how-manieth.
IN_TURN = RULES.replace(parallel=1)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), LAYERS) as pack:
        yield pack


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[EngineBed]:
    with EngineBed(tmp_path / "state", RULES) as bed:
        yield bed


@pytest.fixture
def bed_in_turn(tmp_path: Path) -> Iterator[EngineBed]:
    with EngineBed(tmp_path / "state", IN_TURN) as bed:
        yield bed


def batch(pack: Pack, **fields: object) -> LayersMountRequest:
    return LayersMountRequest(layers=tuple(pack.spec(number) for number in range(LAYERS))).replace(
        **fields
    )


def mount(bed: EngineBed, request: LayersMountRequest) -> LayersMountReply:
    with bed.operation() as op:
        return bed.engine.batches.mount(request, op)


def refused(bed: EngineBed, request: LayersMountRequest) -> CallError:
    """Mount, which must fail and leave nothing; then, without faults, once more, which must do."""
    before, books = World.now(), bed.books()
    with pytest.raises(CallError) as caught:
        mount(bed, request)
    world = settled_world(before)
    assert (world.minus(before), before.minus(world)) == ([], [])
    assert bed.books() == books
    assert bed.engine.problems() == ()
    bed.faults.arm("")
    assert len(mount(bed, request).layers) == len(request.layers)
    return caught.value


def children() -> set[int]:
    """Return the processes of this one, whichever of its threads has started them."""
    lists = (path.read_text() for path in Path("/proc/self/task").glob("*/children"))
    return {int(pid) for text in lists for pid in text.split()}


def test_the_reply_is_that_of_threads(tmp_path: Path, pack: Pack) -> None:
    replies, entries = [], []
    for processes in (1, 3):
        with EngineBed(tmp_path / f"state{processes}", Rules(processes=processes)) as bed:
            replies.append(mount(bed, batch(pack, overlay=overlay("o", "layer3", "layer11"))))
            entries.append([live.spec.layer_id for live in bed.engine._state.journal.read().layers])
            assert not [*bed.directory.glob("*.begun")]
            with bed.operation() as op:
                listed = {report.layer_id: report for report in bed.engine.layers.list()}
                assert listed == {report.layer_id: report for report in replies[-1].layers}
                gone = LayersUnmountRequest(layers=tuple(listed), overlay="o")
                bed.engine.batches.unmount(gone, op)

    def plain(reply: LayersMountReply) -> object:
        same = {"mount_id": 0, "dev": "", "timings_ms": {}, "dm": (), "device_node": ""}
        return [
            (report.replace(**same), [(dm.name, dm.uuid, dm.deferred_remove) for dm in report.dm])
            for report in reply.layers
        ]

    assert plain(replies[0]) == plain(replies[1])
    assert entries[0] == entries[1]
    assert set(replies[1].layers[-1].timings_ms) == set(replies[0].layers[-1].timings_ms)


def test_layers_of_one_batch_that_share_bytes_say_so(bed: EngineBed, pack: Pack) -> None:
    mount(bed, batch(pack, layers=(pack.spec(1, layer_id="there"),)))
    twice = [pack.spec(n, layer_id=f"{name}{n}") for name in "ab" for n in range(LAYERS // 2)]
    again = pack.spec(1, layer_id="there")
    reply = mount(bed, batch(pack, layers=(*twice, again), overlay=overlay("o", "a0", "there")))
    told = {report.layer_id: report for report in reply.layers}
    assert told["a0"].overlaps == ("b0",)
    assert set(told["b1"].overlaps) == {"a1", "there"}
    assert set(told["there"].overlaps) == {"a1", "b1"}
    assert [name for name, report in told.items() if report.used_by == ("o",)] == ["a0", "there"]


def test_a_next_life_adopts_what_processes_made(bed: EngineBed, pack: Pack) -> None:
    mount(bed, batch(pack))
    before = {r.layer_id: r.replace(timings_ms={}) for r in bed.engine.layers.list()}
    bed.reopen()
    assert {r.layer_id: r.replace(timings_ms={}) for r in bed.engine.layers.list()} == before
    assert len(before) == LAYERS


@pytest.mark.parametrize(
    "step", ["superblock", "linear", "verity", "prove", "target", "mount", "defer"]
)
@pytest.mark.parametrize("nth", [1, 4])
def test_a_step_that_fails_in_a_process(
    bed_in_turn: EngineBed, pack: Pack, step: str, nth: int
) -> None:
    bed_in_turn.faults.arm("", others=f"{step}:EIO:{nth}")
    error = refused(bed_in_turn, batch(pack))
    # each layer comes to "defer" twice
    at = OWN + (nth - 1) // (2 if step == "defer" else 1)
    assert error.step == step
    assert f"layer{at}" in error.message
    assert "EIO" in error.message


@pytest.mark.parametrize("step", ["journal", "read back"])
def test_a_step_for_all_its_layers_that_fails_in_a_process(
    bed: EngineBed, pack: Pack, step: str
) -> None:
    """The error blames none of them."""
    bed.faults.arm("", others=f"{step}:ENOSPC")
    error = refused(bed, batch(pack))
    assert (error.step, error.errno, error.code) == (step, errno.ENOSPC, "resource")
    assert "layers failed" in error.message
    assert "layer'" not in error.message


def test_a_step_that_fails_in_the_agent_itself(bed_in_turn: EngineBed, pack: Pack) -> None:
    bed_in_turn.faults.arm("verity:EIO:3", others="")
    error = refused(bed_in_turn, batch(pack))
    assert error.step == "verity"
    assert "layer2" in error.message


def test_the_first_of_several_errors_counts(bed_in_turn: EngineBed, pack: Pack) -> None:
    bed_in_turn.faults.arm("mount:EIO:4")
    assert "layer3" in refused(bed_in_turn, batch(pack)).message


@pytest.mark.parametrize("step", ["superblock", "verity", "mount"])
@pytest.mark.parametrize(("where", "begins_with"), [("agent", (0, 1)), ("process", (4, 5))])
def test_every_thread_fails(
    bed: EngineBed, pack: Pack, step: str, where: str, begins_with: tuple[int, int]
) -> None:
    faults = {"agent": "", "process": "", where: f"{step}:EIO"}
    bed.faults.arm(faults["agent"], others=faults["process"])
    error = refused(bed, batch(pack))
    assert error.step == step
    # one thread may have failed before the other began
    assert any(f"layer 'layer{number}'" in error.message for number in begins_with)


def test_one_that_is_slow_is_left_with_its_own(bed_in_turn: EngineBed, pack: Pack) -> None:
    """The other does the rest, and says so by the layer that it fails at last."""
    bed_in_turn.faults.arm(f"superblock:EIO:{LAYERS - OWN}", others="superblock:BLOCK")
    assert f"layer{LAYERS - 1}" in refused(bed_in_turn, batch(pack)).message


def test_an_overlay_that_fails_takes_the_layers_with_it(bed: EngineBed, pack: Pack) -> None:
    bed.faults.arm("overlay:EIO")
    error = refused(bed, batch(pack, overlay=overlay("o", "layer0", "layer11")))
    assert error.step == "overlay"


@pytest.mark.parametrize(
    "fault", ["superblock:KILL:3", "verity:KILL:3", "mount:KILL:3", "journal:KILL"]
)
def test_a_process_that_is_killed(bed: EngineBed, pack: Pack, fault: str) -> None:
    """What it made is undone from here, by what was claimed for it."""
    bed.faults.arm("", others=fault)
    error = refused(bed, batch(pack))
    assert error.code == "internal"
    assert "ended" in error.message


def test_a_process_that_is_killed_before_it_looks(bed: EngineBed, pack: Pack) -> None:
    """All of its layers are mounted and have their entries."""
    bed.faults.arm("", others="read back:KILL")
    assert "ended" in refused(bed, batch(pack)).message


def test_cancelled_while_a_process_works(bed: EngineBed, pack: Pack) -> None:
    """It is in a step that would take until its deadline."""
    bed.faults.arm("", others="verity:BLOCK:2")
    before = World.now()
    with bed.operation() as op:
        timer = threading.Timer(0.3, op.deadline.cancel)
        timer.start()
        begin = time.monotonic()
        with pytest.raises(CallError) as caught:
            bed.engine.batches.mount(batch(pack), op)
        timer.join()
    assert caught.value.code == "cancelled"
    # far less than the process had, or what is waited for one that does not undo
    assert time.monotonic() - begin < bed.engine._state.rules.undo_seconds
    assert settled_world(before) == before
    assert bed.engine.problems() == ()


def test_a_conflict_is_found_before_anything_is_forked(bed: EngineBed, pack: Pack) -> None:
    with bed.operation() as op:
        bed.engine.layers.mount(pack.spec(0, "other", target="/run/layers/layer11"), op)
    before = World.now()
    with pytest.raises(CallError) as caught:
        mount(bed, batch(pack))
    assert (caught.value.code, caught.value.step) == ("conflict", "claim")
    assert World.now() == before


def remount(bed: EngineBed, pack: Pack) -> None:
    """Take all layers of a batch down and bring them up again."""
    ids = tuple(f"layer{number}" for number in range(LAYERS))
    with bed.operation() as op:
        bed.engine.batches.unmount(LayersUnmountRequest(layers=ids), op)
    mount(bed, batch(pack))


def test_one_process_for_one_batch_after_the_other(bed: EngineBed, pack: Pack) -> None:
    mount(bed, batch(pack))
    idle = children()
    assert len(idle) == RULES.processes - 1
    remount(bed, pack)
    assert children() == idle
    assert {report.state for report in bed.engine.layers.list()} == {"mounted"}


def test_the_process_of_a_batch_that_was_undone_makes_the_next(bed: EngineBed, pack: Pack) -> None:
    mount(bed, batch(pack))
    idle = children()
    with bed.operation() as op:
        bed.engine.unmount_everything(op, force=False)
    bed.faults.arm("", others="mount:EIO:4")
    assert refused(bed, batch(pack)).step == "mount"
    assert children() == idle


def test_one_that_is_killed_while_idle(bed: EngineBed, pack: Pack) -> None:
    """The next batch is none the worse for it."""
    mount(bed, batch(pack))
    (pid,) = children()
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)
    remount(bed, pack)
    assert len(children()) == RULES.processes - 1
    assert pid not in children()
    assert bed.engine.problems() == ()


def test_one_that_is_idle_holds_nothing_of_a_batch(bed: EngineBed, pack: Pack) -> None:
    """Or a device, or a file system, would be busy for as long as it waits for more."""
    mount(bed, batch(pack))
    (pid,) = children()
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if int(path.name) > 2}
    kinds = sorted(name.partition(":")[0] for name in held)
    (life,) = bed.directory.glob("*.members")
    assert kinds == sorted(["/dev/mapper/control", str(life), "socket"])


def test_no_process_is_left(bed: EngineBed, pack: Pack) -> None:
    mount(bed, batch(pack))
    assert len(children()) == RULES.processes - 1
    bed.engine.close()
    assert children() == set()
    assert not [*bed.directory.glob("*.members")]
    bed.reopen()
