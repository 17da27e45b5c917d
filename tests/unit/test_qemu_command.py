import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from rootfs.machine.accelerator import has_steady_tsc
from rootfs.machine.qemu_command import (
    DiskSpec,
    MachineSpec,
    NetworkSpec,
    PmemSpec,
    Runtime,
    ShareSpec,
    disk_device,
    qemu_command,
    tty_path,
)


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return Runtime(
        program="qemu", accel="tcg", run_dir=tmp_path / "run", console_path=tmp_path / "console"
    )


@pytest.fixture
def pmem(tmp_path: Path) -> Path:
    path = tmp_path / "pmem, with comma"
    with open(path, "wb") as file:
        file.truncate(6 << 20)
    return path


def spec(**changes: Any) -> MachineSpec:
    return MachineSpec(**{"kernel": Path("/k"), "initrd": Path("/i"), "vsock_cid": None, **changes})


def values(argv: list[str], option: str) -> list[Any]:
    """The values of an option; decoded where they are JSON."""
    found = [argv[n + 1] for n, word in enumerate(argv) if word == option]
    return [json.loads(value) if value.startswith("{") else value for value in found]


def test_a_plain_machine(runtime: Runtime) -> None:
    argv = qemu_command(spec(cmdline="guestagent.log=debug"), runtime)
    assert argv[0] == "qemu"
    assert values(argv, "-accel") == ["tcg,thread=multi"]
    (cpu,) = values(argv, "-cpu")
    model, *without = cpu.split(",")
    assert model == "max"
    # what needs XSAVE is not promised without it: Linux uses it and ends by a panic
    assert {"-xsave", "-avx", "-avx2", "-fma", "-f16c", "-vaes", "-vpclmulqdq"} <= set(without)
    assert values(argv, "-m") == ["512M"]
    (cmdline,) = values(argv, "-append")
    assert {"console=ttyS0", "panic=-1"} <= set(cmdline.split())
    assert cmdline.endswith(" guestagent.log=debug")
    assert "-no-reboot" in argv
    assert values(argv, "-device") == []
    assert values(argv, "-mon") == []


def test_kvm(runtime: Runtime) -> None:
    argv = qemu_command(spec(), dataclasses.replace(runtime, accel="kvm"))
    assert values(argv, "-accel") == ["kvm"]
    assert values(argv, "-cpu") == ["host"]


@pytest.mark.parametrize(
    ("accel", "steady", "trusted"),
    [("tcg", True, True), ("tcg", False, False), ("kvm", True, False)],
)
def test_an_emulated_clock_is_trusted_where_it_is_steady(
    runtime: Runtime, accel: str, steady: bool, trusted: bool
) -> None:
    changed = dataclasses.replace(runtime, accel=accel, steady_tsc=steady)
    (cmdline,) = values(qemu_command(spec(cmdline="mine"), changed), "-append")
    assert ("tsc=reliable" in cmdline.split()) == trusted
    assert ("no_timer_check" in cmdline.split()) == (accel == "tcg")
    assert cmdline.split()[-1] == "mine"


@pytest.mark.parametrize(
    ("text", "steady"),
    [
        ("model name\t: x\nflags\t\t: fpu constant_tsc nonstop_tsc\n", True),
        ("flags\t\t: fpu constant_tsc\n", False),
        ("Features\t: fp asimd\n", False),
    ],
)
def test_a_steady_tsc_is_told_by_its_flags(tmp_path: Path, text: str, steady: bool) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert has_steady_tsc(tmp_path / "cpuinfo") == steady


def test_guest_memory_is_shared_with_the_vsock_device(runtime: Runtime) -> None:
    argv = qemu_command(spec(), runtime)
    assert values(argv, "-object") == [
        {"qom-type": "memory-backend-memfd", "id": "ram", "size": 512 << 20, "share": True}
    ]
    assert "memory-backend=ram" in values(argv, "-machine")[0]


def test_pmem_is_read_only_and_unarmed_by_default(runtime: Runtime, pmem: Path) -> None:
    argv = qemu_command(spec(pmem=(PmemSpec(path=pmem),)), runtime)
    backend = values(argv, "-object")[1]
    assert backend["mem-path"] == str(pmem)
    assert backend["size"] == 6 << 20
    assert (backend["readonly"], backend["share"]) == (True, False)
    assert values(argv, "-device") == [
        {"driver": "nvdimm", "id": "pmem0", "memdev": "pmem0-file", "unarmed": True}
    ]
    assert values(argv, "-machine")[0].endswith("nvdimm=on")
    assert "slots=1" in values(argv, "-m")[0]


def test_writable_pmem_is_shared_and_armed(runtime: Runtime, pmem: Path) -> None:
    argv = qemu_command(spec(pmem=(PmemSpec(path=pmem, readonly=False),)), runtime)
    backend = values(argv, "-object")[1]
    assert (backend["readonly"], backend["share"]) == (False, True)
    assert values(argv, "-device")[0]["unarmed"] is False


def test_virtio_pmem_is_a_device_on_pci(runtime: Runtime, pmem: Path) -> None:
    argv = qemu_command(spec(pmem=(PmemSpec(path=pmem, kind="virtio"),)), runtime)
    backend = values(argv, "-object")[1]
    assert (backend["readonly"], backend["share"]) == (True, False)
    assert values(argv, "-device") == [
        {"driver": "virtio-pmem-pci", "id": "pmem0", "memdev": "pmem0-file"}
    ]
    with pytest.raises(ValueError, match="unknown kind 'dimm' of pmem"):
        PmemSpec(path=pmem, kind="dimm")


@pytest.mark.parametrize("size_bytes", [0, 4096, (2 << 20) + 512])
def test_pmem_of_an_odd_size_is_refused(runtime: Runtime, pmem: Path, size_bytes: int) -> None:
    with open(pmem, "r+b") as file:
        file.truncate(size_bytes)
    with pytest.raises(ValueError, match=f"{size_bytes} bytes"):
        qemu_command(spec(pmem=(PmemSpec(path=pmem),)), runtime)


def test_disks_of_both_kinds(runtime: Runtime) -> None:
    disks = (
        DiskSpec(path=Path("/a,b"), serial="one"),
        DiskSpec(path=Path("/c"), serial="two", bus="scsi", lun=3, readonly=False),
    )
    argv = qemu_command(spec(disks=disks), runtime)
    first, second = values(argv, "-blockdev")
    assert first["file"]["filename"] == "/a,b"
    assert (first["read-only"], second["read-only"]) == (True, False)
    controller, virtio, scsi = values(argv, "-device")
    assert controller == {"driver": "virtio-scsi-pci", "id": "scsi0"}
    assert (virtio["driver"], virtio["serial"]) == ("virtio-blk-pci", "one")
    assert (scsi["driver"], scsi["lun"], scsi["serial"]) == ("scsi-hd", 3, "two")


def test_networks_are_the_hosts_or_joined(runtime: Runtime) -> None:
    wire = Path("/tmp/wire, with comma")
    networks = (
        NetworkSpec(mac="52:54:00:00:00:01"),
        NetworkSpec(mac="52:54:00:00:00:02", socket=wire, listens=True),
    )
    argv = qemu_command(spec(networks=networks), runtime)
    where = {"type": "unix", "path": str(wire)}
    assert values(argv, "-netdev") == [
        {"type": "user", "id": "net0"},
        {"type": "stream", "id": "net1", "server": True, "addr": where},
    ]
    devices = values(argv, "-device")
    assert [device["driver"] for device in devices] == ["virtio-net-pci"] * 2
    assert [device["mac"] for device in devices] == [network.mac for network in networks]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mac": "52:54:00:00:00:0G"}, "is no address"),
        ({"mac": "52:54:00:00:00:01", "listens": True}, "needs a socket"),
    ],
)
def test_a_network_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkSpec(**fields)


def test_a_plugged_disk_names_its_port() -> None:
    device = disk_device(DiskSpec(path=Path("/a"), serial="s"), "plugged0", bus="port1")
    assert device["bus"] == "port1"


def test_vsock_by_the_kernel_or_by_a_device_of_ours(runtime: Runtime) -> None:
    argv = qemu_command(spec(vsock_cid=7), runtime)
    assert values(argv, "-device") == [{"driver": "vhost-vsock-pci", "guest-cid": 7}]
    ours = dataclasses.replace(runtime, vhost_socket=Path("/run/a,b"))
    argv = qemu_command(spec(vsock_cid=7), ours)
    assert values(argv, "-device") == [{"driver": "vhost-user-vsock-pci", "chardev": "vsock"}]
    assert "socket,id=vsock,path=/run/a,,b" in values(argv, "-chardev")


def test_control_ports_and_root_ports(runtime: Runtime) -> None:
    controlled = dataclasses.replace(runtime, qmp_fd=9)
    argv = qemu_command(spec(pcie_root_ports=2, serial_ports=("agent",)), controlled)
    assert "socket,id=qmp,fd=9,server=on,wait=off" in values(argv, "-chardev")
    devices = values(argv, "-device")
    assert [device["driver"] for device in devices] == [
        "virtio-serial-pci",
        "virtserialport",
        "pcie-root-port",
        "pcie-root-port",
    ]
    assert [device["chassis"] for device in devices[2:]] == [1, 2]


def test_lines_besides_the_console_are_sockets_in_the_run_directory(runtime: Runtime) -> None:
    argv = qemu_command(spec(ttys=("ttyS1", "hvc0")), runtime)
    for name in ("hvc0", "ttyS1"):
        path = tty_path(runtime.run_dir, name)
        assert path.parent == runtime.run_dir
        expected = f"socket,id=tty-{name},path={path},server=on,wait=off"
        assert expected in values(argv, "-chardev")
    assert values(argv, "-device") == [
        {"driver": "virtio-serial-pci", "id": "serial0"},
        {"driver": "isa-serial", "index": 1, "chardev": "tty-ttyS1"},
        {"driver": "virtconsole", "bus": "serial0.0", "chardev": "tty-hvc0"},
    ]
    assert values(argv, "-serial") == ["chardev:console"]  # and so the console stays on ttyS0


def test_a_uart_alone_needs_no_virtio(runtime: Runtime) -> None:
    argv = qemu_command(spec(ttys=("ttyS1",)), runtime)
    assert [device["driver"] for device in values(argv, "-device")] == ["isa-serial"]


def test_a_line_and_a_port_share_one_controller(runtime: Runtime) -> None:
    argv = qemu_command(spec(ttys=("hvc0",), serial_ports=("agent",)), runtime)
    drivers = [device["driver"] for device in values(argv, "-device")]
    assert drivers == ["virtio-serial-pci", "virtconsole", "virtserialport"]


def test_the_console_goes_to_a_file_and_on_request_to_the_terminal(runtime: Runtime) -> None:
    argv = qemu_command(spec(), runtime)
    assert f"file,path={runtime.console_path},id=console" in values(argv, "-chardev")
    argv = qemu_command(spec(console_stdio=True), runtime)
    (console,) = values(argv, "-chardev")
    assert console == f"stdio,mux=on,signal=off,logfile={runtime.console_path},id=console"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accel": "xen"}, "accelerator"),
        ({"vsock_cid": 2}, "CID 2"),
        ({"memory_mib": 16}, "16 MiB"),
        ({"cpus": 0}, "0 CPUs"),
        ({"ttys": ("ttyS0",)}, "unknown tty 'ttyS0': hvc0 or ttyS1"),
        ({"ttys": ("hvc0", "hvc0")}, "'hvc0' is there more than once"),
        (
            {"disks": tuple(DiskSpec(path=Path("/a"), serial=n, bus="scsi") for n in "ab")},
            "same LUN",
        ),
    ],
)
def test_a_wrong_machine_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**change)


@pytest.mark.parametrize("serial", ["", "x" * 21])
def test_a_serial_that_the_guest_would_not_see_whole_is_refused(serial: str) -> None:
    with pytest.raises(ValueError, match="serial"):
        DiskSpec(path=Path("/a"), serial=serial)


def test_shares_by_9p_and_by_virtiofs(runtime: Runtime) -> None:
    shares = (
        ShareSpec(path=Path("/a,b"), tag="one", kind="9p"),
        ShareSpec(path=Path("/c"), tag="two", kind="9p", readonly=False),
        ShareSpec(path=Path("/socket,d"), tag="one"),
    )
    argv = qemu_command(spec(shares=shares), runtime)
    assert values(argv, "-fsdev") == [
        "local,id=share0,path=/a,,b,security_model=none,readonly=on",
        "local,id=share1,path=/c,security_model=none,readonly=off",
    ]
    assert "socket,id=share2,path=/socket,,d" in values(argv, "-chardev")
    assert values(argv, "-device") == [
        {"driver": "virtio-9p-pci", "fsdev": "share0", "mount_tag": "one"},
        {"driver": "virtio-9p-pci", "fsdev": "share1", "mount_tag": "two"},
        {"driver": "vhost-user-fs-pci", "chardev": "share2", "tag": "one"},
    ]
    (ram,) = values(argv, "-object")
    assert ram["share"]  # virtiofsd maps the guest's memory


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tag": "x" * 32, "kind": "9p"}, "1 to 31 bytes"),
        ({"tag": "x" * 37}, "1 to 36 bytes"),
        ({"tag": ""}, "1 to 36 bytes"),
        ({"tag": "x", "kind": "nfs"}, "unknown kind"),
    ],
)
def test_a_share_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShareSpec(path=Path("/a"), **fields)


def test_two_shares_with_one_tag_are_refused() -> None:
    with pytest.raises(ValueError, match="shares with the same tag"):
        spec(shares=(ShareSpec(path=Path("/a"), tag="x"), ShareSpec(path=Path("/b"), tag="x")))
