"""The line editor, fed with bytes; what it prints is played back on a terminal of one row."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.console.lineedit import MAX_KEY_BYTES, History, LineEditor, decode_key, width_of
from guestagent.console.words import Partial, quote, split, unfinished
from tests.beds.consolebed import Terminal

PROMPT = "> "
WORDS = ["layers", "layer-one", "layer-two", "ls", "base:/", "strange name"]


def keys_of(data: bytes) -> list[str]:
    buffer, keys = bytearray(data), []
    while (decoded := decode_key(buffer)) is not None:
        keys.append(decoded[0])
        del buffer[: decoded[1]]
    return keys


class Typist:
    """An editor, its terminal, and keys."""

    def __init__(self, *lines: str, columns: int = 80) -> None:
        self.history = History()
        for line in lines:
            self.history.add(line)
        self.terminal = Terminal(columns)
        self.editor = LineEditor(
            PROMPT, columns=columns, history=self.history, complete=self.complete
        )
        self.terminal.show(self.editor.start())

    def complete(self, partial: Partial) -> list[str]:
        return [word for word in WORDS if word.startswith(partial.word)]

    def type(self, data: bytes | str) -> "Typist":
        for key in keys_of(data.encode() if isinstance(data, str) else data):
            if self.editor.outcome is None:
                self.terminal.show(self.editor.press(key))
        return self


UP, DOWN, RIGHT, LEFT = b"\x1b[A", b"\x1b[B", b"\x1b[C", b"\x1b[D"


@pytest.mark.parametrize(
    ("typed", "text", "cursor"),
    [
        (b"abc", "abc", 3),
        (b"abc" + LEFT + b"X", "abXc", 3),
        (b"abc" + LEFT * 9 + b"X", "Xabc", 1),
        (b"abc\x01X", "Xabc", 1),
        (b"abc\x1b[HX\x1b[FY", "XabcY", 5),
        (b"abc\x1b[1~X\x1b[4~Y", "XabcY", 5),
        (b"abc\x1bOHX", "Xabc", 1),
        (b"abc\x02\x02\x06X", "abXc", 3),
        (b"abc\x7f", "ab", 2),
        (b"abc\x08\x08\x08\x08", "", 0),
        (b"abc\x01\x1b[3~", "bc", 0),
        (b"abc\x01\x04", "bc", 0),
        (b"one two\x17", "one ", 4),
        (b"one two  \x17", "one ", 4),
        (b"one two\x17\x17", "", 0),
        (b"one two\x1bb\x0b", "one ", 4),
        (b"one two\x15", "", 0),
        (b"one two\x1bb\x15\x05\x19", "twoone ", 7),
        (b"one two\x01\x1bfX", "oneX two", 4),
        ("grün".encode() + LEFT + b"X", "grüXn", 4),
        ("日本".encode() + LEFT + b"X", "日X本", 2),
        (b"a\x1b[99;5ub\x00\x1fc", "abc", 3),
        (b"a\xff\xc3b", "ab", 2),
        (b"a\x1b[200~b", "ab", 2),
    ],
)
def test_keys(typed: bytes, text: str, cursor: int) -> None:
    typist = Typist().type(typed)
    assert (typist.editor.text, typist.editor.cursor) == (text, cursor)
    assert typist.terminal.row == (PROMPT + text).rstrip()
    assert typist.terminal.at == len(PROMPT) + width_of(text[:cursor])


def test_enter_ends_the_line() -> None:
    typist = Typist().type(b"layers" + LEFT + b"\r")
    assert typist.editor.outcome == "line"
    assert typist.editor.text == "layers"
    assert typist.history.lines == ["layers"]
    assert typist.terminal.rows[0][-1] == "s"


def test_interrupt_and_end() -> None:
    assert Typist().type(b"abc\x03").editor.outcome == "interrupt"
    assert Typist().type(b"\x04").editor.outcome == "end"
    assert Typist().type(b"abc\x04").editor.outcome is None


def test_a_mark_that_does_not_fit_is_left_out() -> None:
    typist = Typist(columns=12).type(b"123456789\x03")
    assert ["".join(row) for row in typist.terminal.rows] == ["> 123456789", ""]


def test_history() -> None:
    typist = Typist("layers", "ls /", "layers", "status")
    assert typist.type(UP).editor.text == "status"
    assert typist.type(UP).editor.text == "layers"
    assert typist.type(UP + UP + UP + UP).editor.text == "layers"
    assert typist.type(DOWN * 3).editor.text == "status"
    assert typist.type(DOWN).editor.text == ""


def test_history_by_prefix() -> None:
    typist = Typist("layers base", "status", "ls /", "layers")
    assert typist.type(b"la" + UP).editor.text == "layers"
    assert typist.type(UP).editor.text == "layers base"
    assert typist.type(UP).terminal.bells == 1
    assert typist.type(DOWN + DOWN).editor.text == "la"
    assert typist.type(b"x" + UP).terminal.bells == 2


def test_history_is_bounded_and_without_repeats() -> None:
    history = History()
    for number in range(1000):
        history.add(f"line {number}")
        history.add(f"line {number}")
        history.add("  ")
    assert len(history.lines) == 200
    assert history.lines[-2:] == ["line 998", "line 999"]


def test_completion_of_the_only_one() -> None:
    assert Typist().type(b"stra\t").editor.text == "strange\\ name "
    assert Typist().type(b"ba\t").editor.text == "base:/"
    assert Typist().type(b"help 'layer-o\t").editor.text == "help layer-one "
    assert Typist().type(b"help l layers\x1bbls\t").editor.text == "help l ls layers"


def test_completion_of_many() -> None:
    typist = Typist().type(b"la\t")
    assert typist.editor.text == "layer"
    typist.type(b"\t")
    assert typist.terminal.bells == 0
    assert "".join(typist.terminal.rows[1]).split() == ["layer-one", "layer-two", "layers"]
    assert typist.terminal.row == "> layer"


def test_completion_of_none() -> None:
    typist = Typist().type(b"nothing\t")
    assert typist.editor.text == "nothing"
    assert typist.terminal.bells == 1


def test_a_line_longer_than_the_row_scrolls() -> None:
    typist = Typist(columns=20).type(b"0123456789" * 5)
    assert typist.terminal.row.endswith("9")
    assert len(typist.terminal.rows) == 1
    typist.type(b"\x01")
    assert typist.terminal.row.startswith("> 0123")
    typist.type(b"\x05" + b"\x7f" * 45)
    assert typist.terminal.row == "> 01234"


def test_a_line_has_an_end() -> None:
    typist = Typist().type(b"x" * 10_000)
    assert len(typist.editor.text) == 4000
    assert typist.terminal.bells == 1


def test_a_key_prints_few_characters_in_a_long_line() -> None:
    """At 9600 baud a row is 0.08 s: to print one for each key would be slower than typing."""
    editor = LineEditor(PROMPT, columns=80, history=History(), complete=lambda _: [])
    printed = sum(len(editor.press(f"{number % 10}")) for number in range(400))
    assert printed < 400 * 12
    printed = sum(len(editor.press("backspace")) for _ in range(400))
    assert printed < 400 * 16
    assert editor.text == ""


def test_another_width() -> None:
    typist = Typist(columns=80).type(b"x" * 30)
    typist.terminal.columns = 20
    typist.terminal.rows.append([])
    typist.terminal.at = 0
    typist.terminal.show(typist.editor.resize(20))
    assert typist.terminal.row == PROMPT + "x" * (typist.terminal.at - 2)
    assert typist.type(b"y").editor.text == "x" * 30 + "y"


def test_control_l_clears_only_a_terminal_that_supports_clearing() -> None:
    for clears in (True, False):
        editor = LineEditor(
            PROMPT, columns=80, history=History(), complete=lambda _: [], clears=clears
        )
        assert ("\x1b" in editor.press("^L")) is clears


@given(st.lists(st.binary(max_size=12), max_size=40), st.integers(12, 80))
def test_the_screen_is_the_line_whatever_is_typed(pieces: list[bytes], columns: int) -> None:
    typist = Typist("layers", "ls base:/", "日本 語", columns=columns)
    for piece in pieces:
        typist.type(piece.replace(b"\t", b"").replace(b"\x0c", b""))
        editor = typist.editor
        if editor.outcome is not None:
            return
        assert 0 <= editor.cursor <= len(editor.text)
        visible = typist.terminal.row.removeprefix(PROMPT.rstrip()).strip(" ")
        assert visible in editor.text


@given(st.binary(max_size=60))
def test_keys_are_taken_whole_or_waited_for(data: bytes) -> None:
    decoded = decode_key(data)
    if decoded is None:
        assert len(data) < MAX_KEY_BYTES
    else:
        assert 0 < decoded[1] <= min(len(data), MAX_KEY_BYTES)
        # what is no key ends where it is seen to be none
        assert not decoded[0] or decode_key(data[: decoded[1]]) == decoded
        assert decoded[0].isprintable()


@given(st.lists(st.text(st.characters(blacklist_characters="\0", codec="utf-8"), max_size=20)))
def test_quoted_words_are_split_to_the_same_words(words: list[str]) -> None:
    assert split(" ".join(quote(word) for word in words)) == words


@given(st.binary(min_size=1, max_size=20).filter(lambda name: b"\0" not in name))
def test_names_of_any_bytes_can_be_typed(name: bytes) -> None:
    word = name.decode("utf-8", "surrogateescape")
    assert quote(word).isprintable()
    assert split(quote(word)) == [word]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  a  b\tc ", ["a", "b", "c"]),
        ("sh -c 'echo \"x y\"'", ["sh", "-c", 'echo "x y"']),
        ('"a\\"b"', ['a"b']),
        ("a\\ b", ["a b"]),
        ("\\x41\\xff", ["A\udcff"]),
        ("'\\x41'", ["\\x41"]),
        ("''", [""]),
        ("a # rest", ["a"]),
        ("a#b", ["a#b"]),
        ("", []),
        ("a\\", ["a"]),
    ],
)
def test_splitting(line: str, expected: list[str]) -> None:
    assert split(line) == expected


@pytest.mark.parametrize("line", ["'a", 'b "c', "a\\x00b"])
def test_lines_that_cannot_be_split(line: str) -> None:
    with pytest.raises(ValueError, match=r"not closed|NUL"):
        split(line)


def test_the_unfinished_word() -> None:
    partial = unfinished("cat 'base:/my fi")
    assert (partial.before, partial.word, partial.start) == (("cat",), "base:/my fi", 4)
    partial = unfinished("cat ")
    assert (partial.before, partial.word, partial.start) == (("cat",), "", 4)
