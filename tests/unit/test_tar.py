"""Tars: read right, whoever wrote them, and refused when damaged; never a shorter listing."""

import io
import os
import random
import stat
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootfs.image.tar import TarEntry, TarReader
from rootfs.image.tartree import TarTree, Whiteouts
from rootfs.image.tarwriter import write_tar
from tests.beds.calls import call_error
from tests.beds.imagebed import EPOCH, Member, directory, hard_link, make_tar, symlink
from tests.beds.treebed import node_facts
from vsock.errors import CallError


def entries(data: bytes, **options: bool) -> list[TarEntry]:
    with memory(data) as fd:
        return list(TarReader(fd, size_bytes=len(data), **options))


def memory(data: bytes) -> "MemoryFile":
    return MemoryFile(data)


class MemoryFile:
    def __init__(self, data: bytes) -> None:
        self.fd = os.memfd_create("tar")
        os.write(self.fd, data)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def tree(data: bytes, whiteouts: Whiteouts = Whiteouts.KEEP) -> dict[str, object]:
    """Return path -> (mode, uid, gid, mtime, rdev, content or target, attributes)."""
    with memory(data) as fd:
        made = TarTree(whiteouts)
        made.add_layer(TarReader(fd, size_bytes=len(data)), fd)
        return node_facts(made.root)


EVERYTHING = [
    directory("d", uid=1, gid=2, mode=0o1777),
    Member("d/file", b"x" * 1000, mtime=1.5, uid=3_000_000, gid=4_000_000_000),
    Member("d/empty"),
    Member("n" * 150 + "/" + "m" * 200, b"long"),
    Member("\udcff\udcfe latin", b"bytes"),
    Member("old", b"before 1970", mtime=-7),
    symlink("link", "t" * 200),
    hard_link("hard", "d/file"),
    Member("null", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
    Member("disk", kind=tarfile.BLKTYPE, device=(259, 70000)),
    Member("pipe", kind=tarfile.FIFOTYPE),
    Member("capable", b"#!", mode=0o4755, xattrs={"security.capability": b"\x01\x00\xff="}),
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_kind_is_read_as_it_was_written(format: int) -> None:
    members = entries(make_tar(EVERYTHING, format))
    read = {os.fsdecode(each.name).rstrip("/"): each for each in members}
    for member in EVERYTHING:
        entry = read[member.name]
        assert entry.permissions == member.mode
        assert (entry.uid, entry.gid) == (member.uid, member.gid)
        expected = member.mtime if format == tarfile.PAX_FORMAT else int(member.mtime)
        assert entry.mtime_ns == int(expected * 10**9)
        assert os.fsdecode(entry.target) == member.target
        assert entry.size_bytes == len(member.data)
    assert read["null"].rdev == os.makedev(1, 3)
    assert read["disk"].rdev == os.makedev(259, 70000)
    assert stat.S_ISFIFO(read["pipe"].file_type)
    if format == tarfile.PAX_FORMAT:
        assert read["capable"].xattrs == {b"security.capability": b"\x01\x00\xff="}


def test_the_fraction_of_a_time_is_exact_and_rounded_down() -> None:
    from rootfs.image.pax import PaxRecords

    def time_of(text: bytes) -> int:
        record = b" mtime=" + text + b"\n"
        length = len(record) + 2
        return PaxRecords.parse(b"%d" % length + record, 0).time_ns(0)

    assert time_of(b"1.000000001") == 1_000_000_001
    assert time_of(b"1.0000000019") == 1_000_000_001
    assert time_of(b"-1.5") == -1_500_000_000
    assert time_of(b"-1.0000000001") == -1_000_000_001
    assert time_of(b"123456789.12") == 123_456_789_120_000_000
    for bad in (b"1,5xxx", b"1e9xxx", b"1.-5xx", b"--1xxx"):
        with pytest.raises(CallError, match="mtime"):
            time_of(bad)


@pytest.mark.parametrize("flags", [["--format=gnu"], ["--format=pax", "--sparse-version=0.0"],
                                   ["--format=pax", "--sparse-version=0.1"],
                                   ["--format=pax", "--sparse-version=1.0"]])  # fmt: skip
def test_sparse_files_of_gnu_tar_keep_their_holes(tmp_path: Path, flags: list[str]) -> None:
    size = 4 << 20
    with (tmp_path / "sparse").open("wb") as file:
        for at in range(0, size, 1 << 16):  # more than the header of an S member holds
            file.seek(at)
            file.write(bytes([at >> 16 | 1]) * 4096)
        file.truncate(size)
    done = subprocess.run(
        ["tar", "--sparse", *flags, "-cf", "-", "-C", tmp_path, "sparse"], stdout=-1, check=True
    )
    (entry,) = entries(done.stdout)
    assert entry.name == b"sparse"
    assert entry.size_bytes == size
    assert len(done.stdout) < 1 << 20
    expected = (tmp_path / "sparse").read_bytes()
    for offset, length, source in entry.extents:
        assert done.stdout[source : source + length] == expected[offset : offset + length]
    assert sum(length for _, length, _ in entry.extents) == 64 * 4096


def test_gnu_tar_agrees_on_what_we_write(tmp_path: Path) -> None:
    data = make_tar(EVERYTHING)
    with memory(data) as fd:
        made = TarTree(Whiteouts.KEEP)
        made.add_layer(TarReader(fd, size_bytes=len(data)), fd)
        ours = b"".join(write_tar(made.root))
    assert tree(ours) == tree(data)
    listed = subprocess.run(
        ["tar", "-tvf", "-", "--quoting-style=escape", "--full-time", "--numeric-owner"],
        input=ours,
        stdout=-1,
        check=True,
        env={"TZ": "UTC", "LC_ALL": "C", "PATH": os.environ["PATH"]},
    ).stdout.decode()
    listed = " ".join(listed.split())
    assert "crw-rw-rw- 0/0 1,3 2020-09-13 12:26:40 null" in listed
    assert "3000000/4000000000 1000 1970-01-01 00:00:01.5 hard" in listed
    with tarfile.open(fileobj=io.BytesIO(ours)) as archive:
        assert archive.getmember("hard").islnk() or archive.getmember("d/file").islnk()
        assert archive.getmember("capable").pax_headers["SCHILY.xattr.security.capability"]


@given(
    names=st.lists(
        st.text(
            st.characters(exclude_characters="/\0", exclude_categories=("Cs",)),
            min_size=1, max_size=120,
        ).filter(lambda name: name not in (".", "..") and len(name.encode()) < 256),
        unique=True, max_size=8,
    ),
    data=st.binary(max_size=2000),
    mtime=st.integers(-(2**40), 2**40),
    uid=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=60)
def test_tar_written_by_the_standard_library_is_read_back(
    names: list[str], data: bytes, mtime: int, uid: int
) -> None:
    members = [Member(name, data, mtime=mtime, uid=uid) for name in names]
    read = tree(make_tar(members))
    assert {name: value for name, value in read.items() if name} == {
        name: ("0o100644", uid, 0, mtime * 10**9, 0, data, {}) for name in names
    }


@given(st.binary(max_size=3000))
@settings(max_examples=150)
def test_random_bytes_are_refused_by_a_call_error(data: bytes) -> None:
    with pytest.raises(CallError):
        entries(data)


def test_every_cut_is_noticed() -> None:
    data = make_tar(EVERYTHING)
    end = len(data.rstrip(b"\0"))
    whole = end + -end % 512  # then the end marker
    for size in [*range(0, whole, 512), *range(100, whole, 997)]:
        with call_error("integrity"):
            entries(data[:size])


def test_every_flipped_header_byte_is_noticed_or_harmless() -> None:
    data = make_tar([Member("name", b"data")], tarfile.GNU_FORMAT)
    for at in range(512):
        damaged = bytearray(data)
        damaged[at] ^= 0x11
        if at == 155:  # behind the NUL that ends the checksum, nothing is read
            assert [each.name for each in entries(bytes(damaged))] == [b"name"]
        else:
            with call_error("integrity"):
                entries(bytes(damaged))


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_a_size_where_there_is_no_data_means_nothing(kind: bytes) -> None:
    first = _header(kind=kind, size=b"1000", target=b"target")
    described = _pax(b"13 size=2000\n") + first
    for data in (first, described):
        listed = entries(data + _header(name=b"after", size=b"1") + b"x".ljust(512, b"\0") + END)
        assert [(each.name, each.size_bytes) for each in listed] == [(b"x", 0), (b"after", 1)]


def test_data_after_the_end_marker_is_refused() -> None:
    first, second = make_tar([Member("a")]), make_tar([Member("b")])
    with pytest.raises(CallError, match="goes on after its end"):
        entries(first + second)
    assert [each.name for each in entries(first + second, needs_end=False)] == [b"a"]


def test_a_tar_that_ends_with_its_data_is_whole_only_where_a_digest_says_so() -> None:
    data = make_tar([Member("a", b"x" * 700)])[: 512 + 700]
    with pytest.raises(CallError, match="ends before the padding"):
        entries(data)
    (only,) = entries(data, needs_end=False)
    assert only.extents == ((0, 700, 512),)
    with pytest.raises(CallError, match="ends before the 700 bytes"):
        entries(data[:-1], needs_end=False)


def _header(**fields: bytes) -> bytes:
    places = {"name": 0, "mode": 100, "uid": 108, "size": 124, "mtime": 136, "kind": 156,
              "target": 157, "magic": 257}  # fmt: skip
    block = bytearray(512)
    values = {"name": b"x", "mode": b"0000644", "size": b"0", "kind": b"0", "magic": b"ustar\x0000"}
    for key, value in {**values, **fields}.items():
        block[places[key] : places[key] + len(value)] = value
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _pax(records: bytes) -> bytes:
    return _header(kind=b"x", size=b"%o" % len(records)) + records.ljust(512, b"\0")


END = bytes(1024)


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (_header(size=b"99999999999") + END, "integrity", "size"),
        (_header(size=b"7777") + END, "integrity", "ends before"),
        (_header(size=b"\xff" * 12) + END, "integrity", "-1 bytes"),
        (_header(mode=b"rw-r--r"), "integrity", "mode"),
        (_header(kind=b"M") + END, "unsupported", "type b'M'"),
        (_header(kind=b"5", size=b"1000") + bytes(512) + _header() + END, "integrity", "goes on"),
        (_header(kind=b"5", size=b"1000") + b"data".ljust(512) + END, "integrity", "checksum"),
        (_pax(b"30 path=a\n") + END, "integrity", "PAX"),
        (_pax(b"5 a=\n") + END, "integrity", "after"),
        (_pax(b"0 a=b\n") + END, "integrity", "PAX"),
        (_pax(b"99999999999999999999999 a=b\n") + END, "integrity", "length"),
        (_header(kind=b"x", size=b"77777777") + END, "resource", "extended header"),
        (_header(kind=b"L", size=b"10") + b"name".ljust(512, b"\0"), "integrity", "end marker"),
    ],
)  # fmt: skip
def test_damage_is_named(data: bytes, code: str, message: str) -> None:
    with call_error(code, match=message):
        entries(data)


@pytest.mark.parametrize(
    ("sparse_map", "message"),
    [
        ("0,5,3,5", "sparse map"),
        ("0,5", "does not fit"),
        ("0,20", "sparse map"),
        ("5", "GNU.sparse.map"),
        ("0,-1", "map"),
    ],
)
def test_a_sparse_map_that_makes_no_sense_is_refused(sparse_map: str, message: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("x")
        info.size = 10
        info.pax_headers = {"GNU.sparse.map": sparse_map, "GNU.sparse.size": "10"}
        archive.addfile(info, io.BytesIO(bytes(10)))
    with pytest.raises(CallError, match=message):
        entries(buffer.getvalue())


def test_an_acl_as_text_is_refused_not_dropped() -> None:
    member = Member("x")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(member.name)
        info.pax_headers = {"SCHILY.acl.access": "user::rw-"}
        archive.addfile(info)
    with pytest.raises(CallError, match="ACL") as caught:
        entries(buffer.getvalue())
    assert caught.value.hint is not None


# --- names and links


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/..", "..", "./../x", "/../x"])
def test_a_name_that_goes_up_is_refused(name: str) -> None:
    with call_error("invalid", match="'\\.\\.'"):
        tree(make_tar([Member(name)]))


def test_absolute_names_are_taken_from_the_root_of_the_image() -> None:
    read = tree(make_tar([Member("/etc//./passwd", b"root"), hard_link("y", "/etc/passwd")]))
    assert list(read) == ["", "etc", "y", "etc/passwd"]


@pytest.mark.parametrize("target", ["../../etc/shadow", "/etc/shadow", "missing", "d"])
def test_a_hard_link_out_of_the_archive_is_refused(target: str) -> None:
    with call_error("invalid"):
        tree(make_tar([directory("d"), hard_link("x", target)]))


def test_nothing_goes_through_a_symlink() -> None:
    with pytest.raises(CallError, match="no directory"):
        tree(make_tar([symlink("up", "/etc"), Member("up/passwd", b"evil")]))


def test_the_last_of_one_name_counts_and_directories_keep_what_they_hold() -> None:
    members = [
        Member("f", b"first"),
        hard_link("kept", "f"),
        Member("f", b"second", mode=0o600),
        directory("d", mode=0o700),
        Member("d/x", b"x"),
        directory("d", mode=0o711, uid=5),
        directory("gone"),
        Member("gone/y"),
        Member("gone", b"now a file"),
    ]
    read = tree(make_tar(members))
    assert read["f"] == ("0o100600", 0, 0, EPOCH * 10**9, 0, b"second", {})
    assert read["kept"] == ("0o100644", 0, 0, EPOCH * 10**9, 0, b"first", {})
    assert read["d"][:2] == ("0o40711", 5)  # type: ignore[index]
    assert "d/x" in read
    assert read["gone"][5] == b"now a file"  # type: ignore[index]
    assert "gone/y" not in read


def test_a_hard_link_onto_itself_changes_nothing() -> None:
    assert tree(make_tar([Member("f", b"x"), hard_link("f", "f")]))["f"][5] == b"x"  # type: ignore[index]


# --- whiteouts


def test_whiteouts_become_overlay_form() -> None:
    members = [
        directory("etc"),
        Member("etc/.wh.passwd"),
        Member("etc/.wh..wh..opq"),
        Member("usr/.wh.passwd"),
        Member(".wh.both"),
        directory("both"),
        Member("both/new"),
        Member(".wh.file"),
        Member("file", b"stays"),
        directory(".wh..wh.plnk"),
    ]
    read = tree(make_tar(members), Whiteouts.OVERLAY)
    assert read["usr/passwd"][0] == "0o20000"  # type: ignore[index]
    assert read["usr/passwd"][4] == 0  # type: ignore[index]
    assert "etc/passwd" not in read  # overlayfs would list it: it merges nothing here
    assert read["etc"][6] == {b"trusted.overlay.opaque": b"y"}  # type: ignore[index]
    # hidden and made anew in one layer: the new one must not merge with the old
    assert read["both"][6] == {b"trusted.overlay.opaque": b"y"}  # type: ignore[index]
    assert read["file"][5] == b"stays"  # type: ignore[index]
    assert not any(".wh." in name for name in read)
    user = tree(make_tar(members), Whiteouts.OVERLAY_USER)
    assert user["etc"][6] == {b"user.overlay.opaque": b"y"}  # type: ignore[index]
    assert "etc/.wh.passwd" in tree(make_tar(members), Whiteouts.KEEP)


@pytest.mark.parametrize("again", [[], [Member("d", b"a file, for a moment"), directory("d")]])
def test_a_directory_that_comes_after_its_marker_is_opaque(again: list[Member]) -> None:
    members = [Member("d/.wh..wh..opq"), Member("d/.wh.x"), *again, directory("d", mode=0o700)]
    read = tree(make_tar(members), Whiteouts.OVERLAY)
    assert (read["d"][0], read["d"][6]) == ("0o40700", {b"trusted.overlay.opaque": b"y"})  # type: ignore[index]
    assert "d/x" not in read


@pytest.mark.parametrize("marker", ["link/.wh.x", "link/below/.wh..wh..opq"])
def test_a_marker_below_what_is_no_directory_hides_nothing(marker: str) -> None:
    members = [symlink("link", "/elsewhere"), Member("elsewhere/x", b"stays")]
    for each in ([*members, Member(marker)], [Member(marker), *members]):
        read = tree(make_tar(each), Whiteouts.OVERLAY)
        assert sorted(read) == ["", "elsewhere", "elsewhere/x", "link"]
        assert read["elsewhere/x"][5] == b"stays"  # type: ignore[index]


@pytest.mark.parametrize("name", [".wh.", ".wh..", "a/.wh..."])
def test_a_whiteout_of_no_name_is_refused(name: str) -> None:
    with pytest.raises(CallError, match="whiteout"):
        tree(make_tar([Member(name)]), Whiteouts.OVERLAY)


def test_names_of_attributes_that_gnu_tar_encodes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    names = ("user.a=b", "user.c%d", "user.e%3Df", "user.%25")
    for name in names:
        os.setxattr(tmp_path / "x", name, b"v")
    command = ["tar", "--xattrs", "--format=posix", "-cf", "-", "-C", tmp_path, "x"]
    data = subprocess.run(command, stdout=-1, check=True).stdout
    assert b"user.a%3Db" in data
    (entry,) = entries(data)
    assert entry.xattrs == {os.fsencode(name): b"v" for name in names}


def test_the_files_of_aufs_are_targets_only() -> None:
    members = [
        directory(".wh..wh.plnk", mode=0o700),
        Member(".wh..wh.plnk/100.1", b"data"),
        Member(".wh..wh.aufs"),
        hard_link("bin/x", ".wh..wh.plnk/100.1"),
        hard_link("bin/y", ".wh..wh.plnk/100.1"),
        directory("d/.wh..wh.orph"),
        Member("d/.wh..wh.orph/deep/file"),
    ]
    for whiteouts in (Whiteouts.OVERLAY, Whiteouts.OVERLAY_USER, Whiteouts.APPLY):
        found = tree(make_tar(members), whiteouts)
        assert list(found) == ["", "bin", "d", "bin/x", "bin/y"]
        assert found["bin/x"][5] == b"data"  # type: ignore[index]
    assert ".wh..wh.plnk/100.1" in tree(make_tar(members), Whiteouts.KEEP)


@pytest.mark.parametrize("name", ["trusted.overlay.redirect", "user.overlay.metacopy"])
def test_a_layer_cannot_bring_attributes_of_overlayfs(name: str) -> None:
    with pytest.raises(CallError, match="overlayfs"):
        tree(make_tar([Member("x", xattrs={name: b"/etc"})]), Whiteouts.OVERLAY)
    again = [directory("d"), directory("d", xattrs={name: b"/etc"})]
    with pytest.raises(CallError, match="overlayfs"):
        tree(make_tar(again), Whiteouts.OVERLAY)


def test_shuffled_members_after_their_directories_give_the_same_tree() -> None:
    files = [Member(f"d/{number}", bytes([number])) for number in range(20)]
    shuffled = files[:]
    random.Random(1).shuffle(shuffled)
    first, second = (tree(make_tar([directory("d"), *some])) for some in (files, shuffled))
    assert first == second


def test_the_pieces_of_all_sparse_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(3):
            info = tarfile.TarInfo(str(number))
            info.size = 4
            sparse_map = "0,1,10,1,20,1,30,1"
            info.pax_headers = {"GNU.sparse.map": sparse_map, "GNU.sparse.size": "40"}
            archive.addfile(info, io.BytesIO(b"data"))
    monkeypatch.setattr("rootfs.image.tar._MAX_SPARSE_EXTENTS", 11)
    with call_error("resource", match="sparse members of more pieces"):
        entries(buffer.getvalue())
    monkeypatch.setattr("rootfs.image.tar._MAX_SPARSE_EXTENTS", 12)
    assert len(entries(buffer.getvalue())) == 3


def test_listing_with_too_many_members_or_header_bytes_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_tar([Member("n" * 200 + str(number)) for number in range(11)])
    monkeypatch.setattr("rootfs.image.tar._MAX_ALL_HEADER_BYTES", 11 * 200)
    with call_error("resource", match="headers of more bytes"):
        entries(data)
    monkeypatch.undo()
    monkeypatch.setattr("rootfs.image.tar._MAX_MEMBERS", 10)
    with pytest.raises(CallError, match="more members"):
        entries(data)


def test_global_records_hold_for_all_that_follows_and_are_bounded() -> None:
    def header(records: bytes) -> bytes:
        block = _header(kind=b"g", size=b"%o" % len(records))
        return block + records + bytes(-len(records) % 512)

    data = header(b"12 uid=4321\n") + _header(name=b"a") + _header(name=b"b") + END
    assert [each.uid for each in entries(data)] == [4321, 4321]
    data = header(b"12 uid=4321\n") + header(b"7 uid=\n") + _header(name=b"a") + END
    assert [each.uid for each in entries(data)] == [0]
    many = b"".join(b"9 %03x=ab\n" % number for number in range(257))
    with pytest.raises(CallError, match="global records"):
        entries(header(many) + END)


def test_the_count_of_nodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rootfs.image.tartree._MAX_NODES", 10)
    with call_error("resource", match="over 10 members"):
        tree(make_tar([Member(f"{number}") for number in range(11)]))


def test_the_root_of_a_tar_by_itself_cannot_hide_what_is_below() -> None:
    """overlayfs takes no root as opaque; which names to hide is known in an image of layers."""
    with pytest.raises(CallError, match="all of the root"):
        tree(make_tar([Member(".wh..wh..opq")]), Whiteouts.OVERLAY)
    assert ".wh..wh..opq" in tree(make_tar([Member(".wh..wh..opq")]), Whiteouts.KEEP)


@pytest.mark.parametrize("name", [".wh.", ".wh..", "a/.wh..."])
def test_a_whiteout_of_no_name_is_refused_in_an_image_of_all_layers_too(name: str) -> None:
    with pytest.raises(CallError, match="whiteout"):
        tree(make_tar([directory("a"), Member(name)]), Whiteouts.APPLY)


def _base256(value: int, size: int) -> bytes:
    return (value % (1 << 8 * size) | 1 << (8 * size - 1)).to_bytes(size, "big")


def _with(block: bytes, at: int, value: bytes) -> bytes:
    """Return a header with a field changed, and its checksum with it."""
    changed = bytearray(block)
    changed[at : at + len(value)] = value
    changed[148:156] = b"        "
    changed[148:156] = b"%06o\0 " % sum(changed)
    return bytes(changed)


@pytest.mark.parametrize("size", [-5, 1 << 63, 1 << 80])
def test_a_sparse_size_that_no_file_has_is_refused(size: int) -> None:
    with pytest.raises(CallError, match=f"sparse member of {size} bytes"):
        entries(_with(_header(kind=b"S"), 483, _base256(size, 12)) + END)
    if 0 < size < 10**20:
        record = b"39 GNU.sparse.size=%d\n" % size
        with pytest.raises(CallError, match=f"sparse member of {size} bytes"):
            entries(_pax(record) + _header() + END)


@pytest.mark.parametrize("number", [1 << 31, (1 << 32) - 1, -1])
def test_a_device_number_that_no_device_has_is_refused(number: int) -> None:
    with call_error("integrity", match="has a device"):
        entries(_with(_header(kind=b"3"), 329, _base256(number, 8)) + END)


def test_a_long_name_ends_at_its_nul() -> None:
    def long(kind: bytes, text: bytes) -> bytes:
        return _header(kind=kind, size=b"%o" % len(text)) + text.ljust(512, b"\0")

    data = long(b"L", b"name\0more") + long(b"K", b"target\0more") + _header(kind=b"2") + END
    (entry,) = entries(data)
    assert (entry.name, entry.target) == (b"name", b"target")


def test_a_sparse_map_without_lines_is_refused_before_it_is_read_whole() -> None:
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n25 GNU.sparse.realsize=1\n"
    data = b"1" * (64 << 20)
    start = time.process_time()
    with pytest.raises(CallError, match="no list of numbers"):
        entries(_pax(records) + _header(size=b"%o" % len(data)) + data + END)
    assert time.process_time() - start < 5  # by the square of its size, it would be an hour
