"""Bad input at the command line: a clear error, status 1 (2 for usage), and nothing left behind.

One table, so that it can be read against what a user may get wrong. That each reader notices every
kind of damage is held in its own tests; here is what the user sees of it, and what is not there
afterwards.
"""

import fcntl
import gzip
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.beds.ctlbed import guestctl
from tests.beds.imagebed import (
    Layout,
    Member,
    digest,
    directory,
    hard_link,
    make_tar,
    symlink,
    zstd,
)

FILES = [directory("etc"), Member("etc/hosts", b"127.0.0.1 localhost\n" * 4000)]
TAR = make_tar(FILES)
OLD = b"what was there before"

Prepare = Callable[[Path], object]


def contents(place: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(place)): path.read_bytes() if path.is_file() else None
        for path in place.rglob("*")
    }


def refused(place: Path, *words: str, limit_bytes: int | None = None) -> dict[str, Any]:
    """Run it and return the error; nothing in the directory may have changed."""
    before = contents(place)
    done = guestctl(place, *words, limit_bytes=limit_bytes)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    assert contents(place) == before
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    assert error["message"]
    return error


def write(name: str, data: bytes) -> Prepare:
    return lambda place: (place / name).write_bytes(data)


def tar_with(*members: Member) -> Prepare:
    return write("source", make_tar([*FILES, *members]))


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]


BAD_SOURCES: dict[str, tuple[Prepare, str, str]] = {
    "a corrupt tar": (write("source", flipped(TAR, 130)), "integrity", "checksum"),
    "a truncated tar": (write("source", TAR[:-12_000]), "integrity", "tar"),
    "a tar without its end": (write("source", TAR[:3072]), "integrity", "tar"),
    "a corrupt gzip stream": (
        write("source", flipped(gzip.compress(TAR), 200)),
        "integrity",
        "gzip",
    ),
    "a truncated gzip stream": (write("source", gzip.compress(TAR)[:-20]), "integrity", "gzip"),
    "a truncated zstd stream": (write("source", zstd(TAR)[:-20]), "integrity", "zstd"),
    "a file that is no tar": (write("source", b"hello\n" * 200), "integrity", "tar"),
    "a path that goes up": (tar_with(Member("../../etc/passwd")), "invalid", "'..'"),
    "a path that goes up from within": (tar_with(Member("etc/../../x")), "invalid", "'..'"),
    "a way through a symlink": (
        tar_with(symlink("out", "/"), Member("out/etc/passwd")),
        "invalid",
        "no directory",
    ),
    "a hard link to outside": (tar_with(hard_link("x", "/etc/shadow")), "invalid", "hard link"),
    "a hard link that goes up": (tar_with(hard_link("x", "../shadow")), "invalid", "'..'"),
    "a device of an impossible number": (
        tar_with(Member("dev/x", kind=b"3", device=(5000, 1))),
        "unsupported",
        "device number",
    ),
    "no source at all": (lambda place: None, "not_found", "source"),
}


@pytest.mark.parametrize("what", BAD_SOURCES)
def test_a_bad_source_makes_no_image(tmp_path: Path, what: str) -> None:
    prepare, code, message = BAD_SOURCES[what]
    prepare(tmp_path)
    (tmp_path / "image").write_bytes(OLD)
    error = refused(tmp_path, "layer", "build", "source", "image", "--format", "tar", "--verity")
    assert error["code"] == code
    assert message in error["message"]


def test_absolute_names_and_device_nodes_stay_in_the_image(tmp_path: Path) -> None:
    """They are what images hold; that nothing outside is touched is what matters."""
    name = f"/{tmp_path.name}-absolute"
    members = [Member(name, b"inside"), Member("dev/null", kind=b"3", device=(1, 3))]
    (tmp_path / "source").write_bytes(make_tar(members))
    done = guestctl(tmp_path, "layer", "build", "source", "image")
    assert done.returncode == 0, done.stderr
    assert not os.path.lexists(name)
    listed = subprocess.run(
        ["dump.erofs", "--ls", "--path=/", tmp_path / "image"], capture_output=True, text=True
    )
    assert name.strip("/") in listed.stdout


def test_of_names_that_come_twice_the_last_counts(tmp_path: Path) -> None:
    for name, content in (("twice", [b"first", b"last"]), ("once", [b"last"])):
        (tmp_path / name).write_bytes(make_tar([Member("file", each) for each in content]))
        assert guestctl(tmp_path, "layer", "build", name, f"{name}.erofs").returncode == 0
    images = [(tmp_path / f"{name}.erofs").read_bytes() for name in ("twice", "once")]
    assert b"last" in images[0]
    assert b"first" not in images[0]
    assert len(images[0]) == len(images[1])


@pytest.mark.parametrize("form", [(), ("--layers",)], ids=["merged", "layer by layer"])
def test_layer_with_another_diff_id_than_its_image_says_is_refused(
    tmp_path: Path, form: tuple[str, ...]
) -> None:
    layout = Layout(tmp_path / "layout").layer(FILES, "+gzip")
    layout.diff_ids[0] = digest(b"something else")
    layout.finish()
    (tmp_path / "out").mkdir()
    error = refused(tmp_path, "layer", "build", "layout", "out/image" if not form else "out", *form)
    assert (error["code"], "diff_id" in error["message"]) == ("integrity", True)
    error = refused(tmp_path, "pack", "build", "layout", "pack.img")
    assert error["code"] == "integrity"


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=["gzip", "zstd"])
def test_a_decompression_bomb_is_bounded(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "bomb").write_bytes(pack(make_tar([Member("zeros", bytes(32 << 20))])))
    # files of more than 4 MiB cannot be written here: the limit is kept before it gets there
    words = ("layer", "build", "bomb", "image", "--max-bytes", str(2 << 20))
    error = refused(tmp_path, *words, limit_bytes=4 << 20)
    assert (error["code"], error["errno"]) == ("resource", None)
    assert "more than 2097152 bytes" in error["message"]


def prepared(place: Path) -> None:
    """Make a layer with a hash area and a pack that holds it."""
    (place / "source").write_bytes(make_tar([Member("noise", os.urandom(1 << 20))]))
    for words in (
        ("layer", "build", "source", "layer.erofs", "--verity"),
        ("layer", "build", "source", "plain.erofs"),
        ("pack", "create", "app.img"),
        ("pack", "add", "app.img", "layer.erofs", "--id", "first"),
    ):
        done = guestctl(place, *words)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made")
    prepared(place)
    return place


@pytest.fixture
def made(_made: Path, tmp_path: Path) -> Path:
    """A directory of its own with a source, layers and a pack."""
    for path in _made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ("layer", "build", "source", "image"),
        ("layer", "build", "source", "image", "--verity", "--vhd", "--filesystem", "ext4"),
        ("layer", "build", "source", "image", "--filesystem", "squashfs"),
        ("layer", "format", "--hash-file", "hashes", "plain.erofs"),
        ("layer", "format", "plain.erofs"),
        ("pack", "add", "app.img", "layer.erofs", "--id", "second"),
        ("pack", "build", "source", "new.img"),
    ],
    ids=" ".join,
)
def test_full_disk_leaves_the_existing_output(made: Path, words: tuple[str, ...]) -> None:
    small = 4096 if "--hash-file" in words else 512 << 10
    assert refused(made, *words, limit_bytes=small)["code"] == "resource"


@pytest.mark.parametrize(
    "words",
    [
        ("layer", "build", "source", "{}/image"),
        ("layer", "build", "source", "{}", "--layers"),
        ("layer", "format", "--hash-file", "{}/hashes", "plain.erofs"),
        ("pack", "create", "{}/pack.img"),
        ("pack", "build", "source", "{}/pack.img"),
        ("sign", "--key", "key", "--signature", "{}/sig", "app.img.json"),
    ],
    ids=" ".join,
)
def test_an_output_directory_that_may_only_be_read(made: Path, words: tuple[str, ...]) -> None:
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "key"], cwd=made)
    # root may write everywhere but where the kernel itself says no
    closed = "/proc/self/attr" if os.geteuid() == 0 else "/etc"
    error = refused(made, *(word.format(closed) for word in words))
    assert error["code"] in ("denied", "not_found", "invalid"), error
    assert closed in error["message"]


def test_an_image_in_use(made: Path) -> None:
    with (made / "plain.erofs").open("rb") as image:
        fcntl.flock(image, fcntl.LOCK_SH)
        assert refused(made, "layer", "format", "plain.erofs")["code"] == "busy"
    with (made / "app.img").open("rb") as image:
        fcntl.flock(image, fcntl.LOCK_EX)
        assert refused(made, "pack", "remove", "app.img", "first")["code"] == "busy"
        assert refused(made, "pack", "add", "app.img", "layer.erofs")["code"] == "busy"


@pytest.mark.parametrize(
    "words",
    [
        ("list", "app.img"),
        ("check", "app.img"),
        ("remove", "app.img", "first"),
        ("add", "app.img", "layer.erofs"),
        ("mount", "app.img", "--connect", "unix:///nowhere"),
    ],
    ids=" ".join,
)
def test_a_manifest_of_a_later_version(made: Path, words: tuple[str, ...]) -> None:
    path = made / "app.img.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": manifest["version"] + 1, "new": "field"}))
    error = refused(made, "pack", *words)
    assert (error["code"], "version" in error["message"]) == ("unsupported", True)


@pytest.mark.parametrize(
    "words",
    [
        ("layer", "build", "source"),
        ("layer", "build", "source", "image", "--filesystem", "ntfs"),
        ("layer", "build", "source", "image", "--sidecar"),
        ("layer", "build", "source", "image", "--max-bytes", "0"),
        ("layer", "format", "--salt", "xyz", "source"),
        ("layer", "verify", "--range", "1-2", "source"),
        ("pack", "add", "app.img"),
        ("pack", "mount", "app.img", "--connect", "nonsense"),
        ("sign", "app.img.json"),
        ("pack", "fold"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2_and_changes_nothing(made: Path, words: tuple[str, ...]) -> None:
    before = contents(made)
    done = guestctl(made, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage:" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(made) == before
