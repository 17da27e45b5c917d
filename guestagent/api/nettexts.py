"""A request for the network as short texts: for a command line, a person's or the kernel's.

Each text is a part of the request:

    interface,match=mac=52:54:00:12:34:56,name=eth0,addresses=10.0.0.2/24,addresses=fd00::2/64
    interface,vlan=parent=eth0+id=5,name=eth0.5,routes=destination=default+gateway=10.5.0.1
    rule,priority=100,table=1000,source=10.0.0.0/24
    dns,servers=10.0.0.1,search=example.org
    hosts,address=10.0.0.2,names=guest
    hostname=guest
    wait_ms=1000

The fields are those of ``guestagent.api.net``. A list has an item for each time that its field is
there, and is empty when that has no value.
"""

from collections.abc import Mapping
from types import GenericAlias, UnionType

from guestagent.api.net import Dns, HostsEntry, Interface, NetConfigure, Rule
from vsock.errors import CallError
from vsock.record import Record

__all__ = ("check_network_part", "network_from_texts")

#: First word of a text -> field of the request that it has an item for, and the item's record.
_LISTS: Mapping[str, tuple[str, type[Record]]] = {
    "interface": ("interfaces", Interface),
    "rule": ("rules", Rule),
    "hosts": ("hosts", HostsEntry),
}


def network_from_texts(texts: tuple[str, ...]) -> NetConfigure:
    """Return the request that the texts are the parts of.

    Raises:
        ValueError: a text or a field is unknown, given twice, or has a value that cannot be.
    """
    request: dict[str, object] = {}
    for text in texts:
        name, value = _part(text)
        if isinstance(value, list):
            found = request.setdefault(name, [])
            assert isinstance(found, list)
            found += value
        elif name in request:
            raise ValueError(f"network {text!r}: {name} is given twice")
        else:
            request[name] = value
    try:
        return NetConfigure.from_wire(request, "network")
    except CallError as error:
        raise ValueError(error.message) from None


def check_network_part(text: str) -> None:
    """Raise ValueError if a text is no part of a request."""
    network_from_texts((text,))


def _part(text: str) -> tuple[str, object]:
    """Return the field of the request that a text is about, and the value, or a list of one."""
    kind, _, rest = text.partition(",")
    if kind in _LISTS:
        field, record = _LISTS[kind]
        return field, [_record(record, rest, ",", text)]
    if kind == "dns":
        return "dns", _record(Dns, rest, ",", text)
    name, equals, value = text.partition("=")
    if equals and name == "hostname":
        return name, value
    if equals and name == "wait_ms":
        return name, _number(name, value)
    raise ValueError(
        f"network {text!r}: expected interface,... rule,... dns,... hosts,... hostname=NAME or "
        "wait_ms=N"
    )


def _record(kind: type[Record], text: str, separator: str, whole: str) -> dict[str, object]:
    values: dict[str, object] = {}
    for word in text.split(separator) if text else ():
        name, equals, value = word.partition("=")
        if name not in kind._fields or not equals:
            known = ", ".join(kind._fields)
            raise ValueError(f"network {whole!r}: {word!r} is none of {known}, with =VALUE")
        inner, is_list = _inner(kind._fields[name][0])
        if is_list:
            found = values.setdefault(name, [])
            assert isinstance(found, list)
            found += [_value(inner, name, value, whole)] if value else []
        elif name in values:
            raise ValueError(f"network {whole!r}: {name} is given twice")
        else:
            values[name] = _value(inner, name, value, whole)
    return values


def _inner(annotation: object) -> tuple[object, bool]:
    """Return the type of a field, or of the items of its list, and whether it is a list."""
    if isinstance(annotation, UnionType):
        annotation = annotation.__args__[0]
    if isinstance(annotation, GenericAlias):
        return annotation.__args__[0], True
    return annotation, False


def _value(kind: object, name: str, text: str, whole: str) -> object:
    if isinstance(kind, type) and issubclass(kind, Record):
        return _record(kind, text, "+", whole)
    if kind is bool:
        if text not in ("1", "0"):
            raise ValueError(f"network {whole!r}: {name} must be 1 or 0, got {text!r}")
        return text == "1"
    return _number(name, text) if kind is int else text


def _number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise ValueError(f"{name}: {text!r} is no number")
    return int(text)
