"""A merged image in the kernel, beside an overlay of the same layers: the same, file by file.

Runs without device-mapper too, as root: ``pytest --noconftest tests/kernel/test_erofs_merge.py``.
"""

import contextlib
import os
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestagent.storage import syscalls
from rootfs.image.erofs_merge import merge_layers
from rootfs.image.images import build_layers
from rootfs.image.tree import Node
from tests.beds import dmbed, loopbed
from tests.beds.containerbed import make_container_image
from tests.beds.mergebed import Facts, layers, opened, write_images, write_unified
from tests.beds.treebed import assert_same, ext4_directory, file_facts, make_everything

pytestmark = pytest.mark.kernel

LINUX = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])
EXAMPLES = int(os.environ.get("MERGE_EXAMPLES", "40"))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    dmbed.isolate_mounts()
    with dmbed.no_leaks():
        yield


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory."""
    (tmp_path / "memory").mkdir()
    syscalls.mount("tmpfs", str(tmp_path / "memory"), "tmpfs", 0)
    try:
        yield tmp_path / "memory"
    finally:
        syscalls.umount2(str(tmp_path / "memory"))


def attach(image: Path, stack: contextlib.ExitStack) -> str:
    """Attach a loop device for the time of ``stack``."""
    node, fd = loopbed.attach(image)
    stack.callback(loopbed.detach, fd)
    return node


def mount(
    source: str, target: Path, filesystem: str, options: str, stack: contextlib.ExitStack
) -> Path:
    target.mkdir(exist_ok=True)
    syscalls.mount(source, str(target), filesystem, syscalls.MS_RDONLY, options)
    stack.callback(syscalls.umount2, str(target))
    return target


def overlay_facts(images: Sequence[Path], directory: Path, *, userxattr: bool = False) -> Facts:
    """Return what an overlay of images, topmost first, shows."""
    with contextlib.ExitStack() as stack:
        places = [
            mount(attach(image, stack), directory / f"mount{number}", "erofs", "", stack)
            for number, image in enumerate(images)
        ]
        # with xino the hard links of a layer have one inode number
        options = "userxattr,xino=on," if userxattr else "xino=on,"
        options += "lowerdir=" + ":".join(map(str, places))
        return file_facts(mount("overlay", directory / "overlay", "overlay", options, stack))


def merged_facts(
    images: Sequence[Path], directory: Path, *, userxattr: bool = False
) -> Iterator[Facts]:
    """Yield what the merged image shows: with a device for each layer, and as one device."""
    with opened(images) as files:
        merged = merge_layers(files, directory / "merged", userxattr=userxattr)
        with contextlib.ExitStack() as stack:
            devices = [f"device={attach(image, stack)}" for image in images]
            source = attach(merged.path, stack)
            place = mount(source, directory / "merged.d", "erofs", ",".join(devices), stack)
            yield file_facts(place)
        if LINUX >= (6, 4):
            os.close(write_unified(merged, files, directory / "unified").fd)
            with contextlib.ExitStack() as stack:
                source = attach(directory / "unified", stack)
                yield file_facts(mount(source, directory / "merged.d", "erofs", "", stack))


def assert_merged_is_overlay(
    images: Sequence[Path], directory: Path, *, userxattr: bool = False
) -> None:
    expected = overlay_facts(images, directory, userxattr=userxattr)
    for found in merged_facts(images, directory, userxattr=userxattr):
        assert_same(found, expected)


@given(layers(least=2, empty_file_whiteouts=LINUX >= (6, 8)), st.booleans())
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
def test_any_layers(memory: Path, trees: list[Node], userxattr: bool) -> None:
    assert_merged_is_overlay(write_images(trees, memory), memory, userxattr=userxattr)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two directories for layers, the upper one first."""
    dmbed.isolate_mounts()
    with ext4_directory(tmp_path_factory.mktemp("sources")) as top:
        lower, upper = top / "lower", top / "upper"
        make_everything(lower)
        (upper / "many").mkdir(parents=True)
        (upper / "new").write_bytes(b"n" * 5000)
        (upper / "size1").write_text("changed")
        (upper / "empty").write_text("a file instead of a directory")
        (upper / "size4096").mkdir()
        os.mknod(upper / "many/file0003", stat.S_IFCHR, 0)
        yield upper, lower


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-x1",),  # all attributes shared
        ("-Enoinline_data",),
        ("-Eforce-inode-extended",),
        ("--chunksize=4096",),
    ],
    ids=" ".join,
)
def test_every_kind_of_inode_by_mkfs_erofs(
    sources: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...]
) -> None:
    images = []
    for directory in sources:
        # not in memory: mkfs.erofs 1.5 copies chunks from a temporary file within a file system
        images.append(tmp_path / f"{directory.name}.erofs")
        command = ["mkfs.erofs", "--quiet", *options, str(images[-1]), str(directory)]
        subprocess.run(command, check=True, capture_output=True)
    assert_merged_is_overlay(images, tmp_path)


def test_a_container_image(memory: Path) -> None:
    """Packages, changes and removals, as umoci writes and unpacks them."""
    image = make_container_image(memory)
    images = [each.path for each in reversed(build_layers(image.layout, memory))]
    assert_merged_is_overlay(images, memory)
    # overlayfs counts the links of merged directories in its own way
    found = next(merged_facts(images, memory))
    assert_same(_without_links(found), _without_links(file_facts(image.unpacked)))


def _without_links(found: Facts) -> Facts:
    return {path: {k: v for k, v in each.items() if k != "links"} for path, each in found.items()}
