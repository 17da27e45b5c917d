"""Output files: whole or not at all, and never in place of what is no regular file."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rootfs.image.images import build_image, build_layers
from rootfs.imagefile.output import new_file, write_file
from rootfs.pack.manifest import Manifest
from rootfs.pack.pack import Pack, new_pack
from rootfs.pack.sidecar import Sidecar
from rootfs.verity.formatter import format_image
from tests.beds.calls import call_error
from tests.beds.imagebed import Layout, Member, make_tar
from vsock.errors import CallError

Write = Callable[[Path], object]
MANIFEST = Manifest(image="p", size_bytes=0, alignment_bytes=4096)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(make_tar([Member("a", b"x")]))
    return path


def writers(tar: Path) -> list[Write]:
    """Return what writes a file, of each kind."""
    data = tar.with_name("data")
    data.write_bytes(bytes(8192))
    return [
        lambda path: write_file(path, b"new"),
        lambda path: build_image(tar, path),
        lambda path: build_image(tar, path, filesystem="squashfs"),
        lambda path: format_image(data, hash_file=path, force=True),
        lambda path: format_image(data, hash_file=path),
        MANIFEST.save,
        Sidecar(root_digest=bytes(32), hash_offset_bytes=4096).save,
        lambda path: Pack.create(path).close(),
        lambda path: new_pack(path).__enter__(),
    ]


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def make_link(path: Path) -> None:
    path.with_name("kept").write_bytes(b"kept")
    path.symlink_to("kept")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_fifo, "a FIFO"),
        (make_socket, "a socket"),
        (make_link, "a symbolic link"),
        (make_dangling_link, "a symbolic link"),
        (Path.mkdir, "a directory"),
    ],
)
def test_output_in_place_of_a_special_file_is_refused(
    tmp_path: Path, tar: Path, make: Callable[[Path], None], kind: str
) -> None:
    place = tmp_path / "place"
    make(place)
    before = place.lstat()
    for write in writers(tar):
        with call_error("invalid", match=kind):
            write(place)
        assert place.lstat() == before
    if stat.S_ISLNK(before.st_mode) and place.exists():
        assert place.read_bytes() == b"kept"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a device")
def test_a_device_is_not_replaced(tmp_path: Path, tar: Path) -> None:
    place = tmp_path / "null"
    os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for write in writers(tar):
        with pytest.raises(CallError, match="a character device"):
            write(place)
        assert stat.S_ISCHR(place.lstat().st_mode)


@pytest.mark.parametrize("name", ["", ".", "/", "..", "down/", "x\0y"])
def test_an_output_needs_a_name(
    tmp_path: Path, tar: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for write in (lambda: write_file(name, b"new"), lambda: build_image(tar, name)):
        with call_error("invalid", match="no name of a file"):
            write()


def test_new_file_does_not_replace_symlink_created_meanwhile(tmp_path: Path) -> None:
    block = new_file(tmp_path / "place")
    block.__enter__()
    make_link(tmp_path / "place")
    with pytest.raises(CallError, match="a symbolic link"):
        block.__exit__(None, None, None)
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert sorted(os.listdir(tmp_path)) == ["kept", "place"]


def test_a_long_name_of_wide_characters_is_written(tmp_path: Path) -> None:
    place = tmp_path / ("層" * 85)
    write_file(place, b"new")
    assert place.read_bytes() == b"new"


@pytest.mark.parametrize("link", [os.link, None])
def test_the_source_is_not_overwritten(
    tmp_path: Path, tar: Path, link: Callable[[Path, Path], None] | None
) -> None:
    content = tar.read_bytes()
    output = tar
    if link is not None:
        output = tmp_path / "other"
        link(tar, output)
    with call_error("invalid", match="the command reads this file"):
        build_image(tar, output)
    assert tar.read_bytes() == content


def test_a_file_of_the_source_is_not_overwritten(tmp_path: Path) -> None:
    Layout(tmp_path / "layout").layer([Member("a", b"x")]).finish()
    index = (tmp_path / "layout" / "index.json").read_bytes()
    with pytest.raises(CallError, match="a file of the source"):
        build_image(tmp_path / "layout", tmp_path / "layout" / "index.json")
    assert (tmp_path / "layout" / "index.json").read_bytes() == index
    build_image(tmp_path / "layout", tmp_path / "layout" / "new.erofs")
    build_layers(tmp_path / "layout", tmp_path)


def test_an_image_is_not_its_own_hash_file(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(8192))
    content = image.read_bytes()
    os.link(image, tmp_path / "other")
    for path in (image, tmp_path / "other"):
        with pytest.raises(CallError, match="the command reads this file"):
            format_image(image, hash_file=path, force=True)
    assert image.read_bytes() == content


def test_a_pack_that_is_not_whole_has_no_name(tmp_path: Path, tar: Path) -> None:
    build_image(tar, tmp_path / "a.erofs")

    def interrupted(pack: Pack) -> None:
        pack.add(tmp_path / "a.erofs", "a")
        assert not (tmp_path / "p.img").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), new_pack(tmp_path / "p.img") as pack:
        interrupted(pack)
    assert not list(tmp_path.glob("*p.img*"))
    with new_pack(tmp_path / "p.img") as pack:
        pack.add(tmp_path / "a.erofs", "a")
    with Pack.open(tmp_path / "p.img") as opened:
        assert opened.check().is_sound
    assert not list(tmp_path.glob(".*"))


def test_a_name_taken_while_a_pack_is_made_is_kept(tmp_path: Path) -> None:
    with call_error("conflict"), new_pack(tmp_path / "p.img"):
        (tmp_path / "p.img.json").write_bytes(b"precious")
    assert (tmp_path / "p.img.json").read_bytes() == b"precious"
    assert not (tmp_path / "p.img").exists()
