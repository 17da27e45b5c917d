"""dm-verity on disk: the superblock, the geometry of the hash tree, and the check of its root.

Pure over bytes: nothing here opens a device. A caller hands in ``read_at`` and gets values or a
``CallError``. The kernel reads neither the superblock nor the root before the first data block is
touched, and loads a table with a wrong root digest without complaint; so what is refused here is
the only thing that is refused before a mount.

The tree: each hash block holds the digests of consecutive blocks of the level below; level 0 is the
one over the data. On the device the top level comes first. One data block has no tree at all: its
own digest is the root.

Source: Documentation/admin-guide/device-mapper/verity.rst and drivers/md/dm-verity-target.c (Linux
6.1); the superblock is that of cryptsetup 2.6 (lib/verity/verity.c), version 1.
"""

from guestagent.api.checks import FieldError
from guestagent.api.devices import (
    BLOCK_SIZES,
    DIGEST_BYTES,
    HASH_TYPE_CHROMEOS,
    HASH_TYPE_NORMAL,
    VerityTerms,
)
from guestagent.storage.verity.parameters import (
    PART_STEP_BYTES,
    SUPERBLOCK_BYTES,
    VerityParameters,
    check_kernel_limits,
    hash_area_offset,
    level_blocks,
    parse_superblock,
    read_superblock,
    superblock_uuid,
)
from guestagent.storage.verity.proof import (
    ReadAt,
    block_digest,
    check_root,
    check_spare,
    check_tree_spines,
)

__all__ = (
    "BLOCK_SIZES",
    "DIGEST_BYTES",
    "HASH_TYPE_CHROMEOS",
    "HASH_TYPE_NORMAL",
    "PART_STEP_BYTES",
    "SUPERBLOCK_BYTES",
    "FieldError",
    "ReadAt",
    "VerityParameters",
    "VerityTerms",
    "block_digest",
    "check_kernel_limits",
    "check_root",
    "check_spare",
    "check_tree_spines",
    "hash_area_offset",
    "level_blocks",
    "parse_superblock",
    "read_superblock",
    "superblock_uuid",
)
