"""Seeing into the real agent: metrics after mounts, its log, traces, and reports of its crashes."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestagent.api import LayersMount, OverlaySpec
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import PROJECT, AgentProcess, Pack
from tests.beds.calls import run
from tests.beds.supervised import SupervisedAgent
from vsock.client import Client
from vsock.errors import CallError

PACK_LAYERS = 4
PROMTOOL = PROJECT / ".cache/tools/prometheus/usr/bin/promtool"
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
WAIT_SECONDS = 60.0


@pytest.fixture
def agent() -> Iterator[AgentProcess]:
    with AgentProcess() as agent:
        yield agent


def samples(text: str) -> dict[str, float]:
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def mount_and_unmount(guest: GuestAgent, pack: Pack) -> None:
    specs = tuple(pack.spec(number) for number in range(3))
    guest.layers_mount(
        LayersMount(
            layers=specs,
            overlay=OverlaySpec(overlay_id="o", layers=("layer0", "layer1", "layer2")),
        )
    )


def unmount(guest: GuestAgent) -> None:
    guest.overlay_unmount("o")
    for number in range(3):
        guest.layer_unmount(f"layer{number}")


# --- metrics


def test_metrics_tell_what_was_done(agent: AgentProcess, pack: Pack) -> None:
    with agent.client() as guest:
        mount_and_unmount(guest, pack)
        with pytest.raises(CallError):
            guest.layer_get("missing")
        during = samples(guest.metrics())
        unmount(guest)
        text = guest.metrics()
    after = samples(text)
    assert during['guestagent_layers{state="mounted"}'] == 3
    assert during["guestagent_overlays"] == 1
    assert during["guestagent_dm_devices"] == 6
    assert after["guestagent_dm_devices"] == 0
    assert after['guestagent_step_duration_seconds_count{step="device"}'] >= 1
    for step in ("superblock", "linear", "verity", "prove", "mount", "unmount", "remove"):
        assert after[f'guestagent_step_duration_seconds_count{{step="{step}"}}'] >= 3, step
        assert after[f'guestagent_step_duration_seconds_sum{{step="{step}"}}'] > 0, step
    assert after['guestagent_step_duration_seconds_count{step="overlay"}'] == 1
    assert after['guestagent_requests_total{method="layer.get",code="not_found"}'] == 1
    assert after['guestagent_requests_total{method="layer.unmount",code="ok"}'] == 3
    assert after['guestagent_events_total{kind="layer_mounted"}'] == 3
    assert after["guestagent_corruptions_total"] == 0
    assert 5 << 20 < after["process_resident_memory_bytes"] < 64 << 20
    judged = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")


def test_a_failed_step_is_counted(pack: Pack) -> None:
    with AgentProcess("fault=verity:EIO:1") as agent, agent.client() as guest:
        with pytest.raises(CallError):
            guest.layer_mount(pack.spec(0))
        found = samples(guest.metrics())
    assert found['guestagent_step_failures_total{step="verity"}'] == 1
    assert found['guestagent_requests_total{method="layer.mount",code="device"}'] == 1


def test_metrics_stay_within_their_cost(agent: AgentProcess, pack: Pack) -> None:
    """A scrape is short, and does not grow with what was done."""
    with agent.client() as guest:
        mount_and_unmount(guest, pack)
        unmount(guest)
        spent = []
        for _ in range(20):
            begin = time.perf_counter()
            text = guest.metrics()
            spent.append(time.perf_counter() - begin)
    sys.stdout.write(f"scrape: {sorted(spent)[10] * 1000:.2f} ms, {len(text)} bytes\n")
    assert len(text) < 128 * 1024


# --- the log and traces


def test_a_trace_goes_from_the_request_to_log_and_events(agent: AgentProcess, pack: Pack) -> None:
    with agent.client(traceparent=TRACE) as guest:
        guest.layer_mount(pack.spec(0))
        with pytest.raises(CallError):
            guest.layer_get("missing")
        guest.layer_unmount("layer0")
        traced = [line for line in guest.log().lines if line.fields.get("traceparent") == TRACE]
        assert {line.fields["method"] for line in traced} == {
            "layer.mount",
            "layer.get",
            "layer.unmount",
        }
        events = [event for event in guest.events().events if event.traceparent == TRACE]
        assert [event.kind for event in events] == ["layer_mounted", "layer_unmounted"]
    assert TRACE in agent.log.read_text()


def test_the_log_is_followed(agent: AgentProcess, pack: Pack) -> None:
    seen: queue.Queue[str] = queue.Queue()
    with agent.client() as guest, agent.client() as other:
        guest.follow_log(lambda line: seen.put(f"{line.text} {line.fields.get('method')}"))
        other.layer_mount(pack.spec(0))
        while seen.get(timeout=WAIT_SECONDS) != "request done layer.mount":
            pass
        other.layer_unmount("layer0")
        while seen.get(timeout=WAIT_SECONDS) != "request done layer.unmount":
            pass


def test_a_slow_follower_gets_all_that_is_kept(agent: AgentProcess) -> None:
    """Whoever reads late gets every line, or is told how many are gone."""
    with Client(agent.address, connect_seconds=20) as raw:
        raw.call("agent.hello", {"versions": [1]})
    gate, numbers, dropped = threading.Event(), [], []

    def take(method: str, params: dict[str, object]) -> None:
        gate.wait(WAIT_SECONDS)
        if method == "agent.log":
            numbers.extend(line["number"] for line in params["lines"])  # type: ignore[attr-defined, index]
            dropped.append(params["dropped"])

    with Client(agent.address, on_notification=take) as raw, agent.client() as guest:
        raw.call("agent.hello", {"versions": [1]})
        began = raw.call("agent.log", {"level": "debug", "follow": True, "since": 1 << 40})
        assert isinstance(began, dict)
        for _ in range(300):
            with pytest.raises(CallError):
                guest.layer_get("missing")
        gate.set()
        last = guest.log(level="debug", since=-1).next
        end = time.monotonic() + WAIT_SECONDS
        while (not numbers or numbers[-1] < last) and time.monotonic() < end:
            time.sleep(0.01)
    assert numbers == list(range(began["next"] + 1 + sum(dropped), numbers[-1] + 1))
    assert numbers[-1] >= last


def test_no_secret_reaches_the_log(agent: AgentProcess, pack: Pack) -> None:
    """A signature, good or bad, is nowhere in what can be read of the agent."""
    secret = b"\xde\xad\xbe\xef" * 16
    spec = pack.spec(0).to_wire()
    spec["verity"] = {**spec["verity"], "signature": secret}  # type: ignore[dict-item]
    with Client(agent.address, connect_seconds=20) as raw:
        raw.call("agent.hello", {"versions": [1]})
        for verity in (spec["verity"], {**spec["verity"], "signature": secret.hex() + "x"}):  # type: ignore[dict-item]
            with pytest.raises(CallError):
                raw.call("layer.mount", {**spec, "verity": verity}, deadline_ms=5000)
        lines = raw.call("agent.log", {"level": "debug"})
    told = json.dumps(lines) + agent.log.read_text()
    assert "deadbeefdeadbeef" not in told
    assert "\\xde\\xad" not in told


def test_json_to_a_host_that_comes_and_goes(tmp_path: Path, pack: Pack) -> None:
    path = tmp_path / "host"
    with AgentProcess("log_format=json", f"log_dial=unix://{path}") as agent:
        with agent.client() as guest:
            guest.layer_mount(pack.spec(0))
            first = _lines_at(path, until="request done")
            guest.layer_unmount("layer0")
            second = _lines_at(path, until="request done")
        printed = [json.loads(text) for text in agent.log.read_text().splitlines()]
    assert first[0]["stream"] == second[0]["stream"] == "guestagent.log"
    assert [line["text"] for line in first[1:]][:2] == ["engine ready", "serving"]
    assert first[-1]["fields"]["method"] == "layer.mount"
    assert second[-1]["fields"]["method"] == "layer.unmount"
    assert second[1]["number"] == first[-1]["number"] + 1
    assert {"engine ready", "serving", "request done"} <= {line["text"] for line in printed}


def _lines_at(path: Path, *, until: str) -> list[dict[str, object]]:
    """Listen for one connection, take lines to the first ``until``, acknowledge, and go."""
    path.unlink(missing_ok=True)
    lines: list[dict[str, object]] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(WAIT_SECONDS)
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as stream:
            sock.settimeout(WAIT_SECONDS)
            for text in stream:
                lines.append(json.loads(text))
                if lines[-1].get("text") == until:
                    sock.sendall(b"%d\n" % lines[-1]["number"])
                    break
    path.unlink()
    return lines


def test_the_log_reaches_the_kernels(pack: Pack) -> None:
    with AgentProcess("log_to=kmsg") as agent:
        with agent.client() as guest:
            guest.layer_mount(pack.spec(0))
            guest.layer_unmount("layer0")
            guest.shutdown("exit")
        assert agent.wait() == 0  # an orderly end writes the lines that are queued
        assert agent.log.read_text() == ""
    kernel = run("dmesg")
    assert "guestagent: engine ready" in kernel
    assert "guestagent: request done method=layer.mount" in kernel


# --- crashes


def test_a_crash_is_reported_by_the_next_life(agent: AgentProcess, pack: Pack) -> None:
    with agent.client() as guest:
        mount_and_unmount(guest, pack)
        assert guest.crashes().total == 0
    assert agent.process is not None
    os.kill(agent.process.pid, signal.SIGSEGV)
    agent.wait()
    agent.start()
    with agent.client() as guest:
        (report,) = guest.crashes().crashes
        unmount(guest)
        texts = [line.text for line in guest.log(level="debug").lines]
    assert (report.kind, report.signal) == ("death", "SIGSEGV")
    assert "serve_forever" in report.traceback
    assert sorted(report.layers) == [
        f"layer{number} at /run/layers/layer{number}" for number in range(3)
    ]
    assert report.overlays == ("o at /run/overlays/o",)
    done = [line.fields.get("method") for line in report.log if line.text == "request done"]
    assert done[0] == "layers.mount"
    # the log goes on over the crash
    assert texts.count("engine ready") == 2


def test_the_request_that_killed_it_is_named(pack: Pack) -> None:
    with AgentProcess("fault=verity:KILL:1") as agent:
        with agent.client(traceparent=TRACE) as guest, pytest.raises(Exception, match="ended"):
            guest.layer_mount(pack.spec(0))
        agent.wait()
        agent.settings = ()
        agent.start()
        with agent.client() as guest:
            (report,) = guest.crashes().crashes
    (request,) = report.requests
    assert request.startswith("layer.mount msgid=")
    assert "layer_id=layer0" in request
    assert TRACE in request
    assert report.unfinished == ("layer0 at /run/layers/layer0",)


def test_under_pid_one(pack: Pack) -> None:
    """PID 1 starts the agent again, and knows what ended it."""
    with SupervisedAgent("log=error") as agent:
        with agent.client() as guest:
            guest.layer_mount(pack.spec(0))
            before = guest.status().pid
        agent.kill_child()
        end = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < end:
            with agent.client() as guest:
                if guest.status().pid != before:
                    break
        with agent.client() as guest:
            (report,) = guest.crashes().crashes
            assert guest.status().restarts == 1
            guest.layer_unmount("layer0")
        assert report.pid == before
        assert (report.kind, report.signal, report.status) == ("death", "SIGKILL", -9)
        assert report.layers == ("layer0 at /run/layers/layer0",)
        agent.end()
        assert agent.wait() == 0


# --- guestctl, on a real agent


def guestctl(agent: AgentProcess, *words: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "guestctl", "--connect", agent.address, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_layer_is_checked_through_verity(agent: AgentProcess, pack: Pack) -> None:
    with agent.client() as guest:
        guest.layer_mount(pack.spec(3))
    done = guestctl(agent, "layer", "check", "layer3")
    assert (done.returncode, done.stdout[:20]) == (0, "layer layer3: intact"), done.stderr
    with flipped_bit(pack, 3):
        done = guestctl(agent, "layer", "check", "layer3")
        assert done.returncode == 1
        assert done.stdout.startswith("layer layer3: corrupt: blocks "), done.stderr
        assert guestctl(agent, "status", "--json").returncode == 0
        with agent.client() as guest:
            end = time.monotonic() + WAIT_SECONDS
            while time.monotonic() < end:
                found = samples(guest.metrics())
                if found.get('guestagent_layers{state="corrupted"}') == 1:
                    break
            assert found["guestagent_corruptions_total"] >= 1
            assert "corrupted" in guestctl(agent, "status").stdout
            guest.layer_unmount("layer3")


@contextlib.contextmanager
def flipped_bit(pack: Pack, number: int) -> Iterator[None]:
    """Change a byte that nothing reads when the layer is mounted."""
    marker = pack.layers[number].marker * 3
    image = pack.image.read_bytes()
    start = pack.layers[number].mapping.offset_bytes
    place = image.index(marker, start)
    for byte in (image[place] ^ 1, image[place]):
        with pack.image.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
            file.flush()
            os.fsync(file.fileno())
        if byte != image[place]:
            yield


def test_guestctl_receives_the_log_once(tmp_path: Path, pack: Pack) -> None:
    """It may come late and go in between; every line comes, and comes once."""
    path = tmp_path / "host"
    with AgentProcess(f"log_dial=unix://{path}") as agent, agent.client() as guest:
        numbers: list[int] = []
        for _ in range(3):
            guest.layer_mount(pack.spec(0))
            guest.layer_unmount("layer0")
            numbers += _received(path, "request done")
        last = guest.log(-1, level="debug").next
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= 2 + 6
    assert numbers[-1] <= last


def _received(path: Path, until: str) -> list[int]:
    """Listen with guestctl until two more such lines have come; return the numbers of all."""
    words = ["log", "--listen", f"unix://{path}", "--json"]
    command = [Path(sys.executable).parent / "guestctl", *words]
    numbers, seen = [], 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        while seen < 2:
            line = json.loads(process.stdout.readline())
            numbers.append(line["number"])
            seen += line["text"] == until
        process.send_signal(signal.SIGINT)
        numbers += [json.loads(text)["number"] for text in process.stdout]
        assert process.wait(WAIT_SECONDS) == 0
    assert not path.exists()
    return numbers
