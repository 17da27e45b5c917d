"""Private /dev trees of a real agent: over its socket, through its death, until its shutdown."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import OverlaySpec, TmpfsScratch
from guestagent.api.devtree import DevAdd, DevAttach, DevClosure, DevCreate, DevRemove
from tests.beds.agentbed import AgentProcess, Pack, attached_pack
from tests.beds.devbed import ROOT, Container, listing
from vsock.errors import CallError


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pack]:
    with attached_pack(tmp_path_factory.mktemp("pack"), 1) as pack:
        yield pack


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


def has_loaded(agent: AgentProcess) -> bool:
    """Return whether an agent has read the room's code: it keeps no file open, so by its memory."""
    assert agent.process is not None
    return b"guestagent.devtree.closure" in _memory(agent.process.pid)


def _memory(pid: int) -> bytes:
    found = []
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in maps:
            place, access, *_, name = line.split()
            if access.startswith("rw") and not name.startswith("/"):
                start, end = (int(number, 16) for number in place.split("-"))
                memory.seek(start)
                found.append(memory.read(end - start))
    return b"".join(found)


def test_every_method(agent: AgentProcess) -> None:
    with agent.client() as guest:
        assert guest.dev_list() == ()
        tree = guest.dev_create(DevCreate(tree_id="t"))
        assert (tree.root, tree.state, tree.already) == (ROOT, "mounted", False)
        (planned,) = guest.dev_closure(DevClosure(paths=("/dev/null",))).paths
        (made,) = guest.dev_add(DevAdd(tree_id="t", paths=("/dev/null",))).paths
        assert (planned.state, made.state) == ("planned", "created")
        assert made.nodes == (planned.nodes[0].replace(state="made"),)
        (listed,) = guest.dev_list("t")
        assert [(node.path, node.state) for node in listed.nodes] == [("/dev/null", "there")]
        with Container() as container:
            reply = guest.dev_attach(DevAttach(tree_id="t", target="/dev", pid=container.pid))
            assert (reply.target, reply.already) == ("/dev", False)
            assert list(container.dev()) == ["null"]
            with pytest.raises(CallError) as caught:
                guest.dev_destroy("t")
            assert caught.value.code == "busy"
            assert f"process {container.pid}" in (caught.value.hint or "")
        removed = guest.dev_remove(DevRemove(tree_id="t", paths=("/dev/null",)))
        assert removed.removed == ("/dev/null",)
        guest.dev_destroy("t")
        guest.dev_destroy("t")
        with pytest.raises(CallError, match="no private /dev 't'"):
            guest.dev_list("t")
        assert guest.status().problems == ()


def test_the_room_is_loaded_when_it_is_needed(agent: AgentProcess) -> None:
    with agent.client() as guest:
        guest.status()
        assert not has_loaded(agent)
        guest.dev_list()
        assert has_loaded(agent)
        guest.dev_create(DevCreate(tree_id="t"))
    agent.kill()
    agent.start()
    with agent.client() as guest:
        guest.status()
        assert has_loaded(agent)
        guest.dev_destroy("t")


def test_a_killed_agent_is_followed_by_one_that_knows_the_tree(agent: AgentProcess) -> None:
    with Container() as container, agent.client() as guest:
        guest.dev_create(DevCreate(tree_id="t", preserve=("shm",)))
        guest.dev_add(DevAdd(tree_id="t", paths=("/dev/null",)))
        guest.dev_attach(DevAttach(tree_id="t", target="/dev", pid=container.pid))
        before = guest.dev_list("t"), listing(ROOT)
        agent.kill()
        agent.start()
        with agent.client() as again:
            assert (again.dev_list("t"), listing(ROOT)) == before
            again.dev_add(DevAdd(tree_id="t", paths=("/dev/zero",)))
            assert sorted(container.dev()) == ["null", "shm", "zero"]
    with agent.client() as again:
        again.dev_destroy("t")


def test_shutdown_takes_trees_down_before_the_overlays_they_are_on(
    agent: AgentProcess, pack: Pack
) -> None:
    with agent.client() as guest:
        guest.layer_mount(pack.spec(0))
        scratch = TmpfsScratch(size_bytes=1 << 20)
        overlay = guest.overlay_mount(
            OverlaySpec(overlay_id="o", layers=("layer0",), scratch=scratch)
        )
        os.mkdir(f"{overlay.target}/dev")
        guest.dev_create(DevCreate(tree_id="t"))
        guest.dev_add(DevAdd(tree_id="t", paths=("/dev/null",), strategy="bind"))
        guest.dev_attach(DevAttach(tree_id="t", target=f"{overlay.target}/dev"))
        assert os.listdir(f"{overlay.target}/dev") == ["null"]
        with pytest.raises(CallError) as caught:
            guest.overlay_unmount("o")
        assert caught.value.code == "busy"
        guest.shutdown("exit")
    assert agent.wait() == 0
    assert not Path(ROOT).exists()


def test_requests_at_the_same_time(agent: AgentProcess) -> None:
    """Each tree by itself, and one tree by many: all of it is there in the end."""
    names = [f"pty{letter}{number:x}" for letter in "ab" for number in range(16)]
    with agent.client() as guest:
        guest.dev_create(DevCreate(tree_id="t"))
        calls = [guest.start(DevAdd(tree_id="t", paths=(f"/dev/{name}",))) for name in names]
        for call in calls:
            call.result()
        assert sorted(listing(ROOT)) == names
        guest.dev_destroy("t")
