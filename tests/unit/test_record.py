import itertools
from collections.abc import Mapping
from types import MappingProxyType

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.beds.calls import call_error
from vsock.errors import CallError
from vsock.record import Record, wire_fields


class Inner(Record):
    name: str
    size: int = 0

    def check(self) -> None:
        if self.size < 0:
            raise ValueError("size is negative")


class Square(Record):
    kind: str = "square"
    side: float = 1.0


class Circle(Record):
    kind: str = "circle"
    radius: float = 1.0


class Outer(Record):
    flag: bool = False
    digest: bytes = b""
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    by_name: Mapping[str, int] = {}
    anything: object = None
    shape: Square | Circle | None = None
    text_or_number: str | int = 0
    one_or_many: Inner | tuple[Inner, ...] | None = None


class Derived(Inner):
    extra: str = "e"


def refused(wire, where, kind=Outer):
    with call_error("invalid", object=where) as caught:
        kind.from_wire(wire)
    return caught.value.message


def test_a_record_goes_to_the_wire_and_back():
    value = Outer(
        flag=True,
        digest=b"\x01\xff",
        inner=Inner(name="a", size=2),
        many=(Inner(name="b"), Inner(name="c")),
        by_name={"x": 1},
        anything=[1, {"y": None}],
        shape=Circle(radius=2.0),
        text_or_number="t",
    )
    wire = value.to_wire()
    assert wire["inner"] == {"name": "a", "size": 2}
    assert wire["many"] == [{"name": "b", "size": 0}, {"name": "c", "size": 0}]
    assert Outer.from_wire(wire) == value
    assert hash(Inner(name="a")) == hash(Inner(name="a"))


def test_one_value_is_told_from_an_array_by_its_shape():
    one, many = Inner(name="a"), (Inner(name="b"), Inner(name="c", size=1))
    for value in (one, many, (), None):
        assert Outer.from_wire(Outer(one_or_many=value).to_wire()).one_or_many == value
    assert "missing" in refused({"one_or_many": {}}, "params.one_or_many.name")
    refused({"one_or_many": [{"name": "a"}, {"name": "b", "size": -1}]}, "params.one_or_many[1]")
    assert "expected a map" in refused({"one_or_many": 7}, "params.one_or_many")
    assert "expected a map" in refused({"one_or_many": [[]]}, "params.one_or_many[0]")


def test_a_sparse_wire_leaves_out_what_is_default():
    value = Outer(
        inner=Inner(name="a"),
        many=(Inner(name="b", size=1),),
        by_name={"x": 0},
        shape=Circle(),
        text_or_number=False,  # not the same as 0, though it compares so
    )
    assert value.to_sparse_wire() == {
        "inner": {"name": "a"},
        "many": [{"name": "b", "size": 1}],
        "by_name": {"x": 0},
        "shape": {"kind": "circle"},
        "text_or_number": False,
    }
    assert Outer().to_sparse_wire() == {}
    plain = value.replace(text_or_number="t")
    assert Outer.from_wire(plain.to_sparse_wire()) == plain


def test_records_are_frozen_and_compare_by_type_and_value():
    inner = Inner(name="a")
    for change in (lambda: setattr(inner, "name", "b"), lambda: delattr(inner, "name")):
        with pytest.raises(AttributeError, match="Inner is frozen"):
            change()
    assert inner.replace(size=3) == Inner(name="a", size=3)
    assert inner != Inner(name="b")
    assert Square() != Circle()
    assert repr(inner) == "Inner(name='a', size=0)"
    assert Derived(name="a").as_dict() == {"name": "a", "size": 0, "extra": "e"}


def test_no_invalid_record_can_be_made():
    with pytest.raises(ValueError, match="size is negative"):
        Inner(name="a", size=-1)
    with pytest.raises(ValueError, match="size is negative"):
        Inner(name="a").replace(size=-1)
    with pytest.raises(TypeError, match="missing field 'name'"):
        Inner()
    with pytest.raises(TypeError, match="unknown field 'nmae'"):
        Inner(name="a", nmae="b")


@pytest.mark.parametrize(
    ("wire", "where"),
    [
        (None, "params"),
        ([], "params"),
        ({"falg": True}, "params.falg"),
        ({"flag": 1}, "params.flag"),
        ({"flag": None}, "params.flag"),
        ({"digest": 5}, "params.digest"),
        ({"digest": "0g"}, "params.digest"),
        ({"digest": "abc"}, "params.digest"),
        ({"digest": "ab cd "}, "params.digest"),
        ({"inner": {}}, "params.inner.name"),
        ({"inner": {"name": 5}}, "params.inner.name"),
        ({"inner": {"name": "a", "size": True}}, "params.inner.size"),
        ({"inner": {"name": "a", "size": 1.0}}, "params.inner.size"),
        ({"inner": {"name": "a", "size": 1 << 64}}, "params.inner.size"),
        ({"inner": {"name": "a", "size": -1}}, "params.inner"),
        ({"inner": {"name": "a", "more": 1}}, "params.inner.more"),
        ({"many": {}}, "params.many"),
        ({"many": [{"name": "a"}, {}]}, "params.many[1].name"),
        ({"by_name": []}, "params.by_name"),
        ({"by_name": {1: 1}}, "params.by_name"),
        ({"by_name": {"x": "y"}}, "params.by_name.x"),
        ({"shape": {"kind": "line"}}, "params.shape.kind"),
        ({"shape": {"side": 1.0}}, "params.shape.kind"),
        ({"shape": {"kind": ["square"]}}, "params.shape.kind"),
        ({"shape": {"kind": "circle", "side": 1.0}}, "params.shape.side"),
        ({"shape": 5}, "params.shape"),
        ({"text_or_number": []}, "params.text_or_number"),
    ],
)
def test_invalid_value_is_refused_with_its_place(wire, where):
    assert where in refused(wire, where)


@pytest.mark.parametrize(
    ("wire", "where"),
    [
        ({"name": "b", "size": True}, "params.size"),
        ({"name": "b", "size": -1}, "params"),
        ({"name": b"b", "size": 1}, "params.name"),
        ({"size": 1}, "params.name"),
    ],
)
def test_wrong_map_is_refused_after_a_right_one_of_the_same_shape(wire, where):
    assert Inner.from_wire({"name": "a", "size": 1}) == Inner(name="a", size=1)
    assert Inner.from_wire({"size": 1, "name": "a"}) == Inner(name="a", size=1)
    for _ in range(2):
        refused(wire, where, Inner)


def test_any_part_of_the_fields_is_read_and_the_rest_has_its_default():
    whole = Outer(inner=Inner(name="a"), by_name={"x": 1}, shape=Circle(), flag=True)
    wire, fields = whole.to_wire(), whole.as_dict()
    for size in range(len(wire) + 1):
        for names in itertools.combinations(wire, size):
            part = {name: wire[name] for name in names}
            assert Outer.from_wire(part) == Outer(**{name: fields[name] for name in names})


def test_unknown_names_from_a_newer_peer_are_ignored_if_not_strict():
    wire = {
        "flag": True,
        "newer": {"any": ["thing"]},
        "inner": {"name": "a", "newer": 1},
        "many": [{"name": "b", "newer": None}],
        "by_name": {"x": 1},
        "shape": {"kind": "square", "side": 2, "newer": b""},
    }
    expected = Outer(
        flag=True,
        inner=Inner(name="a"),
        many=(Inner(name="b"),),
        by_name={"x": 1},
        shape=Square(side=2.0),
    )
    assert Outer.from_wire(wire, "reply", strict=False) == expected
    refused(wire, "params.newer")
    with pytest.raises(CallError) as caught:
        Outer.from_wire({"many": [{"name": "b"}, {"newer": 1}]}, "reply", strict=False)
    assert caught.value.object == "reply.many[1].name"
    with pytest.raises(CallError) as caught:
        Outer.from_wire({"flag": 1, "newer": 1}, "reply", strict=False)
    assert caught.value.object == "reply.flag"


def test_an_unknown_name_is_told_the_known_ones():
    assert "known: name, size" in refused({"nmae": "x"}, "params.nmae", Inner)


def test_bytes_come_as_binary_or_as_hexadecimal_text():
    for wire in (b"\x0a\xff", "0aff", "0AFF"):
        assert Outer.from_wire({"digest": wire}).digest == b"\x0a\xff"


def test_a_whole_number_is_a_float_and_a_tagged_union_is_told_apart():
    assert Outer.from_wire({"shape": {"kind": "square", "side": 2}}).shape == Square(side=2.0)
    assert Outer.from_wire({"shape": {"kind": "circle"}}).shape == Circle()
    assert Outer.from_wire({"shape": None}).shape is None
    assert Outer.from_wire({"text_or_number": 5}).text_or_number == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(sorted(Outer._fields)) | st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_value_is_a_record_or_a_call_error(wire):
    problem = None
    try:
        value = Outer.from_wire(wire)
    except CallError as error:
        problem = error
    if problem is None:
        assert isinstance(value, Outer)
    else:
        assert problem.code == "invalid"
        assert problem.object.startswith("params")


def test_packing_by_fields_gives_the_bytes_of_the_wire_form():
    layer = Outer(
        digest=b"\0\xff",
        many=(Inner(name="a"),),
        by_name=MappingProxyType({"x": 1}),
        shape=Circle(),
    )
    packed = msgpack.packb(layer, default=wire_fields)
    assert packed == msgpack.packb(layer.to_wire())
    with pytest.raises(TypeError, match="a set does not travel"):
        msgpack.packb({"a": set()}, default=wire_fields)


def test_a_missing_field_is_not_made_up_for_by_an_unknown_one():
    with pytest.raises(TypeError, match="missing field 'name'"):
        Inner(names="a")


class IntegerFirst(Record):
    number: int | float


class FloatFirst(Record):
    number: float | int


def test_the_first_of_a_union_that_fits_converts_whatever_another_record_has():
    for _ in range(2):
        assert type(IntegerFirst.from_wire({"number": 1}).number) is int
        assert type(FloatFirst.from_wire({"number": 1}).number) is float
