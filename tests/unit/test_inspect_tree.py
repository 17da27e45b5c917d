"""Whole trees: checksums, what they hold, and what must not happen on the way."""

import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from inspectbed import serving

from guestagent.client import GuestAgent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "etc" / "deep" / "er").mkdir(parents=True)
    (top / "etc" / "motd").write_bytes(b"hello\n")
    (top / "etc" / "deep" / "er" / "big").write_bytes(b"x" * 300_000)
    (top / "empty").write_bytes(b"")
    (top / "link").symlink_to("/etc/motd")
    os.mkfifo(top / "fifo")
    (top / os.fsdecode(b"na\xffme")).write_bytes(b"odd")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(top / "socket"))
    return top


@pytest.fixture
def guest(tmp_path: Path, tree: Path) -> Iterator[GuestAgent]:
    bed = serving(tmp_path / "agent.sock", {"base": tree}, {"all": tree})
    with bed as running, GuestAgent(running.address) as handle:
        yield handle


def test_checksums_are_those_of_hashlib(guest: GuestAgent, tree: Path) -> None:
    entries = guest.fs_checksums(layer_id="base")
    expected = {}
    for directory, directories, files in os.walk(os.fsencode(tree)):
        for name in directories + files:
            path = os.path.join(directory, name)
            digest = None
            if os.path.isfile(path) and not os.path.islink(path):
                with open(path, "rb") as file:
                    digest = hashlib.sha256(file.read()).hexdigest()
            expected[os.path.relpath(path, os.fsencode(tree))] = digest
    assert {path: entry.digest for path, entry in entries.items()} == expected
    kinds = {path: entry.kind for path, entry in entries.items()}
    assert kinds[b"fifo"] == "p"
    assert kinds[b"socket"] == "s"
    assert entries[b"link"].target == "/etc/motd"
    assert entries[b"etc/deep/er/big"].size_bytes == 300_000
