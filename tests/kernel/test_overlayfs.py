"""Overlays by every way that the running kernel has, up to its 500 layers.

Linux 6.1 (User Mode Linux) has mount(2) only; on 6.13 and later all ways are tried. Runs without
device-mapper too, as root: ``pytest --noconftest -m kernel tests/kernel/test_overlayfs.py``.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import OverlayOptions
from guestagent.storage import overlayfs, syscalls
from guestagent.storage.fscontext import FsContextError
from guestagent.storage.mount import mount_filesystem, unmount
from guestagent.storage.mountinfo import Mount, find_mount
from guestagent.storage.overlayfs import lowerdirs_of, mount_overlay, remove_links
from tests.beds import dmbed
from tests.beds.calls import call_error
from vsock.errors import CallError

pytestmark = pytest.mark.kernel

WAYS = ("fsconfig-fd", "fsconfig-path", "mount")
_MARK = b"layer-number-000000"


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    dmbed.isolate_mounts()
    with dmbed.no_leaks():
        yield


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """500 mounted EROFS layers, topmost first, each with a file of its own content.

    mkfs.erofs runs once; the other images differ by the number that is patched into the data.
    """
    dmbed.isolate_mounts()
    directory = tmp_path_factory.mktemp("layers")
    image = dmbed.erofs_image(directory, "template", {"number": _MARK + bytes(4096)})
    template = image.read_bytes()
    assert template.count(_MARK) == 1
    with contextlib.ExitStack() as stack:
        paths = []
        for number in range(overlayfs.MAX_LAYERS):
            copy = directory / f"{number}.erofs"
            copy.write_bytes(template.replace(_MARK, b"layer-number-%06d" % number))
            node = stack.enter_context(dmbed.loop_device(copy))
            path = directory / f"p0-{number * 4096:09d}-{4096:09d}"
            path.mkdir()
            mount_filesystem(source=node, target=str(path), filesystem="erofs")
            stack.callback(unmount, str(path))
            paths.append(str(path))
        yield paths


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if name not in overlayfs.available_ways():
        pytest.skip(f"this kernel (Linux {os.uname().release}) cannot mount an overlay by {name}")
    return name


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Path]:
    """A directory with ``target``, ``runtime``, and a tmpfs at ``scratch`` for upper and work."""
    for name in ("target", "runtime", "scratch"):
        (tmp_path / name).mkdir()
    scratch = str(tmp_path / "scratch")
    mount_filesystem(source="scratch", target=scratch, filesystem="tmpfs", flags=())
    yield tmp_path
    while find_mount(str(tmp_path / "target")) is not None:
        unmount(str(tmp_path / "target"))
    unmount(scratch)


def overlay(bed: Path, lowerdirs: list[str], **changes: object) -> overlayfs.OverlayMount:
    fields: dict[str, object] = {
        "name": "test",
        "lowerdirs": lowerdirs,
        "target": str(bed / "target"),
        "runtime_directory": str(bed / "runtime"),
    }
    return mount_overlay(**{**fields, **changes})  # type: ignore[arg-type]


def upper_and_work(bed: Path) -> dict[str, object]:
    for name in ("upper", "work"):
        (bed / "scratch" / name).mkdir()
    return {"upperdir": str(bed / "scratch/upper"), "workdir": str(bed / "scratch/work")}


@pytest.mark.parametrize("count", [1, 2, 64, 500])
def test_all_layers_are_there_in_order(bed: Path, layers: list[str], count: int, way: str) -> None:
    """Each layer's number can be seen only by peeling: the topmost wins, so that every suffix of
    the stack is mounted in turn for the small ones, and first and last are looked at for 500."""
    used = layers[:count]
    for first in sorted({0, count // 2, count - 1}):
        mounted = overlay(bed, used[first:], way=way)
        assert mounted.way == way
        assert mounted.method == way.partition("-")[0]
        assert mounted.padded == (first == count - 1)
        shown = mounted.lowerdirs[:-1] if mounted.padded else mounted.lowerdirs
        assert shown == tuple(used[first:])
        content = (bed / "target" / "number").read_bytes()
        assert content.rstrip(b"\0") == b"layer-number-%06d" % first
        found = find_mount(str(bed / "target"))
        assert found is not None
        assert {"ro", "nosuid", "nodev"} <= set(found.options)
        assert lowerdirs_of(found) == mounted.lowerdirs
        unmount(str(bed / "target"))
        if mounted.links is not None:
            assert way == "mount"
            assert count == 500
            remove_links(mounted.links)


def test_each_of_500_directories_is_in_the_merge(bed: Path, way: str) -> None:
    """500 directories with one file each: none may be missing from the merged directory."""
    lowerdirs = []
    for number in range(500):
        path = bed / "scratch" / f"a-directory-with-a-long-name-{number:04d}"
        path.mkdir()
        (path / f"file{number}").touch()
        lowerdirs.append(str(path))
    mounted = overlay(bed, lowerdirs, way=way)
    assert set(os.listdir(bed / "target")) == {f"file{number}" for number in range(500)}
    unmount(str(bed / "target"))
    if mounted.links is not None:
        remove_links(mounted.links)


def test_501_layers_are_refused(bed: Path) -> None:
    with pytest.raises(ValueError, match="1 to 500"):
        overlay(bed, ["/etc"] * 501)
    with pytest.raises(ValueError, match="1 to 500"):
        overlay(bed, [])


@pytest.mark.parametrize("name", ["co:lon", "com,ma", "back\\slash", "sp ace", "a=b", 'q"uote'])
def test_odd_names(bed: Path, name: str, way: str) -> None:
    lowerdirs = []
    for number in range(2):
        path = bed / "scratch" / f"{name}{number}"
        path.mkdir()
        (path / f"file{number}").touch()
        lowerdirs.append(str(path))
    directories: dict[str, object] = {}
    for kind in ("upper", "work"):
        path = bed / "scratch" / f"{name}-{kind}"
        path.mkdir()
        directories[f"{kind}dir"] = str(path)
    mounted = overlay(bed, lowerdirs, way=way, **directories)
    assert mounted.lowerdirs == tuple(lowerdirs)
    assert set(os.listdir(bed / "target")) == {"file0", "file1"}
    (bed / "target" / "new").touch()
    assert os.listdir(str(directories["upperdir"])) == ["new"]


def test_a_writable_overlay_keeps_its_changes_above(bed: Path, layers: list[str], way: str) -> None:
    options = OverlayOptions(redirect_dir="on", metacopy="on", xino="off", volatile=True)
    mounted = overlay(bed, layers[:3], way=way, options=options, **upper_and_work(bed))
    found = find_mount(str(bed / "target"))
    assert found is not None
    assert {"rw", "nosuid", "nodev"} <= set(found.options)
    assert {"redirect_dir=on", "metacopy=on"} <= set(found.super_options)
    assert {"volatile", "fsync=volatile"} & set(found.super_options)  # newer kernels: the latter
    assert not mounted.padded
    (bed / "target" / "number").write_bytes(b"changed")
    assert (bed / "scratch/upper/number").read_bytes() == b"changed"
    assert Path(layers[0], "number").read_bytes().startswith(b"layer")


def test_one_layer_and_a_scratch_need_no_padding(bed: Path, layers: list[str], way: str) -> None:
    mounted = overlay(bed, layers[:1], way=way, **upper_and_work(bed))
    assert mounted.lowerdirs == (layers[0],)
    assert not (bed / "runtime" / "empty").exists()


def test_overlay_options_that_the_kernel_would_cut_are_refused(
    bed: Path, layers: list[str]
) -> None:
    """Long options do not reach mount(2), and the way around carries all the layers."""
    data = "lowerdir=" + ":".join(layers)
    with pytest.raises(OSError, match="options of") as caught:
        syscalls.mount("overlay", str(bed / "target"), "overlay", syscalls.MS_RDONLY, data)
    assert caught.value.errno == errno.E2BIG
    mounted = overlay(bed, layers, way="mount")
    assert mounted.links == str(bed / "runtime/links/test")
    assert len(os.listdir(mounted.links)) == 500
    assert len(mounted.lowerdirs) == 500
    unmount(str(bed / "target"))
    remove_links(mounted.links)
    remove_links(mounted.links)


def test_short_stacks_need_no_links(bed: Path, layers: list[str]) -> None:
    """The limit is exact: 4095 bytes go in one piece, one more takes the links."""
    lowerdirs = layers[:20]
    directories = upper_and_work(bed)
    used = len(f"lowerdir={':'.join(lowerdirs)},upperdir={directories['upperdir']},workdir=")
    for excess, links in ((0, None), (1, str(bed / "runtime/links/test"))):
        room = syscalls.MOUNT_DATA_MAX_BYTES - used + excess
        work = bed / "scratch"
        while room - len(str(work)) > 256:
            work = work / ("w" * 200)
        work = work / ("w" * (room - len(str(work)) - 1))
        work.mkdir(parents=True)
        assert len(str(work)) == room
        directories["workdir"] = str(work)
        mounted = overlay(bed, lowerdirs, way="mount", **directories)
        assert mounted.links == links
        assert mounted.lowerdirs == tuple(lowerdirs)
        unmount(str(bed / "target"))
    remove_links(str(bed / "runtime/links/test"))


def test_paths_too_long_for_mount_2_are_unsupported(bed: Path, layers: list[str]) -> None:
    directories: dict[str, object] = {}
    for kind in ("upper", "work"):
        path = bed / "scratch" / kind
        for _ in range(10):
            path = path / (kind[0] * 205)
        path.mkdir(parents=True)
        directories[f"{kind}dir"] = str(path)
    with call_error("unsupported"):
        overlay(bed, layers[:2], way="mount", **directories)
    assert find_mount(str(bed / "target")) is None


def test_the_working_directory_of_others_stays(bed: Path, layers: list[str]) -> None:
    """While overlays are mounted from within link directories nobody else may move."""
    here = os.getcwd()
    seen = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add(os.getcwd())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3):
        mounted = overlay(bed, layers, way="mount")
        assert mounted.links is not None
        unmount(str(bed / "target"))
        remove_links(mounted.links)
    stop.set()
    thread.join()
    assert seen == {here}
    assert os.getcwd() == here


def test_a_failed_mount_leaves_no_links(bed: Path, layers: list[str], way: str) -> None:
    gone = str(bed / "scratch" / "gone")
    with pytest.raises(OSError, match="No such file") as caught:
        overlay(bed, [*layers[:499], gone], way=way)
    assert isinstance(caught.value, (FsContextError, FileNotFoundError))
    assert not (bed / "runtime/links/test").exists()
    assert find_mount(str(bed / "target")) is None


def test_the_kernels_reason_is_told(bed: Path, layers: list[str], way: str) -> None:
    """An upper directory within a layer: read-only, so that the kernel refuses."""
    (bed / "scratch/work").mkdir()
    with pytest.raises(FsContextError, match=r"fsconfig|mount") as caught:
        overlay(bed, layers[:2], way=way, upperdir=layers[2], workdir=str(bed / "scratch/work"))
    assert caught.value.errno in (errno.EINVAL, errno.EROFS)
    if way != "mount":
        assert any("overlay" in line for line in caught.value.log), caught.value.log


def test_overlay_with_other_layers_than_asked_is_unmounted(
    bed: Path, layers: list[str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No kernel can be made to lose a layer now that nothing is cut: the answer is falsified."""

    def lose_one(target: str) -> Mount | None:
        found = find_mount(target)
        if found is None:
            return None
        shown = lowerdirs_of(found)[:-1]
        return found.replace(super_options=("ro", "lowerdir=" + ":".join(shown)))

    monkeypatch.setattr(overlayfs, "find_mount", lose_one)
    with call_error("integrity", match="shows 2"):
        overlay(bed, layers[:3], way=way)
    assert find_mount(str(bed / "target")) is None


def test_links_in_the_path_of_a_layer_are_refused(bed: Path, layers: list[str], way: str) -> None:
    link = bed / "scratch" / "link"
    link.symlink_to(layers[1])
    with pytest.raises(OSError, match="openat2"):
        overlay(bed, [layers[0], str(link)], way=way)
    assert find_mount(str(bed / "target")) is None


def test_lowerdirs_survive_the_loss_of_their_links(bed: Path, layers: list[str]) -> None:
    mounted = overlay(bed, layers, way="mount")
    assert mounted.links is not None
    remove_links(mounted.links)
    found = find_mount(str(bed / "target"))
    assert found is not None
    assert lowerdirs_of(found)[:3] == ("0", "1", "2")
    unmount(str(bed / "target"))


def test_a_directory_of_links_with_something_else_stays(bed: Path, layers: list[str]) -> None:
    links = bed / "runtime/links/test"
    links.mkdir(parents=True)
    (links / "0").symlink_to("/stale")
    (links / "precious").touch()
    with pytest.raises(OSError, match="something else"):
        overlay(bed, layers, way="mount")
    assert (links / "precious").exists()


def test_the_empty_layer_must_be_empty(bed: Path, layers: list[str]) -> None:
    (bed / "runtime/empty").mkdir()
    (bed / "runtime/empty/surprise").touch()
    with pytest.raises(OSError, match="has entries"):
        overlay(bed, layers[:1])


@pytest.mark.parametrize("refused_at", [1, 2])
def test_wrong_directory_mounts_nothing(
    bed: Path, layers: list[str], way: str, refused_at: int
) -> None:
    """A layer is refused when it is first opened; where the kernel takes paths, also when it is
    another one after the mount, which is then taken back."""
    opened = 0

    def open_directory(path: str) -> int:
        nonlocal opened
        if path == layers[1]:
            opened += 1
            if opened == refused_at:
                raise CallError("conflict", "another mount is there")
        return overlayfs.open_plain(path)

    before = os.listdir("/proc/self/fd")
    if way == "fsconfig-fd" and refused_at == 2:
        assert overlay(bed, layers[:3], way=way, open_directory=open_directory).way == way
        assert opened == 1
    else:
        with pytest.raises(CallError, match="another mount is there"):
            overlay(bed, layers[:3], way=way, open_directory=open_directory)
        assert find_mount(str(bed / "target")) is None
        assert not (bed / "runtime/links/test").exists()
    assert os.listdir("/proc/self/fd") == before


def test_links_go_with_an_overlay_that_is_taken_back(bed: Path, layers: list[str]) -> None:
    """So many layers that mount(2) needs a directory of links."""
    opened = 0

    def open_directory(path: str) -> int:
        nonlocal opened
        opened += path == layers[0]
        if opened == 2:
            raise CallError("conflict", "another mount is there")
        return overlayfs.open_plain(path)

    with pytest.raises(CallError, match="another mount is there"):
        overlay(bed, layers, way="mount", open_directory=open_directory)
    assert find_mount(str(bed / "target")) is None
    assert not (bed / "runtime/links/test").exists()
