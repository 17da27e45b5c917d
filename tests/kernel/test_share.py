"""Shares that cannot be mounted, on a kernel without a device for any: nothing is left behind.

What is mounted is tested in a machine (tests/vm/test_share.py).
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api.share import ShareList, ShareMount
from guestagent.engine.transaction import Transaction
from guestagent.share.shares import Shares
from tests.beds.agentbed import AgentProcess, EngineBed, World
from tests.beds.dmbed import run
from vsock.errors import CallError

ROOT = Path("/run/for-shares")


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> None:
    run("modprobe", "virtiofs")
    run("modprobe", "9p")


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[EngineBed]:
    with EngineBed(tmp_path / "state") as bed:
        yield bed


def refusal(bed: EngineBed, **fields: object) -> CallError:
    """Ask for a share; return the error, and see that the world is as it was."""
    spec = ShareMount(**{"share_id": "s", "tag": "host", "target": f"{ROOT}/a/b", **fields})  # type: ignore[arg-type]
    before, books = World.now(), bed.books()
    shares = Shares(bed.engine.state)

    def ask(op: Transaction) -> None:
        shares.mount(spec, op)

    with bed.operation() as op, pytest.raises(CallError) as caught:
        ask(op)
    assert (World.now(), bed.books()) == (before, books)
    with bed.operation() as op:
        assert shares.list(ShareList(), op).shares == ()
    assert bed.engine.problems() == ()
    assert list(bed.directory.glob("share-*")) == []
    return caught.value


def test_tag_that_no_device_has(bed: EngineBed) -> None:
    error = refusal(bed, tag="other")
    assert (error.code, error.step, error.object) == ("not_found", "filesystem", "other")
    assert error.message == "no virtiofs device of this machine has the tag 'other'"
    assert not ROOT.exists()


def test_9p_without_virtio(bed: EngineBed) -> None:
    """This kernel has 9p, and no virtio transport for it."""
    error = refusal(bed, kind="9p", msize_bytes=8192)
    assert (error.code, error.message) == (
        "unsupported",
        "the kernel has no virtio transport for 9p",
    )


def test_target_that_cannot_be(bed: EngineBed, tmp_path: Path) -> None:
    assert refusal(bed, target="/elsewhere/x").code == "invalid"
    (ROOT / "full").mkdir(parents=True)
    (ROOT / "full/file").touch()
    (ROOT / "link").symlink_to(tmp_path)
    try:
        for name, code, message in (
            ("full", "conflict", "is not empty"),
            ("full/file", "conflict", "is not a directory"),
            ("link/x", "denied", "is a link"),
        ):
            error = refusal(bed, target=f"{ROOT}/{name}")
            assert (error.code, message in error.message) == (code, True), error.message
    finally:
        run("rm", "-r", str(ROOT))


def test_requests_to_an_agent() -> None:
    with AgentProcess() as agent:
        with agent.client() as guest:
            assert guest.share_list() == ()
            assert guest.share_unmount("s").already
            assert {"share-virtiofs", "share-9p"} <= set(guest.hello.features)
            with pytest.raises(CallError) as caught:
                guest.share_mount(ShareMount(share_id="s", tag="host"))
            assert caught.value.code == "not_found"
            with pytest.raises(CallError) as caught:
                guest.share_mount(ShareMount(share_id="s", tag="host", target="/run/elsewhere"))
            assert caught.value.code == "invalid"
            guest.shutdown("exit")
        assert agent.wait() == 0
