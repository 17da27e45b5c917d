"""What a path of /dev needs, decided from a table of files instead of a kernel."""

import errno

import pytest

from guestagent.api.devtree import DevAdd, DevClosure, DevCreate, UserNamespace
from guestagent.devtree.closure import Look, PathPlan, Seen, normal_path, plan_paths
from vsock.deadline import Deadline
from vsock.errors import CallError

Below = dict[str, tuple[str, ...]]
DIRECTORY = Seen(kind="directory", mode=0o755)


class Table(Look):
    """Path -> what is there: a text is a link, MAJOR:MINOR behind a letter is a device."""

    def __init__(
        self, files: dict[str, str], below: dict[str, tuple[str, ...]] | None = None
    ) -> None:
        self._files = files
        self._below = below or {}
        self.asked: list[str] = []

    def at(self, path: str) -> Seen | None:
        self.asked.append(path)
        text = self._files.get(path)
        if text is None:
            inside = path == "/" or any(file.startswith(f"{path}/") for file in self._files)
            return DIRECTORY if inside else None
        kind, _, rest = text.partition(" ")
        if kind in ("block", "character"):
            return Seen(kind=kind, mode=0o660, gid=6, rdev=rest)
        return Seen(kind=kind, mode=0o777, target=rest or None)

    def below(self, rdev: str) -> tuple[str, ...]:
        return self._below.get(rdev, ())


NULL = {"/dev/null": "character 1:3"}


def closure(files: dict[str, str], *paths: str, **fields: object) -> list[tuple[str, str]]:
    """Return (path, way) of all that is needed."""
    plans = plan(Table(files), *paths, **fields)
    return [(node.path, node.way) for each in plans for node in each.nodes]


def plan(look: Look, *paths: str, **fields: object) -> tuple[PathPlan, ...]:
    return plan_paths(DevClosure(paths=paths, **fields), look, Deadline())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("path", "normal"),
    [
        ("/dev/null", "/dev/null"),
        ("//dev/./a/../null/", "/dev/null"),
        ("/../dev/null", "/dev/null"),
        ("/dev/../etc", "/etc"),
    ],
)
def test_paths_are_normalised(path: str, normal: str) -> None:
    assert normal_path(path) == normal


@pytest.mark.parametrize(
    ("links", "needs"),
    [
        ({"/dev/a": "link null"}, ["/dev/a", "/dev/null"]),
        ({"/dev/a": "link /dev/null"}, ["/dev/a", "/dev/null"]),
        ({"/dev/a": "link ../dev/./null"}, ["/dev/a", "/dev/null"]),
        ({"/dev/a": "link ../../../dev/null"}, ["/dev/a", "/dev/null"]),
        ({"/dev/a": "link b", "/dev/b": "link null"}, ["/dev/a", "/dev/b", "/dev/null"]),
        (
            {"/dev/a": "link d/up", "/dev/d/up": "link ../null"},
            ["/dev/a", "/dev/d", "/dev/d/up", "/dev/null"],
        ),
        # ``..`` behind a link is that of the directory which the link leads to
        (
            {
                "/dev/a": "link l/../n",
                "/dev/l": "link d/e",
                "/dev/d/e/x": "file",
                "/dev/d/n": "link ../null",
            },
            ["/dev/a", "/dev/l", "/dev/d", "/dev/d/e", "/dev/d/n", "/dev/null"],
        ),
        ({"/dev/a": "link /proc/self/fd/0"}, ["/dev/a"]),
    ],
)
def test_links_are_followed_as_the_kernel_does(links: dict[str, str], needs: list[str]) -> None:
    assert [path for path, _ in closure({**NULL, **links}, "/dev/a")] == needs


@pytest.mark.parametrize(("count", "is_allowed"), [(40, True), (41, False)])
def test_forty_links_are_followed(count: int, is_allowed: bool) -> None:
    links = {f"/dev/{n}": f"link {n + 1}" for n in range(count - 1)}
    files = {**links, f"/dev/{count - 1}": "link null", **NULL}
    if is_allowed:
        assert len(closure(files, "/dev/0")) == 41
        return
    with pytest.raises(CallError, match="over 40 links, last '/dev/40'") as caught:
        closure(files, "/dev/0")
    assert caught.value.to_wire()["errno"] == "ELOOP"


@pytest.mark.parametrize(
    ("strategy", "ids", "way"),
    [
        ("auto", None, "mknod"),
        ("bind", None, "bind"),
        ("mknod", UserNamespace(uid=1000, gid=2000), "mknod"),
        ("auto", UserNamespace(uid=1000, gid=2000), "bind"),
    ],
)
def test_the_way_of_a_device(strategy: str, ids: UserNamespace | None, way: str) -> None:
    request = DevClosure(paths=("/dev/null", "/dev/socket"), strategy=strategy)
    look = Table({**NULL, "/dev/socket": "socket"})
    (null, sock) = (plan.nodes[0] for plan in plan_paths(request, look, Deadline(), ids))
    assert (null.way, sock.way) == (way, "bind")
    assert (null.seen.uid, null.seen.gid) == ((1000, 2006) if ids else (0, 6))


def test_ids_that_a_namespace_lacks_become_its_root() -> None:
    request = DevClosure(paths=("/dev/null",))
    (plan,) = plan_paths(
        request, Table(NULL), Deadline(), UserNamespace(uid=1000, gid=2000, size=6)
    )
    assert plan.nodes[0].seen.gid == 2000


def test_devices_below_a_device_are_needed_once() -> None:
    files = {f"/dev/dm-{n}": f"block 253:{n}" for n in range(3)}
    files |= {"/dev/vda": "block 254:0", "/dev/mapper/top": "link ../dm-2"}
    below = {
        "253:2": ("/dev/dm-0", "/dev/dm-1"),
        "253:1": ("/dev/vda",),
        "253:0": ("/dev/vda", "/dev/dm-1"),
    }
    (top,) = plan(Table(files, below), "/dev/mapper/top")
    assert sorted(node.path for node in top.nodes) == [
        *("/dev/dm-0", "/dev/dm-1", "/dev/dm-2", "/dev/mapper", "/dev/mapper/top", "/dev/vda"),
    ]


def test_a_device_below_that_is_not_there() -> None:
    look = Table({"/dev/dm-0": "block 253:0"}, {"253:0": ("/dev/vda",)})
    with pytest.raises(CallError, match=": '/dev/vda' is not there") as caught:
        plan(look, "/dev/dm-0")
    assert caught.value.code == "not_found"
    (skipped,) = plan(look, "/dev/dm-0", missing="skip")
    assert skipped.nodes == ()


def test_a_link_to_what_is_not_there() -> None:
    with pytest.raises(CallError, match="'/dev/b', which '/dev/a' needs, is not there") as caught:
        closure({"/dev/a": "link b"}, "/dev/a")
    assert (caught.value.object, caught.value.errno) == ("/dev/a", errno.ENOENT)
    assert "skip" in (caught.value.hint or "")


def test_a_directory_that_is_wanted_is_bound() -> None:
    files = {"/dev/snd/pcm": "character 116:3", "/dev/s": "link snd"}
    assert closure(files, "/dev/snd") == [("/dev/snd", "bind")]
    assert closure(files, "/dev/s") == [("/dev/s", "symlink"), ("/dev/snd", "bind")]
    assert closure(files, "/dev/snd/pcm") == [("/dev/snd", "mkdir"), ("/dev/snd/pcm", "mknod")]


OUT = {"/dev/log": "link /run/systemd/log", "/run/systemd/log": "socket"}


def test_nothing_is_made_outside_of_dev_and_only_named_places_are_passed() -> None:
    with pytest.raises(CallError, match="'/dev/log' leads out of /dev, to '/run'") as caught:
        closure(OUT, "/dev/log")
    assert caught.value.code == "denied"
    assert closure(OUT, "/dev/log", outside=("/run/systemd",)) == [
        ("/dev/log", "symlink"),
        ("/run", "none"),
        ("/run/systemd", "none"),
        ("/run/systemd/log", "none"),
    ]
    with pytest.raises(CallError, match="to '/run/systemd'"):
        closure(OUT, "/dev/log", outside=("/run/sys",))
    back = {**NULL, "/var/a": "link /dev/null"}
    assert closure(back, "/var/a", outside=("/var",))[-1] == ("/dev/null", "mknod")


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/../etc/passwd", "/", "/dev/", "/device"])
def test_a_place_outside_is_not_even_looked_at(path: str) -> None:
    look = Table({"/etc/passwd": "file", "/device": "file", **NULL})
    with pytest.raises(CallError) as caught:
        plan(look, path)
    assert caught.value.code == "denied"
    assert set(look.asked) <= {"/", "/dev"}


def test_too_many_files() -> None:
    """Files that several paths need count once."""
    deep = "/dev/" + "/".join(["a"] * 200)
    shared = {f"{deep}/{n}": "file" for n in range(256)}
    assert len({path for path, _ in closure(shared, *shared)}) == 456
    files = {f"/dev/{n}{'/a' * 16}/x": "file" for n in range(256)}
    with pytest.raises(CallError, match="over 4096 files") as caught:
        closure(files, *files)
    assert caught.value.code == "resource"


def test_the_deadline_holds_while_links_are_followed() -> None:
    request = DevClosure(paths=("/dev/null",))
    with pytest.raises(CallError) as caught:
        plan_paths(request, Table(NULL), Deadline(0.0))
    assert caught.value.code == "timeout"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"paths": ()}, "1 to 256 entries, got 0"),
        ({"paths": ("/dev/null",) * 257}, "1 to 256 entries, got 257"),
        ({"paths": ("dev/null",)}, "must be absolute, got 'dev/null'"),
        ({"paths": ("/dev/a\0b",)}, "null byte"),
        ({"paths": ("/dev/\udcff",)}, "must be UTF-8"),
        ({"paths": ("/dev/" + "x" * 256,)}, "each name 255, got 261 bytes"),
        ({"paths": ("/dev" + "/x" * 2046,)}, "4095 bytes long"),
        ({"paths": ("/dev/a",), "missing": "ignore"}, "missing must be one of"),
        ({"paths": ("/dev/a",), "strategy": "copy"}, "strategy must be one of"),
        ({"paths": ("/dev/a",), "outside": ("run",)}, "outside must be absolute"),
        ({"paths": ("/dev/a",), "tree_id": "../x"}, "tree_id"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DevAdd(**{"tree_id": "t", **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"root": "/run/../x"},
        {"size_bytes": 0},
        {"mode": 0o4755},
        {"preserve": ("null",)},
        {"preserve": ("pts", "pts")},
    ],
)
def test_bad_trees_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        DevCreate(tree_id="t", **fields)  # type: ignore[arg-type]
