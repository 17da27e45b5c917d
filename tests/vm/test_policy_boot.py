"""A policy in the boot image: in force from the start, in every agent, or the machine ends."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from guestagent.api import LayerSpec, VirtioBlkDevice
from guestagent.host.client import GuestAgent
from guestagent.policy.binding import KEY_PATH, POLICY_PATH
from guestagent.policy.document import canonical_policy
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import Machine
from vsock.deadline import Deadline
from vsock.errors import CallError

CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache"
VECTORS = Path(__file__).resolve().parents[1] / "vectors/policy"
RAW = (VECTORS / "web.json").read_bytes()
DIGEST = hashlib.sha256(RAW).hexdigest()
BOOT_SECONDS = 60.0
POWERED_OFF = "reboot: Power down"
SPEC = LayerSpec(layer_id="x", device=VirtioBlkDevice(serial="x"), filesystem="erofs")


@pytest.fixture(scope="module")
def signed(kernel: Kernel) -> Path:
    """A boot image with a policy, the key that must have signed it, and its signature."""
    files = (
        (POLICY_PATH.lstrip("/"), VECTORS / "web.json"),
        (f"{POLICY_PATH.lstrip('/')}.sig", VECTORS / "web.json.sig"),
        (KEY_PATH.lstrip("/"), VECTORS / "web.key"),
    )
    return build_initramfs(InitramfsSpec(kernel=kernel, files=files), cache_dir=CACHE_DIR).path


def test_policy_of_the_boot_image_is_in_force(
    start_machine: Callable[..., Machine], signed: Path
) -> None:
    setting = f"guestagent.policy={POLICY_PATH},sha256={DIGEST}"
    machine = start_machine(initrd=signed, memory_mib=256, cmdline=setting)
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
        reply = guest.policy_get()
        assert (reply.state, reply.name, reply.digest) == ("set", "web", DIGEST)
        assert reply.bound_by == ("image", "sha256", "signature")
        assert guest.status().policy_digest == DIGEST
        with pytest.raises(CallError) as caught:
            guest.layer_mount(SPEC)
        assert (caught.value.code, caught.value.object) == ("denied", "layers.verity")
        other = canonical_policy({**json.loads(RAW), "name": "other"})
        with pytest.raises(CallError) as caught:
            guest.policy_set(other)
        assert (caught.value.code, caught.value.object) == ("denied", "policy.set")
        assert guest.policy_set(RAW).already


@pytest.mark.parametrize(
    "cmdline",
    [
        "guestagent.policy=none",
        f"guestagent.policy={POLICY_PATH},sha256={'0' * 64}",
        f"guestagent.policy={POLICY_PATH},sha256={DIGEST} "
        f"guestagent.policy={POLICY_PATH},sha256={DIGEST}",
        "guestagent.policy=tsm",  # the machine is no TEE
    ],
    ids=["none", "another digest", "twice", "no report"],
)
def test_machine_ends_where_it_is_contradicted(
    start_machine: Callable[..., Machine], signed: Path, cmdline: str
) -> None:
    machine = start_machine(initrd=signed, memory_mib=256, cmdline=cmdline)
    with Deadline(BOOT_SECONDS) as deadline:
        machine.wait_console(POWERED_OFF, deadline)


def test_key_alone_waits_for_what_it_has_signed(
    start_machine: Callable[..., Machine], kernel: Kernel
) -> None:
    files = ((KEY_PATH.lstrip("/"), VECTORS / "web.key"),)
    image = build_initramfs(InitramfsSpec(kernel=kernel, files=files), cache_dir=CACHE_DIR)
    machine = start_machine(initrd=image.path, memory_mib=256)
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
        assert guest.policy_get().state == "required"
        for document, signature in ((RAW, None), (RAW, bytes(64))):
            with pytest.raises(CallError) as caught:
                guest.policy_set(document, signature=signature)
            assert (caught.value.code, caught.value.object) == ("denied", "signature")
        signature = (VECTORS / "web.json.sig").read_bytes()
        assert guest.policy_set(RAW, signature=signature).state == "set"
