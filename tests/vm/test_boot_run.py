"""``guestctl run`` with the machine that it starts."""

import json
from pathlib import Path

from click.testing import CliRunner

from rootfs.cli import run as run_cli
from tests.beds.imagebed import Layout, Member, directory  # the bed of another tier


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
