"""Images of 100,000 entries, from a tar that is made while it is read; ``scripts/bench scale``
builds them of 1,000,000."""

import subprocess
from pathlib import Path

import pytest

from tests.beds.ctlbed import build_crowd

COUNT = 100_000
#: What an interpreter with all that guestctl imports takes, and what each entry may take besides.
BASE_MIB, ENTRY_BYTES = 64, 1600
#: A judge of each file system, and the count that it says: with the root, or all reserved inodes.
JUDGES = {
    "erofs": (("dump.erofs", "-S"), f"total file count:\t\t{COUNT + 1}\n"),
    "ext4": (("e2fsck", "-fn"), f": {COUNT + 10}/"),
}


@pytest.mark.parametrize("filesystem", JUDGES)
def test_image_of_many_entries_is_whole_and_memory_is_bounded(
    tmp_path: Path, filesystem: str
) -> None:
    image = tmp_path / "image"
    built = build_crowd(image, COUNT, filesystem)
    assert built.inode_count == COUNT + 1
    assert built.peak_mib < BASE_MIB + COUNT * ENTRY_BYTES / 2**20
    command, said = JUDGES[filesystem]
    done = subprocess.run([*command, image], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("rror")) == (0, 0), done.stderr
    assert said in done.stdout
