"""Running commands in User Mode Linux, and that the host does not notice."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pexpect
import pytest

from scripts.uml_bed.uml import UmlBootError, UmlSpec, UmlTimeoutError, run_spec, run_uml

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "scripts/uml")


@pytest.fixture
def run_dirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernels of a test have their directories, by which their processes are known."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def processes(run_dirs: Path) -> list[int]:
    """Every process of the kernels that were started with their directories below ``run_dirs``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(word.startswith(f"uml_dir={run_dirs}/".encode()) for word in words):
            found.append(int(entry.name))
    return sorted(found)


def wait_until_gone(run_dirs: Path) -> None:
    end = time.monotonic() + 20
    while processes(run_dirs) and time.monotonic() < end:
        time.sleep(0.05)
    assert processes(run_dirs) == []


def test_output_errors_and_status_come_back_as_they_were() -> None:
    result = run_uml(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout_seconds=60)
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert 0 < result.boot_seconds < result.seconds
    with pytest.raises(subprocess.CalledProcessError):
        result.check_returncode()


def test_both_streams_are_clean_to_the_byte() -> None:
    script = (
        "import os, random, sys, threading\n"
        "def put(fd, seed):\n"
        "    with open(fd, 'wb', closefd=False) as file:\n"
        "        file.write(random.Random(seed).randbytes(3_000_001))\n"
        "threads = [threading.Thread(target=put, args=(fd, fd)) for fd in (1, 2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
    )
    result = run_uml([sys.executable, "-c", script], timeout_seconds=120)
    for fd, data in ((1, result.stdout), (2, result.stderr)):
        expected = random.Random(fd).randbytes(3_000_001)
        assert hashlib.sha256(data).digest() == hashlib.sha256(expected).digest()


def test_a_signal_is_told_as_a_shell_tells_it() -> None:
    assert run_uml(["sh", "-c", "kill -9 $$"], timeout_seconds=60).returncode == 128 + 9


def test_uml_ends_without_waiting_for_background_processes() -> None:
    result = run_uml(["sh", "-c", "sleep 1000 & echo done"], timeout_seconds=60)
    assert (result.returncode, result.stdout) == (0, b"done\n")


def test_nothing_on_the_host_changes_but_what_is_bound(tmp_path: Path) -> None:
    bound, other = tmp_path / "bound", tmp_path / "other"
    bound.mkdir()
    other.mkdir()
    marker = Path("/etc/guestagent-uml-test")
    script = f"echo x > {marker} && echo x > {ROOT}/uml-test-file && echo x > {bound}/f"
    script += f" && mkdir -p {other} && echo x > {other}/f && rm {ROOT}/pyproject.toml"
    result = run_uml(["sh", "-c", script], binds=[bound], timeout_seconds=60)
    assert result.returncode == 0, result.stderr
    assert (bound / "f").read_text() == "x\n"
    assert not marker.exists()
    assert not (ROOT / "uml-test-file").exists()
    assert (ROOT / "pyproject.toml").exists()
    assert list(other.iterdir()) == []


def test_directory_and_environment_are_kept(tmp_path: Path) -> None:
    """Even of a directory below /tmp, which is another one inside."""
    (tmp_path / "here").write_text("yes")
    result = run_uml(
        ["sh", "-c", "pwd; cat here; echo $MARK"],
        cwd=tmp_path,
        env={"MARK": "kept", "PATH": os.environ["PATH"]},
        timeout_seconds=60,
    )
    assert result.stdout.decode() == f"{tmp_path}\nyeskept\n"


def test_input_is_given_to_the_command() -> None:
    result = run_uml(["sha256sum"], stdin=b"\0\r\n\xff" * 100, timeout_seconds=60)
    assert result.stdout.split()[0].decode() == hashlib.sha256(b"\0\r\n\xff" * 100).hexdigest()


def test_a_disk_is_written_in_place(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with open(disk, "wb") as file:
        file.truncate(1 << 20)
    script = "printf hello | dd of=/dev/ubda conv=notrunc,fsync status=none"
    result = run_uml(["sh", "-c", script], disks=[disk], timeout_seconds=60)
    assert result.returncode == 0, result.stderr
    assert disk.read_bytes()[:6] == b"hello\0"
    assert disk.stat().st_size == 1 << 20


def test_modules_load_by_themselves() -> None:
    command = ["dmsetup", "create", "z", "--table", "0 8 zero"]
    result = run_uml(command, env={"PATH": "/usr/sbin:/usr/bin", "DM_DISABLE_UDEV": "1"})
    assert result.returncode == 0, result.stderr


def test_time_over_ends_all_of_it(run_dirs: Path) -> None:
    started = time.monotonic()
    with pytest.raises(UmlTimeoutError, match="killed after 4 s: sleep 1000"):
        run_uml(["sleep", "1000"], timeout_seconds=4)
    assert time.monotonic() - started < 8
    wait_until_gone(run_dirs)
    assert list(run_dirs.iterdir()) == []


def test_a_dead_kernel_is_an_error_with_its_console() -> None:
    script = "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 10"
    with pytest.raises(UmlBootError, match="died under the command") as caught:
        run_uml(["sh", "-c", script], timeout_seconds=60)
    assert b"sysrq triggered crash" in caught.value.console


def test_a_killed_kernel_is_noticed_at_once(run_dirs: Path) -> None:
    """Its helper processes live on and hold the pipes open: that must not be waited for."""
    killed: list[int] = []

    def kill_it() -> None:
        end = time.monotonic() + 60
        while len(processes(run_dirs)) < 3 and time.monotonic() < end:  # it has made helpers
            time.sleep(0.05)
        killed.extend(processes(run_dirs)[:1])  # the first is the kernel itself
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_it)
    thread.start()
    with pytest.raises(UmlBootError, match=r"exit status -9"):
        run_uml(["sleep", "1000"], timeout_seconds=100)
    thread.join()
    wait_until_gone(run_dirs)


def test_a_temporary_directory_that_is_asked_for_exists() -> None:
    env = {"TMPDIR": "/tmp/not/on/the/host", "PATH": os.environ["PATH"]}
    result = run_uml(["mktemp"], env=env, timeout_seconds=60)
    assert result.stdout.startswith(b"/tmp/not/on/the/host/")


def test_a_kernel_that_cannot_boot_is_an_error_with_its_console() -> None:
    spec = UmlSpec(argv=("true",), append=("rootflags=/no/such/directory",), timeout_seconds=60)
    with pytest.raises(UmlBootError, match="died while it booted") as caught:
        run_spec(spec)
    assert b"Unable to mount root fs" in caught.value.console


def test_the_guest_ends_when_its_host_process_is_killed(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [SCRIPT, "sh", "-c", "echo up; sleep 1000"], stdin=subprocess.DEVNULL, stdout=-1, env=env
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert processes(tmp_path)
        process.kill()
    wait_until_gone(tmp_path)
    # nobody was left to remove its directory, so that the next run does
    assert len(os.listdir(tmp_path)) == 1
    subprocess.run([SCRIPT, "true"], stdin=subprocess.DEVNULL, env=env, check=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_line_cleanly(signum: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [SCRIPT, "sh", "-c", "echo up; sleep 1000"],
        stdin=subprocess.DEVNULL,
        stdout=-1,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signum)
        assert process.wait(20) == 128 + signum
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["sh", "-c", "exit 42"], 42), (["/no/such/program"], 127), (["/etc/passwd"], 126)],
)
def test_statuses_of_the_command_line(arguments: list[str], status: int) -> None:
    assert (
        subprocess.run([SCRIPT, *arguments], stdin=subprocess.DEVNULL, check=False).returncode
        == status
    )


def test_the_command_line_tells_timeout_and_failure_apart() -> None:
    def run(*arguments: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            [SCRIPT, *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False
        )

    late = run("--timeout", "3", "sleep", "100")
    assert late.returncode == 124
    assert b"uml: killed after 3 s" in late.stderr
    broken = run("--append", "rootflags=/no/such", "true")
    assert broken.returncode == 125
    assert b"uml: console: " in broken.stderr
    assert b"died while it booted" in broken.stderr


def test_a_terminal_is_passed_through() -> None:
    child = pexpect.spawn(SCRIPT, ["sh"], dimensions=(33, 99), timeout=60, echo=False)
    try:
        child.expect("# ")
        child.sendline("tty; stty size")
        child.expect("/dev/tty1\r\n33 99\r\n")
        child.expect("# ")
        child.sendline("cat")
        child.sendline("hello")
        child.expect("hello\r\nhello\r\n")  # the terminal's echo, and then cat itself
        child.sendcontrol("c")  # reaches the shell's job inside, not this side
        child.expect("# ")
        child.sendline("exit 7")
        child.expect(pexpect.EOF)
    finally:
        child.close()
    assert child.exitstatus == 7
