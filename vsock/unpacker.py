"""Messages unpacked in C as their bytes come, as long as there is nothing unusual about them."""

from collections.abc import Iterable
from itertools import chain, compress
from operator import itemgetter

import msgpack

__all__ = ("BadKey", "Unpacker", "Unusual", "brief", "strict_map")

#: A longer array or map is unusual: memory is set aside for all of it when its first byte comes, at
#: each of the 1024 levels that the library goes down.
_MAX_LENGTH = 1024
_READ_BYTES = 4096
_CONTAINERS = frozenset((list, dict))
_PLAIN = frozenset((type(None), bool, int, float, str, bytes)) | _CONTAINERS
_TEXT = frozenset((str,))
_KEY = itemgetter(0)


class Unusual(Exception):
    """Something has to be looked at closely: it is too long or too deep, or not what travels."""


class BadKey(Exception):
    """A map has a key that is no text, or has one twice."""


class Unpacker:
    """Takes a stream apart into values. Not locked; of no use after ``Unusual``.

    It stores what it cannot refuse by its first bytes, as the scanner can: so ``max_bytes`` bounds
    what it may be given of one value, and with that how many parts it can have.
    """

    def __init__(self, *, max_bytes: int, max_depth: int) -> None:
        self._max_bytes = max_bytes
        self._max_depth = max_depth
        self._given_bytes = self._taken_bytes = 0
        self._unpacker = msgpack.Unpacker(
            read_size=min(_READ_BYTES, max_bytes),
            max_buffer_size=max_bytes,
            max_array_len=_MAX_LENGTH,
            max_map_len=_MAX_LENGTH,
            strict_map_key=False,
            object_pairs_hook=strict_map,
        )

    def next(self, data: "bytes | memoryview") -> tuple[object, int] | None:
        """Take more bytes in; return the next value, and how many bytes it took, once it is whole.

        Raises:
            Unusual: the bytes from the end of the last value on are for somebody else to read.
        """
        self._given_bytes += len(data)
        if self._given_bytes - self._taken_bytes > self._max_bytes:
            raise Unusual
        try:
            self._unpacker.feed(data)
            value = self._unpacker.unpack()
        except msgpack.OutOfData:
            return None
        except (ValueError, msgpack.UnpackException, BadKey):
            raise Unusual from None
        if not _is_ordinary(value, self._max_depth):
            raise Unusual
        before, self._taken_bytes = self._taken_bytes, self._unpacker.tell()
        return value, self._taken_bytes - before


def _is_ordinary(value: object, max_depth: int) -> bool:
    """Say whether a value has only what travels, in not too many levels.

    Level by level, and in C but for a call for each container: most values are none.
    """
    level: list[object] = [value]
    for _ in range(max_depth + 1):
        types = [*map(type, level)]
        if not _PLAIN.issuperset(types):
            return False
        inside: Iterable[object] = compress(level, map(_CONTAINERS.__contains__, types))
        level = [*chain.from_iterable(map(_parts, inside))]
        if not level:
            return True
    return False


def _parts(container: object) -> Iterable[object]:
    if isinstance(container, dict):
        return container.values()
    assert isinstance(container, list)
    return container


def strict_map(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a map, for ``object_pairs_hook``.

    Raises:
        BadKey: a key is no text or is there twice.
    """
    if not _TEXT.issuperset(map(type, map(_KEY, pairs))):
        bad = next(key for key, _ in pairs if type(key) is not str)
        raise BadKey(f"map key {brief(bad)} is not text")
    result = dict(pairs)
    if len(result) != len(pairs):
        raise BadKey("a map holds the same key twice")
    return result


def brief(value: object) -> str:
    """Return what a value is, short enough for an error."""
    if isinstance(value, (list, dict, bytes)):
        return f"of type {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
