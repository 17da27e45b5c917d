"""``guestctl fs`` against the real service."""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guestagent.host.ctl.fs import fs, printable
from guestagent.host.ctl.main import guestctl
from guestagent.host.ctl.style import natural_key
from tests.beds.inspectbed import serving

Run = Callable[..., Result]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "etc").mkdir(parents=True)
    (top / "etc" / "motd").write_bytes(b"hello\n")
    (top / "link").symlink_to("etc/motd")
    (top / os.fsdecode(b"bad\xff\x1b[31m")).write_bytes(b"red")
    return top


@pytest.fixture
def run(tmp_path: Path, tree: Path) -> Iterator[Run]:
    guestctl.add_command(fs)
    with serving(tmp_path / "agent.sock", {"base": tree}, {"all": tree}) as bed:

        def invoke(*words: str, as_json: bool = False) -> Result:
            options = ["--connect", bed.address, *(["--json"] if as_json else []), "fs"]
            return CliRunner().invoke(guestctl, [*options, *words])

        yield invoke


def test_ls(run: Run) -> None:
    assert run("ls", "layer:base").output == "bad\\xff\\x1b[31m\netc\nlink\n"
    long = run("ls", "-l", "overlay:all").output
    assert "link -> etc/motd" in long
    assert "drwx" in long
    names = json.loads(run("ls", "layer:base", as_json=True).output)
    assert [os.fsencode(name) for name in names] == [b"bad\xff\x1b[31m", b"etc", b"link"]


def test_cat_and_download(run: Run, tmp_path: Path) -> None:
    assert run("cat", "layer:base", "/link").stdout_bytes == b"hello\n"
    target = tmp_path / "got"
    assert run("download", "layer:base", "/link", str(target)).exit_code == 0
    assert target.read_bytes() == b"hello\n"
    failed = run("download", "layer:base", "/link", str(tmp_path / "no" / "got"))
    assert failed.exit_code == 1
    assert "cannot write" in failed.output


def test_stat(run: Run) -> None:
    output = run("stat", "layer:base", "/etc/motd").output
    assert "regular file" in output
    assert "6 bytes" in output
    found = json.loads(run("stat", "layer:base", "/link", as_json=True).output)
    assert (found["kind"], found["target"]) == ("l", "etc/motd")


def test_find_du_df(run: Run) -> None:
    assert run("find", "layer:base", "--name", "mo*").output == "etc/motd\n"
    assert json.loads(run("find", "layer:base", "--type", "d", as_json=True).output) == [
        {"path": "etc", "kind": "d"}
    ]
    assert "2 files, 2 directories, 1 symlinks" in run("du", "layer:base").output
    assert "writable" in run("df", "layer:base").output


def test_checksum(run: Run) -> None:
    digest = hashlib.sha256(b"hello\n").hexdigest()
    assert run("checksum", "layer:base", "/etc/motd").output == f"{digest}  /etc/motd\n"
    assert f"{digest}  etc/motd\n" in run("checksum", "layer:base").output


def test_tar(run: Run, tmp_path: Path) -> None:
    assert run("tar", "layer:base", "-o", str(tmp_path / "x.tar")).exit_code == 0
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert "./etc/motd" in archive.getnames()
    blob = run("tar", "layer:base", "/etc").stdout_bytes
    with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
        assert archive.getnames() == [".", "./motd"]


def test_devices(run: Run) -> None:
    result = run("devices")
    assert result.exit_code == 0, result.output
    assert isinstance(json.loads(run("devices", as_json=True).output), list)


@pytest.mark.parametrize("words", ["ls layer:base", "find layer:base", "tar layer:base"])
def test_a_reader_that_has_enough_ends_the_command_quietly(
    tmp_path: Path, tree: Path, words: str
) -> None:
    for number in range(5000):
        (tree / f"file{number:0100}").touch()
    program = "from guestagent.host.ctl import main; main()"
    with serving(tmp_path / "agent.sock", {"base": tree}, {}) as bed:
        command = [sys.executable, "-c", program, "--connect", bed.address, "fs", *words.split()]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.read(10)
            process.stdout.close()
            assert process.stderr.read() == b""


def test_devices_are_sorted_as_numbers() -> None:
    nodes = ["/dev/dm-10", "/dev/dm-2", "/dev/sda", "/dev/dm-1"]
    assert sorted(nodes, key=natural_key) == ["/dev/dm-1", "/dev/dm-2", "/dev/dm-10", "/dev/sda"]


def test_inspect_command_reports_errors_with_exit_code(run: Run) -> None:
    failed = run("cat", "layer:base", "/nothing")
    assert failed.exit_code == 1
    assert "not_found" in failed.output
    assert json.loads(run("cat", "layer:base", "/no", as_json=True).output)["error"]["code"] == (
        "not_found"
    )
    wrong = run("ls", "base")
    assert wrong.exit_code == 2
    assert "layer:ID" in wrong.output


def test_names_cannot_drive_a_terminal() -> None:
    assert printable(b"a\x1b]0;x\x07\xff\xc3\xa9") == "a\\x1b]0;x\\x07\\xff\xe9"


@pytest.mark.parametrize(
    "command", [("download", "layer:base", "/etc/motd"), ("tar", "layer:base")]
)
def test_download_longer_than_max_bytes_is_refused(
    run: Run, tmp_path: Path, command: tuple[str, ...]
) -> None:
    output = (str(tmp_path / "out"),) if command[0] == "download" else ("-o", str(tmp_path / "out"))
    done = run(*command, *output, "--max-bytes", "5")
    assert done.exit_code == 1
    assert "more than max_bytes 5" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run(*command, *output, "--max-bytes", "100000").exit_code == 0
    assert (tmp_path / "out").exists()
