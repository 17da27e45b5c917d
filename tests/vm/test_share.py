"""Directories of the host in a machine, by virtiofs and 9p: seen, guarded, unmounted, adopted.

9p needs another kernel than the one for clouds: ``scripts/setup generic``, and
``GUESTAGENT_KERNELS=generic`` in the environment.
"""

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestagent.api.console import CONSOLE_PORT
from guestagent.api.share import SHARE_KINDS, ShareMount
from guestagent.host.client import GuestAgent
from rootfs.bootimage.features import DEFAULT_FEATURES
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import Machine
from rootfs.machine.qemu_command import ShareSpec
from tests.beds.ctlbed import GUESTCTL
from tests.vm.conftest import BOOT_SECONDS, CACHE_DIR
from vsock.deadline import Deadline
from vsock.errors import CallError, ConnectionClosed

#: Of qemu-system-common in Debian 12, and of the package virtiofsd since.
PROGRAMS = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
BUSYBOX = Path("/usr/bin/busybox")
STEPS = Path(__file__).parents[1] / "beds/share_guest.py"
CONTENT = b"from the host\n"
TARGET = "/run/shares/s"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    (path / "file").write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def server(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a virtiofsd that serves the directory."""
    with serving(directory, tmp_path_factory.mktemp("virtiofsd")) as (_, socket):
        yield socket


@contextlib.contextmanager
def serving(directory: Path, place: Path) -> "Iterator[tuple[subprocess.Popen[bytes], Path]]":
    """Have a virtiofsd serve a directory; yield it and its socket."""
    program = next(path for path in PROGRAMS if os.path.exists(path))
    socket, log = place / "socket", place / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program, f"--socket-path={socket}", "-o", f"source={directory},sandbox=chroot"],
            stdout=file,
            stderr=file,
        )
    try:
        with contextlib.closing(Deadline(BOOT_SECONDS)) as deadline:
            while not socket.exists():
                assert process.poll() is None, log.read_text()
                deadline.wait((), "the socket of virtiofsd", at_most=0.02)
        yield process, socket
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def machine(
    start_machine: Callable[..., Machine], kernel: Kernel, server: Path, directory: Path
) -> Machine:
    """A machine with the directory as share ``host`` of both kinds, and a shell."""
    spec = InitramfsSpec(
        kernel=kernel,
        features=(*DEFAULT_FEATURES, "share"),
        files=(("bin/busybox", BUSYBOX), ("steps.py", STEPS)),
    )
    return start_machine(
        initrd=build_initramfs(spec, cache_dir=CACHE_DIR).path,
        cmdline=f"guestagent.console=vsock:{CONSOLE_PORT} guestagent.console_shell=1",
        shares=(
            ShareSpec(path=server, tag="host"),
            ShareSpec(path=directory, tag="host", kind="9p", readonly=False),
        ),
    )


@pytest.fixture
def guest(machine: Machine) -> Iterator[GuestAgent]:
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
        yield guest
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
        guest.share_unmount("s")
        assert guest.status().problems == ()


@pytest.fixture(params=SHARE_KINDS)
def spec(request: pytest.FixtureRequest, guest: GuestAgent) -> ShareMount:
    """A share of each kind that the kernel has."""
    kind = str(request.param)
    if f"share-{kind}" not in guest.hello.features:
        pytest.skip(f"this kernel has no {kind}")
    msize_bytes = 65536 if kind == "9p" else None
    return ShareMount(share_id="s", tag="host", kind=kind, msize_bytes=msize_bytes)


def shell(machine: Machine, line: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line in the guest's shell."""
    words = ("--connect", machine.agent_address(), "console", "-c", f"sh -c '{line}'")
    return subprocess.run([*GUESTCTL, *words], capture_output=True, timeout=BOOT_SECONDS)


def test_read_only_share_is_read_and_not_written(
    machine: Machine, guest: GuestAgent, spec: ShareMount, directory: Path
) -> None:
    report = guest.share_mount(spec)
    assert (report.state, report.target, report.already) == ("mounted", TARGET, False)
    assert {"ro", "nosuid", "nodev"} <= set(report.options)
    assert shell(machine, f"busybox cat {TARGET}/file").stdout == CONTENT
    refused = shell(machine, f"echo x > {TARGET}/new")
    assert refused.returncode != 0
    assert b"Read-only file system" in refused.stderr
    assert not (directory / "new").exists()
    again = guest.share_mount(spec)
    assert again == report.replace(already=True, timings_ms={})
    assert guest.share_list() == (again.replace(already=False),)
    for other, message in (
        (spec.replace(read_only=False), "with another read_only"),
        (spec.replace(share_id="t"), "is mounted as share 's'"),
    ):
        with pytest.raises(CallError, match=message) as caught:
            guest.share_mount(other)
        assert caught.value.code == "conflict"
    reply = guest.share_unmount("s")
    assert (reply.unmounted, reply.already) == ((TARGET,), False)
    assert guest.share_unmount("s").already
    assert guest.share_list() == ()
    assert shell(machine, f"test -e {TARGET}").returncode == 1


def test_writable_share_is_written_by_guest_and_host(
    machine: Machine, guest: GuestAgent, spec: ShareMount, directory: Path
) -> None:
    report = guest.share_mount(spec.replace(read_only=False))
    assert "rw" in report.options
    assert shell(machine, f"echo from the guest > {TARGET}/new").returncode == 0
    assert (directory / "new").read_text() == "from the guest\n"
    (directory / "later").write_bytes(CONTENT)
    assert shell(machine, f"busybox cat {TARGET}/later").stdout == CONTENT


def test_busy_share_names_its_holder_and_stays(
    machine: Machine, guest: GuestAgent, spec: ShareMount
) -> None:
    before = guest.share_mount(spec)
    sleep = 'busybox setsid sh -c "echo \\$\\$ >/run/holder; exec busybox sleep 1000"'
    shell(machine, f"cd {TARGET}; {sleep} >/dev/null 2>&1 </dev/null &")
    found = shell(machine, "until test -s /run/holder; do :; done; busybox cat /run/holder").stdout
    with pytest.raises(CallError) as caught:
        guest.share_unmount("s")
    assert (caught.value.code, caught.value.object) == ("busy", TARGET)
    assert f"[{int(found)}] (cwd)" in (caught.value.hint or "")
    assert guest.share_list() == (before.replace(timings_ms={}),)
    shell(machine, f"kill -9 {int(found)}; while test -e /proc/{int(found)}; do :; done")


def test_tag_that_nothing_serves(guest: GuestAgent, spec: ShareMount) -> None:
    with pytest.raises(CallError, match=rf"no {spec.kind} device .* the tag 'other'") as caught:
        guest.share_mount(spec.replace(tag="other"))
    assert caught.value.code == "not_found"
    assert caught.value.object == "other"
    assert guest.share_list() == ()


def test_9p_on_a_kernel_without_it(guest: GuestAgent) -> None:
    """The kernels for clouds have no 9p."""
    if "share-9p" in guest.hello.features:
        pytest.skip("this kernel has 9p")
    with pytest.raises(CallError, match="the kernel has no file system 9p") as caught:
        guest.share_mount(ShareMount(share_id="s", tag="host", kind="9p"))
    assert caught.value.code == "unsupported"
    assert guest.share_list() == ()


def test_failure_and_death_at_every_step_of_a_request(
    machine: Machine, guest: GuestAgent, spec: ShareMount
) -> None:
    assert guest.share_list() == ()
    done = shell(machine, f"/usr/bin/python3 -IS /steps.py {spec.kind}")
    assert (done.returncode, done.stderr) == (0, b"")
    mount_steps, unmount_steps = map(int, done.stdout.split())
    assert mount_steps >= 7
    assert unmount_steps >= 2


def test_next_agent_adopts_the_share(machine: Machine, guest: GuestAgent, spec: ShareMount) -> None:
    before = guest.status().restarts
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as first:
        report = first.share_mount(spec)
        shell(machine, f"busybox kill -9 {first.status().pid}")
        with pytest.raises(ConnectionClosed):
            first.status()
    with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as second:
        assert second.status().restarts == before + 1
        assert second.share_list() == (report.replace(timings_ms={}),)
        assert shell(machine, f"busybox cat {TARGET}/file").stdout == CONTENT
        assert second.share_unmount("s").unmounted == (TARGET,)
        assert second.status().problems == ()


def test_server_that_is_gone_does_not_keep_a_request(
    start_machine: Callable[..., Machine], kernel: Kernel, directory: Path, tmp_path: Path
) -> None:
    """What the kernel would wait for without end is refused in time, and the machine can end."""
    spec = InitramfsSpec(kernel=kernel, features=(*DEFAULT_FEATURES, "share"))
    initrd = build_initramfs(spec, cache_dir=CACHE_DIR).path
    with serving(directory, tmp_path) as (process, socket):
        machine = start_machine(initrd=initrd, shares=(ShareSpec(path=socket, tag="host"),))
        with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
            before = guest.share_mount(ShareMount(share_id="s", tag="host"))
            process.kill()
            process.wait()
            for _ in range(2):
                with pytest.raises(
                    CallError, match="of virtiofs tag 'host' does not ans"
                ) as caught:
                    guest.share_unmount("s")
                assert (caught.value.code, caught.value.step) == ("timeout", "server")
            assert guest.share_list() == (before.replace(timings_ms={}),)
            guest.shutdown("poweroff", force=True)
        with Deadline(BOOT_SECONDS) as deadline:
            assert machine.wait(deadline) == 0
