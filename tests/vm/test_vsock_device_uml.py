"""The vsock device behind a real kernel: User Mode Linux."""

import shutil

import pytest

from tests.beds.vsock_cases import DeviceCases
from tests.beds.vsockbed import UmlBed

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("linux.uml") is None, reason="no User Mode Linux here"),
]


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    with UmlBed(tmp_path_factory.mktemp("bed")) as made:
        made.start_guest()
        yield made


class TestUml(DeviceCases):
    echo_bytes = 1 << 30
