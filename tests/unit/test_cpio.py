import io
import os
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootfs.bootimage.cpio import (
    CpioEntry,
    device,
    directory,
    regular,
    symlink,
    with_parents,
    write_cpio,
)


def archive(*entries: CpioEntry) -> bytes:
    file = io.BytesIO()
    assert write_cpio(file, entries) == len(file.getvalue())
    return file.getvalue()


def cpio(data: bytes, *options: str, cwd: Path | None = None) -> str:
    result = subprocess.run(
        ["cpio", "--quiet", *options], input=data, cwd=cwd, capture_output=True, check=True
    )
    assert result.stderr == b""
    return result.stdout.decode()


def test_archive_is_unpacked_by_cpio(tmp_path: Path) -> None:
    data = archive(
        regular("init", b"#!/bin/x\n", 0o755),
        regular("a/b/c", b"12345"),
        symlink("bin", "usr/bin"),
        directory("empty", 0o700),
    )
    cpio(data, "-i", "-d", "-m", cwd=tmp_path)
    assert (tmp_path / "init").read_bytes() == b"#!/bin/x\n"
    assert stat.S_IMODE((tmp_path / "init").stat().st_mode) == 0o755
    assert (tmp_path / "a/b/c").read_bytes() == b"12345"
    assert os.readlink(tmp_path / "bin") == "usr/bin"
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    assert (tmp_path / "init").stat().st_mtime == 0


def test_cpio_lists_devices_owners_and_parents_first() -> None:
    data = archive(device("dev/console", stat.S_IFCHR, 5, 1), regular("a/b", b""))
    lines = cpio(data, "-t", "-v", "--numeric-uid-gid").splitlines()
    assert [line.split()[-1] for line in lines] == ["a", "a/b", "dev", "dev/console"]
    assert lines[3].startswith("crw-------")
    assert "5,   1" in lines[3]
    assert all(line.split()[2:4] == ["0", "0"] for line in lines)


def test_order_of_entries_does_not_matter() -> None:
    entries = [regular("b", b"2"), directory("a"), regular("a/x", b"1"), regular("a-b", b"3")]
    assert archive(*entries) == archive(*reversed(entries))


def test_children_follow_their_directory_at_once() -> None:
    ordered = with_parents([regular("a-b", b""), regular("a/x", b"")])
    assert [entry.path for entry in ordered] == ["a", "a/x", "a-b"]


def test_content_from_a_file_equals_content_in_memory(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)  # more than one piece, and not a multiple of 4
    (tmp_path / "file").write_bytes(content)
    assert archive(regular("f", tmp_path / "file")) == archive(regular("f", content))


def test_two_archives_can_follow_each_other(tmp_path: Path) -> None:
    assert len(archive(regular("f", b"x"))) % 4 == 0


@given(
    st.dictionaries(
        st.lists(st.text("ab.-", min_size=1, max_size=3), min_size=1, max_size=3)
        .map("/".join)
        .filter(lambda path: not {".", ".."} & set(path.split("/"))),
        st.binary(max_size=9),
        max_size=6,
    )
)
def test_any_files_come_back(tree: dict[str, bytes]) -> None:
    files = {p: c for p, c in tree.items() if not any(o.startswith(p + "/") for o in tree)}
    data = archive(*(regular(path, content) for path, content in files.items()))
    assert {p: c for p, c in members(data).items() if c is not None} == files


def members(data: bytes) -> dict[str, bytes | None]:
    """A reader as simple as the kernel's: path -> content, None for directories."""
    found: dict[str, bytes | None] = {}
    offset = 0
    while True:
        fields = [int(data[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[offset + 110 : offset + 110 + name_size - 1].decode()
        start = offset + (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            return found
        found[name] = data[start : start + size] if stat.S_ISREG(mode) else None
        offset = start + (size + 3) // 4 * 4


@pytest.mark.parametrize("path", ["/abs", "a//b", "a/../b", "./a", "", "a/", "x\0y", "n" * 4096])
def test_paths_that_are_not_plain_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"plain path|NUL"):
        regular(path, b"")


def test_an_entry_that_would_end_the_archive_is_refused() -> None:
    with pytest.raises(ValueError, match="end the archive"):
        regular("TRAILER!!!", b"")


def test_contradictions_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        archive(regular("a", b""), regular("a", b""))
    with pytest.raises(ValueError, match="no directory"):
        archive(regular("a", b""), regular("a/b", b""))
    with pytest.raises(ValueError, match="content"):
        CpioEntry(path="d", mode=stat.S_IFDIR | 0o755, content=b"x")


def test_a_file_of_4_gib_is_refused(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 32)
    with pytest.raises(ValueError, match="too large"):
        write_cpio(io.BytesIO(), [regular("large", tmp_path / "large")])
