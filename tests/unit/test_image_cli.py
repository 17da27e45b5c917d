"""``guestctl layer build`` and ``guestctl pack``: from sources to a pack, and to a request."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from guestagent.host.ctl.main import collect
from rootfs.pack.manifest import Manifest
from rootfs.pack.pack import Pack
from tests.beds.imagebed import Layout, Member, directory, make_tar
from vsock.errors import CallError

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in a directory with a tar and a layout."""
    monkeypatch.chdir(tmp_path)
    files = [directory("etc"), Member("etc/hosts", b"localhost")]
    (tmp_path / "layer.tar").write_bytes(make_tar(files))
    Layout(tmp_path / "layout").layer(files).layer([Member("etc/.wh.hosts")], "+gzip").finish()

    def invoke(*words: str, status: int = 0) -> Result:
        result = CliRunner().invoke(collect(), [*words])
        assert result.exit_code == status, result.output
        return result

    return invoke


def from_json(result: Result) -> Any:
    return json.loads(result.stdout)


def test_from_a_tar_to_a_pack(run: Run, tmp_path: Path) -> None:
    built = from_json(
        run("layer", "build", "layer.tar", "a.erofs", "--verity", "--sidecar", "--json")
    )
    assert json.loads((tmp_path / "a.erofs.dmverity").read_text()) == {
        "roothash": built["root_digest"],
        "hashoffset": built["hash_offset_bytes"],
    }
    subprocess.run(
        ["veritysetup", "verify", "a.erofs", "a.erofs", built["root_digest"],
         f"--hash-offset={built['hash_offset_bytes']}"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    run("pack", "create", "p.img", "--dax")
    digest = ("--root-digest", built["root_digest"], "--source-digest", built["source_digest"])
    added = from_json(run("pack", "add", "p.img", "a.erofs", "--id", "base", *digest, "--json"))
    assert added["verity"]["root_digest"] == built["root_digest"]
    listed = from_json(run("pack", "list", "p.img.json", "--json"))
    assert listed["layers"] == [added]
    assert listed["alignment_bytes"] == 2 << 20
    assert "base" in run("pack", "list", "p.img").output
    assert run("pack", "check", "p.img").output.startswith("sound: ")
    with (tmp_path / "p.img").open("r+b") as image:
        image.seek(1500)
        image.write(b"!")
    assert "wrong: base" in run("pack", "check", "p.img", status=1).output
    assert from_json(run("pack", "check", "p.img", "--json", status=1))["sound"] is False
    run("pack", "remove", "p.img", "base", "--trim")
    assert (tmp_path / "p.img").stat().st_size == 0


def test_from_a_container_image_to_a_pack(run: Run, tmp_path: Path) -> None:
    run("pack", "build", "layout", "p.img")
    manifest = Manifest.load(tmp_path / "p.img.json")
    assert len(manifest.layers) == 2
    assert all(layer.verity is not None for layer in manifest.layers)
    first = (tmp_path / "p.img").read_bytes()
    run("pack", "check", "p.img")
    run("pack", "build", "layout", "p.img", status=1)
    (tmp_path / "p.img").unlink()
    (tmp_path / "p.img.json").unlink()
    run("pack", "build", "layout", "p.img")
    assert (tmp_path / "p.img").read_bytes() == first
    assert not [each for each in tmp_path.iterdir() if each.name.startswith(".")]


def test_layers_into_a_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    built = from_json(run("layer", "build", "layout", "out", "--layers", "--json"))
    assert [Path(each["path"]).exists() for each in built] == [True, True]


def test_a_vhd_layer_can_be_packed(run: Run) -> None:
    run("layer", "build", "layer.tar", "a.vhd", "--filesystem", "ext4", "--verity", "--vhd")
    run("pack", "create", "p.img")
    added = from_json(run("pack", "add", "p.img", "a.vhd", "--json"))
    assert added["filesystem"] == "ext4"
    run("pack", "check", "p.img")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (("layer", "build", "layer.tar", "x", "--sidecar"), 2),
        (("layer", "build", "layer.tar", "x", "--dax", "--filesystem", "ext4"), 2),
        (("layer", "build", "layer.tar", "x", "--filesystem", "ntfs"), 2),
        (("layer", "build", "nothing", "x"), 1),
        (("layer", "build", "layer.tar", "nowhere/x"), 1),
        (("pack", "list", "nothing"), 1),
        (("pack", "add", "nothing", "layer.tar"), 1),
        (("pack", "check", "nothing"), 1),
        (("pack", "mount", "nothing", "--connect", "unix:///x"), 1),
    ],
)
def test_exit_status_of_errors(
    run: Run, tmp_path: Path, words: tuple[str, ...], status: int
) -> None:
    before = sorted(tmp_path.iterdir())
    output = run(*words, status=status).output
    assert "Traceback" not in output
    assert sorted(tmp_path.iterdir()) == before
    if status == 1:
        error = from_json(run(*words, "--json", status=1))["error"]
        assert error["code"] in ("not_found", "invalid")


def test_a_layer_without_a_tree_has_to_be_asked_for(run: Run) -> None:
    run("layer", "build", "layer.tar", "a.erofs")
    run("pack", "create", "p.img")
    assert "--no-verity" in run("pack", "add", "p.img", "a.erofs", status=1).output
    run("pack", "add", "p.img", "a.erofs", "--no-verity")
    assert from_json(run("pack", "list", "p.img", "--json"))["layers"][0]["verity"] is None


def test_a_wrong_root_digest_is_refused(run: Run) -> None:
    run("layer", "build", "layer.tar", "a.erofs", "--verity")
    run("pack", "create", "p.img")
    result = run("pack", "add", "p.img", "a.erofs", "--root-digest", "00" * 32, status=1)
    assert "integrity" in result.output


def test_a_pack_that_cannot_be_filled_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    add = Pack.add

    def one_only(pack: Pack, *arguments: Any, **options: Any) -> object:
        if pack.layers:
            raise CallError("resource", "the disk is full", step="copy the layer")
        return add(pack, *arguments, **options)

    monkeypatch.setattr(Pack, "add", one_only)
    assert "the disk is full" in run("pack", "build", "layout", "p.img", status=1).output
    assert sorted(tmp_path.iterdir()) == before
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run("pack", "build", "layout", "p.img")  # and is not in the way
    run("pack", "build", "layout", "p.img", status=1)
    assert len(Manifest.load(tmp_path / "p.img.json").layers) == 2  # that of another stays


def test_a_hostile_name_does_not_reach_the_terminal(run: Run, tmp_path: Path) -> None:
    (tmp_path / "evil.tar").write_bytes(make_tar([Member("../\x1b]0;owned\x07")]))
    output = run("layer", "build", "evil.tar", "x", status=1).output
    assert "owned" in output
    assert "\x1b" not in output
    assert "\x07" not in output


@pytest.mark.parametrize(
    ("options", "members", "kind"),
    [
        ((), [directory("d"), Member("d/.wh..wh..opq")], "trusted"),
        (("--whiteouts", "overlay-user"), [directory("d"), Member("d/.wh..wh..opq")], "user"),
        (("--whiteouts", "keep"), [directory("d"), Member("d/.wh..wh..opq")], "none"),
        (("--whiteouts", "keep"), [directory("d", xattrs={"user.overlay.opaque": b"y"})], "user"),
        ((), [directory("d"), Member("d/.wh.x")], "none"),
    ],
)
def test_a_pack_says_the_form_of_whiteouts(
    run: Run, tmp_path: Path, options: tuple[str, ...], members: list[Member], kind: str
) -> None:
    (tmp_path / "w.tar").write_bytes(make_tar(members))
    built = from_json(run("layer", "build", "w.tar", "w.erofs", "--json", *options))
    assert built["whiteouts"] == kind
    run("pack", "create", "p.img")
    run("pack", "add", "p.img", "w.erofs", "--no-verity", "--whiteouts", kind)
    assert Manifest.load(tmp_path / "p.img.json").layers[0].whiteouts == kind
    run("pack", "add", "p.img", "w.erofs", "--no-verity", "--id", "other")
    assert "whiteouts" not in json.loads((tmp_path / "p.img.json").read_text())["layers"][0]


def test_packs_of_images_say_the_form_of_whiteouts(run: Run, tmp_path: Path) -> None:
    hidden = [directory("etc"), Member("etc/.wh..wh..opq")]
    lower = [directory("etc"), Member("etc/hosts")]
    Layout(tmp_path / "image").layer(lower).layer(hidden).finish()
    run("pack", "build", "image", "p.img")
    kinds = [layer.whiteouts for layer in Manifest.load(tmp_path / "p.img.json").layers]
    assert kinds == ["trusted", "none"]


def test_no_output_replaces_an_input_of_the_command(run: Run, tmp_path: Path) -> None:
    run("pack", "create", "p.img")
    for name in ("manifest", "key.pem"):
        (tmp_path / name).write_bytes((tmp_path / "p.img.json").read_bytes())
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "key.pem"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for words in (
        ("sign", "--key", "key.pem", "manifest", "--signature", "manifest"),
        ("sign", "--key", "key.pem", "manifest", "--signature", "key.pem"),
        ("layer", "build", "layer.tar", "layer.tar"),
        ("layer", "build", "layout", "layout/index.json"),
        ("layer", "build", "layer.tar", ""),
        ("layer", "build", "layer.tar", "."),
        ("layer", "build", "layer.tar", "/"),
        ("layer", "format", "layer.tar", "--hash-file", "."),
    ):
        assert "cannot write the output" in run(*words, status=1).output
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_sign_refuses_json_other_than_a_manifest(run: Run, tmp_path: Path) -> None:
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", tmp_path / "key.pem"])
    (tmp_path / "policy.json").write_text('{"version": 2, "allow": []}')
    done = run("sign", "--key", "key.pem", "policy.json", status=1)
    assert "cannot read the manifest 'policy.json': layers: missing" in done.output
    assert not (tmp_path / "policy.json.sig").exists()
    run("pack", "create", "p.img")
    run("sign", "--key", "key.pem", "p.img.json")
    assert json.loads((tmp_path / "p.img.json.sig").read_text())["version"] == 2


@pytest.mark.parametrize("kind", ["user", "both"])
def test_layers_for_another_kind_of_overlay_are_not_overlaid(run: Run, kind: str) -> None:
    run("layer", "build", "layer.tar", "a.erofs")
    run("pack", "create", "p.img")
    run("pack", "add", "p.img", "a.erofs", "--no-verity", "--whiteouts", kind)
    mount = ("--wait", "0", "pack", "mount", "p.img", "--connect", "unix:///nowhere")
    assert "userxattr" in run(*mount, "--overlay", "o", status=1).output
    assert "userxattr" not in run(*mount, status=1).output


def test_a_sidecar_that_cannot_be_written_leaves_the_image_alone(run: Run, tmp_path: Path) -> None:
    run("layer", "build", "layer.tar", "a.erofs")
    (tmp_path / "a.erofs.dmverity").symlink_to("elsewhere")
    before = (tmp_path / "a.erofs").read_bytes()
    for words in (
        ("layer", "format", "a.erofs", "--sidecar"),
        ("layer", "build", "layer.tar", "a.erofs", "--verity", "--sidecar"),
    ):
        assert "a symbolic link" in run(*words, status=1).output
        assert (tmp_path / "a.erofs").read_bytes() == before


def test_an_error_of_an_image_advises_nothing_about_an_agent(tmp_path: Path) -> None:
    done = CliRunner().invoke(collect(), ["layer", "build", f"{tmp_path}/missing", f"{tmp_path}/o"])
    assert done.exit_code == 1
    assert "next:" not in done.stderr
