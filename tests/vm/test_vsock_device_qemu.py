"""The vsock device behind a real kernel: a whole machine in QEMU."""

import shutil

import pytest

from tests.beds.vsock_cases import DeviceCases, echo_speed
from tests.beds.vsock_guest import ECHO
from tests.beds.vsockbed import QemuBed

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no QEMU here"),
]


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with QemuBed(tmp_path_factory.mktemp("bed")) as made:
        made.start_guest()
        yield made


class TestQemu(DeviceCases):
    echo_bytes = 1 << 30

    def test_a_pause_does_not_cut_connections(self, bed):
        with bed.dial(ECHO) as sock:
            sock.sendall(b"before")
            assert sock.recv(64) == b"before"
            bed.qmp("stop")
            sock.sendall(b"meanwhile")
            bed.qmp("cont")
            assert sock.recv(64) == b"meanwhile"

    def test_a_driver_that_loads_again_starts_afresh(self, bed):
        with bed.dial(ECHO) as sock:
            sock.sendall(b"before")
            assert sock.recv(64) == b"before"
            bed.rebind()
            assert sock.recv(64) == b""
        echo_speed(bed, 8 << 20)
