"""The system-call table: numbers and constants against the headers, errors, refusals."""

import ctypes
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from guestagent.storage import syscalls
from guestagent.storage.keyring import ThreadKey

HEADERS = Path("/usr/include")


def _defines(*names: str) -> dict[str, int]:
    """Read #defines and plain enums of the kernel's headers; shifts and hexadecimals only."""
    found: dict[str, int] = {}
    for name in names:
        path = HEADERS / name
        if not path.exists():
            pytest.skip(f"{path} is not installed")
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
        for key, value in re.findall(r"^\s*#\s*define\s+(\w+)\s+(.+?)\s*$", text, re.MULTILINE):
            plain = value.strip("()").rstrip("uUlL")
            if re.fullmatch(r"-?(0x)?[0-9a-fA-F]+", plain):
                found[key] = int(plain, 16 if "0x" in plain else 8 if plain[0] == "0" else 10)
            elif shift := re.fullmatch(r"(\d+)\s*<<\s*(\d+)", plain):
                found[key] = int(shift[1]) << int(shift[2])
        for body in re.findall(r"enum\s+\w*\s*\{(.*?)\}", text, re.DOTALL):
            number = 0
            for item in filter(None, (word.strip() for word in body.split(","))):
                key, _, value = (part.strip() for part in item.partition("="))
                number = int(value, 0) if value.isdigit() else number
                found[key] = number
                number += 1
    return found


def test_constants_are_those_of_the_headers() -> None:
    known = _defines(
        "linux/mount.h",
        "linux/fcntl.h",
        "linux/openat2.h",
        "linux/sched.h",
        "linux/reboot.h",
        "linux/keyctl.h",
        "linux/module.h",
        "linux/random.h",
        "linux/stat.h",
    )
    ours = {
        name: value
        for name, value in vars(syscalls).items()
        if re.fullmatch(r"[A-Z][A-Z0-9_]+", name) and type(value) is int
    }
    unknown = {"MNT_DETACH", "UMOUNT_NOFOLLOW", "OPEN_TREE_CLOEXEC", "MOUNT_DATA_MAX_BYTES"}
    assert set(ours) - set(known) <= unknown
    assert {name: ours[name] for name in ours if name in known} == {
        name: known[name] for name in ours if name in known
    }


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")],
)
def test_numbers_are_those_of_the_headers(machine: str, header: str) -> None:
    known = _defines(header)
    numbers = syscalls._NUMBERS_BY_MACHINE[machine] | syscalls._NUMBERS_COMMON
    assert numbers == {name: known[f"__NR_{name}"] for name in numbers}


def test_an_unknown_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [*os.uname()[:4], "m68k"]
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(fields))
    with pytest.raises(ImportError, match="'m68k'"):
        syscalls._numbers()


def test_a_missing_symbol_is_an_error_at_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(syscalls._SIGNATURES, "no_such_call", ())
    with pytest.raises(AttributeError, match="no_such_call"):
        syscalls._load_libc()


def test_errors_name_call_and_object() -> None:
    with pytest.raises(FileNotFoundError, match="openat2: No such file") as caught:
        syscalls.openat2(syscalls.AT_FDCWD, "/nonexistent", os.O_PATH)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, "/nonexistent")
    with pytest.raises(OSError, match=r"umount2: .*: '/nonexistent'"):
        syscalls.umount2("/nonexistent")
    with pytest.raises(OSError, match="setns: Bad file descriptor"):
        syscalls.setns(-1)
    with pytest.raises(OSError, match="finit_module"):
        syscalls.finit_module(-1, filename="x.ko")


@pytest.mark.parametrize("value", ["a\0b", b"a\0b"])
def test_text_is_never_cut_at_a_null_byte(value: str | bytes) -> None:
    for call in (
        lambda: syscalls.mount("s", "/t", "f", 0, value),
        lambda: syscalls.umount2(os.fsdecode(value)),
        lambda: syscalls.fsopen(os.fsdecode(value)),
        lambda: syscalls.openat2(syscalls.AT_FDCWD, os.fsdecode(value), 0),
        lambda: syscalls.sethostname(os.fsdecode(value)),
        lambda: syscalls.pivot_root(os.fsdecode(value), "/"),
    ):
        with pytest.raises(ValueError, match="null byte"):
            call()


def test_long_mount_options_are_refused_before_the_kernel_cuts_them() -> None:
    with pytest.raises(OSError, match="4096 bytes") as caught:
        syscalls.mount("s", "/nonexistent", "tmpfs", 0, b"x" * 4096)
    assert caught.value.errno == errno.E2BIG
    with pytest.raises(OSError, match=r"mount: ") as caught:
        syscalls.mount("s", "/nonexistent", "tmpfs", 0, b"x" * 4095)
    assert caught.value.errno in (errno.ENOENT, errno.EPERM)


def test_openat2_holds_below_its_root(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "link").symlink_to("inside")
    root = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    resolve = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
    try:
        fd = syscalls.openat2(root, "inside", os.O_PATH, resolve=resolve)
        assert not os.get_inheritable(fd)
        os.close(fd)
        for path, number in (("..", errno.EXDEV), ("/", errno.EXDEV), ("link", errno.ELOOP)):
            with pytest.raises(OSError, match="openat2") as caught:
                syscalls.openat2(root, path, os.O_PATH, resolve=resolve)
            assert caught.value.errno == number
        made = syscalls.openat2(root, "new", os.O_WRONLY | os.O_CREAT, mode=0o640, resolve=resolve)
        os.close(made)
    finally:
        os.close(root)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_an_interrupted_call_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = [-1, -1, 7]
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.EINTR)
    assert syscalls._checked("call", None, lambda: outcomes.pop(0)) == 7
    assert outcomes == []


@pytest.mark.parametrize("size_bytes", [8, 1024, 1025, 65536])
def test_ioctl_writes_into_the_buffer(size_bytes: int) -> None:
    """FIONREAD answers into its argument; large ones take another way."""
    read_fd, write_fd = os.pipe()
    os.write(write_fd, b"12345")
    buffer = bytearray(size_bytes)
    assert syscalls.ioctl(read_fd, 0x541B, buffer, "pipe", "FIONREAD") == 0
    assert int.from_bytes(buffer[:4], "little") == 5
    buffer.extend(b"the kernel's hold on it has ended")
    os.close(read_fd)
    os.close(write_fd)
    with pytest.raises(OSError, match="FIONREAD: Bad file descriptor"):
        syscalls.ioctl(read_fd, 0x541B, bytearray(size_bytes), "pipe", "FIONREAD")


@pytest.mark.parametrize("description", ["", "two words", "line\n", "nul\0", "\u00e4"])
def test_key_descriptions_stay_one_word(description: str) -> None:
    with pytest.raises(ValueError, match="one visible word"):
        ThreadKey("user", description, b"signature")


def test_arenas_can_be_limited_where_the_libc_is_glibc() -> None:
    """In a child: the limit holds for the whole process."""
    code = "from guestagent.storage.syscalls import bound_malloc as f; print(f())"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert output.strip() == str(os.confstr("CS_GNU_LIBC_VERSION") is not None)
