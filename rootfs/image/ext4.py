"""ext4 images by mke2fs and debugfs, from a tree, without privilege.

``mke2fs -d`` copies contents and names from a staging directory; what only root could put there
(owners, devices, attributes) and what would differ from one run to the next (times) is then written
into the image by debugfs. The image has no journal and no spare room: it is for reading.

Source: mke2fs(8), debugfs(8), ext4(5) of e2fsprogs 1.47.0.
"""

import contextlib
import os
import re
import shutil
import tempfile
import uuid as uuid_module
from collections.abc import Iterator
from pathlib import Path

from rootfs.image.staging import write_content
from rootfs.image.tree import Node, link_counts, walk
from rootfs.imagefile.errors import from_os_error
from rootfs.imagefile.program import run
from vsock.deadline import Deadline
from vsock.errors import CallError

__all__ = ("make_ext4",)

_BLOCK_BYTES = 4096
_INODE_BYTES = 256
#: Said in full, as /etc/mke2fs.conf is another on every machine. All are known to Linux 4.
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
_EPOCH_SECONDS = 1 << 32
_MIN_SECONDS, _MAX_SECONDS = -(1 << 31), (1 << 34) - (1 << 31) - 1
_MAX_ATTRIBUTE_BYTES = 255
#: Printable ASCII without space, quote and backslash, which debugfs does not take as they are.
_PLAIN_ATTRIBUTE = re.compile(rb"[!#-\[\]-~]+")
#: debugfs reads a line into 8192 bytes, and would take the rest of a longer one as a command.
_MAX_LINE_BYTES = 4095
#: The programs stamp the superblock with this time; 0 would mean "not set" to them.
_ENVIRONMENT = {"E2FSPROGS_FAKE_TIME": "1", "MKE2FS_CONFIG": os.devnull}


def make_ext4(root: Node, path: Path, uuid: uuid_module.UUID, cancel: Deadline | None) -> None:
    """Make the image in the file ``path``.

    Raises:
        CallError: ``unsupported``, the tree holds what the format or the programs cannot;
            ``resource``, a full disk; ``device``, a program failed.
    """
    _check(root)
    links = link_counts(root)
    with _staged(root, path.parent) as (top, values, data_blocks):
        os.truncate(path, _estimate(root, len(links), data_blocks))
        command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-m", "0"]
        command += ["-I", str(_INODE_BYTES), "-N", str(len(links) + 16), "-O", _FEATURES]
        command += ["-U", str(uuid), "-E", f"hash_seed={uuid},root_owner=0:0,lazy_itable_init=0"]
        run([*command, "-d", str(top), str(path)], cancel, environment=_ENVIRONMENT)
        _describe(root, path, values, cancel)
        run(["e2fsck", "-f", "-y", str(path)], cancel, environment=_ENVIRONMENT, accept=(0, 1))
        run(["resize2fs", "-M", str(path)], cancel, environment=_ENVIRONMENT)
    # what mounting and checking count is no part of the content
    commands = ["ssv mtime 0", "ssv wtime @1", "ssv lastcheck @1", "ssv kbytes_written 0"]
    if b"lost+found" not in root.children:
        commands.append("rmdir /lost+found")  # mke2fs and e2fsck always make it
    _debugfs(path, commands, cancel)


def _check(root: Node) -> None:
    for path, node in walk(root):
        text = os.fsdecode(b"/".join(path))
        if any(bad in text for bad in '"\n\\'):
            raise _cannot(text, "a quote, a backslash or a line break in its name")
        if any(byte < 0x20 or byte == 0x7F for name in path[-1:] for byte in name):
            raise _cannot(text, "a control character in its name")
        if not _MIN_SECONDS <= node.mtime_ns // 10**9 <= _MAX_SECONDS:
            raise _cannot(text, "a time outside the years 1901 to 2446")
        for name in node.xattrs:
            if len(name) > _MAX_ATTRIBUTE_BYTES or not _PLAIN_ATTRIBUTE.fullmatch(name):
                raise _cannot(text, f"the attribute {name[:_MAX_ATTRIBUTE_BYTES]!r}")


def _estimate(root: Node, inodes: int, data_blocks: int) -> int:
    """Return a size that is surely enough; the file is sparse, and cut to size at the end."""
    blocks = data_blocks
    for _, node in walk(root):
        size = sum(map(len, node.xattrs.values()))
        size += sum(len(name) + 264 for name in node.children)
        blocks += -(-size // _BLOCK_BYTES) + 2
    inode_blocks = -(-inodes * _INODE_BYTES // _BLOCK_BYTES)
    return (blocks + inode_blocks + 4096) * _BLOCK_BYTES * 9 // 8 // (1 << 20) * (1 << 20)


@contextlib.contextmanager
def _staged(root: Node, beside: Path) -> Iterator[tuple[Path, Path, int]]:
    """Yield a directory with the names and contents, how many blocks these take, and another for
    values of attributes: (contents, values, blocks)."""
    try:
        holder = Path(tempfile.mkdtemp(prefix=".staging-", dir=beside))
    except OSError as problem:
        raise from_os_error(problem, step="stage the tree in", object=beside) from problem
    try:
        (holder / "values").mkdir()
        try:
            data_blocks = _stage(root, os.fsencode(holder / "root"))
        except OSError as problem:
            raise from_os_error(problem, step="stage the tree") from problem
        yield holder / "root", holder / "values", data_blocks
    finally:
        shutil.rmtree(holder)


def _stage(root: Node, top: bytes) -> int:
    blocks = 0
    first_names: dict[int, bytes] = {}
    for path, node in walk(root):
        place = b"/".join((top, *path))
        if node.is_directory:
            os.mkdir(place, 0o700)
        elif id(node) in first_names:
            os.link(first_names[id(node)], place, follow_symlinks=False)
            continue
        elif node.is_symlink:
            os.symlink(node.target, place)
        else:
            # devices and the like start as empty files, which hold their place and their links
            fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                blocks += -(-write_content(node, fd, place) // _BLOCK_BYTES)
            finally:
                os.close(fd)
        first_names[id(node)] = place
    return blocks


def _describe(root: Node, path: Path, values: Path, cancel: Deadline | None) -> None:
    commands: list[str] = []
    seen: set[int] = set()
    for where, node in walk(root):
        if id(node) in seen:
            continue
        seen.add(id(node))
        name = '"/' + os.fsdecode(b"/".join(where)) + '"'
        commands += _inode_commands(name, node)
        for number, attribute in enumerate(sorted(node.xattrs)):
            value = values / f"{len(seen)}-{number}"
            value.write_bytes(node.xattrs[attribute])
            commands.append(f"ea_set -f {value} {name} {os.fsdecode(attribute)}")
    _debugfs(path, commands, cancel)


def _inode_commands(name: str, node: Node) -> Iterator[str]:
    seconds, nanoseconds = divmod(node.mtime_ns, 10**9)
    low = seconds & 0xFFFFFFFF
    signed = low - (1 << 32) if low >= 1 << 31 else low
    extra = nanoseconds << 2 | (seconds - signed) // _EPOCH_SECONDS & 3
    yield f"sif {name} mode 0{node.mode:o}"
    yield f"sif {name} uid {node.uid}"
    yield f"sif {name} gid {node.gid}"
    for field in ("atime", "ctime", "mtime", "crtime"):
        yield f"sif {name} {field} @{low}"
        yield f"sif {name} {field}_extra {extra}"
    yield f"sif {name} generation 0"
    if node.is_device:
        major, minor = os.major(node.rdev), os.minor(node.rdev)
        old = major << 8 | minor if major < 256 and minor < 256 else 0
        new = 0 if old else minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
        yield f"sif {name} block[0] {old}"
        yield f"sif {name} block[1] {new}"
    if not (node.is_regular or node.is_directory or node.is_symlink):
        yield f"sif {name} flags 0"


def _debugfs(path: Path, commands: list[str], cancel: Deadline | None) -> None:
    """Run commands of debugfs, which itself never fails: what it complains about is the failure.

    Raises:
        CallError: ``unsupported``, a command is too long for its line buffer; ``device``.
    """
    for line in commands:
        if len(os.fsencode(line)) > _MAX_LINE_BYTES or not line[:1].isalpha():
            raise _cannot(line[:200], "a path or an attribute name too long for debugfs")
    with tempfile.NamedTemporaryFile("w", errors="surrogateescape") as script:
        script.write("\n".join(commands) + "\n")
        script.flush()
        command = ["debugfs", "-w", "-f", script.name, str(path)]
        said = run(command, cancel, environment=_ENVIRONMENT)
    complaints = [line for line in said.splitlines() if line and not line.startswith("debugfs")]
    if complaints:
        raise CallError(
            "device",
            f"cannot describe the files of the image: debugfs says {complaints[0]!r}",
            step="run debugfs",
            object="debugfs",
        )


def _cannot(text: str, what: str) -> CallError:
    return CallError(
        "unsupported",
        f"cannot put {text or '/'!r} into an ext4 image: it has {what}",
        step="lay out the image",
        object=text or "/",
    )
