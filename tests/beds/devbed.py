"""Private /dev trees in an engine of this process, devices to put in, and containers to see them.

What a tree holds is read through its files and mountinfo, without the code under test.
"""

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from guestagent.api.devtree import (
    DevAdd,
    DevAttach,
    DevCreate,
    DevDestroy,
    DevList,
    DevPathsReply,
    DevRemove,
    DevTree,
)
from guestagent.devtree.trees import DevTrees
from guestagent.engine.engine import Engine
from tests.beds.agentbed import EngineBed
from tests.beds.dmbed import run

#: Where the tests put files of their own.
CORNER = Path("/dev/corner")
ROOT = "/run/devtrees/t"
#: struct posix_acl_xattr: version 2; user::rw-, user:1000:rw-, group::---, mask::rw-, other::---
ACL = bytes.fromhex(
    "02000000 01000600ffffffff 02000600e8030000 04000000ffffffff 10000600ffffffff 20000000ffffffff"
)
SHIFTED_ACL = ACL.replace(bytes.fromhex("e8030000"), (101_000).to_bytes(4, "little"))


class DevBed(EngineBed):
    """An engine with trees. A context manager."""

    trees: DevTrees

    def _open(self) -> Engine:
        engine = super()._open()
        self.trees = DevTrees(engine.state)
        engine.parts.append(self.trees.take_downs)
        return engine

    def books(self) -> dict[str, str]:
        """Return what is known of the trees and what they hold, too."""
        nodes = {
            tree.tree_id: self.tree(tree.tree_id).as_dict() | {"free_bytes": 0}
            for tree in self.list()
        }
        held = {tree["root"]: listing(str(tree["root"])) for tree in nodes.values()}
        return {**super().books(), "trees": repr(nodes), "held": repr(held)}

    def list(self, tree_id: str | None = None) -> tuple[DevTree, ...]:
        with self.operation() as op:
            return self.trees.list(DevList(tree_id=tree_id), op).trees

    def tree(self, tree_id: str = "t") -> DevTree:
        """Return a tree with its nodes."""
        return self.list(tree_id)[0]

    def create(self, tree_id: str = "t", **fields: object) -> DevTree:
        with self.operation() as op:
            return self.trees.create(DevCreate(tree_id=tree_id, **fields), op)  # type: ignore[arg-type]

    def add(self, *paths: str, tree_id: str = "t", **fields: object) -> DevPathsReply:
        with self.operation() as op:
            return self.trees.add(DevAdd(tree_id=tree_id, paths=paths, **fields), op)  # type: ignore[arg-type]

    def remove(self, *paths: str, tree_id: str = "t") -> tuple[str, ...]:
        with self.operation() as op:
            return self.trees.remove(DevRemove(tree_id=tree_id, paths=paths), op).removed

    def attach(self, target: str, tree_id: str = "t", **where: object) -> bool:
        """Return whether it was there already."""
        with self.operation() as op:
            request = DevAttach(tree_id=tree_id, target=target, **where)  # type: ignore[arg-type]
            return self.trees.attach(request, op).already

    def destroy(self, tree_id: str = "t") -> None:
        with self.operation() as op:
            self.trees.destroy(DevDestroy(tree_id=tree_id), op)


def listing(root: str) -> dict[str, str]:
    """Return what is in a tree: path -> kind, number, mode, owner, text of a link, mounts on it."""
    with open("/proc/self/mountinfo") as file:
        mounts = [line.split()[4] for line in file]
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = f"{directory}/{name}"
            info = os.lstat(path)
            words = [stat.filemode(info.st_mode), f"{info.st_uid}:{info.st_gid}"]
            if stat.S_ISCHR(info.st_mode) or stat.S_ISBLK(info.st_mode):
                words.append(f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}")
            if stat.S_ISLNK(info.st_mode):
                words.append(os.readlink(path))
            words += ["bound"] * mounts.count(path)
            found[path.removeprefix(f"{root}/")] = " ".join(words)
        names[:] = [name for name in names if f"{directory}/{name}" not in mounts]
    return dict(sorted(found.items()))


@contextlib.contextmanager
def corner() -> Iterator[Path]:
    """A directory of the guest's /dev for files of a test."""
    CORNER.mkdir()
    try:
        yield CORNER
    finally:
        shutil.rmtree(CORNER)


@contextlib.contextmanager
def dm_device(name: str, below: str, size_bytes: int = 1 << 20) -> Iterator[str]:
    """A linear device over another; yields its node, which the kernel has made."""
    run("dmsetup", "create", name, "--table", f"0 {size_bytes // 512} linear {below} 0")
    minor = run("dmsetup", "info", "-c", "--noheadings", "-o", "minor", name).strip()
    try:
        yield f"/dev/dm-{minor}"
    finally:
        run("dmsetup", "remove", "--retry", name)


#: Leaves its namespaces, waits until its ids are mapped, and evaluates what it is asked.
_CONTAINER = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
in_user_namespace = sys.argv[1] == "user"
assert libc.unshare(0x20000 | (0x10000000 if in_user_namespace else 0)) == 0
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
print("apart", flush=True)
sys.stdin.readline()
if in_user_namespace:
    os.setgroups([])
    os.setgid(0)
    os.setuid(0)
for line in sys.stdin:
    try:
        answer = eval(line)
    except OSError as error:
        answer = type(error).__name__
    print(json.dumps(answer), flush=True)
"""


class Container:
    """A process in a mount namespace of its own, and in a user namespace whose root is ``uid``
    outside, that evaluates expressions. A context manager."""

    def __init__(self, *, uid: int | None = None) -> None:
        kind = "plain" if uid is None else "user"
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CONTAINER, kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._read() == "apart\n"
        if uid is not None:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{self.pid}/{name}").write_text(f"0 {uid} 65536")
        self._write("")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def ask(self, expression: str) -> object:
        """Return the value of an expression there, or the name of the OSError that it raised."""
        self._write(expression)
        return json.loads(self._read())

    def dev(self) -> Mapping[str, object]:
        """Return what is seen in /dev: name -> device number."""
        names = self.ask("sorted(os.listdir('/dev'))")
        assert isinstance(names, list)
        return {name: self.ask(f"os.lstat('/dev/{name}').st_rdev") for name in names}

    def __enter__(self) -> "Container":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
