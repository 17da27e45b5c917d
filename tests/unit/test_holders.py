"""Who holds a device, on made-up /proc and /sys trees; the real ones are in tests/kernel."""

import os
from pathlib import Path

import pytest

from guestagent.storage.holders import find_holders
from vsock.deadline import Deadline

DEV = "253:1"


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, Path]:
    proc, sys_root = tmp_path / "proc", tmp_path / "sys"
    (sys_root / "block").mkdir(parents=True)
    holders = sys_root / "dev/block" / DEV / "holders"
    (holders / "dm-2/dm").mkdir(parents=True)
    (holders / "dm-2/dm/name").write_text("upper-device\n")
    (holders / "md0").mkdir()
    process = proc / "77"
    (process / "fd").mkdir(parents=True)
    (process / "comm").write_text("reader\n")
    (process / "maps").write_text(
        "7f00-7f01 r--p 0 fd:01 12 /run/layers/a/lib.so\n"
        "7f01-7f02 r-xp 0 fd:01 12 /run/layers/a/lib.so\n"
        "7f02-7f03 r--p 0 fd:10 12 /elsewhere\n"
        "7f03-7f04 rw-p 0 00:00 0\n"
    )
    (process / "ns").mkdir()
    (process / "ns/mnt").symlink_to("mnt:[1]")
    (process / "mountinfo").write_text(
        "30 21 253:1 / /run/layers/a ro - erofs /dev/dm-1 ro\n"
        "31 30 0:50 / /run/layers/a/below rw - tmpfs none rw\n"
        "32 21 253:1 / /elsewhere ro - erofs /dev/dm-1 ro\n"
        "33 21 0:51 / /merged ro - overlay overlay ro,lowerdir=/run/layers/a:/b\n"
        "34 21 0:52 / /other ro - overlay overlay ro,lowerdir=/run/layers/ab:/b\n"
    )
    (proc / "self").symlink_to("77")
    (proc / "swaps").write_text("Filename Type Size Used Priority\n/dev/null partition 1 0 -2\n")
    return proc, sys_root


def test_all_that_stands_on_it(roots: tuple[Path, Path]) -> None:
    proc, sys_root = roots
    found = find_holders(
        DEV, Deadline(5), target="/run/layers/a", proc_root=str(proc), sys_root=str(sys_root)
    )
    assert [(holder.kind, holder.name, holder.detail) for holder in found] == [
        ("dm", "upper-device", "/dev/dm-2"),
        ("dm", "md0", "/dev/md0"),
        ("mount", "/run/layers/a/below", "mounted below it"),
        ("mount", "/elsewhere", "same device"),
        ("overlay", "/merged", "layer /run/layers/a"),
        ("process", "reader[77]", "mapping of /run/layers/a/lib.so"),
    ]


@pytest.mark.parametrize(("flags", "is_looked_at"), [(2129984, False), (4194560, True)])
def test_children_of_process_2_are_left_out_if_it_is_a_kernel_thread(
    roots: tuple[Path, Path], flags: int, is_looked_at: bool
) -> None:
    """In a process namespace, process 2 is a process like the others, whatever its name."""
    proc, sys_root = roots
    (proc / "2/task/2").mkdir(parents=True)
    (proc / "2/stat").write_text(f"2 (kthreadd) S 0 0 0 0 -1 {flags} 0 0 0\n")
    (proc / "2/task/2/children").write_text("3 77 ")
    found = find_holders(DEV, Deadline(5), proc_root=str(proc), sys_root=str(sys_root))
    assert ("process" in {holder.kind for holder in found}) == is_looked_at


def test_the_deadline_ends_the_search(roots: tuple[Path, Path]) -> None:
    proc, sys_root = roots
    found = find_holders(DEV, Deadline(0.0), proc_root=str(proc), sys_root=str(sys_root))
    assert {holder.kind for holder in found} == {"dm"}


def test_processes_that_end_meanwhile_hold_nothing(roots: tuple[Path, Path]) -> None:
    proc, sys_root = roots
    for name in ("maps", "mountinfo", "comm"):
        (proc / "77" / name).unlink()
    (proc / "77/fd").rmdir()
    found = find_holders("253:9", Deadline(5), proc_root=str(proc), sys_root=str(sys_root))
    assert found == ()


def test_our_own_open_file_is_seen(tmp_path: Path) -> None:
    number = os.stat(tmp_path).st_dev
    fd = os.open(tmp_path, os.O_RDONLY)
    found = find_holders(f"{os.major(number)}:{os.minor(number)}", Deadline(20))
    os.close(fd)
    ours = [holder for holder in found if f"[{os.getpid()}]" in holder.name]
    assert [holder.kind for holder in ours] == ["process"]
