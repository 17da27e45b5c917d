"""Device events: the kernel's message format."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage.uevents import Uevent, UeventSocket, parse

MESSAGE = (
    b"add@/devices/virtual/block/dm-0\0ACTION=add\0DEVPATH=/devices/virtual/block/dm-0\0"
    b"SUBSYSTEM=block\0MAJOR=253\0MINOR=0\0DEVNAME=dm-0\0DEVTYPE=disk\0SEQNUM=1234\0"
)


def test_a_message() -> None:
    event = parse(MESSAGE)
    assert event is not None
    assert (event.action, event.devpath, event.subsystem) == (
        "add",
        "/devices/virtual/block/dm-0",
        "block",
    )
    assert event.fields["DEVNAME"] == "dm-0"
    assert event.fields["SEQNUM"] == "1234"


def test_values_may_hold_anything() -> None:
    event = parse(b"change@/x\0A=b=c\0NOVALUE\0EMPTY=\0ODD=\xff\0")
    assert event is not None
    assert event.fields == {"A": "b=c", "EMPTY": "", "ODD": "\udcff"}


@pytest.mark.parametrize(
    "message", [b"", b"\0", b"libudev\0\xfe\xed\xca\xfe", b"add", b"@/x", b"add@relative"]
)
def test_what_is_no_message(message: bytes) -> None:
    assert parse(message) is None


@given(st.binary(max_size=200))
def test_any_bytes(message: bytes) -> None:
    event = parse(message)
    assert event is None or isinstance(event, Uevent)


def test_a_socket_that_has_heard_nothing() -> None:
    with UeventSocket() as events:
        assert events.fileno() >= 0
        events.receive()
    events.close()
