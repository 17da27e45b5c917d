"""Where the agent listens: sockets that PID 1 holds, and addresses that come late or never."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from guestagent.api.agent import AGENT_PORT
from guestagent.api.console import CONSOLE_PORT
from guestagent.host.client import GuestAgent
from tests.beds.agentbed import AgentProcess
from tests.beds.supervised import SupervisedAgent
from vsock.errors import ConnectionClosed

WAIT_SECONDS = 60.0
PORT = 7654


def restarted(bed: AgentProcess, listen: str) -> None:
    """Start the agent anew, listening on ``listen``."""
    bed.stop()
    bed.start(f"listen={listen}")


def test_nothing_takes_the_port_while_no_agent_lives() -> None:
    with SupervisedAgent() as bed:
        restarted(bed, f"{bed.address},vsock://any:{PORT}")
        with bed.client() as guest:
            before = guest.status().pid
        bed.stop_init()
        bed.kill_child()
        with socket.socket(socket.AF_VSOCK) as other, pytest.raises(OSError, match="in use"):
            other.bind((socket.VMADDR_CID_ANY, PORT))
        with socket.socket(socket.AF_UNIX) as early:
            early.connect(bed.socket)  # waits for the next agent
            bed.continue_init()
            early.settimeout(WAIT_SECONDS)
            early.sendall(b"\xc1")  # no MessagePack: the answer is an error
            assert early.recv(1) != b""
        with bed.client() as guest:
            assert guest.status().pid != before
            assert guest.status().restarts == 1
        bed.end()
        assert bed.wait() == 0


@pytest.mark.parametrize("port", [AGENT_PORT, CONSOLE_PORT])
def test_no_unprivileged_process_may_take_a_default_port(port: int) -> None:
    code = (
        "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_VSOCK); "
        f"s.bind((socket.VMADDR_CID_ANY, {port}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Permission denied" in done.stderr


@pytest.mark.parametrize("bed_class", [AgentProcess, SupervisedAgent])
def test_a_process_of_the_guest_is_served_by_vsock_only_if_that_is_configured(
    bed_class: type[AgentProcess],
) -> None:
    local = f"vsock://local:{PORT}"
    with bed_class() as bed:
        restarted(bed, f"vsock://any:{PORT},{bed.address}")
        with bed.client() as guest:
            with pytest.raises(ConnectionClosed):
                GuestAgent(local, connect_seconds=0.5)
            texts = [line.text for line in guest.log(level="debug").lines]
            assert "peer refused" in texts
        bed.stop()
        bed.start(f"listen=vsock://any:{PORT}", "vsock_peers=host,local")
        with GuestAgent(local, connect_seconds=WAIT_SECONDS) as guest:
            assert guest.status().state == "ready"


@pytest.mark.parametrize("bed_class", [AgentProcess, SupervisedAgent])
def test_missing_listen_address_is_a_problem_until_it_exists(
    bed_class: type[AgentProcess],
) -> None:
    late = Path(f"/run/late-{os.getpid()}")
    address = f"unix://{late}/socket"
    with bed_class() as bed:
        restarted(bed, f"serial:///dev/virtio-ports/none,{address},{bed.address}")
        with bed.client() as guest:
            status = guest.status()
            assert (status.state, status.restarts) == ("degraded", 0)
            absent, without_directory = status.problems
            assert "serial:///dev/virtio-ports/none: No such file" in absent
            assert f"{address}: No such file" in without_directory
        late.mkdir()
        try:
            with GuestAgent(address, connect_seconds=WAIT_SECONDS) as guest:
                assert guest.status().problems == (absent,)
        finally:
            with contextlib.suppress(FileNotFoundError):
                Path(late, "socket").unlink()
            late.rmdir()


def test_a_plain_process_that_can_listen_nowhere_ends() -> None:
    with AgentProcess() as bed:
        restarted(bed, "unix:///no/such/directory/socket")
        assert bed.wait() == 1
        assert "unix:///no/such/directory/socket" in bed.log.read_text()


def test_a_signal_ends_the_attempts() -> None:
    with AgentProcess() as bed:
        restarted(bed, f"{bed.address},serial:///dev/virtio-ports/none")
        with bed.client() as guest:
            guest.status()
        assert bed.process is not None
        bed.process.send_signal(signal.SIGTERM)
        assert bed.wait() == 0
