"""The prior's teacher: the network that trains, with its adapter off or replaced by a moving average of itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from masked_loss_triton.errors import UserError


def adapters_of(transformer: torch.nn.Module) -> dict[str, Any]:
    """The adapter modules that have put their own forward in place of a layer's, by name.

    LoRA modules of this family of trainers replace `layer.forward` by a bound method of theirs and multiply what they add by
    their `multiplier` (musubi-tuner 0.3.4, networks/lora.py:133-173). `set_enabled(False)` is not read while training.
    """
    found: dict[str, Any] = {}
    for path, layer in transformer.named_modules():
        owner = getattr(layer.__dict__.get("forward"), "__self__", None)
        if isinstance(owner, torch.nn.Module) and owner is not layer and hasattr(owner, "multiplier"):
            found[getattr(owner, "lora_name", path)] = owner
    return found


class Teacher:
    """Runs the network as the teacher.

    Args:
        transformer: the model with its adapters applied.
        decay: None for the model without its adapter; else the decay of the moving average that replaces the adapter.

    Raises:
        UserError: when no adapter can be switched off, so that teacher and student would be the same network.
    """

    def __init__(self, transformer: torch.nn.Module, decay: float | None) -> None:
        self.adapters = adapters_of(transformer)
        self.decay = decay
        if not self.adapters:
            raise UserError(
                "--inverted_mask_prior needs an adapter that can be switched off, and this network has none with a "
                "multiplier: use a LoRA network module, or drop the flag"
            )
        self.average: dict[str, torch.Tensor] = {}
        if decay is not None:
            self.average = {name: value.detach().float().clone() for name, value in self._parameters()}

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for name, adapter in self.adapters.items():
            for key, value in adapter.named_parameters():
                # A wrapped layer inside the adapter belongs to the model.
                if value.requires_grad:
                    yield f"{name}.{key}", value

    @torch.no_grad()
    def update(self) -> None:
        """One step of the moving average, after a step of the optimizer."""
        if self.decay is not None:
            parameters = dict(self._parameters())
            averages = [self.average[name] for name in parameters]
            torch._foreach_lerp_(averages, [value.float() for value in parameters.values()], 1 - self.decay)

    def load(self, average: dict[str, torch.Tensor]) -> None:
        """Takes over a saved average.

        Raises:
            UserError: when it belongs to another network.
        """
        shapes = {name: value.shape for name, value in self.average.items()}
        if {name: value.shape for name, value in average.items()} != shapes:
            raise UserError("the saved teacher belongs to another network: resume with the same network arguments")
        for name, value in average.items():
            self.average[name].copy_(value)

    @contextlib.contextmanager
    def in_place(self, device: torch.device) -> Iterator[None]:
        """Makes the network the teacher while a block runs, without gradients; the random state is then as it was before."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad(), self._swapped():
            yield

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        if self.decay is None:
            multipliers = {name: adapter.multiplier for name, adapter in self.adapters.items()}
            try:
                for adapter in self.adapters.values():
                    adapter.multiplier = 0.0
                yield
            finally:
                for name, adapter in self.adapters.items():
                    adapter.multiplier = multipliers[name]
        else:
            students = {name: value.data for name, value in self._parameters()}
            try:
                for name, value in self._parameters():
                    value.data = self.average[name].to(value.dtype)
                yield
            finally:
                for name, value in self._parameters():
                    value.data = students[name]
