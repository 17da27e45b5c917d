"""Kernel modules at boot: their parameters, and a loader that tells what it could not load."""

import os
from pathlib import Path

import pytest

from guestagent.boot.modules import module_parameters, start_loading


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("quiet root=/dev/sda1", {}),
        ("dm-verity.require_signatures=1", {"dm_verity": "require_signatures=1"}),
        ("a.b=1 a.c=x.y a.flag", {"a": "b=1 c=x.y flag"}),
        ("virtio_mmio.device=4K@0x1:5 virtio_mmio.device=4K@0x2:6",
         {"virtio_mmio": "device=4K@0x1:5 device=4K@0x2:6"}),
        ("root=UUID.x ip=1.2.3.4 trailing.", {}),
    ],
)  # fmt: skip
def test_parameters_of_the_command_line(line: str, found: dict[str, str]) -> None:
    assert module_parameters(line) == found


def loaded(directory: Path, *paths: str, command_line: str = "quiet") -> tuple[str, ...]:
    (directory / "modules").write_text("".join(f"{path}\n" for path in paths))
    (directory / "cmdline").write_text(command_line)
    loading = start_loading(str(directory / "modules"), str(directory / "cmdline"))
    problems, spent_ms = loading.finish(20)
    assert spent_ms > 0
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    return problems


def test_every_module_that_fails_is_told(tmp_path: Path) -> None:
    problems = loaded(tmp_path, "/none/a.ko", "", "/none/b.ko")
    assert problems == (
        "module /none/a.ko: No such file or directory",
        "module /none/b.ko: No such file or directory",
    )


def test_more_problems_than_a_pipe_holds(tmp_path: Path) -> None:
    """The reader is there only later; the loader must not be lost, nor what it says."""
    paths = [f"/none/{number:0100}.ko" for number in range(2000)]
    assert len(loaded(tmp_path, *paths)) == len(paths)


def test_no_list_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "cmdline").write_text("")
    loading = start_loading(str(tmp_path / "none"), str(tmp_path / "cmdline"))
    assert loading.finish(20)[0] == ()


def test_no_command_line_is_one(tmp_path: Path) -> None:
    loading = start_loading(str(tmp_path / "none"), str(tmp_path / "cmdline"))
    (problem,) = loading.finish(20)[0]
    assert "cmdline" in problem


def test_a_loader_that_hangs_is_told(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    (tmp_path / "cmdline").write_text("")
    loading = start_loading(str(fifo), str(tmp_path / "cmdline"))
    (problem,), _ = loading.finish(0.05)
    assert "still at work" in problem
    with open(fifo, "w"):  # lets it go
        pass
    os.waitpid(-1, 0)
