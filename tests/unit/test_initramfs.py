import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from guestagent.storage.filesystems import HEAD_BYTES, detect
from guestagent.storage.filesystems import TABLE as FILESYSTEMS
from rootfs.bootimage.cpio import directory, regular
from rootfs.bootimage.elf import ElfError
from rootfs.bootimage.features import DEFAULT_FEATURES, FEATURES, Feature
from rootfs.bootimage.initramfs import (
    COMPRESSIONS,
    DEFAULT_COMPRESSION,
    InitramfsReport,
    InitramfsSpec,
    _compress,
    build_initramfs,
)
from rootfs.bootimage.kernel import Kernel, ModuleNotFoundInKernelError
from tests.beds.calls import run
from tests.beds.loopbed import sparse_file
from vsock.errors import CallError

_UNPACK = {"zstd": ["zstd", "-dcq"], "lz4": ["lz4", "-dcq"], "gzip": ["gzip", "-dc"]}


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return make_kernel(tmp_path)


def make_kernel(place: Path) -> Kernel:
    modules = place / "modules"
    modules.mkdir()
    (place / "vmlinuz").write_bytes(b"kernel")
    dep = "k/dm-mod.ko:\nk/dm-verity.ko: k/dm-mod.ko\nk/sha256.ko:\n"
    (modules / "modules.dep").write_text(dep)
    (modules / "modules.alias").write_text("alias crypto-sha256 sha256\n")
    (modules / "k").mkdir()
    for name in ("dm-mod", "dm-verity", "sha256"):
        (modules / "k" / f"{name}.ko").write_bytes(name.encode())
    return Kernel(version="6.1-test", image=place / "vmlinuz", modules_dir=modules)


@pytest.fixture
def spec(tmp_path: Path, kernel: Kernel) -> InitramfsSpec:
    return make_spec(tmp_path, kernel)


def make_spec(place: Path, kernel: Kernel) -> InitramfsSpec:
    package = place / "project" / "pid1"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "init.py").write_text("def main():\n    print('up')\n")
    return InitramfsSpec(
        kernel=kernel,
        entry="pid1.init:main",
        features=("verity",),
        compression="none",
        project=place / "project",
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def listing(report: InitramfsReport, compression: str = "none") -> list[str]:
    data = report.path.read_bytes()
    if compression != "none":
        data = subprocess.run(_UNPACK[compression], input=data, stdout=-1, check=True).stdout
    assert len(data) == report.unpacked_bytes
    output = subprocess.run(["cpio", "-t", "--quiet"], input=data, stdout=-1, check=True).stdout
    return output.decode().splitlines()


def unpack(report: InitramfsReport, target: Path) -> Path:
    target.mkdir()
    subprocess.run(
        ["cpio", "-idm", "--quiet", "--no-absolute-filenames"],
        input=report.path.read_bytes(),
        cwd=target,
        check=True,
    )
    return target


def test_initramfs_build_is_reproducible_byte_for_byte(spec: InitramfsSpec, tmp_path: Path) -> None:
    """Built here, and by another process with another hash seed and other modules loaded."""
    here = build_initramfs(spec, cache_dir=tmp_path / "here")
    script = (
        "import asyncio, decimal, sys\n"
        "from pathlib import Path\n"
        "from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs\n"
        "from rootfs.bootimage.kernel import Kernel\n"
        "base = Path(sys.argv[1])\n"
        "kernel = Kernel(version='6.1-test', image=base/'vmlinuz', modules_dir=base/'modules')\n"
        "spec = InitramfsSpec(kernel=kernel, entry='pid1.init:main', features=('verity',),\n"
        "                     compression='none', project=base/'project')\n"
        "build_initramfs(spec, cache_dir=base/'there')\n"
    )
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[2])}
    run(sys.executable, "-c", script, tmp_path, env=env)
    (there,) = (tmp_path / "there" / "initramfs").glob("*.cpio")
    assert not here.cached
    assert there.name == here.path.name
    assert there.read_bytes() == here.path.read_bytes()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_each_compression_gives_the_archive_back(tmp_path: Path, compression: str) -> None:
    """On a small one: the best that a program can do to a whole image takes it seconds."""
    content = b"".join(b"%d\n" % number for number in range(5000))
    entries = [directory("etc"), regular("etc/numbers", content)]
    path = tmp_path / "image"
    with open(path, "wb") as file:
        size_bytes = _compress(compression, entries, file)
    data = path.read_bytes()
    if compression != "none":
        assert len(data) < size_bytes
        data = subprocess.run(_UNPACK[compression], input=data, stdout=-1, check=True).stdout
    assert len(data) == size_bytes
    (tmp_path / "root").mkdir()
    subprocess.run(["cpio", "-idm", "--quiet"], input=data, cwd=tmp_path / "root", check=True)
    assert (tmp_path / "root/etc/numbers").read_bytes() == content


@pytest.mark.parametrize("compression", ["none", DEFAULT_COMPRESSION])
def test_initramfs_is_listed_by_cpio_and_holds_required_files(
    spec: InitramfsSpec, cache: Path, compression: str
) -> None:
    report = build_initramfs(replace(spec, compression=compression), cache_dir=cache)
    names = listing(report, compression)
    assert {
        "init",
        "dev/console",
        "dev/urandom",
        "proc",
        "usr/bin/python3",
        "etc/guestagent/modules",
    } <= {*names}
    assert "lib/modules/6.1-test/dm-verity.ko" in names
    assert any(name.endswith("/pid1/init.pyc") for name in names)
    assert not any(name.endswith(".py") for name in names)
    assert names == sorted(names, key=lambda name: name.split("/"))


def test_init_starts_the_entry_point_in_the_image_alone(
    spec: InitramfsSpec, cache: Path, tmp_path: Path
) -> None:
    """With the image's own interpreter, linker, libraries and modules, and none of this host."""
    report = build_initramfs(spec, cache_dir=cache)
    root = unpack(report, tmp_path / "root")
    assert (root / "init").read_text().startswith("#!/usr/bin/python3 -IS\n")
    # unprivileged, the root cannot be changed: the linker and the prefix are given instead
    linker = next(root.glob("lib64/ld-linux*"))
    libraries = ":".join({str(path.parent) for path in root.glob("**/lib*.so*")})
    argv = [linker, "--inhibit-cache", "--library-path", libraries, root / "usr/bin/python3"]
    python_path = next(root.glob("usr/lib/python3.*"))
    script = f"import sys; sys.path[:] = [{str(python_path)!r}]; exec(open('init').read())"
    result = subprocess.run(
        [*argv, "-I", "-S", "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout == "up\n"


def test_modules_are_listed_in_the_order_to_load_them(
    spec: InitramfsSpec, cache: Path, tmp_path: Path
) -> None:
    report = build_initramfs(spec, cache_dir=cache)
    root = unpack(report, tmp_path / "root")
    order = (root / "etc/guestagent/modules").read_text().splitlines()
    assert order == [f"/lib/modules/6.1-test/{n}.ko" for n in ("dm-mod", "dm-verity", "sha256")]
    assert report.kernel_modules == ("dm-mod", "dm-verity", "sha256")
    for path in order:
        assert (root / path[1:]).read_bytes() == Path(path).stem.encode()


@pytest.mark.parametrize("name", ["mkfs.ext4", "mkfs.xfs"])
def test_a_program_of_a_feature_runs_in_the_image_alone(
    spec: InitramfsSpec, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """It makes a file system with the image's own libraries, and no configuration of this host."""
    feature = replace(FEATURES[name.replace(".", "-")], modules=())
    monkeypatch.setitem(FEATURES, "a-program", feature)  # type: ignore[arg-type]
    report = build_initramfs(replace(spec, features=("a-program",)), cache_dir=cache)
    root = unpack(report, tmp_path / "root")
    assert report.parts["programs"] == (root / "usr/sbin" / name).stat().st_size
    disk = sparse_file(tmp_path / "disk", 320 << 20)
    linker = next(root.glob("lib64/ld-linux*"))
    libraries = ":".join({str(path.parent) for path in root.glob("**/lib*.so*")})
    argv = ["--inhibit-cache", "--library-path", libraries, "--argv0", name]
    program, *options = FILESYSTEMS[name.removeprefix("mkfs.")].mkfs
    done = subprocess.run(
        [linker, *argv, root / "usr/sbin" / program, *options, disk],
        env={"MKE2FS_CONFIG": "/nonexistent"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    with disk.open("rb") as file:
        head = file.read(HEAD_BYTES)
    assert detect(lambda offset, size: head[offset : offset + size]) == name.removeprefix("mkfs.")


def test_a_program_that_is_not_installed_is_named(
    spec: InitramfsSpec, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FEATURES, "absent", Feature(summary="", programs=("mkfs.absent",)))  # type: ignore[arg-type]
    with pytest.raises(ElfError, match=r"no program 'mkfs.absent' in /usr/sbin"):
        build_initramfs(replace(spec, features=("absent",)), cache_dir=cache)


def test_the_cache_answers_until_something_changes(spec: InitramfsSpec, cache: Path) -> None:
    first = build_initramfs(spec, cache_dir=cache)
    again = build_initramfs(spec, cache_dir=cache)
    assert again.cached
    assert replace(again, cached=False) == first
    (spec.project / "pid1/init.py").write_text("def main():\n    print('other')\n")
    changed = build_initramfs(spec, cache_dir=cache)
    assert not changed.cached
    assert changed.digest != first.digest


def test_a_copy_is_put_where_it_is_wanted(spec: InitramfsSpec, cache: Path, tmp_path: Path) -> None:
    report = build_initramfs(spec, cache_dir=cache, output=tmp_path / "image")
    assert report.path == tmp_path / "image"
    assert report.path.stat().st_size == report.size_bytes


def test_a_copy_is_whole_or_not_at_all(spec: InitramfsSpec, cache: Path, tmp_path: Path) -> None:
    build_initramfs(spec, cache_dir=cache)
    output = tmp_path / "boot.img"
    output.write_bytes(b"good")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(CallError) as caught:
            build_initramfs(spec, cache_dir=cache, output=output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (caught.value.code, caught.value.object) == ("resource", str(output))
    assert output.read_bytes() == b"good"
    output.unlink()
    output.symlink_to("elsewhere")
    with pytest.raises(CallError, match="a symbolic link"):
        build_initramfs(spec, cache_dir=cache, output=output)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.skipif(
    not all(parent.stat().st_mode & 0o001 for parent in Path(__file__).resolve().parents),
    reason="other users cannot reach this directory",
)
def test_a_cache_of_another_user_is_used(tmp_path: Path) -> None:
    place = Path(tempfile.mkdtemp(prefix="cache-"))  # tmp_path is for its owner only
    try:
        place.chmod(0o755)
        spec = make_spec(place, make_kernel(place))
        built = build_initramfs(spec, cache_dir=place / "cache")
        pid = os.fork()
        if not pid:
            try:
                os.setresuid(65534, 65534, 65534)
                again = build_initramfs(spec, cache_dir=place / "cache")
                os._exit(0 if again.cached and again.path == built.path else 2)
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        shutil.rmtree(place)


def test_added_files_keep_their_permissions(
    spec: InitramfsSpec, cache: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script"
    script.write_text("#!")
    script.chmod(0o700)
    report = build_initramfs(replace(spec, files=(("opt/run", script),)), cache_dir=cache)
    root = unpack(report, tmp_path / "root")
    assert (root / "opt/run").stat().st_mode & 0o777 == 0o700
    assert report.parts["added files"] == 2


def test_hashing_brings_no_openssl(spec: InitramfsSpec, cache: Path) -> None:
    (spec.project / "pid1/init.py").write_text("import hashlib\nmain = hashlib.sha256\n")
    report = build_initramfs(spec, cache_dir=cache)
    assert "hashlib" in report.python_modules
    assert not any("libcrypto" in name for name in listing(report))


def test_a_kernel_without_the_module_is_refused(spec: InitramfsSpec, cache: Path) -> None:
    with pytest.raises(ModuleNotFoundInKernelError, match="erofs"):
        build_initramfs(replace(spec, features=("verity", "erofs")), cache_dir=cache)
    assert not list(cache.glob("**/*.cpio"))


def test_optional_modules_may_be_missing(spec: InitramfsSpec, cache: Path) -> None:
    assert FEATURES["verity"].optional_modules
    build_initramfs(spec, cache_dir=cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": ("floppy",)}, "unknown feature 'floppy'"),
        ({"compression": "rar"}, "unknown compression 'rar'"),
        ({"entry": "no colon"}, "not module:function"),
    ],
)
def test_a_wrong_spec_is_refused(
    spec: InitramfsSpec, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(spec, **change)  # type: ignore[arg-type]


def test_default_features_are_features() -> None:
    assert set(DEFAULT_FEATURES) <= set(FEATURES)


def test_the_report_adds_up(spec: InitramfsSpec, cache: Path) -> None:
    report = build_initramfs(spec, cache_dir=cache)
    assert 0 <= report.unpacked_bytes - sum(report.parts.values()) < 0.02 * report.unpacked_bytes
    assert "interpreter" in report.describe()
