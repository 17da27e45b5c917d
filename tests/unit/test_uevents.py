"""Device events: the kernel's message format."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage.uevents import Uevent, UeventSocket, attach_disk_filter, parse

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
def test_uevent_parse_ignores_malformed_messages(message: bytes) -> None:
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


def change(number: int, what: str) -> str:
    """Return a change event of a dm device as the kernel words it."""
    path = f"/devices/virtual/block/dm-{number}"
    rest = ("ACTION=change", f"DEVPATH={path}", "SUBSYSTEM=block", what, "MINOR=3", "SEQNUM=9")
    return "\0".join((f"change@{path}", *rest))


def test_the_filter_leaves_out_what_dm_does_and_nothing_of_disks() -> None:
    """The kernel runs the same filter on any kind of socket."""
    kept = (
        "add@/devices/virtual/block/loop0",
        "remove@/devices/virtual/block/loop0",
        "add@/devices/pci0000:00/0000:00:03.0/virtio1/block/vda",
        "remove@/devices/pci0000:00/0000:00:03.0/virtio1/block/vda/vda1",
        "add@/devices/LNXSYSTM:00/ACPI0012:00/ndbus0/region0/namespace0.0/block/pmem0",
        *(change(number, "DM_VERITY_ERR_BLOCK_NR=0,17") for number in (3, 12, 345, 1048575)),
        change(3, "DM_VERITY_ERR_BLOCK_NR=1,9"),
        change(3, "DISK_RO=1"),
        "change@/devices/pci0000:00/0000:00:03.0/virtio1/block/vda",
        "move@/devices/virtual/block/dm-3",
    )
    dropped = (
        "add@/devices/virtual/block/dm-3",
        "remove@/devices/virtual/block/dm-12",
        *(change(number, "MAJOR=254") for number in (3, 12, 345, 6789, 12345, 678901, 1048575)),
        *(change(number, "RESIZE=1") for number in (3, 12, 345, 1048575)),
        "change@/devices/virtual/bdi/254:3",
        "add@/devices/virtual/bdi/254:3",
        "remove@/devices/virtual/bdi/254:3",
        "add@/kernel/slab/:0000192",
        "remove@/kernel/slab/:0000192",
        "add@/module/dm_verity",
        "add@/fs/erofs/dm-1",
    )
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with reader, writer:
        reader.setblocking(False)
        attach_disk_filter(reader)
        for text in (*dropped, *kept, *dropped):
            writer.send(text.encode() + b"\0SUBSYSTEM=block\0" + bytes(80))
        came = []
        while len(came) < len(kept) + 1:
            try:
                message, _, _ = reader.recv(4096).rpartition(b"\0SUBSYSTEM")
                came.append(message.decode())
            except BlockingIOError:
                break
    assert came == list(kept)
