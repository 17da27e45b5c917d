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
``Mapping[str, T]``, ``object`` (anything) and unions of these; Record classes in a union are told
apart by the default of their field ``kind``, one value from an array of such by its shape. On the
wire a ``bytes`` field takes binary or hexadecimal text. Unknown names are refused by name: a
misspelt option of a request must not be ignored. In a reply they may be ignored
(``strict=False``): a newer peer adds fields.
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

#: Takes a value, and whether unknown names are refused; returns the value checked and converted.
_Decoder = Callable[[object, bool], object]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class RecordType(type):
    """Turns annotations into a table of fields: name -> (type, default)."""

    _fields: dict[str, tuple[object, object]]
    #: For the constructor: what a record starts from, in the order of the fields; how many there
    #: are; which of them must be given; whether there is more to check.
    _plan: tuple[dict[str, object], int, frozenset[str], bool]
    #: For the decoder: field -> decoder. Made when the first record is decoded.
    _decoders: dict[str, _Decoder] | None

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
        cls._decoders = None
        return cls


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
        return _fields_of(self, sparse=False)

    def to_sparse_wire(self) -> dict[str, object]:
        """Return what ``to_wire`` does without the fields that have their default, which a reader
        of the same contract fills in; the ``kind`` of a record is always told."""
        return _fields_of(self, sparse=True)

    @classmethod
    def from_wire(cls, value: object, where: str = "params", *, strict: bool = True) -> "Self":
        """Check and convert a decoded map.

        Unknown names are refused, also in records inside. With ``strict`` false, for what a newer
        peer may have sent, they are ignored, and ``check`` is not called, because its lists of
        values are of this version.

        Raises:
            CallError: ``invalid``, with the path of the offending field in message and object.
        """
        return decode(cls, value, where, strict=strict)  # type: ignore[return-value]  # a cls

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


class _Invalid(Exception):
    """A value is refused; every record, array and map around it adds its part of the path."""

    def __init__(self, problem: str, path: str = "") -> None:
        self.problem = problem
        self.path = path


def decode(kind: object, value: object, where: str, *, strict: bool = True) -> object:
    """Check ``value`` against the annotation ``kind`` and convert it.

    Raises:
        CallError: ``invalid``; ``object`` is ``where`` extended to the offending part.
    """
    try:
        return _decoder(kind)(value, strict)
    except _Invalid as refusal:
        place = where + refusal.path
        text = f"{place}: {refusal.problem}"
        raise CallError("invalid", text, step="decode", object=place) from None


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
    return functools.partial(_decode_scalar, kind)


def _union_decoder(members: tuple[object, ...]) -> _Decoder:
    is_optional = types.NoneType in members
    rest = [member for member in members if member is not types.NoneType]
    arrays = [each for each in rest if isinstance(each, types.GenericAlias)]
    if len(rest) == 2 and len(arrays) == 1:  # one value, or an array of them
        single = next(each for each in rest if each is not arrays[0])
        either = functools.partial(_decode_one_or_many, _decoder(single), _decoder(arrays[0]))
        return functools.partial(_decode_union, is_optional, either)
    records = [cls for cls in rest if isinstance(cls, type) and issubclass(cls, Record)]
    if len(rest) == 1:
        return functools.partial(_decode_union, is_optional, _decoder(rest[0]))
    if records:
        tags = {cls._fields["kind"][1]: cls for cls in records}
        return functools.partial(
            _decode_union, is_optional, functools.partial(_decode_tagged, tags)
        )
    decoders = tuple(map(_decoder, rest))
    return functools.partial(_decode_union, is_optional, functools.partial(_decode_first, decoders))


def _decode_record(cls: type[Record], value: object, strict: bool) -> object:
    if not isinstance(value, Mapping):
        raise _Invalid(f"expected a map, got {_name_of(value)}")
    decoders = cls._decoders
    if decoders is None:
        decoders = {field: _decoder(kind) for field, (kind, _) in cls._fields.items()}
        cls._decoders = decoders
    fields: dict[str, object] = {}
    name: object = None
    try:
        for name, item in value.items():
            if name in decoders:
                fields[name] = decoders[name](item, strict)
            elif strict:
                known = ", ".join(cls._fields) or "none"
                raise _Invalid(f"unknown parameter (known: {known})")
    except _Invalid as refusal:
        refusal.path = f".{name}{refusal.path}"
        raise
    if not fields.keys() >= cls._plan[2]:
        missing = next(name for name in cls._fields if name in cls._plan[2] - fields.keys())
        raise _Invalid("missing", f".{missing}")
    if not strict:
        record = cls.__new__(cls)
        record.__dict__.update(cls._plan[0])
        record.__dict__.update(fields)
        return record
    try:
        return cls(**fields)
    except ValueError as problem:
        raise _Invalid(str(problem)) from None


def _decode_union(is_optional: bool, inner: _Decoder, value: object, strict: bool) -> object:
    return None if value is None and is_optional else inner(value, strict)


def _decode_one_or_many(one: _Decoder, many: _Decoder, value: object, strict: bool) -> object:
    return (many if isinstance(value, (list, tuple)) else one)(value, strict)


def _decode_tagged(tags: dict[object, type[Record]], value: object, strict: bool) -> object:
    """Decode one of several records, told by its kind."""
    if not isinstance(value, Mapping):
        raise _Invalid(f"unexpected type {_name_of(value)}")
    tag = value.get("kind")
    if not isinstance(tag, str) or tag not in tags:
        known = ", ".join(sorted(map(str, tags)))
        raise _Invalid(f"expected one of {known}, got {tag!r}", ".kind")
    return _decode_record(tags[tag], value, strict)


def _decode_first(decoders: tuple[_Decoder, ...], value: object, strict: bool) -> object:
    for decoder in decoders:
        try:
            return decoder(value, strict)
        except _Invalid:
            continue
    raise _Invalid(f"unexpected type {_name_of(value)}")


def _decode_array(inner: _Decoder, value: object, strict: bool) -> object:
    if not isinstance(value, (list, tuple)):
        raise _Invalid(f"expected an array, got {_name_of(value)}")
    items: list[object] = []
    try:
        for item in value:
            items.append(inner(item, strict))  # noqa: PERF401  # its length is the index
    except _Invalid as refusal:
        refusal.path = f"[{len(items)}]{refusal.path}"
        raise
    return tuple(items)


def _decode_map(inner: _Decoder, value: object, strict: bool) -> object:
    if not isinstance(value, Mapping):
        raise _Invalid(f"expected a map, got {_name_of(value)}")
    items: dict[str, object] = {}
    for name, item in value.items():
        if not isinstance(name, str):
            raise _Invalid(f"expected text keys, got {name!r}")
        try:
            items[name] = inner(item, strict)
        except _Invalid as refusal:
            refusal.path = f".{name}{refusal.path}"
            raise
    return items


def _decode_scalar(kind: object, value: object, strict: bool) -> object:
    # bool is an int to Python, never to the contract
    if type(value) is kind or kind is object:
        if kind is int and not _INT_MIN <= value <= _INT_MAX:  # type: ignore[operator]  # an int
            raise _Invalid(f"{value} does not fit into 64 bits")
        return value
    if kind is bytes and isinstance(value, str):
        return _bytes_from_hex(value)
    if kind is float and type(value) is int:
        return float(value)
    assert isinstance(kind, type)
    raise _Invalid(f"expected {kind.__name__}, got {_name_of(value)}")


def _bytes_from_hex(text: str) -> bytes:
    # bytes.fromhex skips white space, which has no place in a digest
    if not _HEX.issuperset(text):
        raise _Invalid("expected binary or hexadecimal text")
    if len(text) % 2:
        raise _Invalid(f"hexadecimal text of odd length {len(text)}")
    return bytes.fromhex(text)


def _name_of(value: object) -> str:
    return "nil" if value is None else type(value).__name__


def _fields_of(record: Record, sparse: bool) -> dict[str, object]:
    fields = type(record)._fields
    return {
        name: _plain(value, sparse)
        for name, value in record.__dict__.items()
        if not sparse or name == "kind" or not _is_same(value, fields[name][1])
    }


def _is_same(value: object, default: object) -> bool:
    return value is default or (type(value) is type(default) and value == default)


def _plain(value: object, sparse: bool) -> object:
    if isinstance(value, Record):
        return _fields_of(value, sparse)
    if isinstance(value, (tuple, list)):
        return [_plain(item, sparse) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item, sparse) for name, item in value.items()}
    return value
