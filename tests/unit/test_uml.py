"""The parts of the UML runner that need no boot; tests/vm/test_uml_runs.py boots it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.uml_bed.uml_boot import UmlSpec, kernel_arguments
from scripts.uml_bed.uml_cli import main

PROJECT = Path(__file__).resolve().parents[2]
CONSOLES = {0: 10, 1: 11, 2: 12, 3: 13}


def arguments(spec: UmlSpec, terminal_fd: int | None = None) -> list[str]:
    return kernel_arguments(spec, Path("/run/x"), Path("/run/x/config"), CONSOLES, 14, terminal_fd)


def test_consoles_are_the_descriptors_given() -> None:
    words = arguments(UmlSpec(argv=("true",)))
    assert {"con0=null,fd:10", "con1=null,fd:11", "con2=null,fd:12", "con3=fd:14,fd:13"} <= {*words}
    assert "con1=fd:9,fd:9" in arguments(UmlSpec(argv=("sh",)), terminal_fd=9)


def test_the_root_of_the_host_is_mounted_read_only() -> None:
    words = arguments(UmlSpec(argv=("true",)))
    assert "ro" in words
    assert "rw" not in words
    assert "rootflags=/" in words


def test_devices_and_words_are_passed_on(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    spec = UmlSpec(
        argv=("true",),
        memory_mib=128,
        vsock_socket=Path("/run/v"),
        disks=(disk, disk),
        append=("loglevel=7",),
    )
    words = arguments(spec)
    assert {"mem=128M", "virtio_uml.device=/run/v:19", "loglevel=7"} <= {*words}
    assert [word for word in words if word.startswith("ubd")] == [f"ubd0={disk}", f"ubd1={disk}"]


def test_init_comes_last_and_gets_its_configuration() -> None:
    words = arguments(UmlSpec(argv=("true",)))
    init = words.index("--")
    assert words[init - 1].startswith("init=/")
    assert words[-2].endswith("/uml_init.py")
    assert words[-1] == "/run/x/config"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"argv": ()}, "no command"),
        ({"argv": ("x",), "memory_mib": 8}, "memory_mib is 8"),
        ({"argv": ("x",), "binds": (Path("/no/such"),)}, "not a directory"),
        ({"argv": ("x",), "disks": (Path("/no/such"),)}, "as a disk"),
    ],
)
def test_a_wrong_spec_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UmlSpec(**fields)  # type: ignore[arg-type]


def test_the_command_line_says_what_is_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--bind", "/no/such", "true"]) == 125
    assert "cannot bind '/no/such'" in capfd.readouterr().err


def test_no_kernel_is_an_error_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert main(["true"]) == 125
    assert "user-mode-linux" in capfd.readouterr().err


def test_the_bed_needs_no_installed_package() -> None:
    """scripts/uml runs with the system's interpreter, outside of the virtual environment."""
    code = "import scripts.uml_bed.uml_cli"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
