"""Frozen, checked values that travel: what a dataclass is, at a price that a guest can pay.

``dataclasses`` costs 10 ms to import and 0.6 ms for each class (it compiles source text), which is
too much of the start-up of an agent under an emulated CPU. ``Record`` gives the same contract to
the type checker (PEP 681) with no code generation, and adds the two directions of the wire:

    class Range(Record):
        offset_bytes: int
        size_bytes: int | None = None

        def check(self) -> None:
            if self.offset_bytes < 0:
                raise ValueError("offset_bytes is negative")

    Range.from_wire({"offset_bytes": 4096})    # CallError "invalid" says what was wrong and where
    Range(offset_bytes=4096).to_wire()         # {"offset_bytes": 4096, "size_bytes": None}

Field types may be: bool, int, float, str, bytes, Record classes, ``tuple[T, ...]``,
``Mapping[str, T]``, ``object`` (anything) and unions of these; a union of Record classes is told
apart by the default of their field ``kind``. On the wire a ``bytes`` field takes binary or
hexadecimal text. Unknown names are refused by name.
"""

import functools
import types
from collections.abc import Callable, Mapping

from vsock.errors import CallError

TYPE_CHECKING = False  # as typing's, without its import
if TYPE_CHECKING:
    from typing import Self, dataclass_transform
else:

    def dataclass_transform(**_: object) -> "Callable[[type], type]":
        return lambda cls: cls


__all__ = ("Record", "decode", "wire_fields")

_REQUIRED = object()
#: No field of the contract is an integer outside the signed and unsigned 64-bit ranges.
_INT_MIN, _INT_MAX = -(1 << 63), (1 << 64) - 1
_HEX = frozenset("0123456789abcdefABCDEF")
#: What is plain already, and most of what there is.
_SCALARS = frozenset((str, int, bool, float, bytes, types.NoneType))
#: Without int, whose range is looked at.
_TAKEN_AS_THEY_ARE = _SCALARS - {int}

#: A peer that makes shapes up costs itself time, and nobody memory.
_MAX_SHAPES = 64

#: Takes a value, and where it is; returns it checked and converted.
_Decoder = Callable[[object, str], object]
_Shape = tuple[tuple[str, _Decoder], ...]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class RecordType(type):
    """Turns annotations into a table of fields: name -> (type, default)."""

    _fields: dict[str, tuple[object, object]]
    #: For the constructor: what a record starts from, in the order of the fields; how many there
    #: are; which of them must be given; whether there is more to check.
    _plan: tuple[dict[str, object], int, frozenset[str], bool]
    #: For the decoder: what the fields of a map need, by its names and the types of its values.
    _shapes: dict[tuple[object, ...], _Shape]
    _decoders: dict[str, _Decoder]

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, object], **keywords: object
    ) -> "RecordType":
        fields: dict[str, tuple[object, object]] = {}
        for base in bases:
            fields.update(getattr(base, "_fields", {}))
        own = namespace.get("__annotations__", {})
        assert isinstance(own, dict)
        for field, kind in own.items():
            fields[field] = (kind, namespace.pop(field, _REQUIRED))
        namespace["__match_args__"] = ()
        cls = super().__new__(mcs, name, bases, namespace, **keywords)
        cls._fields = fields
        blank = {field: default for field, (_, default) in fields.items()}
        required = frozenset(field for field, default in blank.items() if default is _REQUIRED)
        has_check = bool(bases) and getattr(cls, "check", None) is not Record.check
        cls._plan = blank, len(blank), required, has_check
        cls._shapes = {}
        cls._decoders = {}
        return cls

    def _decoder_of(cls, field: str) -> _Decoder:
        """Return what decodes a field; made when it is first needed."""
        decoder = cls._decoders.get(field)
        if decoder is None:
            # by field and not by type: unions of the same members are equal in any order, but the
            # first that fits converts
            decoder = cls._decoders[field] = _decoder(cls._fields[field][0])
        return decoder


def _plain_types(kind: object) -> frozenset[type]:
    """Return those of a field's types whose every value it takes as it is: most of what comes."""
    members = frozenset(kind.__args__ if isinstance(kind, types.UnionType) else (kind,))
    if len(members - {types.NoneType}) > 1:
        return frozenset()  # of several, the first that fits converts
    return members & _TAKEN_AS_THEY_ARE


class Record(metaclass=RecordType):
    """Base of all records. Subclasses annotate fields, and override ``check`` to refuse values.

    The fields are all that an instance's ``__dict__`` holds, in order, so that a record is made,
    compared and packed by single calls into C: a request makes dozens of them.
    """

    def __init__(self, **values: object) -> None:
        blank, count, required, has_check = type(self)._plan
        fields = self.__dict__
        fields.update(blank)
        fields.update(values)
        if len(fields) > count or (len(values) < count and not values.keys() >= required):
            raise _not_the_fields(type(self), fields)
        if has_check:
            self.check()

    def check(self) -> None:
        """Raise ValueError if the fields do not make sense together; the text reaches the peer."""

    def replace(self, **changes: object) -> "Self":
        """Return a copy with some fields changed, checked like any other."""
        return type(self)(**{**self.__dict__, **changes})

    def as_dict(self) -> dict[str, object]:
        """Return the fields by name, values as they are."""
        return dict(self.__dict__)

    def to_wire(self) -> dict[str, object]:
        """Return maps, lists and scalars only, ready for MessagePack or JSON."""
        return {name: _plain(value) for name, value in self.__dict__.items()}

    def to_sparse_wire(self) -> dict[str, object]:
        """Return what ``to_wire`` does without the fields that have their default, which a reader
        of the same contract fills in; the ``kind`` of a record is always told."""
        fields = type(self)._fields
        return {
            name: _sparse(value)
            for name, value in self.__dict__.items()
            if name == "kind" or not _is_same(value, fields[name][1])
        }

    @classmethod
    def from_wire(cls, value: object, where: str = "params") -> "Self":
        """Check and convert a decoded map.

        Raises:
            CallError: ``invalid``, with the path of the offending field in message and object.
        """
        record = decode(cls, value, where)
        assert isinstance(record, cls)
        return record

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: cannot delete {name!r}")

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items())
        return f"{type(self).__name__}({fields})"


def wire_fields(value: object) -> object:
    """Return what a record holds, which may be records again: for MessagePack's ``default``.

    Packing by it gives the bytes of ``to_wire()`` without the copy.

    Raises:
        TypeError: the value is none that travels.
    """
    if isinstance(value, Record):
        return value.__dict__
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} does not travel")


def _not_the_fields(cls: RecordType, given: Mapping[str, object]) -> TypeError:
    for name in cls._fields:
        if given[name] is _REQUIRED:
            return TypeError(f"{cls.__name__}: missing field {name!r}")
    unknown = next(name for name in given if name not in cls._fields)
    return TypeError(f"{cls.__name__}: unknown field {unknown!r}")


def decode(kind: object, value: object, where: str) -> object:
    """Check ``value`` against the annotation ``kind`` and convert it.

    Raises:
        CallError: ``invalid``; ``object`` is ``where`` extended to the offending part.
    """
    return _decoder(kind)(value, where)


def _decoder(kind: object) -> _Decoder:
    """Return what does the work of ``decode`` for one annotation."""
    if isinstance(kind, types.UnionType):
        return _union_decoder(kind.__args__)
    if isinstance(kind, types.GenericAlias):
        if kind.__origin__ is tuple:
            return functools.partial(_decode_array, _decoder(kind.__args__[0]))
        return functools.partial(_decode_map, _decoder(kind.__args__[1]))
    if isinstance(kind, type) and issubclass(kind, Record):
        return functools.partial(_decode_record, kind)
    return _decode_int if kind is int else functools.partial(_decode_scalar, kind)


def _union_decoder(members: tuple[object, ...]) -> _Decoder:
    rest = tuple(member for member in members if member is not types.NoneType)
    records = [cls for cls in rest if isinstance(cls, type) and issubclass(cls, Record)]
    first = functools.partial(_decode_first, tuple(map(_decoder, rest)))
    if len(rest) == 1:
        inner = _decoder(rest[0])
    elif records:
        by_kind = {cls._fields["kind"][1]: cls for cls in records}
        inner = functools.partial(_decode_tagged, first, by_kind)
    else:
        inner = first
    return functools.partial(_decode_optional, inner) if len(rest) < len(members) else inner


def _invalid(where: str, problem: str) -> CallError:
    return CallError("invalid", f"{where}: {problem}", step="decode", object=where)


def _decode_record(cls: type[Record], value: object, where: str) -> object:
    if type(value) is not dict and not isinstance(value, Mapping):
        raise _invalid(where, f"expected a map, got {_name_of(value)}")
    # the maps of a peer have few shapes, and most of their values are plain
    key = (*value, *map(type, value.values()))
    shape = cls._shapes.get(key)
    if shape is None:
        shape = _shape_of(cls, value, where)
        if len(cls._shapes) >= _MAX_SHAPES:
            cls._shapes.clear()
        cls._shapes[key] = shape
    fields = {**cls._plan[0], **value}
    for name, decoder in shape:
        fields[name] = decoder(value[name], f"{where}.{name}")
    record = cls.__new__(cls)
    record.__dict__.update(fields)
    if cls._plan[3]:
        try:
            record.check()
        except ValueError as problem:
            raise _invalid(where, str(problem)) from None
    return record


def _shape_of(cls: type[Record], value: Mapping[object, object], where: str) -> _Shape:
    """Return the fields of a map whose values have to be looked at, each with what does it."""
    if not (cls._fields.keys() >= value.keys() >= cls._plan[2]):
        raise _not_the_keys(cls, value, where)
    return tuple(
        (name, cls._decoder_of(name))
        for name, item in value.items()
        if isinstance(name, str) and type(item) not in _plain_types(cls._fields[name][0])
    )


def _not_the_keys(cls: type[Record], value: Mapping[object, object], where: str) -> CallError:
    for name in value:
        if name not in cls._fields:
            known = ", ".join(cls._fields) or "none"
            return _invalid(f"{where}.{name}", f"unknown parameter (known: {known})")
    missing = next(name for name in cls._fields if name in cls._plan[2] and name not in value)
    return _invalid(f"{where}.{missing}", "missing")


def _decode_optional(inner: _Decoder, value: object, where: str) -> object:
    return None if value is None else inner(value, where)


def _decode_tagged(
    otherwise: _Decoder, by_kind: dict[object, type[Record]], value: object, where: str
) -> object:
    """Decode one of several records, told by its kind, or what else the union may be."""
    if type(value) is not dict and not isinstance(value, Mapping):
        return otherwise(value, where)
    tag = value.get("kind")
    cls = by_kind.get(tag) if isinstance(tag, str) else None
    if cls is None:
        known = ", ".join(sorted(str(name) for name in by_kind))
        raise _invalid(f"{where}.kind", f"expected one of {known}, got {tag!r}")
    return _decode_record(cls, value, where)


def _decode_first(decoders: tuple[_Decoder, ...], value: object, where: str) -> object:
    for decoder in decoders:
        try:
            return decoder(value, where)
        except CallError:
            continue
    raise _invalid(where, f"unexpected type {_name_of(value)}")


def _decode_array(inner: _Decoder, value: object, where: str) -> object:
    if not isinstance(value, (list, tuple)):
        raise _invalid(where, f"expected an array, got {_name_of(value)}")
    return tuple(inner(item, f"{where}[{index}]") for index, item in enumerate(value))


def _decode_map(inner: _Decoder, value: object, where: str) -> object:
    if not isinstance(value, Mapping):
        raise _invalid(where, f"expected a map, got {_name_of(value)}")
    for name in value:
        if not isinstance(name, str):
            raise _invalid(where, f"expected text keys, got {name!r}")
    return {name: inner(item, f"{where}.{name}") for name, item in value.items()}


def _decode_int(value: object, where: str) -> object:
    if type(value) is int and _INT_MIN <= value <= _INT_MAX:
        return value
    return _decode_scalar(int, value, where)


def _decode_scalar(kind: object, value: object, where: str) -> object:
    if kind is object:
        return value
    if kind is bytes and isinstance(value, str):
        return _bytes_from_hex(value, where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    assert isinstance(kind, type)
    # bool is an int to Python, never to the contract
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _invalid(where, f"expected {kind.__name__}, got {_name_of(value)}")
    if isinstance(value, int) and not _INT_MIN <= value <= _INT_MAX:
        raise _invalid(where, f"{value} does not fit into 64 bits")
    return value


def _bytes_from_hex(text: str, where: str) -> bytes:
    # bytes.fromhex skips white space, which has no place in a digest
    if not _HEX.issuperset(text):
        raise _invalid(where, "expected binary or hexadecimal text")
    if len(text) % 2:
        raise _invalid(where, f"hexadecimal text of odd length {len(text)}")
    return bytes.fromhex(text)


def _name_of(value: object) -> str:
    return "nil" if value is None else type(value).__name__


def _is_same(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and value == default)


def _sparse(value: object) -> object:
    if isinstance(value, Record):
        return value.to_sparse_wire()
    if type(value) is tuple:
        return [_sparse(item) for item in value]
    return _plain(value)


def _plain(value: object) -> object:
    kind = type(value)
    if kind in _SCALARS:
        return value
    if isinstance(value, Record):
        return value.to_wire()
    if kind is tuple or kind is list:
        return [_plain(item) for item in value]  # type: ignore[attr-defined]  # narrowed by kind
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value
