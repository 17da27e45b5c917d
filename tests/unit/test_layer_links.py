"""Hard links to files of lower layers: each layer gets its own copy, or it is an error by name."""

import errno
import gzip
import os
import stat
import tarfile
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest

from rootfs.image.images import build_image, build_layers
from rootfs.image.source import SourceOptions, open_source
from rootfs.image.tartree import Whiteouts
from rootfs.image.tree import walk
from tests.beds.calls import call_error
from tests.beds.imagebed import (
    EPOCH,
    Layout,
    Member,
    digest,
    directory,
    docker_archive,
    hard_link,
    make_tar,
    symlink,
)
from tests.beds.treebed import node_facts
from vsock.deadline import Deadline
from vsock.errors import CallError

Layers = Sequence[Sequence[Member]]
CAPABILITY = {"security.capability": b"\x01\x00\xff="}


def layout_of(path: Path, layers: Layers, compressions: Sequence[str] = ()) -> Path:
    layout = Layout(path)
    for number, members in enumerate(layers):
        layout.layer(members, compressions[number] if compressions else "")
    return layout.finish()


def read(
    source: Path, whiteouts: Whiteouts = Whiteouts.OVERLAY
) -> list[tuple[dict[str, object], set[frozenset[str]]]]:
    """Return for each layer the facts of its names, and which names are one inode."""
    found = []
    options = SourceOptions(spool_directory=source.parent, whiteouts=whiteouts)
    with open_source(source, options) as opened:
        for layer in opened.layers():
            names: dict[int, set[str]] = {}
            for path, node in walk(layer.root):
                names.setdefault(id(node), set()).add(os.fsdecode(b"/".join(path)))
            linked = {frozenset(each) for each in names.values() if len(each) > 1}
            found.append((node_facts(layer.root), linked))
    return found


def read_top(tmp_path: Path, *layers: Sequence[Member]) -> dict[str, object]:
    return read(layout_of(tmp_path / "l", layers))[-1][0]


def content(found: dict[str, object], name: str) -> object:
    return found[name][5]  # type: ignore[index]


def refused(tmp_path: Path, *layers: Sequence[Member], code: str = "invalid") -> CallError:
    """Build the layers; return why the last was refused. The others are built."""
    layout = layout_of(tmp_path / "l", layers)
    (tmp_path / "out").mkdir()
    with call_error(code) as caught:
        build_layers(layout, tmp_path / "out")
    built = {f"{digest(make_tar(each)).removeprefix('sha256:')}.erofs" for each in layers[:-1]}
    assert {each.name for each in (tmp_path / "out").iterdir()} == built
    return caught.value


LOWER = [
    directory("d", mode=0o1777, uid=7),
    Member("d/a", b"content " * 1000, mode=0o4755, uid=3, gid=4, mtime=1.5, xattrs=CAPABILITY),
]


@pytest.mark.parametrize("compression", ["", "+gzip", "+zstd"])
def test_a_layer_has_its_own_copy(tmp_path: Path, compression: str) -> None:
    layers = (LOWER, [Member("other"), hard_link("e/b", "d/a"), hard_link("c", "/d/a")])
    (_, upper) = read(layout_of(tmp_path / "l", layers, [compression] * 2))
    expected = ("0o104755", 3, 4, 1_500_000_000, 0, b"content " * 1000, {
        b"security.capability": b"\x01\x00\xff="
    })  # fmt: skip
    assert [upper[0][name] for name in ("e/b", "c", "d/a")] == [expected] * 3
    assert upper[1] == {frozenset({"e/b", "c", "d/a"})}
    assert upper[0]["d"][:2] == ("0o41777", 7)  # type: ignore[index]  # as below


def test_a_docker_archive_has_such_links_too(tmp_path: Path) -> None:
    layers = [make_tar(LOWER), make_tar([hard_link("b", "d/a")])]
    archive = docker_archive(tmp_path / "docker.tar", layers)
    (tmp_path / "docker.tar.gz").write_bytes(gzip.compress(archive.read_bytes()))
    for source in (archive, tmp_path / "docker.tar.gz"):
        assert content(read(source)[1][0], "b") == b"content " * 1000


def test_the_newest_lower_layer_that_has_it_counts(tmp_path: Path) -> None:
    newer = [Member("d/a", b"newer", mode=0o600)]
    upper = read_top(tmp_path, LOWER, newer, [Member("x")], [hard_link("b", "d/a")])
    assert upper["b"][:6] == ("0o100600", 0, 0, EPOCH * 10**9, 0, b"newer")  # type: ignore[index]


def test_a_copy_of_a_copy(tmp_path: Path) -> None:
    found = read(
        layout_of(
            tmp_path / "l", (LOWER, [hard_link("b", "d/a")], [Member("d/a", b"new")],
                             [hard_link("c", "b")]))
    )  # fmt: skip
    assert content(found[3][0], "c") == b"content " * 1000
    assert found[3][1] == {frozenset({"b", "c"})}


def test_links_of_one_lower_file_by_different_names_are_links_of_one_another(
    tmp_path: Path,
) -> None:
    lower = [*LOWER, hard_link("same", "d/a"), Member("else", b"else")]
    upper = [hard_link("1", "d/a"), hard_link("2", "same"), hard_link("3", "else")]
    (_, found) = read(layout_of(tmp_path / "l", (lower, upper)))
    assert found[1] == {frozenset({"1", "2", "d/a", "same"}), frozenset({"3", "else"})}


def test_hard_link_prefers_earlier_member_of_its_own_layer(tmp_path: Path) -> None:
    upper = [hard_link("old", "d/a"), Member("d/a", b"own"), hard_link("new", "d/a")]
    found = read_top(tmp_path, LOWER, upper)
    assert content(found, "old") == b"content " * 1000
    assert content(found, "new") == content(found, "d/a") == b"own"


@pytest.mark.parametrize(
    "member",
    [
        symlink("s", "../../outside"),
        Member("s", kind=tarfile.CHRTYPE, device=(1, 3), mode=0o666),
        Member("s", kind=tarfile.FIFOTYPE, uid=5),
        Member("s"),
    ],
)
def test_hard_link_to_a_lower_layer_s_member_without_content_is_resolved(
    tmp_path: Path, member: Member
) -> None:
    lower, upper = read(layout_of(tmp_path / "l", ([member], [hard_link("b", "s")])))
    assert upper[0]["b"] == lower[0]["s"]


def test_holes_stay_holes(tmp_path: Path) -> None:
    size = 1 << 38
    sparse = Member("s", b"begin" + b"end")
    layers = []
    for members in ([sparse], [hard_link("b", "s")]):
        tar = make_tar(members)
        if members[0] is sparse:
            records = {"GNU.sparse.map": f"0,5,{size - 3},3", "GNU.sparse.size": str(size)}
            tar = _with_records(sparse, records)
        layers.append(tar)
    docker_archive(tmp_path / "docker.tar", layers)
    (tmp_path / "out").mkdir()
    _, upper = build_layers(tmp_path / "docker.tar", tmp_path / "out")
    assert upper.size_bytes < 32 << 20
    assert b"begin" in upper.path.read_bytes()


def _with_records(member: Member, records: dict[str, str]) -> bytes:
    import io

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(member.name)
        info.size, info.pax_headers = len(member.data), records
        archive.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


REMOVED = {
    "never there": [],
    "whiteout": [Member("d/.wh.a")],
    "opaque": [directory("d"), Member("d/.wh..wh..opq")],
    "whiteout of its directory": [Member(".wh.d")],
    "a file in the place of its directory": [Member("d")],
}


@pytest.mark.parametrize("between", REMOVED)
def test_a_target_that_is_gone(tmp_path: Path, between: str) -> None:
    target = "d/nothing" if between == "never there" else "d/a"
    upper = [hard_link("b", target)]
    problem = refused(tmp_path, LOWER, REMOVED[between], upper)
    assert "'b'" in problem.message
    assert repr(target) in problem.message
    assert digest(make_tar(upper)) in problem.message


@pytest.mark.parametrize("same", [*REMOVED][1:])
@pytest.mark.parametrize("late", [False, True])
def test_a_target_that_the_layer_itself_removes(tmp_path: Path, same: str, late: bool) -> None:
    """Whiteouts hide what is below, wherever they stand in the layer; but what has been linked to
    is kept when only a later member takes the name."""
    upper = [*REMOVED[same], hard_link("b", "d/a")]
    if late:
        upper.reverse()
    if late and same.startswith("a file"):
        assert content(read_top(tmp_path, LOWER, upper), "b") == b"content " * 1000
        return
    assert "'d/a'" in refused(tmp_path, LOWER, upper).message


def test_a_target_that_is_made_again(tmp_path: Path) -> None:
    again = [directory("d"), Member("d/a", b"again")]
    upper = read_top(tmp_path, LOWER, REMOVED["opaque"], again, [hard_link("b", "d/a")])
    assert content(upper, "b") == b"again"


@pytest.mark.parametrize("way", ["up", "in"])
def test_no_symlink_is_followed_on_the_way(tmp_path: Path, way: str) -> None:
    lower = [*LOWER, symlink("up", "/etc"), symlink("in", "d")]
    problem = refused(tmp_path, lower, [hard_link("b", f"{way}/a")])
    assert f"{way!r} is no directory" in problem.message


@pytest.mark.parametrize(("target", "why"), [("d", "directory"), ("../d/a", r"'..'")])
def test_a_target_that_cannot_be_one(tmp_path: Path, target: str, why: str) -> None:
    assert why in refused(tmp_path, LOWER, [hard_link("b", target)]).message


def test_a_tar_by_itself_has_no_lower_layers(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(make_tar([hard_link("b", "d/a")]))
    with pytest.raises(CallError, match="'d/a', which is not in the archive"):
        build_image(tmp_path / "t", tmp_path / "image")


def test_a_flat_image_names_the_layer_too(tmp_path: Path) -> None:
    upper = [hard_link("b", "missing")]
    layout = layout_of(tmp_path / "l", (LOWER, upper))
    with pytest.raises(CallError, match=digest(make_tar(upper))):
        build_image(layout, tmp_path / "image")


def test_a_target_in_a_layer_that_comes_again_on_top(tmp_path: Path) -> None:
    upper = [hard_link("b", "d/a")]
    found = read(layout_of(tmp_path / "l", (LOWER, upper, LOWER)))
    assert len(found) == 2
    assert content(found[0][0], "b") == b"content " * 1000


def test_a_layer_that_links_into_itself_further_down(tmp_path: Path) -> None:
    """The first time its link is to a file of its own; the second, too."""
    layer = [*LOWER, hard_link("b", "d/a")]
    found = read(layout_of(tmp_path / "l", (layer, [hard_link("c", "b")], layer)))
    assert found[0][1] == {frozenset({"b", "c"})}
    assert found[1][1] == {frozenset({"b", "d/a"})}


@pytest.mark.parametrize("filesystem", ["erofs", "squashfs", "ext4"])
def test_the_same_layers_give_the_same_bytes(tmp_path: Path, filesystem: str) -> None:
    layers = (LOWER, [Member("z", b"z" * 9000)], [hard_link("b", "z"), hard_link("c", "d/a")])
    images = set()
    for compression in ("", "+gzip", "+zstd"):
        top = tmp_path / f"with{compression}"
        top.mkdir()
        layout = layout_of(top / "l", layers, [compression] * 3)
        for again in ("1", "2"):
            (top / again).mkdir()
            built = build_layers(layout, top / again, filesystem=filesystem)
            images.add(tuple(each.path.read_bytes() for each in built))
    assert len(images) == 1


def test_copies_are_bounded_over_all_layers(tmp_path: Path) -> None:
    """Each link costs a few bytes and would copy the whole."""
    lower = [Member("a", b"x" * 100_000)]
    layers = (lower, *([Member(f"{n}"), hard_link(f"b{n}", "a")] for n in range(5)))
    layout = layout_of(tmp_path / "l", layers)
    (tmp_path / "out").mkdir()
    with call_error("resource", match="lower layers.*350000"):
        build_layers(layout, tmp_path / "out", max_bytes=350_000)
    assert len([*(tmp_path / "out").iterdir()]) == 4
    assert len(build_layers(layout, tmp_path / "out", max_bytes=600_000)) == 6


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    size = 48 << 20
    layout = layout_of(tmp_path / "l", ([Member("a", bytes(size))], [hard_link("b", "a")]))
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        _, upper = build_layers(layout, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < size // 4
    finally:
        tracemalloc.stop()
    assert upper.size_bytes > size


def test_a_full_disk_while_it_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    problem = refused(tmp_path, LOWER, [hard_link("b", "d/a")], code="resource")
    assert (problem.errno, problem.step) == (errno.ENOSPC, "copy from lower layers")


def test_cancelling_while_it_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of(tmp_path / "l", (LOWER, [hard_link("b", "d/a")]))
    deadline = Deadline()
    copy = os.copy_file_range

    def interrupted(*arguments: int) -> int:
        deadline.cancel()
        return copy(*arguments)

    monkeypatch.setattr(os, "copy_file_range", interrupted)
    (tmp_path / "out").mkdir()
    with call_error("cancelled", match="copy from lower layers"):
        build_layers(layout, tmp_path / "out", cancel=deadline)
    assert len([*(tmp_path / "out").iterdir()]) == 1


def test_a_lower_layer_that_changes_before_it_is_read_again(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "l", (LOWER, [hard_link("b", "d/a")]))
    blob = layout / "blobs/sha256" / digest(make_tar(LOWER)).removeprefix("sha256:")
    with open_source(layout, SourceOptions(spool_directory=tmp_path)) as opened:
        layers = opened.layers()
        next(layers)
        blob.write_bytes(blob.read_bytes().replace(b"content", b"CONTENT"))
        with pytest.raises(CallError) as caught:
            next(layers)
    assert caught.value.code == "integrity"


def test_an_image_with_kept_markers_has_copies_too(tmp_path: Path) -> None:
    layout = layout_of(tmp_path / "l", (LOWER, [Member(".wh.x"), hard_link("b", "d/a")]))
    upper, _ = read(layout, Whiteouts.KEEP)[1]
    assert stat.S_IFMT(int(str(upper[".wh.x"][0]), 8)) == stat.S_IFREG  # type: ignore[index]
    assert content(upper, "b") == b"content " * 1000
