"""The commands that pages of docs/ show, run as they stand there, each a process of its own.

The one that needs a guest has a test of its own beside this one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.beds.calls import run
from tests.beds.imagebed import Layout, Member, directory, make_tar

PROJECT = Path(__file__).resolve().parents[2]
GUESTCTL = f"{sys.executable} -c 'from guestagent.host.ctl import main; main()'"


def run_commands(document: str, tmp_path: Path) -> str:
    """Run all commands of a page in one shell; return what they print."""
    place = tmp_path / "place"
    (place / "rootfs/etc").mkdir(parents=True)
    (place / "rootfs/etc/motd").write_text("hello\n")
    files = [directory("etc"), Member("etc/hosts", b"127.0.0.1")]
    (tmp_path / "app.tar").write_bytes(make_tar(files))
    run("gzip", tmp_path / "app.tar")
    (tmp_path / "app.tar.gz").rename(place / "app.tar.gz")
    Layout(place / "layout").layer(files).layer([Member("etc/.wh.hosts")], "+gzip").finish()
    text = (PROJECT / document).read_text()
    commands = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S))
    script = f'set -eux\nguestctl() {{ {GUESTCTL} "$@"; }}\n{commands}'
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert commands.count("guestctl") > 15
    return done.stdout


def test_the_commands_for_images_work(tmp_path: Path) -> None:
    printed = run_commands("docs/images.md", tmp_path)
    assert "sound: " in printed
    assert printed.count("good signature") == 2


def test_the_commands_for_policies_work(tmp_path: Path) -> None:
    printed = run_commands("docs/policy-commands.md", tmp_path)
    assert "needs a review" in printed
    assert "denied" in printed
    assert "good signature" in printed
