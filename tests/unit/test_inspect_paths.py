"""Single paths: nothing leads out of a root, nothing is opened by accident, everything answers."""

import functools
import os
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api.inspect import PathRequest, StatReply
from guestagent.host.client import GuestAgent
from guestagent.inspect.acl import from_mode, parse_acl, show_acl
from tests.beds.calls import call_error
from tests.beds.inspectbed import serving
from vsock.errors import CallError

ODD_NAME = b"na\xff\nme"
SECRET = b"not for you"

#: Expects an error that says something.
told_error = functools.partial(call_error, match=r": \S")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_bytes(SECRET)
    top = tmp_path / "tree"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "motd").write_bytes(b"hello\nworld\n")
    (top / "etc" / "motd").chmod(0o640)
    (top / "inside").symlink_to("/etc/motd")
    (top / "up").symlink_to("../../../secret")
    (top / "out").symlink_to(tmp_path / "secret")
    (top / "self").symlink_to("/proc/self/root")
    (top / "loop").symlink_to("loop")
    (top / "dangling").symlink_to("nowhere")
    (top / os.fsdecode(ODD_NAME)).write_bytes(b"odd")
    os.mkfifo(top / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
    return top


@pytest.fixture
def guest(tmp_path: Path, tree: Path) -> Iterator[GuestAgent]:
    bed = serving(tmp_path / "agent.sock", {"base": tree}, {"all": tree, "host": Path("/")})
    with bed as running, GuestAgent(running.address) as handle:
        yield handle


@pytest.mark.parametrize(
    "path",
    ["../secret", "/../secret", "/etc/../../secret", "etc/../../../../../secret", "up", "out"],
)
def test_paths_stay_inside_the_layer(guest: GuestAgent, path: str) -> None:
    assert guest.fs_exists(path, layer_id="base") is False
    for read in (guest.fs_read_file, guest.fs_pread, guest.fs_checksum, guest.fs_head):
        with told_error("not_found"):
            read(path, layer_id="base")


def test_dots_and_absolute_symlinks_resolve_inside(guest: GuestAgent) -> None:
    for path in ("/../etc/motd", "etc/../etc/motd", "inside", "/inside", "../../inside"):
        assert guest.fs_read_file(path, overlay_id="all") == b"hello\nworld\n"
    assert guest.fs_readlink("/out", layer_id="base").endswith(b"/secret")


def test_a_symlink_to_proc_finds_no_proc(guest: GuestAgent) -> None:
    with told_error("not_found"):
        guest.fs_ls("self", layer_id="base").drain()


@pytest.mark.skipif(os.geteuid() != 0, reason="this user may not clone mounts")
def test_mounts_below_a_layer_are_no_part_of_it(guest: GuestAgent) -> None:
    assert Path("/proc/self/status").exists()
    assert not guest.fs_exists("/proc/self/status", overlay_id="host")
    assert list(guest.fs_ls("/proc", overlay_id="host")) == []


def test_a_circle_of_symlinks_is_told(guest: GuestAgent) -> None:
    with told_error("invalid") as refused:
        guest.fs_read_file("loop", layer_id="base")
    assert refused.value.hint
    assert guest.fs_lstat("loop", layer_id="base").kind == "l"


@pytest.mark.parametrize("path", ["fifo", "socket", "etc"])
def test_only_regular_files_are_read(guest: GuestAgent, path: str) -> None:
    for read in (guest.fs_read_file, guest.fs_pread, guest.fs_checksum, guest.fs_head):
        with told_error("invalid"):
            read(path, layer_id="base")


def test_a_fifo_is_not_opened_not_even_for_a_moment(guest: GuestAgent, tree: Path) -> None:
    """A writer that waits for a reader would be woken by any open."""
    woken = threading.Event()
    kept: list[int] = []

    def write() -> None:
        kept.append(os.open(tree / "fifo", os.O_WRONLY))
        woken.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with pytest.raises(CallError):
            guest.fs_read_file("fifo", layer_id="base")
        guest.fs_lstat("fifo", layer_id="base")
        guest.fs_checksums(layer_id="base")
        guest.fs_tar_out_stream("/", layer_id="base").drain()
        guest.fs_getxattrs("fifo", layer_id="base")
        assert not woken.is_set()
    finally:
        with open(tree / "fifo", "rb"):
            writer.join()
        os.close(kept[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="this user may make no device nodes")
def test_device_nodes_are_described_and_not_opened(guest: GuestAgent, tree: Path) -> None:
    try:
        os.mknod(tree / "zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("this user may make no device nodes")
    found = guest.fs_lstat("zero", layer_id="base")
    assert (found.kind, found.rdev) == ("c", "1:5")
    assert guest.fs_checksums(layer_id="base")[b"zero"].device == "1:5"
    with told_error("invalid"):
        guest.fs_head("zero", layer_id="base")


def test_names_are_bytes(guest: GuestAgent) -> None:
    assert ODD_NAME in list(guest.fs_ls(layer_id="base"))
    assert guest.fs_read_file(ODD_NAME, layer_id="base") == b"odd"
    with pytest.raises(CallError) as refused:
        guest.fs_read_file(ODD_NAME + b"2", layer_id="base")
    assert r"'/na\xff\nme2'" in refused.value.message


@pytest.mark.parametrize("path", ["", "a" * 5000, "nul\0byte"])
def test_impossible_paths_are_refused_before_they_are_sent(guest: GuestAgent, path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        guest.fs_lstat(path, layer_id="base")


def test_impossible_paths_are_refused_by_the_agent(guest: GuestAgent) -> None:
    raw = PathRequest(layer_id="base").to_wire()
    for path in ("", b"\0", "a" * 5000, 7, None, ["x"]):
        with told_error("invalid"):
            guest._client.call("fs.lstat", {**raw, "path": path})
    for place in ({}, {"layer_id": "a", "overlay_id": "b"}, {"layer_id": "../x"}):
        with told_error("invalid"):
            guest._client.call("fs.lstat", place)


def test_a_component_that_is_too_long_is_told(guest: GuestAgent) -> None:
    with told_error("invalid") as refused:
        guest.fs_lstat("/" + "a" * 300, layer_id="base")
    assert "ENAMETOOLONG" in str(refused.value)


def test_lstat_of_unmounted_layer_or_overlay_is_not_found(guest: GuestAgent) -> None:
    for place in ({"layer_id": "nobody"}, {"overlay_id": "nobody"}):
        with told_error("not_found"):
            guest.fs_lstat("/", **place)  # type: ignore[arg-type]


def test_lstat_agrees_with_os_lstat(guest: GuestAgent, tree: Path) -> None:
    for name in ("etc", "etc/motd", "inside", "fifo", "socket", os.fsdecode(ODD_NAME)):
        ours: StatReply = guest.fs_lstat(os.fsencode(name), layer_id="base")
        theirs = (tree / name).lstat()
        assert (ours.mode, ours.uid, ours.gid, ours.size_bytes, ours.links, ours.inode) == (
            stat.S_IMODE(theirs.st_mode),
            theirs.st_uid,
            theirs.st_gid,
            theirs.st_size,
            theirs.st_nlink,
            theirs.st_ino,
        )
        assert (ours.mtime_ns, ours.ctime_ns) == (theirs.st_mtime_ns, theirs.st_ctime_ns)
        assert ours.allocated_bytes == theirs.st_blocks * 512
    assert guest.fs_lstat("inside", layer_id="base").target == b"/etc/motd"
    assert guest.fs_lstat("etc", layer_id="base").kind == "d"
    assert guest.fs_lstat("dangling", layer_id="base").target == b"nowhere"
    assert guest.fs_exists("dangling", layer_id="base") is False


def test_readlink_of_a_file_is_refused(guest: GuestAgent) -> None:
    with told_error("invalid"):
        guest.fs_readlink("/etc/motd", layer_id="base")


def test_ranges_of_a_file(guest: GuestAgent) -> None:
    assert guest.fs_pread("inside", 6, 3, layer_id="base") == b"wor"
    assert guest.fs_pread("inside", 6, layer_id="base") == b"world\n"
    assert guest.fs_pread("inside", 1 << 40, layer_id="base") == b""
    assert guest.fs_head("inside", 1, layer_id="base").data == b"hello\n"
    assert guest.fs_head("inside", layer_id="base").data == b"hello\nworld\n"
    pieces = list(guest.fs_download_stream("inside", layer_id="base", offset_bytes=2, size_bytes=5))
    assert b"".join(pieces) == b"llo\nw"


def test_head_of_one_endless_line_is_cut(guest: GuestAgent, tree: Path) -> None:
    (tree / "line").write_bytes(b"x" * 100_000)
    reply = guest.fs_head("line", layer_id="base")
    assert (len(reply.data), reply.is_whole, reply.size_bytes) == (32768, False, 100_000)


def test_read_file_refuses_a_longer_file(guest: GuestAgent) -> None:
    with told_error("resource"):
        guest.fs_read_file("inside", layer_id="base", max_bytes=11)
    assert guest.fs_read_file("inside", layer_id="base", max_bytes=12) == b"hello\nworld\n"


def test_extended_attributes_of_files_and_of_symlinks(guest: GuestAgent, tree: Path) -> None:
    try:
        os.setxattr(tree / "etc" / "motd", "user.key", b"\0value\xff")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    assert guest.fs_getxattrs("/etc/motd", layer_id="base") == {b"user.key": b"\0value\xff"}
    assert guest.fs_getxattrs("/inside", layer_id="base") == {}  # the symlink itself has none


def test_statvfs_agrees_with_os_statvfs(guest: GuestAgent, tree: Path) -> None:
    ours, theirs = guest.fs_statvfs(layer_id="base"), os.statvfs(tree)
    assert ours.size_bytes == theirs.f_blocks * theirs.f_frsize
    assert ours.name_max_bytes == theirs.f_namemax
    assert ours.readonly is False


def test_missing_acl_is_made_of_the_mode(guest: GuestAgent) -> None:
    assert guest.fs_acl_get_file("/etc/motd", layer_id="base").text == (
        "user::rw-\ngroup::r--\nother::---"
    )
    assert guest.fs_acl_get_file("/etc", "default", layer_id="base").entries == ()


def test_an_acl_is_decoded(guest: GuestAgent, tree: Path) -> None:
    entries = [(1, 6, 0xFFFFFFFF), (2, 4, 1000), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF)]
    value = struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", *entry) for entry in [*entries, (32, 0, 0xFFFFFFFF)]
    )
    try:
        os.setxattr(tree / "etc" / "motd", "system.posix_acl_access", value)
    except OSError:
        pytest.skip("this file system has no access control lists")
    reply = guest.fs_acl_get_file("/etc/motd", layer_id="base")
    assert reply.text.split() == [
        "user::rw-",
        "user:1000:r--",
        "group::r--",
        "mask::r--",
        "other::---",
    ]
    assert reply.entries[1].id == 1000


@given(st.binary(max_size=64))
def test_any_bytes_are_an_acl_or_are_refused(value: bytes) -> None:
    try:
        entries = parse_acl(value)
    except CallError:
        pass  # refused, and nothing else raised
    else:
        assert len(value) == 4 + 8 * len(entries)
        assert show_acl(entries, ",").count(",") == max(0, len(entries) - 1)


def test_acl_from_mode() -> None:
    assert show_acl(from_mode(0o751), ",") == "user::rwx,group::r-x,other::--x"
