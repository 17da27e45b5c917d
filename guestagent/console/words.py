r"""Words of a command line: quotes, backslashes, and ``\xNN`` for the bytes that no text has.

A word is text with undecodable bytes as surrogates (``os.fsdecode``), ready to be a path.
"""

import os

__all__ = ("Partial", "quote", "split", "unfinished")

_HEX = frozenset("0123456789abcdefABCDEF")
#: What ends or changes a word when it is not quoted.
_SPECIAL = frozenset(" \t'\"\\#")


class _Scanner:
    """One pass over a line. ``words`` are (start, word); an open last word is among them."""

    def __init__(self, text: str) -> None:
        self.words: list[tuple[int, str]] = []
        self.open_quote = ""
        self.is_open = False
        self._text = text
        self._at = 0
        self._word = bytearray()
        self._start = 0
        while self._at < len(text) and not self._step():
            pass
        if self.is_open:
            self._end()
            self.is_open = True

    def _step(self) -> bool:
        """Take one character, or an escape; return whether the rest is a comment."""
        c = self._text[self._at]
        if c in " \t" and not self.open_quote:
            if self.is_open:
                self._end()
            self._at += 1
            return False
        if c == "#" and not self.is_open:
            return True
        if not self.is_open:
            self.is_open, self._start = True, self._at
        if c == self.open_quote:
            self.open_quote = ""
        elif not self.open_quote and c in "'\"":
            self.open_quote = c
        elif c == "\\" and self.open_quote != "'":
            self._escape()
        else:
            self._word += os.fsencode(c)
        self._at += 1
        return False

    def _escape(self) -> None:
        digits = self._text[self._at + 2 : self._at + 4]
        is_byte = len(digits) == 2 and _HEX.issuperset(digits)
        if is_byte and self._text[self._at + 1] == "x":
            self._word.append(int(digits, 16))
            self._at += 3
            return
        self._at += 1
        self._word += os.fsencode(self._text[self._at : self._at + 1])

    def _end(self) -> None:
        self.words.append((self._start, os.fsdecode(bytes(self._word))))
        self._word.clear()
        self.is_open = False


class Partial:
    """The word at the end of an unfinished line: where it starts, what it is so far, and the words
    before it."""

    def __init__(self, start: int, word: str, before: tuple[str, ...]) -> None:
        self.start = start
        self.word = word
        self.before = before


def split(text: str) -> list[str]:
    """Return the words of a line; ``#`` begins a comment.

    Raises:
        ValueError: a quote is not closed, or a word holds a NUL.
    """
    scanner = _Scanner(text)
    if scanner.open_quote:
        raise ValueError(f"the quote {scanner.open_quote} is not closed")
    words = [word for _, word in scanner.words]
    if any("\0" in word for word in words):
        raise ValueError("a word holds a NUL")
    return words


def unfinished(text: str) -> Partial:
    """Return the unfinished word at the end of a line."""
    scanner = _Scanner(text)
    if scanner.is_open:
        start, word = scanner.words.pop()
    else:
        start, word = len(text), ""
    return Partial(start, word, tuple(before for _, before in scanner.words))


def quote(word: str) -> str:
    """Return how a word is typed: the inverse of ``split``."""
    out = []
    for c in word:
        if "\udc80" <= c <= "\udcff":
            out.append(f"\\x{ord(c) - 0xDC00:02x}")
        elif not c.isprintable():
            out += [f"\\x{byte:02x}" for byte in os.fsencode(c)]
        elif c in _SPECIAL:
            out.append("\\" + c)
        else:
            out.append(c)
    return "".join(out) or "''"
