"""What the tests of images share: tars made by Python's own writer, OCI layouts, and archives."""

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

EPOCH = 1_600_000_000


@dataclass
class Member:
    """A member of a tar; ``kind`` as tarfile has it."""

    name: str
    data: bytes = b""
    kind: bytes = tarfile.REGTYPE
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: float = EPOCH
    target: str = ""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[str, bytes] = field(default_factory=dict)


def directory(name: str, **facts: object) -> Member:
    return Member(name, kind=tarfile.DIRTYPE, **{"mode": 0o755, **facts})  # type: ignore[arg-type]


def hard_link(name: str, target: str) -> Member:
    return Member(name, kind=tarfile.LNKTYPE, target=target)


def symlink(name: str, target: str) -> Member:
    return Member(name, kind=tarfile.SYMTYPE, target=target, mode=0o777)


def make_tar(members: Sequence[Member], format: int = tarfile.PAX_FORMAT) -> bytes:
    """Write a tar by the standard library's writer, which is not ours."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.mode, info.mtime = member.kind, member.mode, member.mtime
            info.uid, info.gid, info.linkname = member.uid, member.gid, member.target
            info.devmajor, info.devminor = member.device
            info.size = len(member.data)
            info.pax_headers = {
                f"SCHILY.xattr.{name}": value.decode("utf-8", "surrogateescape")
                for name, value in member.xattrs.items()
            }
            archive.addfile(info, io.BytesIO(member.data))
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-q", "-c"], input=data, stdout=-1, check=True).stdout


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


MEDIA = "application/vnd.oci.image.layer.v1.tar"


class Layout:
    """An OCI layout being made in a directory; every part can be spoilt before ``finish``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        self.layers: list[dict[str, object]] = []
        self.diff_ids: list[str] = []
        self.manifests: list[dict[str, object]] = []

    def blob(self, data: bytes, media_type: str = MEDIA) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / name).write_bytes(data)
        return {"mediaType": media_type, "digest": "sha256:" + name, "size": len(data)}

    def layer(self, members: Sequence[Member], compression: str = "") -> "Layout":
        tar = make_tar(members)
        self.diff_ids.append(digest(tar))
        packed = {"": lambda: tar, "+gzip": lambda: gzip.compress(tar), "+zstd": lambda: zstd(tar)}
        self.layers.append(self.blob(packed[compression](), MEDIA + compression))
        return self

    def image(self, **facts: object) -> "Layout":
        """End an image: write config and manifest, and list it."""
        config = {
            "os": "linux",
            "architecture": "amd64",
            "rootfs": {"type": "layers", "diff_ids": self.diff_ids},
        }
        manifest = {
            "schemaVersion": 2,
            "config": self.blob(
                json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"
            ),
            "layers": self.layers,
        }
        descriptor = self.blob(
            json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json"
        )
        self.manifests.append({**descriptor, **facts})
        self.layers, self.diff_ids = [], []
        return self

    def place(self, descriptor: Mapping[str, object]) -> Path:
        """Return where the blob of a descriptor is."""
        return self.path / "blobs/sha256" / str(descriptor["digest"]).removeprefix("sha256:")

    def change_manifest(self, change: Callable[[dict[str, Any]], object]) -> None:
        """List a changed manifest in place of the one of the first image."""
        manifest = json.loads(self.place(self.manifests[0]).read_text())
        change(manifest)
        kind = str(self.manifests[0]["mediaType"])
        self.manifests = [self.blob(json.dumps(manifest).encode(), kind)]

    def finish(self) -> Path:
        if self.layers:
            self.image()
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        index = {"schemaVersion": 2, "manifests": self.manifests}
        (self.path / "index.json").write_text(json.dumps(index))
        return self.path


def tar_of(directory_path: Path, archive: Path) -> Path:
    """Put the files of a directory into a tar."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted(directory_path.rglob("*")):
            tar.add(path, str(path.relative_to(directory_path)), recursive=False)
    return archive


def docker_archive(path: Path, layers: Sequence[bytes], tag: str = "app:1") -> Path:
    """Write what ``docker save`` of old wrote."""
    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [*map(digest, layers)]}}).encode()
    config_name = hashlib.sha256(config).hexdigest() + ".json"
    names = [f"layer{number}/layer.tar" for number in range(len(layers))]
    manifest = [{"Config": config_name, "RepoTags": [tag], "Layers": names}]
    files = {config_name: config, "manifest.json": json.dumps(manifest).encode()}
    files |= dict(zip(names, layers, strict=True))
    path.write_bytes(make_tar([Member(name, data) for name, data in files.items()]))
    return path


def write_crowd(file: IO[bytes], count: int) -> None:
    """Write a tar of ``count`` entries as a stream: directories of 999 empty files each."""
    written = 0
    while written < count:
        size = min(1000, count - written)
        top = f"{written // 1000:06d}"
        file.write(_crowd_header(f"{top}/", tarfile.DIRTYPE, 0o755))
        # headers of one directory differ in the last digits of the name, and in the checksum
        header = bytearray(_crowd_header(f"{top}/000", tarfile.REGTYPE, 0o644))
        checksum = int(header[148:154], 8)
        for number in range(1, size):
            digits = b"%03d" % number
            header[7:10] = digits
            header[148:154] = b"%06o" % (checksum + sum(digits) - 3 * ord("0"))
            file.write(header)
        written += size
    file.write(bytes(2 * tarfile.BLOCKSIZE))


def _crowd_header(name: str, kind: bytes, mode: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = kind, mode, EPOCH
    return info.tobuf(tarfile.USTAR_FORMAT)
