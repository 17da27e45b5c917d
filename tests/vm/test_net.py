"""The network of machines: two of them joined, set up by a request and from the command line."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from guestagent.api.net import Interface, InterfaceMatch, NetConfigure, Route
from guestagent.host.client import GuestAgent
from rootfs.bootimage.features import DEFAULT_FEATURES
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import Machine
from rootfs.machine.qemu_command import NetworkSpec
from tests.vm.conftest import BOOT_SECONDS, CACHE_DIR
from vsock.errors import CallError

MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02")
#: For the second machine: the agent listens on its network, too.
AT_BOOT = (
    f"guestagent.net=interface,match=mac={MACS[1]},name=lan0,addresses=10.0.0.2/24,"
    "addresses=fd00::2/64,dad=0 guestagent.net=hostname=second guestagent.net=dns,servers=10.0.0.1"
)


@pytest.fixture(scope="module")
def network_initramfs(kernel: Kernel) -> Path:
    spec = InitramfsSpec(kernel=kernel, features=(*DEFAULT_FEATURES, "net"))
    return build_initramfs(spec, cache_dir=CACHE_DIR).path


def test_two_machines_reach_each_other(
    start_machine: Callable[..., Machine], network_initramfs: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "wire"
    machines = [
        start_machine(
            initrd=network_initramfs,
            vsock_cid=number + 3,
            cmdline=AT_BOOT if number else "",
            networks=(NetworkSpec(mac=mac, socket=socket, listens=number == 0),),
        )
        for number, mac in enumerate(MACS)
    ]
    with contextlib.ExitStack() as stack:
        first, second = (
            stack.enter_context(GuestAgent(one.agent_address(), connect_seconds=BOOT_SECONDS))
            for one in machines
        )
        assert "net-configure" in second.hello.features
        booted = second.net_list()
        assert second.status().problems == ()
        assert booted.hostname == "second"
        assert booted.resolv_conf == "nameserver 10.0.0.1\n"
        assert float(str(second.hello.boot["network_ms"])) > 0
        lan = next(one for one in booted.interfaces if one.name == "lan0")
        assert (lan.mac, lan.up, lan.carrier) == (MACS[1], True, True)
        assert set(lan.addresses) >= {"10.0.0.2/24", "fd00::2/64"}
        before_bytes = first.status().rss_bytes
        interface = Interface(
            match=InterfaceMatch(mac=MACS[0]),
            name="lan0",
            addresses=("10.0.0.1/24", "fd00::1/64"),
            routes=(Route(destination="10.9.0.0/16", gateway="10.0.0.2"),),
        )
        reply = first.net_configure(NetConfigure(interfaces=(interface,)))
        # no other machine has them: the second one was asked, and the frames went to and fro
        assert not set(reply.interfaces[0].tentative) & {"fd00::1/64"}
        assert first.net_configure(NetConfigure(interfaces=(interface,))).already
        assert first.status().rss_bytes - before_bytes < 2 << 20
        clash = interface.replace(addresses=("10.0.0.1/24", "fd00::2/64"))
        with pytest.raises(CallError) as caught:
            first.net_configure(NetConfigure(interfaces=(clash,)))
        assert (caught.value.code, caught.value.step) == ("conflict", "duplicates")
        assert set(first.net_list().interfaces[1].addresses) >= {"10.0.0.1/24", "fd00::1/64"}


def test_image_without_the_feature_says_so(start_machine: Callable[..., Machine]) -> None:
    machine = start_machine()
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
        with pytest.raises(CallError) as caught:
            guest.net_list()
        assert caught.value.code == "unsupported"
        assert "net-configure" not in guest.hello.features
        assert caught.value.hint == "build the boot image with the feature net"
