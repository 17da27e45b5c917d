"""Container images that other programs wrote: we must show what those programs unpack."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from rootfs.image.images import build_image, build_layers
from tests.beds import dmbed
from tests.beds.containerbed import ContainerImage, make_container_image
from tests.beds.treebed import assert_same, file_facts, mounted

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerImage]:
    dmbed.isolate_mounts()
    memory = tmp_path_factory.mktemp("container")
    dmbed.run("mount", "-t", "tmpfs", "tmpfs", memory)
    try:
        yield make_container_image(memory)
    finally:
        dmbed.run("umount", memory)


@pytest.fixture(scope="module")
def unpacked(image: ContainerImage) -> dict[str, dict[str, object]]:
    return file_facts(image.unpacked)


@pytest.mark.parametrize("filesystem", ["erofs", "ext4"])
def test_image_of_a_layout_by_umoci_equals_an_unpacking_by_umoci(
    tmp_path: Path,
    image: ContainerImage,
    unpacked: dict[str, dict[str, object]],
    filesystem: str,
) -> None:
    built = build_image(image.layout, tmp_path / "image", filesystem=filesystem)
    with mounted(built.path, filesystem, tmp_path / "mnt") as target:
        assert_same(file_facts(target), unpacked)


@pytest.mark.parametrize(
    "form",
    [
        ("docker-archive",),
        ("oci-archive",),
        ("oci", "--dest-compress-format=zstd", "--dest-compress"),
    ],
    ids=["docker-archive", "oci-archive", "oci-zstd"],
)
def test_skopeo_changes_the_form_and_not_the_image(
    tmp_path: Path, image: ContainerImage, form: tuple[str, ...]
) -> None:
    first = build_image(image.layout, tmp_path / "first")
    second = build_image(image.converted(*form), tmp_path / "second")
    assert second.source_digest == first.source_digest
    assert second.path.read_bytes() == first.path.read_bytes()


def test_overlay_of_all_layers_equals_an_unpacking_by_umoci(
    tmp_path: Path,
    image: ContainerImage,
    unpacked: dict[str, dict[str, object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # mount of util-linux 2.39 and later: options of up to 255 bytes
    layers = build_layers(image.layout, tmp_path)
    assert len(layers) == image.layers
    with contextlib.ExitStack() as stack:
        places = [
            stack.enter_context(mounted(each.path, "erofs", tmp_path / f"layer{number}"))
            for number, each in enumerate(layers)
        ]
        (tmp_path / "overlay").mkdir()
        lowerdirs = ":".join(place.name for place in reversed(places))
        options = f"xino=on,lowerdir={lowerdirs}"  # numbers of inodes that differ
        dmbed.run("mount", "-t", "overlay", "-o", options, "overlay", tmp_path / "overlay")
        stack.callback(dmbed.run, "umount", tmp_path / "overlay")
        assert_same(_seen(file_facts(tmp_path / "overlay")), _seen(unpacked))


def _seen(found: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Leave out what an overlay counts in its own way: the links of merged directories."""
    return {path: {k: v for k, v in each.items() if k != "links"} for path, each in found.items()}
