"""A whole Debian as a verified layer, booted to its own PID 1 through each of three initramfs."""

import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from tests.beds.debianbed import DebianRoot, InitramfsTools, debian_root
from vsock.deadline import Deadline

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
BOOT_SECONDS = 240
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("mmdebstrap") is None,
        reason="a Debian is made by root, with mmdebstrap",
    ),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> DebianRoot:
    return debian_root(CACHE_DIR, tmp_path_factory.mktemp("debian"))


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory, kernel: Kernel) -> InitramfsTools:
    return InitramfsTools(CACHE_DIR, tmp_path_factory.mktemp("tools"), kernel)


@pytest.fixture
def boot(kernel: Kernel, root: DebianRoot) -> Callable[..., str]:
    """Boot until the machine ends in order; return what was on the console."""

    def boot(initrd: Path, *settings: str) -> str:
        spec = MachineSpec(
            kernel=kernel.image,
            initrd=initrd,
            memory_mib=1024,
            pmem=(PmemSpec(path=root.image),),
            cmdline=" ".join(settings),
            vsock_cid=None,
        )
        with Machine(spec, cache_dir=CACHE_DIR) as machine:
            with closing(Deadline(BOOT_SECONDS)) as deadline:
                assert machine.wait(deadline) == 0
            return machine.console.read()

    return boot


def reached(console: str) -> str:
    lines = [line for line in console.splitlines() if line.startswith("Debian ")]
    assert len(lines) == 1, console
    assert "reboot: Power down" in console
    return lines[0].partition(" reached: ")[2]


OVERLAY = "guestagent.overlay=root,scratch=tmpfs:67108864"
UP = "PID 1 is /usr/lib/systemd/systemd, root is overlay"


def test_through_our_own_initramfs(
    boot: Callable[..., str], kernel: Kernel, root: DebianRoot
) -> None:
    spec = InitramfsSpec(kernel=kernel, features=("pmem", "verity", "erofs", "overlay"))
    initrd = build_initramfs(spec, cache_dir=CACHE_DIR).path
    assert reached(boot(initrd, root.setting, OVERLAY)) == UP


def test_through_initramfs_tools(
    boot: Callable[..., str], tools: InitramfsTools, root: DebianRoot
) -> None:
    initrd = tools.mkinitramfs()
    assert reached(boot(initrd, "boot=guestagent", root.setting, OVERLAY)) == UP
    wrong = root.setting.rpartition("root=")[0] + "root=" + "00" * 32
    console = boot(initrd, "boot=guestagent", wrong, OVERLAY)
    assert "the root cannot be mounted" in console
    assert "Debian " not in console


def test_through_dracut(boot: Callable[..., str], tools: InitramfsTools, root: DebianRoot) -> None:
    initrd = tools.dracut()
    assert reached(boot(initrd, root.setting, OVERLAY)) == UP
    console = boot(initrd, root.setting.replace("pmem:0", "pmem:5"), "guestagent.deadline=2")
    assert "the root cannot be mounted" in console
    assert "Debian " not in console
