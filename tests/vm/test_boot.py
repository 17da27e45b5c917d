"""The boot hook in a real machine: roots named on the kernel command line, and what ends a boot.

The roots hold BusyBox and a script as their init, which prints where it is.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from guestagent.api import LayerSpec
from guestagent.host.client import GuestAgent
from guestagent.storage.verity import VerityTerms
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.image.images import build_image
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from rootfs.pack.manifest import layer_spec
from rootfs.pack.pack import Pack, manifest_path_of
from rootfs.verity.formatter import format_image
from vsock.deadline import Deadline

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
BUSYBOX = Path("/bin/busybox")
FEATURES = ("pmem", "verity", "erofs", "overlay", "vsock")
POWERED_OFF = "reboot: Power down"

#: Prints what is so; with the argument ``wait`` it stays, else it ends the machine.
INIT = """\
#!/bin/busybox sh
/bin/busybox mkdir -p /run/x
echo "I AM $$ OF $(/bin/busybox cat /who) WITH [$*]"
echo "ROOT $(/bin/busybox awk '$2 == "/"' /proc/mounts)"
echo "PYTHON $(/bin/busybox ps | /bin/busybox grep -c '[p]ython3')"
echo "BELOW $(/bin/busybox ls / | /bin/busybox tr '\\n' ' ')"
if echo x > /written; then echo WRITABLE; else echo READ-ONLY; fi
case "$*" in *wait*) while :; do /bin/busybox sleep 1; done;; esac
/bin/busybox poweroff -f
"""


class Roots:
    """A pack of ``base``, ``top`` and ``bare`` (a root without an init), and what names them."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "pack.img"
        with Pack.create(self.image) as pack:
            for position, (layer_id, tree) in enumerate(_trees(directory).items()):
                image = directory / f"{layer_id}.erofs"
                built = build_image(tree, image)
                parameters = None
                if layer_id != "plain":
                    formatted = format_image(
                        image, terms=VerityTerms(salt=built.verity_salt), uuid=built.verity_uuid
                    )
                    parameters = formatted.parameters
                pack.add(image, layer_id, verity=parameters, position=position)
            self.layers = {layer.layer_id: layer for layer in pack.layers}
        self.manifest = manifest_path_of(self.image)

    def spec(self, layer_id: str) -> LayerSpec:
        wire = layer_spec(self.layers[layer_id], {"kind": "pmem", "number": 0})
        return LayerSpec.from_wire(wire)

    def setting(self, layer_id: str, *, root: str | None = None, device: str = "pmem:0") -> str:
        layer = self.layers[layer_id]
        if root is None:
            root = layer.verity.root_digest.hex() if layer.verity else "none"
        area = f"offset={layer.offset_bytes},size={layer.size_bytes}"
        return f"guestagent.layer={device},id={layer_id},{area},root={root}"


def _trees(directory: Path) -> dict[str, Path]:
    """Make the trees, topmost first: an overlay of top and base has what only top says."""
    trees = {name: directory / name for name in ("top", "base", "bare", "linked", "plain")}
    for name in ("base", "plain", "linked"):
        for part in ("proc", "sys", "dev", "run", "sbin", "bin"):
            (trees[name] / part).mkdir(parents=True)
        shutil.copy(BUSYBOX, trees[name] / "bin/busybox")
        (trees[name] / "sbin/init").write_text(INIT)
        (trees[name] / "sbin/init").chmod(0o755)
        (trees[name] / "sbin/no-program").write_text("text")
    (trees["bare"] / "proc").mkdir(parents=True)
    (trees["linked"] / "run").rmdir()
    (trees["linked"] / "run").symlink_to("/elsewhere")
    for name, tree in trees.items():
        tree.mkdir(exist_ok=True)
        (tree / "who").write_text(name)
    return trees


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Roots:
    return Roots(tmp_path_factory.mktemp("roots"))


@pytest.fixture(scope="module")
def initrd(kernel: Kernel, roots: Roots) -> Path:
    """The boot image, with the manifest of the pack in it."""
    files = (("etc/pack.json", roots.manifest),)
    spec = InitramfsSpec(kernel=kernel, features=FEATURES, files=files)
    return build_initramfs(spec, cache_dir=CACHE_DIR).path


class Boots:
    def __init__(self, kernel: Kernel, initrd: Path, roots: Roots) -> None:
        self._kernel, self._initrd, self._roots = kernel, initrd, roots

    @contextmanager
    def machine(self, *settings: str) -> Iterator[Machine]:
        spec = MachineSpec(
            kernel=self._kernel.image,
            initrd=self._initrd,
            memory_mib=384,
            pmem=(PmemSpec(path=self._roots.image),),
            cmdline=" ".join(settings),
        )
        with Machine(spec, cache_dir=CACHE_DIR) as machine:
            yield machine

    def to_the_end(self, *settings: str) -> str:
        """Boot until the machine ends in order; return what was on the console."""
        with self.machine(*settings) as machine, closing(Deadline(90)) as deadline:
            assert machine.wait(deadline) == 0
            console = machine.console.read()
        assert "Kernel panic" not in console
        assert "Traceback" not in console
        return console


@pytest.fixture(scope="module")
def boots(kernel: Kernel, initrd: Path, roots: Roots) -> Boots:
    return Boots(kernel, initrd, roots)


def line(console: str, word: str) -> str:
    """Return the rest of the line of the init's that begins with ``word``."""
    lines = [text for text in console.splitlines() if text.startswith(word + " ")]
    assert lines, f"no line {word!r} on the console:\n{console}"
    return lines[0][len(word) + 1 :]


def test_one_layer_is_the_root_and_the_agent_ends(boots: Boots, roots: Roots) -> None:
    console = boots.to_the_end(roots.setting("base"), "single")
    assert line(console, "I AM") == "1 OF base WITH [single]"
    assert line(console, "ROOT").startswith("/dev/dm-1 / erofs ro,nosuid,nodev")
    assert line(console, "PYTHON") == "0"
    assert line(console, "BELOW") == "bin dev proc run sbin sys who "
    assert "READ-ONLY" in console


def test_an_overlay_from_a_manifest_that_is_measured(boots: Boots, roots: Roots) -> None:
    """All layers of the manifest are mounted; the overlay is of those that it names."""
    digest = hashlib.sha256(roots.manifest.read_bytes()).hexdigest()
    console = boots.to_the_end(
        f"guestagent.manifest=/etc/pack.json,pmem:0,sha256={digest}",
        "guestagent.overlay=sys,layers=top+base",
    )
    # the layer without a hash tree in the same manifest is mounted, as nothing forbids it
    assert line(console, "I AM") == "1 OF top WITH []"
    assert line(console, "ROOT").startswith("overlay / overlay ro,")
    assert re.search(
        r"lowerdir=/run/layers/top:/run/layers/base"  # mount(2)
        r"|lowerdir\+=/run/layers/top,lowerdir\+=/run/layers/base",  # fsconfig
        console,
    )
    assert "READ-ONLY" in console


def test_the_agent_stays_beside_the_new_init(boots: Boots, roots: Roots) -> None:
    settings = (
        roots.setting("top"),
        roots.setting("base"),
        "guestagent.overlay=sys,scratch=tmpfs:1048576",
        "guestagent.agent=stay",
        "wait",
    )
    with boots.machine(*settings) as machine:
        with GuestAgent(machine.agent_address(), connect_seconds=60) as guest:
            status = guest.status()
            assert (status.state, status.problems) == ("ready", ())
            assert (status.layers, status.overlays) == (2, 1)
            assert guest.hello.boot["pid1"] is False
            assert guest.hello.boot["adopted_layers"] == 2
            layers = {layer.layer_id: layer for layer in guest.layer_list()}
            assert [layer.state for layer in layers.values()] == ["mounted", "mounted"]
            assert layers["base"].target == "/run/layers/base"
            (overlay,) = guest.overlay_list()
            assert (overlay.overlay_id, overlay.target) == ("sys", "/")
            # what is imported late comes from memory that was measured, not from this root
            assert guest.layer_verify("base").corrupt_blocks == ()
            plain = guest.layer_mount(roots.spec("plain"))
            assert plain.state == "mounted"
            guest.layer_unmount("plain")
        with closing(Deadline(30)) as deadline:
            machine.wait_console("WRITABLE", deadline)
        console = machine.console.read()
        assert line(console, "I AM") == "1 OF top WITH [wait]"
        assert line(console, "PYTHON") == "1"


def test_init_slash_serves_from_the_boot_image(boots: Boots, roots: Roots) -> None:
    settings = (roots.setting("base"), "guestagent.init=/")
    with boots.machine(*settings) as machine:
        with GuestAgent(machine.agent_address(), connect_seconds=60) as guest:
            (layer,) = guest.layer_list()
            assert (layer.layer_id, layer.target) == ("base", "/run/layers/base")
            assert guest.hello.boot["pid1"] is True
            assert guest.status().state == "ready"
            guest.shutdown("poweroff")
        with closing(Deadline(30)) as deadline:
            assert machine.wait(deadline) == 0


def test_on_failure_serve_lets_a_person_look(boots: Boots, roots: Roots) -> None:
    settings = (roots.setting("base", root="00" * 32), "guestagent.on_failure=serve")
    with boots.machine(*settings) as machine:
        with GuestAgent(machine.agent_address(), connect_seconds=60) as guest:
            status = guest.status()
            assert status.state == "degraded"
            assert "root cannot be mounted" in status.problems[0]
            assert guest.layer_list() == ()
            assert guest.dm_list().devices == ()
            guest.shutdown("poweroff")
        with closing(Deadline(30)) as deadline:
            assert machine.wait(deadline) == 0
        assert "I AM" not in machine.console.read()


#: The rows of the truth table that a kernel or a whole boot is needed for (see also the tests of
#: the plan and of mounting): which layer with which digest, other settings, what the console says.
FAILURES = {
    "wrong digest": ("base", "00" * 32, (), "integrity"),
    "root=none with a hash area": ("base", "none", (), "has root=none, but a hash area"),
    "missing device": ("base", None, ("guestagent.deadline=2",), "timeout"),
    "no program": ("base", None, ("guestagent.init=/sbin/no-program",), "is no program"),
    "no directory for /sys": ("bare", None, (), "'/sys'"),
    "a link for /run": ("linked", None, (), "'/run'"),
    "a fault": ("base", None, ("guestagent.fault=mount:EIO",), "not made for tests"),
    "malformed": ("base", "xyz", (), "root is not hexadecimal"),
    "contradictory": ("base", None, ("guestagent.init=/", "guestagent.init=/a"), "given twice"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_boot_with_a_bad_root_powers_off_and_says_why(
    boots: Boots, roots: Roots, case: str
) -> None:
    """Whatever is missing, unverified or contradictory, the machine is off and has said why."""
    layer_id, root, settings, reason = FAILURES[case]
    device = "pmem:7" if case == "missing device" else "pmem:0"
    console = boots.to_the_end(roots.setting(layer_id, root=root, device=device), *settings)
    assert POWERED_OFF in console
    assert "I AM" not in console
    assert reason in console


def test_on_failure_reboot(boots: Boots, roots: Roots) -> None:
    console = boots.to_the_end(
        roots.setting("base", root="00" * 32), "guestagent.on_failure=reboot"
    )
    assert "ending mode=reboot" in console
    assert POWERED_OFF not in console
