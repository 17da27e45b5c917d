"""A Debian for tests of the boot hook: its root as a verified layer, and its own initramfs tools.

Both are made once, by mmdebstrap from the mirrors that this machine uses, and kept in .cache.
"""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rootfs.bootimage.initramfs import PROJECT
from rootfs.bootimage.kernel import Kernel
from rootfs.image.images import build_image
from rootfs.pack.manifest import ManifestLayer
from rootfs.pack.pack import Pack
from tests.beds.calls import run

SUITE = "bookworm"
#: Ends the machine in order as soon as the system is up, and says so first.
REACHED = """\
[Unit]
Description=Tell that the system is up, and end it
SuccessAction=poweroff

[Service]
Type=oneshot
StandardOutput=tty
TTYPath=/dev/console
ExecStart=/bin/sh -c 'echo "Debian $(cat /etc/debian_version) reached: PID 1 is $(readlink \
/proc/1/exe), root is $(findmnt -n -o FSTYPE /)"'

[Install]
WantedBy=multi-user.target
"""
_WANTS = "etc/systemd/system/multi-user.target.wants/reached.service"
#: Languages and manuals are half of a small root.
_OPTIONS = tuple(
    f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man", "zoneinfo")
)
_PACKAGES = ("vsock", "guestagent", "rootfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class DebianRoot:
    """A Debian with systemd as a layer of a pack."""

    image: Path
    layer: ManifestLayer

    @property
    def setting(self) -> str:
        layer = self.layer
        assert layer.verity is not None
        return (
            f"guestagent.layer=pmem:0,id=debian,offset={layer.offset_bytes},"
            f"size={layer.size_bytes},root={layer.verity.root_digest.hex()}"
        )


def debian_root(cache: Path, directory: Path) -> DebianRoot:
    """Return the root, packed in ``directory``."""
    tree = _bootstrap(cache, "root", ("systemd-sysv",))
    with _copied(tree, directory / "tree") as copy:
        (copy / "etc/machine-id").write_text("")
        (copy / "etc/systemd/system/reached.service").write_text(REACHED)
        wants = copy / _WANTS
        wants.parent.mkdir(exist_ok=True)
        wants.symlink_to("../reached.service")
        image = directory / "debian.erofs"
        built = build_image(copy, image, verity=True)
    with Pack.create(directory / "pack.img") as pack:
        pack.add(image, "debian", verity=built.verity)
        return DebianRoot(image=pack.path, layer=pack.layers[0])


class InitramfsTools:
    """A Debian in which ``mkinitramfs`` and ``dracut`` are installed, and our hooks with them."""

    def __init__(self, cache: Path, directory: Path, kernel: Kernel) -> None:
        packages = ("initramfs-tools", "dracut-core", "busybox", "zstd", "python3", "kmod", "udev")
        libraries = ("python3-msgpack", "python3-pyelftools", "python3-tenacity")
        tree = _bootstrap(cache, "tools", (*packages, *libraries))
        self._kernel = kernel
        self._root = directory / "tools"
        run("cp", "-a", "--reflink=auto", tree, self._root)
        self._install()

    def mkinitramfs(self) -> Path:
        return self._run("mkinitramfs", "-o", "/out.img", self._kernel.version)

    def dracut(self) -> Path:
        return self._run(
            "dracut", "--force", "--no-hostonly", "--no-early-microcode", "--quiet",
            "--add", "guestagent", "--compress", "zstd -3", "--kver", self._kernel.version,
            "/out.img",
        )  # fmt: skip

    def _install(self) -> None:
        """Put our packages and hooks where a package of the distribution would."""
        libraries = self._root / "usr/lib/python3/dist-packages"
        for name in _PACKAGES:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PROJECT / name, libraries / name, ignore=ignore)
        hooks = PROJECT / "rootfs/hooks"
        etc = self._root / "etc/initramfs-tools"
        shutil.copy(hooks / "initramfs-tools/hooks/guestagent", etc / "hooks")
        shutil.copy(hooks / "initramfs-tools/scripts/guestagent", etc / "scripts")
        modules = self._root / "usr/lib/dracut/modules.d"
        shutil.copytree(hooks / "dracut/90guestagent", modules / "90guestagent")
        version = self._kernel.version
        shutil.copy(self._kernel.image.with_name(f"config-{version}"), self._root / "boot")
        (self._root / "usr/lib/modules" / version).mkdir(parents=True)

    def _run(self, *command: str) -> Path:
        """Run a command that writes /out.img, with mounts that end with it; return the image."""
        root, version = str(self._root), self._kernel.version
        script = (
            'set -e; mount --bind "$2" "$1/usr/lib/modules/$3"; mount -t proc proc "$1/proc"; '
            'mount -t sysfs sysfs "$1/sys"; mount --bind /dev "$1/dev"; '
            'mount -t tmpfs tmpfs "$1/tmp"; root=$1; shift 3; exec chroot "$root" "$@"'
        )
        argv = ["unshare", "--mount", "sh", "-c", script, "sh", root]
        argv += [str(self._kernel.modules_dir), version, *command]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0, f"{command[0]}: {result.stdout}{result.stderr}"
        image = self._root.with_name(f"{command[0]}.img")
        (self._root / "out.img").rename(image)
        return image


def _bootstrap(cache: Path, name: str, packages: tuple[str, ...]) -> Path:
    """Return a Debian with these packages, made now or earlier."""
    wanted = hashlib.sha256(repr((SUITE, packages, _OPTIONS)).encode()).hexdigest()[:16]
    store = cache / "debian"
    store.mkdir(parents=True, exist_ok=True)
    tree = store / f"{name}-{wanted}"
    with open(store / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.is_dir():
            new = store / f".new-{name}"
            shutil.rmtree(new, ignore_errors=True)
            command = ["mmdebstrap", "--variant=minbase", "--format=directory", "--quiet"]
            command += [f"--include={','.join(packages)}", *_OPTIONS, SUITE, str(new)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, f"mmdebstrap: {result.stdout}{result.stderr}"
            new.rename(tree)
    return tree


@contextmanager
def _copied(tree: Path, copy: Path) -> Iterator[Path]:
    run("cp", "-a", "--reflink=auto", tree, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy)
