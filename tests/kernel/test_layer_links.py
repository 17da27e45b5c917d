"""Links to files of lower layers, and odd markers: an overlay shows what umoci unpacks."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest

from rootfs.image.images import build_layers
from tests.beds import dmbed
from tests.beds.containerbed import run
from tests.beds.imagebed import Layout, Member, directory, hard_link, symlink
from tests.beds.treebed import assert_same, file_facts, mounted

pytestmark = pytest.mark.kernel

TREE = [
    directory("./"),
    directory("d", uid=1, mode=0o1777),
    Member("d/f", b"content " * 1000, mode=0o4755, uid=3, gid=4, xattrs={"trusted.kept": b"1"}),
    Member("d/g", b"other"),
    directory("d/e", mode=0o700),
    Member("d/e/f", b"deep"),
    symlink("s", "d/f"),
]
CASES = {
    "link": [hard_link("x", "d/f"), hard_link("y", "d/f"), hard_link("d/z", "d/e/f")],
    "link to a symlink": [hard_link("x", "s")],
    "link, then another file": [hard_link("x", "d/f"), Member("d/f", b"new")],
    "link of a link": [hard_link("d/f", "d/g"), hard_link("x", "d/f")],
    "what is in it, and then it": [Member("d/e/.wh.f"), Member("d/.wh.e")],
    "opaque, and then it": [Member("d/e/.wh..wh..opq"), Member("d/.wh.e")],
    "below an opaque one": [Member("d/.wh..wh..opq"), Member("d/e/.wh.f")],
    "in an opaque one": [Member("d/.wh..wh..opq"), Member("d/.wh.f"), Member("d/n", b"n")],
    "in a new one": [directory("n"), Member("n/.wh.f")],
    "in none": [Member("n/.wh.f"), Member("m/.wh..wh..opq")],
    "a file, and then a directory": [Member("d"), directory("d", uid=9)],
    "all": [Member(".wh..wh..opq"), Member("n", b"n"), directory("d", uid=9)],
}


@pytest.fixture(scope="module", autouse=True)
def _own_mounts() -> None:
    dmbed.isolate_mounts()


@pytest.mark.parametrize("case", CASES)
def test_overlay_of_linked_layers_equals_an_unpacking_by_umoci(tmp_path: Path, case: str) -> None:
    dmbed.run("mount", "-t", "tmpfs", "tmpfs", tmp_path)  # takes the attributes
    try:
        _compare(tmp_path, [TREE, CASES[case], [Member("d/g", b"top")][: case != "all"]])
    finally:
        dmbed.run("umount", tmp_path)


def _compare(top: Path, layers: Sequence[Sequence[Member]]) -> None:
    layout = Layout(top / "layout")
    for each in layers:
        layout.layer(each, "+gzip")
    layout.image(annotations={"org.opencontainers.image.ref.name": "app"}).finish()
    run("umoci", "unpack", "--image", f"{top}/layout:app", top / "bundle")
    unpacked = file_facts(top / "bundle/rootfs")
    with contextlib.ExitStack() as stack:
        images = build_layers(top / "layout", top)
        places = [
            stack.enter_context(mounted(each.path, "erofs", top / f"layer{number}"))
            for number, each in enumerate(images)
        ]
        (top / "overlay").mkdir()
        lowerdirs = ":".join(str(place) for place in reversed(places))
        options = f"xino=on,lowerdir={lowerdirs}"
        dmbed.run("mount", "-t", "overlay", "-o", options, "overlay", top / "overlay")
        stack.callback(dmbed.run, "umount", top / "overlay")
        assert_same(_seen(file_facts(top / "overlay")), _seen(unpacked))


def _seen(found: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Leave out what an overlay counts in its own way: the links of merged directories."""
    return {path: {k: v for k, v in each.items() if k != "links"} for path, each in found.items()}
