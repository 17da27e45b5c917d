"""Private /dev trees: what a container may see of the guest's devices, and nothing else."""

from collections.abc import Mapping

from guestagent.api.checks import check_choice, check_path, check_range, check_word
from guestagent.api.request import Empty, Request
from vsock.record import Record

#: Directories of the guest's /dev that a tree may keep whole, with what is mounted on them.
PRESERVED = ("pts", "shm", "mqueue")
#: What becomes of a path that is not there.
MISSING = ("fail", "skip")
#: How device nodes are made: ``auto`` is mknod, and bind for a user namespace.
STRATEGIES = ("auto", "mknod", "bind")
#: Paths of one request.
MAX_PATHS = 256
#: Paths longer than this are refused by Linux, names too (include/uapi/linux/limits.h).
_PATH_MAX_BYTES, _NAME_MAX_BYTES = 4095, 255
_MODE_MAX = 0o1777
_ID_MAX = (1 << 32) - 2
_PID_MAX = 1 << 22


class UserNamespace(Record):
    """The ids of a user namespace: its 0 to ``size`` - 1 are ``uid`` and ``gid`` and those that
    follow, outside of it."""

    uid: int
    gid: int
    size: int = 65536

    def check(self) -> None:
        check_range("size", self.size, 1, _ID_MAX)
        check_range("uid", self.uid, 0, _ID_MAX - self.size + 1)
        check_range("gid", self.gid, 0, _ID_MAX - self.size + 1)


class DevNode(Record):
    """A file in a tree. ``kind`` is link, block, character, directory, file, socket or fifo.

    ``way`` is how it is made: symlink, mkdir, mknod or bind; ``none`` outside of /dev, where
    nothing is made. ``state`` is made, existed or planned; in a list it is there, missing or other
    (a container has put another file in its place). ``needed_by`` are the paths that were asked
    for and need it.
    """

    path: str
    kind: str
    way: str
    state: str
    rdev: str | None
    target: str | None
    uid: int
    gid: int
    mode: int
    needed_by: tuple[str, ...] = ()


class DevPath(Record):
    """A path that was asked for, normalised, and the files that it needs, in the order of their
    making. ``state`` is created, existed (nothing was to do), skipped (it is not there) or
    planned."""

    path: str
    state: str
    nodes: tuple[DevNode, ...]


class DevAttachment(Record):
    """Where a copy of a tree is mounted. ``pid`` or ``namespace`` says in which mount namespace,
    neither that it is the agent's own."""

    target: str
    pid: int | None = None
    namespace: str | None = None


class DevTree(Record):
    """A tree as the kernel has it. ``state`` is mounted or unmounted; ``nodes`` is filled where one
    tree is asked for by its id."""

    tree_id: str
    state: str
    root: str
    dev: str
    mount_id: int
    size_bytes: int
    free_bytes: int
    mode: int
    user_namespace: UserNamespace | None
    paths: tuple[str, ...]
    nodes: tuple[DevNode, ...]
    attached: tuple[DevAttachment, ...]
    already: bool = False


class DevCreate(Request[DevTree], method="dev.create"):
    """Make an empty private /dev.

    It is a tmpfs at ``root``, by default /run/devtrees/TREE_ID, with the directories ``preserve``
    of the guest's /dev. For a container in a user namespace everything that is made belongs to the
    ids of ``user_namespace``.
    """

    tree_id: str
    root: str | None = None
    size_bytes: int = 64 * 1024
    mode: int = 0o755
    preserve: tuple[str, ...] = ()
    user_namespace: UserNamespace | None = None

    def check(self) -> None:
        check_word("tree_id", self.tree_id)
        if self.root is not None:
            check_path("root", self.root)
        check_range("size_bytes", self.size_bytes, 4096, 1 << 30)
        check_range("mode", self.mode, 0, _MODE_MAX)
        for name in self.preserve:
            check_choice("preserve", name, PRESERVED)
        if len(set(self.preserve)) < len(self.preserve):
            raise ValueError("preserve names a directory twice")

    @property
    def mount_point(self) -> str:
        return self.root or f"/run/devtrees/{self.tree_id}"


class DevPathsReply(Record):
    paths: tuple[DevPath, ...]
    timings_ms: Mapping[str, float]


class DevClosure(Request[DevPathsReply], method="dev.closure"):
    """Say what paths of the guest's /dev need, without making anything.

    A path needs each symbolic link on its way, what the last one leads to, and of a device-mapper
    device every device below it. ``outside`` names directories outside of /dev that a path or a
    link may lead through; nothing is made of them.
    """

    paths: tuple[str, ...]
    missing: str = "fail"
    strategy: str = "auto"
    outside: tuple[str, ...] = ()

    def check(self) -> None:
        _check_paths("paths", self.paths)
        check_choice("missing", self.missing, MISSING)
        check_choice("strategy", self.strategy, STRATEGIES)
        if self.outside:
            _check_paths("outside", self.outside)


class DevAdd(Request[DevPathsReply], method="dev.add"):
    """Add paths of the guest's /dev to a tree, with what they need: all or nothing.

    The fields are as in DevClosure; ``missing: skip`` leaves out paths that are not there.
    """

    tree_id: str
    paths: tuple[str, ...]
    missing: str = "fail"
    strategy: str = "auto"
    outside: tuple[str, ...] = ()

    def check(self) -> None:
        check_word("tree_id", self.tree_id)
        self.closure.check()

    @property
    def closure(self) -> DevClosure:
        """The request that says what this one makes."""
        return DevClosure(
            paths=self.paths,
            missing=self.missing,
            strategy=self.strategy,
            outside=self.outside,
        )


class DevRemoveReply(Record):
    """``removed`` are the files that no other path needs; ``kept`` those that others need."""

    removed: tuple[str, ...]
    kept: tuple[str, ...]
    timings_ms: Mapping[str, float]


class DevRemove(Request[DevRemoveReply], method="dev.remove"):
    """Take paths out of a tree, with what no other path needs: all or nothing.

    Paths that were not added are refused, or with ``missing: skip`` left out.
    """

    tree_id: str
    paths: tuple[str, ...]
    missing: str = "fail"

    def check(self) -> None:
        check_word("tree_id", self.tree_id)
        _check_paths("paths", self.paths)
        check_choice("missing", self.missing, MISSING)


class DevListReply(Record):
    trees: tuple[DevTree, ...]


class DevList(Request[DevListReply], method="dev.list"):
    """List the trees, or one with all of its files."""

    tree_id: str | None = None

    def check(self) -> None:
        if self.tree_id is not None:
            check_word("tree_id", self.tree_id)


class DevAttachReply(Record):
    tree_id: str
    target: str
    mount_id: int
    already: bool
    timings_ms: Mapping[str, float]


class DevAttach(Request[DevAttachReply], method="dev.attach"):
    """Mount a tree on a directory, mostly a container's /dev; it follows later changes of the tree.

    ``pid`` is a process in the container, whose root ``target`` is in; ``namespace`` a file that a
    mount namespace is bound to. With neither, ``target`` is a directory of the guest below an
    allowed root.
    """

    tree_id: str
    target: str
    pid: int | None = None
    namespace: str | None = None

    def check(self) -> None:
        check_word("tree_id", self.tree_id)
        check_path("target", self.target)
        check_range("pid", self.pid, 1, _PID_MAX)
        if self.namespace is not None:
            check_path("namespace", self.namespace)
        if self.pid is not None and self.namespace is not None:
            raise ValueError("pid and namespace exclude each other")
        if self.target == "/":
            raise ValueError("target is the root of the file system")


class DevDestroy(Request[Empty], method="dev.destroy"):
    """Take a tree away; busy while a container has it."""

    tree_id: str

    def check(self) -> None:
        check_word("tree_id", self.tree_id)


def _check_paths(name: str, paths: tuple[str, ...]) -> None:
    if not 0 < len(paths) <= MAX_PATHS:
        raise ValueError(f"{name} must have 1 to {MAX_PATHS} entries, got {len(paths)}")
    for path in paths:
        if not path.startswith("/"):
            raise ValueError(f"{name} must be absolute, got {path[:80]!r}")
        try:
            encoded = path.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be UTF-8, got {path[:80]!r}") from None
        if b"\0" in encoded:
            raise ValueError(f"{name} has a null byte: {path[:80]!r}")
        if len(encoded) > _PATH_MAX_BYTES or max(map(len, encoded.split(b"/"))) > _NAME_MAX_BYTES:
            raise ValueError(
                f"{name} may be {_PATH_MAX_BYTES} bytes long and each name {_NAME_MAX_BYTES}, got "
                f"{len(encoded)} bytes: {path[:80]!r}"
            )
