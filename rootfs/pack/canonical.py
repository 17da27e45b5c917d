"""One byte string for each JSON value, so that a signature over it holds wherever it is written.

The rules: UTF-8, members sorted by the code points of their names, no white space, strings escaped
only where JSON demands it, integers in decimal. There are no floating-point numbers, whose text
differs between languages. Bytes that are read must hold each name once.
"""

import json
from collections.abc import Mapping

__all__ = ("canonical_bytes", "parse_json")

_MAX_DEPTH = 64


def canonical_bytes(value: Mapping[str, object]) -> bytes:
    """Return the canonical form of a JSON object.

    Raises:
        ValueError: something in it has no canonical form; the message says where.
    """
    _check(value, "value", 0)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8")


def parse_json(raw: bytes) -> dict[str, object]:
    """Read a JSON object, refusing what another reader might understand otherwise.

    Raises:
        ValueError: not UTF-8, not JSON, no object, a name twice in one object, or a number that is
            no integer.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_float=_no_float,
            parse_constant=_no_float,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {_MAX_DEPTH}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not an object but {type(value).__name__}")
    _check(value, "value", 0)
    return value


def _check(value: object, where: str, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {_MAX_DEPTH}")
    if isinstance(value, Mapping):
        for name, member in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{where}: the name {name!r} is no text")
            _check_text(name, where)
            _check(member, f"{where}.{name}", depth + 1)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, str):
        _check_text(value, where)
    elif value is not None and not isinstance(value, int):
        raise ValueError(f"{where}: a {type(value).__name__} has no canonical form")


def _check_text(text: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"{where}: {text!r} is not encodable")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is there twice")
    return members


def _no_float(text: str) -> object:
    raise ValueError(f"the number {text} is no integer")
