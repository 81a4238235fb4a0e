"""Looks for a file that our header reader and the safetensors library judge differently, guided by coverage.

    make fuzz ARGS=-max_total_time=600

Ends with an error and the file's bytes when it finds one. The arguments are those of libFuzzer; what it has learnt stays in
the folder that is given as the last argument, if one is.
"""

from __future__ import annotations

import random
import sys

import atheris

with atheris.instrument_imports(include=["masked_loss_triton.cache.safetensors_header", "json"]):
    from tests.cache.test_safetensors_header import library_accepts, mutated, we_accept


def compare(data: bytes) -> None:
    """One input: a whole file."""
    if we_accept(data) != library_accepts(data):
        raise AssertionError(f"we accept: {we_accept(data)}, the library: {library_accepts(data)}: {data!r}")


def mutate(data: bytes, longest: int, seed: int) -> bytes:
    """Sound headers with faults half of the time; else the bytes that led somewhere new, changed by libFuzzer."""
    draw = random.Random(seed)
    if not data or draw.random() < 0.5:
        return mutated(draw)[:longest]
    # The length in front is put right: otherwise nearly every change of the text ends at it.
    text = atheris.Mutate(data[8:], max(longest - 8, 1))
    length = int.from_bytes(data[:8], "little") + len(text) - (len(data) - 8)
    return (max(length, 0) % 2**64).to_bytes(8, "little") + text


if __name__ == "__main__":
    atheris.Setup(
        ["safetensors_header", "-max_total_time=120", "-max_len=4096", *sys.argv[1:]], compare, custom_mutator=mutate
    )
    atheris.Fuzz()
