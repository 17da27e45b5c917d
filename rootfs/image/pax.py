"""PAX extended headers: ``LENGTH KEY=VALUE`` records, and what they say about a member.

Source: POSIX.1-2017 pax; star(1) for SCHILY.xattr; libarchive's tar(5) for LIBARCHIVE.xattr; the
GNU tar manual for GNU.sparse.
"""

import base64
import binascii
import os
import urllib.parse
from collections.abc import Iterable

from vsock.errors import CallError

__all__ = ("PaxRecords", "parse_decimal")

_SCHILY = b"SCHILY.xattr."
_LIBARCHIVE = b"LIBARCHIVE.xattr."
_SELINUX = b"RHT.security.selinux"
_ACLS = (b"SCHILY.acl.access", b"SCHILY.acl.default", b"SCHILY.acl.ace")
_REPEATED = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_MAX_DIGITS = 20


class PaxRecords:
    """The records in force for one member. False when there are none."""

    __slots__ = ("_pieces", "_values")

    def __init__(
        self, values: dict[bytes, bytes] | None = None, pieces: Iterable[tuple[bytes, bytes]] = ()
    ) -> None:
        self._values = values or {}
        #: sparse 0.0 gives a record for each number, under the same two keys
        self._pieces = tuple(pieces)

    def __len__(self) -> int:
        return len(self._values)

    @classmethod
    def parse(cls, data: bytes, offset_bytes: int) -> "PaxRecords":
        """Read the records of a header at ``offset_bytes`` of the archive.

        Raises:
            CallError: ``integrity``.
        """
        values: dict[bytes, bytes] = {}
        pieces = []
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + _MAX_DIGITS)
            length = parse_decimal(data[at:space] if space > 0 else b"", "PAX record length")
            record = data[at : at + length]
            key, equals, value = record[space + 1 - at : -1].partition(b"=")
            if len(record) != length or not equals or not key or record[-1:] != b"\n":
                raise CallError(
                    "integrity",
                    f"cannot read the tar: the PAX header at byte {offset_bytes} has a broken "
                    f"record at its byte {at}",
                    step="read the tar",
                )
            values[key] = value
            if key in _REPEATED:
                pieces.append((key, value))
            at += length
        return cls(values, pieces)

    def merged(self, later: "PaxRecords") -> "PaxRecords":
        """Return these records overridden by ``later``; an empty value takes a record away."""
        if not later:
            return self
        values = {**self._values, **later._values}
        return PaxRecords(values, later._pieces or self._pieces)

    def text(self, key: bytes) -> bytes | None:
        """Return a value, None if there is none or an empty one.

        Raises:
            CallError: ``integrity``, it has a NUL, which no name can.
        """
        value = self._values.get(key)
        if value is not None and b"\0" in value:
            raise _bad(key, value)
        return value or None

    @property
    def name(self) -> bytes | None:
        """The name of a sparse member, whose own path is a stand-in for simpler readers."""
        return self.text(b"GNU.sparse.name") if self.is_sparse else None

    def number(self, key: bytes, default: int) -> int:
        """Return a decimal value.

        Raises:
            CallError: ``integrity``, it is none.
        """
        value = self.text(key)
        return default if value is None else parse_decimal(value, os.fsdecode(key))

    def time_ns(self, default_seconds: int) -> int:
        """Return the modification time, exact to the nanosecond, rounded down.

        Raises:
            CallError: ``integrity``, it is no number.
        """
        value = self.text(b"mtime")
        if value is None:
            return default_seconds * 10**9
        digits = value.removeprefix(b"-")
        whole, _, fraction = digits.partition(b".")
        seconds = parse_decimal(whole or b"0", "mtime")
        if fraction.strip(b"0123456789"):
            raise _bad(b"mtime", value)
        time_ns = seconds * 10**9 + int(fraction[:9].ljust(9, b"0") or b"0")
        if not value.startswith(b"-"):
            return time_ns
        return -time_ns - bool(fraction[9:].strip(b"0"))

    def xattrs(self) -> dict[bytes, bytes]:
        """Return the extended attributes; SCHILY and SELinux records win over LIBARCHIVE ones.

        Raises:
            CallError: ``integrity``, a broken encoding; ``unsupported``, an ACL as text.
        """
        found: dict[bytes, bytes] = {}
        for key, value in self._values.items():
            if key.startswith(_LIBARCHIVE):
                found[_unquote(key)] = _decode_base64(key, value)
            elif key in _ACLS and value:
                raise CallError(
                    "unsupported",
                    f"cannot read the tar: a member has an ACL as text ({os.fsdecode(key)})",
                    step="read the tar",
                    hint="write the archive with --xattrs and without --acls: ACLs then travel as "
                    "the attributes system.posix_acl_*",
                )
        for key, value in self._values.items():
            if key.startswith(_SCHILY):
                found[_decode_name(key.removeprefix(_SCHILY))] = value
        selinux = self._values.get(_SELINUX)
        if selinux:
            found[b"security.selinux"] = selinux + b"\0"  # as the kernel's users store it
        if any(not name or b"\0" in name for name in found):
            raise _bad(b"xattr", b"".join(found))
        return found

    @property
    def is_sparse(self) -> bool:
        return b"GNU.sparse.major" in self._values or b"GNU.sparse.size" in self._values

    @property
    def is_sparse_1_0(self) -> bool:
        """The map is in the member's data, not here.

        Raises:
            CallError: ``unsupported``, a version that is not known.
        """
        if b"GNU.sparse.major" not in self._values:
            return False
        version = self.number(b"GNU.sparse.major", 0), self.number(b"GNU.sparse.minor", 0)
        if version not in ((0, 0), (0, 1), (1, 0)):
            raise CallError(
                "unsupported",
                f"cannot read the tar: a sparse member of format {version[0]}.{version[1]}",
                step="read the tar",
            )
        return version == (1, 0)

    def sparse_size(self) -> int:
        """Return the size of a sparse file with its holes."""
        for key in (b"GNU.sparse.realsize", b"GNU.sparse.size"):
            if key in self._values:
                return self.number(key, 0)
        raise _bad(b"GNU.sparse.realsize", b"")

    def sparse_map(self) -> list[tuple[int, int]]:
        """Return (offset, length) of the data of a sparse 0.0 or 0.1 member."""
        listed = self._values.get(b"GNU.sparse.map")
        if listed is not None:
            texts = listed.split(b",") if listed else []
        else:
            if any(key != _REPEATED[at % 2] for at, (key, _) in enumerate(self._pieces)):
                raise _bad(b"GNU.sparse.offset", b"")
            texts = [value for _, value in self._pieces]
        if len(texts) % 2:
            raise _bad(b"GNU.sparse.map", listed or b"")
        numbers = [parse_decimal(text, "GNU.sparse.map") for text in texts]
        return list(zip(numbers[::2], numbers[1::2], strict=True))


def parse_decimal(text: bytes, what: str) -> int:
    """Return a non-negative decimal number of at most 20 digits.

    Raises:
        CallError: ``integrity``.
    """
    if not text or len(text) > _MAX_DIGITS or text.strip(b"0123456789"):
        raise _bad(what.encode(), text)
    return int(text)


def _decode_name(name: bytes) -> bytes:
    """GNU tar writes the two characters that a record's key cannot hold, or that this takes."""
    return name.replace(b"%3D", b"=").replace(b"%25", b"%")


def _unquote(key: bytes) -> bytes:
    return urllib.parse.unquote_to_bytes(key.removeprefix(_LIBARCHIVE))


def _decode_base64(key: bytes, value: bytes) -> bytes:
    try:
        # libarchive leaves out the padding
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except binascii.Error:
        raise _bad(key, value) from None


def _bad(key: bytes, value: bytes) -> CallError:
    return CallError(
        "integrity",
        f"cannot read the tar: {os.fsdecode(key)} is {value[:80]!r}",
        step="read the tar",
        object=os.fsdecode(key),
    )
