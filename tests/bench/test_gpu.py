"""`make gpu` without a GPU: it says so and runs nothing; the code that it would start is Python."""

import pytest
import torch

from bench import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing(tmp_path, capsys):
    assert gpu.main(["--output", str(tmp_path / "results")]) == 2
    assert "no CUDA or ROCm device" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_what_it_would_start_is_python(tmp_path):
    for code in (gpu.ONE_CALL, gpu.PROFILE):
        compile(code, "", "exec")
    commands = gpu.steps(tmp_path, quick=False)
    assert {"tests", "times", "host", "profile"} <= commands.keys()
