"""Masked LoRA training of WAN, HunyuanVideo and Qwen-Image in a plain diffusers + accelerate + peft loop.

    pip install './masked_loss_triton[diffusers]'   # of a checkout
    python examples/train_diffusers.py --arch wan --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --cache cache --output lora

The caches are those of musubi-tuner's caching scripts (latents and text), after `masked-loss cache` has added the masks.
For several GPUs: `accelerate launch examples/train_diffusers.py ...`. With --tiny in place of --model a tiny random model of the
same class trains on a CPU, to try out caches and options.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from latent_caches import Batches, CachedLatents, collate, find_items
from model_families import FAMILIES, Family, load_transformer, tiny_transformer
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor
from torch.utils.data import DataLoader

from masked_loss_triton import FlowTarget, MaskedLossConfig, mask_weights, masked_loss
from masked_loss_triton.config import LOSS_TYPES, NORMALIZATIONS
from masked_loss_triton.errors import UserError
from masked_loss_triton.routing import plan_routing, through

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def noisy_latents(batch: dict[str, Any]) -> Tensor:
    """Flow matching: x = (1 - sigma) latents + sigma noise, float32 (B, 16, F, h, w)."""
    sigma = batch["sigma"].view(-1, 1, 1, 1, 1)
    return (1 - sigma) * batch["latents"] + sigma * batch["noise"]


@torch.no_grad()
def teacher_prediction(transformer: Any, family: Family, noisy: Tensor, batch: dict[str, Any]) -> Tensor:
    """What the model predicts without its LoRA, from the same noise, sigma and text."""
    transformer.disable_adapters()
    try:
        return family.predict(transformer, noisy, batch["sigma"], batch["text"])
    finally:
        transformer.enable_adapters()


def micro_batch_loss(
    model: Any,
    transformer: Any,
    family: Family,
    batch: dict[str, Any],
    config: MaskedLossConfig,
    *,
    dtype: torch.dtype,
    use_prior: bool = False,
    normalizer: Any = None,
    process_group: Any = None,
) -> Tensor:
    """The share of one micro-batch in the loss of an optimizer step.

    Args:
        model: the transformer as accelerate wraps it.
        transformer: the same without the wrapping: the teacher's pass is not one that gradients are exchanged for.
        batch: of `collate`, on the device.
        dtype: of the model's inputs.
        use_prior: hold what the mask leaves out to the teacher's prediction.
        normalizer: `step_normalizer` of all micro-batches of the step on this process.
        process_group: over which the denominators are summed.
    """
    noisy = noisy_latents(batch).to(dtype)
    # The teacher goes first: its activations are gone before the student's are kept for the backward.
    prior = teacher_prediction(transformer, family, noisy, batch) if use_prior else None
    routed = batch.get("routed")
    with through(transformer, routed):
        pred = family.predict(model, noisy, batch["sigma"], batch["text"])
    if routed is not None:
        target, sums = (
            FlowTarget(batch["noise"], batch["latents"]),
            {"normalizer": normalizer, "process_group": process_group},
        )
        return routed.loss(pred, target, prior=prior, **sums)
    return masked_loss(
        pred,
        FlowTarget(batch["noise"], batch["latents"]),
        batch["mask"],
        config,
        prior=prior,
        mask_gate=batch["mask_gate"],
        normalizer=normalizer,
        process_group=process_group,
    )


def step_normalizer(batches: Sequence[dict[str, Any]], config: MaskedLossConfig, use_prior: bool) -> Any:
    """The denominators of an optimizer step, from the masks alone: with them, micro-batches of any sizes and shapes add up to
    the one big batch, where an average over micro-batches would count a small mask as much as a large one."""
    if config.per_sample:
        return float(sum(len(batch["latents"]) for batch in batches))
    if config.normalization == "mean":
        return float(sum(batch["latents"].numel() for batch in batches))
    sums: Any = [0.0, 0.0]
    for batch in batches:
        size, channels, *grid = batch["latents"].shape
        mask = batch["mask"]
        if mask is None:
            mask = torch.ones_like(batch["latents"][:, :1])
        if "routed" in batch:
            weights = batch["routed"].target, batch["routed"].prior
        else:
            weights = mask_weights(mask, config, shape=(size, *grid), has_prior=use_prior, mask_gate=batch["mask_gate"])
        sums = [total + channels * weight.sum() for total, weight in zip(sums, weights, strict=True)]
    return tuple(sums) if use_prior else sums[0]


def train(args: argparse.Namespace) -> list[float]:
    """Trains and saves a LoRA; returns the loss of each step."""
    family = FAMILIES[args.arch]
    config = loss_config(args)
    use_prior = args.prior_weight > 0 and not args.ignore_masks
    items = find_items(args.cache, family, use_masks=not args.ignore_masks)
    dtype = torch.float32 if args.tiny else DTYPES[args.dtype]
    # The last text layers of some models reach no output, and their LoRA gets no gradient.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=args.cpu, kwargs_handlers=[unused])
    processes = accelerator.num_processes
    process_group = dist.group.WORLD if processes > 1 else None

    transformer = build_transformer(args, family, dtype).to(accelerator.device)
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    parameters = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    batches = iter(data_loader(args, family, items, accelerator))
    accelerator.print(
        f"{len(items)} caches, {sum(p.numel() for p in parameters):,} LoRA parameters, {processes} processes"
    )

    losses = []
    for step in range(1, args.steps + 1):
        window = [to_device(next(batches), accelerator.device) for _ in range(args.gradient_accumulation_steps)]
        if args.mask_routing < 1 and step <= args.mask_routing_until * args.steps:
            for number, batch in enumerate(window):
                seed = f"{args.seed} {accelerator.process_index} {number}"
                options = {"config": config, "has_prior": use_prior, "mask_gate": batch["mask_gate"]}
                batch["routed"] = plan_routing(
                    transformer, batch["mask"], args.mask_routing, seed=seed, step=step, **options
                )
        normalizer = step_normalizer(window, config, use_prior)
        total = torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(window, 1):
            # Gradients are exchanged once per step. accelerator.accumulate would also divide by the number of
            # micro-batches; the exact denominator makes them a sum.
            exchange = number == len(window)
            with contextlib.nullcontext() if exchange else accelerator.no_sync(model):
                loss = micro_batch_loss(
                    model,
                    transformer,
                    family,
                    batch,
                    config,
                    dtype=dtype,
                    use_prior=use_prior,
                    normalizer=normalizer,
                    process_group=process_group,
                )
                accelerator.backward(loss)
            total += loss.detach()
        if args.max_grad_norm:
            accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(accelerator.reduce(total, "mean").item())
        if step % args.log_every == 0 or step == args.steps:
            accelerator.print(f"step {step}/{args.steps}  loss {losses[-1]:.6f}")

    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_lora(transformer, family, args.output)
    accelerator.end_training()
    return losses


def build_transformer(args: argparse.Namespace, family: Family, dtype: torch.dtype) -> Any:
    """The frozen transformer with a new LoRA. The LoRA is float32: bfloat16 would lose its small updates."""
    set_seed(args.seed)  # the tiny model's weights
    if args.tiny:
        transformer = tiny_transformer(family)
    else:
        transformer = load_transformer(family, args.model, args.subfolder, dtype)
    transformer.requires_grad_(False)
    set_seed(args.seed)  # those of the LoRA, the same on all processes
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=args.lora_targets or family.lora_targets)
    transformer.add_adapter(lora)
    diffusers.training_utils.cast_training_params(transformer, dtype=torch.float32)
    return transformer


def data_loader(args: argparse.Namespace, family: Family, items: Sequence[Any], accelerator: Accelerator) -> Any:
    """Loads this process's micro-batches; `accelerator.prepare` is not asked to, since `Batches` deals them out exactly."""
    shift = family.shift if args.shift is None else args.shift
    dataset = CachedLatents(
        items,
        family,
        seed=args.seed,
        shift=shift,
        sigma_range=(args.min_sigma, args.max_sigma),
        mask_probability=args.mask_probability,
    )
    sampler = Batches(items, args.batch_size, args.seed, accelerator.process_index, accelerator.num_processes)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers)


def to_device(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {name: to_device(value, device) for name, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def save_lora(transformer: Any, family: Family, folder: Path) -> None:
    """Writes pytorch_lora_weights.safetensors as `pipeline.load_lora_weights(folder)` reads it."""
    getattr(diffusers, family.pipeline).save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name="default"),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def loss_config(args: argparse.Namespace) -> MaskedLossConfig:
    try:
        return MaskedLossConfig(
            invert=args.invert_mask,
            blur_kernel_size=args.mask_blur_kernel_size,
            gamma=args.mask_gamma,
            min_weight=args.mask_min_weight,
            prior_threshold=args.prior_mask_threshold,
            prior_weight=args.prior_weight,
            loss_type=args.loss_type,
            loss_delta=args.loss_delta,
            normalization=args.mask_normalization,
            per_sample=args.normalize_per_sample,
        )
    except (ValueError, TypeError) as error:
        raise UserError(str(error), 2) from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arch", choices=sorted(FAMILIES), required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder or hub id of a diffusers pipeline or transformer")
    source.add_argument("--tiny", action="store_true", help="a tiny random model instead")
    add("--subfolder", help="of the model; default transformer (WAN 2.2 also has transformer_2)")
    add("--cache", type=Path, nargs="+", required=True, help="cache folders, with latents and text")
    add("--output", type=Path, required=True, help="folder of the LoRA")
    add("--steps", type=int, default=1000, help="optimizer steps")
    add("--batch_size", type=int, default=1, help="samples per process and micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--learning_rate", type=float, default=1e-4)
    add("--weight_decay", type=float, default=1e-2)
    add("--max_grad_norm", type=float, default=1.0, help="0 is off")
    add("--rank", type=int, default=16, help="of the LoRA")
    add("--lora_targets", nargs="+", help="linear layers that get a LoRA")
    add("--shift", type=float, help="flow shift; default 3 (wan), 7 (hv), 2.2 (qwen)")
    add("--min_sigma", type=float, default=0.0, help="lowest noise level; WAN 2.2: 0.875 for the high noise expert")
    add("--max_sigma", type=float, default=1.0, help="highest; WAN 2.2: 0.875 for the low noise expert, transformer_2")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the frozen model; a tiny one is float32")
    add("--gradient_checkpointing", action="store_true")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=2, help="processes that read caches")
    add("--log_every", type=int, default=10)
    add("--cpu", action="store_true")
    loss = parser.add_argument_group("masked loss")
    loss.add_argument("--ignore_masks", action="store_true", help="train without masks, also on caches that have none")
    loss.add_argument("--mask_gamma", type=float, default=1.0)
    loss.add_argument("--mask_min_weight", type=float, default=0.0)
    loss.add_argument("--invert_mask", action="store_true")
    loss.add_argument("--mask_blur_kernel_size", type=int, default=0)
    loss.add_argument("--mask_probability", type=float, default=1.0, help="how often a sample trains with its mask")
    loss.add_argument("--mask_normalization", choices=NORMALIZATIONS, default="weighted_mean")
    loss.add_argument("--normalize_per_sample", action="store_true")
    loss.add_argument("--loss_type", choices=LOSS_TYPES, default="mse")
    loss.add_argument("--loss_delta", type=float, default=1.0)
    loss.add_argument("--prior_weight", type=float, default=0.0, help="holds what the mask leaves out; 0 is off")
    loss.add_argument("--prior_mask_threshold", type=float)
    loss.add_argument(
        "--mask_routing", type=float, default=1.0, help="share of the tokens computed in the middle blocks; 1 is all"
    )
    loss.add_argument("--mask_routing_until", type=float, default=1.0, help="share of the steps after which all are")
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuses numbers that would only fail, or do nothing, after the model has been loaded."""
    for name in ("steps", "batch_size", "gradient_accumulation_steps", "rank", "log_every"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(args, name)}", 2)
    if not 0 <= args.mask_probability <= 1:
        raise UserError(f"--mask_probability must be in [0, 1], got {args.mask_probability}", 2)
    if args.shift is not None and args.shift <= 0:
        raise UserError(f"--shift must be > 0, got {args.shift}", 2)
    # Below a twentieth of the range, drawing again until a level falls into it would take too long.
    if not 0 <= args.min_sigma <= args.max_sigma - 0.05 <= 0.95:
        raise UserError(
            f"--min_sigma and --max_sigma must be in [0, 1] and 0.05 apart, got {args.min_sigma} and {args.max_sigma}",
            2,
        )
    for name in ("mask_routing", "mask_routing_until"):
        if not 0 < getattr(args, name) <= 1:
            raise UserError(f"--{name} must be in (0, 1], got {getattr(args, name)}", 2)
    if args.ignore_masks and args.mask_routing < 1:
        raise UserError("--mask_routing computes what the masks train: it cannot be had with --ignore_masks", 2)
    if args.ignore_masks and args.prior_weight > 0:
        raise UserError("--prior_weight holds what the mask leaves out: with --ignore_masks there is no such region", 2)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        check(args)
        train(args)
    except UserError as error:
        print(f"train_diffusers.py: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
