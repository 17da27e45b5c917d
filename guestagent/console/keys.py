"""From the bytes of a terminal to keys, one at a time. Pure.

A key is the character itself, or a name: ``enter tab backspace delete insert left right up down
home end pageup pagedown``, ``^A`` to ``^_`` for the other control characters, ``alt-X``. What means
nothing is the empty text.
"""

__all__ = ("MAX_KEY_BYTES", "decode_key")

_ESC = 0x1B
#: A longer escape sequence is no key's.
MAX_KEY_BYTES = 24
_CONTROLS = {0x08: "backspace", 0x09: "tab", 0x0A: "enter", 0x0D: "enter", 0x7F: "backspace"}
_FINAL = {
    "A": "up",
    "B": "down",
    "C": "right",
    "D": "left",
    "F": "end",
    "H": "home",
}
_TILDE = {
    "1": "home",
    "2": "insert",
    "3": "delete",
    "4": "end",
    "5": "pageup",
    "6": "pagedown",
    "7": "home",
    "8": "end",
}


def decode_key(data: bytes | bytearray) -> tuple[str, int] | None:
    """Return the first key in ``data`` and its length in bytes, None when it is not complete."""
    if not data:
        return None
    first = data[0]
    if first == _ESC:
        return _decode_escape(data)
    if first < 0x20 or first == 0x7F:
        return _CONTROLS.get(first, f"^{chr(first + 0x40)}"), 1
    if first < 0x80:
        return chr(first), 1
    return _decode_utf8(data)


def _decode_utf8(data: bytes | bytearray) -> tuple[str, int] | None:
    first = data[0]
    length = 2 if 0xC2 <= first < 0xE0 else 3 if first < 0xF0 else 4 if first < 0xF5 else 0
    if first < 0xC2 or not length:
        return "", 1
    tail = data[1:length]
    if any(byte & 0xC0 != 0x80 for byte in tail):
        return "", 1
    if len(data) < length:
        return None
    try:
        text = bytes(data[:length]).decode()
    except UnicodeDecodeError:  # surrogates, overlong forms
        return "", 1
    return (text if text.isprintable() else ""), length


def _decode_escape(data: bytes | bytearray) -> tuple[str, int] | None:
    if len(data) < 2:
        return None
    second = data[1]
    if second == ord("["):
        return _decode_sequence(data)
    if second == ord("O"):  # a keypad in application mode
        return (_FINAL.get(chr(data[2]), ""), 3) if len(data) > 2 else None
    if second == _ESC:
        return "", 1
    if second == 0x7F:
        return "alt-backspace", 2
    if 0x20 <= second < 0x7F:
        return f"alt-{chr(second)}", 2
    return "", 1


def _decode_sequence(data: bytes | bytearray) -> tuple[str, int] | None:
    """Read ESC [ PARAMETERS FINAL (ECMA-48, section 5.4)."""
    for end in range(2, min(len(data), MAX_KEY_BYTES)):
        byte = data[end]
        if 0x40 <= byte < 0x7F:
            parameters = bytes(data[2:end]).decode("ascii")
            number = parameters.partition(";")[0]
            final = chr(byte)
            name = _TILDE.get(number, "") if final == "~" else _FINAL.get(final, "")
            return name, end + 1
        if not 0x20 <= byte < 0x40:  # cut short by something else
            return "", end
    return ("", MAX_KEY_BYTES) if len(data) >= MAX_KEY_BYTES else None
