"""What the handle and guestctl write on the host: whole, and in place of regular files only."""

import os
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from guestagent.host.ctl.main import collect
from guestagent.host.ctl.profiles import Profiles
from guestagent.host.output import atomic_write
from tests.beds.ctlbed import GUESTCTL
from tests.beds.inspectbed import connect, serving
from vsock.errors import CallError


def kinds(place: Path) -> list[Path]:
    """Return outputs of which none may be written: a FIFO, a link, a directory."""
    os.mkfifo(place / "fifo")
    (place / "kept").write_bytes(b"kept")
    (place / "link").symlink_to("kept")
    (place / "directory").mkdir()
    return [place / "fifo", place / "link", place / "directory"]


def test_atomic_write_in_place_of_a_special_file_is_refused(tmp_path: Path) -> None:
    for path in kinds(tmp_path):
        before = path.lstat()
        with (
            pytest.raises(CallError, match="only a regular file is ever replaced") as caught,
            atomic_write(path) as file,
        ):
            file.write(b"new")
        assert (caught.value.code, caught.value.object) == ("invalid", str(path))
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert sorted(os.listdir(tmp_path)) == ["directory", "fifo", "kept", "link"]


def test_special_file_made_during_atomic_write_is_kept(tmp_path: Path) -> None:
    with pytest.raises(CallError, match="a FIFO"), atomic_write(tmp_path / "x"):
        os.mkfifo(tmp_path / "x")
    assert stat.S_ISFIFO((tmp_path / "x").lstat().st_mode)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["", ".", "..", "/", "directory/", "a\0b"])
def test_an_output_needs_a_name(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CallError, match="no name of a file"), atomic_write(name):
        pass
    assert os.listdir(tmp_path) == []


def test_a_long_name_of_wide_characters_is_written(tmp_path: Path) -> None:
    path = tmp_path / ("\N{GRINNING FACE}" * 63)  # 252 bytes
    with atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == [path.name]


def test_a_download_replaces_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content")
    (tmp_path / "out").mkdir()
    outputs = kinds(tmp_path / "out")
    with serving(tmp_path / "agent", {"base": tmp_path / "tree"}) as bed:

        def said(*words: str) -> str:
            done = CliRunner().invoke(collect(), ["--connect", bed.address, *words])
            assert done.exit_code == 1
            return done.stderr

        for path in outputs:
            with connect(bed) as guest, pytest.raises(CallError, match="ever replaced"):
                guest.fs_download("/file", path, layer_id="base")
            tar = said("fs", "tar", "layer:base", "/", "-o", str(path))
            assert "only a regular file is ever replaced" in tar
        assert "no name of a file" in said("fs", "download", "layer:base", "/file", "")
    assert sorted(os.listdir(tmp_path / "out")) == ["directory", "fifo", "kept", "link"]


def test_pages_and_profiles_go_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    for name in ("guestctl.1", "profiles.json"):
        (tmp_path / name).symlink_to("kept")
    done = CliRunner().invoke(collect(), ["man", "--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "a symbolic link" in done.stderr
    profiles = Profiles.__new__(Profiles)
    profiles.path, profiles.addresses, profiles.default = tmp_path / "profiles.json", {}, None
    with pytest.raises(CallError, match="a symbolic link"):
        profiles.save()
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert sorted(os.listdir(tmp_path)) == ["guestctl.1", "kept", "profiles.json"]


def test_a_receiver_of_logs_removes_only_its_own_socket(tmp_path: Path) -> None:
    path = tmp_path / "log"
    command = [*GUESTCTL, "log", "--listen", f"unix://{path}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as receiver:
        assert receiver.stderr is not None
        assert receiver.stderr.readline().startswith("waiting for guests")
        path.unlink()
        path.write_bytes(b"kept")
        receiver.send_signal(signal.SIGINT)
        assert receiver.wait() == 0
    assert path.read_bytes() == b"kept"
