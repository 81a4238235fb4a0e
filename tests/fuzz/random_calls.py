"""Random calls of the loss, a fresh draw each time, against the float64 reference: layouts, losses, gates, gradients and stats.

    python -m tests.fuzz.random_calls [--backend torch|triton] [--number 1000]

Without a GPU the kernels run in Triton's interpreter, a few calls a second. The suite does the same with a fixed draw of a few
hundred (tests/test_backends_agree.py).
"""

from __future__ import annotations

import argparse
import os

import torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.random_calls", description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("torch", "triton"), default="triton")
    parser.add_argument("--number", type=int, default=1000)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from hypothesis import HealthCheck, Phase, given, settings

    from tests.support.strategies import calls
    from tests.test_backends_agree import check, upstream

    done = 0

    @settings(
        max_examples=options.number,
        phases=[Phase.generate],
        database=None,
        derandomize=False,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn=calls(), grad_output=upstream)
    def each(drawn, grad_output) -> None:
        nonlocal done
        check(options.backend, device, drawn, grad_output)
        done += 1

    each()
    print(f"{done} calls on backend={options.backend!r} ({device}) are within the bounds of docs/formula.md")


if __name__ == "__main__":
    main()
