"""The console of a real agent, over real layers: what it says is what the kernel has."""

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from guestagent.api import LayersMount, LayersUnmount, OverlaySpec
from guestagent.host.client import GuestAgent
from guestagent.storage import syscalls
from tests.beds.agentbed import AgentProcess, Pack, World, settled_world
from tests.beds.consolebed import END, HELLO, WELCOME, Client, frame, wait_until
from tests.beds.ctlbed import GUESTCTL
from tests.beds.terminal import ask, ended, spawn
from vsock.address import VMADDR_CID_LOCAL

PACK_LAYERS = 6
PROJECT = Path(__file__).resolve().parents[2]
CONNECTS = 10_000
MAX_GROWTH_BYTES = 2 << 20
PORT = 1099


class ConsoleAgent(AgentProcess):
    """An agent with a console on a socket of its own."""

    def __init__(self, *settings: str) -> None:
        super().__init__(*settings)
        self.console = f"{self.directory}.console"
        self.settings = (*settings, f"console=unix://{self.console}")

    def run(self, command: str, *, stdin: bytes = b"") -> tuple[int, str]:
        """Run one command of the console; return its status and all its output."""
        with Client(self.console, command=command) as client:
            if stdin:
                client.type(stdin)
            with contextlib.suppress(BrokenPipeError):  # it may be through already
                client.send(END)
            return client.finish()

    def ok(self, command: str) -> str:
        status, output = self.run(command)
        assert status == 0, output
        return output

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def footprint(self) -> tuple[int, int, int]:
        """Return (threads, descriptors, resident bytes)."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        threads = len(os.listdir(f"/proc/{self.pid}/task"))
        fds = len(os.listdir(f"/proc/{self.pid}/fd"))
        return threads, fds, pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def agent() -> Iterator[ConsoleAgent]:
    with ConsoleAgent("console_shell=1") as agent, agent.client():
        yield agent


@pytest.fixture
def guest(agent: ConsoleAgent) -> Iterator[GuestAgent]:
    with agent.client() as guest:
        yield guest
        if guest.overlay_list():
            guest.overlay_unmount("root")
        ids = tuple(layer.layer_id for layer in guest.layer_list())
        if ids:
            guest.layers_unmount(LayersUnmount(layers=ids))


@pytest.fixture
def mounted(guest: GuestAgent, pack: Pack) -> GuestAgent:
    """Two layers and an overlay of them."""
    guest.layers_mount(
        LayersMount(
            layers=(pack.spec(0), pack.spec(1)),
            overlay=OverlaySpec(overlay_id="root", layers=("layer1", "layer0")),
        )
    )
    return guest


# --- looking


def test_layers_command_names_the_devices_below_a_layer(
    agent: ConsoleAgent, mounted: GuestAgent, pack: Pack
) -> None:
    report = mounted.layer_get("layer0")
    listed = agent.ok("layers")
    assert "layer0" in listed
    assert pack.node in listed
    described = agent.ok("layers layer0")
    assert pack.layers[0].root_digest.hex() in described
    assert all(device.table in described for device in report.dm)
    tables = agent.ok("tables")
    assert all(f"{device.name}  {device.dev} ro" in tables for device in report.dm)
    dmsetup = subprocess.run(["dmsetup", "table"], capture_output=True, text=True, check=True)
    for line in dmsetup.stdout.splitlines():
        assert line.partition(": ")[2] in tables
    assert "layer1  /run/layers/layer1" in agent.ok("overlays root")
    assert "/run/overlays/root" in agent.ok("mounts")
    assert "squashfs" not in agent.ok("devices")
    assert pack.node in agent.ok("devices")
    assert "  mount " in agent.ok("timings layer0")


def test_the_plan_of_a_mounted_layer_matches_its_devices(
    agent: ConsoleAgent, mounted: GuestAgent
) -> None:
    linear, verity, mount = agent.ok("plan layer0").splitlines()
    report = mounted.layer_get("layer0")
    assert linear == f"  create {report.dm[1].name}: {report.dm[1].table}"
    assert verity.replace(f" {report.dm[1].name}", f" {report.dm[1].dev}") == (
        f"  create {report.dm[0].name}: {report.dm[0].table}"
    )
    assert mount == "  mount erofs on /run/layers/layer0 (ro,nodev,nosuid)"


def test_a_dry_run_prints_the_plan_of_the_later_mount(
    agent: ConsoleAgent, guest: GuestAgent, pack: Pack
) -> None:
    layer = pack.layers[3]
    own = str(agent.directory)
    before = World.now(skip=(own,))
    word = (
        f"{pack.node},id=later,fs=erofs,root={layer.root_digest.hex()},"
        f"offset={layer.mapping.offset_bytes},size={layer.mapping.size_bytes}"
    )
    planned = agent.ok(f"plan {word}").splitlines()
    assert settled_world(before, skip=(own,)) == before
    guest.layer_mount(pack.spec(3, "later"))
    assert agent.ok("plan later").splitlines() == planned
    status, output = agent.run(f"plan {word}")
    assert status == 1
    assert "is mounted" in output
    # the refused dry run took no claim of the mounted layer with it
    assert guest.layer_mount(pack.spec(3, "later")).already
    guest.layer_unmount("later")


def test_files_of_layers(agent: ConsoleAgent, mounted: GuestAgent, pack: Pack) -> None:
    content = Path("/run/layers/layer0/who").read_bytes()
    assert agent.ok("ls layer0:/") == "same\nwho\n"
    assert agent.ok("cat layer0:/who").encode() == content
    digest = hashlib.sha256(content).hexdigest()
    assert agent.ok("checksum layer0:/who") == f"{digest}  layer0:/who\n"
    assert pack.layers[1].marker.decode() in agent.ok("cat root:/who")
    assert agent.ok("find root:/ wh?") == "root:/who\n"
    assert agent.ok("hexdump layer0:/who 0 4").startswith("00000000  6c 61 79 65 ")
    with open(pack.node, "rb") as device:
        device.seek(1024)
        magic = device.read(4).hex(" ")
    assert magic in agent.ok(f"hexdump {pack.node} 1024 4")
    status, output = agent.run("cat layer0:/../../../etc/passwd")
    assert (status, "No such file" in output) == (1, True)
    assert "/run/layers/layer0" in agent.ok("df /run/layers/layer0")


def test_holders(agent: ConsoleAgent, mounted: GuestAgent) -> None:
    with open("/run/layers/layer0/who", "rb"):
        said = agent.ok("holders layer0")
        assert f"[{os.getpid()}]" in said
        assert "/run/layers/layer0/who" in said
    verity, linear = mounted.layer_get("layer0").dm
    assert verity.name in agent.ok(f"holders {linear.name}")


def test_the_guest_itself(agent: ConsoleAgent, mounted: GuestAgent) -> None:
    assert "layers              2" in agent.ok("status")
    assert "layer_mounted layer=layer0" in agent.ok("events")
    assert "console command" in agent.ok("log")
    assert "device-mapper" in agent.ok("dmesg")
    assert f"\n{agent.pid} " in agent.ok("ps")
    assert agent.console in agent.ok("ps")
    assert Path("/proc/cmdline").read_text().strip() in agent.ok("cmdline")
    assert "eventpoll" in agent.ok(f"fds {agent.pid}")
    assert "the agent" in agent.ok("uptime")
    assert "COMMAND" in agent.ok("top -n 1")
    assert agent.run("modules")[0] == 0
    assert "PATH=" in agent.ok("env")
    assert "process_resident_memory_bytes" in agent.ok("metrics")


def test_no_command_but_sh_starts_a_program(agent: ConsoleAgent, mounted: GuestAgent) -> None:
    trace = Path(f"{agent.directory}.strace")
    strace = subprocess.Popen(
        ["strace", "-f", "-e", "trace=execve,fork,vfork", "-o", str(trace), "-p", str(agent.pid)],
        stderr=subprocess.PIPE,
    )
    assert strace.stderr is not None
    try:
        if b"attached" not in strace.stderr.readline():
            pytest.skip("strace cannot attach here")
        for command in ("layers", "tables", "holders layer0", "cat layer0:/who", "ps", "dmesg"):
            agent.ok(command)
    finally:
        strace.terminate()
        strace.wait(20)
        strace.stderr.close()
    assert "execve" not in trace.read_text()
    trace.unlink()


# --- reconcile


def test_reconcile_finds_nothing_after_plain_mounts(
    agent: ConsoleAgent, mounted: GuestAgent
) -> None:
    assert agent.ok("reconcile") == "journal, inventory and kernel agree\n"
    assert len(mounted.layer_list()) == 2


def test_an_orphan_device_is_removed(agent: ConsoleAgent, guest: GuestAgent, pack: Pack) -> None:
    _, linear = guest.layer_mount(pack.spec(0)).dm
    guest.layer_unmount("layer0")
    uuid = linear.uuid.removesuffix("layer0") + "ghost"  # its start names the agent
    subprocess.run(
        ["dmsetup", "create", "orphan", "--uuid", uuid, "--table", f"0 8 linear {pack.node} 0"],
        check=True,
    )
    dry = agent.ok("reconcile --dry-run")
    problem = "dm device orphan is the agent's and belongs to no layer and no scratch"
    assert dry.startswith(f"{problem}\n  would ")
    assert "orphan" in agent.ok("tables")
    assert agent.ok("reconcile").endswith(": undone\n")
    assert guest.dm_list().devices == ()
    assert "agree" in agent.ok("reconcile")


def test_a_layer_unmounted_behind_the_agent_s_back_is_undone(
    agent: ConsoleAgent, guest: GuestAgent, pack: Pack
) -> None:
    own = str(agent.directory)
    before = World.now(skip=(own,))
    guest.layer_mount(pack.spec(2))
    syscalls.umount2("/run/layers/layer2")
    assert "layer layer2 is not whole in the kernel" in agent.ok("reconcile --dry-run")
    assert "undone" in agent.ok("reconcile")
    assert settled_world(before, skip=(own,)) == before
    assert not guest.layer_mount(pack.spec(2)).already


def entry_of(layer_id: str, path: Path) -> dict[str, Any]:
    """Return what a file of the journal says of a layer."""
    lives = msgpack.unpackb(path.read_bytes())["layers"]
    (found,) = (live for live in lives if live["spec"]["layer_id"] == layer_id)
    assert isinstance(found, dict)
    return found


def test_a_missing_journal_entry_is_written_again(
    agent: ConsoleAgent, mounted: GuestAgent, pack: Pack
) -> None:
    entry = Path(agent.state, "layer-layer0.entry")
    content = entry_of("layer0", entry)
    entry.unlink()
    assert "layer layer0 is mounted and not in the journal" in agent.ok("reconcile --dry-run")
    assert not entry.exists()
    assert "undone" in agent.ok("reconcile")
    again = entry_of("layer0", entry)
    for live in (again, content):
        del live["timings_ms"]
    assert again == content


def test_a_stale_journal_entry_goes_and_the_live_layer_stays(
    agent: ConsoleAgent, mounted: GuestAgent, pack: Pack
) -> None:
    """An old entry for the target of a live layer goes, and the layer stays."""
    live = entry_of("layer0", Path(agent.state, "layer-layer0.entry"))
    live["spec"].update(layer_id="ghost", target="/run/layers/layer0")
    live["plan"]["layer_id"] = "ghost"
    ghost = Path(agent.state, "layer-ghost.entry")
    ghost.write_bytes(msgpack.packb({"begun": "", "layers": [live]}))
    assert "layer ghost is in the journal (whole) and not in the inventory" in agent.ok(
        "reconcile --dry-run"
    )
    assert "undone" in agent.ok("reconcile")
    assert not ghost.exists()
    assert os.path.ismount("/run/layers/layer0")
    assert "agree" in agent.ok("reconcile")


def test_reconcile_leaves_requests_in_flight_alone(
    agent: ConsoleAgent, guest: GuestAgent, pack: Pack
) -> None:
    failures: list[BaseException] = []

    def churn(number: int) -> None:
        try:
            with agent.client() as own:
                for _ in range(10):
                    own.layer_mount(pack.spec(number))
                    own.layer_unmount(f"layer{number}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in (3, 4, 5)]
    for thread in threads:
        thread.start()
    said = ""
    while any(thread.is_alive() for thread in threads):
        said += agent.run("reconcile")[1]
    for thread in threads:
        thread.join()
    assert failures == []
    assert "undone" not in said
    assert "failed" not in said
    assert guest.status().problems == ()


# --- permission and lifetimes


@pytest.mark.parametrize("settings", [(), ("vsock_peers=host,local",)])
def test_a_process_of_the_guest_reaches_the_vsock_console_only_where_configured(
    settings: tuple[str, ...],
) -> None:
    """Over the loopback transport; a shell there would make it root."""
    agent = ConsoleAgent("console_shell=1", *settings)
    agent.settings = (*agent.settings[:-1], f"console=unix://{agent.console},vsock:{PORT}")
    with agent, agent.client(), socket.socket(socket.AF_VSOCK) as peer:
        peer.settimeout(60)
        peer.connect((VMADDR_CID_LOCAL, PORT))
        with contextlib.suppress(ConnectionError):  # refused already
            peer.sendall(frame(HELLO, {"versions": [1], "command": "sh -c id"}))
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = peer.recv(1000)
        log = agent.ok("log")
    assert answer[:1] == (bytes([WELCOME]) if settings else b"")
    assert (f"peer refused listen=vsock://any:{PORT} cid=1" in log) is not bool(settings)


def test_a_console_that_is_off() -> None:
    with AgentProcess() as agent:
        done = subprocess.run(
            [*GUESTCTL, "--connect", agent.address, "console", "-c", "layers"],
            capture_output=True,
            timeout=60,
            cwd=PROJECT,
        )
        assert done.returncode == 1
        assert b"console is disabled: guestagent.console=" in done.stderr


def test_shell_needs_its_own_permission_in_a_real_agent() -> None:
    with ConsoleAgent() as agent:
        with agent.client():
            status, output = agent.run("sh -c id")
        assert (status, "the shell is disabled: guestagent.console_shell=" in output) == (1, True)


def test_the_shell(agent: ConsoleAgent, guest: GuestAgent) -> None:
    assert agent.run("sh -c 'echo $0; exit 3'") == (3, "/bin/sh\n")
    data = bytes(range(256)) * 2000
    done = subprocess.run(
        [*GUESTCTL, "console", f"unix://{agent.console}", "-c", "sh -c 'cat | cat'"],
        input=data,
        stdout=subprocess.PIPE,
        timeout=60,
        cwd=PROJECT,
    )
    assert (done.returncode, done.stdout) == (0, data)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root with a shell of its own, on a file system of its own."""
    top = tmp_path / "root"
    top.mkdir()
    syscalls.mount("root", str(top), "tmpfs")
    for name in ("bin", "proc", "dev", "etc"):
        (top / name).mkdir()
    (top / "sys").symlink_to("etc")
    shutil.copy("/bin/busybox", top / "bin/busybox")
    (top / "bin/sh").symlink_to("/bin/busybox")
    (top / "etc/name").write_text("the root\n")
    yield top
    syscalls.umount2(str(top))


def test_the_shell_of_a_mounted_root(agent: ConsoleAgent, guest: GuestAgent, root: Path) -> None:
    def run(command: str) -> tuple[int, str]:
        return agent.run(f"sh --root {root} -c '{command}'")

    assert run("busybox cat /etc/name; pwd; exit 3") == (3, "the root\n/\n")
    assert run("test -c /dev/null && test -d /proc/self && busybox ls /sys") == (0, "name\n")
    assert run("kill -PIPE $$")[0] == 128 + signal.SIGPIPE
    assert os.listdir(root / "dev") == []  # nothing is mounted for others
    with Client(agent.console, command=f"sh --root {root} -c 'echo up; busybox cat'") as client:
        client.expect("up")
        with pytest.raises(OSError, match="busy"):
            syscalls.umount2(str(root))
        client.send(END)
        assert client.finish()[0] == 0
    (root / "bin/sh").unlink()
    (root / "bin/busybox").unlink()
    status, output = run("true")
    assert (status, "there is no shell" in output, "/bin/busybox sh" in output) == (127, True, True)
    assert agent.run(f"sh --root {root}/missing")[0] == 1


def test_a_terminal_reconnects_when_the_agent_is_started_again(pack: Pack) -> None:
    with ConsoleAgent() as agent:
        with agent.client() as guest:
            guest.layer_mount(pack.spec(0))
        child = spawn("--connect", agent.address, "console", timeout_seconds=60, environment={})
        child.expect_exact("guest> ")
        ask(child, "layers layer0\r", "mounted")
        agent.kill()
        child.expect_exact("the console was lost")
        agent.start()
        child.expect_exact("connected again: this is a new session")
        child.expect_exact("guest> ")
        ask(child, "layers layer0\r", "mounted", "guest> ")
        child.send("~.")
        assert ended(child) == 0
        with agent.client() as guest:
            guest.layer_unmount("layer0")


def test_10_000_connections_leave_no_thread_descriptor_or_memory(
    agent: ConsoleAgent, guest: GuestAgent
) -> None:
    greeting = frame(HELLO, {"versions": [1]})
    openings = (b"", greeting[:3], b"\xffjunk" * 100, greeting + b"\x03\x00\x00\x08uptime\n\xff")
    _connect(agent, openings, 500)  # what is loaded and allocated once
    before = _settled_footprint(agent)
    _connect(agent, openings, CONNECTS)
    after = _settled_footprint(agent)
    # fewer they may be: workers of the agent's server end when there is nothing to do
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] - before[2] < MAX_GROWTH_BYTES, (before, after)
    assert agent.ok("uptime")


def _connect(agent: ConsoleAgent, openings: tuple[bytes, ...], count: int) -> None:
    for number in range(count):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(agent.console)
            sock.sendall(openings[number % len(openings)])


def _settled_footprint(agent: ConsoleAgent) -> tuple[int, int, int]:
    """Return the footprint once the console has let every peer go."""
    wait_until(lambda: not _open_peers(agent.console), "peers stay")
    return agent.footprint()


def _open_peers(path: str) -> int:
    """Count the console's ends of connections: all sockets with its path but the listening one."""
    rows = Path("/proc/net/unix").read_text().splitlines()
    return sum(row.endswith(f" {path}") for row in rows) - 1


def test_a_peer_that_never_reads_does_not_delay_the_agent(
    agent: ConsoleAgent, guest: GuestAgent, pack: Pack
) -> None:
    def use_agent() -> None:
        for _ in range(5):
            guest.layer_mount(pack.spec(0))
            guest.layer_unmount("layer0")
        assert "agree" in agent.ok("reconcile")

    hello = frame(HELLO, {"versions": [1], "command": "sh -c 'yes'"})
    use_agent()  # what the first requests load and allocate is no part of the growth
    before = agent.footprint()
    with socket.socket(socket.AF_UNIX) as sleeper:
        sleeper.connect(agent.console)
        sleeper.sendall(hello)
        use_agent()
        assert agent.footprint()[2] - before[2] < MAX_GROWTH_BYTES
    after = _settled_footprint(agent)
    assert after[1] <= before[1]
