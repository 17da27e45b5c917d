from itertools import pairwise

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestagent.api import ByteRange, LayersMount, LayerSpec, OverlaySpec, PmemDevice, Verity
from vsock.errors import CODES, CallError, LocalProtocolError
from vsock.rpc import (
    MAX_MSGID,
    Decoder,
    Limits,
    Malformed,
    Notification,
    Request,
    Response,
    encode_notification,
    encode_request,
    encode_response,
)

LIMITS = Limits()
PING = encode_request(99, "ping")


def plain(message):
    """Return a message as a value that can be compared."""
    if isinstance(message, Malformed):
        return ("malformed", message.kind, message.msgid, message.error.code, message.fatal)
    if isinstance(message, Request):
        return (0, message.msgid, message.method, message.params)
    if isinstance(message, Response):
        return (1, message.msgid, message.error, message.result)
    assert isinstance(message, Notification)
    return (2, message.method, message.params)


def feed(decoder, data):
    decoder.feed(data)
    return [plain(message) for message in iter(decoder.next, None)]


def decode(data, limits=LIMITS):
    return feed(Decoder(limits), data)


def three_ways(data, limits=LIMITS):
    """Decode whole, byte by byte, and with a message behind; all must agree."""
    whole = decode(data, limits)
    decoder = Decoder(limits)
    bytewise = [message for byte in data for message in feed(decoder, bytes((byte,)))]
    assert bytewise == whole
    if any(one[-1] is True and one[0] == "malformed" for one in whole):
        assert decode(data + PING, limits) == whole
        assert feed(decoder, PING) == []
    else:
        assert decode(data + PING, limits) == [*whole, (0, 99, "ping", {})]
        assert feed(decoder, PING) == [(0, 99, "ping", {})]
    return whole


def test_the_three_kinds():
    assert three_ways(encode_request(1, "m", {"a": [1, b"x", None]})) == [
        (0, 1, "m", {"a": [1, b"x", None]})
    ]
    assert three_ways(encode_notification("m", {"a": 1.5})) == [(2, "m", {"a": 1.5})]
    assert three_ways(encode_response(7, None, [1], LIMITS)) == [(1, 7, None, [1])]
    error = CallError("busy", "no").to_wire()
    assert three_ways(encode_response(7, error, None, LIMITS)) == [(1, 7, error, None)]


def test_params_may_be_left_out():
    assert three_ways(msgpack.packb([0, 1, "m", []])) == [(0, 1, "m", {})]
    assert three_ways(msgpack.packb([2, "m", []])) == [(2, "m", {})]


def test_a_wasteful_encoding_is_as_good():
    wide = b"\xdd\0\0\0\4" + b"\xd3" + bytes(8) + b"\xcf" + bytes(7) + b"\5"
    assert three_ways(wide + b"\xdb\0\0\0\1m" + b"\xdc\0\1" + b"\xdf\0\0\0\0") == [(0, 5, "m", {})]


def test_several_messages_in_one_feed():
    assert decode(PING * 3) == [(0, 99, "ping", {})] * 3


INVALID = [
    # bytes, kind, msgid
    (msgpack.packb([0, 5, "m", [{}, {}]]), "request", 5),
    (msgpack.packb([0, 5, "m", {}]), "request", 5),
    (msgpack.packb([0, 5, "m", [1]]), "request", 5),
    (msgpack.packb([0, 5, "m", None]), "request", 5),
    (msgpack.packb([0, 5, b"m", [{}]]), "request", 5),
    (msgpack.packb([0, 5, 6, [{}]]), "request", 5),
    (msgpack.packb([0, 5]), "request", 5),
    (msgpack.packb([0, 5, "m", [{}], 1]), "request", 5),
    (msgpack.packb([0, 5, "m", [{1: 2}]]), "request", 5),
    (msgpack.packb([0, 5, "m", [{b"k": 2}]]), "request", 5),
    (b"\x94\x00\x05\xa1m\x91\x81\x90\x01", "request", 5),  # a list as key
    (b"\x94\x00\x05\xa1m\x91\x82\xa1k\x01\xa1k\x02", "request", 5),  # the same key twice
    (b"\x94\x00\x05\xa1\xff\x91\x80", "request", 5),  # not UTF-8
    (b"\x94\x00\x05\xa1m\x91\x81\xa1k\xa2\xc3\x28", "request", 5),
    (b"\x94\x00\x05\xa1m\x91\x81\xa1k\xa3\xed\xb3\xbf", "request", 5),  # a surrogate
    (b"\x94\x00\x05\xa1m\x91\x81\xa1k" + msgpack.packb(msgpack.ExtType(1, b"xy")), "request", 5),
    (b"\x94\x00\x05\xa1m\x91\x81\xa1k" + msgpack.packb(msgpack.ExtType(1, b"xyz")), "request", 5),
    (b"\x94\x00\x05\xa1m\x91\x81\xa1k" + msgpack.packb(msgpack.Timestamp(1)), "request", 5),
    (msgpack.packb([0, -1, "m", [{}]]), "request", None),
    (msgpack.packb([0, 1 << 32, "m", [{}]]), "request", None),
    (msgpack.packb([0, True, "m", [{}]]), "request", None),
    (msgpack.packb([0, "5", "m", [{}]]), "request", None),
    (msgpack.packb([0]), "request", None),
    (msgpack.packb([0, 5, "m" * 129, [{}]]), "request", 5),
    (msgpack.packb([1, 5, None]), "response", 5),
    (msgpack.packb([1, 5, None, msgpack.ExtType(1, b"")]), "response", 5),
    (msgpack.packb([2, "m"]), "notification", None),
    (msgpack.packb([2, 5, [{}]]), "notification", None),
    (msgpack.packb([3, 5, "m", [{}]]), None, None),
    (msgpack.packb([0.0, 5, "m", [{}]]), None, None),
    (msgpack.packb([False, 5, "m", [{}]]), None, None),
    (msgpack.packb([]), None, None),
    (msgpack.packb({"a": 1}), None, None),
    (msgpack.packb("text"), None, None),
    (msgpack.packb(None), None, None),
    (msgpack.packb(msgpack.ExtType(1, b"xyz")), None, None),
    (b"\xd4\x01\x00", None, None),
]


@pytest.mark.parametrize(("data", "kind", "msgid"), INVALID)
def test_a_wrong_message_is_reported_and_the_next_one_is_read(data, kind, msgid):
    assert three_ways(data) == [("malformed", kind, msgid, "invalid", False)]


def test_a_run_of_values_that_are_no_messages_is_reported_once():
    http = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert three_ways(http) == [("malformed", None, None, "invalid", False)]
    assert len(decode(http + PING + http)) == 3


def test_the_byte_that_is_never_used_ends_the_decoder():
    data = PING + b"\x94\x00\x05\xa1m\x91\xc1"
    assert three_ways(data) == [
        (0, 99, "ping", {}),
        ("malformed", "request", 5, "invalid", True),
    ]


REFUSED = ("malformed", "request", 9, "resource", True)


def test_a_message_past_the_byte_limit_ends_the_decoder_at_the_header_that_says_so():
    decoder = Decoder(LIMITS)
    assert feed(
        decoder, b"\x94\x00\x09\xa1m\x91\x81\xa1a\xc6" + (256 << 10).to_bytes(4, "big")
    ) == [REFUSED]
    assert feed(decoder, bytes(100_000) + PING) == []
    assert decoder.buffered_bytes == 0


def test_a_length_field_of_4_gib_is_refused_at_once():
    for header in (b"\xc6", b"\xc9", b"\xdb", b"\xdd", b"\xdf"):
        data = b"\x94\x00\x09" + header + b"\xff\xff\xff\xff"
        assert three_ways(data) == [REFUSED]


def test_a_message_past_the_byte_limit_by_many_small_values():
    limits = Limits(max_request_bytes=4096)
    data = msgpack.packb([0, 9, "m", [{"a": list(range(5000))}]])
    assert three_ways(data, limits) == [REFUSED]


def test_the_byte_limit_is_exact():
    limits = Limits(max_request_bytes=2048)
    overhead = len(encode_request(9, "m", {"a": bytes(1000)})) - 1000
    fits = encode_request(9, "m", {"a": bytes(2048 - overhead)})
    assert len(fits) == 2048
    assert three_ways(fits, limits)[0][0] == 0
    over = encode_request(9, "m", {"a": bytes(2049 - overhead)})
    assert three_ways(over, limits) == [REFUSED]


def test_replies_have_their_own_limits():
    limits = Limits(max_request_bytes=1024, max_request_values=100)
    assert three_ways(encode_notification("m", {"a": bytes(2000)}), limits) == [
        ("malformed", "notification", None, "resource", True)
    ]
    data = encode_response(3, None, [0] * 2000, LIMITS)
    assert three_ways(data, limits) == [("malformed", "response", 3, "resource", True)]
    assert feed(Decoder(limits, of_replies=True), data) == [(1, 3, None, [0] * 2000)]
    over = b"\x94\x01\x03\xc0\xdd" + (LIMITS.max_reply_values + 1).to_bytes(4, "big")
    assert feed(Decoder(limits, of_replies=True), over) == [
        ("malformed", "response", 3, "resource", True)
    ]


def test_the_byte_limit_can_change_between_messages():
    decoder = Decoder(Limits())
    decoder.max_bytes = 1024
    large = encode_request(1, "m", {"a": bytes(2000)})
    decoder.feed(PING + large)
    assert plain(decoder.next()) == (0, 99, "ping", {})
    decoder.max_bytes = 4096
    assert plain(decoder.next()) == (0, 1, "m", {"a": bytes(2000)})


def nested(levels):
    return b"\x94\x00\x09\xa1m" + b"\x91" * levels + b"\x80"


def test_depth_is_bounded_exactly():
    # the message, the params, and 30 levels in them
    inside = msgpack.packb([0, 9, "m", [{"a": None}]])[:-1]
    assert three_ways(inside + b"\x91" * 29 + b"\xc0")[0][0] == 0
    assert three_ways(inside + b"\x91" * 30 + b"\xc0") == [REFUSED]


@pytest.mark.parametrize("levels", [32, 1000, 200_000])
def test_deep_nesting_is_refused_before_it_is_decoded(levels):
    assert decode(nested(levels)[:-1]) == [REFUSED]


def test_the_number_of_values_is_bounded_exactly():
    head = b"\x94\x00\x09\xa1m\x91\x81\xa1a\xdd"
    # the message has 4, its params 1, the map 2
    fits = LIMITS.max_request_values - 7
    assert decode(head + fits.to_bytes(4, "big") + b"\x80" * fits)[0][0] == 0
    assert decode(head + (fits + 1).to_bytes(4, "big")) == [REFUSED]


def test_message_states_its_size_in_memory():
    decoder = Decoder(LIMITS)
    decoder.feed(msgpack.packb([0, 9, "m", [{"a": [{}] * 1000}]]))
    assert decoder.next().memory_bytes >= 1000 * 64


def test_truncated_is_nothing_yet():
    for end in range(1, len(PING)):
        assert decode(PING[:end]) == []


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=30,
)


@given(
    st.integers(0, MAX_MSGID),
    st.text(max_size=128),
    st.dictionaries(st.text(), VALUES),
    st.data(),
)
def test_messages_are_decoded_alike_in_any_pieces(msgid, method, params, data):
    stream = msgpack.packb([0, msgid, method, [params]]) + msgpack.packb([1, msgid, None, params])
    cut = data.draw(st.integers(0, len(stream)))
    decoder = Decoder(Limits(max_depth=64))
    messages = feed(decoder, stream[:cut]) + feed(decoder, stream[cut:])
    assert messages == [(0, msgid, method, params), (1, msgid, None, params)]
    assert decoder.buffered_bytes == 0


ODD = st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=5)) | st.just(
    msgpack.Timestamp(1, 1)
)
ANYTHING = st.recursive(
    VALUES | ODD,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 300) | st.binary(max_size=2), inner)
    ),
    max_leaves=8,
).map(msgpack.packb)
MESSAGES = st.one_of(
    st.builds(encode_request, st.integers(0, 9), st.text(max_size=3), st.just({"a": [{}]})),
    st.builds(lambda value: b"\x94\x00\x05\xa1m\x91\x81\xa1a" + value, ANYTHING),
    st.builds(lambda value: b"\x94\x01\x05\xc0" + value, ANYTHING),
    st.builds(lambda levels: nested(levels), st.integers(0, 20)),
    st.sampled_from([b"\x94\x00\x05\xa1m\x91\x82\xa1a\xc0\xa1a\xc0", b"\xc1", b"\x90"]),
    ANYTHING,
    st.binary(max_size=20),
)


def judge(stream, limits):
    """Return the whole values of a stream as msgpack reads them, each with its end."""
    unpacker = msgpack.Unpacker(strict_map_key=False, raw=True, object_pairs_hook=tuple)
    unpacker.feed(stream)
    begin = 0
    while True:
        try:
            unpacker.skip()
        except (msgpack.OutOfData, ValueError, msgpack.UnpackException):
            return
        end = unpacker.tell()
        yield stream[begin:end]
        begin = end


@settings(max_examples=400)
@given(st.lists(MESSAGES, max_size=6), st.lists(st.integers(0, 200), max_size=4))
def test_a_stream_is_read_in_pieces_as_its_messages_are_one_by_one(messages, cuts):
    limits = Limits(max_request_bytes=1024, max_depth=8, max_request_values=200)
    stream = b"".join(messages)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = Decoder(limits)
    found = [m for begin, end in pairwise(edges) for m in feed(decoder, stream[begin:end])]
    one_by_one = []
    for value in judge(stream, limits):
        messages = decode(value, limits)
        junk = all(m[0] == "malformed" and m[2] is None for m in messages)
        was_junk = one_by_one and one_by_one[-1][0] == "malformed" and one_by_one[-1][2] is None
        if not (junk and was_junk) or messages[-1][-1] is True:
            one_by_one += messages
        if messages[-1][0] == "malformed" and messages[-1][-1] is True:
            break
    assert repr(found[: len(one_by_one)]) == repr(one_by_one)  # a NaN is a NaN
    assert all(
        m[-1] is True for m in found[len(one_by_one) :]
    )  # an end that msgpack never comes to
    assert decoder.buffered_bytes <= limits.max_request_bytes


@settings(max_examples=400)
@given(st.lists(st.binary(max_size=60), max_size=6))
@example([b"\x94\x00\x05", b"\xc1"])
@example([b"\xdf\xff\xff\xff\xff", bytes(60)])
def test_garbage_is_malformed_or_a_message_and_nothing_else(pieces):
    limits = Limits(max_request_bytes=1024, max_depth=8)
    decoder = Decoder(limits)
    split = [message for piece in pieces for message in feed(decoder, piece)]
    whole = decode(b"".join(pieces), limits)
    assert split == whole
    assert all(one[0] in ("malformed", 0, 1, 2) for one in whole)
    assert all(one[3] in CODES for one in whole if one[0] == "malformed")


@settings(max_examples=300)
@given(st.binary(min_size=1, max_size=80))
def test_message_boundaries_agree_with_msgpack(data):
    """Whatever msgpack reads as one whole value, the scanner must end at the same byte."""
    unpacker = msgpack.Unpacker(strict_map_key=False, raw=True, object_pairs_hook=tuple)
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.OutOfData:
        assert all(one[-1] is True for one in decode(data))
        return
    except ValueError:
        return
    end = unpacker.tell()
    decoder = Decoder(Limits(max_depth=256))
    assert len(feed(decoder, data[:end])) == 1
    assert decoder.buffered_bytes == 0
    if end > 1:
        assert decode(data[: end - 1], Limits(max_depth=256)) == []


def test_the_answer_that_is_too_large_becomes_an_error():
    limits = Limits(max_reply_bytes=4096)
    [(_, msgid, error, result)] = decode(encode_response(3, None, bytes(5000), limits))
    assert (msgid, error["code"], result) == (3, "resource", None)
    assert "4096" in error["message"]


@pytest.mark.parametrize("result", [{1, 2}, 1 << 64, object()])
def test_the_answer_that_is_not_messagepack_becomes_an_error(result):
    [(_, msgid, error, _)] = decode(encode_response(3, None, result, LIMITS))
    assert (msgid, error["code"]) == (3, "internal")


def test_a_name_that_is_not_unicode_does_not_cost_the_answer():
    [(_, _, error, result)] = decode(encode_response(3, None, "/a\udcff", LIMITS))
    assert (error, result) == (None, "/a\\udcff")


def test_a_name_that_is_not_unicode_does_not_cost_a_notification():
    [(_, _, params)] = decode(encode_notification("m", {"a": "/a\udcff"}))
    assert params == {"a": "/a\\udcff"}


def test_a_request_that_cannot_be_said_is_our_own_error():
    for params in ({"a": object()}, {"a": 1 << 64}):
        with pytest.raises(LocalProtocolError):
            encode_request(1, "m", params)
        with pytest.raises(LocalProtocolError):
            encode_notification("m", params)
    with pytest.raises(LocalProtocolError):
        encode_request(1, "m", {"a": "\udcff"})


@pytest.mark.parametrize(
    "limits", [{"max_depth": 3}, {"max_request_bytes": 10}, {"max_reply_bytes": 10}]
)
def test_limits_that_leave_no_room_are_refused(limits):
    with pytest.raises(ValueError, match=r"limit|max_depth"):
        Limits(**limits)


@pytest.mark.parametrize("to_wire", ["to_wire", "to_sparse_wire"])
def test_a_batch_of_500_verity_layers_with_their_overlay_fits_a_request(to_wire):
    names = [f"{number:064x}" for number in range(500)]
    batch = LayersMount(
        layers=tuple(
            LayerSpec(
                layer_id=name,
                device=PmemDevice(number=number % 128),
                filesystem="erofs",
                mapping=ByteRange(offset_bytes=number << 30, size_bytes=1 << 30),
                verity=Verity(root_digest=bytes(32)),
            )
            for number, name in enumerate(names)
        ),
        overlay=OverlaySpec(overlay_id="root", layers=tuple(names), target="/run/root"),
    )
    [(_, _, method, params)] = decode(
        encode_request(1, "layers.mount", {**getattr(batch, to_wire)(), "deadline_ms": 60_000})
    )
    assert method == "layers.mount"
    del params["deadline_ms"]
    assert LayersMount.from_wire(params) == batch
