"""Where a MessagePack value ends, found without decoding or storing it.

The scanner walks headers only. It is what lets a reader refuse a value by its size, its depth or
its number of parts before any memory is spent on it, and still find the next one.

Source: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

__all__ = ("Scanner",)


def _fixed_sizes() -> bytes:
    """Return the size of a value by its first byte, 0 where that alone does not tell."""
    sizes = bytearray(256)
    sizes[0x00:0x80] = b"\x01" * 0x80  # positive fixint
    sizes[0xE0:0x100] = b"\x01" * 0x20  # negative fixint
    for length in range(32):
        sizes[0xA0 + length] = 1 + length  # fixstr
    for first, size in {0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9}.items():
        sizes[first] = size  # nil, false, true, float 32, float 64
    for first in (0xCC, 0xD0):
        sizes[first : first + 4] = b"\x02\x03\x05\x09"  # unsigned and signed integers
    return bytes(sizes)


_FIXED_SIZES = _fixed_sizes()
#: First byte -> (bytes of its length field, bytes between that and the payload).
_SIZED = {
    0xC4: (1, 0), 0xC5: (2, 0), 0xC6: (4, 0),  # bin
    0xC7: (1, 1), 0xC8: (2, 1), 0xC9: (4, 1),  # ext, with its type byte
    0xD9: (1, 0), 0xDA: (2, 0), 0xDB: (4, 0),  # str
}  # fmt: skip
#: First byte -> (bytes of its count field, values for each counted item).
_COUNTED = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
#: First byte -> size of the whole value, for the extension types of fixed size.
_FIXED_EXTENSIONS = {0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}
_NEVER_USED = 0xC1


class Scanner:
    """Walks one value. ``at`` is the offset of the next header, and of the end once it is whole.

    ``problem`` says why the value must be refused, ``too_much`` that a limit is the reason;
    walking goes on, to find its end. ``lost`` says that what follows is not MessagePack.
    """

    __slots__ = ("_max_depth", "_open", "_values_left", "at", "lost", "problem", "too_much")

    def __init__(self, max_depth: int, max_values: int) -> None:
        self._max_depth = max_depth
        self._values_left = max_values
        self._open = [1]  # values still missing at each level
        self.at = 0
        self.problem: str | None = None
        self.too_much = False
        self.lost = False

    def walk(self, buffer: bytearray) -> bool:
        """Walk as far as the bytes go; True when the value is whole.

        ``buffer`` holds the value from its start, less what the caller took off ``at``.
        """
        open_values, at, sizes = self._open, self.at, _FIXED_SIZES
        end = len(buffer)
        while open_values and at < end:
            left = open_values[-1]
            while left and at < end and (size := sizes[buffer[at]]):  # most are of these
                at += size
                left -= 1
            open_values[-1] = left
            if left and at < end:
                after = self._walk_header(buffer, at)
                if after is None:
                    break
                at = after
            while open_values and not open_values[-1]:
                open_values.pop()
        self.at = at
        return not open_values and at <= end

    def _walk_header(self, buffer: bytearray, at: int) -> int | None:
        """Return the offset after any other header; None if it is not whole."""
        first = buffer[at]
        if first < 0xA0:  # fixmap, fixarray
            self._descend((first & 0x0F) * (2 if first < 0x90 else 1))
            return at + 1
        if first == _NEVER_USED:
            self.lost = True
            return None
        if first in _FIXED_EXTENSIONS:
            self._refuse_extension()
            self._open[-1] -= 1
            return at + _FIXED_EXTENSIONS[first]
        width, rest = _SIZED.get(first) or _COUNTED[first]
        after = at + 1 + width
        if after > len(buffer):
            return None
        number = int.from_bytes(buffer[at + 1 : after], "big")
        if first in _COUNTED:
            self._descend(number * rest)
            return after
        if rest:
            self._refuse_extension()
        self._open[-1] -= 1
        return after + rest + number

    def _descend(self, values: int) -> None:
        open_values = self._open
        open_values[-1] -= 1
        if not values:
            return
        self._values_left -= values
        if self._values_left < 0:
            self._refuse("too many values")
        if len(open_values) > self._max_depth:
            self._refuse(f"deeper than {self._max_depth} levels")
            # from here on only the end matters, and one count finds it
            open_values[-1] += values
        else:
            open_values.append(values)

    def _refuse(self, problem: str) -> None:
        self.problem = problem
        self.too_much = True

    def _refuse_extension(self) -> None:
        if self.problem is None:
            self.problem = "extension types are not part of this protocol"
