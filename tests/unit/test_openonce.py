"""Descriptors that are opened once for many."""

import os

import pytest

from guestagent.storage.openonce import OpenOnce


def is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_path_is_opened_once(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    with OpenOnce() as held:
        assert held.get(str(path)) is None
        fd = held.open(str(path))
        path.unlink()
        assert held.open(str(path)) == held.get(str(path)) == fd
        assert os.pread(fd, 9, 0) == b"first"
        assert not os.get_inheritable(fd)
    assert not is_open(fd)
    held.close()


def test_what_cannot_be_opened_is_not_held(tmp_path):
    with OpenOnce() as held:
        with pytest.raises(FileNotFoundError):
            held.open(str(tmp_path / "none"))
        assert held.get(str(tmp_path / "none")) is None


def test_a_descriptor_is_taken_over_and_the_one_before_closed():
    first, second = os.open("/", os.O_PATH), os.open("/", os.O_PATH)
    with OpenOnce() as held:
        held.keep("/", first)
        held.keep("/", second)
        assert (is_open(first), held.get("/")) == (False, second)
        held.forget("/")
        held.forget("/")
        assert (is_open(second), held.get("/")) == (False, None)
