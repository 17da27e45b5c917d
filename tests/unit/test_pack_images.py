"""Images of a pack: merged and composed of its layers, and refused where that cannot be."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from guestagent.host.ctl.main import collect
from guestagent.storage.verity import PART_STEP_BYTES, VerityTerms
from rootfs.image.images import build_image
from rootfs.pack.manifest import Manifest, ManifestImage
from rootfs.pack.mounting import plan_image_mount
from rootfs.pack.pack import Pack
from rootfs.pack.pkcs7 import verify_root_digest
from rootfs.pack.signing import sign_manifest, verify_manifest
from rootfs.verity.formatter import LAYER_SALT, format_image
from rootfs.verity.verifier import verify_image
from tests.beds.calls import call_error
from tests.beds.imagebed import Member, directory, make_tar
from tests.beds.keybed import certificate_of, write_certificate, write_key
from vsock.errors import CallError

MIB = 1 << 20
#: Topmost first.
LAYERS = {
    "top": [directory("etc"), Member("etc/name", b"top\n"), Member("etc/.wh.gone")],
    "middle": [Member("large", os.urandom(700_000)), Member("middle", b"m" * 5000)],
    "base": [directory("etc"), Member("etc/name", b"base\n"), Member("etc/gone", b"gone\n")],
}


def layer_image(path: Path, members: list[Member], **options: object) -> Path:
    tar = path.with_suffix(".tar")
    tar.write_bytes(make_tar(members))
    build_image(tar, path, **options)  # type: ignore[arg-type]
    return path


def add_layers(pack: Pack, top: Path, *names: str) -> None:
    """Add layers by name, so that they lie in the file in that order."""
    for name in names:
        image = layer_image(top / f"{name}.erofs", LAYERS[name])
        made = format_image(image, terms=VerityTerms(salt=LAYER_SALT), workers=1)
        pack.add(image, name, verity=made.parameters, whiteouts="trusted")


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    with Pack.create(tmp_path / "p") as made:
        add_layers(made, tmp_path, "middle", "base", "top")
    return tmp_path / "p"


def put_together(pack: Path, image: ManifestImage, output: Path) -> Path:
    """Write what the linear device shows."""
    content = pack.read_bytes()
    output.write_bytes(
        b"".join(content[part.offset_bytes : part.end_bytes] for part in image.ranges)
    )
    return output


def test_an_image_is_verified_as_a_whole(pack: Path, tmp_path: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        image = opened.merge("app", ["top", "middle", "base"])
        assert opened.check().is_sound
    whole = put_together(pack, image, tmp_path / "whole")
    terms = VerityTerms(root_digest=image.verity.root_digest)
    assert verify_image(whole, terms=terms).intact
    if shutil.which("veritysetup"):
        offset = f"--hash-offset={image.verity.hash_offset_bytes}"
        root = image.verity.root_digest.hex()
        subprocess.run(["veritysetup", "verify", whole, whole, root, offset], check=True)
    loaded = Manifest.load(f"{pack}.json")
    assert loaded.images == (image,)
    assert image.layers == ("top", "middle", "base")


def test_images_share_the_data_of_layers(pack: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        before = {layer.layer_id: layer for layer in opened.layers}
        size = opened.manifest.size_bytes
        one = opened.merge("one", ["top", "base"])
        two = opened.merge("two", ["top", "middle", "base"])
        again = opened.merge("again", ["top", "base"])
        assert {layer.layer_id: layer for layer in opened.layers} == before
        assert opened.check().is_sound
        assert opened.manifest.size_bytes <= size + 4 * MIB
    assert one.ranges[1] == two.ranges[1] == before["top"].part_range
    assert again.verity == one.verity  # the same layers give the same image
    assert two.verity.root_digest != one.verity.root_digest


def test_the_order_of_the_layers_makes_another_image(pack: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        one = opened.merge("one", ["top", "base"])
        other = opened.merge("other", ["base", "top"])
    assert one.verity.root_digest != other.verity.root_digest


def test_a_layer_still_stands_alone(pack: Path, tmp_path: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "middle", "base"])
        layers = opened.layers
    content = pack.read_bytes()
    for layer in layers:
        assert layer.verity is not None
        alone = tmp_path / "alone"
        alone.write_bytes(content[layer.offset_bytes :][: layer.size_bytes])
        terms = VerityTerms(
            root_digest=layer.verity.root_digest, hash_offset_bytes=layer.verity.hash_offset_bytes
        )
        assert verify_image(alone, terms=terms).intact
        assert layer.part_range is not None
        assert layer.part_range.size_bytes % PART_STEP_BYTES == 0


def test_a_needed_layer_is_not_removed(pack: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "base"])
        with call_error("conflict", match="image 'app' needs it", object="base"):
            opened.remove("base")
        opened.remove("middle")
        assert opened.check().is_sound
        opened.remove("app")
        opened.remove("base", trim=True)
        assert opened.check().is_sound
        assert [layer.layer_id for layer in opened.layers] == ["top"]
    content = pack.read_bytes()
    top = Manifest.load(f"{pack}.json").layers[0]
    rest = content[: top.offset_bytes] + content[top.range.end_bytes :]
    assert not rest.strip(b"\0")


def test_ids_are_of_layers_and_images_alike(pack: Path, tmp_path: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "base"])
        for taken in ("app", "top"):
            with call_error("conflict", match="already"):
                opened.merge(taken, ["top"])
        with pytest.raises(CallError, match="already"):
            opened.add(tmp_path / "top.erofs", "app")


def damage(pack: Path, place: Callable[[Manifest], int]) -> None:
    at = place(Manifest.load(f"{pack}.json"))
    with pack.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def _of(name: str, where: str) -> Callable[[Manifest], int]:
    def place(manifest: Manifest) -> int:
        layer = manifest.find(name)
        assert layer is not None
        assert layer.verity is not None
        return (
            layer.offset_bytes
            + {
                "superblock": 1024 + 20,
                "inodes": 1024 + 200,
                "padding": layer.verity.data_size_bytes + 4000,
                "last hash block": layer.verity.end_bytes - 4096 + 7,
            }[where]
        )

    return place


@pytest.mark.parametrize("where", ["superblock", "inodes", "padding", "last hash block"])
def test_a_layer_that_changed_is_refused_and_nothing_is_made(pack: Path, where: str) -> None:
    damage(pack, _of("middle", where))
    before = pack.read_bytes(), Path(f"{pack}.json").read_bytes(), set(os.listdir(pack.parent))
    with Pack.open(pack, writable=True) as opened:
        with call_error("integrity", object="middle", match="middle"):
            opened.merge("app", ["top", "middle", "base"])
        assert opened.manifest.images == ()
    after = pack.read_bytes(), Path(f"{pack}.json").read_bytes(), set(os.listdir(pack.parent))
    assert after == before


@pytest.mark.parametrize(("name", "tail"), [("base", b"base\n"), ("middle", b"m" * 900)])
def test_a_tail_that_changed_is_not_copied_into_the_metadata(
    pack: Path, name: str, tail: bytes
) -> None:
    layer = Manifest.load(f"{pack}.json").find(name)
    assert layer is not None
    place = pack.read_bytes().index(tail, layer.offset_bytes)  # the metadata come first
    assert place < layer.range.end_bytes
    damage(pack, lambda _: place)
    with Pack.open(pack, writable=True) as opened, call_error("integrity", object=name):
        opened.merge("app", ["top", "middle", "base"])


def unchanged(opened: Pack, layers: list[str], match: str, code: str, name: str) -> None:
    before = opened.path.read_bytes(), opened.manifest
    with call_error(code, match=match, object=name):
        opened.merge("app", layers)
    assert (opened.path.read_bytes(), opened.manifest) == before


@pytest.mark.parametrize(
    ("terms", "match"),
    [
        (VerityTerms(salt=b"another"), "'odd' has the salt"),
        (VerityTerms(salt=LAYER_SALT, algorithm="sha512"), "'odd' has the algorithm"),
        (VerityTerms(salt=LAYER_SALT, hash_type=0), "'odd' has the hash_type"),
        (VerityTerms(salt=LAYER_SALT, data_block_size=1024), "'odd' has the data_block_size"),
        (VerityTerms(salt=LAYER_SALT, hash_block_size=1024), "'odd' has the hash_block_size"),
    ],
)
def test_layers_of_other_hash_trees_are_refused_by_name(
    pack: Path, tmp_path: Path, terms: VerityTerms, match: str
) -> None:
    image = layer_image(tmp_path / "odd.erofs", LAYERS["base"])
    made = format_image(image, terms=terms, workers=1)
    with Pack.open(pack, writable=True) as opened:
        opened.add(image, "odd", verity=made.parameters)
        unchanged(opened, ["top", "odd"], match, "invalid", "odd")


def test_layers_that_cannot_be_merged_are_refused_by_name(pack: Path, tmp_path: Path) -> None:
    squashfs = layer_image(tmp_path / "s", LAYERS["base"], filesystem="ext4")
    made = format_image(squashfs, terms=VerityTerms(salt=LAYER_SALT), workers=1)
    plain = layer_image(tmp_path / "plain.erofs", LAYERS["base"])
    with Pack.open(pack, writable=True) as opened:
        opened.add(squashfs, "ext", filesystem="ext4", verity=made.parameters)
        opened.add(plain, "plain")
        unchanged(opened, ["top", "ext"], "it is ext4, not erofs", "invalid", "ext")
        unchanged(opened, ["top", "plain"], "no hash tree", "invalid", "plain")
        unchanged(opened, ["top", "none"], "no layer 'none'", "not_found", "none")
        unchanged(opened, ["top", "base", "top"], "named twice", "invalid", "top")
        unchanged(opened, [], "no layers", "invalid", None)  # type: ignore[arg-type]


def test_whiteouts_of_the_other_kind_are_refused(pack: Path, tmp_path: Path) -> None:
    image = layer_image(tmp_path / "user.erofs", LAYERS["base"])
    made = format_image(image, terms=VerityTerms(salt=LAYER_SALT), workers=1)
    with Pack.open(pack, writable=True) as opened:
        opened.add(image, "user", verity=made.parameters, whiteouts="user")
        unchanged(opened, ["user", "base"], "of the kind user", "invalid", "user")


@pytest.mark.skipif(shutil.which("mkfs.erofs") is None, reason="mkfs.erofs is not installed")
def test_compressed_layers_are_refused_by_name(pack: Path, tmp_path: Path) -> None:
    members = [Member("zeros", bytes(100_000))]
    image = layer_image(tmp_path / "z.erofs", members, compression="lz4hc")
    made = format_image(image, terms=VerityTerms(salt=LAYER_SALT), workers=1)
    with Pack.open(pack, writable=True) as opened:
        opened.add(image, "compressed", verity=made.parameters)
        unchanged(opened, ["top", "compressed"], "compress", "unsupported", "compressed")


def test_a_layer_of_an_earlier_version_is_refused(pack: Path) -> None:
    path = Path(f"{pack}.json")
    manifest = json.loads(path.read_text())
    del manifest["images"]
    manifest["version"] = 1
    for layer in manifest["layers"]:
        layer["verity"]["hash_offset_bytes"] = layer["verity"]["data_blocks"] * 4096
    path.write_text(json.dumps(manifest))
    with Pack.open(pack, writable=True) as opened:
        unchanged(opened, ["top", "base"], "add it again", "invalid", "top")


@pytest.mark.parametrize("part", range(5))
def test_check_finds_damage_at_any_place_of_an_image(pack: Path, part: int) -> None:
    with Pack.open(pack, writable=True) as opened:
        image = opened.merge("app", ["top", "middle", "base"])
    extent = image.ranges[part]
    ids = ("app", "top", "middle", "base", "app")
    first = 4096 if part == 4 else 1030  # between superblock and tree nothing is read
    for at in (extent.offset_bytes + first, extent.end_bytes - 1):
        damage(pack, lambda _, at=at: at)  # type: ignore[misc]
        with Pack.open(pack) as opened:
            found = [finding.layer_id for finding in opened.check().findings]
        damage(pack, lambda _, at=at: at)  # type: ignore[misc]
        assert found == [ids[part]], at


def test_a_check_compares_the_manifest_with_the_trees(pack: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "base"])
    path = Path(f"{pack}.json")
    good = json.loads(path.read_text())
    for field, value, problem in (
        ("root_digest", "00" * 32, "root digest"),
        ("salt", "00", "other parameters"),
    ):
        manifest = json.loads(json.dumps(good))
        manifest["images"][0]["verity"][field] = value
        path.write_text(json.dumps(manifest))
        with Pack.open(pack) as opened:
            (finding,) = opened.check().findings
        assert finding.layer_id == "app"
        assert problem in finding.problem


def test_a_full_disk_leaves_the_pack_as_it_was(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Pack.open(pack, writable=True) as opened:
        with monkeypatch.context() as patch:
            patch.setattr(os, "copy_file_range", full)
            unchanged(opened, ["top", "base"], "No space left", "resource", str(pack))
        opened.merge("app", ["top", "base"])
        assert opened.check().is_sound


def test_a_process_that_dies_before_the_manifest_leaves_a_sound_pack(pack: Path) -> None:
    manifest = Path(f"{pack}.json")
    before = manifest.read_bytes()
    with Pack.open(pack, writable=True) as opened:
        image = opened.merge("lost", ["top", "base"])
    manifest.write_bytes(before)
    with Pack.open(pack, writable=True) as opened:
        assert opened.check().is_sound
        assert opened.merge("app", ["top", "base"]).ranges == image.ranges
        assert opened.check().is_sound


def test_a_pack_that_is_read_only_is_not_merged(pack: Path) -> None:
    with Pack.open(pack) as opened, pytest.raises(CallError, match="reading only"):
        opened.merge("app", ["top"])


def test_a_signature_is_over_the_images_too(pack: Path) -> None:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "base"])
        signed = opened.manifest.to_json()
    key = ed25519.Ed25519PrivateKey.generate()
    signature = sign_manifest(signed, key)
    verify_manifest(json.loads(Path(f"{pack}.json").read_text()), signature, key.public_key())
    changed = json.loads(json.dumps(signed))
    changed["images"][0]["layers"].reverse()
    with pytest.raises(CallError) as caught:
        verify_manifest(changed, signature, key.public_key())
    assert caught.value.object == "digest"


def test_root_digests_of_layers_and_images_are_signed_in_the_manifest(
    pack: Path, tmp_path: Path
) -> None:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "base"])
    signer = ec.generate_private_key(ec.SECP256R1())
    certificate = certificate_of(signer)
    words = ["pack", "sign", str(pack), "--key", str(write_key(tmp_path / "key", signer))]
    assert CliRunner().invoke(collect(), words).exit_code == 2
    words += ["--certificate", str(write_certificate(tmp_path / "crt", certificate)), "--json"]
    done = CliRunner().invoke(collect(), words)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout) == {"signed": ["top", "base", "middle", "app"]}
    signed = Manifest.load(f"{pack}.json")
    for each in (*signed.layers, *signed.images):
        assert each.verity is not None
        assert each.signature is not None
        verify_root_digest(each.verity.root_digest, each.signature, certificate)
    with Pack.open(pack, writable=True) as opened:
        assert opened.check().is_sound
        opened.remove("app")
        opened.merge("other", ["top"])
        assert opened.manifest.layers == signed.layers
        assert opened.manifest.images[0].signature is None
        with pytest.raises(CallError, match="has no layer 'none'"):
            opened.sign({"none": b"signature"})
        with pytest.raises(CallError, match="has 0 bytes, not 1 to"):
            opened.sign({"top": b""})
        assert Manifest.load(f"{pack}.json") == opened.manifest
        opened.sign({})
        assert not opened.manifest.is_signed


# --- how an image is mounted

DEVICE: dict[str, object] = {"kind": "pmem", "number": 0}


@pytest.fixture
def merged(pack: Path) -> Manifest:
    with Pack.open(pack, writable=True) as opened:
        opened.merge("app", ["top", "base"])
        return opened.manifest


@pytest.mark.parametrize(
    ("features", "form", "expected", "reason"),
    [
        (("erofs-flattened",), None, "merged", "4 ranges: Linux 6.x has erofs-flattened"),
        (("fs-erofs",), None, "overlay", "2 layers: Linux 6.x has no erofs-flattened"),
        (("erofs-flattened",), "overlay", "overlay", "2 layers: it was asked for"),
        (("erofs-flattened",), "merged", "merged", "4 ranges: it was asked for"),
    ],
)
def test_the_form_follows_from_the_guest_and_the_wish(
    merged: Manifest, features: tuple[str, ...], form: str | None, expected: str, reason: str
) -> None:
    plan = plan_image_mount(
        merged, merged.images[0], DEVICE, features=features, kernel="6.x", form=form
    )
    assert plan.form == expected
    assert reason in plan.reason
    assert plan.layer_ids == (("app",) if expected == "merged" else ("top", "base"))


def test_a_form_that_the_guest_has_not_is_refused(merged: Manifest) -> None:
    with call_error("unsupported", match=r"Linux 6\.1\.0 has no erofs-flattened", object="app"):
        plan_image_mount(
            merged, merged.images[0], DEVICE, features=(), kernel="6.1.0", form="merged"
        )


def test_the_commands_of_images(pack: Path) -> None:
    def run(*words: object, status: int = 0) -> dict[str, Any]:
        done = CliRunner().invoke(collect(), ["--json", *map(str, words)])
        assert done.exit_code == status, done.output
        found = json.loads(done.stdout)
        assert isinstance(found, dict)
        return found

    made = run("image", "merge", pack, "--id", "app", "--layers", "top,middle,base")
    assert made["layers"] == ["top", "middle", "base"]
    assert run("pack", "list", pack)["images"] == [made]
    assert run("pack", "check", pack)["sound"] is True
    error = run("pack", "remove", pack, "base", status=1)["error"]
    assert (error["code"], error["object"]) == ("conflict", "base")
    error = run("image", "merge", pack, "--id", "app", "--layers", "top", status=1)["error"]
    assert error["code"] == "conflict"
    assert run("pack", "remove", pack, "app")["id"] == "app"
    text = CliRunner().invoke(collect(), ["pack", "list", str(pack)]).stdout
    assert len(text.splitlines()) == 3
