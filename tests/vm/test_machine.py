"""The machines themselves: that they boot, have what was asked for, and leave nothing behind."""

import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from guestagent.api import LabelDevice, LayerSpec, ScsiDevice, VirtioBlkDevice
from guestagent.api.agent import AGENT_PORT
from guestagent.api.devices import Device
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.accelerator import choose_accelerator
from rootfs.machine.qemu import DiskSpec, Machine, MachineError, MachineSpec, PmemSpec
from rootfs.machine.qmp import QmpError
from tests.beds.calls import call_error
from tests.vm.conftest import BOOT_SECONDS, CACHE_DIR, TEST_SECONDS
from vsock.deadline import Deadline
from vsock.errors import CallError


def test_the_agent_answers(machine: Machine, agent: GuestAgent, kernel: Kernel) -> None:
    assert machine.accel in ("kvm", "tcg")
    assert machine.accel_reason
    assert kernel.version in str(agent.hello.kernel)
    assert machine.poll() is None


def test_the_agent_has_no_complaint(agent: GuestAgent) -> None:
    """Every module of the boot image could be loaded, in the order listed."""
    assert agent.status().problems == ()


def test_qmp_answers_and_refuses(machine: Machine, deadline: Deadline) -> None:
    assert machine.qmp.execute("query-status", deadline=deadline) == {
        "status": "running",
        "singlestep": False,
        "running": True,
    }
    with pytest.raises(QmpError, match="no-such-command"):
        machine.qmp.execute("no-such-command", deadline=deadline)


@pytest.mark.parametrize(
    "device",
    [
        VirtioBlkDevice(serial="plain"),
        ScsiDevice(controller=0, lun=1),
        LabelDevice(label="plain"),
        LabelDevice(label="plain-scsi"),
    ],
    ids=["virtio-blk", "scsi", "label-of-virtio-blk", "label-of-scsi"],
)
def test_disks_are_there_from_the_start(agent: GuestAgent, device: Device) -> None:
    spec = LayerSpec(layer_id=f"disk-{device.kind}", device=device, filesystem="erofs")
    assert agent.layer_mount(spec).filesystem == "erofs"
    agent.layer_unmount(spec.layer_id)


def test_disks_are_listed_as_they_were_attached(agent: GuestAgent) -> None:
    """A DIMM has a number that the monitor made of its slot."""
    disks = {info.node: info for info in agent.fs_list_devices() if info.kind != "loop"}
    assert list(disks) == ["/dev/pmem0", "/dev/vda", "/dev/sda"]
    assert disks["/dev/vda"].labels == ("plain",)
    assert disks["/dev/sda"].labels == ("plain-scsi",)
    (dimm,) = disks["/dev/pmem0"].labels
    assert dimm == "8680-56341200"  # of Intel, the first slot: QEMU counts from 0x123456


def test_a_disk_comes_and_goes_while_it_runs(
    machine: Machine, agent: GuestAgent, layer_images: dict[str, Path], deadline: Deadline
) -> None:
    disk = DiskSpec(path=layer_images["top"], serial="plugged")
    spec = LayerSpec(layer_id="plugged", device=LabelDevice(label="plugged"), filesystem="erofs")
    node = machine.plug_disk(disk, deadline, root_port=1)
    report = agent.layer_mount(spec)
    assert report.device_node.startswith("/dev/vd")
    agent.layer_unmount("plugged")
    machine.unplug(node, deadline)
    # the port and the names are free again
    node = machine.plug_disk(disk, deadline, root_port=1)
    machine.unplug(node, deadline)


@pytest.mark.parametrize("panic", ["-1", "0"], ids=["ends", "hangs"])
def test_nothing_waits_for_a_guest_whose_kernel_panicked(
    kernel: Kernel, initramfs: Path, panic: str
) -> None:
    spec = MachineSpec(
        kernel=kernel.image, initrd=initramfs, cmdline=f"rdinit=/none root=none panic={panic}"
    )
    with (
        Machine(spec) as machine,
        pytest.raises(MachineError, match=r"kernel panicked\n(.*\n)*.*Kernel panic"),
        machine.while_up() as up,
    ):
        GuestAgent(machine.agent_address(), connect_seconds=TEST_SECONDS, until=up)


def test_an_error_of_a_guest_that_is_up_is_told_as_it_is(
    machine: Machine, agent: GuestAgent
) -> None:
    with pytest.raises(CallError, match="nothing"), machine.while_up():
        agent.layer_get("nothing")


def test_requests_go_over_a_serial_port_that_the_guest_finds_by_name(
    start_machine: Callable[..., Machine],
) -> None:
    ports = "serial:///dev/virtio-ports/rpc,serial:///dev/virtio-ports/none"
    machine = start_machine(
        serial_ports=("other", "rpc"), cmdline=f"guestagent.listen=vsock://any:{AGENT_PORT},{ports}"
    )
    address = f"unix://{machine.port_path('rpc')}"
    for _ in range(6):  # a port is used by one peer after the other, at once
        with (
            machine.while_up() as up,
            GuestAgent(address, connect_seconds=BOOT_SECONDS, until=up) as guest,
        ):
            status = guest.status()
            assert status.restarts == 0
            (problem,) = status.problems
            assert "virtio-ports/none: No such file" in problem
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
        assert guest.status().restarts == 0
    with pytest.raises(MachineError, match="no serial port 'third'"):
        machine.port_path("third")


@pytest.mark.parametrize(
    ("feature", "ordered"),
    [
        ("hyper-v", ("hv_vmbus", "hv_storvsc")),
        ("hyper-v", ("vsock", "hv_sock")),
        ("vmware", ("vmw_vmci", "vmw_vsock_vmci_transport")),
    ],
)
def test_an_image_has_the_drivers_of_another_monitor(
    kernel: Kernel, feature: str, ordered: tuple[str, str]
) -> None:
    """Only the files and their order: the monitors are not here."""
    spec = InitramfsSpec(kernel=kernel, features=(feature, "verity", "erofs"), compression="none")
    modules = build_initramfs(spec, cache_dir=CACHE_DIR).kernel_modules
    names = [name.replace("-", "_") for name in modules]
    there = [name for name in ordered if name in names]
    assert all(kernel.modules.has(name) for name in ordered)  # or built in
    assert there == sorted(there, key=names.index)
    assert "sd_mod" in names


def test_no_process_of_the_guest_is_a_peer_by_vsock(initramfs: Path, kernel: Kernel) -> None:
    """The loopback transport is in no default image: its peers would need no host."""
    report = build_initramfs(InitramfsSpec(kernel=kernel), cache_dir=CACHE_DIR)
    assert report.path == initramfs
    assert "vmw_vsock_virtio_transport" in report.kernel_modules
    assert "vsock_loopback" not in report.kernel_modules


def test_the_end_leaves_nothing_behind(kernel: Kernel, initramfs: Path) -> None:
    with Machine(MachineSpec(kernel=kernel.image, initrd=initramfs)) as machine:
        pid, run_dir = machine.pid, machine.run_dir
        assert run_dir.is_dir()
    assert not run_dir.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_power_off_by_the_agent_ends_it(kernel: Kernel, initramfs: Path) -> None:
    with (
        closing(Deadline(60)) as deadline,
        Machine(MachineSpec(kernel=kernel.image, initrd=initramfs)) as machine,
    ):
        with GuestAgent(machine.agent_address(), connect_seconds=60) as agent:
            agent.shutdown()
        assert machine.wait(deadline) == 0


def test_a_machine_that_is_killed_says_so(kernel: Kernel, initramfs: Path) -> None:
    with (
        closing(Deadline(30)) as deadline,
        Machine(MachineSpec(kernel=kernel.image, initrd=initramfs)) as machine,
    ):
        os.kill(machine.pid, 9)
        with pytest.raises(MachineError, match="ended before it printed 'never'"):
            machine.wait_console("never", deadline)
        assert machine.poll() == -9


def test_waiting_ends_at_the_deadline(machine: Machine) -> None:
    with closing(Deadline(0.05)) as deadline, call_error("timeout"):
        machine.wait(deadline)


def test_a_guest_that_ignores_the_power_button_is_told_as_such(machine: Machine) -> None:
    """The agent listens to no button: it is ended by its own shutdown call."""
    with closing(Deadline(1.0)) as deadline, call_error("timeout"):
        machine.powerdown(deadline)
    assert machine.poll() is None


def test_a_machine_that_cannot_start_says_why(
    kernel: Kernel, tmp_path: Path, initramfs: Path
) -> None:
    spec = MachineSpec(
        kernel=kernel.image,
        initrd=initramfs,
        disks=(DiskSpec(path=tmp_path / "missing", serial="x"),),
    )
    with pytest.raises(MachineError, match=r"status 1\n.*No such file") as caught, Machine(spec):
        pass
    assert "missing" in str(caught.value)


def test_a_failure_carries_the_console(kernel: Kernel, tmp_path: Path) -> None:
    """A kernel with nothing to start panics; who waits for something is shown that."""
    (tmp_path / "empty").write_bytes(b"")
    spec = MachineSpec(kernel=kernel.image, initrd=tmp_path / "empty", vsock_cid=None)
    with (
        closing(Deadline(60)) as deadline,
        pytest.raises(MachineError, match="Unable to mount root fs"),
        Machine(spec) as machine,
    ):
        machine.wait_console("agent", deadline)


def test_pmem_that_may_be_written_reaches_the_file(
    start_machine: Callable[..., Machine], tmp_path: Path, deadline: Deadline
) -> None:
    image = tmp_path / "pmem"
    with open(image, "wb") as file:
        file.truncate(4 << 20)
    machine = start_machine(pmem=(PmemSpec(path=image, readonly=False),))
    devices = machine.qmp.execute("query-memory-devices", deadline=deadline)
    assert isinstance(devices, list)
    assert [device["type"] for device in devices] == ["nvdimm"]


def test_the_choice_of_the_accelerator_is_kept(
    machine: Machine, kernel: Kernel, tmp_path: Path
) -> None:
    choice, known = (machine.accel, machine.accel_reason), tmp_path / "accelerator.json"
    kept = CACHE_DIR / "accelerator.json"
    if kept.exists():  # only where there is a KVM to try, which takes 20 s
        state = json.loads(kept.read_text())
        assert (state["accel"], state["reason"]) == choice
        known.write_text(json.dumps(state | {"accel": "kvm", "reason": "from the file"}))
        assert choose_accelerator("auto", kernel.image, tmp_path) == ("kvm", "from the file")
        known.write_text(json.dumps(state | {"key": "another boot"}))
        assert choose_accelerator("auto", kernel.image, tmp_path) == choice
        assert json.loads(known.read_text()) == state
    assert choose_accelerator("tcg", kernel.image, tmp_path)[0] == "tcg"
