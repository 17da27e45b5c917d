"""An overlay of the layers shows what the image of all layers holds, whatever is in them.

The overlay is a model, of which tests/kernel has the original.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from rootfs.image.source import SourceLayer, SourceOptions, open_source
from rootfs.image.tree import OPAQUE_TRUSTED, Node, read_content, walk
from tests.beds.imagebed import Member, directory, docker_archive, hard_link, make_tar, symlink
from vsock.errors import CallError

Shown = dict[str, object]


def overlay(layers: Sequence[Node]) -> Shown:
    """Return path -> facts of what overlayfs shows of trees, the topmost first."""
    shown: Shown = {"": _facts(layers[0])}
    _merge(layers, "", shown)
    return shown


def _merge(directories: Sequence[Node], path: str, shown: Shown) -> None:
    found: dict[bytes, list[Node]] = {}
    ended: set[bytes] = set()
    for node in directories:
        for name, child in node.children.items():
            first = not found.get(name) and name not in ended
            if name not in ended and (first or child.is_directory):
                found.setdefault(name, []).append(child)
            if not child.is_directory or OPAQUE_TRUSTED in child.xattrs:
                ended.add(name)
    for name, stack in found.items():
        below = f"{path}/{os.fsdecode(name)}".lstrip("/")
        if _is_whiteout(stack[0]):
            if len(directories) == 1:  # a directory that is not merged is listed as it is
                shown[below] = "a whiteout that is seen"
            continue
        shown[below] = _facts(stack[0])
        if stack[0].is_directory:
            _merge(stack, below, shown)


def _is_whiteout(node: Node) -> bool:
    return stat.S_ISCHR(node.mode) and not node.rdev


def _facts(node: Node) -> object:
    kept = {name: value for name, value in node.xattrs.items() if name != OPAQUE_TRUSTED}
    data = b"".join(read_content(node.content, b"")) if node.is_regular else node.target
    return (oct(node.mode), node.uid, node.mtime_ns, data, kept)


def flat_and_layered(
    layers: Sequence[Sequence[Member]], again: int | None = None
) -> tuple[Shown | str, Shown | str]:
    """Return what both ways show of an image, or by which code they refuse it. ``again`` is the
    number of a layer that comes again on top."""
    with tempfile.TemporaryDirectory() as top:
        # each layer is another one, so that none is left out
        tars = [make_tar([*each, Member(f"number{n}")]) for n, each in enumerate(layers)]
        tars += [] if again is None else [tars[again]]
        source = docker_archive(Path(top, "docker.tar"), tars)
        options = SourceOptions(spool_directory=top)
        flat: Shown | str
        layered: Shown | str
        with open_source(source, options) as opened:
            try:
                with opened.tree() as tree:
                    flat = overlay([tree.root])
            except CallError as problem:
                flat = problem.code
            try:
                layered = _read_layers(opened.layers())
            except CallError as problem:
                layered = problem.code
    return flat, layered


def _read_layers(layers: Iterator[SourceLayer]) -> Shown:
    roots = []
    for layer in layers:
        for _, node in walk(layer.root):
            if node.is_regular:  # what is read now is gone with the next layer
                data = b"".join(read_content(node.content, b""))
                node.content = Kept(data)
        roots.append(layer.root)
    return overlay(roots[::-1])


class Kept:
    """Content in memory."""

    def __init__(self, data: bytes) -> None:
        self.fd = os.memfd_create("content")
        os.write(self.fd, data)
        self.size_bytes = len(data)
        self.extents = ((0, len(data), 0),) if data else ()

    def open(self) -> contextlib.AbstractContextManager[int]:
        return contextlib.nullcontext(self.fd)

    def __del__(self) -> None:
        os.close(self.fd)


NAMES = st.sampled_from("ab")
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


def _marker(path: str) -> Member:
    parent, _, name = path.rpartition("/")
    return Member(f"{parent}/.wh.{name}".lstrip("/"))


MEMBERS = st.one_of(
    st.builds(directory, PATHS, mode=st.sampled_from([0o755, 0o700]), uid=st.integers(0, 3)),
    st.builds(directory, PATHS, xattrs=st.just({"user.x": b"1"})),
    st.builds(Member, PATHS, st.sampled_from([b"1", b"22", b"333"])),
    st.builds(symlink, PATHS, st.just("a")),
    st.builds(hard_link, PATHS, PATHS),
    PATHS.map(_marker),
    st.builds(lambda path: Member(f"{path}/.wh..wh..opq"), PATHS),
    st.just(Member(".wh..wh..opq")),
)
IMAGES = st.lists(st.lists(MEMBERS, max_size=4), min_size=2, max_size=4)

TREE = [directory("a", uid=1, mode=0o700), Member("a/b", b"1"), Member("a/a/b", b"22")]


@given(IMAGES)
@settings(max_examples=int(os.environ.get("OVERLAY_EXAMPLES", "100")), deadline=None)
@example([TREE, [Member("a/.wh.b"), Member(".wh.a")]])  # what is in it, and then it
@example([TREE, [Member("a/.wh..wh..opq"), Member(".wh.a")]])
@example([TREE, [Member("a/.wh..wh..opq"), Member("a/a/.wh.b")]])
@example([TREE, [Member("a/.wh..wh..opq"), Member("a/.wh.b")]])
@example([TREE, [Member("b/.wh.a")]])  # in a directory that nobody has
@example([TREE, [Member("b/.wh..wh..opq")]])
@example([TREE, [directory("b"), Member("b/.wh.a")]])
@example([TREE, [Member(".wh.a"), Member("a/x", b"1")]])  # without an entry for the directory
@example([TREE, [Member("a/.wh..wh..opq"), Member("a/a/x", b"1")]])
@example([TREE, [Member("a"), directory("a")]])
@example([TREE, [Member("a"), directory("a"), hard_link("x", "a/b")]])
@example([TREE, [Member(".wh..wh..opq"), Member("b", b"1")]])
@example([TREE, [Member(".wh..wh..opq"), directory("a")]])
@example([TREE, [Member("b"), hard_link("a/a/b", "a/b"), hard_link("a/x", "a/a/b")]])
def test_both_ways_show_the_same(layers: list[list[Member]]) -> None:
    flat, layered = flat_and_layered(layers)
    assert layered == flat


@given(IMAGES, st.integers(0, 1))
@settings(max_examples=int(os.environ.get("OVERLAY_EXAMPLES", "100")), deadline=None)
@example([[Member("p/.wh.a"), Member("p/c", b"c")], [Member("q")]], 0)
@example([[directory("p"), Member("p/.wh.a"), Member("p/c")], [directory("p")]], 0)
@example([[Member("p/.wh.a"), Member("p/c")], [Member("p/a")]], 0)
@example([[Member("a/b"), Member("a/.wh..wh..opq")], [Member("a/c")]], 0)
@example([TREE, [Member("b")], [Member(".wh..wh..opq")]], 0)
def test_a_layer_that_comes_twice_shows_the_same(layers: list[list[Member]], again: int) -> None:
    flat, layered = flat_and_layered(layers, again)
    assert layered == flat
