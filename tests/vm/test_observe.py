"""A real Prometheus server that scrapes two guests through ``guestctl metrics --serve``."""

import json
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from guestagent.api import LayerSpec, VirtioBlkDevice
from guestagent.config import FAULTS_ALLOWED
from guestagent.host.client import GuestAgent
from rootfs.bootimage.initramfs import InitramfsSpec, build_initramfs
from rootfs.bootimage.kernel import Kernel
from rootfs.machine.qemu import DiskSpec, Machine
from tests.vm.conftest import CACHE_DIR
from vsock.errors import ConnectionClosed

PROJECT = Path(__file__).resolve().parents[2]
TOOLS = PROJECT / ".cache/tools/prometheus/usr/bin"
GUESTCTL = Path(sys.executable).parent / "guestctl"
BOOT_SECONDS = 120.0
WAIT_SECONDS = 60.0
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_CONFIGURATION = """
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: guests
    static_configs: [{{targets: ["{target}"]}}]
"""


@pytest.fixture(scope="module")
def machines(
    start_machine: Callable[..., Machine], layer_images: dict[str, Path]
) -> dict[str, Machine]:
    """Two machines, each with a disk to mount."""
    disk = DiskSpec(path=layer_images["plain"], serial="plain")
    return {name: start_machine(disks=(disk,), memory_mib=256) for name in ("one", "two")}


@contextmanager
def running(*command: object, **options: object) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([str(word) for word in command], text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def exporter(machines: dict[str, Machine]) -> Iterator[str]:
    """Serve the metrics of the machines; yields HOST:PORT."""
    guests = [f"--guest={name}={machine.agent_address()}" for name, machine in machines.items()]
    with running(
        GUESTCTL, "metrics", "--serve", "127.0.0.1:0", *guests, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        with process.stderr:
            line = process.stderr.readline()
            assert "http://127.0.0.1:" in line, line
            yield line.split("http://")[1].split("/")[0]


@contextmanager
def prometheus(directory: Path, target: str) -> Iterator[str]:
    """Run the server; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    configuration = directory / "prometheus.yml"
    configuration.write_text(_CONFIGURATION.format(target=target))
    with ExitStack() as stack:
        log = stack.enter_context((directory / "prometheus.log").open("w"))
        process = stack.enter_context(
            running(
                TOOLS / "prometheus",
                f"--config.file={configuration}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
                stdout=log,
                stderr=log,
            )
        )
        yield address
        assert process.poll() is None, (directory / "prometheus.log").read_text()


def query(address: str, expression: str) -> dict[str, float]:
    """Ask the server for an instant vector; return guest -> value."""
    words = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{words}", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "success"
    return {
        row["metric"].get("guest", ""): float(row["value"][1]) for row in found["data"]["result"]
    }


def eventually(address: str, expression: str, wanted: dict[str, float]) -> None:
    """Wait until the server has it so; there is nothing but asking again."""
    end = time.monotonic() + WAIT_SECONDS
    seen: object = None
    while time.monotonic() < end:
        try:
            seen = query(address, expression)
        except OSError as error:  # it does not listen yet
            seen = error
        if seen == wanted:
            return
        time.sleep(0.2)
    raise AssertionError(f"{expression}: {seen}, not {wanted}")


def test_a_prometheus_server_sees_two_guests(machines: dict[str, Machine], tmp_path: Path) -> None:
    spec = LayerSpec(layer_id="plain", device=VirtioBlkDevice(serial="plain"), filesystem="erofs")
    with ExitStack() as stack:
        guests = {
            name: stack.enter_context(
                GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS)
            )
            for name, machine in machines.items()
        }
        target = stack.enter_context(exporter(machines))
        address = stack.enter_context(prometheus(tmp_path, target))
        eventually(address, "guestagent_up", {"one": 1, "two": 1})
        guests["one"].layer_mount(spec)
        mounted = 'guestagent_layers{state="mounted"}'
        eventually(address, mounted, {"one": 1, "two": 0})
        eventually(address, 'guestagent_step_duration_seconds_count{step="mount"}', {"one": 1})
        eventually(address, "sum by (guest) (guestagent_problems)", {"one": 0, "two": 0})
        guests["one"].layer_unmount("plain")
        eventually(address, mounted, {"one": 0, "two": 0})
        judged = _promtool(target)
        assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")
        machines["two"].close()
        eventually(address, "guestagent_up", {"one": 1, "two": 0})


def _promtool(target: str) -> subprocess.CompletedProcess[str]:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    return subprocess.run(
        [TOOLS / "promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def guestctl(machine: Machine, *words: str) -> str:
    command = [GUESTCTL, "--connect", machine.agent_address(), "--wait", "120", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_person_sees_into_a_machine(machines: dict[str, Machine]) -> None:
    machine = machines["one"]
    assert guestctl(machine, "--traceparent", TRACE, "status").startswith("ready  agent ")
    assert "EVENTS" in guestctl(machine, "top", "--once")
    lines = json.loads(guestctl(machine, "--json", "log", "--level", "debug"))
    texts = [line["text"] for line in lines]
    # from the first line of PID 1, before there was an agent
    assert lines[0]["number"] == 1
    assert texts.index("engine ready") < texts.index("serving")
    assert guestctl(machine, "crashes") == "none\n"


def test_a_crash_under_pid_one_and_the_log_of_a_boot(
    start_machine: Callable[..., Machine],
    layer_images: dict[str, Path],
    kernel: Kernel,
    tmp_path: Path,
) -> None:
    """The host hears the log from the first line of boot, over a crash of the agent, and its
    next life says what killed it."""
    disk = DiskSpec(path=layer_images["plain"], serial="plain")
    (tmp_path / "faults").touch()
    files = ((FAULTS_ALLOWED.lstrip("/"), tmp_path / "faults"),)
    initramfs = build_initramfs(InitramfsSpec(kernel=kernel, files=files), cache_dir=CACHE_DIR)
    machine = start_machine(
        initrd=initramfs.path,
        disks=(disk,),
        memory_mib=256,
        cmdline="guestagent.fault=mount:KILL guestagent.log_dial=2:1026 guestagent.log=debug",
    )
    where = machine.agent_address().removeprefix("hybrid://").rpartition(":")[0] + "_1026"
    spec = LayerSpec(layer_id="plain", device=VirtioBlkDevice(serial="plain"), filesystem="erofs")
    with running(
        GUESTCTL, "log", "--listen", f"unix://{where}", "--json", stdout=subprocess.PIPE
    ) as host:
        first = GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS)
        with first, pytest.raises(ConnectionClosed):
            first.layer_mount(spec)
        with GuestAgent(machine.agent_address(), connect_seconds=BOOT_SECONDS) as guest:
            (report,) = guest.crashes().crashes
            assert guest.status().restarts == 1
            last = guest.log(-1, level="debug").next
        assert host.stdout is not None
        with host.stdout:
            heard = []
            for text in host.stdout:
                heard.append(json.loads(text))
                if heard[-1]["number"] >= last:
                    break
    assert (report.kind, report.signal, report.status) == ("death", "SIGKILL", -9)
    assert report.requests[0].startswith("layer.mount ")
    assert report.unfinished == ("plain at /run/layers/plain",)
    assert [line["number"] for line in heard] == list(range(1, heard[-1]["number"] + 1))
    assert len({line["boot_id"] for line in heard}) == 1
    texts = [line["text"] for line in heard]
    assert texts.count("engine ready") == 2
    assert "the agent died and is started again" in texts
