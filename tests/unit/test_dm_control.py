"""The device-mapper ioctls on made-up answers: layouts, growth of the buffer, old kernels."""

import errno
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage import syscalls
from guestagent.storage.devicemapper import control as control_module
from guestagent.storage.devicemapper import devices, dmioctl
from guestagent.storage.devicemapper.control import Control
from guestagent.storage.devicemapper.targets import Target
from vsock.deadline import Deadline

Ioctl = Callable[[int, bytearray], None]
FULL = dmioctl.DM_BUFFER_FULL_FLAG


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Ioctl], Control]]:
    """Make a Control whose ioctls go to a function (number, buffer)."""
    made: list[Control] = []

    def make(answer: Ioctl) -> Control:
        def ioctl(fd: int, request: int, buffer: bytearray, filename: object, call: str) -> int:
            assert request & ~0xFF == 0xC138FD00  # _IOWR(0xfd, n, 312 bytes)
            answer(request & 0xFF, buffer)
            return 0

        monkeypatch.setattr(syscalls, "ioctl", ioctl)
        made.append(Control("/dev/null"))
        return made[-1]

    yield make
    for control in made:
        control.close()


def answer_with(buffer: bytearray, data: bytes, *, flags: int = 0, count: int = 0) -> None:
    """Fill the buffer as the kernel does: cut and flagged if the data do not fit."""
    room = len(buffer) - dmioctl.HEADER.size
    if len(data) > room:
        flags |= FULL
    struct.pack_into("=I", buffer, 12, dmioctl.HEADER.size + min(len(data), room))
    struct.pack_into("=I", buffer, 20, count)
    struct.pack_into("=I", buffer, 28, flags)
    buffer[dmioctl.HEADER.size :] = data[:room].ljust(room, b"\0")


def spec(start: int, length: int, kind: str, params: str, next_at: int) -> bytes:
    text = params.encode() + b"\0"
    head = struct.pack("=QQiI16s", start, length, 0, next_at, kind.encode())
    return (head + text).ljust((len(head) + len(text) + 7) & ~7, b"\0")


def test_layouts_are_those_of_the_header() -> None:
    assert dmioctl.HEADER.size == 312
    target = Target(start_sectors=8, length_sectors=16, target_type="linear", params="7:0 0")
    packed = dmioctl.pack_target(target)
    assert len(packed) == 48
    assert struct.unpack_from("=QQiI16s", packed) == (8, 16, 0, 48, b"linear".ljust(16, b"\0"))
    assert packed[40:] == b"7:0 0\0\0\0"


def test_specs_of_an_answer_are_counted_from_its_start(
    kernel: Callable[[Ioctl], Control],
) -> None:
    first = spec(0, 8, "linear", "7:0 0", 48)
    second = spec(8, 8, "error", "", 96)
    control = kernel(lambda number, buffer: answer_with(buffer, first + second, count=2))
    assert [target.line() for target in control.table("x")] == ["0 8 linear 7:0 0", "8 8 error"]


def test_the_buffer_grows_until_the_answer_fits(kernel: Callable[[Ioctl], Control]) -> None:
    params = "x" * 100_000
    sizes = []

    def answer(number: int, buffer: bytearray) -> None:
        sizes.append(len(buffer))
        answer_with(buffer, spec(0, 8, "huge", params, 100_048), count=1)

    assert kernel(answer).table("x")[0].params == params
    assert sizes == [1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10]


def test_a_table_of_many_targets_is_read_by_two_calls(kernel: Callable[[Ioctl], Control]) -> None:
    entries, sizes = [], []
    for number in range(4096):
        params = f"4095:1048575 {(1 << 64) - 1}"
        entries.append(spec(number * 8, 8, "linear", params, 0))
    for number, entry in enumerate(entries):  # "next" counts from the start of the answer
        entries[number] = entry[:20] + struct.pack("=I", (number + 1) * len(entry)) + entry[24:]

    def answer(number: int, buffer: bytearray) -> None:
        sizes.append(len(buffer))
        answer_with(buffer, b"".join(entries), count=len(entries))

    table = kernel(answer).table("x")
    assert len(table) == len(entries)
    assert table[-1].start_sectors == 4095 * 8
    assert len(sizes) == 2


def test_a_kernel_that_never_has_enough_is_an_error(kernel: Callable[[Ioctl], Control]) -> None:
    control = kernel(lambda number, buffer: answer_with(buffer, b"", flags=FULL))
    with pytest.raises(OSError, match="exceeds") as caught:
        control.table("x")
    assert caught.value.errno == errno.EOVERFLOW


def test_calls_without_an_answer_carry_no_room(kernel: Callable[[Ioctl], Control]) -> None:
    sizes = []
    control = kernel(lambda number, buffer: sizes.append(len(buffer)))
    control.resume("x")
    control.load_table(
        "x", [Target(start_sectors=0, length_sectors=1, target_type="error")], readonly=True
    )
    assert sizes == [312, 312 + 48]


def name_entry(dev: int, name: str, uuid: str | None, *, last: bool, told: bool = True) -> bytes:
    text = name.encode() + b"\0"
    body = text.ljust((12 + len(text) + 7) // 8 * 8 - 12, b"\0")
    body += struct.pack("=II", 5, 0 if not told else 2 if uuid is None else 1)
    if uuid is not None and told:
        body += uuid.encode() + b"\0"
    size = (12 + len(body) + 7) // 8 * 8
    return (struct.pack("=QI", dev, 0 if last else size) + body).ljust(size, b"\0")


def versioned(version: tuple[int, int, int], entries: bytes) -> Ioctl:
    def answer(number: int, buffer: bytearray) -> None:
        struct.pack_into("=3I", buffer, 0, *version)
        if number == dmioctl.DM_LIST_DEVICES:
            answer_with(buffer, entries)
        elif number == dmioctl.DM_DEV_STATUS:
            name = dmioctl.until_nul(bytes(buffer[48:176]))
            if name == "gone":
                raise OSError(errno.ENXIO, "No such device", name)
            buffer[176 : 176 + 7] = b"asked-" + name[-1:].encode()

    return answer


def test_listed_uuids(kernel: Callable[[Ioctl], Control]) -> None:
    entries = name_entry(0xFD00, "a", "uuid-a", last=False)
    entries += name_entry(0x1FD2A | 0x100000, "long-name-b", None, last=True)
    control = kernel(versioned((4, 47, 0), entries))
    assert control.list_devices() == (("a", "253:0", "uuid-a"), ("long-name-b", "509:298", ""))


def test_an_old_kernel_is_asked_for_each_uuid(kernel: Callable[[Ioctl], Control]) -> None:
    """Before interface 4.45 what follows the event number is not a flag but the next entry."""
    entries = name_entry(0xFD00, "a", None, last=False, told=False)
    entries += name_entry(0xFD01, "gone", None, last=False, told=False)
    entries += name_entry(0xFD02, "b", None, last=True, told=False)
    control = kernel(versioned((4, 41, 0), entries))
    assert control.list_devices() == (("a", "253:0", "asked-a"), ("b", "253:2", "asked-b"))


def test_no_devices_and_no_versions(kernel: Callable[[Ioctl], Control]) -> None:
    control = kernel(versioned((4, 47, 0), bytes(16)))
    assert control.list_devices() == ()
    control = kernel(lambda number, buffer: answer_with(buffer, bytes(40)))
    assert control.list_versions() == {}


def test_target_versions(kernel: Callable[[Ioctl], Control]) -> None:
    data = struct.pack("=4I", 24, 1, 9, 0) + b"verity\0\0"
    data += struct.pack("=4I", 0, 1, 4, 0) + b"linear\0\0"
    control = kernel(lambda number, buffer: answer_with(buffer, data))
    assert control.list_versions() == {"verity": (1, 9, 0), "linear": (1, 4, 0)}


def test_each_field_of_a_device_is_read_from_its_place() -> None:
    """struct dm_ioctl, written out by offsets."""
    buffer = bytearray(dmioctl.HEADER.size)
    struct.pack_into("=5I", buffer, 0, 4, 47, 1, 312, 312)
    struct.pack_into("=IiII", buffer, 20, 3, 5, dmioctl.DM_READONLY_FLAG, 7)
    struct.pack_into("=Q", buffer, 40, dmioctl.encode_dev(253, 300))
    buffer[48:52], buffer[176:180] = b"name", b"uuid"
    reply = dmioctl.Reply(buffer)
    assert (reply.version, reply.flags, reply.data) == ((4, 47, 1), 1, b"")
    assert reply.info.as_dict() == {
        "name": "name",
        "uuid": "uuid",
        "dev": "253:300",
        "node": "/dev/dm-300",
        "readonly": True,
        "suspended": False,
        "live_table": False,
        "inactive_table": False,
        "open_count": 5,
        "event_number": 7,
        "target_count": 3,
        "deferred_remove": False,
    }


@given(data=st.binary(max_size=300), count=st.integers(0, 4))
def test_garbage_in_an_answer_is_no_crash(data: bytes, count: int) -> None:
    """The kernel is trusted, the parser is bounded all the same: a value or one of its errors."""
    buffer = bytearray(dmioctl.HEADER.size) + data
    struct.pack_into("=III", buffer, 12, len(buffer), dmioctl.HEADER.size, count)
    reply = dmioctl.Reply(buffer)
    assert (reply.data, reply.info.target_count) == (data, count)
    for parse in (dmioctl.unpack_targets, lambda reply: dmioctl.unpack_names(reply, True)):
        try:
            parse(reply)
        except (struct.error, ValueError):
            continue


@pytest.mark.parametrize("major", [0, 7, 253, 259, 4095])
@pytest.mark.parametrize("minor", [0, 255, 256, 4242, (1 << 20) - 1])
def test_device_numbers(major: int, minor: int) -> None:
    assert dmioctl.format_dev(dmioctl.encode_dev(major, minor)) == f"{major}:{minor}"


@pytest.mark.parametrize("name", ["", "a" * 128, "a b", "a/b", "a\n", "a\0", "\u00e4", "a\\b"])
def test_new_names_are_plain_words(kernel: Callable[[Ioctl], Control], name: str) -> None:
    control = kernel(lambda number, buffer: pytest.fail("the kernel was asked"))
    with pytest.raises(ValueError, match="device-mapper name"):
        control.create(name, "uuid")
    with pytest.raises(ValueError, match="device-mapper uuid"):
        control.create("x", name + "b" if len(name) == 128 else name)


def test_names_of_others_are_bounded_only(kernel: Callable[[Ioctl], Control]) -> None:
    asked = []
    control = kernel(lambda number, buffer: asked.append(bytes(buffer[48:53])))
    control.info("a b\u00e4")
    assert asked == [b"a b\xc3\xa4"]
    for name in ("a" * 128, "a\0b"):
        with pytest.raises(ValueError, match="at most 127 bytes"):
            control.info(name)
    with pytest.raises(ValueError, match="either"):
        control.find()
    with pytest.raises(ValueError, match="empty"):
        control.load_table("x", [], readonly=True)


def test_other_errors_of_a_search_are_not_swallowed(kernel: Callable[[Ioctl], Control]) -> None:
    def refuse(number: int, buffer: bytearray) -> None:
        raise OSError(errno.EACCES, "Permission denied", "x")

    with pytest.raises(PermissionError):
        kernel(refuse).find(name="x")


def test_no_device_mapper_is_enodev(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "_misc_minor", lambda name: None)
    with pytest.raises(OSError, match="no device-mapper") as caught:
        Control("/nonexistent/control")
    assert caught.value.errno == errno.ENODEV


def test_messages(kernel: Callable[[Ioctl], Control]) -> None:
    sent = []

    def answer(number: int, buffer: bytearray) -> None:
        sent.append(bytes(buffer[312 : 312 + 14]))
        answer_with(buffer, b"an answer\0rest", flags=dmioctl.DM_DATA_OUT_FLAG)

    control = kernel(answer)
    assert control.message("x", 3, "hello") == "an answer"
    assert sent == [struct.pack("=Q", 3) + b"hello\0"]
    with pytest.raises(ValueError, match="null byte"):
        control.message("x", 0, "a\0b")


def test_a_removal_that_came_before_it_was_taken_back_is_a_removal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last user closes the device between the deadline and the cancelling of the removal."""

    class Racing:
        def info(self, name: str) -> object:
            return type("Info", (), {"deferred_remove": False})()

        def remove(self, name: str, *, deferred: bool = False) -> bool:
            if not deferred:
                raise OSError(errno.EBUSY, "Device or resource busy", name)
            return False

        def cancel_deferred_remove(self, name: str) -> None:
            raise OSError(errno.ENXIO, "No such device", name)

    def late(*_: object, **__: object) -> None:
        deadline = Deadline(0.0)
        deadline.check("wait")

    monkeypatch.setattr(devices, "wait_gone", late)
    monkeypatch.setattr(devices, "_look", lambda control: ([], set()))
    assert devices.remove_device(Racing(), "x", Deadline(0.0))  # type: ignore[arg-type]
    monkeypatch.setattr(devices, "_look", lambda control: ([], {"dm-1"}))
    with pytest.raises(OSError, match="still in use"):
        devices.remove_device(Racing(), "x", Deadline(0.0))  # type: ignore[arg-type]


def test_an_undo_that_fails_does_not_hide_what_failed_first() -> None:
    class Broken:
        def create(self, name: str, uuid: str) -> None:
            pass

        def load_table(self, name: str, targets: object, *, readonly: bool) -> None:
            raise OSError(errno.EINVAL, "Invalid argument", name)

        def remove(self, name: str, *, deferred: bool) -> bool:
            raise OSError(errno.ENOMEM, "Out of memory", name)

    target = Target(start_sectors=0, length_sectors=8, target_type="error")
    with pytest.raises(devices.DmStepError, match="Invalid argument") as caught:
        devices.create_device(Broken(), name="x", uuid="u", targets=[target])  # type: ignore[arg-type]
    assert (caught.value.step, caught.value.errno) == ("dm-load", errno.EINVAL)
    assert "table: 0 8 error" in str(caught.value)
    assert any(
        "stays behind" in note and "Out of memory" in note for note in caught.value.__notes__
    )
