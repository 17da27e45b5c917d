"""Private /dev trees when a step fails, is cancelled or is the last of the agent's life: the world
is as it was before, or as it is afterwards, and the same request then succeeds."""

import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api.devtree import DevAdd, DevAttach, DevCreate, DevDestroy, DevRemove
from guestagent.devtree import tree
from guestagent.engine.transaction import Transaction
from tests.beds.devbed import ROOT, Container, DevBed, corner, listing
from tests.kernel import test_engine_crashes
from tests.kernel.test_engine_transactions import fail_at_every_step
from vsock.errors import CallError

Request = Callable[[DevBed, Transaction], object]
TARGET = Path("/run/rootfs/dev")
MAX_STEPS = 60


@pytest.fixture(autouse=True)
def place() -> Iterator[Path]:
    TARGET.mkdir(parents=True)
    with corner() as path:
        (path / "file").write_bytes(b"content")
        (path / "directory").mkdir()
        (path / "link").symlink_to("../null")
        (path / "two").symlink_to("link")
        yield path
    TARGET.rmdir()
    TARGET.parent.rmdir()


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[DevBed]:
    with DevBed(tmp_path / "state") as bed:
        yield bed


CREATE = DevCreate(tree_id="t", preserve=("pts", "shm"))
PATHS = ("/dev/corner/two", "/dev/corner/file", "/dev/corner/directory", "/dev/zero")
ADD = DevAdd(tree_id="t", paths=PATHS)
REMOVE = DevRemove(tree_id="t", paths=("/dev/corner/two", "/dev/corner/file", "/dev/zero"))
ATTACH = DevAttach(tree_id="t", target=str(TARGET))


def create(bed: DevBed, op: Transaction) -> object:
    return bed.trees.create(CREATE, op)


def add(bed: DevBed, op: Transaction) -> object:
    return bed.trees.add(ADD, op)


def add_file(bed: DevBed, op: Transaction) -> object:
    return bed.trees.add(ADD.replace(paths=("/dev/corner/file",)), op)


def remove(bed: DevBed, op: Transaction) -> object:
    missing = "fail" if PATHS[0] in bed.tree().paths else "skip"
    return bed.trees.remove(REMOVE.replace(missing=missing), op)


def attach(bed: DevBed, op: Transaction) -> object:
    return bed.trees.attach(ATTACH, op)


def destroy(bed: DevBed, op: Transaction) -> object:
    return bed.trees.destroy(DevDestroy(tree_id="t"), op)


#: What is done first, the request, and how many steps it has at least.
CASES: dict[str, tuple[tuple[Request, ...], Request, int]] = {
    "create": ((), create, 10),
    "add": ((create,), add, 9),
    "remove": ((create, add), remove, 7),
    "attach": ((create, add), attach, 3),
    "destroy": ((create, add), destroy, 7),
    "destroy-attached": ((create, add, attach), destroy, 12),
}


def do(bed: DevBed, *requests: Request) -> None:
    for request in requests:
        with bed.operation() as op:
            request(bed, op)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["EIO", "EBUSY", "LATE"])
def test_a_failure_at_every_step_leaves_all_as_it_was(bed: DevBed, case: str, kind: str) -> None:
    before, request, least = CASES[case]
    do(bed, *before)
    steps = fail_at_every_step(bed, request, kind)  # type: ignore[arg-type]
    assert steps >= least


def test_a_failure_in_a_container_leaves_it_as_it_was(bed: DevBed) -> None:
    """What is undone in the tree is so in its copies."""
    do(bed, create, add)
    with Container() as container:
        bed.attach("/dev", pid=container.pid)
        seen = container.ask("sorted(os.listdir('/dev')), sorted(os.listdir('/dev/corner'))")
        fail_at_every_step(bed, remove)  # type: ignore[arg-type]
        assert container.ask("sorted(os.listdir('/dev'))") == ["corner", "pts", "shm"]
        fail_at_every_step(bed, add)  # type: ignore[arg-type]
        again = container.ask("sorted(os.listdir('/dev')), sorted(os.listdir('/dev/corner'))")
        assert again == seen
        assert container.ask("open('/dev/corner/file').read()") == "content"
    bed.destroy()


def die_in(directory: Path, request: Request, step: int) -> bool:
    return test_engine_crashes.die_in(directory, request, step, DevBed)  # type: ignore[arg-type]


def state(bed: DevBed) -> tuple[object, ...]:
    """What is known, in memory and in the journal, and what is there."""
    trees = [
        each.as_dict()
        | {"mount_id": 0, "dev": "", "free_bytes": 0, "nodes": nodes_of(each.tree_id, bed)}
        for each in bed.list()
    ]
    journal = sorted(path.name for path in bed.directory.glob("devtree-*"))
    roots = [listing(path) if os.path.isdir(path) else None for path in (ROOT, str(TARGET))]
    return trees, journal, roots


def nodes_of(tree_id: str, bed: DevBed) -> list[tuple[str, str, tuple[str, ...]]]:
    nodes = bed.tree(tree_id).nodes
    return sorted((node.path, node.state, node.needed_by) for node in nodes)


@pytest.mark.parametrize("case", CASES)
def test_killed_at_every_step(tmp_path: Path, case: str) -> None:
    """The next life has the state from before the request, or the one from after."""
    prepare, request, least = CASES[case]
    with DevBed(tmp_path / "model") as bed:
        do(bed, *prepare)
        before = state(bed)
        do(bed, request)
        after = state(bed)
    outcomes = []
    for step in range(1, MAX_STEPS):
        with DevBed(tmp_path / "state") as bed:
            do(bed, *prepare)
            assert state(bed) == before
            bed.engine.close()
            died = die_in(tmp_path / "state", request, step)
            bed.reopen()
            found = state(bed)
            assert found in (before, after), f"step {step}"
            outcomes.append(found == after)
            do(bed, request)
            assert state(bed) == after, f"step {step}"
            assert bed.engine.problems() == ()
        if not died:
            break
    assert len(outcomes) > least
    assert outcomes[-1]
    assert outcomes == sorted(outcomes)


def test_an_agent_adopts_a_tree_that_a_container_has(tmp_path: Path) -> None:
    with DevBed(tmp_path / "state") as bed:
        do(bed, create, add)
        with Container() as container:
            bed.attach("/dev", pid=container.pid)
            before = state(bed)
            bed.reopen()
            assert state(bed) == before
            assert bed.attach("/dev", pid=container.pid)
            bed.add("/dev/full")
            assert container.ask("os.stat('/dev/full').st_rdev") == os.makedev(1, 7)
        assert bed.tree().attached == ()


@pytest.mark.parametrize("how", ["restart", "destroy"])
def test_a_tree_that_another_program_has_unmounted(tmp_path: Path, how: str) -> None:
    with DevBed(tmp_path / "state") as bed:
        do(bed, create)
        assert os.system(f"umount -R {ROOT}") == 0
        assert bed.list()[0].state == "unmounted"
        with pytest.raises(CallError, match="no longer mounted") as caught:
            do(bed, add)
        assert caught.value.code == "conflict"
        if how == "restart":
            bed.reopen()
        else:
            bed.destroy()
        assert bed.list() == ()
        assert not Path(ROOT).exists()
        do(bed, create, add)
        bed.destroy()


def test_a_tree_that_another_mount_covers(tmp_path: Path) -> None:
    """What another program has mounted is not the agent's to unmount."""
    with DevBed(tmp_path / "state") as bed:
        do(bed, create, add)
        before = state(bed)
        assert os.system(f"mount -t tmpfs other {ROOT}") == 0
        for request in (add, destroy):
            with pytest.raises(CallError, match="covered") as caught:
                do(bed, request)
            assert caught.value.code == "conflict"
        bed.reopen()
        assert bed.list()[0].state == "unmounted"
        assert os.system(f"umount {ROOT}") == 0
        assert state(bed) == before


@pytest.mark.parametrize("function", ["_is_fresh", "_set_metadata", "_bind"])
def test_killed_while_a_node_is_made(
    tmp_path: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DevBed(tmp_path / "state") as bed:
        do(bed, create)
        before = state(bed)
        bed.engine.close()
        with monkeypatch.context() as patch:
            patch.setattr(tree, function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            assert die_in(tmp_path / "state", add_file, MAX_STEPS)
        bed.reopen()
        assert state(bed) == before
        do(bed, add)


def test_a_damaged_entry_is_put_aside_and_told(tmp_path: Path) -> None:
    with DevBed(tmp_path / "state") as bed:
        do(bed, create)
        entry = bed.directory / "devtree-t.entry"
        entry.write_bytes(entry.read_bytes()[:-7])
        bed.reopen()
        assert bed.list() == ()
        (problem,) = bed.engine.problems()
        assert "devtree-t.entry.damaged' could not be read" in problem
    # its mounts are known by their source
    Path(ROOT).rmdir()
    Path(ROOT).parent.rmdir()


def test_a_name_that_a_container_took_while_it_was_removed(bed: DevBed) -> None:
    do(bed, create, add)
    os.unlink(f"{ROOT}/zero")
    os.mknod(f"{ROOT}/zero", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    do(bed, remove)
    assert os.stat(f"{ROOT}/zero").st_rdev == os.makedev(1, 3)
