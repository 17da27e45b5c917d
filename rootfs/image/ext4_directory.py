"""The blocks of an ext4 directory: one of entries, or many with an index by the names' hashes.

A directory of more than one block starts with the index (an htree): its root, in the place of the
first block, then a level of nodes if the root cannot refer to all blocks of entries, which follow
in the order of the hashes.

Source: fs/ext4/ext4.h, namei.c, hash.c and Documentation/filesystems/ext4/directory.rst.
"""

import struct
from collections.abc import Iterator

from rootfs.image.crc32c import crc32c
from rootfs.imagefile.errors import cannot_hold

__all__ = ("DIRECTORY_TYPE", "HASH_VERSION", "LEAF_BYTES", "Directory", "Entry", "name_hash")

#: A name, its inode's number and its file type.
Entry = tuple[bytes, int, int]

DIRECTORY_TYPE = 2
#: Half MD4; that bytes of names count from 0 to 255 is said in the superblock.
HASH_VERSION = 1
_BLOCK_BYTES = 4096
_ENTRY = struct.Struct("<IHBB")
#: Ends a block of entries: looks like an entry without inode, and holds the block's checksum.
_TAIL = struct.Struct("<IHBBI")
_TAIL_TYPE = 0xDE
#: What of a block of entries there is for entries; its checksum covers them.
LEAF_BYTES = _BLOCK_BYTES - _TAIL.size
_MAX_NAME_BYTES = 255

_INDEX_ENTRY = struct.Struct("<II")
_INDEX_TAIL_BYTES = 8
_ROOT_HEAD_BYTES, _NODE_HEAD_BYTES = 32, 8
_ROOT_ENTRIES = (_BLOCK_BYTES - _ROOT_HEAD_BYTES - _INDEX_TAIL_BYTES) // _INDEX_ENTRY.size
_NODE_ENTRIES = (_BLOCK_BYTES - _NODE_HEAD_BYTES - _INDEX_TAIL_BYTES) // _INDEX_ENTRY.size
#: The kernel takes this hash for the end of a directory.
_END_HASH = 0xFFFFFFFE


class Directory:
    """The entries of a directory by block. ``path`` is for errors, ``hash_seed`` four numbers.

    Raises:
        CallError: ``unsupported``, a name that is too long or not allowed, or too many of them.
    """

    __slots__ = ("_dots", "_first_hashes", "_leaves")

    def __init__(
        self,
        path: tuple[bytes, ...],
        number: int,
        parent_number: int,
        entries: list[Entry],
        hash_seed: tuple[int, ...],
    ) -> None:
        for name, _, _ in entries:
            if len(name) > _MAX_NAME_BYTES:
                what = f"a name of {len(name)} bytes, limit {_MAX_NAME_BYTES}"
                raise cannot_hold("an ext4 image", (*path, name), what)
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
                raise cannot_hold("an ext4 image", (*path, name), "a name that no file can have")
        self._dots: list[Entry] = [
            (b".", number, DIRECTORY_TYPE),
            (b"..", parent_number, DIRECTORY_TYPE),
        ]
        self._first_hashes: list[int] = []
        entries = [*self._dots, *sorted(entries)]
        if sum(_entry_bytes(name) for name, _, _ in entries) <= LEAF_BYTES:
            self._leaves = [entries]
        else:
            self._fill_leaves(entries[2:], hash_seed)
        if len(self._leaves) > _ROOT_ENTRIES * _NODE_ENTRIES:
            what = f"{len(entries) - 2} names, more than an index of two levels can refer to"
            raise cannot_hold("an ext4 image", path, what)

    def _fill_leaves(self, entries: list[Entry], hash_seed: tuple[int, ...]) -> None:
        hashed = sorted((name_hash(entry[0], hash_seed), entry) for entry in entries)
        self._leaves = []
        room = last = 0
        for number, entry in hashed:
            room -= _entry_bytes(entry[0])
            if room < 0:
                # the lowest bit says that the block before ends with the same hash
                self._first_hashes.append(number | (bool(self._leaves) and number == last))
                self._leaves.append([])
                room = LEAF_BYTES - _entry_bytes(entry[0])
            self._leaves[-1].append(entry)
            last = number

    @property
    def is_indexed(self) -> bool:
        return bool(self._first_hashes)

    @property
    def block_count(self) -> int:
        if not self.is_indexed:
            return 1
        return 1 + self._node_count + self.leaf_count

    @property
    def leaf_count(self) -> int:
        """How many blocks of entries there are: the last ones of the directory."""
        return len(self._leaves)

    @property
    def _node_count(self) -> int:
        """The root refers to nodes only if it cannot refer to all blocks of entries itself."""
        count = len(self._leaves)
        return 0 if count <= _ROOT_ENTRIES else -(-count // _NODE_ENTRIES)

    def index_blocks(self, checksum_seed: int) -> Iterator[bytes]:
        """Yield the blocks of the index; ``checksum_seed`` is the inode's."""
        if not self.is_indexed:
            return
        first = 1 + self._node_count
        references = [(number, first + at) for at, number in enumerate(self._first_hashes)]
        nodes = [
            references[at : at + _NODE_ENTRIES] for at in range(0, len(references), _NODE_ENTRIES)
        ]
        if self._node_count:
            references = [(node[0][0], 1 + at) for at, node in enumerate(nodes)]
        (dot, number, kind), (dots, parent_number, _) = self._dots
        head = _pack_entry(dot, number, kind, _entry_bytes(dot))
        head += _pack_entry(dots, parent_number, kind, _BLOCK_BYTES - len(head))[:12]
        head += struct.pack("<IBBBB", 0, HASH_VERSION, 8, int(self._node_count > 0), 0)
        yield _pack_index(head, references, _ROOT_ENTRIES, checksum_seed)
        if self._node_count:
            head = _ENTRY.pack(0, _BLOCK_BYTES, 0, 0)
            for node in nodes:
                yield _pack_index(head, node, _NODE_ENTRIES, checksum_seed)

    def leaf_blocks(self) -> Iterator[bytes]:
        """Yield the blocks of entries; the last four bytes of each are for its checksum."""
        for leaf in self._leaves:
            parts = [_pack_entry(*entry, _entry_bytes(entry[0])) for entry in leaf[:-1]]
            # the last entry takes what is left
            parts.append(_pack_entry(*leaf[-1], LEAF_BYTES - sum(map(len, parts))))
            yield b"".join(parts) + _TAIL.pack(0, _TAIL.size, 0, _TAIL_TYPE, 0)


def _entry_bytes(name: bytes) -> int:
    return _ENTRY.size + -(-len(name) // 4) * 4


def _pack_entry(name: bytes, number: int, kind: int, size_bytes: int) -> bytes:
    return (_ENTRY.pack(number, size_bytes, len(name), kind) + name).ljust(size_bytes, b"\0")


def _pack_index(
    head: bytes, references: list[tuple[int, int]], limit: int, checksum_seed: int
) -> bytes:
    """Return a block of (hash, block) references; the first one's hash makes room for counts."""
    counts = limit | len(references) << 16
    packed = head + _INDEX_ENTRY.pack(counts, references[0][1])
    packed += b"".join(_INDEX_ENTRY.pack(*each) for each in references[1:])
    checksum = crc32c(packed + bytes(_INDEX_TAIL_BYTES), checksum_seed)
    return packed.ljust(_BLOCK_BYTES - 4, b"\0") + checksum.to_bytes(4, "little")


def name_hash(name: bytes, seed: tuple[int, ...]) -> int:
    """Return the half MD4 of a name as ``ext4fs_dirhash`` makes it."""
    state = seed
    for at in range(0, len(name), 32):
        rest = name[at : at + 32]
        # a word that the name does not fill up has its length before the name's bytes
        padding = bytes((len(name) - at,))
        whole = len(rest) // 4 * 4
        words = rest[:whole] + padding * (-len(rest) % 4) + rest[whole:]
        state = _half_md4(state, struct.unpack(">8I", words.ljust(32, padding)))
    number = state[1] & ~1
    return number if number != _END_HASH else number - 2


#: The three rounds of half MD4: which word is added, and how far the sum is rotated.
_ROUND_1 = ((0, 3), (1, 7), (2, 11), (3, 19), (4, 3), (5, 7), (6, 11), (7, 19))
_ROUND_2 = ((1, 3), (3, 5), (5, 9), (7, 13), (0, 3), (2, 5), (4, 9), (6, 13))
_ROUND_3 = ((3, 3), (7, 9), (2, 11), (6, 15), (1, 3), (5, 9), (0, 11), (4, 15))
_CONSTANT_2, _CONSTANT_3 = 0x5A827999, 0x6ED9EBA1


def _half_md4(state: tuple[int, ...], words: tuple[int, ...]) -> tuple[int, ...]:
    a, b, c, d = state
    for at, bits in _ROUND_1:
        total = a + (d ^ (b & (c ^ d))) + words[at] & 0xFFFFFFFF
        a, b, c, d = d, (total << bits | total >> 32 - bits) & 0xFFFFFFFF, b, c
    for at, bits in _ROUND_2:
        total = a + (b & c) + ((b ^ c) & d) + words[at] + _CONSTANT_2 & 0xFFFFFFFF
        a, b, c, d = d, (total << bits | total >> 32 - bits) & 0xFFFFFFFF, b, c
    for at, bits in _ROUND_3:
        total = a + (b ^ c ^ d) + words[at] + _CONSTANT_3 & 0xFFFFFFFF
        a, b, c, d = d, (total << bits | total >> 32 - bits) & 0xFFFFFFFF, b, c
    return tuple(each + was & 0xFFFFFFFF for each, was in zip((a, b, c, d), state, strict=True))
