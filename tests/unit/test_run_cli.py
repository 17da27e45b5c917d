"""``guestctl run`` for monitors that are not started here, and ``guestctl initramfs``."""

import functools
import hashlib
import json
import lzma
import os
import shlex
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from guestagent.api.agent import HelloReply
from guestagent.host.ctl.main import collect
from rootfs.bootimage import initramfs
from rootfs.bootimage.kernel import cached_kernel
from rootfs.cli import run as run_cli
from rootfs.machine import vmlinux
from rootfs.machine.run_image import mount_request
from rootfs.machine.vmlinux import unpack_kernel
from rootfs.pack.manifest import Manifest
from rootfs.pack.pack import Pack
from tests.beds.calls import call_error
from tests.beds.imagebed import Layout, Member, directory

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
ELF = b"\x7fELF" + b"kernel" * 100


@pytest.fixture(scope="module", autouse=True)
def _one_look_at_the_interpreter_and_the_kernel() -> Iterator[None]:
    """What of Python goes into an image, and the kernel unpacked, are the same for all tests."""
    real = initramfs.userland
    found: dict[tuple[object, ...], tuple[object, list[object]]] = {}

    def userland(entry_module: str, **options: object) -> object:
        key = (entry_module, *sorted(options.items()))
        if key not in found:
            found[key] = real(entry_module, **options)  # type: ignore[arg-type, assignment]
        modules, items = found[key]
        return modules, list(items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vmlinux, "unpack_kernel", functools.lru_cache(1)(vmlinux.unpack_kernel))
        patch.setattr(initramfs, "userland", userland)
        yield


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of two layers; the upper one replaces a file of the lower one."""
    image = Layout(tmp_path_factory.mktemp("image") / "oci")
    image.layer([directory("etc"), Member("etc/motd", b"from below\n"), Member("below", b"b")])
    image.layer([directory("etc"), Member("etc/motd", b"from above\n")], "+gzip")
    return image.finish()


def invoke(*arguments: object) -> Result:
    name, *rest = map(str, arguments)
    command = next(command for command in run_cli.COMMANDS if command.name == name)
    return CliRunner().invoke(command, rest)


def bzimage(payload: bytes) -> bytes:
    """Wrap a payload as the boot protocol has it, two setup sectors before it."""
    image = bytearray(3 * 512)
    image[0x1F1] = 2
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, 16, len(payload) + 4)
    return bytes(image) + bytes(16) + payload + struct.pack("<I", len(ELF))


def needs_kernel() -> None:
    if not list((CACHE_DIR / "kernel").glob("*/boot")):
        pytest.skip("no kernel in .cache/kernel")


def test_a_kernel_is_unpacked() -> None:
    assert unpack_kernel(bzimage(lzma.compress(ELF))) == ELF
    assert unpack_kernel(ELF) == ELF


def test_the_kernel_at_hand_is_unpacked() -> None:
    needs_kernel()
    elf = unpack_kernel(cached_kernel(CACHE_DIR).image.read_bytes())
    assert elf[:4] == b"\x7fELF"
    assert b"Linux version" in elf


@pytest.mark.parametrize(
    ("image", "code"),
    [
        (b"", "invalid"),
        (bytes(4096), "invalid"),
        (bzimage(b"BZh9 nothing"), "unsupported"),
        (bzimage(lzma.compress(ELF)[:40]), "invalid"),
        (bzimage(lzma.compress(b"no ELF")), "invalid"),
    ],
)
def test_unpack_kernel_refuses_invalid_images(image: bytes, code: str) -> None:
    with call_error(code):
        unpack_kernel(image)


@pytest.mark.parametrize("vmm", ["firecracker", "cloud-hypervisor"])
def test_other_monitors_get_an_exact_configuration(layout: Path, tmp_path: Path, vmm: str) -> None:
    needs_kernel()
    done = invoke("run", layout, "--vmm", vmm, "--directory", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    shown = json.loads(done.stdout)
    pack = tmp_path / "pack.img"
    layers = Manifest.load(tmp_path / "pack.img.json").layers
    assert len(layers) == 2
    assert all(layer.verity is not None for layer in layers)
    assert shlex.split(shown["command"])[0] == vmm
    assert shlex.split(shown["mount"])[-1] == str(pack)
    config = shown["config"]
    if vmm == "firecracker":
        assert json.loads((tmp_path / "firecracker.json").read_text()) == config
        assert config["drives"][0]["path_on_host"] == str(pack)
        kernel, initrd = (
            config["boot-source"][f"{key}_path"] for key in ("kernel_image", "initrd")
        )
    else:
        assert config["pmem"] == [{"file": str(pack), "discard_writes": True}]
        kernel, initrd = (config["payload"][key] for key in ("kernel", "initramfs"))
    assert Path(kernel).read_bytes()[:4] == b"\x7fELF"
    assert Path(initrd).is_file()


def test_the_upper_layer_is_named_first(layout: Path, tmp_path: Path) -> None:
    needs_kernel()
    done = invoke("run", layout, "--vmm", "firecracker", "--directory", tmp_path)
    assert done.exit_code == 0, done.stderr
    manifest = Manifest.load(tmp_path / "pack.img.json")
    device: dict[str, object] = {"kind": "path", "path": "/dev/vda"}
    plan, request = mount_request(manifest, device, hello("6.1.0"))
    assert plan.form == "overlay"
    assert "Linux 6.1.0 has no erofs-flattened" in plan.reason
    assert request.overlay is not None
    assert request.overlay.layers == tuple(layer.layer_id for layer in manifest.layers)
    assert request.overlay.scratch is None
    lowest = json.loads((layout / "blobs/sha256" / _config_digest(layout)).read_bytes())["rootfs"][
        "diff_ids"
    ][0]
    assert manifest.layers[-1].source_digest == lowest


def hello(kernel: str, *features: str) -> HelloReply:
    """What a guest with these features says."""
    return HelloReply(version=1, agent="1", kernel=kernel, features=features, limits={}, boot={})


def test_a_kernel_that_flattens_erofs_gets_one_mount(layout: Path, tmp_path: Path) -> None:
    needs_kernel()
    done = invoke("run", layout, "--vmm", "firecracker", "--directory", tmp_path, "--json")
    assert done.exit_code == 0, done.stderr
    assert "--image root" in json.loads(done.stdout)["mount"]
    manifest = Manifest.load(tmp_path / "pack.img.json")
    device: dict[str, object] = {"kind": "path", "path": "/dev/vda"}
    newer = hello("6.12.0", "erofs-flattened")
    plan, request = mount_request(manifest, device, newer)
    assert (plan.form, request.overlay) == ("merged", None)
    (spec,) = request.layers
    assert [(part.offset_bytes, part.size_bytes) for part in spec.ranges] == [
        (part.offset_bytes, part.size_bytes) for part in manifest.images[0].ranges
    ]
    _, request = mount_request(manifest, device, newer, scratch_bytes=8192)
    assert request.overlay is not None
    assert request.overlay.layers == ("root",)


def _config_digest(layout: Path) -> str:
    index = json.loads((layout / "index.json").read_bytes())
    blobs = layout / "blobs/sha256"
    manifest = json.loads((blobs / index["manifests"][0]["digest"][7:]).read_bytes())
    return str(manifest["config"]["digest"][7:])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--vmm", "firecracker"),
        ("--vmm", "firecracker", "--directory", "x", "--shell"),
        ("--vmm", "cloud-hypervisor", "--directory", "x", "--keep"),
        ("--vmm", "xen"),
        ("--memory", "1"),
    ],
)
def test_usage(layout: Path, arguments: tuple[str, ...]) -> None:
    assert invoke("run", layout, *arguments).exit_code == 2


def test_run_refuses_a_file_of_unknown_format(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nothing of the kind")
    done = invoke("run", tmp_path / "text", "--vmm", "firecracker", "--directory", tmp_path / "to")
    assert done.exit_code == 1
    assert done.stderr.startswith("guestctl: ")
    assert not (tmp_path / "to/pack.img").exists()


def test_no_kernel(layout: Path, tmp_path: Path) -> None:
    done = invoke("run", layout, "--kernel", tmp_path, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["code"] == "not_found"


def test_report_of_a_boot_image_lists_its_parts_by_size(tmp_path: Path) -> None:
    needs_kernel()
    output = tmp_path / "initrd"
    arguments = ("build", "--with", "erofs", "--compression", "none")
    done = invoke("initramfs", *arguments, "--output", output, "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["size_bytes"] == output.stat().st_size
    assert sum(report["parts"].values()) <= report["unpacked_bytes"]
    assert list(report["parts"].values()) == sorted(report["parts"].values(), reverse=True)
    assert output.read_bytes()[:6] == b"070701"
    assert "interpreter" in invoke("initramfs", *arguments, "--output", output).stdout


def test_features_are_chosen_by_name() -> None:
    assert invoke("initramfs", "build", "--with", "pmem,teleport").exit_code == 2
    listed = json.loads(invoke("initramfs", "features", "--json").stdout)
    assert {"pmem", "virtio-blk", "scsi", "verity", "erofs", "overlay", "console"} <= set(listed)
    assert "signatures" in listed


def test_files_and_a_manifest_go_into_the_boot_image(layout: Path, tmp_path: Path) -> None:
    needs_kernel()
    pack = tmp_path / "p.img"
    done = CliRunner().invoke(collect(), ["pack", "build", str(layout), str(pack)])
    assert done.exit_code == 0, done.stderr
    program = tmp_path / "a:b"
    program.write_bytes(b"#!/bin/sh\n")
    program.chmod(0o750)
    manifest, output = f"{pack}.json", tmp_path / "initrd"
    arguments = ("build", "--with", "erofs", "--compression", "none", "--manifest", manifest)
    added = ("--file", f"{program}:/usr/local/bin/tool", "--output", output)
    done = invoke("initramfs", *arguments, *added, "--json")
    assert done.exit_code == 0, done.stderr
    digest = hashlib.sha256(Path(manifest).read_bytes()).hexdigest()
    setting = f"guestagent.manifest=/etc/pack.json,DEVICE,sha256={digest}"
    assert json.loads(done.stdout)["setting"] == setting
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    wanted = ["etc/pack.json", "usr/local/bin/tool"]
    with output.open("rb") as file:
        command = ["cpio", "--extract", "--make-directories", "--quiet", *wanted]
        subprocess.run(command, stdin=file, cwd=unpacked, check=True)
    assert (unpacked / "etc/pack.json").read_bytes() == Path(manifest).read_bytes()
    tool = unpacked / "usr/local/bin/tool"
    assert (tool.read_bytes(), tool.stat().st_mode & 0o777) == (b"#!/bin/sh\n", 0o750)
    names = [layer.layer_id for layer in Manifest.load(manifest).layers]
    words = ["image", "merge", str(pack), "--id", "app", "--layers", ",".join(names)]
    assert CliRunner().invoke(collect(), words).exit_code == 0
    done = invoke("initramfs", *arguments, "--output", tmp_path / "other", "--image", "app")
    assert done.stdout.splitlines()[-1].endswith(",image=app")
    done = invoke("initramfs", *arguments, "--output", tmp_path / "none", "--image", "web")
    assert (done.exit_code, "its images: app" in done.stderr) == (1, True)
    assert not (tmp_path / "none").exists()
    assert "sha256-" not in invoke("initramfs", *arguments, "--output", output, "--json").stdout
    with Pack.open(pack, writable=True) as opened:
        opened.sign({"app": b"signature"})
    done = invoke("initramfs", *arguments, "--output", output, "--json")
    assert "sha256-" in done.stdout  # the feature signatures


@pytest.mark.parametrize(
    ("arguments", "status", "named"),
    [
        (("--file", "/etc/hostname"), 2, "'/etc/hostname'"),
        (("--file", "/etc/hostname:"), 1, "''"),
        (("--file", "/etc/hostname:a/../b"), 1, "'a/../b'"),
        (("--file", "/nowhere/file:a"), 1, "/nowhere/file"),
        (("--file", "/etc:a"), 1, "/etc"),
        (("--file", "/etc/hostname:init"), 1, "'init'"),
        (("--image", "app"), 2, "--manifest"),
        (("--manifest", "/nowhere/file"), 1, "/nowhere/file"),
        (("--manifest", "/etc/hostname"), 1, "/etc/hostname"),
    ],
)
def test_invalid_file_for_a_boot_image_is_refused(
    tmp_path: Path, arguments: tuple[str, ...], status: int, named: str
) -> None:
    needs_kernel()
    output = tmp_path / "initrd"
    done = invoke("initramfs", "build", "--with", "erofs", *arguments, "--output", output)
    assert (done.exit_code, named in done.stderr) == (status, True), done.output
    assert "Traceback" not in done.stderr
    assert not output.exists()


def test_steps_are_told_as_they_begin(layout: Path, tmp_path: Path) -> None:
    needs_kernel()
    words = ("run", layout, "--vmm", "firecracker", "--directory")
    done = invoke(*words, tmp_path / "a")
    steps = [f"building the layers of {layout}", "merging the layers", "building the boot image"]
    assert done.stderr.splitlines() == [f"guestctl: {step} ..." for step in steps]
    assert invoke(*words, tmp_path / "b", "--json").stderr == ""


def test_an_installation_keeps_its_cache_with_the_user(tmp_path: Path) -> None:
    """An installed wheel has no scripts/, and site-packages is no place to write to."""
    site, project = tmp_path / "site", Path(__file__).resolve().parents[2]
    site.mkdir()
    for package in ("vsock", "guestagent", "rootfs"):
        shutil.copytree(project / package, site / package)
    before = sorted(site.rglob("*"))
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(site)}
    program = "from guestagent.host.ctl import main; main()"
    (tmp_path / "cwd").mkdir()

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-B", "-c", program, "initramfs", "build", *words],
            env=environment,
            cwd=tmp_path / "cwd",
            capture_output=True,
            text=True,
            check=False,
        )

    done = run()
    assert done.returncode == 1
    assert "scripts/setup" not in done.stderr
    assert "--kernel" in done.stderr
    needs_kernel()
    kernel = max((CACHE_DIR / "kernel").glob("[!.]*"))
    done = run("--with", "erofs", "--kernel", str(kernel))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / ".cache/guestagent/initramfs") in done.stdout
    assert sorted(site.rglob("*")) == before
