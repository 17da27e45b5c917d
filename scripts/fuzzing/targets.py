"""What is fuzzed: each reader of foreign bytes, with seeds, and what must be true of any bytes.

A target raises nothing, whatever the bytes are: the errors of its reader's contract are taken, any
other exception is a fault of the reader, and so is an invariant that does not hold.
"""

import contextlib
import json
import os
import socket
import struct
import tarfile
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import msgpack

from guestagent.api import METHODS, LayerSpec
from guestagent.api.nettexts import network_from_texts
from guestagent.boot.plan import plan_boot
from guestagent.config import KEYS, PREFIX, parse_command_line, read_settings
from guestagent.storage.verity import VerityParameters, parse_superblock, superblock_uuid
from rootfs.image.erofs import ErofsImage
from rootfs.image.erofs_device import LayerFile
from rootfs.image.erofs_format import BLOCK_BYTES, SUPERBLOCK_OFFSET_BYTES
from rootfs.image.erofs_reader import ErofsReader
from rootfs.image.tar import TarReader
from rootfs.image.tartree import TarTree, Whiteouts
from rootfs.image.tree import Node, read_content, walk
from rootfs.imagefile.ranges import round_up
from rootfs.pack.manifest import Manifest, image_spec, layer_spec
from tests.beds.imagebed import Member, directory, hard_link, make_tar, symlink
from vsock.errors import CallError
from vsock.rpc import Decoder, Limits, Malformed, Message, Request, encode_request
from vsock.server import Call, Outcome, Server
from vsock.stream import Stream

__all__ = ("TARGETS", "Target")

_REPLY_SECONDS = 60.0
#: More than that is not read of the files of one image.
_CONTENT_BYTES = 1 << 20
_MAX_NAMES = 10_000
#: Codes of errors that say what is wrong with the bytes.
_REFUSALS = ("integrity", "invalid", "resource", "unsupported")
_MAX_TEXT_CHARACTERS = 2000
_ROOT = "ab" * 32


class Target(NamedTuple):
    """``run`` takes any bytes and says whether its reader took them, too; ``seeds`` are bytes to
    begin with, nearly all of which it takes. More than ``max_bytes`` show nothing new."""

    run: Callable[[bytes], bool]
    seeds: Callable[[], Iterator[bytes]]
    max_bytes: int = 64 * 1024


@contextlib.contextmanager
def _may_refuse() -> Iterator[None]:
    """Take an error that says what is wrong with the bytes, in few words."""
    refusal = None
    try:
        yield
    except CallError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code in _REFUSALS, refusal
        _check_size(refusal.message)
        _check_size(refusal.hint or "")


def _check_size(text: str) -> None:
    """What is said of foreign bytes is not as long as these."""
    assert len(text) <= _MAX_TEXT_CHARACTERS, f"{len(text)} characters: {text[:500]}"


@contextlib.contextmanager
def _file(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("fuzzed")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)


# --- the wire

#: Small, so that few bytes pass them.
_LIMITS = Limits(
    max_request_bytes=1024,
    max_request_values=128,
    max_reply_bytes=1024,
    max_reply_values=192,
    max_depth=8,
)


def _describe(message: Message) -> tuple[object, ...]:
    if isinstance(message, Malformed):
        # one that is refused at its header may be so before its type and msgid have come
        whose = () if message.fatal else (message.kind, message.msgid)
        return ("malformed", message.fatal, message.error.code, *whose)
    return (type(message).__name__, *map(repr, map(message.__getattribute__, message.__slots__)))


def _messages(data: bytes, piece_bytes: int, *, of_replies: bool) -> list[tuple[object, ...]]:
    decoder = Decoder(_LIMITS, of_replies=of_replies)
    found = []
    for at in range(0, len(data), piece_bytes):
        decoder.feed(data[at : at + piece_bytes])
        while (message := decoder.next()) is not None:
            found.append(_describe(message))
        assert decoder.buffered_bytes <= decoder.max_bytes + piece_bytes
    return found


def _wire(data: bytes) -> bool:
    """The same messages come of the same bytes, in whatever pieces these come."""
    for of_replies in (False, True):
        whole = _messages(data, len(data) or 1, of_replies=of_replies)
        assert _messages(data, 7, of_replies=of_replies) == whole
    return bool(whole) and not any(message[0] == "malformed" for message in whole)


def _requests() -> Iterator[tuple[str, dict[str, object]]]:
    """Yield methods with parameters that are whole, or nearly so."""
    device = {"kind": "pmem", "number": 0}
    mapping = {"offset_bytes": 0, "size_bytes": 8192}
    verity = {"root_digest": _ROOT, "salt": b"salt", "algorithm": "sha256", "data_blocks": 1}
    layer = {"layer_id": "a", "device": device, "mapping": mapping, "filesystem": "erofs"}
    yield "agent.hello", {"versions": [1]}
    yield "layer.mount", {**layer, "verity": verity, "deadline_ms": 100}
    scratch = {"kind": "tmpfs", "size_bytes": 1 << 20}
    overlay = {"overlay_id": "o", "layers": ["a"], "scratch": scratch}
    yield "layers.mount", {"layers": [{**layer, "mapping": [mapping] * 3}], "overlay": overlay}
    yield "overlay.unmount", {"overlay_id": "o", "force": True}
    interface = {"match": {"mac": "52:54:00:00:00:01"}, "addresses": ["10.0.0.2/24"], "mtu": 1400}
    rules = [{"priority": 7, "table": 100, "source": "10.0.0.0/8"}]
    yield "net.configure", {"interfaces": [interface], "rules": rules, "hostname": "guest"}
    disks = {"metadata_device": {"kind": "path", "path": "/dev/vda"}, "data_device": device}
    yield "pool.open", {"pool_id": "p", **disks}
    yield "volume.create", {"pool_id": "p", "volume_id": "v", "size_bytes": 1 << 24}
    yield "dev.add", {"tree_id": "t", "paths": ["/dev/null"]}
    yield "share.mount", {"share_id": "s", "tag": "host"}
    yield "fs.find", {"layer_id": "a", "path": "etc", "traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    for method in METHODS:
        yield method, {}


def _wire_seeds() -> Iterator[bytes]:
    requests = [encode_request(n, *request) for n, request in enumerate(_requests())]
    yield from requests
    yield b"".join(requests[:4])
    yield msgpack.packb([1, 7, None, {"a": [1, 2.5, None, True, b"x" * 300]}])
    yield msgpack.packb([1, 7, {"code": "busy", "message": "m"}, None])
    yield msgpack.packb([2, "event", [{}]])


# --- the server, with the records of the requests


class _Peer:
    """A server in a thread of its own, whose handler reads each request and answers with it."""

    limits = Limits(max_hello_bytes=256 * 1024)

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self._server = Server(self._handle, limits=self.limits, quick=frozenset(METHODS))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _handle(self, call: Call) -> Outcome:
        try:
            kind = METHODS.get(call.method)
            if kind is None:
                raise CallError("unsupported", "no such method")
            request = kind.from_wire(call.params)
            again = kind.from_wire(msgpack.unpackb(msgpack.packb(request.to_wire())))
            assert again == request, (again, request)
            return Outcome(None, request)
        except CallError as error:
            return Outcome(error.to_wire(), None)
        except Exception as error:  # a fault, which the thread that fuzzes is to raise
            self.failures.append(error)
            return Outcome({"code": "internal", "message": "a fault was found"}, None)

    def ask(self, data: bytes) -> list[object]:
        """Send bytes and no more; return all messages that come before the end."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.settimeout(_REPLY_SECONDS)
            self._server.add_stream(Stream(theirs, "fuzzer"))
            unpacker = msgpack.Unpacker()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                ours.sendall(data)
                ours.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while piece := ours.recv(1 << 16):
                    unpacker.feed(piece)
        if self.failures:
            raise self.failures.pop()
        return list(unpacker)


_peer = cache(_Peer)


def _server(data: bytes) -> bool:
    """Every request is answered once, as long as the framing holds."""
    data = data[: 1 << 16]  # what a socket takes while nothing is read
    asked: Counter[object] = Counter()
    decoder = Decoder(_Peer.limits)
    decoder.feed(data)
    while (message := decoder.next()) is not None:
        is_request = isinstance(message, Request) or (
            isinstance(message, Malformed) and message.kind == "request"
        )
        if is_request and message.msgid is not None:  # type: ignore[union-attr]
            asked[message.msgid] += 1  # type: ignore[union-attr]
    replies = _peer().ask(data)
    for reply in replies:
        error = reply[2] if reply[0] == 1 else reply[2][0]  # type: ignore[index]
        if error is not None:
            _check_size(error["message"])
            _check_size(error.get("hint") or "")
    answered = Counter(reply[1] for reply in replies if reply[0] == 1)  # type: ignore[index]
    assert answered == asked, (answered, asked)
    return bool(asked)


# --- the texts of the kernel command line


def _command_line(data: bytes) -> bool:
    """What cannot be taken is a problem that names its setting; the rest makes a plan, or none."""
    text = data.decode("utf-8", "replace")
    config, problems = read_settings(parse_command_line(text))
    for problem in problems:
        assert problem.text.startswith(problem.key)
        assert problem.key.startswith(PREFIX)
    # the files that these name are those of a machine
    layers = tuple(layer for layer in config.layers if "signature=" not in layer)
    with _may_refuse():
        plan_boot(layers, config.overlay, ())
    with contextlib.suppress(ValueError):
        network_from_texts(config.net)
    return not problems


def _command_line_seeds() -> Iterator[bytes]:
    verity = "salt=00ff,algorithm=sha256,hash_type=1,data_blocks=7,data_block_size=4096"
    values = {
        "port": "1023",
        "listen": "vsock://any:1023,unix:///run/a,serial:///dev/hvc0",
        "dial": "2:1024",
        "console": "vsock:1022,/dev/hvc0",
        "log": "error",
        "log_format": "json",
        "log_to": "console,kmsg",
        "log_dial": "2:1025",
        "state": "/run/state",
        "target_root": "/run,/mnt",
        "vsock_peers": "host,local,7",
        "layer": f"pmem:0,id=a,offset=0,size=8192,fs=erofs,root={_ROOT},{verity}",
        "overlay": "root,layers=a+b,scratch=tmpfs:1048576",
        "manifest": f"/etc/pack.json,pmem:0,sha256={_ROOT},image=app",
        "net": "interface,match=mac=52:54:00:00:00:01,addresses=10.0.0.2/24,mtu=1400",
        "init": "/sbin/init",
        "agent": "stay",
        "on_failure": "serve",
        "fault": "mount:EIO:2",
    }
    for key in KEYS:
        yield f"quiet {PREFIX}{key.name}={values.get(key.name, '1')} panic=-1".encode()
    scratch = "device:/dev/vdb,ext4,fresh,encrypted"
    ranges = f"scsi:0:1,ranges=0+4096:8192+4096,root={_ROOT},readonly_policy=ignore"
    yield f'{PREFIX}layer={ranges} {PREFIX}overlay="root,scratch={scratch}" -- x'.encode()
    yield " ".join(
        f"{PREFIX}{name}={value}" for name, value in values.items() if name != "port"
    ).encode()
    parts = ("rule,priority=7,table=100,source=10.0.0.0/8", "dns,servers=10.0.0.1", "hostname=x")
    yield " ".join(f"{PREFIX}net={part}" for part in parts).encode()


# --- tars


def _tar(data: bytes) -> bool:
    """An archive is refused, or makes a tree, which an image holds as it is."""
    return _takes_tar(_with_checksums(data)) | _takes_tar(data)


def _takes_tar(data: bytes) -> bool:
    with _may_refuse(), _file(data) as fd:
        _build(fd, len(data))
        return True
    return False


def _build(fd: int, size_bytes: int) -> None:
    for whiteouts in (Whiteouts.OVERLAY, Whiteouts.APPLY):
        tree = TarTree(whiteouts)
        tree.add_layer(TarReader(fd, size_bytes=size_bytes), fd)
        if _is_small(tree.root):
            with _file(b"") as image:
                ErofsImage(tree.root).write(image, lambda: uuid.UUID(int=1))
                assert _facts(_read_erofs(image)) == _facts(tree.root)


def _is_small(root: Node) -> bool:
    return sum(node.content.size_bytes for _, node in walk(root)) <= _CONTENT_BYTES


def _facts(root: Node) -> list[tuple[object, ...]]:
    return [
        (
            *(path, node.mode, node.uid, node.gid, node.mtime_ns, node.target, node.rdev),
            *(sorted(node.xattrs.items()), b"".join(read_content(node.content, b""))),
        )
        for path, node in walk(root)
    ]


def _with_checksums(data: bytes) -> bytes:
    """Put the right checksum into every block that looks like a header."""
    mended = bytearray(data)
    for at in range(0, len(data) - 511, 512):
        if mended[at + 257 : at + 262] == b"ustar":
            mended[at + 148 : at + 156] = b" " * 8
            mended[at + 148 : at + 156] = b"%06o\0 " % sum(mended[at : at + 512])
    return bytes(mended)


def _tar_seeds() -> Iterator[bytes]:
    members = [
        directory("etc", xattrs={"user.note": b"noted"}),
        Member("etc/file", b"content\n" * 90, uid=1000, mtime=1.5),
        symlink("etc/link", "file"),
        hard_link("etc/hard", "etc/file"),
        Member("dev/null", kind=tarfile.CHRTYPE, device=(1, 3)),
        Member("pipe", kind=tarfile.FIFOTYPE),
        Member("etc/.wh.gone"),
        Member("opt/.wh..wh..opq"),
        Member("n" * 150, b"a long name"),
        Member("große/datei", b"x"),
    ]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        yield make_tar(members[:7], form)
    yield make_tar(members, tarfile.PAX_FORMAT)
    yield make_tar(members[7:], tarfile.GNU_FORMAT)
    yield from map(_sparse, ("S", "0.1", "1.0"))


def _sparse(form: str) -> bytes:
    """Return a sparse member as GNU tar writes it: 4 bytes at 0 and 4 at 8192 of 16,384."""
    info = tarfile.TarInfo("GNUSparseFile.0/sparse")
    data = b"headtail"
    if form == "S":
        info.size, info.type = len(data), tarfile.GNUTYPE_SPARSE
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        for at, number in ((386, 0), (398, 4), (410, 8192), (422, 4), (483, 16384)):
            header[at : at + 12] = b"%011o\0" % number
        return _with_checksums(bytes(header)) + data.ljust(512, b"\0") + bytes(1024)
    headers = {"GNU.sparse.name": "sparse", "GNU.sparse.size": "16384"}
    headers |= {"GNU.sparse.numblocks": "2", "GNU.sparse.map": "0,4,8192,4"}
    if form == "1.0":
        headers = {"GNU.sparse.name": "sparse", "GNU.sparse.realsize": "16384"}
        headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        data = b"2\n0\n4\n8192\n4\n".ljust(512, b"\0") + data
    info.size, info.pax_headers = len(data), headers
    padded = data.ljust(round_up(len(data), 512), b"\0")
    return info.tobuf(tarfile.PAX_FORMAT) + padded + bytes(1024)


# --- EROFS images


def _erofs(data: bytes) -> bool:
    """An image is refused, or its tree can be read, and its files."""
    data = data.ljust(round_up(len(data), BLOCK_BYTES) or BLOCK_BYTES, b"\0")
    with _may_refuse(), _file(data) as fd:
        root = _read_erofs(fd)
        if _is_small(root):
            _facts(root)
        return True
    return False


def _read_erofs(fd: int) -> Node:
    layer = LayerFile(name="fuzzed", fd=fd, size_bytes=os.fstat(fd).st_size)
    return ErofsReader(layer).tree(_MAX_NAMES)


def _erofs_seeds() -> Iterator[bytes]:
    for tar in _tar_seeds():
        for inline_tails in (True, False):
            with _file(tar) as source, _file(b"") as image:
                tree = TarTree()
                tree.add_layer(TarReader(source, size_bytes=len(tar)), source)
                built = ErofsImage(tree.root, inline_tails=inline_tails)
                built.write(image, lambda: uuid.UUID(int=1))
                data = bytearray(os.pread(image, os.fstat(image).st_size, 0))
            yield bytes(data)
            # without the flag that the superblock has a checksum: changes to it are read on
            (flags,) = struct.unpack_from("<I", data, SUPERBLOCK_OFFSET_BYTES + 8)
            struct.pack_into("<I", data, SUPERBLOCK_OFFSET_BYTES + 8, flags & ~1)
            yield bytes(data)


# --- verity superblocks


def _superblock(data: bytes) -> bool:
    """A superblock that is taken is one that we would write, to the byte."""
    with _may_refuse():
        terms = parse_superblock(data)
        assert terms.data_blocks is not None
        found = VerityParameters.from_request(
            terms,
            hash_offset_bytes=terms.data_blocks * (terms.data_block_size or 0),
            superblock=data,
        )
        assert found.pack_superblock(superblock_uuid(data)) == data[:512]
        assert found.tree_offset_bytes >= found.hash_offset_bytes + 512
        # level 0 is the last; over a single block there is none
        end_bytes = found.tree_offset_bytes
        if found.level_blocks:
            level_bytes = found.level_blocks[0] * found.hash_block_size
            end_bytes = found.level_offsets_bytes[0] + level_bytes
        assert found.end_bytes == end_bytes
        return True
    return False


def _superblock_seeds() -> Iterator[bytes]:
    for algorithm, digest_bytes in (("sha256", 32), ("sha512", 64)):
        for size, salt in ((512, b""), (4096, b"salt"), (4096, bytes(range(256)))):
            parameters = VerityParameters(
                root_digest=bytes(digest_bytes),
                salt=salt,
                algorithm=algorithm,
                hash_type=1,
                data_blocks=300,
                data_block_size=4096,
                hash_block_size=size,
                hash_offset_bytes=300 * 4096,
                superblock=True,
            )
            yield parameters.pack_superblock(bytes(range(16)))


# --- manifests


def _manifest(data: bytes) -> bool:
    """What the host takes is the same when it is written again, and what the guest can mount."""
    device = {"kind": "pmem", "number": 0}
    with _file(data) as fd:
        path = f"/proc/self/fd/{fd}"
        for image in ("", ",image=app"):
            for flattens_erofs in (False, True):
                setting = f"{path},pmem:0{image}"
                with _may_refuse():
                    plan_boot((), None, (setting,), flattens_erofs=flattens_erofs)
        manifest = None
        with _may_refuse():
            manifest = Manifest.load(path)
    if manifest is None:
        return False
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    for layer in manifest.layers:
        LayerSpec.from_wire(layer_spec(layer, device))
    for image_of_layers in manifest.images:
        LayerSpec.from_wire(image_spec(image_of_layers, device))
    return True


def _manifest_seeds() -> Iterator[bytes]:
    mib, step = 1 << 20, 512 << 10
    tree: dict[str, object] = {
        "root_digest": _ROOT,
        "salt": "00ff",
        "algorithm": "sha256",
        "hash_type": 1,
        "data_blocks": 200,
        "data_block_size": 4096,
        "hash_block_size": 4096,
        "hash_offset_bytes": mib,
        "superblock": True,
    }
    top = {"id": "top", "offset_bytes": mib, "size_bytes": 2 * mib, "filesystem": "erofs"}
    base = {"id": "base", "offset_bytes": 0, "size_bytes": mib, "filesystem": "squashfs"}
    digests = {"source_digest": f"sha256:{_ROOT}", "content_digest": None, "whiteouts": "trusted"}
    whole = {"data_blocks": 384, "hash_offset_bytes": 384 * 4096, "signature": "3083"}
    places = ((4 * mib, step), (mib, mib), (4 * mib + step, 5 * 4096))
    ranges = [{"offset_bytes": at, "size_bytes": size} for at, size in places]
    app = {"id": "app", "layers": ["top"], "ranges": ranges, "verity": tree | whole}
    pack = {"image": "pack.img", "size_bytes": 8 * mib, "alignment_bytes": 4096}
    layers = [top | {"verity": tree | {"signature": "3082"}} | digests, base | {"verity": None}]
    yield json.dumps({"version": 2, **pack, "layers": layers, "images": [app]}).encode()
    yield json.dumps({"version": 1, **pack, "layers": [top | {"verity": tree}]}).encode()


TARGETS: dict[str, Target] = {
    "wire": Target(_wire, _wire_seeds, 1536),
    "server": Target(_server, _wire_seeds, 16384),
    "cmdline": Target(_command_line, _command_line_seeds, 4096),
    "tar": Target(_tar, _tar_seeds),
    "erofs": Target(_erofs, _erofs_seeds),
    "superblock": Target(_superblock, _superblock_seeds, 1024),
    "manifest": Target(_manifest, _manifest_seeds, 16384),
}
