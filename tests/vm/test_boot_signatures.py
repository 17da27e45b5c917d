"""Signed root digests: what the kernel says to them, with and without the key among its trusted."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from guestagent.api import LayerSpec, LayersUnmount, PmemDevice, Verity
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.image.images import ImageResult, build_image
from rootfs.machine.qemu import Machine, MachineSpec, PmemSpec
from rootfs.pack.pack import Pack, manifest_path_of
from rootfs.pack.pkcs7 import sign_root_digest, verify_root_digest
from tests.beds.calls import call_error
from tests.beds.trustbed import Signer, kernel_trusting
from vsock.deadline import Deadline
from vsock.errors import errno_name

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
FEATURES = ("pmem", "verity", "erofs", "vsock", "signatures")
DEVICE_BYTES = 2 << 20


class Bed:
    """A layer on /dev/pmem0, whose digest is signed, and a machine with some kernel."""

    def __init__(self, directory: Path, kernel: Kernel) -> None:
        tree = directory / "tree"
        tree.mkdir()
        (tree / "who").write_text("signed")
        self._kernel = kernel
        self.built: ImageResult = build_image(tree, directory / "layer.erofs", verity=True)
        with open(self.built.path, "r+b") as file:
            file.truncate(DEVICE_BYTES)
        self.signer, self.stranger = Signer("layers"), Signer("a stranger")
        self.root_digest = self._verity().root_digest
        initramfs = InitramfsSpec(kernel=kernel, features=FEATURES)
        self._initrd = build_initramfs(initramfs, cache_dir=CACHE_DIR).path
        self.console: Callable[[], str] = str  #: of the last machine

    def _verity(self) -> Verity:
        assert self.built.verity is not None
        return Verity(root_digest=self.built.verity.root_digest)

    def signature(self, signer: Signer, root_digest: bytes | None = None) -> bytes:
        digest = root_digest or self.root_digest
        signature = sign_root_digest(digest, signer.certificate, signer.key)
        verify_root_digest(digest, signature, signer.certificate)
        return signature

    def spec(self, signature: bytes | None) -> LayerSpec:
        return LayerSpec(
            layer_id="signed",
            device=PmemDevice(number=0),
            filesystem="erofs",
            verity=self._verity().replace(signature=signature),
        )

    def pack(self, path: Path) -> Pack:
        """Make a pack of two layers and an image of both."""
        made = Pack.create(path)
        for name in ("lower", "upper"):
            (path.parent / name).mkdir()
            (path.parent / name / name).write_text(name)
            built = build_image(path.parent / name, path.parent / f"{name}.erofs", verity=True)
            made.add(built.path, name, verity=built.verity)
        made.merge("app", ["upper", "lower"])
        return made

    def boot_image(self, *files: tuple[str, Path]) -> Path:
        """Return a boot image with files in it."""
        features = (*FEATURES, "overlay")
        spec = InitramfsSpec(kernel=self._kernel, features=features, files=files)
        return build_initramfs(spec, cache_dir=CACHE_DIR).path

    @contextmanager
    def guest(
        self,
        kernel_image: Path,
        *settings: str,
        initrd: Path | None = None,
        second: Path | None = None,
    ) -> Iterator[GuestAgent]:
        paths = (self.built.path, *(() if second is None else (second,)))
        spec = MachineSpec(
            kernel=kernel_image,
            initrd=initrd or self._initrd,
            memory_mib=512,
            pmem=tuple(PmemSpec(path=path) for path in paths),
            cmdline=" ".join(settings),
            accel="tcg",
        )
        with Machine(spec, cache_dir=CACHE_DIR) as machine:
            self.console = machine.console.read
            with GuestAgent(machine.agent_address(), connect_seconds=90) as guest:
                yield guest
                assert guest.dm_list().devices == ()
                guest.shutdown("poweroff")
            with closing(Deadline(30)) as deadline:
                assert machine.wait(deadline) == 0

    def refused(self, guest: GuestAgent, signature: bytes | None) -> str | None:
        """Return the errno with which the layer is denied."""
        with call_error("denied", step="verity") as caught:
            guest.layer_mount(self.spec(signature))
        assert guest.layer_list() == ()
        return errno_name(caught.value.errno)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory, kernel: Kernel) -> Bed:
    return Bed(tmp_path_factory.mktemp("signatures"), kernel)


def test_a_kernel_that_has_not_the_key_denies(bed: Bed, kernel: Kernel) -> None:
    with bed.guest(kernel.image) as guest:
        assert bed.refused(guest, bed.signature(bed.signer)) == "ENOKEY"
        report = guest.layer_mount(bed.spec(None))  # without a signature nothing is asked
        assert report.verity is not None
        assert not report.verity.signed
        guest.layer_unmount("signed")


def test_a_kernel_that_has_the_key_decides(bed: Bed, kernel: Kernel, tmp_path: Path) -> None:
    image = kernel_trusting(kernel.image, bed.signer, tmp_path / "vmlinux")
    with bed.guest(image, "dm_verity.require_signatures=1") as guest:
        report = guest.layer_mount(bed.spec(bed.signature(bed.signer)))
        assert report.verity is not None
        assert (report.verity.signed, report.verity.status) == (True, "V")
        assert "root_hash_sig_key_desc guestagent-signature-signed" in report.dm[0].table
        assert guest.fs_checksums(layer_id="signed")
        guest.layer_unmount("signed")
        assert bed.refused(guest, bed.signature(bed.stranger)) == "ENOKEY"
        assert bed.refused(guest, bed.signature(bed.signer, bytes(32))) == "EKEYREJECTED"
        # the rule of the kernel, which its command line set for a module that init loads
        assert bed.refused(guest, None) == "ENOKEY"
        assert bed.refused(guest, b"no PKCS#7 at all") == "EBADMSG"


def test_the_boot_hook_hands_signatures_to_the_kernel(
    bed: Bed, kernel: Kernel, tmp_path: Path
) -> None:
    image = kernel_trusting(kernel.image, bed.signer, tmp_path / "vmlinux")
    pack, signature = tmp_path / "pack.img", tmp_path / "layer.p7s"
    signature.write_bytes(bed.signature(bed.signer))
    files = [("etc/layer.p7s", signature)]
    with bed.pack(pack) as opened:
        digests = opened.manifest.root_digests
        for name, signer in (("good", bed.signer), ("wrong", bed.stranger)):
            opened.sign({each: bed.signature(signer, root) for each, root in digests.items()})
            files.append((f"etc/{name}.json", tmp_path / f"{name}.json"))
            files[-1][1].write_bytes(manifest_path_of(pack).read_bytes())
    initrd = bed.boot_image(*files)
    layer = f"guestagent.layer=pmem:0,root={bed.root_digest.hex()}"
    settings = ("guestagent.init=/", "dm_verity.require_signatures=1")
    said = (
        *settings,
        f"{layer},signature=/etc/layer.p7s",
        "guestagent.manifest=/etc/good.json,pmem:1,image=app",
    )
    with bed.guest(image, *said, initrd=initrd, second=pack) as guest:
        reports = [guest.layer_get(name) for name in ("layer0", "upper", "lower")]
        assert [report.verity and report.verity.signed for report in reports] == [True] * 3
        assert guest.overlay_list()[0].layers == ("layer0", "upper", "lower")
        names = tuple(report.layer_id for report in reports)
        guest.layers_unmount(LayersUnmount(layers=names, overlay="root"))

    said = (
        *settings,
        "guestagent.on_failure=serve",
        "guestagent.manifest=/etc/wrong.json,pmem:1,image=app",
    )
    with bed.guest(image, *said, initrd=initrd, second=pack) as guest:
        assert "root cannot be mounted" in guest.status().problems[0]
        assert guest.layer_list() == ()
        assert "ENOKEY" in bed.console()
