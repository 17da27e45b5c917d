"""The truth table of the boot hook on a real kernel: who has a digest, and who a hash area."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from guestagent.boot.mounting import mount_plan
from guestagent.boot.plan import plan_boot
from guestagent.config import parse_command_line, read_settings
from guestagent.engine.engine import Engine
from guestagent.storage.filesystems import has_flattened_erofs
from guestagent.storage.mountinfo import mounts_by_target
from rootfs.image.images import build_image
from rootfs.pack.pack import Pack
from tests.beds.agentbed import World, settled_world
from tests.beds.calls import call_error
from tests.beds.veritybed import VerityImage
from vsock.deadline import Deadline
from vsock.errors import CallError

TREE = {"who": b"a layer"}


class Bed:
    """A layer with a hash area, one without, and a state directory."""

    def __init__(self, directory: Path, hashed: VerityImage, node: str, plain_node: str) -> None:
        self.state = str(directory / "state")
        self.root = hashed.root_digest.hex()
        self.node, self.plain_node = node, plain_node
        self.image = hashed

    def mount(self, *words: str) -> None:
        line = " ".join(f"guestagent.{word}" for word in (*words, f"state={self.state}"))
        config, problems = read_settings(parse_command_line(line))
        assert problems == ()
        plan = plan_boot(
            config.layers,
            config.overlay,
            config.manifests,
            flattens_erofs=has_flattened_erofs(),
        )
        assert plan is not None
        mount_plan(plan, config)

    def unmount(self) -> None:
        engine = Engine(state_directory=self.state)
        try:
            engine.start()
            with Deadline(10) as deadline:
                engine.unmount_everything(engine.operation(deadline), force=True)
        finally:
            engine.close()


@pytest.fixture
def bed(
    tmp_path: Path,
    erofs_image: Callable[..., Path],
    verity_image: Callable[..., VerityImage],
    loop_device: Callable[..., str],
) -> Bed:
    hashed = verity_image(erofs_image(TREE))
    plain = erofs_image(TREE)
    os.truncate(plain, hashed.size_bytes)
    return Bed(tmp_path, hashed, loop_device(hashed.path), loop_device(plain))


def test_verified_mounts_are_adopted_by_a_later_agent(bed: Bed) -> None:
    before = World.now()
    bed.mount(
        f"layer={bed.node},id=a,root={bed.root}",
        f"layer={bed.plain_node},id=b,root=none",
        "overlay=sys,layers=a+b",
    )
    assert Path("/run/overlays/sys/who").read_bytes() == TREE["who"]
    assert mounts_by_target()["/run/layers/a"].filesystem == "erofs"
    bed.unmount()
    assert settled_world(before) == before


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (("layer={node},id=a,root=" + "00" * 32,), "integrity", "root"),
        (("layer={plain},id=a,root=" + "00" * 32,), "integrity", "superblock"),
        (("layer={node},id=a,root=none",), "integrity", "root=none, but a hash area"),
        (("layer={node},id=a,root=none,fs=auto",), "integrity", "root=none, but a hash area"),
        (("layer={plain},id=a,root=none", "require_verity"), "denied", "not verified"),
        (("layer={plain},id=a,root=none,fs=ext4",), "mount", "no ext4 superblock"),
        (("layer=/dev/none,id=a,root=none", "deadline=1"), "timeout", "none"),
        # the second one is good and must not stay when the first is not
        (
            ("layer={node},id=a,root=" + "00" * 32, "layer={plain},id=b,root=none"),
            "integrity",
            "root",
        ),
    ],
)
def test_failed_boot_mount_leaves_nothing(
    bed: Bed, words: tuple[str, ...], code: str, problem: str
) -> None:
    before = World.now()
    with call_error(code, match=problem):
        bed.mount(*(word.format(node=bed.node, plain=bed.plain_node) for word in words))
    assert settled_world(before) == before


@pytest.fixture
def pack(tmp_path: Path, bed: Bed, loop_device: Callable[..., str]) -> tuple[Pack, str]:
    """A pack of two layers, and of an image of them; and where it is attached."""
    with Pack.create(tmp_path / "pack.img") as pack:
        for name in ("lower", "upper"):
            tree = tmp_path / name
            tree.mkdir()
            (tree / "who").write_text(name)
            (tree / name).write_text("only here")
            built = build_image(tree, tmp_path / f"{name}.erofs", verity=True)
            pack.add(built.path, name, verity=built.verity)
        pack.merge("app", ["upper", "lower"])
    return pack, loop_device(tmp_path / "pack.img")


def test_a_layer_of_a_pack_is_found_by_its_root_digest_alone(
    bed: Bed, pack: tuple[Pack, str]
) -> None:
    packed, node = pack
    layer = packed.layers[0]
    assert layer.verity is not None
    place = f"layer={node},id=a,offset={layer.offset_bytes},size={layer.size_bytes}"
    before = World.now()
    bed.mount(f"{place},root={layer.verity.root_digest.hex()}")
    assert Path("/run/layers/a/who").read_text() == "upper"
    bed.unmount()
    with pytest.raises(CallError, match="root=none, but a hash area"):
        bed.mount(f"{place},root=none")
    assert settled_world(before) == before


@pytest.mark.parametrize("overlay", [(), ("overlay=sys,layers=app",)])
def test_an_image_of_a_pack_is_mounted_as_the_kernel_can(
    bed: Bed, pack: tuple[Pack, str], overlay: tuple[str, ...]
) -> None:
    packed, node = pack
    before = World.now()
    bed.mount(f"manifest={packed.path}.json,{node},image=app", *overlay)
    if overlay:
        root = Path("/run/overlays/sys")
    else:
        root = Path("/run/layers/app" if has_flattened_erofs() else "/run/overlays/root")
    assert (root / "who").read_text() == "upper"
    assert sorted(path.name for path in root.iterdir()) == ["lower", "upper", "who"]
    layers = {target for target in mounts_by_target() if target.startswith("/run/layers/")}
    names = ("app",) if has_flattened_erofs() else ("upper", "lower")
    assert layers == {f"/run/layers/{name}" for name in names}
    bed.unmount()
    assert settled_world(before) == before


def test_a_damaged_hash_area_still_contradicts_root_none(bed: Bed) -> None:
    with open(bed.image.path, "r+b") as file:
        file.seek(bed.image.hash_offset_bytes + 8)  # the version in the superblock
        file.write(b"\xff")
    os.sync()
    with pytest.raises(CallError, match="root=none, but a hash area"):
        bed.mount(f"layer={bed.node},id=a,root=none")
