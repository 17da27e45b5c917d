import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsock.address import (
    HybridAddress,
    SerialAddress,
    UnixAddress,
    VsockAddress,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("vsock://3:1024", VsockAddress(cid=3, port=1024)),
        ("vsock://any:1024", VsockAddress(cid=None, port=1024)),
        ("vsock://-1:1024", VsockAddress(cid=None, port=1024)),
        ("vsock://host:1", VsockAddress(cid=2, port=1)),
        ("vsock://local:0", VsockAddress(cid=1, port=0)),
        ("vsock://4294967294:4294967294", VsockAddress(cid=2**32 - 2, port=2**32 - 2)),
        ("unix:///run/a.sock", UnixAddress(path="/run/a.sock")),
        ("unix://@name", UnixAddress(path="@name")),
        ("hybrid:///run/v.sock:52", HybridAddress(path="/run/v.sock", port=52)),
        ("hybrid:///run/a:b:52", HybridAddress(path="/run/a:b", port=52)),
        ("serial:///dev/virtio-ports/agent", SerialAddress(path="/dev/virtio-ports/agent")),
    ],
)
def test_every_form_is_read_and_written_back(text, address):
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected vsock://"),
        ("vsock:3:4", "expected vsock://"),
        ("tcp://127.0.0.1:4", "expected vsock://"),
        ("vsock://3", "the port is missing"),
        ("vsock://:4", "CID '' is not"),
        ("vsock://3:", "port '' is not"),
        ("vsock://0:4", "CID 0 is reserved"),
        ("vsock://4294967295:4", "CID 4294967295 is outside"),
        ("vsock://3:4294967295", "port 4294967295 is outside"),
        ("vsock://3:99999999999", "port '99999999999' is not a 32-bit number"),
        ("vsock://3:+4", "port '+4' is not"),
        ("vsock://3:1_0", "port '1_0' is not"),
        ("vsock://3: 4", "port ' 4' is not"),
        ("vsock://٣:4", "CID '٣' is not"),
        ("vsock://guest:4", "CID 'guest' is not"),
        ("unix://relative", "neither absolute nor @name"),
        ("unix://", "neither absolute nor @name"),
        ("unix://@", "neither absolute nor @name"),
        ("unix:///a\0b", "holds a NUL"),
        ("unix:///" + "x" * 107, "longer than 107 bytes"),
        ("unix:///" + "é" * 54, "longer than 107 bytes"),
        ("hybrid:///run/v.sock", "the port is missing"),
        ("hybrid://@name:5", "is not absolute"),
        ("hybrid:///" + "x" * 104 + ":52", "longer than 107 bytes"),
        ("serial://ttyS0", "is not absolute"),
    ],
)
def test_parse_address_error_names_the_problem(text, problem):
    with pytest.raises(ValueError, match="address") as caught:
        parse_address(text)
    assert problem in str(caught.value)


def test_the_longest_socket_path_is_accepted():
    assert parse_address("unix:///" + "x" * 106) == UnixAddress(path="/" + "x" * 106)


@given(st.text())
def test_any_text_is_an_address_or_a_value_error(text):
    for candidate in (text, "vsock://" + text, "unix://" + text, "hybrid:///" + text):
        try:
            address = parse_address(candidate)
        except ValueError:
            continue
        assert parse_address(str(address)) == address
