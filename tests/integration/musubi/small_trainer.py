"""A trainer with the seams of the real ones, for machines without a checkout: the methods, arguments and order of calls recorded
from musubi-tuner 0.3.4 (training/trainer_base.py) and 0.2.14 (hv_train_network.py, as in blissful-tuner), around real diffusers
models with tiny random weights, accelerate, and LoRA modules that take over a layer's forward as networks/lora.py does.

test_lab.py runs the real ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from model_families import FAMILIES, tiny_transformer
from safetensors.torch import load_file

from masked_loss_triton.integration.musubi import options
from masked_loss_triton.integration.musubi.trainer import masked_class

# What inference tools and the version-specific part of the metadata come from.
sai_model_spec = types.SimpleNamespace(build_metadata=lambda *given, **named: {"modelspec.title": "lora"})


def compute_loss_weighting_for_sd3(weighting_scheme, noise_scheduler, timesteps, device, dtype):
    """As the trainers have it: None, or (B, 1, 1, 1, 1) in the model's dtype."""
    if weighting_scheme == "none":
        return None
    sigma = timesteps.reshape(-1, 1, 1, 1, 1).to(device, dtype) / 1000
    return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))


@dataclasses.dataclass
class DiTOutput:
    pred: torch.Tensor
    target: torch.Tensor
    extra: dict = dataclasses.field(default_factory=dict)


class LoRAModule(torch.nn.Module):
    def __init__(self, name: str, layer: torch.nn.Linear, dropout: float) -> None:
        super().__init__()
        self.lora_name, self.multiplier, self.dropout = name, 1.0, dropout
        self.lora_down = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.lora_up = torch.nn.Linear(2, layer.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_up.weight)
        self.org_forward = layer.forward
        layer.forward = self.forward

    def forward(self, x):
        low = torch.nn.functional.dropout(self.lora_down(x), self.dropout, self.training)
        return self.org_forward(x) + self.lora_up(low) * self.multiplier


def arguments(toml: Path, *flags: str, parser: argparse.ArgumentParser | None = None, **changes: Any):
    """The trainer's own arguments and ours, through its parser."""
    parser = parser or argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--weighting_scheme", default="none")
    args = options.add_arguments(parser).parse_args(list(map(str, flags)))
    fixed = {"dataset_config": str(toml), "max_train_steps": 4, "batch_size": 2, "lora_dropout": 0.0, "resume": None}
    for name, value in {
        **fixed,
        "save_at": None,
        "output_dir": str(Path(toml).parent / "out"),
        "output_name": "lora",
        "learning_rate": 0.05,
        "network_module": "networks.lora",
        **changes,
    }.items():
        setattr(args, name, value)
    return args


class Base:
    """What both generations share."""

    def __init__(self, family: str, cache: Path) -> None:
        self.family, self.cache = FAMILIES[family], cache
        self.blocks_to_swap = 0
        self.losses: list[float] = []
        self.metadata: dict[str, str] = {}

    @property
    def architecture(self) -> str:
        return self.family.suffix

    def handle_model_specific_args(self, args):
        self.handled = True

    def generate_step_logs(self, args, current_loss, avr_loss, *rest):
        return {"loss/current": current_loss}

    def resume_from_local_or_hf_if_specified(self, accelerator, args):
        if args.resume:
            accelerator.load_state(args.resume)

    def get_noisy_model_input_and_timesteps(self, args, noise, latents, timesteps, noise_scheduler, device, dtype):
        timesteps = torch.rand(latents.shape[0]) * 1000 if timesteps is None else torch.tensor(timesteps)
        sigma = timesteps.reshape(-1, 1, 1, 1, 1) / 1000
        return (1 - sigma) * latents + sigma * noise, timesteps

    def predict(self, transformer, latents, batch, noise, noisy_model_input, timesteps):
        pred = self.family.predict(transformer, noisy_model_input, timesteps / 1000, batch["text"])
        return pred, noise - latents

    def batches(self, args) -> list[dict[str, Any]]:
        """The caches in their order, stacked as the trainer's dataset/bucket.py does."""
        items = []
        for path in sorted(self.cache.glob(f"*_{self.family.suffix}.safetensors")):
            tensors = load_file(path)
            latents = next(value for name, value in tensors.items() if name.startswith("latents_"))
            found = {
                name.rsplit("_", 1)[0]: value
                for name, value in tensors.items()
                if name.startswith(("mask_weights_", "mask_label_"))
            }
            items.append({"latents": latents.float(), **found})
        size = args.batch_size
        return [
            {
                **{name: torch.stack([one[name] for one in part]) for name in part[0]},
                **self.text(len(part)),
                "timesteps": None,
            }
            for part in (items[start : start + size] for start in range(0, len(items), size))
        ]

    def text(self, batch: int) -> dict[str, Any]:
        width = 3584 if self.family.name == "qwen" else 4096
        generator = torch.Generator().manual_seed(3)
        embeds = torch.randn(1, 5, width, generator=generator).expand(batch, -1, -1)
        pooled = torch.randn(1, 768, generator=generator).expand(batch, -1)
        return {"text": {"embeds": embeds, "mask": torch.ones(batch, 5, dtype=torch.bool), "pooled": pooled}}

    def train(self, args):
        self.handle_model_specific_args(args)
        torch.manual_seed(args.seed)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=args.gradient_accumulation_steps)
        accelerator.trackers = list(getattr(args, "trackers", ()))
        transformer = tiny_transformer(self.family).requires_grad_(False)
        layers = [(name, one) for name, one in transformer.named_modules() if name.endswith(("to_q", "to_v"))]
        network = torch.nn.ModuleList(LoRAModule(name, layer, args.lora_dropout) for name, layer in layers)
        self.network, self.transformer = network, transformer
        optimizer = torch.optim.SGD(network.parameters(), lr=args.learning_rate, momentum=0.5)
        prepared, optimizer = accelerator.prepare(network, optimizer)
        self.resume_from_local_or_hf_if_specified(accelerator, args)
        self.metadata["ss_network_module"] = args.network_module
        if hasattr(self, "extra_metadata"):
            self.metadata.update(self.extra_metadata(args))
        self.loop(args, accelerator, transformer, prepared, optimizer)
        self.metadata.update(sai_model_spec.build_metadata())

    def loop(self, args, accelerator, transformer, network, optimizer):
        self.gradients, self.logs, self.draws = [], [], []
        batches = self.batches(args)
        step = global_step = 0
        while global_step < args.max_train_steps:
            batch = dict(batches[(accelerator.process_index + step * accelerator.num_processes) % len(batches)])
            with accelerator.accumulate(network):
                noise = args.noise(batch) if hasattr(args, "noise") else torch.randn_like(batch["latents"])
                batch["timesteps"] = args.timesteps(batch) if hasattr(args, "timesteps") else None
                loss = self.step_loss(
                    args, accelerator, transformer, network, batch, batch["latents"], noise, global_step
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    for value in network.parameters():
                        value.grad = accelerator.reduce(value.grad, reduction="mean")
                    self.gradients.append([value.grad.clone() for value in network.parameters()])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.draws.append(torch.random.get_rng_state().clone())
            self.losses.append(loss.item())
            if accelerator.trackers:
                self.logs.append(self.generate_step_logs(args, loss.item(), loss.item()))
            step += 1
            global_step += accelerator.sync_gradients
            if args.save_at == global_step and accelerator.sync_gradients:
                accelerator.save_state(args.state)


class MethodTrainer(Base):
    """musubi-tuner 0.3: the loss is a method."""

    def extra_metadata(self, args):
        return {}

    def call_dit(
        self, args, accelerator, transformer_arg, latents, batch, noise, noisy_model_input, timesteps, network_dtype, **kwargs
    ):  # fmt: skip
        return DiTOutput(*self.predict(transformer_arg, latents, batch, noise, noisy_model_input, timesteps))

    def compute_loss(self, args, output, timesteps, noise_scheduler, dit_dtype, network_dtype, global_step):
        weighting = compute_loss_weighting_for_sd3(
            args.weighting_scheme, noise_scheduler, timesteps, timesteps.device, dit_dtype
        )
        loss = torch.nn.functional.mse_loss(output.pred.to(network_dtype), output.target, reduction="none")
        return (loss if weighting is None else loss * weighting).mean(), {}

    def step_loss(self, args, accelerator, transformer, network, batch, latents, noise, global_step):
        noisy, timesteps = self.get_noisy_model_input_and_timesteps(
            args, noise, latents, batch["timesteps"], None, accelerator.device, torch.float32
        )
        output = self.call_dit(args, accelerator, transformer, latents, batch, noise, noisy, timesteps, torch.float32)
        self.output = output
        output.pred.retain_grad()
        return self.compute_loss(args, output, timesteps, None, torch.float32, torch.float32, global_step)[0]


class InlineTrainer(Base):
    """musubi-tuner 0.2 and blissful-tuner: the loss stands in the middle of `train`."""

    def call_dit(
        self, args, accelerator, transformer, latents, batch, noise, noisy_model_input, timesteps, network_dtype
    ):
        return self.predict(transformer, latents, batch, noise, noisy_model_input, timesteps)

    def step_loss(self, args, accelerator, transformer, network, batch, latents, noise, global_step):
        noisy, timesteps = self.get_noisy_model_input_and_timesteps(
            args, noise, latents, batch["timesteps"], None, accelerator.device, torch.float32
        )
        weighting = compute_loss_weighting_for_sd3(
            args.weighting_scheme, None, timesteps, accelerator.device, torch.float32
        )
        pred, target = self.call_dit(
            args, accelerator, transformer, latents, batch, noise, noisy, timesteps, torch.float32
        )
        loss = torch.nn.functional.mse_loss(pred.to(torch.float32), target, reduction="none")
        return (loss if weighting is None else loss * weighting).mean()


GENERATIONS = {"method": MethodTrainer, "inline": InlineTrainer}
NAMES = ("wan", "hv", "qwen")
both = pytest.mark.parametrize("generation", GENERATIONS)


def trained(generation: str, lab: Any, *flags: Any, masked: bool = True, **changes: Any) -> Any:
    """A trainer after its training on the caches of a lab (see tests/support/caches.py)."""
    cls = GENERATIONS[generation]
    family = next(name for name, one in FAMILIES.items() if one.suffix == lab.suffix)
    trainer = (masked_class(cls) if masked else cls)(family, lab.cache)
    trainer.train(arguments(lab.toml, *flags, **changes))
    return trainer


def by_item() -> dict[str, Any]:
    """Noise and timestep that depend on the item alone, so that trainings with other batches can be compared."""

    def generators(batch):
        return [torch.Generator().manual_seed(int(one.abs().sum() * 1000) % 2**31) for one in batch["latents"]]

    def noise(batch):
        return torch.stack([torch.randn(batch["latents"].shape[1:], generator=one) for one in generators(batch)])

    def timesteps(batch):
        return [float(torch.rand((), generator=one)) * 800 + 100 for one in generators(batch)]

    return {"noise": noise, "timesteps": timesteps}


def weights_of(trainer: Any) -> list[torch.Tensor]:
    return [value.detach() for value in trainer.network.parameters()]


def same(one: Any, two: Any) -> bool:
    """Whether two trainings ended with the same LoRA, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(weights_of(one), weights_of(two), strict=True))
