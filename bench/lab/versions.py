"""What other versions make of the kernels and the formulas: Triton's compile them, torch's run the tests.

    python -m bench.lab.versions                                  # Triton 3.4 to 3.9, all variants, all targets: a table
    python -m bench.lab.versions --triton 3.4.0 --target sm_90
    python -m bench.lab.versions --torch 2.5.1 --torch 2.8.0      # each in a virtual environment of its own

A Triton wheel is unpacked beside the others and put before the installed one; compiling needs no other torch. Its code is compared
with that of the installed Triton. Triton 3.4 links AMD's code with ROCm's own linker. Everything is kept in `--folder`, and taken
from there the next time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator
from typing import Any

from bench.environment import ROOT
from bench.lab.variants import TARGETS, VARIANTS

TRITONS = ("3.4.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
ABOUT = "import torch, numpy, triton; print(torch.__version__, numpy.__version__, triton.__version__)"
# Formulas, gradients, errors and kernels: what a version can change. The last three launch kernels.
TESTS = (
    "tests/test_formulas.py", "tests/test_gradient.py", "tests/test_backends_agree.py", "tests/test_packed.py",
    "tests/test_stats.py", "tests/test_bad_input.py", "tests/test_config.py", "tests/test_presets.py", "tests/test_compile.py",
    "tests/test_memory.py", "tests/test_distributed.py", "tests/kernels",
)  # fmt: skip
# What reaches Triton's launchers, whose form differs between versions, and arguments that no variant has.
COMPILED_TESTS = (
    "tests/bench/test_host.py",
    "tests/kernels/test_compiled.py::test_sizes_and_strides_of_one_every_kind_of_loss_and_every_denominator_compile",
)
# Triton's interpreter of 3.6 and before cannot read a number of numpy 2.4.
TOOLS = ("numpy<2.4", "pytest", "hypothesis", "pytest-benchmark", "safetensors", "pillow", "opencv-python-headless")

Row = dict[str, Any]


def environment(triton: pathlib.Path | None) -> dict[str, str]:
    """Of a process that compiles with the Triton in that folder, or with the installed one."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(map(str, [triton, ROOT] if triton else [ROOT]))}


def installed(version: str, folder: pathlib.Path) -> pathlib.Path:
    """The folder of an unpacked Triton."""
    place = folder / f"triton-{version}"
    if not place.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
        subprocess.run([*command, f"triton=={version}"], check=True)
    return place


def compiled(triton: pathlib.Path | None, variants: list[str], targets: Iterable[str]) -> tuple[list[Row], list[str]]:
    """The rows of `bench.lab.compiled`, and what its processes said last: a warning, or why a target failed."""
    rows, said = [], []
    for target in targets:
        command = [sys.executable, "-W", "error::UserWarning", "-m", "bench.lab.compiled", "--json", "-"]
        command += ["--target", target, *(word for variant in variants for word in ("--variant", variant))]
        finished = subprocess.run(
            command, env=environment(triton), cwd=ROOT, capture_output=True, text=True, check=False
        )
        rows += [json.loads(line) for line in finished.stdout.splitlines()]
        said += [f"{target}: {line}" for line in finished.stderr.strip().splitlines()[-1:]]
    return rows, said


def tested_without_interpreter(triton: pathlib.Path | None) -> str:
    """How `COMPILED_TESTS` end."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", *COMPILED_TESTS]
    finished = subprocess.run(command, env=environment(triton), cwd=ROOT, capture_output=True, text=True, check=False)
    return finished.stdout.strip().splitlines()[-1].strip(" =")


def key(row: Row) -> tuple[str, str, str]:
    return row["variant"], row["kernel"], row["target"]


def narrower(row: Row, than: Row) -> bool:
    """Whether a tensor of the call is read or written in smaller pieces."""
    return any(
        tensor in than[kind] and min(map(int, bits)) < min(map(int, than[kind][tensor]))
        for kind in ("loads", "stores")
        for tensor, bits in row[kind].items()
    )


def compare(versions: Iterable[str], folder: pathlib.Path, variants: list[str], targets: list[str]) -> Iterator[str]:
    """A table in Markdown, line by line: each version beside the installed one."""
    yield "| Triton | compiled | with spills | with local memory | most registers | narrower accesses | tests | said |"
    yield "|---|---:|---:|---:|---|---:|---|---|"
    base, _ = compiled(None, variants, targets)
    known = {key(row): row for row in base}
    for version in versions:
        rows, said = compiled(installed(version, folder), variants, targets)
        most: dict[str, int] = collections.defaultdict(int)
        for row in rows:
            most[row["target"]] = max(most[row["target"]], row["registers"])
        cells = [
            f"{len(rows)} of {len(base)}",
            sum(row["spills"] > 0 for row in rows),
            sum(row["local_bytes"] > 0 for row in rows),
            ", ".join(f"{target} {count}" for target, count in most.items()),
            sum(narrower(row, known[key(row)]) for row in rows),
            tested_without_interpreter(installed(version, folder)),
            "; ".join(said) or "nothing",
        ]
        yield f"| {version} | " + " | ".join(map(str, cells)) + " |"
        for row in rows:
            if row["spills"] or row["local_bytes"] or narrower(row, known[key(row)]):
                print(version, key(row), row["registers"], row["spills"], row["loads"], row["stores"], file=sys.stderr)


def tested(torch: str, folder: pathlib.Path) -> str:
    """Runs the tests with a version of torch; the line of a table."""
    place = folder / f"torch-{torch}"
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={torch}", *TOOLS], check=True)
    names = subprocess.run([python, "-c", ABOUT], capture_output=True, text=True, check=True).stdout.split()
    # With the Triton that this torch brings; one older than 3.4 runs no kernels, and their tests are left out.
    old = tuple(map(int, names[-1].split(".")[:2])) < (3, 4)
    tests = ["-k", "not triton and not kernels and not promises and not exported", *TESTS[:-3]] if old else TESTS
    # An older torch warns about what a newer one took back, and about numpy; here only results count.
    command = [python, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command += tests
    finished = subprocess.run(command, env=environment(None), cwd=ROOT, capture_output=True, text=True, check=False)
    for line in finished.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(torch, line, file=sys.stderr)
    outcome = re.findall(r"^.*\d+ (?:passed|failed|error).*$", finished.stdout, re.MULTILINE)
    return f"| {' | '.join(names)} | {outcome[-1].strip(' =') if outcome else finished.stdout[-300:]} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.versions", description=__doc__.split("\n")[0])
    parser.add_argument("--triton", action="append", help="may be repeated; default: 3.4 to 3.9, without --torch")
    parser.add_argument("--torch", action="append", default=[], help="run the tests with it; may be repeated")
    parser.add_argument(
        "--variant", action="append", default=[], choices=VARIANTS, help="may be repeated; default: all"
    )
    parser.add_argument("--target", action="append", default=[], choices=TARGETS, help="may be repeated; default: all")
    parser.add_argument("--folder", type=pathlib.Path, default=ROOT / "build" / "versions", help="(build/versions)")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    if options.triton or not options.torch:
        for line in compare(options.triton or TRITONS, folder, options.variant, options.target or list(TARGETS)):
            print(line, flush=True)
    if options.torch:
        print("| torch | numpy | Triton | tests |\n|---|---|---|---|")
    for torch in options.torch:
        print(tested(torch, folder), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
