"""An image of a pack in a real machine: one mount where the kernel can, an overlay elsewhere, and
the same contents. Which one it is depends on the kernel (GUESTAGENT_KERNELS)."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import cached_kernel
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from scripts.uml_bed.kernels import kernel_cache
from tests.beds.ctlbed import Run, runner_in
from tests.beds.imagebed import Layout, Member, directory, hard_link, symlink
from vsock.deadline import Deadline

CACHE = Path(__file__).resolve().parents[2] / ".cache"
FEATURES = ("pmem", "verity", "erofs", "overlay", "vsock")
LARGE = bytes(range(256)) * 8000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a pack of a container image, merged as ``app``, and of two of its layers."""
    top = tmp_path_factory.mktemp("pack-images")
    layout = Layout(top / "layout")
    layout.layer([
        directory("etc"), Member("etc/name", b"base\n"), Member("etc/gone", b"g"),
        directory("opaque"), Member("opaque/below", b"b"), Member("large", LARGE),
    ])  # fmt: skip
    layout.layer([Member("etc/name", b"middle\n"), hard_link("linked", "etc/name")])
    layout.layer([
        Member("etc/.wh.gone"), Member("opaque/.wh..wh..opq"), Member("opaque/above", b"a"),
        symlink("link", "etc/name"), Member("sealed", b"s", mode=0o400),
    ])  # fmt: skip
    layout.finish()
    return top


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """Run guestctl with --json in that directory; return what it prints."""
    return runner_in(place)


@pytest.fixture(scope="module")
def layers(run: Run) -> list[str]:
    """The ids of the layers, topmost first."""
    ids = [layer["id"] for layer in run("pack", "build", "layout", "app.img")["layers"]]
    run("image", "merge", "app.img", "--id", "app", "--layers", ",".join(ids))
    run("image", "merge", "app.img", "--id", "other", "--layers", ",".join(ids[1:]))
    run("pack", "check", "app.img")
    return ids


@pytest.fixture(scope="module")
def machine(place: Path, layers: list[str]) -> Iterator[Machine]:
    kernel = cached_kernel(kernel_cache())
    initramfs = build_initramfs(InitramfsSpec(kernel=kernel, features=FEATURES), cache_dir=CACHE)
    spec = MachineSpec(
        kernel=kernel.image, initrd=initramfs.path, pmem=(PmemSpec(path=place / "app.img"),)
    )
    with Machine(spec, cache_dir=CACHE) as machine:
        yield machine
        with GuestAgent(machine.agent_address(), connect_seconds=120) as guest:
            assert guest.dm_list().devices == ()
            guest.shutdown("poweroff")
        with contextlib.closing(Deadline(60)) as deadline:
            assert machine.wait(deadline) == 0


@pytest.fixture(scope="module")
def flattens(machine: Machine) -> bool:
    with GuestAgent(machine.agent_address(), connect_seconds=120) as guest:
        return "erofs-flattened" in guest.hello.features


@pytest.fixture
def at(machine: Machine) -> tuple[str, ...]:
    return ("--wait", "120", "--connect", machine.agent_address())


def contents(machine: Machine, **where: str) -> dict[bytes, tuple[object, ...]]:
    """What a root holds, by path."""
    with GuestAgent(machine.agent_address()) as guest:
        found = guest.fs_checksums(**where)  # type: ignore[arg-type]
    return {path: (entry.kind, entry.digest, entry.target) for path, entry in found.items()}


def test_an_image_is_mounted_in_the_form_that_the_kernel_has(
    run: Run, machine: Machine, at: tuple[str, ...], layers: list[str], flattens: bool
) -> None:
    reply = run(*at, "pack", "mount", "app.img", "--image", "app")
    facts = reply["image"]
    assert facts["form"] == ("merged" if flattens else "overlay")
    assert "erofs-flattened" in facts["reason"]
    mounted = [layer["layer_id"] for layer in reply["layers"]]
    if flattens:
        assert (mounted, reply["overlay"]) == (["app"], None)
        assert facts["target"] == "/run/layers/app"
        (layer,) = reply["layers"]
        assert [device["target_type"] for device in layer["dm"]] == ["verity", "linear"]
        seen = contents(machine, layer_id="app")
    else:
        assert mounted == layers
        assert facts["target"] == reply["overlay"]["target"] == "/run/overlays/app"
        seen = contents(machine, overlay_id="app")
    assert b"etc/gone" not in seen
    assert b"opaque/below" not in seen
    assert {b"opaque/above", b"linked", b"link", b"sealed", b"large"} <= set(seen)
    run(*at, "pack", "unmount", "app.img", "--image", "app")
    with GuestAgent(machine.agent_address()) as guest:
        assert (guest.layer_list(), guest.overlay_list()) == ((), ())


def test_both_forms_show_the_same(
    run: Run, machine: Machine, at: tuple[str, ...], flattens: bool
) -> None:
    mount = (*at, "pack", "mount", "app.img", "--image", "app", "--form")
    reply = run(*mount, "overlay")
    assert reply["image"]["reason"].startswith("an overlay of 3 layers: it was asked for")
    overlaid = contents(machine, overlay_id="app")
    if flattens:
        run(*mount, "merged")
        assert contents(machine, layer_id="app") == overlaid
        run(*at, "layer", "unmount", "app")
    run(*at, "pack", "unmount", "app.img", "--image", "app")


def test_a_form_that_the_kernel_has_not_is_refused_and_nothing_is_made(
    run: Run, machine: Machine, at: tuple[str, ...], flattens: bool
) -> None:
    if flattens:
        pytest.skip("this kernel mounts either form")
    words = (*at, "pack", "mount", "app.img", "--image", "app", "--form", "merged")
    error = run(*words, status=1)["error"]
    assert (error["code"], error["object"]) == ("unsupported", "app")
    assert "Linux 6.4" in error["message"]
    with GuestAgent(machine.agent_address()) as guest:
        assert (guest.layer_list(), guest.dm_list().devices) == ((), ())


def test_a_writable_image_is_an_overlay(
    run: Run, machine: Machine, at: tuple[str, ...], layers: list[str], flattens: bool
) -> None:
    reply = run(*at, "pack", "mount", "app.img", "--image", "app", "--scratch", "tmpfs:65536")
    assert reply["overlay"]["layers"] == (["app"] if flattens else layers)
    assert reply["overlay"]["scratch"] is not None
    assert reply["image"]["target"] == "/run/overlays/app"
    assert b"etc/gone" not in contents(machine, overlay_id="app")
    run(*at, "pack", "unmount", "app.img", "--image", "app")


def test_images_share_layers(
    run: Run, machine: Machine, at: tuple[str, ...], layers: list[str]
) -> None:
    for image in ("app", "other"):
        run(*at, "pack", "mount", "app.img", "--image", image, "--form", "overlay")
    run(*at, "pack", "unmount", "app.img", "--image", "app")
    with GuestAgent(machine.agent_address()) as guest:
        assert {layer.layer_id for layer in guest.layer_list()} == set(layers[1:])
    run(*at, "pack", "unmount", "app.img", "--image", "other")


def test_an_image_that_the_pack_has_not(run: Run, at: tuple[str, ...]) -> None:
    error = run(*at, "pack", "mount", "app.img", "--image", "web", status=1)["error"]
    assert error["code"] == "not_found"
    assert "its images: app, other" in error["message"]
