"""A container image of real packages, written and unpacked by programs that are not ours.

The content comes from .deb files and a wheel in the cache (scripts/setup puts them there); umoci
writes the layers and unpacks them, skopeo converts between the forms that images come in.
"""

import os
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from tests.beds.calls import run

PACKAGES = Path(__file__).resolve().parents[2] / ".cache/packages"
TOOLS = ("umoci", "skopeo", "dpkg-deb")
EPOCH = 1_600_000_000


def require_tools() -> None:
    """Fail, saying what to do, where a tool or the content is missing."""
    missing = [name for name in TOOLS if shutil.which(name) is None]
    assert not missing, f"not installed: {', '.join(missing)}: run scripts/setup"
    assert list(PACKAGES.glob("*.deb")), f"no packages in {PACKAGES}: run scripts/setup"
    assert list(PACKAGES.glob("*.whl")), f"no wheel in {PACKAGES}: run scripts/setup"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerImage:
    """The image in every form, and ``unpacked``: what umoci makes of it."""

    layout: Path
    unpacked: Path
    layers: int

    @property
    def umoci_name(self) -> str:
        return f"{self.layout}:app"

    def converted(self, form: str, *options: str) -> Path:
        """Return the image in another form, as skopeo writes it: ``docker-archive``..."""
        path = self.layout.parent / "-".join((form, *(o.strip("-") for o in options)))
        target = f"{form}:{path}:app"
        run("skopeo", "copy", "--quiet", *options, f"oci:{self.umoci_name}", target)
        return path


def make_container_image(directory: Path) -> ContainerImage:
    """Write four layers: packages, a wheel, changes and removals, an opaque directory."""
    require_tools()
    layout, bundle = directory / "layout", directory / "bundle"
    name = f"{layout}:app"
    run("umoci", "init", "--layout", layout)
    run("umoci", "new", "--image", name)
    run("umoci", "unpack", "--image", name, bundle)
    for change in (_packages, _wheel, _changes):
        change(bundle / "rootfs")
        run("umoci", "repack", "--refresh-bundle", "--image", name, bundle)
    anew = directory / "anew"
    (anew / "below").mkdir(parents=True)
    (anew / "below/only").write_text("the only file here\n")
    run("umoci", "insert", "--image", name, "--opaque", anew, "/usr/share/zoneinfo/Europe")
    unpacked = directory / "unpacked"
    run("umoci", "unpack", "--image", name, unpacked)
    return ContainerImage(layout=layout, unpacked=unpacked / "rootfs", layers=4)


def _packages(top: Path) -> None:
    for package in sorted(PACKAGES.glob("*.deb")):
        run("dpkg-deb", "-x", package, top)
    for copies in ("posix", "right"):  # two thirds of the files, and nothing that is new
        shutil.rmtree(top / "usr/share/zoneinfo" / copies, ignore_errors=True)


def _wheel(top: Path) -> None:
    target = top / "usr/lib/python3/dist-packages"
    target.mkdir(parents=True)
    for wheel in sorted(PACKAGES.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target)


def _changes(top: Path) -> None:
    """Change, remove and add what layers are full of, each in a place of its own."""
    shutil.rmtree(top / "usr/share/doc")
    (top / "etc/issue").unlink()
    (top / "etc/debian_version").write_text("changed\n")
    shutil.rmtree(top / "usr/share/zoneinfo/Asia")
    (top / "usr/share/zoneinfo/Asia").symlink_to("Europe")  # a directory becomes a symlink
    (top / "etc/host.conf").unlink(missing_ok=True)
    (top / "etc/host.conf").mkdir()  # a file becomes a directory
    (top / "etc/host.conf/inside").write_text("inside\n")
    new = top / "srv/new"
    new.mkdir(parents=True)
    (new / "one").write_bytes(b"linked" * 1000)
    os.link(new / "one", new / "two")
    (new / "owned").write_text("owned\n")
    os.chown(new / "owned", 4_000_000, 70_000)
    (new / "setuid").write_text("#!/bin/sh\n")
    (new / "setuid").chmod(0o4755)
    (new / "empty").touch()
    (new / ("n" * 250)).write_text("a long name\n")
    deep = new
    for _ in range(4):
        deep /= "d" * 100
    deep.mkdir(parents=True)
    (deep / "é and a space").symlink_to("../" * 30 + "nowhere/" * 40)
    os.mkfifo(new / "fifo", 0o620)
    os.mknod(new / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(new / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 17))
    with (new / "sparse").open("wb") as file:
        file.truncate(5 << 20)
        file.seek(2 << 20)
        file.write(b"in the middle")
    os.setxattr(new / "owned", "trusted.kept", b"\0binary\xff")
    capability = bytes.fromhex("0100000200200000") + bytes(12)  # version 2: net_raw, effective
    os.setxattr(new / "setuid", "security.capability", capability)
    os.utime(new / "empty", (EPOCH, EPOCH))
