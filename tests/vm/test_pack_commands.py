"""The host's commands, one after the other, from sources to verified mounts in a real machine.

Every step is a process of its own, as a person would run it; the guest is asked by the client.
"""

import contextlib
import io
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import cached_kernel
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from scripts.uml_bed.kernels import kernel_cache
from tests.beds.ctlbed import GUESTCTL, Run, runner_in
from tests.beds.imagebed import Layout, Member, directory
from vsock.deadline import Deadline

CACHE = Path(__file__).resolve().parents[2] / ".cache"
FEATURES = ("pmem", "verity", "erofs", "squashfs", "overlay", "vsock")
OVERLAY = "/run/overlays/app"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source of each kind."""
    top = tmp_path_factory.mktemp("pack-commands")
    (top / "base/etc").mkdir(parents=True)
    (top / "base/etc/who").write_text("the directory\n")
    (top / "base/etc/removed").write_text("hidden by the container image\n")
    (top / "base/large").write_bytes(os.urandom(3 << 20))
    with tarfile.open(top / "middle.tar.gz", "w:gz") as tar:
        content = b"the tar\n"
        member = tarfile.TarInfo("etc/who")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    layout = Layout(top / "layout")
    layout.layer([directory("etc"), Member("etc/who", b"the lower layer of the image\n")])
    layout.layer([Member("etc/who", b"the image\n"), Member("etc/.wh.removed")], "+gzip")
    layout.finish()
    return top


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    """Run guestctl with --json in that directory; return what it prints."""
    return runner_in(place)


@pytest.fixture(scope="module")
def layers(place: Path, run: Run) -> dict[str, str]:
    """Build, format and pack the layers, sign the manifest; return root digests, topmost first."""
    run("layer", "build", "base", "base.erofs")
    base = run("layer", "format", "base.erofs", "--reproducible")
    tar = "middle.tar.gz"
    middle = run("layer", "build", tar, "middle.squashfs", "--filesystem", "squashfs", "--verity")
    (place / "out").mkdir()
    images = run("layer", "build", "layout", "out", "--layers", "--verity")
    run("pack", "create", "app.img")
    digests = {}
    steps = [("base", "base.erofs", base), ("middle", "middle.squashfs", middle)]
    steps += [(f"image{n}", each["path"], each) for n, each in enumerate(images)]
    for layer_id, path, facts in steps:
        given = ("--id", layer_id, "--root-digest", facts["root_digest"])
        run("pack", "add", "app.img", path, *given)
        digests[layer_id] = facts["root_digest"]
    run("pack", "check", "app.img")
    return dict(reversed(digests.items()))


@pytest.fixture(scope="module")
def machine(place: Path, layers: dict[str, str]) -> Iterator[Machine]:
    kernel = cached_kernel(kernel_cache())
    initramfs = build_initramfs(InitramfsSpec(kernel=kernel, features=FEATURES), cache_dir=CACHE)
    spec = MachineSpec(
        kernel=kernel.image,
        initrd=initramfs.path,
        pmem=(PmemSpec(path=place / "app.img"),),
    )
    with Machine(spec, cache_dir=CACHE) as machine:
        yield machine
        with GuestAgent(machine.agent_address(), connect_seconds=120) as guest:
            guest.shutdown("poweroff")
        with contextlib.closing(Deadline(60)) as deadline:
            assert machine.wait(deadline) == 0
        assert "Kernel panic" not in machine.console.read()


def test_the_manifest_can_be_signed_and_checked(
    place: Path, run: Run, layers: dict[str, str]
) -> None:
    for words in (("genpkey", "-algorithm", "ed25519", "-out", "key"),
                  ("pkey", "-in", "key", "-pubout", "-out", "key.pub")):  # fmt: skip
        subprocess.run(["openssl", *words], cwd=place, check=True, capture_output=True)
    run("sign", "--key", "key", "app.img.json")
    assert run("sign", "--verify", "--key", "key.pub", "app.img.json")["verified"] is True
    listed = run("pack", "list", "app.img.json")
    assert {each["id"]: each["verity"]["root_digest"] for each in listed["layers"]} == layers
    changed = place / "changed.json"
    text = (place / "app.img.json").read_text()
    changed.write_text(text.replace(layers["base"], "00" * 32))
    (place / "changed.json.sig").write_bytes((place / "app.img.json.sig").read_bytes())
    error = run("sign", "--verify", "--key", "key.pub", "changed.json", status=1)["error"]
    assert error["code"] == "integrity"


def test_a_pack_is_mounted_verified_and_overlaid(
    place: Path, run: Run, layers: dict[str, str], machine: Machine
) -> None:
    address = machine.agent_address()
    words = ("pack", "mount", "app.img.json", "--connect", address, "--overlay", "app")
    reply = run("--wait", "120", *words)
    assert [each["layer_id"] for each in reply["layers"]] == list(layers)
    for each in reply["layers"]:
        assert each["verity"]["root_digest"] == layers[each["layer_id"]]
        assert each["verity"]["status"] == "V"
    assert reply["overlay"]["target"] == OVERLAY
    with GuestAgent(address) as guest:
        for layer_id in layers:
            verified = guest.layer_verify(layer_id)
            assert (verified.status, verified.corrupt_blocks) == ("V", ())
    at = ("--connect", address)
    names = run(*at, "fs", "ls", "overlay:app", "/etc")
    assert names == ["who"]
    assert _content(at, "overlay:app", "/etc/who") == b"the image\n"
    assert _content(at, "layer:middle", "/etc/who") == b"the tar\n"
    assert _content(at, "overlay:app", "/large") == (place / "base/large").read_bytes()
    again = run("pack", "mount", "app.img", *at, "--overlay", "app")
    assert all(each["already"] for each in again["layers"])


def _content(at: tuple[str, ...], where: str, path: str) -> bytes:
    command = [*GUESTCTL, *at, "fs", "cat", where, path]
    return subprocess.run(command, capture_output=True, check=True).stdout


def test_a_pack_that_is_not_what_its_manifest_says_is_refused_whole(
    place: Path, run: Run, layers: dict[str, str], machine: Machine
) -> None:
    text = (place / "app.img.json").read_text()
    changed = text.replace(layers["base"], "00" * 32)
    for layer_id in layers:
        changed = changed.replace(f'"{layer_id}"', f'"other-{layer_id}"')
    (place / "wrong.json").write_text(changed)
    address = machine.agent_address()
    with GuestAgent(address, connect_seconds=120) as guest:
        before = (guest.layer_list(), guest.dm_list())
        error = run("pack", "mount", "wrong.json", "--connect", address, status=1)["error"]
        assert error["code"] == "integrity"
        assert layers["base"] in error["message"]
        assert (guest.layer_list(), guest.dm_list()) == before
