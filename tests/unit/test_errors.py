import errno
import pickle

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsock.errors import CODES, CallError

_FIELDS = ("code", "message", "errno", "step", "object", "hint", "kernel_log")
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_call_error_survives_wire_round_trip():
    error = CallError(
        "busy", "in use", errno=errno.EBUSY, step="unmount", object="/run/a", hint="wait",
        kernel_log=("one", "two"),
    )  # fmt: skip
    again = CallError.from_wire(error.to_wire())
    assert again.to_wire() == error.to_wire()
    assert again.errno == errno.EBUSY


@pytest.mark.parametrize("name", ["errorcode", "__name__", "__doc__", "__dict__", "ENONSENSE", ""])
def test_an_errno_is_the_name_of_a_number_and_nothing_else(name):
    error = CallError.from_wire({"code": "device", "message": "", "errno": name})
    assert error.errno is None
    assert error.to_wire()["errno"] is None


@pytest.mark.parametrize("field", ["message", "step", "object", "hint"])
def test_each_text_is_cut(field):
    texts = {"message": "m", field: "\u20ac" * (1 << 20)}
    wire = CallError("invalid", **texts).to_wire()
    assert len(msgpack.packb(wire)) < (64 << 10) + 1024
    assert str(wire[field]).startswith("\u20ac" * 21000)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("code", "message", "errno", "step", "object", "hint", "kernel_log"), _JSON
        ),
    )
    | _JSON
)
def test_any_map_of_a_peer_becomes_an_error_that_can_be_told_again(value):
    error = CallError.from_wire(value)
    assert error.code in CODES or error.code == value["code"]
    assert isinstance(error.errno, int | None)
    msgpack.packb(error.to_wire(), unicode_errors="backslashreplace")


def test_a_code_that_is_unknown_here_survives():
    error = CallError.from_wire({"code": "quota", "message": "m", "retry_after_ms": 5})
    assert (error.code, str(error)) == ("quota", "quota: m")
    assert error.to_wire()["code"] == "quota"
    assert pickle.loads(pickle.dumps(error)).code == "quota"
    with pytest.raises(ValueError, match="quota"):
        CallError("quota", "m")


@pytest.mark.parametrize("code", ["", "x" * 65, "a b", "\x1b[2J", "Quota", 5, None])
def test_a_code_that_is_no_word_becomes_internal(code):
    assert CallError.from_wire({"code": code, "message": "m"}).code == "internal"
