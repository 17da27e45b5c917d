"""mountinfo: odd paths, stacked mounts, and the layers of overlays as kernels print them."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage import mountinfo
from guestagent.storage.mountinfo import (
    Mount,
    find_mount,
    lowerdirs_of,
    mounts_by_target,
    mounts_of_dev,
    parse,
)
from guestagent.storage.overlayfs import escape

TABLE = r"""
21 1 0:19 / / rw,relatime shared:1 - overlay overlay rw,lowerdir=/a:/b
30 21 253:1 / /run/layers/a ro,nosuid,nodev - erofs /dev/dm-1 ro,user_xattr
31 21 253:1 /sub /mnt/bind\040here ro master:7 propagate_from:2 - erofs /dev/dm-1 ro
32 30 0:40 / /run/layers/a rw - tmpfs over rw
33 32 0:41 / /run/layers/a rw - tmpfs over\011more rw,size=4k
34 21 0:42 / /run/layers/a2 rw - tmpfs none rw
35 21 0:43 / /back\134slash\012line rw - tmpfs no\040ne\043 rw
""".lstrip()


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    return str(path)


def test_fields(table: str) -> None:
    mounts = mountinfo.read_mounts(table)
    assert len(mounts) == 7
    assert mounts[2] == Mount(
        mount_id=31,
        parent_id=21,
        dev="253:1",
        root="/sub",
        target="/mnt/bind here",
        options=("ro",),
        filesystem="erofs",
        source="/dev/dm-1",
        super_options=("ro",),
    )
    assert mounts[4].source == "over\tmore"
    assert (mounts[6].target, mounts[6].source) == ("/back\\slash\nline", "no ne#")


def test_the_topmost_of_stacked_mounts(table: str) -> None:
    found = find_mount("/run/layers/a", table)
    assert found is not None
    assert found.mount_id == 33
    for target in ("/run/layers", "/run/layers/a/", "run/layers/a", "", "253:1", "tmpfs", "rw"):
        assert find_mount(target, table) is None


def test_odd_targets_are_found(table: str) -> None:
    for target in ("/mnt/bind here", "/back\\slash\nline", "/run/layers/a2", "/"):
        found = find_mount(target, table)
        assert found is not None
        assert found.target == target


def test_the_mounts_of_many_targets(table: str) -> None:
    wanted = ("/mnt/bind here", "/back\\slash\nline", "/run/layers/a", "/run/layers", "tmpfs")
    found = mounts_by_target(wanted, path=table)
    assert found == {target: find_mount(target, table) for target in wanted[:3]}
    everything = mounts_by_target(path=table)
    assert found.items() < everything.items()
    assert mounts_by_target((), path=table) == {}


def test_mounts_of_a_device(table: str) -> None:
    assert [mount.mount_id for mount in mounts_of_dev("253:1", table)] == [30, 31]
    assert mounts_of_dev("253:11", table) == ()
    assert mounts_of_dev("0:4", table) == ()


def test_our_own_table() -> None:
    mounts = mountinfo.read_mounts()
    assert find_mount("/proc") in mounts


@pytest.mark.parametrize(
    "line", ["", "1 2 3", "a 1 0:1 / / rw - t s rw", "1 1 0:1 / / rw t s rw", "1 1 0:1 / / rw -"]
)
def test_parse_line_refuses_malformed_lines(line: str) -> None:
    with pytest.raises(ValueError, match="not a line"):
        mountinfo.parse_line(line)


def encoded(text: str, letters: str) -> str:
    return "".join(f"\\{ord(char):03o}" if char in letters else char for char in text)


names = st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name).map(os.fsdecode)


@given(target=names, source=names, root=names)
def test_any_bytes_come_back(target: str, source: str, root: str) -> None:
    spaces = " \t\n\\"
    words = (
        encoded(f"/{root}", spaces),
        encoded(f"/{target}", spaces),
        encoded(source, spaces + "#"),
    )
    line = "1 2 0:5 {} {} rw - tmpfs {} rw".format(*words)
    (mount,) = parse(line + "\n")
    assert (mount.root, mount.target, mount.source) == (f"/{root}", f"/{target}", source)


def overlay(*super_options: str, source: str = "overlay") -> Mount:
    return Mount(
        mount_id=1,
        parent_id=1,
        dev="0:9",
        root="/",
        target="/o",
        options=("ro",),
        filesystem="overlay",
        source=source,
        super_options=super_options,
    )


@given(st.lists(names.map(lambda name: "/" + name.replace("/", "_")), min_size=1, max_size=5))
def test_lowerdirs_by_either_option(paths: list[str]) -> None:
    joined = "lowerdir=" + ":".join(escape(path) for path in paths)
    assert lowerdirs_of(overlay("ro", joined, "xino=off")) == tuple(paths)
    assert lowerdirs_of(overlay("ro", *(f"lowerdir+={path}" for path in paths))) == tuple(paths)


@given(st.lists(names.map(lambda name: "/" + name.replace("/", "_")), min_size=1, max_size=5))
def test_lowerdirs_through_the_whole_table(paths: list[str]) -> None:
    """overlayfs escapes each value once more, commas too, before it is in the table."""
    value = encoded(":".join(escape(path) for path in paths), ",= \t\n\\")
    (mount,) = parse(f"1 2 0:5 / /o ro - overlay overlay ro,lowerdir={value},xino=off\n")
    assert lowerdirs_of(mount) == tuple(paths)


def test_short_names_are_looked_up_in_the_links(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).symlink_to(f"/run/layers/{number}")
    found = lowerdirs_of(overlay("lowerdir=0:1:2", source=str(tmp_path)))
    assert found == ("/run/layers/0", "/run/layers/1", "2")
    assert lowerdirs_of(overlay("lowerdir=0:1")) == ("0", "1")
