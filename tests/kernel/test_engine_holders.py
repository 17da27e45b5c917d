"""Unmounting says ``busy`` as long as anything has the file system: other mounts, other mount
namespaces, detached mounts, open files and running programs of an overlay."""

import contextlib
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api import (
    DeviceScratch,
    LayerSpec,
    LayersUnmount,
    OverlaySpec,
    PathDevice,
    TmpfsScratch,
)
from guestagent.engine.journal import Begun
from tests.beds.agentbed import EngineBed, Pack, World, overlay
from tests.beds.calls import call_error, run
from tests.beds.dmbed import loop_device
from vsock.errors import CallError

PACK_LAYERS = 2
_CONTAINER = """
    import ctypes, os, sys
    libc = ctypes.CDLL(None, use_errno=True)
    def do(result):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    root = sys.argv[1].encode()
    do(libc.unshare(0x20000))                                # CLONE_NEWNS
    do(libc.mount(b"none", b"/", None, 0x44000, None))       # MS_REC | MS_PRIVATE
    do(libc.mount(root, root, None, 0x5000, None))           # MS_BIND | MS_REC
    os.chdir(root)
    do(libc.syscall(155, b".", b"."))                        # pivot_root
    do(libc.umount2(b".", 2))
    print("ready", flush=True)
    sys.stdin.read()
"""
_OTHER_NAMESPACE = """
    import ctypes, sys
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000) == 0
    assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LayerSpec]:
    """A layer without a dm device, with a program in it."""
    directory = tmp_path_factory.mktemp("plain")
    source = directory / "source"
    source.mkdir()
    shutil.copy("/bin/busybox", source / "busybox")
    (source / "hello").write_text("hello\n")
    image = directory / "image"
    run("mkfs.erofs", "-T0", image, source)
    os.truncate(image, -(-image.stat().st_size // 4096) * 4096)
    with loop_device(image) as node:
        yield LayerSpec(layer_id="plain", device=PathDevice(path=node), filesystem="erofs")


@contextlib.contextmanager
def process(*command: str, cwd: str | None = None) -> Iterator[None]:
    """Run a program until it has said that it is ready."""
    with subprocess.Popen(
        command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "ready\n"
        try:
            yield
        finally:
            running.kill()


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", textwrap.dedent(code), *arguments)


@contextlib.contextmanager
def bound_elsewhere(target: str) -> Iterator[None]:
    other = Path("/run/elsewhere")
    other.mkdir()
    run("mount", "--bind", target, other)
    try:
        yield
    finally:
        run("umount", other)
        other.rmdir()


@contextlib.contextmanager
def bound_on_itself(target: str) -> Iterator[None]:
    run("mount", "--bind", target, target)
    try:
        yield
    finally:
        run("umount", target)


def container(target: str) -> contextlib.AbstractContextManager[None]:
    return process(*python(_CONTAINER, target))


def other_namespace(_target: str) -> contextlib.AbstractContextManager[None]:
    return process(*python(_OTHER_NAMESPACE))


def detached(target: str) -> contextlib.AbstractContextManager[None]:
    """A process works in a mount that another one has detached lazily."""
    code = "import sys; print('ready', flush=True); sys.stdin.read()"

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        with process(*python(code), cwd=target):
            run("umount", "-l", target)
            yield

    return hold()


HOLDS = (bound_elsewhere, bound_on_itself, container, other_namespace, detached)
#: The layer cannot be read back at its target meanwhile.
HIDDEN = (bound_on_itself, detached)
Hold = Callable[[str], contextlib.AbstractContextManager[None]]


def busy(bed: EngineBed, unmount: Callable[..., object], *arguments: object) -> CallError:
    begin = time.monotonic()
    with bed.operation() as op, pytest.raises(CallError) as caught:
        unmount(*arguments, op)
    assert time.monotonic() - begin < 5.0
    assert caught.value.code == "busy"
    assert caught.value.hint is not None
    assert "no holder" not in caught.value.hint
    return caught.value


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", ["plain", "verity"])
def test_a_layer(bed: EngineBed, pack: Pack, plain: LayerSpec, hold: Hold, kind: str) -> None:
    before = World.now(skip=["/run/mount"])
    spec = plain if kind == "plain" else pack.spec(0)
    report = bed.ask(bed.engine.layers.mount, spec)
    with hold(report.target):
        busy(bed, bed.engine.layers.unmount, spec.layer_id)
        busy(bed, lambda name, op: bed.engine.layers.unmount(name, op, force=True), spec.layer_id)
        if hold not in HIDDEN:
            again = bed.engine.layers.get(spec.layer_id)
            assert (again.state, again.dev) == ("mounted", report.dev)
            assert hold is not bound_elsewhere or again.mount_id == report.mount_id
            assert os.listdir(report.target)
        assert bed.engine.problems() == ()
    bed.ask(bed.engine.layers.unmount, spec.layer_id)
    assert World.now(skip=["/run/mount"]) == before


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("kind", ["none", "tmpfs", "device"])
def test_an_overlay(bed: EngineBed, tmp_path: Path, pack: Pack, hold: Hold, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        scratch: TmpfsScratch | DeviceScratch | None = None
        if kind == "tmpfs":
            scratch = TmpfsScratch(size_bytes=1 << 20)
        elif kind == "device":
            image = tmp_path / "disk.img"
            image.touch()
            os.truncate(image, 8 << 20)
            node = stack.enter_context(loop_device(image, readonly=False))
            scratch = DeviceScratch(device=PathDevice(path=node), ensure_filesystem=True)
        with bed.operation() as op:
            bed.engine.layers.mount(pack.spec(0), op)
            bed.engine.layers.mount(pack.spec(1), op)
            report = bed.engine.overlays.mount(
                OverlaySpec(overlay_id="o", layers=("layer0",), scratch=scratch), op
            )
        with hold(report.target):
            busy(bed, bed.engine.overlays.unmount, "o")
            request = LayersUnmount(layers=("layer0", "layer1"), overlay="o")
            busy(bed, bed.engine.batches.unmount, request)
            assert len(bed.engine.layers.list()) == 2
            # the scratch stays the overlay's own
            if kind == "device":
                second = OverlaySpec(overlay_id="p", layers=("layer1",), scratch=scratch)
                with bed.operation() as op, call_error("conflict"):
                    bed.engine.overlays.mount(second, op)
            if hold not in HIDDEN:
                assert bed.engine.overlays.get("o").mount_id == report.mount_id
        bed.ask(bed.engine.batches.unmount, request)
        assert bed.engine.problems() == ()


def test_an_overlay_that_is_in_use_through_a_restart(
    bed: EngineBed, tmp_path: Path, pack: Pack
) -> None:
    """Its scratch is not given to another one."""
    image = tmp_path / "disk.img"
    image.touch()
    os.truncate(image, 8 << 20)
    with loop_device(image, readonly=False) as node:
        scratch = DeviceScratch(device=PathDevice(path=node), ensure_filesystem=True)
        with bed.operation() as op:
            for number in range(2):
                bed.engine.layers.mount(pack.spec(number), op)
            report = bed.engine.overlays.mount(overlay("o", "layer0", scratch=scratch), op)
        with detached(report.target):
            bed.reopen()
            assert [listed.state for listed in bed.engine.overlays.list()] == ["unmounted"]
            second = overlay("p", "layer1", scratch=scratch.replace(existing="adopt"))
            with bed.operation() as op, call_error("conflict"):
                bed.engine.overlays.mount(second, op)
            busy(bed, bed.engine.overlays.unmount, "o")
        with bed.operation() as op:
            bed.engine.overlays.unmount("o", op)
            bed.engine.overlays.mount(second, op)
            bed.engine.overlays.unmount("p", op)
        assert bed.engine.problems() == ()


def test_restart_does_not_take_a_reused_number_for_an_overlay_in_use(
    bed: EngineBed, tmp_path: Path, pack: Pack
) -> None:
    """The kernel gives the number of an overlay that is gone to the next file system."""
    with bed.operation() as op:
        bed.engine.layers.mount(pack.spec(0), op)
        report = bed.engine.overlays.mount(overlay("o", "layer0"), op)
    number = os.stat(report.target).st_dev
    run("umount", report.target)
    with contextlib.ExitStack() as stack:
        for name in map(str, range(16)):
            (tmp_path / name).mkdir()
            run("mount", "-t", "tmpfs", "none", tmp_path / name)
            stack.callback(subprocess.run, ["umount", tmp_path / name], check=True)
            if os.stat(tmp_path / name).st_dev == number:
                break
        else:
            pytest.fail("no file system got the number of the overlay")
        bed.reopen()
        assert bed.engine.overlays.list() == ()
        assert bed.engine.problems() == ()


def test_restart_does_not_take_the_number_of_a_half_made_overlay_for_one_in_use(
    bed: EngineBed, pack: Pack
) -> None:
    """The agent was killed while it unmounted one overlay and mounted another."""
    with bed.operation() as op:
        bed.engine.layers.mount(pack.spec(0), op)
        report = bed.engine.overlays.mount(overlay("o", "layer0"), op)
    number = os.stat(report.target).st_dev
    run("umount", report.target)
    for count in range(16):
        name = f"p{count}"
        report = bed.ask(bed.engine.overlays.mount, overlay(name, "layer0"))
        if os.stat(report.target).st_dev == number:
            break
    else:
        pytest.fail("no overlay got the number of the one that is gone")
    live = bed.engine.state.inventory.overlay(name)
    assert live is not None
    bed.engine.state.journal.begin(f"overlay-{name}", Begun(overlay=live))
    bed.engine.state.journal.write_overlay(live, f"overlay-{name}")
    bed.reopen()
    others = [f"p{each}" for each in range(count)]
    assert [each.overlay_id for each in bed.engine.overlays.list()] == others
    assert bed.engine.problems() == ()


def test_a_process_elsewhere_keeps_its_mount(bed: EngineBed, plain: LayerSpec) -> None:
    """The mount point is not removed: the kernel would unmount it in every namespace."""
    report = bed.ask(bed.engine.layers.mount, plain)
    code = f"""
        {textwrap.indent(textwrap.dedent(_OTHER_NAMESPACE), " " * 8).strip()}
        import os
        print(os.listdir({report.target!r}), flush=True)
    """
    with subprocess.Popen(
        python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        busy(bed, bed.engine.layers.unmount, "plain")
        other.stdin.close()
        assert "hello" in other.stdout.readline()


def test_files_and_programs_of_an_overlay_are_named(bed: EngineBed, plain: LayerSpec) -> None:
    with bed.operation() as op:
        bed.engine.layers.mount(plain, op)
        report = bed.engine.overlays.mount(
            overlay("o", "plain", scratch=TmpfsScratch(size_bytes=1 << 20)), op
        )
    with open(f"{report.target}/hello"):
        hint = busy(bed, bed.engine.overlays.unmount, "o").hint or ""
        assert f"[{os.getpid()}]" in hint
        assert "/hello" in hint
    program = f"{report.target}/busybox"
    with process(program, "sh", "-c", "echo ready; read nothing"):
        hint = busy(bed, bed.engine.overlays.unmount, "o").hint or ""
        assert "exe" in hint
        assert "busybox" in hint or "sh[" in hint


def test_a_mount_namespace_that_ends_lets_go(bed: EngineBed, plain: LayerSpec) -> None:
    report = bed.ask(bed.engine.layers.mount, plain)
    with other_namespace(report.target):
        busy(bed, bed.engine.layers.unmount, "plain")
    reply = bed.ask(bed.engine.layers.unmount, "plain")
    assert reply.unmounted == (report.target,)
