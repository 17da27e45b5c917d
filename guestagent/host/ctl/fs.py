"""``guestctl fs``: inspect layers, overlays and devices of a guest, read-only."""

import codecs
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, TypedDict

import click

from guestagent.api.inspect import (
    ACL_KINDS,
    CHECKSUM_ALGORITHMS,
    ENTRY_TYPES,
    Checksum,
    DirectoryEntry,
)
from guestagent.host.ctl.completion import complete_places
from guestagent.host.ctl.progress import progress_bar
from guestagent.host.ctl.session import Session, cannot_write, emit, pass_session
from guestagent.host.ctl.style import plain as escaped
from guestagent.host.ctl.style import table, words_of
from vsock.record import Record

__all__ = ("fs",)

_STDOUT = "-"


class Where(TypedDict, total=False):
    """The arguments of a client method that say which layer or overlay."""

    layer_id: str
    overlay_id: str


def _place(text: str) -> Where:
    """Read layer:ID or overlay:ID."""
    kind, _, name = text.partition(":")
    if kind == "layer" and name:
        return {"layer_id": name}
    if kind == "overlay" and name:
        return {"overlay_id": name}
    raise click.BadParameter(f"{text!r}: expected layer:ID or overlay:ID")


place_argument = click.argument(
    "place", type=_place, metavar="PLACE", shell_complete=complete_places
)
path_argument = click.argument("path", type=os.fsencode)
directory_argument = click.argument("path", type=os.fsencode, default="/")
bound_option = click.option(
    "--max-bytes", type=click.IntRange(0), help="End with an error past this; default: no bound."
)
algorithm_option = click.option(
    "--algorithm", type=click.Choice(CHECKSUM_ALGORITHMS), default="sha256", show_default=True
)


@click.group()
def fs() -> None:
    """Inspect layers, overlays and devices of a guest, read-only.

    PLACE is layer:ID or overlay:ID. PATH starts at its root and cannot leave it.
    """


@fs.command()
@place_argument
@directory_argument
@click.option("-l", "--long", is_flag=True, help="Show the status of each entry.")
@pass_session
def ls(session: Session, place: Where, path: bytes, long: bool) -> None:
    """List a directory, sorted by name."""
    with session.agent() as guest:
        if not long:
            names = sorted(guest.fs_ls(path, **place))
            _emit(session, [os.fsdecode(name) for name in names], map(printable, names))
            return
        entries = sorted(guest.fs_readdir(path, **place), key=lambda entry: entry.name)
    rows = [_row(entry) for entry in entries]
    header = ("MODE", "LINKS", "UID", "GID", "SIZE", "MODIFIED", "NAME")
    _emit(session, [_plain(entry) for entry in entries], [table(header, rows)])


@fs.command()
@place_argument
@path_argument
@click.option("--offset", "offset_bytes", type=click.IntRange(0), default=0, metavar="BYTES")
@click.option("--size", "size_bytes", type=click.IntRange(0), metavar="BYTES")
@pass_session
def cat(
    session: Session, place: Where, path: bytes, offset_bytes: int, size_bytes: int | None
) -> None:
    """Print a file, or a range of it. On a terminal, control characters are shown as escapes."""
    with (
        session.agent() as guest,
        guest.fs_download_stream(
            path, offset_bytes=offset_bytes, size_bytes=size_bytes, **place
        ) as pieces,
    ):
        _write(pieces)


@fs.command()
@place_argument
@path_argument
@click.option("-n", "--lines", type=click.IntRange(1), default=10, show_default=True)
@pass_session
def head(session: Session, place: Where, path: bytes, lines: int) -> None:
    """Print the first lines of a file, at most 32 KiB."""
    with session.agent() as guest:
        _write([guest.fs_head(path, lines, **place).data])


def _write(pieces: Iterable[bytes]) -> None:
    decode = codecs.getincrementaldecoder("utf-8")("backslashreplace").decode
    for piece in pieces:
        if sys.stdout.isatty():
            click.echo(_without_controls(decode(piece)), nl=False)
        else:
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


@fs.command("stat")
@place_argument
@path_argument
@pass_session
def status(session: Session, place: Where, path: bytes) -> None:
    """Describe a file, or a symlink itself: status, extended attributes, access control list."""
    with session.agent() as guest:
        found = guest.fs_lstat(path, **place)
        xattrs = guest.fs_getxattrs(path, **place)
        kinds = {"f": ("access",), "d": ACL_KINDS}.get(found.kind, ())
        acls = {kind: guest.fs_acl_get_file(path, kind, **place) for kind in kinds}
    plain = _plain(found) | {"xattrs": {os.fsdecode(k): v.hex() for k, v in xattrs.items()}}
    lines = [
        f"{printable(path)}: {ENTRY_TYPES.get(found.kind, found.kind)}"
        + (f" -> {printable(found.target)}" if found.target is not None else ""),
        f"  mode      {found.mode:04o}   uid {found.uid}   gid {found.gid}   links {found.links}",
        f"  size      {found.size_bytes} bytes, {found.allocated_bytes} allocated",
        f"  inode     {found.inode} on {found.dev}" + (f", is {found.rdev}" if found.rdev else ""),
        f"  modified  {_when(found.mtime_ns)}   changed {_when(found.ctime_ns)}",
    ]
    lines += [f"  xattr     {printable(name)} = {value.hex()}" for name, value in xattrs.items()]
    for kind, acl in acls.items():
        name = "acl" if kind == "access" else f"{kind}_acl"
        if acl.text:
            plain[name] = acl.text.splitlines()
            lines.append(f"  {name:9} {acl.text.replace(chr(10), ', ')}")
    _emit(session, plain, map(escaped, lines))


@fs.command()
@place_argument
@directory_argument
@click.option("--name", type=os.fsencode, help="Only names that match; * and ? are wildcards.")
@click.option("--type", "kind", type=click.Choice(tuple(ENTRY_TYPES)), help="Only this type.")
@click.option("--max-depth", type=click.IntRange(min=1), help="1: only the directory itself.")
@pass_session
def find(
    session: Session,
    place: Where,
    path: bytes,
    name: bytes | None,
    kind: str | None,
    max_depth: int | None,
) -> None:
    """List everything below a directory, in the order of the file system."""
    with session.agent() as guest:
        found = guest.fs_find(path, name=name, kind=kind, max_depth=max_depth, **place)
        with found:
            if session.as_json:
                _emit(session, [_plain(entry) for entry in found], ())
                return
            for entry in found:
                click.echo(printable(entry.path))


@fs.command()
@place_argument
@directory_argument
@pass_session
def du(session: Session, place: Where, path: bytes) -> None:
    """Print the size of a tree: allocated bytes, content, number of entries."""
    with session.agent() as guest:
        reply = guest.fs_du(path, **place)
    about = "" if reply.is_exact else " (some files of many links counted more than once)"
    lines = [
        f"{reply.allocated_bytes} bytes allocated, {reply.size_bytes} bytes of content{about}",
        f"{reply.files} files, {reply.directories} directories, {reply.links} symlinks, "
        f"{reply.others} others",
    ]
    session.show(reply, lambda: "\n".join(lines))


@fs.command()
@place_argument
@directory_argument
@pass_session
def df(session: Session, place: Where, path: bytes) -> None:
    """Print the size and the free space of a file system."""
    with session.agent() as guest:
        reply = guest.fs_statvfs(path, **place)
    header = ("TYPE", "SIZE", "USED", "AVAILABLE", "INODES", "FREE", "ACCESS")
    row = (
        reply.filesystem,
        str(reply.size_bytes),
        str(reply.size_bytes - reply.free_bytes),
        str(reply.available_bytes),
        str(reply.inodes),
        str(reply.free_inodes),
        "read-only" if reply.readonly else "writable",
    )
    session.show(reply, lambda: table(header, [row]))


@fs.command()
@place_argument
@directory_argument
@algorithm_option
@pass_session
def checksum(session: Session, place: Where, path: bytes, algorithm: str) -> None:
    """Hash a file, or every file below a directory, in the form of sha256sum."""
    reply = None
    entries: dict[bytes, Checksum] = {}
    with session.agent() as guest, progress_bar("hashing", session.as_json) as progress:
        if guest.fs_lstat(path, **place).kind != "d":
            reply = guest.fs_checksum(path, algorithm=algorithm, progress=progress, **place)
        else:
            entries = guest.fs_checksums(path, algorithm=algorithm, progress=progress, **place)
    if reply is not None:
        digest = reply.digest
        session.show(reply, lambda: f"{escaped(digest)}  {printable(path)}")
        return
    ordered = [entries[name] for name in sorted(entries)]
    lines = (f"{escaped(e.digest)}  {printable(e.path)}" for e in ordered if e.digest is not None)
    _emit(session, [_plain(entry) for entry in ordered], lines)


@fs.command()
@place_argument
@directory_argument
@click.option("-o", "--output", default=_STDOUT, metavar="FILE", help="Default: standard output.")
@click.option("--xattrs/--no-xattrs", default=True, help="Include extended attributes.")
@bound_option
@pass_session
def tar(
    session: Session, place: Where, path: bytes, output: str, xattrs: bool, max_bytes: int | None
) -> None:
    """Write a directory as a tar archive."""
    bar = progress_bar("reading", session.as_json)
    with session.agent() as guest, _writing(output) as target, bar as progress:
        reply = guest.fs_tar_out(
            path, target, xattrs=xattrs, max_bytes=max_bytes, progress=progress, **place
        )
    _done(session, output, reply, f"{reply.entries} entries, {reply.size_bytes} bytes")


@fs.command()
@place_argument
@path_argument
@click.argument("output", default=_STDOUT)
@bound_option
@pass_session
def download(
    session: Session, place: Where, path: bytes, output: str, max_bytes: int | None
) -> None:
    """Copy a file to OUTPUT, or to standard output."""
    bar = progress_bar("reading", session.as_json)
    with session.agent() as guest, _writing(output) as target, bar as progress:
        reply = guest.fs_download(path, target, max_bytes=max_bytes, progress=progress, **place)
    _done(session, output, reply, f"{reply.size_bytes} bytes")


@fs.command()
@pass_session
def devices(session: Session) -> None:
    """List disks as they were attached, then partitions, and the file systems on them."""
    with session.agent() as guest:
        found = (*guest.fs_list_devices(), *guest.fs_list_partitions())
        filesystems = guest.fs_list_filesystems()
    rows = [
        (
            info.node,
            info.dev,
            info.kind,
            str(info.size_bytes),
            "ro" if info.readonly else "rw",
            filesystems.get(info.node, "unknown"),
            printable((info.serial or "").encode()),
            " ".join(info.labels),
        )
        for info in found
    ]
    header = ("DEVICE", "DEV", "KIND", "SIZE", "ACCESS", "CONTENT", "SERIAL", "LABELS")
    plain = [info.to_wire() | {"content": filesystems.get(info.node)} for info in found]
    _emit(session, plain, [table(header, rows)])


@fs.command()
@click.argument("node", metavar="DEVICE")
@pass_session
def device(session: Session, node: str) -> None:
    """Describe a block device: size, access, and type, uuid and label of its file system."""
    with session.agent() as guest:
        facts = {
            "size_bytes": guest.fs_blockdev_getsize64(node),
            "readonly": guest.fs_blockdev_getro(node),
            "content": guest.fs_vfs_type(node),
            "uuid": guest.fs_vfs_uuid(node),
            "label": guest.fs_vfs_label(node),
        }
    _emit(session, facts, (f"{name:10}  {words_of(value)}" for name, value in facts.items()))


@fs.command("checksum-device")
@click.argument("node", metavar="DEVICE")
@algorithm_option
@pass_session
def checksum_device(session: Session, node: str, algorithm: str) -> None:
    """Hash a whole block device, in the form of sha256sum."""
    with session.agent() as guest, progress_bar("hashing", session.as_json) as progress:
        reply = guest.fs_checksum_device(node, algorithm=algorithm, progress=progress)
    session.show(reply, lambda: escaped(f"{reply.digest}  {node}"))


@fs.command()
@pass_session
def mountpoints(session: Session) -> None:
    """List every mount of the guest that the agent sees."""
    with session.agent() as guest:
        mounts = guest.fs_mountpoints()
    header = ("TARGET", "TYPE", "DEV", "SOURCE", "OPTIONS")
    rows = [(m.target, m.filesystem, m.dev, m.source, ",".join(m.options)) for m in mounts]
    _emit(session, [mount.to_wire() for mount in mounts], [table(header, rows)])


def printable(name: bytes) -> str:
    """Return a name for a terminal; control characters and bytes that are no UTF-8 are escaped."""
    return escaped(name.decode("utf-8", "backslashreplace"))


def _without_controls(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def _row(entry: DirectoryEntry) -> tuple[str, ...]:
    kinds = {"f": stat.S_IFREG, "d": stat.S_IFDIR, "l": stat.S_IFLNK, "b": stat.S_IFBLK}
    kinds |= {"c": stat.S_IFCHR, "p": stat.S_IFIFO, "s": stat.S_IFSOCK}
    name = printable(entry.name)
    return (
        stat.filemode(kinds.get(entry.kind, 0) | entry.mode & 0o7777),
        str(entry.links),
        str(entry.uid),
        str(entry.gid),
        entry.rdev or str(entry.size_bytes),
        _when(entry.mtime_ns),
        name if entry.target is None else f"{name} -> {printable(entry.target)}",
    )


def _when(time_ns: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(time_ns // 1_000_000_000))


def _plain(entry: object) -> dict[str, object]:
    """Return the fields of an entry for JSON; bytes that are no UTF-8 become lone surrogates."""
    if isinstance(entry, Record):
        fields = entry.to_wire()
    else:
        fields = {name: getattr(entry, name) for name in type(entry).__dataclass_fields__}  # type: ignore[attr-defined]
    return {
        name: os.fsdecode(value) if isinstance(value, bytes) else value
        for name, value in fields.items()
    }


def _emit(session: Session, value: object, lines: Iterable[str]) -> None:
    if session.as_json:
        emit(value)
        return
    for line in lines:
        click.echo(line)


@contextmanager
def _writing(output: str) -> "Iterator[str | BinaryIO]":
    """Yield the target to write to; a failed write ends with an error that names it."""
    if output == _STDOUT and sys.stdout.isatty():
        raise click.UsageError("refusing to write binary data to a terminal: name a file")
    try:
        yield sys.stdout.buffer if output == _STDOUT else output
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(error, output) from error


def _done(session: Session, output: str, reply: Record, text: str) -> None:
    if output == _STDOUT:
        sys.stdout.buffer.flush()
    else:
        session.show(reply, lambda: f"{output}: {text}")
