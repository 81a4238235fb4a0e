"""The header reader accepts what the safetensors library accepts, and nothing else: odd headers one by one, and mutated ones."""

from __future__ import annotations

import copy
import json
import random
import re

import pytest
import safetensors

from masked_loss_triton.cache.safetensors_header import ITEM_BITS, LARGEST_HEADER, parse_header

MUTATIONS, SEED = 12_000, 3
GOOD = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
ENTRY = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]'


def library_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def we_accept(data: bytes) -> bool:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(LARGEST_HEADER, len(data) - 8):
        return False
    try:
        parse_header(data[8 : 8 + length], len(data) - 8 - length)
    except ValueError:
        return False
    return True


def file_of(text: bytes, data: bytes = b"\0" * 4) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def test_the_dtypes_are_those_of_the_library():
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(file_of(json.dumps({"a": {**GOOD, "dtype": "X"}}).encode()))
    known = re.findall(r"`([A-Z0-9_]+)`", str(caught.value).partition("expected one of")[2])
    assert len(known) > 10
    assert set(known) <= set(ITEM_BITS), "a newer library has dtypes that we refuse"
    for dtype in known:
        for items in range(1, 9):
            for size in range(9):
                entry = {"dtype": dtype, "shape": [items], "data_offsets": [0, size]}
                data = file_of(json.dumps({"a": entry}).encode(), b"\0" * size)
                assert we_accept(data) == library_accepts(data), entry


ODD = [
    *(
        {**GOOD, "dtype": dtype}
        for dtype in ({"F32": None}, {"F32": {}}, {"F32": None, "U8": None}, {}, ["F32"], None, 7)
    ),
    *(
        {**GOOD, "shape": shape}
        for shape in ([1.0], [True], ["1"], [-1], [[1]], None, 1, [1, 1], [2], {"0": 1}, [2**64])
    ),
    *({**GOOD, "data_offsets": pair} for pair in ([0], [0, 4, 4], [4, 0], [0, 4.0], [0, "4"], [False, 4], {}, [1, 5])),
    *({**GOOD, "shape": shape, "data_offsets": [0, 0]} for shape in ([2**63, 4, 0], [0, 2**63, 4], [2**64, 0], [0])),
    *({key: value for key, value in GOOD.items() if key != missing} for missing in GOOD),
    *({**GOOD, "more": value} for value in (None, [1, {"a": [2]}], 2**70, -(2**70), 1e300, "text")),
    *(["F32", [1], [0, 4], *more] for more in ([], [1])),
    *(None, 3, "F32", [], {}),
]
NUMBERS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"1e300",
    b"0e999",
    b"-0",
    b"01",
    b"1.",
    b"+1",
    *(b"9" * n for n in (19, 20, 21, 300, 5000)),
)
STRINGS = (
    b"\\ud800",
    b"\\ude00",
    b"\\ud83d\\ude00",
    b"\\ud83d\\ud83d\\ude00",
    b"\n",
    b"\\x",
    b"\x7f",
    b"\\u0000",
    b"\xff",
    b"\xed\xa0\x80",
)
METADATA = (b"null", b"{}", b"[]", b'{"k":1}', b'{"k":null}', b'{"k":"1","k":"2"}', b'{"k":1,"k":"2"}', b"3")
RAW = [
    *(b'{"a":{%s,"x":%s%s}}' % (ENTRY, b"[" * depth, b"]" * depth) for depth in (100, 124, 125, 126, 127, 20_000)),
    *(b'{"a":{%s,"x":%s0%s}}' % (ENTRY, b'{"k":' * depth, b"}" * depth) for depth in (125, 126)),
    *(b'{"a":{%s,"x":%s}}' % (ENTRY, number) for number in NUMBERS),
    *(b'{"a":{%s,"x":"%s"}}' % (ENTRY, string) for string in STRINGS),
    *(b'{"a%s":{%s}}' % (string, ENTRY) for string in STRINGS),
    *(b'{"__metadata__":%s,"a":{%s}}' % (value, ENTRY) for value in METADATA),
    b'{"__metadata__":{},"a":{%s},"__metadata__":{}}' % ENTRY,
    b'{"a":{%s},"a":{%s}}' % (ENTRY, ENTRY),
    b'{"a":3,"a":{%s}}' % ENTRY,
    b'{"a":{%s,"dtype":"F32"}}' % ENTRY,
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
    b'{"a":{%s},"b":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' % ENTRY,
    b'{"a":{%s},"b":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}}' % ENTRY,
    b'{"a":{%s},"b":{%s}}' % (ENTRY, ENTRY),
    *(before + b'{"a":{%s}}' % ENTRY for before in (b" \n\t", b"\xef\xbb\xbf", b"\f")),
    *(b'{"a":{%s}}' % ENTRY + after for after in (b"  ", b"\0", b"{}", b",")),
    *(b"", b"{", b"null", b"[]", b"{}", b'"a"', b"{}" + b" " * 4),
]


@pytest.mark.parametrize("text", [*(json.dumps({"a": entry}).encode() for entry in ODD), *RAW])
def test_odd_headers(text):
    data = b"" if b'"data_offsets": [0, 0]' in text else b"\0" * 4
    assert we_accept(file_of(text, data)) == library_accepts(file_of(text, data))
    assert not we_accept(file_of(text, data + b"\0"))
    assert not library_accepts(file_of(text, data + b"\0"))


def sample(draw: random.Random) -> tuple[dict, int]:
    """A sound header, and the length of its data, bytes."""
    header: dict = {"__metadata__": {"architecture": "wan", "ü": "\U0001f600"}} if draw.random() < 0.6 else {}
    position = 0
    for number in range(draw.randint(0, 3)):
        dtype, shape = draw.choice(list(ITEM_BITS)), [draw.choice((0, 1, 2, 4, 8)) for _ in range(draw.randint(0, 3))]
        items = 1
        for size in shape:
            items *= size
        end = position + items * ITEM_BITS[dtype] // 8
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return header, position


# Put in the place of any value: what a mutated byte hardly ever makes.
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    4,
    2**32,
    2**63,
    2**64,
    1.0,
    0.5,
    1e19,
    "",
    "F32",
    "U8",
    [],
    [0],
    [0, 4],
    {},
    {"F32": None},
)
TOKENS = (b"{", b"}", b"[", b"]", b'"', b",", b":", b"e5", b".5", b"\\", *NUMBERS[:9], *STRINGS)


def mutated(draw: random.Random) -> bytes:
    header, length = sample(draw)
    if draw.random() < 0.6:
        for _ in range(draw.randint(1, 2)):
            entries = [value for value in header.values() if isinstance(value, dict)]
            lists = [value for entry in entries for value in entry.values() if isinstance(value, list)]
            places = [header, *entries, *lists]
            place = draw.choice([place for place in places if place] or [header])
            value = copy.deepcopy(draw.choice(VALUES))
            if isinstance(place, list):
                place[draw.randrange(len(place))] = value
            elif place and draw.random() < 0.3:
                place.pop(draw.choice(list(place)))
            else:
                place[draw.choice([*place, "dtype", "shape", "x", "__metadata__"])] = value
    text = bytearray(json.dumps(header, ensure_ascii=draw.random() < 0.5).encode())
    if draw.random() < 0.5:
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text) + 1)
            kind = draw.randrange(3)
            if kind == 0:
                text[at:at] = draw.choice(TOKENS)
            elif kind == 1:
                del text[at : at + draw.randint(1, 4)]
            elif at < len(text):
                text[at] = draw.randrange(256)
    data = file_of(bytes(text), b"\0" * length)
    return data if draw.random() < 0.9 else data[: draw.randrange(len(data) + 1)] + b"\0" * draw.randint(0, 1)


def test_mutated_headers():
    draw = random.Random(SEED)
    accepted = 0
    for _ in range(MUTATIONS):
        data = mutated(draw)
        ours = we_accept(data)
        assert ours == library_accepts(data), data
        accepted += ours
    assert 0.1 < accepted / MUTATIONS < 0.9, "nearly all are the same: the test shows little"
