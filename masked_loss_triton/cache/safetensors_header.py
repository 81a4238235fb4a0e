"""Reading the header of a safetensors file: it accepts what the safetensors library accepts, and nothing else.

Source: safetensors 0.8, whose reader is Rust's serde_json. Where Python's json is more lenient (NaN, repeated keys, lone
surrogates, any depth, numbers of any size), the text is refused here too; the tests compare the two on mutated headers.
"""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

LARGEST_HEADER = 100_000_000  # bytes
LARGEST_NUMBER, DEEPEST = 2**64 - 1, 127
METADATA = "__metadata__"
FIELDS = ("dtype", "shape", "data_offsets")
ITEM_BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


class Header(NamedTuple):
    """What a header says.

    Attributes:
        metadata: text by key, in the file's order.
        tensors: name to {"dtype", "shape", "data_offsets"}, in the file's order.
        metadata_first: whether the metadata stands before the tensors.
    """

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    metadata_first: bool


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object, in which a key may stand more than once."""


def parse_header(data: bytes, length: int) -> Header:
    """The header as text, checked against the number of bytes that follow it.

    Raises:
        ValueError: saying what is wrong, in a few words.
    """
    text = data.decode("utf-8")
    try:
        top = _DECODER.decode(text)
        _check_depth(top)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(top, _Object):
        raise ValueError("it is no JSON object")
    if "\\u" in text:
        json.dumps(top, ensure_ascii=False).encode("utf-8")  # half a character is a UnicodeEncodeError
    metadata = [value for key, value in top if key == METADATA]
    if len(metadata) > 1:
        raise ValueError("it has metadata twice")
    # Every entry has to be right; of two with one name, the last one counts.
    entries = [(name, _tensor(name, value)) for name, value in top if name != METADATA]
    header = Header(
        _metadata(metadata[0]) if metadata else {}, dict(entries), not top or not metadata or top[0][0] == METADATA
    )
    _check_places(header.tensors, length)
    return header


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, _Object) or not all(isinstance(text, str) for _, text in value):
        raise ValueError("its metadata is not text by name")
    return dict(value)


def _tensor(name: str, value: Any) -> dict[str, Any]:
    """One entry: an object with three fields and perhaps others, or a list of the three."""
    if type(value) is list and len(value) == len(FIELDS):
        value = _Object(zip(FIELDS, value, strict=True))
    known = [key for key, _ in value if key in FIELDS] if isinstance(value, _Object) else []
    if sorted(known) != sorted(FIELDS):
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    entry = dict(value)
    if isinstance(entry["dtype"], _Object) and len(entry["dtype"]) == 1 and entry["dtype"][0][1] is None:
        entry["dtype"] = entry["dtype"][0][0]  # another spelling that the library takes
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEM_BITS:
        raise ValueError(f"{name!r} has an unknown dtype")
    for field in ("shape", "data_offsets"):
        if type(entry[field]) is not list or not all(_is_size(number) for number in entry[field]):
            raise ValueError(f"{name!r} has a {field} that is not made of whole numbers")
    if len(entry["data_offsets"]) != 2:
        raise ValueError(f"{name!r} has not two data_offsets")
    return {field: entry[field] for field in FIELDS}


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= LARGEST_NUMBER


def _check_places(tensors: dict[str, dict[str, Any]], length: int) -> None:
    """The tensors have to lie one after the other, as long as their shapes say, and to fill the file."""
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda pair: pair[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        # The first number too large counts, also where a 0 follows.
        items = 1
        for size in entry["shape"]:
            items *= size
            if items > LARGEST_NUMBER:
                raise ValueError(f"{name!r} is larger than any file")
        bits = items * ITEM_BITS[entry["dtype"]]
        if begin != position or bits > LARGEST_NUMBER or bits != 8 * (end - begin):
            raise ValueError(f"{name!r} does not lie where its shape says")
        position = end
    if position != length:
        raise ValueError(f"{length} bytes of data instead of {position}")


def _check_depth(value: Any, depth: int = 1) -> None:
    if isinstance(value, list):
        if depth > DEEPEST:
            raise RecursionError
        for item in value:
            _check_depth(item[1] if isinstance(value, _Object) else item, depth + 1)


def _integer(text: str) -> int | float:
    # As the library reads them: "-0", and what no 64 bits hold, are fractions.
    number: int | float = int(text) if len(text) <= 20 and text != "-0" else _fraction(text)
    return number if -(2**63) <= number <= LARGEST_NUMBER else float(number)


def _fraction(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError("it has a number that is too large")
    return number


def _constant(text: str) -> float:
    raise ValueError(f"it has the word {text} in it")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_Object, parse_int=_integer, parse_float=_fraction, parse_constant=_constant
)
