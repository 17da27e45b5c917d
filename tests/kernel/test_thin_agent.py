"""Pools and volumes of a real agent, over its socket, and of the agent after it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api.thin import VolumeCreate, VolumeMount
from tests.beds.agentbed import AgentProcess
from tests.beds.dmbed import run
from tests.beds.thinbed import MIB, POOL, Disks, pool_disks


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Disks]:
    with pool_disks(tmp_path / "disks") as disks:
        yield disks


def test_agent_that_is_killed_leaves_its_volumes_to_the_next(disks: Disks) -> None:
    with AgentProcess() as agent:
        with agent.client() as guest:
            assert guest.pool_list() == ()
            guest.pool_open(disks.spec())
            request = VolumeCreate(pool_id=POOL, volume_id="a", size_bytes=16 * MIB)
            guest.volume_create(request)
            mount = VolumeMount(pool_id=POOL, volume_id="a", path="/run/volumes/a", holder="h")
            guest.volume_mount(mount)
            guest.volume_snapshot(POOL, "b", "a")
            assert guest.volume_grow(POOL, "a", 32 * MIB).size_bytes == 32 * MIB
            assert guest.volume_trim(POOL, "a").trimmed_bytes > 0
            guest.volume_delete(POOL, "a", deferred=True)
        agent.kill()
        run("umount", "/run/volumes/a")
        agent.start()
        with agent.client() as guest:
            # the pool is taken over at the start, and what was let go is deleted, unasked
            kinds = [event.kind for event in guest.events().events]
            (pool,) = guest.pool_list()
            assert (pool.mode, pool.volumes) == ("rw", 1)
            assert guest.pool_grow(POOL).already
            assert guest.volume_get(POOL, "b").origin == "a"
            assert guest.volume_unmount(POOL, "a", "h").already
            assert [each.volume_id for each in guest.volume_list(POOL)] == ["b"]
            kinds = [event.kind for event in guest.events().events]
            assert "volume_deleted" in kinds
            guest.shutdown("exit")
        assert agent.wait() == 0
    assert run("dmsetup", "ls").strip() == "No devices found"
    assert disks.thin_ids() == [0, 2]
    disks.thin_check()
