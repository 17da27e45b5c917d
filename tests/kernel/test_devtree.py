"""Private /dev trees on a real kernel: what is made, what a process in one sees, and bad input."""

import os
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api.devtree import DevAttach, DevClosure, UserNamespace
from tests.beds.devbed import (
    ACL,
    ROOT,
    SHIFTED_ACL,
    Container,
    DevBed,
    corner,
    dm_device,
    listing,
)
from tests.beds.dmbed import dev_of, loop_device, run
from vsock.errors import CallError

NULL, ZERO = os.makedev(1, 3), os.makedev(1, 5)


@pytest.fixture(autouse=True)
def place() -> Iterator[Path]:
    with corner() as path:
        yield path


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[DevBed]:
    with DevBed(tmp_path / "state") as bed:
        yield bed


def states(reply: object) -> list[tuple[str, str]]:
    return [(path.path, path.state) for path in reply.paths]  # type: ignore[attr-defined]


def test_nodes_are_those_of_the_guest(bed: DevBed) -> None:
    tree = bed.create()
    assert (tree.root, tree.state, tree.size_bytes) == (ROOT, "mounted", 64 * 1024)
    old = os.umask(0o077)
    try:
        reply = bed.add("/dev/null", "/dev/loop0", "/dev/../dev//./zero")
    finally:
        os.umask(old)
    assert states(reply) == [
        ("/dev/null", "created"),
        ("/dev/loop0", "created"),
        ("/dev/zero", "created"),
    ]
    assert listing(ROOT) == {
        "loop0": "brw------- 0:0 7:0",
        "null": "crw-rw-rw- 0:0 1:3",
        "zero": "crw-rw-rw- 0:0 1:5",
    }
    Path(ROOT, "null").write_bytes(b"gone")
    before = listing(ROOT)
    assert states(bed.add("/dev/null")) == [("/dev/null", "existed")]
    assert listing(ROOT) == before
    assert bed.create().already
    bed.destroy()
    assert not Path(ROOT).exists()
    bed.destroy()


def test_links_are_made_one_by_one_with_their_texts(bed: DevBed, place: Path) -> None:
    (place / "by").mkdir(0o711)
    (place / "by/a").symlink_to("../b")
    (place / "b").symlink_to("/dev/corner/c")
    (place / "c").symlink_to("./by/../../null")
    os.chown(place / "b", 5, 6, follow_symlinks=False)
    bed.create()
    bed.add("/dev/corner/by/a")
    assert listing(ROOT) == {
        "corner": "drwxr-xr-x 0:0",
        "corner/b": "lrwxrwxrwx 5:6 /dev/corner/c",
        "corner/by": "drwx--x--x 0:0",
        "corner/by/a": "lrwxrwxrwx 0:0 ../b",
        "corner/c": "lrwxrwxrwx 0:0 ./by/../../null",
        "null": "crw-rw-rw- 0:0 1:3",
    }
    assert bed.remove("/dev/corner/by/a")[-1] == "/dev/null"
    assert listing(ROOT) == {}


def test_links_into_proc_are_kept_as_they_are(bed: DevBed, place: Path) -> None:
    (place / "stdin").symlink_to("/proc/self/fd/0")
    bed.create()
    bed.add("/dev/corner/stdin")
    assert listing(ROOT)["corner/stdin"] == "lrwxrwxrwx 0:0 /proc/self/fd/0"


def test_what_is_no_device_is_bound_and_the_guest_keeps_its_owner(bed: DevBed, place: Path) -> None:
    (place / "file").write_bytes(b"content")
    os.mkfifo(place / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(place / "socket"))
    (place / "directory").mkdir()
    (place / "directory/inside").write_bytes(b"inside")
    for name in ("file", "fifo", "socket", "directory"):
        os.chown(place / name, 7, 8)
        os.chmod(place / name, 0o640)
    before = {name: os.stat(place / name) for name in os.listdir(place)}
    bed.create()
    bed.add(*(f"/dev/corner/{name}" for name in ("file", "fifo", "socket", "directory")))
    assert listing(ROOT) == {
        "corner": "drwxr-xr-x 0:0",
        "corner/directory": "drw-r----- 7:8 bound",
        "corner/fifo": "prw-r----- 7:8 bound",
        "corner/file": "-rw-r----- 7:8 bound",
        "corner/socket": "srw-r----- 7:8 bound",
    }
    assert Path(ROOT, "corner/file").read_bytes() == b"content"
    assert Path(ROOT, "corner/directory/inside").read_bytes() == b"inside"
    # a path in a directory that is bound is there with it, and nothing is made in the guest's
    assert states(bed.add("/dev/corner/directory/inside")) == [
        ("/dev/corner/directory/inside", "existed")
    ]
    assert os.listdir(place / "directory") == ["inside"]
    bed.remove("/dev/corner/directory/inside")
    assert {name: os.stat(place / name) for name in os.listdir(place)} == before
    placeholders = _placeholders(bed, "file", "directory")
    assert placeholders == [(0o100640, 7, 8), (0o040640, 7, 8)]


def _placeholders(bed: DevBed, *names: str) -> list[tuple[int, int, int]]:
    """Return what the bound files stand on, which the binds hide."""
    found = []
    for name in names:
        path = f"{ROOT}/corner/{name}"
        assert os.system(f"umount {path}") == 0
        info = os.lstat(path)
        found.append((info.st_mode, info.st_uid, info.st_gid))
    return found


def test_access_list_and_label_are_taken_over(bed: DevBed, place: Path) -> None:
    os.mknod(place / "node", 0o660 | stat.S_IFCHR, NULL)
    os.mknod(place / "plain", stat.S_IFCHR, NULL)
    os.chmod(place / "plain", 0o660)
    (place / "file").touch()
    for name in ("node", "file"):
        os.setxattr(place / name, "system.posix_acl_access", ACL)
        os.setxattr(place / name, "security.selinux", b"system_u:object_r:null_device_t:s0")
    os.setxattr(place, "system.posix_acl_default", ACL)
    paths = [f"/dev/corner/{name}" for name in ("node", "plain", "file")]
    bed.create()
    bed.create("u", user_namespace=UserNamespace(uid=100_000, gid=100_000))
    bed.add(*paths)
    bed.add(*paths, tree_id="u", strategy="mknod")
    for root, acl in ((ROOT, ACL), ("/run/devtrees/u", SHIFTED_ACL)):
        node = f"{root}/corner/node"
        assert os.getxattr(node, "system.posix_acl_access") == acl
        assert os.getxattr(node, "security.selinux") == b"system_u:object_r:null_device_t:s0"
        assert os.getxattr(f"{root}/corner", "system.posix_acl_default") == acl
        # of the default list of its directory it has nothing, as the guest's
        assert os.listxattr(f"{root}/corner/plain") == []
        assert stat.S_IMODE(os.stat(f"{root}/corner/plain").st_mode) == 0o660
    assert os.getxattr(place / "file", "system.posix_acl_access") == ACL
    assert os.system(f"umount {ROOT}/corner/file") == 0
    assert os.getxattr(f"{ROOT}/corner/file", "system.posix_acl_access") == ACL


def test_device_mapper_brings_all_that_is_below(bed: DevBed, place: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with (
        loop_device(image) as loop,
        dm_device("low", loop) as low,
        dm_device("high", low) as high,
    ):
        (place / "high").symlink_to(f"..{high.removeprefix('/dev')}")
        bed.create()
        bed.add("/dev/corner/high")
        held = listing(ROOT)
        assert len(held) == 5
        for node in (high, low, loop):
            assert held[node.removeprefix("/dev/")].endswith(dev_of(node))
        bed.add(low)
        assert loop not in bed.remove("/dev/corner/high")
        assert set(listing(ROOT)) == {low.removeprefix("/dev/"), loop.removeprefix("/dev/")}
        bed.add("/dev/corner/high")


def test_shared_nodes_go_with_the_last_path(bed: DevBed, place: Path) -> None:
    (place / "a").symlink_to("../null")
    (place / "b").symlink_to("../null")
    bed.create()
    bed.add("/dev/corner/a", "/dev/corner/b")
    tree = bed.tree()
    needed_by = {node.path: node.needed_by for node in tree.nodes}
    assert needed_by["/dev/null"] == ("/dev/corner/a", "/dev/corner/b")
    assert bed.remove("/dev/corner/a") == ("/dev/corner/a",)
    assert set(bed.remove("/dev/corner/b")) == {"/dev/null", "/dev/corner", "/dev/corner/b"}


def test_what_others_made_stays(bed: DevBed) -> None:
    bed.create()
    os.mknod(f"{ROOT}/null", 0o600 | stat.S_IFCHR, NULL)
    assert states(bed.add("/dev/null")) == [("/dev/null", "existed")]
    assert bed.remove("/dev/null") == ()
    os.mknod(f"{ROOT}/zero", 0o600 | stat.S_IFCHR, NULL)
    before = listing(ROOT)
    with pytest.raises(CallError, match="'/dev/zero' is another file in the tree") as caught:
        bed.add("/dev/full", "/dev/zero")
    assert (caught.value.code, listing(ROOT)) == ("conflict", before)
    bed.add("/dev/full")
    os.unlink(f"{ROOT}/full")
    Path(f"{ROOT}/full").write_bytes(b"of the container")
    tree = bed.tree()
    assert [(node.path, node.state) for node in tree.nodes] == [("/dev/full", "other")]
    bed.remove("/dev/full")
    assert Path(f"{ROOT}/full").read_bytes() == b"of the container"


def test_a_container_cannot_lead_the_agent_out_of_the_tree(bed: DevBed, place: Path) -> None:
    (place / "null").symlink_to("../null")
    bed.create()
    Path(ROOT, "corner").symlink_to("/run")
    with pytest.raises(CallError, match="another file in the tree") as caught:
        bed.add("/dev/corner/null")
    assert caught.value.code == "conflict"
    assert not Path("/run/null").exists()


def test_preserved_directories(bed: DevBed) -> None:
    bed.create(preserve=("pts", "shm"), mode=0o711)
    assert stat.S_IMODE(os.stat(ROOT).st_mode) == 0o711
    assert os.stat(f"{ROOT}/pts").st_dev == os.stat("/dev/pts").st_dev
    assert os.stat(f"{ROOT}/shm").st_dev == os.stat("/dev/shm").st_dev
    assert states(bed.add("/dev/pts/ptmx")) == [("/dev/pts/ptmx", "existed")]


# --- bad input


@pytest.mark.parametrize(
    ("path", "code", "name", "says"),
    [
        ("/dev/corner/circle", "invalid", "ELOOP", "over 40 links"),
        ("/dev/corner/none", "not_found", "ENOENT", "'/dev/corner/none'"),
        ("/dev/corner/dangling", "not_found", "ENOENT", "'/dev/corner/gone'"),
        ("/dev/corner/out", "denied", None, "out of /dev, to '/etc'"),
        ("/dev/../etc/passwd", "denied", None, "out of /dev, to '/etc'"),
        ("/dev", "denied", None, "all of '/dev'"),
        ("/dev/corner/up", "denied", None, "all of '/dev'"),
        ("/dev/null/x", "invalid", "ENOTDIR", "'/dev/null', on the way"),
        ("/dev/corner/long", "invalid", "ENAMETOOLONG", "name of over 255"),
    ],
)
def test_bad_paths_are_refused_and_nothing_is_made(
    bed: DevBed, place: Path, path: str, code: str, name: str | None, says: str
) -> None:
    (place / "circle").symlink_to("elcric")
    (place / "elcric").symlink_to("circle")
    (place / "dangling").symlink_to("gone")
    (place / "out").symlink_to("/etc/passwd")
    (place / "up").symlink_to("..")
    (place / "long").symlink_to("x" * 256)
    bed.create()
    with pytest.raises(CallError) as caught:
        bed.add("/dev/null", path)
    assert (caught.value.code, caught.value.step) == (code, "closure")
    assert caught.value.to_wire()["errno"] == name
    assert says in caught.value.message
    assert listing(ROOT) == {}
    assert bed.tree().paths == ()


def test_missing_paths_may_be_skipped(bed: DevBed) -> None:
    bed.create()
    reply = bed.add("/dev/null", "/dev/none", missing="skip")
    assert states(reply) == [("/dev/null", "created"), ("/dev/none", "skipped")]
    assert bed.tree().paths == ("/dev/null",)


@pytest.mark.parametrize("missing", ["fail", "skip"])
def test_a_node_that_vanishes_meanwhile(
    bed: DevBed, place: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (place / name).touch()
        (place / f"to-{name}").symlink_to(name)
    bed.create()
    begin = bed.trees._begin
    vanish = (place / "b").unlink
    monkeypatch.setattr(bed.trees, "_begin", lambda *words: (begin(*words), vanish()))
    paths = ("/dev/corner/to-a", "/dev/corner/to-b", "/dev/null")
    if missing == "fail":
        with pytest.raises(CallError, match="'/dev/corner/b' has vanished") as caught:
            bed.add(*paths)
        assert (caught.value.code, caught.value.object) == ("not_found", "/dev/corner/b")
        assert listing(ROOT) == {}
        return
    reply = bed.add(*paths, missing="skip")
    assert [state for _, state in states(reply)] == ["created", "skipped", "created"]
    assert list(listing(ROOT)) == ["corner", "corner/a", "corner/to-a", "null"]
    monkeypatch.undo()
    bed.remove("/dev/corner/to-a", "/dev/null")
    assert listing(ROOT) == {}


def test_a_directory_of_single_files_is_not_bound_over(bed: DevBed, place: Path) -> None:
    (place / "file").touch()
    bed.create()
    bed.add("/dev/corner/file")
    with pytest.raises(CallError, match="directory of single files"):
        bed.add("/dev/corner")
    bed.remove("/dev/corner/file")
    bed.add("/dev/corner/file", "/dev/corner")
    assert listing(ROOT) == {"corner": "drwxr-xr-x 0:0 bound"}


def test_another_device_by_now_is_a_conflict(bed: DevBed, place: Path) -> None:
    os.mknod(place / "x", stat.S_IFCHR, NULL)
    bed.create()
    bed.add("/dev/corner/x")
    os.unlink(place / "x")
    os.mknod(place / "x", stat.S_IFCHR, ZERO)
    with pytest.raises(CallError, match="character 1:5 by now, and character 1:3 in the tree"):
        bed.add("/dev/corner/x")
    bed.remove("/dev/corner/x")
    bed.add("/dev/corner/x")
    assert listing(ROOT)["corner/x"].endswith("1:5")


def test_closure_makes_nothing(bed: DevBed, place: Path) -> None:
    (place / "a").symlink_to("../null")
    with bed.operation() as op:
        reply = bed.trees.closure(DevClosure(paths=("/dev/corner/a",), strategy="bind"), op)
    assert [(node.path, node.way) for node in reply.paths[0].nodes] == [
        ("/dev/corner", "mkdir"),
        ("/dev/corner/a", "symlink"),
        ("/dev/null", "bind"),
    ]
    assert not Path(ROOT).exists()


@pytest.mark.parametrize("root", ["/srv/dev", "/run/guestagent-x/../y"])
def test_roots_are_below_the_allowed_ones(bed: DevBed, root: str) -> None:
    with pytest.raises((CallError, ValueError)):
        bed.create(root=root)
    assert bed.list() == ()


def test_the_same_id_with_another_specification_is_a_conflict(bed: DevBed) -> None:
    bed.create()
    with pytest.raises(CallError, match="another size_bytes"):
        bed.create(size_bytes=1 << 20)
    with pytest.raises(CallError, match="the target of devtree 't'"):
        bed.create("u", root=ROOT)


# --- containers


def test_a_process_in_a_mount_namespace_sees_just_the_tree(bed: DevBed, place: Path) -> None:
    (place / "log").write_bytes(b"log")
    bed.create()
    bed.add("/dev/null", "/dev/corner/log")
    with Container() as container:
        assert not bed.attach("/dev", pid=container.pid)
        assert bed.attach("/dev", pid=container.pid)
        assert container.dev() == {"corner": 0, "null": NULL}
        assert container.ask("open('/dev/null', 'w').write('x')") == 1
        assert container.ask("open('/dev/corner/log').read()") == "log"
        assert container.ask("os.stat('/dev/loop0')") == "FileNotFoundError"
        # what is added and removed later is so in the container, too
        bed.add("/dev/zero")
        bed.add("/dev/full", strategy="bind")
        assert container.dev() == {
            "corner": 0,
            "full": os.makedev(1, 7),
            "null": NULL,
            "zero": ZERO,
        }
        assert container.ask("len(open('/dev/zero', 'rb').read(3))") == 3
        bed.remove("/dev/null", "/dev/full")
        assert container.dev() == {"corner": 0, "zero": ZERO}
        with pytest.raises(CallError) as caught:
            bed.destroy()
        assert (caught.value.code, caught.value.step) == ("busy", "look")
        assert bed.tree().attached[0].pid == container.pid
        assert list(listing(ROOT)) == ["corner", "corner/log", "zero"]
    bed.destroy()


def test_a_process_in_a_user_namespace_gets_binds(bed: DevBed) -> None:
    bed.create(user_namespace=UserNamespace(uid=100_000, gid=100_000))
    (null, _) = bed.add("/dev/null", "/dev/loop0").paths
    assert null.nodes[0].way == "bind"
    bed.add("/dev/zero", strategy="mknod")
    with Container(uid=100_000) as container:
        bed.attach("/dev", pid=container.pid)
        assert container.dev() == {"loop0": os.makedev(7, 0), "null": NULL, "zero": ZERO}
        assert container.ask("open('/dev/null', 'w').write('x')") == 1
        assert container.ask("len(open('/dev/zero', 'rb').read(3))") == 3
        assert container.ask("os.stat('/dev/zero').st_uid") == 0
        assert container.ask("open('/dev/loop0')") == "PermissionError"
        assert container.ask("os.symlink('/proc/self/fd', '/dev/fd')") is None
        assert container.ask("os.mknod('/dev/x', 0o20666, 259)") == "PermissionError"
        bed.add("/dev/full")
        assert container.ask("os.stat('/dev/full').st_rdev") == os.makedev(1, 7)
        bed.remove("/dev/full")
        assert container.ask("os.stat('/dev/full')") == "FileNotFoundError"
    bed.destroy()


def test_what_a_container_uses_is_not_removed(bed: DevBed) -> None:
    bed.create()
    bed.add("/dev/null", strategy="bind")
    with Container() as container:
        bed.attach("/dev", pid=container.pid)
        container.ask("globals().update(held=open('/dev/null'))")
        with pytest.raises(CallError) as caught:
            bed.remove("/dev/null")
        assert (caught.value.code, caught.value.object) == ("busy", "/dev/null")
        assert bed.tree().paths == ("/dev/null",)
        assert container.dev() == {"null": NULL}
        container.ask("held.close()")
        assert bed.remove("/dev/null") == ("/dev/null",)
        assert container.dev() == {}


def test_a_container_whose_file_system_never_answers(bed: DevBed) -> None:
    """It mounts a FUSE file system and reads none of its requests."""
    run("modprobe", "fuse")
    request = DevAttach(tree_id="t", target="/mnt/dev", pid=1)
    bed.create()
    with Container() as container:
        container.ask("globals().update(fd=os.open('/dev/fuse', os.O_RDWR))")
        options = "b'fd=%d,rootmode=40000,user_id=0,group_id=0' % fd"
        assert container.ask(f"libc.mount(b'none', b'/mnt', b'fuse', 0, {options})") == 0
        with bed.operation(0.5) as op, pytest.raises(CallError) as caught:
            bed.trees.attach(request.replace(pid=container.pid), op)
        assert (caught.value.code, caught.value.step) == ("timeout", "attach")
        assert bed.tree().attached == ()
        assert not bed.attach("/dev", pid=container.pid)
    for thread in threading.enumerate():  # its end comes with the container's
        if thread.name == "apart":
            thread.join(10)
    bed.destroy()


def test_a_namespace_by_a_file(bed: DevBed) -> None:
    held = Path("/run/namespace")
    bed.create()
    bed.add("/dev/null")
    held.touch()
    with pytest.raises(CallError, match="none of a mount namespace"):
        bed.attach("/dev", namespace=str(held))
    with Container() as container:
        assert os.system(f"mount --bind /proc/{container.pid}/ns/uts {held}") == 0
        try:
            with pytest.raises(CallError, match="none of a mount namespace"):
                bed.attach("/dev", namespace=str(held))
        finally:
            os.system(f"umount {held}")
    held.unlink()


def test_a_directory_of_the_guest(bed: DevBed) -> None:
    target = Path("/run/rootfs/dev")
    target.mkdir(parents=True)
    bed.create()
    bed.add("/dev/null")
    bed.add("/dev/zero", strategy="bind")
    assert not bed.attach(str(target))
    assert bed.attach(str(target))
    assert sorted(os.listdir(target)) == ["null", "zero"]
    tree = bed.tree()
    assert [where.target for where in tree.attached] == [str(target)]
    held = listing(str(target))
    for name, step in (("null", "look"), ("zero", "unmount")):
        with open(target / name), pytest.raises(CallError) as caught:
            bed.destroy()
        assert (caught.value.code, caught.value.step) == ("busy", step)
        assert ("process" in (caught.value.hint or "")) == (name == "null")
        assert listing(str(target)) == listing(ROOT) == held
    bed.destroy()
    assert os.listdir(target) == []
    target.rmdir()
    target.parent.rmdir()


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("/srv", "invalid"),
        ("/run/link/dev", "denied"),
        ("/run/none", "mount"),
        (f"{ROOT}/corner", "conflict"),
        (f"{ROOT}/corner/file", "conflict"),
    ],
)
def test_targets_that_are_refused(bed: DevBed, place: Path, target: str, code: str) -> None:
    (place / "file").touch()
    link = Path("/run/link")
    link.symlink_to("/srv")
    bed.create()
    bed.add("/dev/corner/file")
    with pytest.raises(CallError) as caught:
        bed.attach(target)
    assert caught.value.code == code, caught.value
    assert bed.tree().attached == ()
    link.unlink()


def test_processes_that_are_refused(bed: DevBed) -> None:
    bed.create()
    for pid, code in ((os.getpid(), "invalid"), (1 << 22, "not_found")):
        with pytest.raises(CallError) as caught:
            bed.attach("/dev", pid=pid)
        assert caught.value.code == code


@pytest.mark.parametrize(
    "target", ["/run/state", "/run/state/x", "/run/devtrees", "/run/devtrees/u"]
)
def test_a_copy_hides_nothing_that_is_in_use(target: str) -> None:
    with DevBed(Path("/run/state")) as bed:
        bed.create()
        bed.create("u")
        with pytest.raises(CallError, match="would hide") as caught:
            bed.attach(target)
        assert caught.value.code == "conflict"
    shutil.rmtree("/run/state")


def test_a_tree_without_room(bed: DevBed, place: Path) -> None:
    """A text of over 128 bytes takes a page of its own in a tmpfs."""
    long = f"{'./' * 80}null"
    for name in ("a", "b"):
        (place / name).symlink_to(f"../{long}")
    bed.create(size_bytes=4096)
    with pytest.raises(CallError) as caught:
        bed.add("/dev/corner/a", "/dev/corner/b")
    assert (caught.value.code, caught.value.object) == ("resource", "/dev/corner/b")
    assert listing(ROOT) == {}


def test_what_a_container_puts_in_the_place_of_a_bind_stays(bed: DevBed) -> None:
    bed.create()
    bed.add("/dev/null", "/dev/zero", strategy="bind")
    with Container() as container:
        bed.attach("/dev", pid=container.pid)
        # what it has of the guest's own mounts keeps the file from being unlinked
        assert container.ask("os.system('umount -R /run/devtrees/t')") == 0
        assert container.ask("os.system('umount /dev/null')") == 0
        assert container.ask("os.unlink('/dev/null')") is None
        assert container.ask("open('/dev/null', 'w').write('mine')") == 4
        assert {node.path: node.state for node in bed.tree().nodes} == {
            "/dev/null": "other",
            "/dev/zero": "there",
        }
        bed.remove("/dev/null")
        assert container.ask("open('/dev/null').read()") == "mine"
        assert container.ask("os.system('umount /dev/zero')") == 0
        bed.remove("/dev/zero")
        assert container.ask("os.listdir('/dev')") == ["null"]


def test_a_tree_belongs_to_the_root_of_the_user_namespace(bed: DevBed) -> None:
    bed.create(user_namespace=UserNamespace(uid=100_000, gid=200_000))
    info = os.stat(ROOT)
    assert (info.st_uid, info.st_gid) == (100_000, 200_000)
    bed.add("/dev/loop0", strategy="mknod")
    assert listing(ROOT) == {"loop0": "brw------- 100000:200000 7:0"}
