"""What an overlay is asked with: the words of its options, and what is refused before any call."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api import OverlayOptions
from guestagent.storage import overlayfs
from guestagent.storage.mountinfo import split_lowerdir
from guestagent.storage.overlayfs import escape, mount_overlay, option_list, remove_links

names = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=20)


@given(st.lists(names, min_size=1, max_size=8))
def test_escaped_paths_join_and_split(paths: list[str]) -> None:
    joined = ":".join(escape(path) for path in paths)
    assert split_lowerdir(joined) == tuple(paths)
    # the kernel parts options at commas that no backslash precedes
    at = 0
    while at < len(joined):
        assert joined[at] != ","
        at += 2 if joined[at] == "\\" else 1


def test_options() -> None:
    assert option_list(OverlayOptions()) == ()
    options = OverlayOptions(metacopy="off", redirect_dir="nofollow", xino="auto", volatile=True)
    assert option_list(options) == (
        ("metacopy", "off"),
        ("redirect_dir", "nofollow"),
        ("xino", "auto"),
        ("volatile", None),
    )
    assert option_list(OverlayOptions(userxattr=True)) == (("userxattr", None),)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lowerdirs": []}, "1 to 500"),
        ({"lowerdirs": ["/a"] * 501}, "1 to 500"),
        ({"lowerdirs": ["relative"]}, "absolute"),
        ({"upperdir": "/u"}, "together"),
        ({"workdir": "/w"}, "together"),
        ({"upperdir": "u", "workdir": "/w"}, "absolute"),
        ({"name": ""}, "plain word"),
        ({"name": "../x"}, "plain word"),
        ({"name": ".hidden"}, "plain word"),
        ({"way": "magic"}, "no such way"),
    ],
)
def test_refusals(fields: dict[str, object], message: str, tmp_path: Path) -> None:
    good: dict[str, object] = {
        "name": "x",
        "lowerdirs": ["/", "/"],
        "target": str(tmp_path),
        "runtime_directory": str(tmp_path),
    }
    with pytest.raises(ValueError, match=message):
        mount_overlay(**{**good, **fields})  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_missing_layers_are_seen_before_any_mount(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        mount_overlay(name="x", lowerdirs=["/", f"{tmp_path}/gone"], target=str(tmp_path))
    assert caught.value.filename == f"{tmp_path}/gone"


@pytest.mark.parametrize(
    ("ways", "length", "chosen"),
    [
        (("fsconfig-fd", "fsconfig-path", "mount"), 3000, "fsconfig-fd"),
        (("fsconfig-path", "mount"), 255, "fsconfig-path"),
        (("fsconfig-path", "mount"), 256, "mount"),
        (("mount",), 10, "mount"),
    ],
)
def test_the_way_fits_kernel_and_paths(
    ways: tuple[str, ...], length: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlayfs, "_ways", ways)
    plan = overlayfs._Plan(
        name="x",
        lowerdirs=("/a", "/" + "b" * (length - 1)),
        upperdir=None,
        workdir=None,
        options=(),
        flags=("ro",),
        links="/none",
    )
    assert overlayfs._choose(plan) == chosen


def test_removing_links_removes_links_alone(tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    (links / "0").symlink_to(tmp_path)
    remove_links(str(links))
    assert os.listdir(tmp_path) == []
    remove_links(str(links))
    links.mkdir()
    (links / "0").touch()
    with pytest.raises(OSError, match="something else"):
        remove_links(str(links))
    assert os.listdir(links) == ["0"]


def test_a_thread_with_another_directory_does_not_move_us(tmp_path: Path) -> None:
    here = os.getcwd()
    seen: list[str] = []
    overlayfs._run_in(str(tmp_path), lambda: seen.append(os.getcwd()))
    assert seen == [str(tmp_path)]
    assert os.getcwd() == here
    with pytest.raises(FileNotFoundError):
        overlayfs._run_in(f"{tmp_path}/gone", lambda: seen.append("reached"))
    assert len(seen) == 1
