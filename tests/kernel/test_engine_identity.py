"""A mount is known by its device and mount id: what is unmounted, covered, moved or bound over is
not taken for the layer, by overlays, inspection and reports."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api import TmpfsScratch
from guestagent.api.inspect import PathRequest
from guestagent.inspect.place import open_place
from tests.beds.agentbed import EngineBed, Pack, overlay, who
from tests.beds.calls import call_error, run
from vsock.errors import CallError

PACK_LAYERS = 3


@pytest.fixture
def bed(tmp_path: Path, pack: Pack) -> Iterator[EngineBed]:
    """An engine with two layers."""
    with EngineBed(tmp_path / "state") as bed:
        with bed.operation() as op:
            for number in range(2):
                bed.engine.layers.mount(pack.spec(number), op)
        yield bed


@contextlib.contextmanager
def unmounted(target: str) -> Iterator[None]:
    run("umount", target)
    Path(target, "fake").write_text("not of the layer")
    try:
        yield
    finally:
        Path(target, "fake").unlink()


@contextlib.contextmanager
def covered(target: str) -> Iterator[None]:
    run("mount", "-t", "tmpfs", "cover", target)
    try:
        yield
    finally:
        run("umount", target)


@contextlib.contextmanager
def moved(target: str) -> Iterator[None]:
    elsewhere = Path("/run/elsewhere")
    elsewhere.mkdir()
    run("mount", "--move", target, str(elsewhere))
    try:
        yield
    finally:
        run("mount", "--move", str(elsewhere), target)
        elsewhere.rmdir()


@contextlib.contextmanager
def bound_over(target: str) -> Iterator[None]:
    run("mount", "--bind", "/run/layers/layer1", target)
    try:
        yield
    finally:
        run("umount", target)


@contextlib.contextmanager
def bound_over_by_itself(target: str) -> Iterator[None]:
    run("mount", "--bind", target, target)
    try:
        yield
    finally:
        run("umount", target)


CASES = [
    (unmounted, "no longer mounted"),
    (covered, "covered at '/run/layers/layer0' by tmpfs"),
    (moved, "moved to '/run/elsewhere'"),
    (bound_over, "covered at '/run/layers/layer0' by erofs"),
    (bound_over_by_itself, "covered at '/run/layers/layer0' by erofs"),
]
Case = Callable[[str], contextlib.AbstractContextManager[None]]


@pytest.mark.parametrize(("case", "said"), CASES)
def test_a_layer_that_is_not_what_is_seen_at_its_target(
    bed: EngineBed, case: Case, said: str
) -> None:
    with case("/run/layers/layer0"):
        for spec in (
            overlay("o", "layer1", "layer0"),
            overlay("o", "layer1", "layer0", scratch=TmpfsScratch(size_bytes=1 << 20)),
        ):
            with bed.operation() as op, call_error("conflict", match=said):
                bed.engine.overlays.mount(spec, op)
            assert not os.path.exists("/run/overlays")
        with call_error("not_found", match=said):
            open_place(bed.engine.state, PathRequest(layer_id="layer0", path=b"/who"))
        with pytest.raises(CallError, match=said):
            bed.engine.layers.get("layer0")
        states = {report.layer_id: report.state for report in bed.engine.layers.list()}
        assert states == {"layer0": "unmounted", "layer1": "mounted"}
        assert any(said in problem for problem in bed.engine.problems())
    with bed.operation() as op:
        if case is unmounted:
            bed.engine.layers.unmount("layer0", op)
        else:
            bed.engine.layers.list()
            bed.engine.overlays.mount(overlay("o", "layer1", "layer0"), op)
            open_place(bed.engine.state, PathRequest(layer_id="layer0", path=b"/who")).root.close()
    assert bed.engine.problems() == ()


@pytest.mark.parametrize(("case", "said"), [case for case in CASES if case[0] is not bound_over])
def test_an_overlay_that_is_not_what_is_seen_at_its_target(
    bed: EngineBed, case: Case, said: str
) -> None:
    bed.ask(bed.engine.overlays.mount, overlay("o", "layer0"))
    said = said.replace("layers/layer0", "overlays/o").replace("erofs", "overlay")
    with case("/run/overlays/o"):
        with pytest.raises(CallError, match=said):
            open_place(bed.engine.state, PathRequest(overlay_id="o", path=b"/who"))
        with pytest.raises(CallError, match=said):
            bed.engine.overlays.get("o")
        (report,) = bed.engine.overlays.list()
        assert report.state == "unmounted"
    bed.ask(bed.engine.overlays.unmount, "o")


def test_the_same_mount_is_known_after_a_restart(bed: EngineBed, pack: Pack) -> None:
    before = bed.engine.layers.get("layer0").mount_id
    bed.reopen()
    assert bed.engine.layers.get("layer0").mount_id == before
    report = bed.ask(bed.engine.overlays.mount, overlay("o", "layer0", "layer1"))
    assert who(report.target) == pack.layers[0].marker


def test_a_table_that_is_not_the_agents_spoils_its_own_layer_only(bed: EngineBed) -> None:
    name = bed.engine.layers.get("layer0").dm[0].name
    run("dmsetup", "wipe_table", "--noudevsync", name)
    try:
        states = {report.layer_id: report.state for report in bed.engine.layers.list()}
        assert states == {"layer0": "changed", "layer1": "mounted"}
        assert bed.engine.layers.get("layer0").state == "changed"
        assert any("layer0" in problem for problem in bed.engine.problems())
    finally:
        bed.ask(bed.engine.layers.unmount, "layer0")
