"""The frames of the console: exact bytes, every cut, and whatever a stranger may send."""

import contextlib
import itertools
import re
from pathlib import Path

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestagent.api.console import (
    MAX_PAYLOAD_BYTES,
    Data,
    Decoder,
    End,
    Errors,
    Exit,
    Frame,
    Hello,
    Refusal,
    Signal,
    Size,
    Welcome,
    encode,
)
from vsock.errors import RemoteProtocolError

FRAMES: list[Frame] = [
    Hello(
        versions=(1,),
        terminal=True,
        term="xterm",
        size=Size(rows=50, columns=132),
        command="layers",
    ),
    Welcome(version=1, agent="0.1.0", session=7, shell=False),
    Data(data=b"\x00\xffbytes"),
    Data(data=b""),
    Errors(data=b"oops"),
    End(),
    Size(rows=1, columns=1000),
    Signal(name="INT"),
    Exit(status=130, signal="INT"),
    Refusal(code="denied", message="no", hint=None),
]
FROM_CLIENT = [f for f in FRAMES if isinstance(f, (Hello, Data, End, Size, Signal))]
FROM_AGENT = [f for f in FRAMES if isinstance(f, (Welcome, Data, Errors, Exit, Refusal))]


def decode(data: bytes, *, from_client: bool = True) -> list[Frame]:
    decoder = Decoder(from_client=from_client)
    decoder.feed(data)
    return list(decoder.frames())


def test_bytes_on_the_wire() -> None:
    assert encode(Data(data=b"ls\r")) == b"\x03\x00\x00\x03ls\r"
    assert encode(End()) == b"\x05\x00\x00\x00"
    assert encode(Size(rows=24, columns=80)) == b"\x06\x00\x00\x10\x82\xa4rows\x18\xa7columns\x50"


@pytest.mark.parametrize("frames", [FROM_CLIENT, FROM_AGENT], ids=["client", "agent"])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 1000])
def test_frames_come_whole_however_they_are_cut(frames: list[Frame], step: int) -> None:
    data = b"".join(map(encode, frames))
    decoder = Decoder(from_client=frames is FROM_CLIENT)
    found: list[Frame] = []
    for at in range(0, len(data), step):
        decoder.feed(data[at : at + step])
        found += decoder.frames()
    assert found == frames
    assert decoder.kept_bytes == 0


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x94\x00\x01", "0x94 is unknown"),
        (b"GET / HTTP/1.1\r\n", "0x47 is unknown"),
        (b"\x00", "0x00 is unknown"),
        (b"\x02", "Welcome is not for this side"),
        (b"\x08", "Exit is not for this side"),
        (b"\x03\xff\xff\xff", "16777215 bytes"),
        (b"\x03" + (MAX_PAYLOAD_BYTES + 1).to_bytes(3, "big"), "at most"),
        (b"\x05\x00\x00\x01x", "End with 1 bytes"),
        (b"\x06\x00\x00\x01\xc0", "expected a map"),
        (b"\x06\x00\x00\x01\xc1", "no MessagePack"),
        (b"\x06\x00\x00\x02\x80\x80", "no MessagePack"),
        (b"\x07\x00\x00\x09" + msgpack.packb({"name": "X"}) + b"\xc0", "no MessagePack"),
    ],
)
def test_broken_frames(data: bytes, text: str) -> None:
    with pytest.raises(RemoteProtocolError, match=text) as caught:
        decode(data)
    assert caught.value.fatal


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        (0x06, {"rows": 0, "columns": 80}, "rows must be in"),
        (0x06, {"rows": 24, "columns": 1001}, "columns must be in"),
        (0x06, {"rows": 24, "columns": 80, "x": 1}, "unknown parameter"),
        (0x06, {"rows": "24"}, "expected int"),
        (0x07, {"name": "STOP9"}, "none of"),
        (0x01, {"versions": []}, "versions is empty"),
        (0x01, {}, "versions: missing"),
        (0x01, {"versions": [1], "term": "\x1b[0m"}, "no name of a terminal"),
        (0x01, {"versions": [1], "term": "x" * 65}, "term length"),
        (0x01, {"versions": [1], "command": "x" * 4097}, "command length"),
        (0x01, {"versions": [1], "size": {"rows": -1}}, "rows must be in"),
    ],
)
def test_fields_are_checked(kind: int, fields: dict[str, object], text: str) -> None:
    payload = msgpack.packb(fields)
    with pytest.raises(RemoteProtocolError, match=text):
        decode(bytes([kind]) + len(payload).to_bytes(3, "big") + payload)


def test_decoder_yields_frames_before_an_error_and_none_after() -> None:
    decoder = Decoder(from_client=True)
    decoder.feed(encode(Data(data=b"a")) + b"\xff" + encode(Data(data=b"b")))
    frames = decoder.frames()
    assert next(frames) == Data(data=b"a")
    with pytest.raises(RemoteProtocolError):
        next(frames)
    decoder.feed(encode(Data(data=b"c")) * 100)
    assert decoder.kept_bytes == 0
    with pytest.raises(RemoteProtocolError):
        list(decoder.frames())


def test_the_longest_payload() -> None:
    assert decode(encode(Data(data=b"x" * MAX_PAYLOAD_BYTES)))
    assert len(encode(Data(data=b"x" * MAX_PAYLOAD_BYTES))) == 32 * 1024
    with pytest.raises(ValueError, match="at most"):
        encode(Data(data=b"x" * (MAX_PAYLOAD_BYTES + 1)))


def test_a_deep_payload() -> None:
    payload = b"\x91" * MAX_PAYLOAD_BYTES
    with pytest.raises(RemoteProtocolError, match="no MessagePack"):
        decode(b"\x06" + len(payload).to_bytes(3, "big") + payload)


@given(st.lists(st.binary(max_size=200), max_size=20), st.booleans())
def test_junk_never_does_more_than_break_the_connection(
    pieces: list[bytes], from_client: bool
) -> None:
    decoder = Decoder(from_client=from_client)
    try:
        for piece in pieces:
            decoder.feed(piece)
            for frame in decoder.frames():
                assert encode(frame)
    except RemoteProtocolError:
        assert decoder.kept_bytes == 0
    assert decoder.kept_bytes <= MAX_PAYLOAD_BYTES + 4


@given(st.sampled_from([0x01, 0x06, 0x07]), st.binary(max_size=100))
def test_junk_in_a_frame(kind: int, payload: bytes) -> None:
    with contextlib.suppress(RemoteProtocolError):
        assert decode(bytes([kind]) + len(payload).to_bytes(3, "big") + payload)


@given(st.lists(st.sampled_from(FROM_CLIENT), max_size=10), st.data())
def test_any_sequence_cut_anywhere(frames: list[Frame], data: st.DataObject) -> None:
    stream = b"".join(map(encode, frames))
    cut = data.draw(st.integers(0, len(stream)))
    decoder = Decoder(from_client=True)
    decoder.feed(stream[:cut])
    found = list(decoder.frames())
    decoder.feed(stream[cut:])
    assert found + list(decoder.frames()) == frames


def test_the_worked_example_of_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs/console.md").read_text()
    example = text.partition("Worked example")[2].split("```")[1]
    streams: dict[str, bytes] = {"client": b"", "agent": b""}
    side = ""
    for row in example.strip().splitlines():
        words = row.split()
        if words[0] in streams:
            side = words.pop(0)
        codes = itertools.takewhile(lambda word: re.fullmatch("([0-9a-f]{2})+", word), words)
        streams[side] += bytes.fromhex("".join(codes))
    assert decode(streams["client"]) == [Hello(versions=(1,), command="uptime")]
    assert decode(streams["agent"], from_client=False) == [
        Welcome(version=1, agent="0.1.0", session=1, shell=False),
        Data(data=b"up\n"),
        Exit(status=0),
    ]
