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

from guestagent.storage.verity.parameters import (
    VerityParameters,
    check_kernel_limits,
    resolve,
    superblock_offset,
)
from guestagent.storage.verity.proof import (
    ReadAt,
    block_digest,
    check_root,
    check_spare,
    check_tree_spines,
)
from guestagent.storage.verity.superblock import (
    DIGEST_SIZES,
    HASH_TYPE_CHROMEOS,
    HASH_TYPE_NORMAL,
    MAX_BLOCK_SIZE_BYTES,
    MAX_SALT_BYTES,
    MIN_BLOCK_SIZE_BYTES,
    SUPERBLOCK_BYTES,
    FieldError,
    Superblock,
)

__all__ = (
    "DIGEST_SIZES",
    "HASH_TYPE_CHROMEOS",
    "HASH_TYPE_NORMAL",
    "MAX_BLOCK_SIZE_BYTES",
    "MAX_SALT_BYTES",
    "MIN_BLOCK_SIZE_BYTES",
    "SUPERBLOCK_BYTES",
    "FieldError",
    "ReadAt",
    "Superblock",
    "VerityParameters",
    "block_digest",
    "check_kernel_limits",
    "check_root",
    "check_spare",
    "check_tree_spines",
    "resolve",
    "superblock_offset",
)
