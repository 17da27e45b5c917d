import gzip
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rootfs.bootimage.kernel import (
    KernelNotFoundError,
    ModuleIndex,
    ModuleNotFoundInKernelError,
    cached_kernel,
    module_bytes,
    module_name,
    open_kernel,
)

_DEP = """\
kernel/md/dm-mod.ko:
kernel/md/dm-bufio.ko.xz: kernel/md/dm-mod.ko
kernel/md/dm-verity.ko: kernel/md/dm-bufio.ko.xz kernel/md/dm-mod.ko
kernel/fs/erofs.ko: kernel/lib/libcrc32c.ko
kernel/lib/libcrc32c.ko:
kernel/crypto/crc32c-intel.ko:
kernel/crypto/sha256-ssse3.ko:
kernel/net/after.ko:
"""
_SOFTDEP = """\
# Soft dependencies
softdep libcrc32c pre: crc32c
softdep erofs post: after
softdep dm_mod pre: not_in_this_kernel
"""
_ALIAS = """\
alias crc32c crc32c_intel
alias crypto-sha256 sha256_ssse3
alias pci:v00001AF4d*sv* after
"""


@pytest.fixture
def index(tmp_path: Path) -> ModuleIndex:
    files = {"dep": _DEP, "softdep": _SOFTDEP, "alias": _ALIAS}
    files["builtin"] = "kernel/fs/ext4/ext4.ko\nkernel/crypto/sha1_generic.ko\n"
    for name, text in files.items():
        (tmp_path / f"modules.{name}").write_text(text)
    (tmp_path / "modules.builtin.modinfo").write_bytes(
        b"sha1_generic.alias=crypto-sha1\0ext4.license=GPL\0"
    )
    return ModuleIndex(modules_dir=tmp_path)


def names(paths: tuple[Path, ...]) -> list[str]:
    return [module_name(str(path)) for path in paths]


def test_needs_come_first(index: ModuleIndex) -> None:
    assert names(index.closure(["dm-verity"])) == ["dm_mod", "dm_bufio", "dm_verity"]


def test_each_module_once_whatever_the_spelling(index: ModuleIndex) -> None:
    assert names(index.closure(["dm_mod", "dm-verity", "dm-mod"])) == [
        "dm_mod",
        "dm_bufio",
        "dm_verity",
    ]


def test_soft_dependencies_before_and_after(index: ModuleIndex) -> None:
    assert names(index.closure(["erofs"])) == ["crc32c_intel", "libcrc32c", "erofs", "after"]


def test_built_in_code_needs_no_file(index: ModuleIndex) -> None:
    assert index.closure(["ext4", "crypto-sha1"]) == ()


def test_aliases_and_patterns_resolve(index: ModuleIndex) -> None:
    assert names(index.closure(["crypto-sha256"])) == ["sha256_ssse3"]
    assert names(index.closure(["pci:v00001AF4d00001042sv"])) == ["after"]


def test_an_unknown_module_is_named(index: ModuleIndex) -> None:
    with pytest.raises(ModuleNotFoundInKernelError, match="'nope'") as caught:
        index.closure(["dm-mod", "nope"])
    assert caught.value.name == "nope"
    assert not index.has("nope")


def test_a_missing_hard_dependency_is_an_error(index: ModuleIndex) -> None:
    (index.modules_dir / "modules.dep").write_text("a.ko: b.ko\n")
    with pytest.raises(ModuleNotFoundInKernelError, match="'b'"):
        ModuleIndex(modules_dir=index.modules_dir).closure(["a"])


def test_circles_end(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("a.ko: b.ko\nb.ko: a.ko\n")
    assert sorted(names(ModuleIndex(modules_dir=tmp_path).closure(["a"]))) == ["a", "b"]


def test_without_depmod_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(KernelNotFoundError, match="depmod"):
        ModuleIndex(modules_dir=tmp_path).closure(["a"])


def _zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-qc"], input=data, stdout=-1, check=True).stdout


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", _zstd)],
)
def test_modules_come_uncompressed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"m.ko{suffix}"
    path.write_bytes(compress(b"\x7fELF module"))
    assert module_bytes(path) == b"\x7fELF module"


def _kernel_tree(root: Path, *versions: str) -> None:
    for version in versions:
        (root / "boot").mkdir(parents=True, exist_ok=True)
        (root / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")
        (root / "lib/modules" / version).mkdir(parents=True)


def test_the_newest_kernel_with_modules_is_taken(tmp_path: Path) -> None:
    _kernel_tree(tmp_path, "6.1.0-9-cloud-amd64", "6.1.0-56-cloud-amd64")
    (tmp_path / "boot/vmlinuz-7.0-no-modules").write_bytes(b"")
    assert open_kernel(tmp_path).version == "6.1.0-56-cloud-amd64"


@pytest.mark.parametrize("image", ["boot/vmlinuz-6.12-x", "usr/lib/modules/6.12-x/vmlinuz"])
@pytest.mark.parametrize("link", [None, "usr/lib"])
def test_modules_below_usr_are_found_with_the_image_beside_them_or_in_boot(
    tmp_path: Path, image: str, link: str | None
) -> None:
    modules = tmp_path / "usr/lib/modules/6.12-x"
    modules.mkdir(parents=True)
    (tmp_path / image).parent.mkdir(exist_ok=True)
    (tmp_path / image).write_bytes(b"kernel")
    if link is not None:
        (tmp_path / "lib").symlink_to(link)
    kernel = open_kernel(tmp_path)
    assert kernel.version == "6.12-x"
    assert (kernel.image, kernel.modules_dir) == (tmp_path / image, modules)


def test_a_kernel_without_a_boot_directory_is_found_in_the_cache(tmp_path: Path) -> None:
    modules = tmp_path / "kernel/7.2-x/usr/lib/modules/7.2-x"
    modules.mkdir(parents=True)
    (modules / "vmlinuz").write_bytes(b"kernel")
    assert cached_kernel(tmp_path).version == "7.2-x"


def test_a_kernel_that_setup_has_not_finished_is_not_taken(tmp_path: Path) -> None:
    _kernel_tree(tmp_path / "kernel/6.1-x", "6.1-x")
    _kernel_tree(tmp_path / "kernel/.new-XYZ", "9.9-x")
    assert cached_kernel(tmp_path).version == "6.1-x"


def test_the_newest_cached_kernel_is_taken(tmp_path: Path) -> None:
    for version in ("6.1.0-9-x", "6.1.0-10-x"):
        _kernel_tree(tmp_path / "kernel" / version, version)
    assert cached_kernel(tmp_path).version == "6.1.0-10-x"


def test_no_kernel_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(KernelNotFoundError, match="scripts/setup"):
        cached_kernel(tmp_path)
    with pytest.raises(KernelNotFoundError, match="no kernel"):
        open_kernel(tmp_path)
