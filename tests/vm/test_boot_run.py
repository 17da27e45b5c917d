"""``guestctl run`` with the machine that it starts."""

import json
import signal
import subprocess
from pathlib import Path

import pexpect
import pytest
from click.testing import CliRunner

from rootfs.cli import run as run_cli
from tests.beds.ctlbed import GUESTCTL
from tests.beds.imagebed import Layout, Member, directory, symlink
from tests.beds.terminal import ask, spawn

BOOT_SECONDS = 240


def test_an_image_is_mounted_and_reported(tmp_path: Path) -> None:
    image = Layout(tmp_path / "oci")
    image.layer([directory("etc"), Member("etc/motd", b"from below\n"), Member("below", b"b")])
    image.layer([Member(".wh.below"), Member("above", b"a")], "+gzip")
    command = run_cli.COMMANDS[0]
    arguments = [str(image.finish()), "--scratch", "1048576", "--json"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.stderr
    reply = json.loads(done.stdout)
    assert [layer["verity"]["status"] for layer in reply["layers"]] == ["V", "V"]
    assert reply["overlay"]["target"] == "/run/overlays/root"
    assert len(reply["overlay"]["lowerdirs"]) == 2
    assert reply["overlay"]["scratch"]["kind"] == "tmpfs"


@pytest.fixture
def image_with_shell(tmp_path: Path) -> str:
    busybox = Member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755)
    image = Layout(tmp_path / "oci")
    image.layer([directory("bin"), busybox, symlink("bin/sh", "busybox"), directory("proc")])
    image.layer([directory("etc"), Member("etc/motd", b"of the image\n"), directory("dev")])
    return str(image.finish())


def test_ctrl_c_powers_a_kept_machine_off(image_with_shell: str) -> None:
    """The terminal sends its signal to every process of the foreground, the helpers, too."""
    terminal = spawn(
        "run",
        image_with_shell,
        "--shell",
        "--keep",
        columns=200,
        timeout_seconds=BOOT_SECONDS,
        environment={"TERM": "xterm"},
        encoding="utf-8",
        # a shell that runs the tests in the background has SIGINT ignored, which is inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        terminal.expect_exact("building the layers")
        terminal.expect_exact("building the boot image")
        terminal.expect_exact("booting with")
        terminal.expect_exact("overlay root at /run/overlays/root")
        terminal.expect_exact("guest# ")
        ask(
            terminal,
            "busybox cat /etc/motd; test -d /proc/self && test -c /dev/null && exit\r",
            "\nof the image",
            "Ctrl-C powers it off",
        )
        terminal.sendintr()
        terminal.expect_exact("powering off")
        terminal.expect(pexpect.EOF)
    finally:
        terminal.close(force=True)
    assert terminal.exitstatus == 0


def test_commands_from_a_pipe_run_in_the_image(image_with_shell: str) -> None:
    done = subprocess.run(
        [*GUESTCTL, "run", image_with_shell, "--shell"],
        input=b"busybox cat /etc/motd\nbusybox touch /new || exit 7\n",
        capture_output=True,
        timeout=BOOT_SECONDS,
        check=False,
    )
    assert done.returncode == 7, done.stderr  # the overlay is read-only
    assert done.stdout.splitlines()[-1] == b"of the image"
    assert b"powering off" in done.stderr
