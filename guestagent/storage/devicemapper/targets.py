"""Targets of device-mapper tables: build, check and parse the lines. Pure; no kernel.

A table line is ``START LENGTH TYPE PARAMS`` in sectors of 512 bytes. What the kernel does to a
malformed line ranges from EINVAL to another meaning, so that nothing enters a line here that was
not checked by type: numbers are printed from integers, digests from bytes, and words may not hold
white space. What comes back from the kernel is parsed by the same rules.

Source: Documentation/admin-guide/device-mapper/{linear,verity,dm-crypt}.rst (Linux 6.1).
"""

import functools
from collections.abc import Iterable, Sequence

from guestagent.api.devices import SECTOR_BYTES
from guestagent.storage.verity.parameters import VerityParameters
from vsock.record import Record

__all__ = (
    "CryptTable",
    "Target",
    "TargetStatus",
    "VerityStatus",
    "VerityTable",
    "check_device",
    "check_number",
    "first_lines",
    "is_same_table",
    "linear_table",
    "linear_target",
    "parse_line",
    "parse_number",
    "parse_verity",
    "parse_verity_status",
    "sectors",
)

_U64_MAX = (1 << 64) - 1
_TYPE_MAX_BYTES = 15  # DM_MAX_TYPE_NAME is 16 with its NUL
_MINOR_MAX = (1 << 20) - 1
_MAJOR_MAX = (1 << 12) - 1
_LOWER = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
_HEX = frozenset("0123456789abcdef")
_PARTING = frozenset(" \\")


def sectors(n_bytes: int) -> int:
    """Convert bytes to sectors.

    Raises:
        ValueError: negative, or not a whole number of sectors.
    """
    if n_bytes < 0 or n_bytes % SECTOR_BYTES:
        raise ValueError(f"{n_bytes} bytes are not a whole number of {SECTOR_BYTES}-byte sectors")
    return n_bytes // SECTOR_BYTES


def check_number(name: str, value: int, low: int, high: int = _U64_MAX) -> None:
    """Raise ValueError, naming the value, unless it is in ``low..high``."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")


def _is_word(word: str) -> bool:
    """One word of visible ASCII: white space would make two of it, a backslash would quote."""
    return word.isascii() and word.isprintable() and bool(word) and _PARTING.isdisjoint(word)


def _check_word(name: str, word: str) -> None:
    if not _is_word(word):
        raise ValueError(f"{name} must be one word of visible ASCII, got {word!r}")


def check_device(name: str, device: str) -> None:
    """Raise ValueError unless ``device`` is MAJOR:MINOR or an absolute path of visible ASCII."""
    problem = _problem_of_device(device)
    if problem is not None:
        raise ValueError(f"{name} {problem}")


@functools.lru_cache(maxsize=256)
def _problem_of_device(device: str) -> str | None:
    """Return what is wrong with MAJOR:MINOR or an absolute path; the same few are asked of again
    and again."""
    if not _is_word(device):
        return f"must be one word of visible ASCII, got {device!r}"
    if device.startswith("/"):
        return None
    major, colon, minor = device.partition(":")
    if not colon or not _is_number(major) or not _is_number(minor):
        return f"must be MAJOR:MINOR or an absolute path, got {device!r}"
    if int(major) > _MAJOR_MAX or int(minor) > _MINOR_MAX:
        return f"is out of range: {device!r}"
    return None


def _is_number(word: str) -> bool:
    # str.isdigit alone takes digits of other scripts; 20 digits hold 64 bits
    return word.isascii() and word.isdigit() and len(word) <= 20


def parse_number(name: str, word: str) -> int:
    """Read a decimal number; ValueError names what is none."""
    if not _is_number(word):
        raise ValueError(f"{name} must be a decimal number, got {word!r}")
    return int(word)


def _from_hex(name: str, word: str) -> bytes:
    if len(word) % 2 or not _HEX.issuperset(word.lower()):
        raise ValueError(f"{name} must be hexadecimal, got {word!r}")
    return bytes.fromhex(word)


class Target(Record):
    """One target of a table. ``params`` are what follows the type, words parted by one space."""

    start_sectors: int
    length_sectors: int
    target_type: str
    params: str = ""

    def check(self) -> None:
        check_number("start_sectors", self.start_sectors, 0)
        check_number("length_sectors", self.length_sectors, 1)
        if self.start_sectors + self.length_sectors > _U64_MAX:
            raise ValueError("start_sectors + length_sectors exceeds 64 bits")
        if not 0 < len(self.target_type) <= _TYPE_MAX_BYTES:
            raise ValueError(f"target_type must have 1 to 15 characters, got {self.target_type!r}")
        if not _LOWER.issuperset(self.target_type):
            raise ValueError(f"target_type must be a plain lower-case word: {self.target_type!r}")
        if not (self.params.isascii() and self.params.isprintable()):
            raise ValueError(f"params must be printable ASCII, got {self.params!r}")

    def line(self) -> str:
        """Return the line as ``dmsetup table`` prints it: a key in hexadecimal, which another
        program may have given a crypt target, is replaced by zeros."""
        head = f"{self.start_sectors} {self.length_sectors} {self.target_type}"
        params = _without_key(self.params) if self.target_type == "crypt" else self.params
        return f"{head} {params}" if params else head


def _without_key(params: str) -> str:
    """Hide the key of a crypt target, its second word, unless it is the name of a kernel key."""
    words = params.split(" ", 2)
    if len(words) > 1 and not words[1].startswith((":", "-")):
        words[1] = "0" * len(words[1])
    return " ".join(words)


class TargetStatus(Record):
    """The status of one target, as the target itself words it."""

    start_sectors: int
    length_sectors: int
    target_type: str
    status: str

    def line(self) -> str:
        """Return the line as ``dmsetup status`` prints it."""
        head = f"{self.start_sectors} {self.length_sectors} {self.target_type}"
        return f"{head} {self.status}" if self.status else head


class VerityTable(Record):
    """A verity target over all data blocks. ``options`` are words; their count is added here.

    A line says where the tree itself starts: of a table that was read back,
    ``parameters.superblock`` is false.
    """

    parameters: VerityParameters
    data_device: str
    hash_device: str
    options: tuple[str, ...] = ()

    def check(self) -> None:
        check_device("data_device", self.data_device)
        check_device("hash_device", self.hash_device)
        for option in self.options:
            _check_word("option", option)

    def target(self) -> Target:
        parameters = self.parameters
        words = [
            str(parameters.hash_type),
            self.data_device,
            self.hash_device,
            str(parameters.data_block_size),
            str(parameters.hash_block_size),
            str(parameters.data_blocks),
            str(parameters.hash_start_block),
            parameters.algorithm,
            parameters.root_digest.hex(),
            parameters.salt.hex() or "-",
        ]
        if self.options:
            words += [str(len(self.options)), *self.options]
        return Target(
            start_sectors=0,
            length_sectors=sectors(parameters.data_size_bytes),
            target_type="verity",
            params=" ".join(words),
        )


class CryptTable(Record):
    """A crypt target over the first ``length_bytes`` of a device.

    The key is in the kernel's keyring, as a ``logon`` key of ``key_bytes`` bytes with the
    description ``key_description``: no line and no reply of the kernel holds it. Sectors are
    counted from 0 for the initialization vectors. ``options`` are words; their count is added here.
    """

    device: str
    length_bytes: int
    cipher: str
    key_bytes: int
    key_description: str
    options: tuple[str, ...] = ()

    def check(self) -> None:
        check_device("device", self.device)
        for word in (self.cipher, self.key_description, *self.options):
            _check_word("a word of a crypt target", word)
        check_number("key_bytes", self.key_bytes, 1, 512)
        sectors(self.length_bytes)

    def target(self) -> Target:
        key = f":{self.key_bytes}:logon:{self.key_description}"
        words = [self.cipher, key, "0", self.device, "0"]
        if self.options:
            words += [str(len(self.options)), *self.options]
        return Target(
            start_sectors=0,
            length_sectors=sectors(self.length_bytes),
            target_type="crypt",
            params=" ".join(words),
        )


class VerityStatus(Record):
    """``state`` is V (no corruption seen) or C. ``fec_corrected`` counts corrected blocks where
    the kernel tells it (and the device has error correction), else None."""

    state: str
    fec_corrected: int | None = None

    def check(self) -> None:
        if self.state not in ("V", "C"):
            raise ValueError(f"verity status must be V or C, got {self.state!r}")

    @property
    def corrupted(self) -> bool:
        return self.state == "C"


def linear_target(
    *, length_bytes: int, device: str, offset_bytes: int = 0, start_bytes: int = 0
) -> Target:
    """Build a linear target: ``length_bytes`` of ``device`` from ``offset_bytes`` on.

    Args:
        device: MAJOR:MINOR or an absolute path.
        start_bytes: where in the new device the range begins.

    Raises:
        ValueError: a size that is no whole number of sectors, a malformed device.
    """
    length_sectors, offset_sectors = sectors(length_bytes), sectors(offset_bytes)
    check_device("device", device)
    if offset_sectors + length_sectors > _U64_MAX:
        raise ValueError("offset_bytes + length_bytes exceeds 64 bits of sectors")
    return Target(
        start_sectors=sectors(start_bytes),
        length_sectors=length_sectors,
        target_type="linear",
        params=f"{device} {offset_sectors}",
    )


def linear_table(device: str, ranges: Iterable[tuple[int, int]]) -> tuple[Target, ...]:
    """Build the linear targets that put (offset, size) ranges of a device, in bytes, together.

    Raises:
        ValueError: as ``linear_target``.
    """
    targets, start_bytes = [], 0
    for offset_bytes, size_bytes in ranges:
        target = linear_target(
            length_bytes=size_bytes,
            device=device,
            offset_bytes=offset_bytes,
            start_bytes=start_bytes,
        )
        targets.append(target)
        start_bytes += size_bytes
    return tuple(targets)


def first_lines(targets: "Sequence[Target | TargetStatus]", most: int = 16) -> str:
    """Return the lines of the first targets for a person, and how many there are besides."""
    lines = [target.line() for target in targets[:most]]
    if len(targets) > most:
        lines.append(f"and {len(targets) - most} more targets")
    return "; ".join(lines)


def parse_line(line: str) -> Target:
    """Parse ``START LENGTH TYPE [PARAMS]``.

    Raises:
        ValueError: it is not such a line.
    """
    words = line.split(" ", 3)
    if len(words) < 3:
        raise ValueError(f"a table line needs start, length and type, got {line!r}")
    return Target(
        start_sectors=parse_number("start", words[0]),
        length_sectors=parse_number("length", words[1]),
        target_type=words[2],
        params=words[3] if len(words) == 4 else "",
    )


def parse_verity(target: Target) -> VerityTable:
    """Read a verity target's fields back.

    Raises:
        ValueError: not a verity target over all data blocks, malformed, or with values that no
            layer has.
    """
    if target.target_type != "verity":
        raise ValueError(f"expected a verity target, got {target.target_type!r}")
    words = target.params.split()
    if len(words) < 10:
        raise ValueError(f"a verity target has 10 parameters or more, got {target.params!r}")
    options = tuple(words[11:])
    if len(words) > 10 and parse_number("option count", words[10]) != len(options):
        raise ValueError(f"verity option count {words[10]} does not fit {options!r}")
    hash_block_size = parse_number("hash_block_size", words[4])
    table = VerityTable(
        parameters=VerityParameters(
            hash_type=parse_number("hash_type", words[0]),
            data_block_size=parse_number("data_block_size", words[3]),
            hash_block_size=hash_block_size,
            data_blocks=parse_number("data_blocks", words[5]),
            hash_offset_bytes=parse_number("hash_start_block", words[6]) * hash_block_size,
            algorithm=words[7],
            root_digest=_from_hex("root digest", words[8]),
            salt=b"" if words[9] == "-" else _from_hex("salt", words[9]),
            superblock=False,
        ),
        data_device=words[1],
        hash_device=words[2],
        options=options,
    )
    expected = table.target()
    if (target.start_sectors, target.length_sectors) != (0, expected.length_sectors):
        raise ValueError(f"a verity target over a part of its data: {target.line()!r}")
    return table


def is_same_table(planned: Sequence[Target], found: Sequence[Target]) -> bool:
    """Say whether the kernel has what was planned."""
    return len(planned) == len(found) and all(map(_is_same_target, planned, found))


def _is_same_target(planned: Target, found: Target) -> bool:
    """The kernel tells the options of a verity target in an order of its own."""
    if planned.target_type != "verity" or found.target_type != "verity":
        return planned == found
    places = [(each.start_sectors, each.length_sectors) for each in (planned, found)]
    (fixed, options), (found_fixed, found_options) = (
        (words[:10], sorted(words[11:])) for words in (planned.params.split(), found.params.split())
    )
    return places[0] == places[1] and fixed == found_fixed and options == found_options


def parse_verity_status(status: str) -> VerityStatus:
    """Parse what a verity target says of itself: ``V``, ``C``, and on newer kernels the number of
    blocks that error correction repaired, or ``-``.

    Raises:
        ValueError: it begins with neither V nor C.
    """
    words = status.split()
    fec = words[1] if len(words) > 1 else "-"
    return VerityStatus(
        state=words[0] if words else "",
        fec_corrected=int(fec) if _is_number(fec) else None,
    )
