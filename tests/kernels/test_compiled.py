"""The machine code of the kernels, compiled for five GPUs without one: no spills, 128-bit accesses of contiguous tensors."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from bench.cases import build
from bench.lab.budgets import REGISTERS
from bench.lab.variants import TARGETS, VARIANTS
from masked_loss_triton.kernels.operands import LossLaunch
from masked_loss_triton.kernels.weights import WeightsLaunch

# The subset that fits into two minutes; `python -m bench.lab.compiled` and `bench.lab.gate` do all variants on all targets.
CHECKED = ("main", "prior", "prior bf16", "flow", "26x38", "pixels uint8 bf16")
CUDA = [target for target in TARGETS if target.startswith("sm_")]


def python(*arguments):
    """A process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def run(*arguments):
    """A tool of bench/."""
    return python("-m", *arguments)


@pytest.fixture(scope="module")
def rows():
    command = ["bench.lab.compiled", "--json", "-"]
    for variant in CHECKED:
        command += ["--variant", variant]
    finished = run(*command)
    assert finished.returncode == 0, finished.stderr
    rows = [json.loads(line) for line in finished.stdout.splitlines()]
    assert {(row["variant"], row["target"]) for row in rows} == {(v, t) for v in CHECKED for t in TARGETS}
    return rows


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills_and_nothing_lives_in_local_memory(rows, target):
    for row in rows:
        if row["target"] == target:
            assert (row["spills"], row["local_bytes"]) == (0, 0), row


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_registers_stay_within_the_budget(rows, target):
    for row in rows:
        if row["target"] == target:
            assert row["registers"] <= REGISTERS[row["kernel"]], row
            if row["kernel"] == "loss_kernel":  # all of CHECKED are one run
                prior = VARIANTS[row["variant"]].prior
                # Nothing limits AMD's compiler; 8 registers more leave 7 of 8 waves, and with a prior as many as before.
                more = 8 if target == "gfx942" else 0
                assert row["registers"] <= (LossLaunch.with_prior if prior else LossLaunch.without_prior) + more, row


def width_of(variant, tensor):
    """Bits of the widest access that the alignment of the rows allows: a row of H * W elements may start anywhere."""
    case = VARIANTS[variant]
    call = build(case, "meta", filled=False)
    values = {"pred": call.pred, "target": call.target, "prior": call.prior, "gradient": call.pred}
    if case.flow:
        values |= {"target": call.target.noise, "latents": call.target.latents}
    row = values[tensor].element_size() * values[tensor][0, 0].numel()
    return min(128, 8 * (row & -row))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", CHECKED)
def test_contiguous_tensors_move_as_many_bits_as_their_rows_are_aligned(rows, variant, target):
    (row,) = [r for r in rows if (r["variant"], r["target"], r["kernel"]) == (variant, target, "loss_kernel")]
    case = VARIANTS[variant]
    expected = ["pred", "target", *["prior"] * case.prior, *["latents"] * case.flow]
    assert set(expected) <= row["loads"].keys()
    for tensor, widths in [*((name, row["loads"][name]) for name in expected), ("gradient", row["stores"]["gradient"])]:
        assert min(map(int, widths)) >= width_of(variant, tensor), (tensor, widths)


def test_expected_width_is_128_bits_on_all_but_the_oddest_rows():
    assert width_of("main", "pred") == 128
    assert width_of("26x38", "gradient") == 128
    assert width_of("26x38 bf16", "pred") == 64  # 988 positions of two bytes: rows start on multiples of eight bytes


@pytest.mark.slow
def test_cuxray_finds_no_spill_and_no_unexplained_access_in_any_variant():
    pytest.importorskip("cuxray", reason="cuxray is not installed: pip install -e '.[bench]'")
    finished = run("bench.lab.gate", "--target", "sm_90")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    kernels, violations, accesses = (int(number) for number in re.findall(r"\d+", finished.stdout.splitlines()[0]))
    assert kernels > len(VARIANTS)  # one of the loss for each, and one of the weights for several
    assert (violations, accesses) == (0, 0)
    finished = run(
        "bench.lab.gate", "--target", "sm_100", "--variant", "prior bf16", "--variant", "layered bf16 flow prior"
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr


# The JIT turns an integer argument that is 1 into a constant, which the interpreter does not: shapes and strides of 1 compile too.
ODD = """
import torch
from bench.cases import Call
from bench.lab.launches import DEVICES, launches_of, recorded
from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.backend import fused
from masked_loss_triton.call import describe
from masked_loss_triton.config import LOSS_TYPES, NORMALIZATIONS
def compiled(shape, mask, config=MaskedLossConfig(), **prior):
    pred = torch.randn(shape, requires_grad=True)
    call = Call(pred, torch.randn(shape), mask, prior.get("prior"), config, "channels_first")
    for launch in launches_of(call, DEVICES["sm_90"].hardware, stats="prior" in prior):
        launch.compile(DEVICES["sm_90"].target)
m = torch.rand
everything = MaskedLossConfig(blur_kernel_size=3, per_sample=True, area_scale_beta=0.5, gamma=0.7, prior_threshold=0.5)
compiled((1, 1, 1, 1, 1), None)
compiled((1, 16, 1, 1, 1), m(1, 1, 1, 1))
compiled((2, 1, 1, 1, 1), m(2, 1, 1, 1), prior=torch.randn(2, 1, 1, 1, 1))
compiled((1, 16, 1, 1, 1), m(1, 1, 8, 8), everything, prior=torch.randn(1, 16, 1, 1, 1))
compiled((1, 16, 1, 1, 4), m(1, 1, 8, 1).transpose(2, 3))
compiled((1, 16, 3, 1, 4), (m(1, 1, 8, 1) * 255).to(torch.uint8).transpose(2, 3))
compiled((1, 3, 1, 1, 5), m(1, 1, 1, 2), MaskedLossConfig(resample="bilinear"))
compiled((2, 3, 4, 6, 5), m(2, 1, 3, 2), MaskedLossConfig(resample="bicubic"))
compiled((2, 4, 4, 6, 6), m(1, 1, 1, 48).expand(2, 1, 48, 48))
for kind in LOSS_TYPES:
    compiled((1, 16, 2, 6, 5), m(1, 1, 6, 5), MaskedLossConfig(loss_type=kind, loss_delta=0.3))
for normalization in NORMALIZATIONS:
    for per_sample in (False, True):
        for given in (None, 7, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)):
            config = MaskedLossConfig(normalization=normalization, per_sample=per_sample)
            pred = torch.randn(2, 4, 1, 5, 6, requires_grad=True)
            inputs = describe(pred, pred.detach(), m(2, 1, 5, 6), config, normalizer=given)
            with recorded() as launches:
                fused.loss(inputs, config, False)
            for launch in launches:
                launch.compile(DEVICES["sm_90"].target)
with recorded() as launches:  # as the operators of torch.compile call them
    inputs = describe(pred, pred.detach(), m(2, 1, 5, 6), config)
    fused.run(inputs, None, config, gradient=torch.empty_like(pred))
    fused.run(inputs, None, config, gradient=torch.empty_like(pred), grad_output=torch.ones(()))
for launch in launches:
    launch.compile(DEVICES["sm_90"].target)
"""


@pytest.mark.slow
def test_sizes_and_strides_of_one_every_kind_of_loss_and_every_denominator_compile():
    finished = python("-c", ODD)
    assert finished.returncode == 0, finished.stderr


# What is read of other programs' sums must not come from a first-level cache, and no wave may share another's positions.
SUMS = """
from bench.cases import build
from bench.lab.launches import DEVICES, launches_of
from bench.lab.variants import VARIANTS
for target, past_the_cache, barrier in (("sm_90", "ld.global.cv", "bar.sync"), ("gfx942", "sc0 sc1", "s_barrier")):
    device = DEVICES[target]
    _, launch, _ = launches_of(build(VARIANTS["main"], filled=False), device.hardware)
    code = launch.compile(device.target).asm
    code = code.get("amdgcn") or code["ptx"]
    print(code.count(past_the_cache), code.count(barrier))
"""


@pytest.mark.slow
def test_sums_of_other_programs_are_read_past_the_first_cache_on_both_makers_devices():
    finished = python("-c", SUMS)
    assert finished.returncode == 0, finished.stderr
    nvidia, amd = ([int(number) for number in line.split()] for line in finished.stdout.splitlines())
    assert nvidia == amd  # eight loads of each of 128 threads; as many barriers with two waves of 64 as with four of 32
    assert nvidia[0] == 8


# The loss kernel may begin before the weights kernel has ended: nothing may be read or written before it has waited.
OVERLAP = """
import re
from bench.cases import build
from bench.lab.launches import DEVICES, launches_of
from bench.lab.machine_code import disassembled
from bench.lab.variants import VARIANTS
for target in ("sm_80", "sm_90", "sm_100", "sm_120"):
    device = DEVICES[target]
    for variant in ("main", "prior bf16", "stats", "pixels blur"):
        call = build(VARIANTS[variant], filled=False)
        for launch in launches_of(call, device.hardware, stats=VARIANTS[variant].stats, backward=False):
            words = re.findall(r"ACQBULK|PREEXIT|LDG|STG|ATOM|RED", disassembled(launch.compile(device.target)))
            overlaps = launch.options.get("launch_pdl", False)
            print(target, launch.name, overlaps, words.count("PREEXIT"), words[0], words.count("ACQBULK"))
"""


@pytest.mark.slow
def test_the_loss_kernel_touches_no_memory_before_it_has_waited_for_the_weights():
    finished = python("-c", OVERLAP)
    assert finished.returncode == 0, finished.stderr
    rows = [line.split() for line in finished.stdout.splitlines()]
    assert len(rows) == 4 * (2 + 2 + 2 + 3)
    for target, kernel, overlaps, lets_begin, first, waits in rows:
        loss, weights = (target != "sm_80" and kernel == name for name in ("loss_kernel", "weights_kernel"))
        assert (overlaps == "True") == loss
        assert (int(lets_begin) > 0) == weights
        assert (int(waits), first == "ACQBULK") == (loss, loss)


def test_buckets_share_their_kernels():
    finished = run("bench.lab.buckets")
    assert finished.returncode == 0, finished.stderr
    counts = [int(count) for count in re.findall(r"(\d+) kernels", finished.stdout)]
    assert len(counts) == 6
    assert max(counts) <= 13, finished.stdout


@pytest.mark.parametrize("batch", [1, 4])
def test_the_weights_of_a_long_clip_are_made_by_all_of_the_device(batch):
    """HunyuanVideo, 720p, 129 frames: four programs and more for each of an H100's multiprocessors."""
    launch = WeightsLaunch.choose(33 * 90 * 160, batch)
    assert launch.tiles * batch >= 4 * 132
    assert launch.tiles * launch.blocks_per_tile * launch.block >= 33 * 90 * 160
