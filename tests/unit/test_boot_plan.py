"""What is to be mounted at boot, from settings and manifests; and what they may not say."""

import hashlib
import json
from pathlib import Path

import pytest

from guestagent.api import (
    ByteRange,
    DeviceScratch,
    DirectoryScratch,
    LabelDevice,
    PathDevice,
    ThinScratch,
    TmpfsScratch,
    Verity,
)
from guestagent.api.devices import VerityTerms
from guestagent.api.overlays import Scratch
from guestagent.api.texts import scratch_from_text
from guestagent.boot.plan import BootPlan, plan_boot
from tests.beds.calls import call_error
from vsock.errors import CallError

ROOT = "ab" * 32
VDA = PathDevice(path="/dev/vda")


def layer(name: str, device: str = "pmem:0") -> str:
    return f"{device},id={name},offset=0,size=4096,root={ROOT}"


def listed(name: str, ranges: str) -> str:
    return f"pmem:0,id={name},ranges={ranges},root={ROOT}"


def manifest(path: Path, **changes: object) -> Path:
    verity = {
        "root_digest": ROOT, "salt": "", "algorithm": "sha256", "hash_type": 1, "data_blocks": 1,
        "data_block_size": 4096, "hash_block_size": 4096, "hash_offset_bytes": 4096,
        "superblock": True,
    }  # fmt: skip
    layers = [
        {"id": name, "offset_bytes": 8192 * index, "size_bytes": 8192, "filesystem": "erofs",
         "verity": verity, "source_digest": None, "content_digest": None}
        for index, name in enumerate(("upper", "lower"))
    ]  # fmt: skip
    document = {"version": 1, "image": "pack.img", "size_bytes": 16384, "alignment_bytes": 4096}
    path.write_text(json.dumps(document | {"layers": layers} | changes))
    return path


def planned(
    layers: tuple[str, ...],
    overlay: str | None = None,
    manifests: tuple[str, ...] = (),
    *,
    flattens_erofs: bool = False,
) -> BootPlan:
    """Return the plan of settings that ask for something."""
    plan = plan_boot(layers, overlay, manifests, flattens_erofs=flattens_erofs)
    assert plan is not None
    return plan


def test_nothing_is_asked_for() -> None:
    assert plan_boot((), None, ()) is None


def test_one_layer_is_the_root_itself() -> None:
    plan = planned((layer("a"),))
    assert plan.overlay is None
    assert plan.root_target == "/run/layers/a"


def test_layer_text_takes_whiteouts_and_readonly_policy() -> None:
    text = f"{layer('a', 'label:base')},readonly_policy=error,whiteouts=user"
    plan = planned((text,))
    (spec,) = plan.layers
    assert spec.device == LabelDevice(label="base")
    assert (spec.readonly_policy, spec.whiteouts) == ("error", "user")


def test_the_root_is_not_left_out() -> None:
    ignored = f"{layer('a')},readonly_policy=ignore"
    with pytest.raises(CallError, match="layer 'a' is the root, and not to be left out"):
        plan_boot((ignored,), None, ())
    assert plan_boot((ignored, layer("b")), None, ()) is not None


def test_a_layer_may_say_all_that_defines_its_hash_tree() -> None:
    tree = "salt=0a0b,algorithm=sha256,hash_type=1,data_blocks=4,data_block_size=512"
    plan = planned((f"{layer('a')},{tree},hash_block_size=4096,hash_offset=0x1000",))
    assert plan.layers[0].verity == Verity(
        root_digest=bytes.fromhex(ROOT),
        salt=b"\n\v",
        algorithm="sha256",
        hash_type=1,
        data_blocks=4,
        data_block_size=512,
        hash_block_size=4096,
        hash_offset_bytes=4096,
    )
    plan = planned((f"{layer('a')},salt=-",))
    assert plan.layers[0].verity == Verity(root_digest=bytes.fromhex(ROOT), salt=b"")


def test_a_layer_may_name_the_signature_of_its_root_digest(tmp_path: Path) -> None:
    path = tmp_path / "a.p7s"
    path.write_bytes(b"\x30\x82")
    plan = planned((f"{layer('a')},signature={path}",))
    assert plan.layers[0].verity == Verity(root_digest=bytes.fromhex(ROOT), signature=b"\x30\x82")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "signature '.*a.p7s' cannot be read: No such file"),
        (b"", "signature length must be in 1"),
        (b"s" * 65537, "signature '.*a.p7s' is larger than 65536 bytes"),
    ],
)
def test_a_signature_that_cannot_be_used_ends_the_boot(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    path = tmp_path / "a.p7s"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CallError, match=problem):
        plan_boot((f"{layer('a')},signature={path}",), None, ())


@pytest.mark.parametrize("flattens_erofs", [True, False])
def test_a_manifest_may_hold_signatures(tmp_path: Path, flattens_erofs: bool) -> None:
    path = image_manifest(tmp_path / "m.json")
    document = json.loads(path.read_text())
    for each in (*document["layers"], *document["images"]):
        each["verity"]["signature"] = each["id"].encode().hex()
    path.write_text(json.dumps(document))
    plan = planned((), None, (f"{path},pmem:0,image=app",), flattens_erofs=flattens_erofs)
    found = [spec.verity.signature for spec in plan.layers if spec.verity is not None]
    assert found == ([b"app"] if flattens_erofs else [b"upper", b"lower"])


def test_a_manifest_says_all_that_defines_a_hash_tree(tmp_path: Path) -> None:
    plan = planned((), None, (f"{manifest(tmp_path / 'm.json')},pmem:0",))
    for spec in plan.layers:
        assert spec.verity is not None
        assert None not in [getattr(spec.verity, name) for name in VerityTerms._fields]


def test_several_layers_are_overlaid_in_their_order() -> None:
    plan = planned((layer("a"), layer("b", "pmem:1")))
    assert plan.overlay is not None
    assert (plan.overlay.overlay_id, plan.overlay.layers) == ("root", ("a", "b"))
    assert plan.overlay.scratch is None
    assert plan.root_target == "/run/overlays/root"


def test_the_overlay_can_be_named_and_get_a_scratch() -> None:
    text = "sys,layers=b+a,scratch=tmpfs:4096"
    plan = planned((layer("a"), layer("b", "pmem:1")), text, ())
    assert plan.overlay is not None
    assert (plan.overlay.overlay_id, plan.overlay.layers) == ("sys", ("b", "a"))
    assert plan.overlay.scratch == TmpfsScratch(size_bytes=4096)


def test_a_layer_may_be_of_several_ranges() -> None:
    plan = planned((listed("a", "8192+4096:0+0x1000"),))
    assert plan.layers[0].mapping == (
        ByteRange(offset_bytes=8192, size_bytes=4096),
        ByteRange(offset_bytes=0, size_bytes=4096),
    )
    assert plan_boot((listed("a", "0+4096"),), None, ()) == plan_boot((layer("a"),), None, ())


def test_manifest_gives_layers_with_their_verity_parameters(tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    plan = planned((), None, (f"{path},virtio-blk:pack,sha256={digest.upper()}",))
    assert plan.overlay is not None
    assert plan.overlay.layers == ("upper", "lower")
    lower = plan.layers[1]
    assert lower.mapping is not None
    assert (lower.device.kind, lower.mapping.offset_bytes) == ("virtio-blk", 8192)
    assert lower.verity is not None
    assert lower.verity.root_digest.hex() == ROOT


@pytest.mark.parametrize(
    ("layers", "overlay", "problem"),
    [
        ((), "root", "without any layer"),
        ((layer("a"), layer("a")), None, "'a' is named twice"),
        ((layer("a"),), "root,layers=b", "'b', which is no layer"),
        ((layer("a"),), "root,layers=a+a", "a"),
        ((layer("a/b"),), None, "a/b"),
        ((layer("a") + ",salt=xyz",), None, "salt is not hexadecimal"),
        ((layer("a") + ",salt=a b",), None, "salt is not hexadecimal"),
        ((layer("a") + ",hash_type=2",), None, "hash_type"),
        ((layer("a") + ",data_block_size=8192",), None, "data_block_size"),
        ((layer("a") + ",algorithm=md5",), None, "algorithm"),
        ((layer("a").replace(ROOT, "none") + ",salt=",), None, "salt contradicts root=none"),
        (
            (layer("a").replace(ROOT, "none") + ",signature=/a",),
            None,
            "signature contradicts root=none",
        ),
        ((layer("a").replace(ROOT, "abcd"),), None, "2 bytes"),
        ((layer("a", "pmem:x"),), None, "'x' is no number"),
        ((layer("a", "pmem:1_0"),), None, "'1_0' is no number"),
        ((layer("a", "pmem:+1"),), None, r"'\+1' is no number"),
        ((layer("a") + ",ranges=0+512",), None, "ranges contradicts offset"),
        ((listed("a", ""),), None, "range 0: expected OFFSET"),
        ((listed("a", "0+512:7"),), None, "range 1: expected OFFSET"),
        ((listed("a", "0+512:-512+512"),), None, "'-512' is no number"),
        ((listed("a", "0+512:512+7"),), None, "size_bytes 7 is not a multiple"),
        ((listed("a", "0+512:512+0"),), None, "size_bytes must be in 1"),
        ((listed("a", ":".join(["0+512"] * 4097)),), None, "got 4097"),
        ((layer("a"),), "root,layers=a,layers=a", "layers=a"),
        ((layer("a", "tape:0"),), None, "tape:0"),
    ],
)
def test_settings_that_contradict_each_other(
    layers: tuple[str, ...], overlay: str | None, problem: str
) -> None:
    with call_error("invalid", match=problem):
        plan_boot(layers, overlay, ())


@pytest.mark.parametrize(
    ("text", "code", "problem"),
    [
        ("{path}", "invalid", "which device"),
        ("{path},pmem:0,md5=00", "invalid", "no part of PATH"),
        ("{path}.not,pmem:0", "invalid", "cannot be read: No such file"),
        ("{path},pmem:0,sha256=" + "00" * 32, "integrity", "has the digest"),
        ("{path},pmem:0,sha256=", "integrity", "has the digest"),
        ("{path},pmem:0,sha256=" + "00" * 32 + ",sha256={digest}", "invalid", "given twice"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path: Path, text: str, code: str, problem: str) -> None:
    path = manifest(tmp_path / "m.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with call_error(code, match=problem):
        plan_boot((), None, (text.format(path=path, digest=digest),))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 3}, "version 3 is not known"),
        ({"version": True}, "version True is not known"),
        ({"layers": {}}, "layers is no list"),
        ({"layers": []}, "no layer is named"),
        ({"layers": ["a"]}, "layers holds what is no map"),
        ({"layers": [{"id": "a"}]}, "does not say its verity"),
        ({"layers": [{"id": "a", "verity": None}]}, "offset_bytes"),
        (
            {"layers": [{"id": "a", "verity": None, "offset_bytes": 0, "size_bytes": 512}]},
            "filesystem",
        ),
    ],
)
def test_a_manifest_with_another_content(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    path = manifest(tmp_path / "m.json", **changes)
    with pytest.raises(CallError, match=problem):
        plan_boot((), None, (f"{path},pmem:0",))


def image_manifest(path: Path, **changes: object) -> Path:
    """Write a manifest of version 2 with an image of both layers."""
    verity = {
        "root_digest": "cd" * 32, "salt": "", "algorithm": "sha256", "hash_type": 1,
        "data_blocks": 384, "data_block_size": 4096, "hash_block_size": 4096,
        "hash_offset_bytes": 384 * 4096, "superblock": True,
    }  # fmt: skip
    step = 512 << 10
    image = {
        "id": "app",
        "layers": ["upper", "lower"],
        "ranges": [{"offset_bytes": n * step, "size_bytes": step} for n in (8, 0, 2, 9)],
        "verity": verity,
    }
    return manifest(path, version=2, images=[image | changes])


def test_an_image_is_its_layers_where_the_kernel_flattens_nothing(tmp_path: Path) -> None:
    path = image_manifest(tmp_path / "m.json", layers=["lower", "upper"])
    plan = planned((), None, (f"{path},pmem:0,image=app",))
    assert [spec.layer_id for spec in plan.layers] == ["lower", "upper"]
    assert plan.overlay is not None
    assert plan.overlay.layers == ("lower", "upper")
    plan = planned((layer("top"),), "root,layers=top+app", (f"{path},pmem:0,image=app",))
    assert plan.overlay is not None
    assert plan.overlay.layers == ("top", "lower", "upper")


def test_an_image_is_one_layer_where_the_kernel_flattens_erofs(tmp_path: Path) -> None:
    setting = f"{image_manifest(tmp_path / 'm.json')},pmem:0,image=app"
    plan = planned((), None, (setting,), flattens_erofs=True)
    (spec,) = plan.layers
    assert (plan.overlay, plan.root_target) == (None, "/run/layers/app")
    assert [part.offset_bytes >> 19 for part in spec.ranges] == [8, 0, 2, 9]
    assert spec.filesystem == "erofs"
    assert spec.verity is not None
    assert spec.verity.root_digest.hex() == "cd" * 32
    plan = planned((), "root,layers=app,scratch=tmpfs:65536", (setting,), flattens_erofs=True)
    assert plan.overlay is not None
    assert plan.overlay.layers == ("app",)


def test_without_an_image_all_layers_of_a_manifest_are_mounted(tmp_path: Path) -> None:
    plan = planned((), None, (f"{image_manifest(tmp_path / 'm.json')},pmem:0",))
    assert [spec.layer_id for spec in plan.layers] == ["upper", "lower"]


@pytest.mark.parametrize("flattens_erofs", [True, False])
@pytest.mark.parametrize(
    ("words", "changes", "problem"),
    [
        ("image=other", {}, "0 of image 'other', not one"),
        ("image=app,image=app", {}, "image is given twice"),
        ("image=app", {"verity": None}, "image 'app' has no hash tree"),
        ("image=app", {"ranges": {}, "layers": {}}, "no list"),
        ("image=app", {"ranges": [7], "layers": [7]}, "no map|0 of layer 7"),
    ],
)
def test_an_image_that_cannot_be_used(
    tmp_path: Path, words: str, changes: dict[str, object], problem: str, flattens_erofs: bool
) -> None:
    path = image_manifest(tmp_path / "m.json", **changes)
    with pytest.raises(CallError, match=problem):
        plan_boot((), None, (f"{path},pmem:0,{words}",), flattens_erofs=flattens_erofs)


def test_a_manifest_of_version_1_has_no_images(tmp_path: Path) -> None:
    path = manifest(tmp_path / "m.json")
    with pytest.raises(CallError, match="images is no list"):
        plan_boot((), None, (f"{path},pmem:0,image=app",))


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}']
)
def test_a_manifest_that_is_none(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(raw)
    with call_error("invalid"):
        plan_boot((), None, (f"{path},pmem:0",))


@pytest.mark.parametrize(
    ("text", "scratch"),
    [
        ("tmpfs:4096", TmpfsScratch(size_bytes=4096)),
        ("thin:p:1048576", ThinScratch(pool_id="p", size_bytes=1 << 20)),
        (
            "thin:p:1048576,xfs",
            ThinScratch(pool_id="p", size_bytes=1 << 20, filesystem="xfs"),
        ),
        (
            "thin:p:1048576,encrypted",
            ThinScratch(pool_id="p", size_bytes=1 << 20, encrypted=True),
        ),
        (
            "thin:p:1048576,xfs,encrypted",
            ThinScratch(pool_id="p", size_bytes=1 << 20, filesystem="xfs", encrypted=True),
        ),
        ("dir:/run/a,adopt", DirectoryScratch(path="/run/a", existing="adopt")),
        ("dir:/run/a,create", DirectoryScratch(path="/run/a", create=True)),
        (
            "device:/dev/vdb,shared,fresh,discard,encrypted",
            DeviceScratch(
                device=PathDevice(path="/dev/vdb"),
                ensure_filesystem=True,
                existing="fresh",
                encrypted=True,
                shared=True,
                discard=True,
            ),
        ),
        ("device:/dev/vda", DeviceScratch(device=VDA, ensure_filesystem=True)),
        (
            "device:/dev/vda,xfs,fresh",
            DeviceScratch(device=VDA, filesystem="xfs", ensure_filesystem=True, existing="fresh"),
        ),
        (
            "device:/dev/vda,adopt",
            DeviceScratch(device=VDA, ensure_filesystem=True, existing="adopt"),
        ),
    ],
)
def test_a_scratch_as_text(text: str, scratch: Scratch) -> None:
    assert scratch_from_text(text) == scratch


@pytest.mark.parametrize(
    "text",
    [
        "device:/dev/vda,btrfs",
        "device:/dev/vda,ext4,xfs",
        "thin:p:1048576,ext4,xfs",
        "thin:p:1048576,encrypted,encrypted",
        "thin:p:1048576,encrypted,xfs",
        "thin:p:1048576,shared",
        "disk:a",
    ],
)
def test_scratch_from_text_refuses_invalid_text(text: str) -> None:
    with pytest.raises((ValueError, CallError)):
        scratch_from_text(text)
