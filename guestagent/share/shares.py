"""The shared directories that are mounted: each a mount of virtiofs or 9p, known by its tag.

A share has one entry in the journal. The mount is made first and is nowhere; its device and mount
id are written down before it is attached, so that a restart knows the mount wherever the agent was
killed: what was whole is adopted, the rest is undone.

A tag is mounted once: a second mount of virtiofs would be the same superblock, read-only or not as
the first one is, and 9p refuses it.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

from guestagent.api.layers import UnmountReply
from guestagent.api.request import handles
from guestagent.api.share import ShareList, ShareListReply, ShareMount, ShareReport, ShareUnmount
from guestagent.engine.inventory import refuse_other_spec
from guestagent.engine.parts import (
    adopt_target,
    begin_entry,
    claim_target,
    forget_entry,
    recover_part,
    undoing,
)
from guestagent.engine.plan import check_target
from guestagent.engine.state import EngineState
from guestagent.engine.teardown import (
    nothing_to_unmount,
    refuse_held,
    refuse_mounts_elsewhere,
    refuse_other_mounts,
    remove_directories,
    unmount_target,
)
from guestagent.engine.transaction import Transaction
from guestagent.policy.decision import Allowed
from guestagent.storage import syscalls
from guestagent.storage.fscontext import FsContextError, attach
from guestagent.storage.makefs import are_programs_forbidden
from guestagent.storage.mount import TargetDirectory, open_detached
from guestagent.storage.mountinfo import Mount, find_mount, mounts_of_dev, whereabouts
from vsock.deadline import Deadline
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("LiveShare", "Shares", "served_tags")

#: Name of the part in the journal and in reservations.
PART = "share"
_MAX_SHARES = 64
#: Where the kernel tells the tags that it has a device for: virtiofs since Linux 6.9.
_TAG_PLACES = {
    "virtiofs": ("/sys/fs/virtiofs", "tag"),
    "9p": ("/sys/bus/virtio/drivers/9pnet_virtio", "mount_tag"),
}
#: A server that has not answered by then is taken for gone.
_SERVER_SECONDS = 5.0
_ASK = """
import os, sys
try:
    os.statvfs(sys.argv[1])
except OSError:
    pass
"""
_TAG_MAX_BYTES = 256
#: What a mount fails with where no device has the tag: virtio_fs_get_tree of fs/fuse/virtio_fs.c,
#: p9_virtio_create of net/9p/trans_virtio.c.
_NO_TAG = {"virtiofs": errno.EINVAL, "9p": errno.ENOENT}


class LiveShare(Record):
    """A share. ``dev`` (MAJOR:MINOR) is its file system and ``mount_id`` its mount.

    A share that is not ``whole`` is being made. ``created`` are the directories on the way to its
    target that were made, outermost first.
    """

    spec: ShareMount
    created: tuple[str, ...]
    dev: str = ""
    mount_id: int = 0
    whole: bool = False

    def is_mount(self, mount: Mount | None) -> bool:
        """Return whether a mount is that of the share, wherever it is by now."""
        return (
            mount is not None
            and (mount.dev, mount.mount_id) == (self.dev, self.mount_id)
            and (mount.filesystem, mount.source) == (self.spec.kind, self.spec.tag)
        )

    def mount(self) -> Mount | None:
        """Return the mount of the share, wherever it is by now."""
        return next(filter(self.is_mount, mounts_of_dev(self.dev)), None) if self.dev else None


class Shares:
    """Every method may be called from many threads at once."""

    def __init__(self, state: EngineState) -> None:
        """Adopt or undo what an earlier agent has left; nothing else may use it meanwhile."""
        self._state = state
        self._shares: dict[str, LiveShare] = {}
        #: The child that waits for the server of a share, by the share's id.
        self._asking: dict[str, int] = {}
        recover_part(state, PART, LiveShare, _name, self._recover)

    # --- requests

    @handles(ShareMount)
    def mount(self, spec: ShareMount, op: Transaction) -> ShareReport:
        """Mount a share, or say that exactly this share is there already.

        Raises:
            CallError: ``not_found``, nothing serves the tag; ``conflict``, the id, the tag or the
                target is another's, or the share is not as it was mounted any more;
                ``unsupported``, the kernel lacks the file system. Nothing is left behind.
        """
        share_id = spec.share_id
        keys = [(PART, share_id), ("share-tag", f"{spec.kind}-{spec.tag}")]
        with self._state.locks.hold(keys, op.deadline):
            permit = self._state.gate.request(spec.method, spec)
            live = self._shares.get(share_id)
            if live is not None:
                refuse_other_spec("share", share_id, spec, live.spec)
                with op.step("read back", spec.mount_point, code="mount"):
                    _check_mount(live)
                return self._report(live).replace(already=True)
            self._refuse_second(spec)
            if len(self._shares) >= _MAX_SHARES:
                raise CallError("resource", f"there are {_MAX_SHARES} shares", object=share_id)
            with op:
                live = self._make(spec, op, permit)
                with op.step("commit", share_id, code="resource"):
                    self._write(live)
                op.commit()
            self._shares[share_id] = live
            return self._report(live).replace(timings_ms=op.timings_ms)

    @handles(ShareUnmount)
    def unmount(self, request: ShareUnmount, op: Transaction) -> UnmountReply:
        """Unmount a share. Idempotent.

        Raises:
            CallError: ``busy``, with the holders named in the hint; ``conflict``, another mount
                covers it; ``timeout``, the host's server does not answer.
        """
        share_id = request.share_id
        with self._state.locks.hold([(PART, share_id)], op.deadline):
            live = self._shares.get(share_id)
            if live is None:
                return nothing_to_unmount(op)
            target = live.spec.mount_point
            if live.mount() is not None:
                with op.step("server", live.spec.tag):
                    self._refuse_silence(live, op)
            with op:
                with op.step("look", target):
                    refuse_other_mounts(self._state, live.dev, target, op)
                    refuse_mounts_elsewhere(frozenset((live.dev,)), target, op)
                was_mounted = live.mount() is not None and unmount_target(target, op, dev=live.dev)
                if was_mounted:
                    op.on_rollback(f"unmount of {target}", partial(self._restore, live))
                refuse_held(self._state, live.dev, target, op, filesystem=live.spec.kind)
                op.commit()
            del self._shares[share_id]
            forget_entry(self._state, (PART, share_id), _name(live), live.created)
        return UnmountReply(
            unmounted=(target,) if was_mounted else (),
            removed_devices=(),
            timings_ms=op.timings_ms,
            already=False,
        )

    @handles(ShareList)
    def list(self, _request: ShareList, _op: Transaction) -> ShareListReply:
        """Describe all shares, without asking the host's servers."""
        return ShareListReply(shares=tuple(map(self._report, tuple(self._shares.values()))))

    def take_downs(self) -> Iterator[Callable[[Transaction], object]]:
        """Yield what unmounts each share."""
        return (partial(self.unmount, ShareUnmount(share_id=each)) for each in tuple(self._shares))

    # --- the steps

    def _refuse_second(self, spec: ShareMount) -> None:
        for live in tuple(self._shares.values()):
            if (live.spec.kind, live.spec.tag) == (spec.kind, spec.tag):
                text = f"{spec.kind} tag {spec.tag!r} is mounted as share {live.spec.share_id!r}"
                raise CallError("conflict", text, step="claim", object=spec.tag)

    def _make(self, spec: ShareMount, op: Transaction, permit: Allowed) -> LiveShare:
        state, owner, target = self._state, (PART, spec.share_id), spec.mount_point
        root, created = claim_target(state, owner, target, state.rules.share_roots, op)
        live = LiveShare(spec=spec, created=created)
        begin_entry(state, owner, live, op)
        live = self._attach(live, root, op, permit)
        with op.step("read back", target, code="mount"):
            _check_mount(live)
        return live.replace(whole=True)

    def _attach(self, live: LiveShare, root: str, op: Transaction, _permit: Allowed) -> LiveShare:
        """Mount a share at its target; return it with its device and mount id, written down."""
        spec, target = live.spec, live.spec.mount_point
        with op.step("target", target, code="mount"):
            directory = TargetDirectory(target, root=root)
        with directory:
            op.on_rollback("target directory", partial(remove_directories, live.created))
            with op.step("filesystem", spec.tag, code="mount"):
                mount_fd = _open_share(spec)
            try:
                dev, mount_id = syscalls.mount_of("", fd=mount_fd)
                live = live.replace(dev=dev, mount_id=mount_id)
                for mount in mounts_of_dev(dev):
                    text = f"{spec.kind} tag {spec.tag!r} is mounted at {mount.target!r}"
                    hint = "another program mounted it; unmount that first"
                    raise CallError("conflict", text, step="filesystem", object=spec.tag, hint=hint)
                with op.step("journal", spec.share_id, code="resource"):
                    self._write(live)
                with op.step("mount", target, code="mount"):
                    attach(mount_fd, directory.fd)
            finally:
                os.close(mount_fd)
        op.on_rollback(f"mount at {target}", partial(self._undo_mount, live))
        return live

    def _refuse_silence(self, live: LiveShare, op: Transaction) -> None:
        """See that the host's server answers: the kernel waits for its answer to an unmount, and to
        a look at a file, without end.

        So does the child that asks here, which no signal ends, and which keeps no agent from its
        end. No second one asks meanwhile.

        Raises:
            CallError: ``timeout`` or ``cancelled``.
        """
        share_id = live.spec.share_id
        if share_id in self._asking and os.waitpid(self._asking[share_id], os.WNOHANG) != (0, 0):
            del self._asking[share_id]
        if share_id not in self._asking:
            if are_programs_forbidden():  # then it is found out by the unmount
                return
            child = self._asking[share_id] = _ask_server(live.spec.mount_point)
            if _has_ended(child, op.deadline):
                del self._asking[share_id]
                return
        text = f"the server of {live.spec.kind} tag {live.spec.tag!r} does not answer"
        hint = "start it again on the host, or end the machine"
        raise CallError("timeout", text, object=live.spec.tag, hint=hint)

    def _restore(self, live: LiveShare) -> None:
        """Mount a share again whose unmount failed half-way; its device number may be new."""
        permit = self._state.gate.request(live.spec.method, live.spec)
        root = check_target(live.spec.mount_point, self._state.rules.share_roots)
        with undoing(self._state) as op:
            again = self._attach(live, root, op, permit)
            self._write(again)
        self._shares[live.spec.share_id] = again

    def _undo_mount(self, live: LiveShare) -> None:
        if live.mount() is not None:
            with undoing(self._state) as op:
                unmount_target(live.spec.mount_point, op, dev=live.dev)

    def _write(self, live: LiveShare) -> None:
        self._state.journal.write_part(PART, live.spec.share_id, live)

    def _recover(self, live: LiveShare) -> None:
        spec = live.spec
        if live.whole and live.mount() is not None:
            owner = (PART, spec.share_id)
            adopt_target(self._state, owner, spec.mount_point, live.created)
            self._shares[spec.share_id] = live
            return
        self._undo_mount(live)
        remove_directories(live.created)
        self._state.journal.remove_part(PART, spec.share_id)

    def _report(self, live: LiveShare) -> ShareReport:
        spec = live.spec
        mount = find_mount(spec.mount_point)
        is_there = live.is_mount(mount)
        return ShareReport(
            share_id=spec.share_id,
            tag=spec.tag,
            kind=spec.kind,
            state="mounted" if is_there else "unmounted",
            target=spec.mount_point,
            dev=live.dev,
            mount_id=live.mount_id,
            read_only=spec.read_only,
            options=mount.options if mount is not None and is_there else (),
        )


def _ask_server(target: str) -> int:
    """Start a child that ends once the server of a share has answered something; return its id."""
    program = (sys.executable, "-I", "-S", "-c", _ASK, target)
    return os.posix_spawn(sys.executable, program, {}, setsigmask=())


def _has_ended(child: int, deadline: Deadline) -> bool:
    """Wait for a child and clear it away; return False if it is still there after a while."""
    pid_fd = os.pidfd_open(child)
    try:
        is_over = bool(deadline.wait([pid_fd], "server", at_most=_SERVER_SECONDS))
    finally:
        os.close(pid_fd)
    if is_over:
        os.waitpid(child, 0)
    return is_over


def _name(live: LiveShare) -> str:
    return f"share {live.spec.share_id}"


def served_tags(kind: str, root: str = "") -> tuple[str, ...] | None:
    """Return the tags that the kernel has a device for; None where it does not tell them.

    ``root`` is put before the paths of sysfs.
    """
    place, name = _TAG_PLACES[kind]
    try:
        entries = os.listdir(root + place)
    except FileNotFoundError:
        return None
    tags = []
    for entry in sorted(entries):
        # a driver's directory holds more than devices; a device may go meanwhile
        try:
            with open(f"{root}{place}/{entry}/{name}", "rb") as file:
                tag = file.read(_TAG_MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            continue
        tags.append(os.fsdecode(tag.rstrip(b"\0\n")))
    return tuple(tags)


def _open_share(spec: ShareMount) -> int:
    """Mount a share nowhere yet and return the mount's descriptor, which the caller owns.

    Raises:
        CallError: ``not_found`` or ``unsupported``.
        FsContextError: the kernel refused for another reason.
    """
    tags = served_tags(spec.kind)
    if tags is not None and spec.tag not in tags:
        raise _unserved(spec, f"served are {', '.join(map(repr, tags)) or 'no tags'}")
    options: tuple[tuple[str, str | None], ...] = ()
    if spec.kind == "9p":
        options = (("trans", "virtio"), ("version", "9p2000.L"))
        if spec.msize_bytes is not None:
            options += (("msize", str(spec.msize_bytes)),)
    flags = ("nodev", "nosuid", *(("ro",) if spec.read_only else ()))
    try:
        return open_detached(source=spec.tag, filesystem=spec.kind, flags=flags, options=options)
    except FsContextError as error:
        raise _meaning(spec, error) from error


def _meaning(spec: ShareMount, error: FsContextError) -> CallError | FsContextError:
    """Return what an error of a mount says of the kernel or the tag; itself if nothing special."""
    missing = ""
    if (error.step, error.errno) == ("mount-open", errno.ENODEV):
        missing = f"file system {spec.kind}"
    elif spec.kind == "9p" and error.errno == errno.EINVAL and served_tags("9p") is None:
        missing = "virtio transport for 9p"
    if missing:
        hint = "build the boot image with the feature share, for a kernel that has it"
        text = f"the kernel has no {missing}"
        return CallError("unsupported", text, errno=error.errno, object=spec.kind, hint=hint)
    if (error.step, error.errno) == ("mount-create", _NO_TAG[spec.kind]):
        return _unserved(spec, None, error.errno)
    return error


def _unserved(spec: ShareMount, hint: str | None, number: int | None = None) -> CallError:
    text = f"no {spec.kind} device of this machine has the tag {spec.tag!r}"
    return CallError("not_found", text, errno=number, object=spec.tag, hint=hint)


def _check_mount(live: LiveShare) -> None:
    """See that the kernel has what was asked for.

    Raises:
        CallError: ``conflict``, another mount is there by now, or the superblock was there before
            and is read-only.
    """
    spec = live.spec
    mount = find_mount(spec.mount_point)
    if mount is None or not live.is_mount(mount):
        where = whereabouts(spec.mount_point, live.dev, live.mount_id)
        raise CallError("conflict", f"what was mounted is {where}", object=spec.mount_point)
    wanted = {"nosuid", "nodev", "ro" if spec.read_only else "rw"}
    missing = wanted.difference(mount.options)
    if not spec.read_only and "ro" in mount.super_options:
        missing.add("rw")
    if missing:
        text = f"{spec.mount_point!r} is mounted without {', '.join(sorted(missing))}"
        raise CallError("conflict", text, object=spec.mount_point)
