"""Manifests: exact refusals, the same judgement as the published schema, whole replacement."""

import copy
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from guestagent.api import LayerSpec
from guestagent.storage.verity import FieldError
from rootfs.pack.manifest import Manifest, image_spec, layer_spec
from tests.beds.calls import call_error
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

SCHEMAS = Path(__file__).resolve().parents[2] / "rootfs/schema"
MIB = 1 << 20
STEP = 512 << 10

GOOD: dict[str, object] = {
    "version": 2,
    "image": "pack.img",
    "size_bytes": 8 * MIB,
    "alignment_bytes": 4096,
    "layers": [
        {
            "id": "top",
            "offset_bytes": MIB,
            "size_bytes": 2 * MIB,
            "filesystem": "erofs",
            "verity": {
                "root_digest": "ab" * 32,
                "salt": "00ff",
                "algorithm": "sha256",
                "hash_type": 1,
                "data_blocks": 200,
                "data_block_size": 4096,
                "hash_block_size": 4096,
                "hash_offset_bytes": MIB,
                "superblock": True,
                "signature": "3082",
            },
            "source_digest": "sha256:" + "0" * 64,
            "content_digest": None,
            "whiteouts": "trusted",
        },
        {
            "id": "base",
            "offset_bytes": 0,
            "size_bytes": MIB,
            "filesystem": "squashfs",
            "verity": None,
        },
    ],
    "images": [
        {
            "id": "app",
            "layers": ["top"],
            "ranges": [
                {"offset_bytes": 4 * MIB, "size_bytes": STEP},
                {"offset_bytes": MIB, "size_bytes": MIB},
                {"offset_bytes": 4 * MIB + STEP, "size_bytes": 5 * 4096},
            ],
            "verity": {
                "root_digest": "cd" * 32,
                "salt": "00ff",
                "algorithm": "sha256",
                "hash_type": 1,
                "data_blocks": 384,
                "data_block_size": 4096,
                "hash_block_size": 4096,
                "hash_offset_bytes": 384 * 4096,
                "superblock": True,
                "signature": "3083",
            },
        }
    ],
}

Change = Callable[[dict], object]  # type: ignore[type-arg]


def _set(*path: object) -> Change:
    *parents, key, value = path

    def change(manifest: dict) -> None:  # type: ignore[type-arg]
        for parent in parents:
            manifest = manifest[parent]
        manifest[key] = value

    return change


def _delete(*path: object) -> Change:
    *parents, key = path

    def change(manifest: dict) -> None:  # type: ignore[type-arg]
        for parent in parents:
            manifest = manifest[parent]
        del manifest[key]

    return change


VERITY = ("layers", 0, "verity")
IMAGE = ("images", 0)
#: What is wrong, and the field that is named.
WRONG: list[tuple[Change, str]] = [
    (_set("version", 0), "version"),
    (_set("version", "1"), "version"),
    (_set("version", True), "version"),
    (_delete("version"), "version"),
    (_set("image", "../other"), "image"),
    (_set("image", ".."), "image"),
    (_set("image", ""), "image"),
    (_set("image", 7), "image"),
    (_set("size_bytes", 8 * MIB + 4096), "size_bytes"),
    (_set("size_bytes", -2 * MIB), "size_bytes"),
    (_set("size_bytes", 1.5), "size_bytes"),
    (_set("alignment_bytes", 512), "alignment_bytes"),
    (_set("alignment_bytes", 12288), "alignment_bytes"),
    (_set("layers", {}), "layers"),
    (_set("layers", 0, []), "layers[0]"),
    (_set("extra", 1), "extra"),
    (_set("layers", 1, "extra", 1), "layers[1].extra"),
    (_delete("layers", 1, "verity"), "layers[1].verity"),
    (_set("layers", 0, "id", "a b"), "layers[0].id"),
    (_set("layers", 0, "id", "-a"), "layers[0].id"),
    (_set("layers", 0, "id", "a" * 65), "layers[0].id"),
    (_set("layers", 0, "id", "a\n"), "layers[0].id"),
    (_set("layers", 0, "offset_bytes", 100), "layers[0].offset_bytes"),
    (_set("layers", 0, "size_bytes", 0), "layers[0].size_bytes"),
    (_set("layers", 0, "filesystem", "ext2"), "layers[0].filesystem"),
    (_set("layers", 0, "source_digest", "sha256:" + "A" * 64), "layers[0].source_digest"),
    (_set("layers", 0, "whiteouts", "overlay"), "layers[0].whiteouts"),
    (_set("layers", 0, "whiteouts", True), "layers[0].whiteouts"),
    (_set("layers", 0, "source_digest", 5), "layers[0].source_digest"),
    (_set(*VERITY, {}), "layers[0].verity.root_digest"),
    (_set(*VERITY, "root_digest", "AB" * 32), "layers[0].verity.root_digest"),
    (_set(*VERITY, "root_digest", "ab" * 31), "layers[0].verity.root_digest"),
    (_set(*VERITY, "salt", "0"), "layers[0].verity.salt"),
    (_set(*VERITY, "salt", "00" * 257), "layers[0].verity.salt"),
    (_set(*VERITY, "algorithm", "md5"), "layers[0].verity.algorithm"),
    (_set(*VERITY, "hash_type", 2), "layers[0].verity.hash_type"),
    (_set(*VERITY, "data_blocks", 0), "layers[0].verity.data_blocks"),
    (_set(*VERITY, "superblock", 1), "layers[0].verity.superblock"),
    (_set(*VERITY, "fec", None), "layers[0].verity.fec"),
    (_delete("images"), "images"),
    (_set("images", {}), "images"),
    (_set("images", 0, None), "images[0]"),
    (_set(*IMAGE, "id", "-"), "images[0].id"),
    (_set(*IMAGE, "layers", []), "images[0].layers"),
    (_set(*IMAGE, "layers", 0, 7), "images[0].layers[0]"),
    (_set(*IMAGE, "layers", ["top", "top"]), "images[0].layers"),
    (_set(*IMAGE, "ranges", []), "images[0].ranges"),
    (_set(*IMAGE, "ranges", 0, "offset_bytes", 100), "images[0].ranges[0].offset_bytes"),
    (_set(*IMAGE, "ranges", 2, "size_bytes", 0), "images[0].ranges[2].size_bytes"),
    (_set(*IMAGE, "ranges", 2, "end_bytes", 0), "images[0].ranges[2].end_bytes"),
    (_set(*IMAGE, "verity", None), "images[0].verity"),
    (_set(*IMAGE, "verity", "salt", "0"), "images[0].verity.salt"),
    (_set(*IMAGE, "extra", 1), "images[0].extra"),
    (_set(*VERITY, "signature", None), "layers[0].verity.signature"),
    (_set(*VERITY, "signature", ""), "layers[0].verity.signature"),
    (_set(*VERITY, "signature", "30820"), "layers[0].verity.signature"),
    (_set(*VERITY, "signature", "MIIB"), "layers[0].verity.signature"),
    (_set(*VERITY, "signature", "00" * 65537), "layers[0].verity.signature"),
    (_set("layers", 1, "signature", "3082"), "layers[1].signature"),
    (_set(*IMAGE, "verity", "signature", ""), "images[0].verity.signature"),
    (_set(*IMAGE, "verity", "signature", 3), "images[0].verity.signature"),
]
#: What a schema cannot see.
BEYOND: list[tuple[Change, str]] = [
    (_set("layers", 0, "id", "base"), "layers[1].id"),
    (_set("layers", 1, "size_bytes", 2 * MIB), "layers"),
    (_set("layers", 0, "offset_bytes", 512 + MIB), "layers[0].offset_bytes"),
    (_set("layers", 0, "offset_bytes", 8 * MIB), "layers[0].size_bytes"),
    (_set(*VERITY, "data_blocks", 600), "layers[0].verity"),
    (_set(*VERITY, "root_digest", "ab" * 20), "layers[0].verity.root_digest"),
    (_set(*VERITY, "data_block_size", 1000), "layers[0].verity.data_block_size"),
    (_set(*VERITY, "hash_block_size", 1000), "layers[0].verity.hash_block_size"),
    (_set(*VERITY, "hash_offset_bytes", 100), "layers[0].verity.hash_offset_bytes"),
    (_set(*VERITY, "hash_offset_bytes", 200 * 4096), "images[0].layers[0]"),
    (_set("layers", 0, "filesystem", "squashfs"), "images[0].layers[0]"),
    (_set("layers", 0, "verity", None), "images[0].layers[0]"),
    (_set(*IMAGE, "id", "base"), "images[0].id"),
    (_set(*IMAGE, "layers", 0, "none"), "images[0].layers[0]"),
    (_set(*IMAGE, "layers", 0, "base"), "images[0].layers[0]"),
    (_set(*IMAGE, "layers", ["top", "base"]), "images[0].ranges"),
    (_set(*IMAGE, "ranges", 1, "offset_bytes", 2 * MIB), "images[0].ranges"),
    (_set(*IMAGE, "ranges", 1, "size_bytes", STEP), "images[0].verity.data_blocks"),
    (_set(*IMAGE, "ranges", 0, "size_bytes", 4096), "images[0].ranges[0].size_bytes"),
    (_set(*IMAGE, "ranges", 0, "offset_bytes", 0), "layers"),
    (_set(*IMAGE, "ranges", 0, "offset_bytes", 8 * MIB), "images[0].ranges[0].size_bytes"),
    (_set(*IMAGE, "ranges", 2, "size_bytes", 4 * 4096), "images[0].ranges[2].size_bytes"),
    (_set(*IMAGE, "ranges", 2, "offset_bytes", 8 * MIB), "images[0].ranges[2].size_bytes"),
    (_set(*IMAGE, "verity", "data_blocks", 256), "images[0].verity.data_blocks"),
    (_set(*IMAGE, "verity", "hash_offset_bytes", 385 * 4096), "images[0].verity.hash_offset_bytes"),
]


def changed(change: Change) -> dict[str, object]:
    value = copy.deepcopy(GOOD)
    change(value)
    return value


def test_a_manifest_survives_the_file(tmp_path: Path) -> None:
    manifest = Manifest.from_json(GOOD)
    manifest.save(tmp_path / "m.json")
    assert Manifest.load(tmp_path / "m.json") == manifest
    assert [layer.layer_id for layer in manifest.layers] == ["top", "base"]


@pytest.mark.parametrize(("change", "field"), WRONG + BEYOND)
def test_invalid_field_of_a_manifest_is_named_by_its_path(change: Change, field: str) -> None:
    with pytest.raises(FieldError) as caught:
        Manifest.from_json(changed(change))
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")


def test_the_schema_judges_alike() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SCHEMAS / "manifest-v2.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid(GOOD)
    assert validator.is_valid(Manifest.from_json(GOOD).to_json())
    for change, field in WRONG:
        # patterns of ECMA-262 have no \Z: a final line break passes
        if "\n" not in json.dumps(changed(change)).replace("\\n", "\n"):
            assert not validator.is_valid(changed(change)), field


def former() -> dict[str, object]:
    """Return a manifest of version 1."""
    value = copy.deepcopy(GOOD)
    value["version"] = 1
    del value["images"]
    del value["layers"][0]["verity"]["signature"]  # type: ignore[index]
    return value


def test_version_1_is_read_as_it_was_published() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SCHEMAS / "manifest-v1.json").read_text())
    assert jsonschema.Draft202012Validator(schema).is_valid(former())
    manifest = Manifest.from_json(former())
    top, base = Manifest.from_json(GOOD).layers
    assert manifest.layers == (dataclasses.replace(top, signature=None), base)
    assert manifest.images == ()
    with pytest.raises(FieldError) as caught:
        Manifest.from_json({**former(), "images": []})
    assert caught.value.field == "images"


def test_version_1_has_no_signatures() -> None:
    signed = copy.deepcopy(GOOD)
    signed["version"] = 1
    del signed["images"]
    with pytest.raises(FieldError) as caught:
        Manifest.from_json(signed)
    assert caught.value.field == "layers[0].verity.signature"


def test_a_later_version_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "m").write_text(json.dumps({"version": 3, "segments": []}))
    with call_error("unsupported", match="3 is later than 2", object="version"):
        Manifest.load(tmp_path / "m")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"version": 1, "version": 1}', "[" * 100_000, "\x00", "\xff"]
)
def test_manifest_load_refuses_invalid_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "m").write_bytes(text.encode("latin-1"))
    with call_error("invalid"):
        Manifest.load(tmp_path / "m")


def test_a_manifest_that_is_too_large_or_no_file(tmp_path: Path) -> None:
    sparse_file((tmp_path / "m"), (16 << 20) + 1)
    with call_error("resource"):
        Manifest.load(tmp_path / "m")
    with call_error("invalid"):
        Manifest.load(tmp_path)
    with call_error("not_found"):
        Manifest.load(tmp_path / "none")


def test_request_of_a_manifest_is_accepted_by_the_contract() -> None:
    manifest = Manifest.from_json(GOOD)
    top = LayerSpec.from_wire(layer_spec(manifest.layers[0], {"kind": "pmem", "number": 3}))
    assert top.verity is not None
    assert top.mapping is not None
    assert (top.mapping.offset_bytes, top.mapping.size_bytes) == (MIB, 2 * MIB)
    assert top.verity.root_digest == b"\xab" * 32
    assert top.verity.salt == b"\x00\xff"
    assert top.verity.hash_offset_bytes == MIB
    base = LayerSpec.from_wire(layer_spec(manifest.layers[1], {"kind": "path", "path": "/dev/vdb"}))
    assert base.verity is None
    app = LayerSpec.from_wire(image_spec(manifest.images[0], {"kind": "pmem", "number": 3}))
    assert app.verity is not None
    assert (top.verity.signature, app.verity.signature) == (b"\x30\x82", b"\x30\x83")


def test_a_layer_that_is_not_verified_has_no_signature() -> None:
    base = Manifest.from_json(GOOD).layers[1]
    with pytest.raises(FieldError, match="signature: there is no root digest"):
        dataclasses.replace(base, signature=b"\x30")


def test_a_field_that_comes_twice_among_very_many_is_found_at_once(tmp_path: Path) -> None:
    names = ", ".join(f'"n{number}": 1' for number in range(200_000))
    (tmp_path / "m.json").write_text("{" + names + ', "n199999": 2}')
    start = time.process_time()
    with pytest.raises(CallError, match="n199999: given twice"):
        Manifest.load(tmp_path / "m.json")
    assert time.process_time() - start < 5  # by the square of the number, it would be minutes


def test_a_pipe_is_no_manifest_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.json")
    with pytest.raises(CallError, match="not a regular file"):
        Manifest.load(tmp_path / "m.json")
