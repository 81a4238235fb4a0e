"""Time and work of a training step of the trainer's own WanModel with its LoRA, all tokens against some, taking turns in one run.

    MUSUBI_REPO=/path/to/musubi-tuner python -m bench.routing_time

3,000 tokens of 384 channels, 8 blocks of which 6 are routed. Seconds are processor time, of which the smallest of the rounds
counts: a busy machine makes all of them slower alike. Operations are those that torch counts in forward and backward. The step with
a prior is one pass of the teacher over all tokens more; it is compared with the unmasked step, too.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.environment import ROOT, device_name, environment, slug
from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.integration.musubi.routing import Routing
from tests.lab.fixture import trainer_path

SHAPE, ROUNDS, KEEPS = (1, 5, 40, 60), 4, (1.0, 0.75, 0.5, 0.25)


def attend(qkv, **_):
    """The trainer's attention, without its rounding to bfloat16, which a CPU is slow at."""
    q, k, v = (one.transpose(1, 2) for one in qkv)
    qkv.clear()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def build() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The frozen model, and its LoRA as the trainer applies it."""
    trainer_path()
    from musubi_tuner.networks import lora_wan
    from musubi_tuner.wan.modules import model as module

    module.flash_attention = attend
    torch.manual_seed(0)
    model = module.WanModel(
        dim=384, ffn_dim=1536, num_heads=6, num_layers=8, text_len=64, text_dim=64, attn_mode="torch"
    )
    network = lora_wan.create_arch_network(1.0, 4, 4.0, None, None, model)
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    return model.requires_grad_(False).train(), network.requires_grad_(True)


def steps() -> dict[str, Callable[[], None]]:
    """A training step of each kind."""
    model, network = build()
    latents, text = torch.randn(16, *SHAPE[1:]), torch.randn(20, 64)
    given = {"t": torch.tensor([500.0]), "context": [text], "seq_len": 3000}
    mask = torch.zeros(SHAPE)
    mask[..., 10:30, 20:40] = 1

    def step(keep: float, prior: bool) -> None:
        network.zero_grad(set_to_none=True)
        options = MaskOptions(use_mask_loss=True, mask_routing=keep)
        routing = Routing(options, model, 0) if keep < 1 else None
        where = {"step": 0, "rank": 0, "progress": 0.0, "has_prior": prior}
        if prior:
            with torch.no_grad():
                model([latents], **given)
        weights = routing.weights(mask, MaskedLossConfig(), SHAPE, None, **where) if routing else None
        if routing:
            with routing.through(model, weights):
                (pred,) = model([latents], **given)
        else:
            (pred,) = model([latents], **given)
        pred.square().mean().backward()

    found = {
        (keep, prior): (lambda keep=keep, prior=prior: step(keep, prior)) for prior in (False, True) for keep in KEEPS
    }
    return {f"keep {keep:g}{', prior' * prior}": one for (keep, prior), one in found.items()}


def main() -> None:
    torch.set_num_threads(1)
    kinds = steps()
    operations, seconds = {}, {name: [] for name in kinds}
    for name, step in kinds.items():
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        operations[name] = counter.get_total_flops()
    for _ in range(ROUNDS):
        for name, step in kinds.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    rows = []
    for name in kinds:
        time_, work = (min(values) for values in (seconds[name], [operations[name]]))
        ratios = time_ / min(seconds["keep 1"]), work / operations["keep 1"]
        row = {
            "step": name,
            "seconds": round(time_, 3),
            "of_stock": round(ratios[0], 3),
            "operations_of_stock": round(ratios[1], 3),
        }
        rows.append({**row, **environment()})
        print("{step:18s} {seconds:8.2f} s  time {of_stock:.2f}  operations {operations_of_stock:.2f}".format(**row))
    path = ROOT / "bench/results" / slug(device_name()) / "routing_time.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
