"""Whole trees: checksums, lists, sums and archives, held against the standard library's own."""

import hashlib
import io
import os
import socket
import stat
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.host.client import GuestAgent
from guestagent.inspect import pax
from guestagent.inspect.listing import matches
from guestagent.inspect.walk import MAX_DEPTH
from tests.beds.calls import call_error
from tests.beds.inspectbed import serving
from vsock.errors import CallError

LONG = "long" * 40


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "etc" / "deep" / "er").mkdir(parents=True)
    (top / "etc" / "motd").write_bytes(b"hello\n")
    (top / "etc" / "deep" / "er" / "big").write_bytes(os.urandom(300_000))
    (top / "empty").write_bytes(b"")
    (top / "link").symlink_to("/etc/motd")
    (top / "hard").hardlink_to(top / "etc" / "motd")
    (top / LONG / LONG).mkdir(parents=True)
    (top / LONG / LONG / "file").write_bytes(b"far")
    (top / ("l" * 120)).symlink_to("t" * 150)
    os.mkfifo(top / "fifo")
    (top / os.fsdecode(b"na\xffme")).write_bytes(b"odd")
    (top / os.fsdecode(b"\xff" * 200)).write_bytes(b"odd and long")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
    return top


@pytest.fixture
def guest(tmp_path: Path, tree: Path) -> Iterator[GuestAgent]:
    bed = serving(tmp_path / "agent.sock", {"base": tree}, {"all": tree})
    with bed as running, GuestAgent(running.address) as handle:
        yield handle


def below(tree: Path) -> dict[bytes, os.stat_result]:
    """Return the status of everything below a directory, as os.walk finds it."""
    found = {}
    for directory, directories, files in os.walk(os.fsencode(tree)):
        for name in directories + files:
            path = os.path.join(directory, name)
            found[os.path.relpath(path, os.fsencode(tree))] = os.lstat(path)
    return found


def test_checksums_are_those_of_hashlib(guest: GuestAgent, tree: Path) -> None:
    for algorithm in ("sha256", "sha512", "sha1"):
        entries = guest.fs_checksums(layer_id="base", algorithm=algorithm)
        expected = {
            path: hashlib.new(algorithm, (tree / os.fsdecode(path)).read_bytes()).hexdigest()
            if stat.S_ISREG(status.st_mode)
            else None
            for path, status in below(tree).items()
        }
        assert {path: entry.digest for path, entry in entries.items()} == expected
    kinds = {path: entry.kind for path, entry in entries.items()}
    assert (kinds[b"fifo"], kinds[b"socket"], kinds[b"etc"]) == ("p", "s", "d")
    assert entries[b"link"].target == "/etc/motd"
    assert entries[b"etc/deep/er/big"].size_bytes == 300_000


def test_checksums_of_a_part(guest: GuestAgent) -> None:
    assert set(guest.fs_checksums("/etc/deep", layer_id="base")) == {b"er", b"er/big"}
    with call_error("invalid"):
        guest.fs_checksums("/etc/motd", layer_id="base")


def test_checksum_of_a_file(guest: GuestAgent, tree: Path) -> None:
    reply = guest.fs_checksum("/etc/deep/er/big", overlay_id="all")
    content = (tree / "etc/deep/er/big").read_bytes()
    assert (reply.digest, reply.size_bytes) == (hashlib.sha256(content).hexdigest(), 300_000)


def test_find_finds_what_walk_finds(guest: GuestAgent, tree: Path) -> None:
    found = {entry.path: entry.kind for entry in guest.fs_find(layer_id="base")}
    assert set(found) == set(below(tree))
    assert (found[b"link"], found[b"etc"], found[b"fifo"], found[b"empty"]) == ("l", "d", "p", "f")


def test_find_with_conditions(guest: GuestAgent) -> None:
    def paths(**conditions: object) -> set[bytes]:
        return {
            entry.path
            for entry in guest.fs_find(layer_id="base", **conditions)  # type: ignore[arg-type]
        }

    assert paths(name="mo*d") == {b"etc/motd"}
    assert paths(name=b"na\xff*") == {b"na\xffme"}
    assert paths(kind="p") == {b"fifo"}
    assert paths(path="/etc", max_depth=1) == {b"motd", b"deep"}
    assert paths(path="/etc", max_depth=2) == {b"motd", b"deep", b"deep/er"}


@given(
    st.text(alphabet="ab*?", max_size=8).map(str.encode),
    st.text(alphabet="ab", max_size=8).map(str.encode),
)
def test_patterns_match_as_a_naive_matcher_says(pattern: bytes, name: bytes) -> None:
    def naive(pattern: bytes, name: bytes) -> bool:
        if not pattern:
            return not name
        if pattern[:1] == b"*":
            return any(naive(pattern[1:], name[i:]) for i in range(len(name) + 1))
        first = pattern[:1] in (b"?", name[:1])
        return bool(name) and first and naive(pattern[1:], name[1:])

    assert matches(pattern, name) == naive(pattern, name)


def test_a_directory_with_its_status(guest: GuestAgent, tree: Path) -> None:
    entries = {entry.name: entry for entry in guest.fs_readdir("/", layer_id="base")}
    assert set(entries) == set(os.listdir(os.fsencode(tree)))
    assert set(guest.fs_ls("/", layer_id="base")) == set(entries)
    for name, entry in entries.items():
        status = os.lstat(os.path.join(os.fsencode(tree), name))
        assert (entry.size_bytes, entry.inode, entry.mtime_ns, entry.mode, entry.links) == (
            status.st_size,
            status.st_ino,
            status.st_mtime_ns,
            stat.S_IMODE(status.st_mode),
            status.st_nlink,
        )
    assert entries[b"link"].target == b"/etc/motd"


def test_du_counts_a_file_of_two_links_once(guest: GuestAgent, tree: Path) -> None:
    reply = guest.fs_du("/", layer_id="base")
    statuses = below(tree)
    files = {s.st_ino: s.st_size for s in statuses.values() if stat.S_ISREG(s.st_mode)}
    blocks = {s.st_ino: s.st_blocks for s in [*statuses.values(), tree.stat()]}
    assert reply.size_bytes == sum(files.values())
    assert reply.allocated_bytes == 512 * sum(blocks.values())
    assert reply.links == 2
    assert reply.is_exact
    assert guest.fs_du("/etc/motd", layer_id="base").size_bytes == 6


def test_a_tree_that_is_too_deep_is_refused(guest: GuestAgent, tree: Path) -> None:
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(MAX_DEPTH + 20):
        os.mkdir("d", dir_fd=fd)
        below_fd = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below_fd
    os.close(fd)
    for walk in (guest.fs_du, guest.fs_checksums):
        with call_error("resource") as refused:
            walk("/", layer_id="base")
        assert refused.value.hint
    walked = guest.fs_find("/" + "d/" * 21, layer_id="base")
    assert sum(1 for _ in walked) == MAX_DEPTH - 1


# --- archives


def archive_of(guest: GuestAgent, path: str = "/", *, xattrs: bool = True) -> bytes:
    file = io.BytesIO()
    reply = guest.fs_tar_out(path, file, layer_id="base", xattrs=xattrs)
    assert len(file.getvalue()) == reply.size_bytes
    return file.getvalue()


def test_an_archive_holds_what_the_tree_holds(guest: GuestAgent, tree: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive_of(guest))) as archive:
        members = {
            os.fsencode(member.name).removeprefix(b"./"): member for member in archive.getmembers()
        }
        expected = below(tree)
        del expected[b"socket"]  # tar has no type for it
        assert set(members) == {*expected, b"."}
        for path, status in expected.items():
            member = members[path]
            assert (member.mode, member.uid, member.gid) == (
                stat.S_IMODE(status.st_mode),
                status.st_uid,
                status.st_gid,
            )
            assert abs(member.mtime - status.st_mtime_ns / 1e9) < 1e-6
            if member.isreg():
                content = archive.extractfile(member)
                assert content is not None
                assert content.read() == (tree / os.fsdecode(path)).read_bytes()
        assert members[b"link"].linkname == "/etc/motd"
        assert members[b"l" * 120].linkname == "t" * 150
        hard = [member for member in members.values() if member.islnk()]
        assert [{m.name, m.linkname} for m in hard] == [{"./hard", "./etc/motd"}]


def test_gnu_tar_unpacks_it(guest: GuestAgent, tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    done = subprocess.run(
        ["tar", "-xf", "-", "-C", str(copy)], input=archive_of(guest), capture_output=True
    )
    # GNU tar does not know the charset of the one name that does not fit, and says so
    complaints = [line for line in done.stderr.splitlines() if b"hdrcharset" not in line]
    assert (done.returncode, complaints) == (0, [])
    there, here = below(copy), below(tree)
    del here[b"socket"]
    assert set(there) == set(here)
    for path, status in here.items():
        if not stat.S_ISLNK(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            assert there[path].st_mtime_ns == status.st_mtime_ns
        assert there[path].st_mode == status.st_mode


def test_an_archive_keeps_extended_attributes(guest: GuestAgent, tree: Path) -> None:
    try:
        os.setxattr(tree / "empty", "user.key", b"va=l\nue\0\xff")
    except OSError:
        pytest.skip("this file system has no extended attributes")
    blob = archive_of(guest)
    assert b"SCHILY.xattr.user.key=va=l\nue\0\xff\n" in blob
    assert b"SCHILY" not in archive_of(guest, xattrs=False)


def test_a_download_lands_whole_or_not_at_all(
    guest: GuestAgent, tree: Path, tmp_path: Path
) -> None:
    target = tmp_path / "landed"
    guest.fs_download("/etc/deep/er/big", target, layer_id="base")
    assert target.read_bytes() == (tree / "etc/deep/er/big").read_bytes()
    target.write_bytes(b"before")
    with pytest.raises(CallError):
        guest.fs_download("/etc", target, layer_id="base")
    assert target.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


NAMES = st.binary(min_size=1, max_size=150).filter(lambda b: not set(b) & {0, ord("/")})


@given(
    path=st.lists(NAMES, min_size=1, max_size=4).map(b"/".join),
    link=st.binary(max_size=300).filter(lambda b: 0 not in b),
    uid=st.integers(0, 2**32 - 1),
    gid=st.integers(0, 2**32 - 1),
    mtime_ns=st.integers(-(10**18), 10**19),
    mode=st.integers(0, 0o7777),
    size_bytes=st.integers(0, 2**43),
    is_link=st.booleans(),
)
def test_any_header_is_what_tarfile_reads(
    path: bytes,
    link: bytes,
    uid: int,
    gid: int,
    mtime_ns: int,
    mode: int,
    size_bytes: int,
    is_link: bool,
) -> None:
    member = pax.Member(
        path=path,
        type="2" if is_link else "0",
        mode=mode,
        uid=uid,
        gid=gid,
        size_bytes=0 if is_link else size_bytes,
        mtime_ns=mtime_ns,
        link=link if is_link else b"",
    )
    blob = pax.header(member)
    assert len(blob) % pax.BLOCK_BYTES == 0
    with tarfile.open(fileobj=io.BytesIO(blob + bytes(1024)), errors="surrogateescape") as archive:
        found = archive.next()
    assert found is not None
    # tarfile cuts slashes at the end, as of a directory
    assert os.fsencode(found.name) == path.rstrip(b"/")
    assert (found.mode, found.uid, found.gid) == (mode, uid, gid)
    assert found.size == member.size_bytes
    assert abs(found.mtime - mtime_ns / 1e9) < 1e-5
    if is_link:
        assert os.fsencode(found.linkname) == link


def test_a_record_counts_its_own_length() -> None:
    """Around each power of ten the digits of the length count for one more."""
    for size_bytes in range(1, 1200):
        value = b"x" * size_bytes
        member = pax.Member(
            path=b"p", type="0", mode=0, uid=0, gid=0, size_bytes=0, mtime_ns=0,
            records=((b"comment", value),),
        )  # fmt: skip
        blob = pax.header(member)
        record = blob[512:].split(b"\n", 1)[0] + b"\n"
        assert record.endswith(b" comment=" + value + b"\n")
        assert int(record.split(b" ", 1)[0]) == len(record)


@given(st.integers(0, 10**7))
def test_an_archive_ends_on_a_whole_record(blocks: int) -> None:
    end = pax.end_of_archive(512 * blocks)
    assert len(end) >= 1024
    assert (512 * blocks + len(end)) % 10240 == 0
