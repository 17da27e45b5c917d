"""The kernel log: the record format, marks, and logs that cannot be had."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.storage.kmsg import KernelLog, parse_record


def test_records() -> None:
    record = b"3,339,5140900,-;dm-1: bad\\x0a line\n SUBSYSTEM=block\n DEVICE=b253:1\n"
    assert parse_record(record) == (339, "dm-1: bad\\x0a line")
    assert parse_record(b"6,1,2,-,caller=T1;text; with semicolon\n") == (1, "text; with semicolon")
    assert parse_record(b"4,7,2,-;\xff\n") == (7, "\\xff")


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"text",
        b"6,1;text",
        b"x,1,2,-;text",
        b"6,x,2,-;text",
        b"14,1,2,-;from a process",
        b"7,1,2,-;debug",
    ],
)
def test_parse_record_ignores_malformed_records(record: bytes) -> None:
    assert parse_record(record) is None


@given(st.binary(max_size=100))
def test_any_bytes(record: bytes) -> None:
    parse_record(record)


def test_a_log_that_cannot_be_had_is_empty(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "none"))
    assert log.since(log.mark()) == ()
    log.close()


def test_marks_part_the_lines(tmp_path: Path) -> None:
    """A socket gives messages as the device does: one a read, and EAGAIN at the end."""
    (tmp_path / "kmsg").touch()
    log = KernelLog(str(tmp_path / "kmsg"))
    ours, kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
    with ours, kernel:
        os.dup2(ours.fileno(), log._fd, inheritable=False)
        kernel.send(b"6,10,1,-;before\n")
        mark = log.mark()
        assert log.since(mark) == ()
        kernel.send(b"3,11,2,-;after\n")
        assert log.since(mark) == ("after",)
        later = log.mark()
        kernel.send(b"12,12,2,-;a process\n")
        kernel.send(b"3,13,2,-;later\n")
        assert log.since(later) == ("later",)
        assert log.since(mark) == ("after", "later")
        for number in range(300):
            kernel.send(b"3,%d,2,-;line %d\n" % (number + 20, number))
            log.mark()
        assert len(log.since(mark)) == 256
        assert log.since(mark)[-1] == "line 299"
    log.close()
    log.close()
