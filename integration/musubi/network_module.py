"""Masked loss where `masked-loss train` cannot start the trainer (a GUI, a service): a network module for `--network_module`.

The trainer imports the module and asks it for a network; the options come through `--network_args name=value`. It hands over
nothing of itself, so it is looked up among the callers, and its class is replaced. By then the model is loaded: faulty options are
found later than with the launcher, which is the better way where there is a choice.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from masked_loss_triton.cache.families import FAMILIES, family_of
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.options import MaskOptions, take_from
from masked_loss_triton.integration.musubi.trainer import Masked, masked_class


def network_functions(family: str | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the trainer's own `create_arch_network` and `create_arch_network_from_weights`, with masked loss switched on by
    the first network that is to be trained.

    Args:
        family: a name of `FAMILIES`; None asks the trainer which family it trains.
    """

    def names() -> tuple[str, Any]:
        name = FAMILIES[family or family_of(_caller()[0].architecture) or ""].network
        return str(name), importlib.import_module(f"musubi_tuner.networks.{name}")

    def create_arch_network(*given: Any, **named: Any) -> Any:
        options, (name, module) = take_from(named), names()
        network = module.create_arch_network(*given, **named)
        _switch_on(name, options)
        return network

    def create_arch_network_from_weights(*given: Any, **named: Any) -> Any:
        name, module = names()
        network = module.create_arch_network_from_weights(*given, **named)
        if not named.get("for_inference"):
            _switch_on(name)
        return network

    return create_arch_network, create_arch_network_from_weights


def _switch_on(name: str, options: MaskOptions | None = None) -> None:
    """Makes the trainer a masked one. A network from weights (--dim_from_weights) is given no arguments: they are looked up."""
    trainer, args = _caller()
    if options is None:
        options = take_from(dict(argument.split("=", 1) for argument in args.network_args or ()))
    if not isinstance(trainer, Masked):  # it is one where `masked-loss train` started it without --use_mask_loss
        trainer.__class__ = masked_class(type(trainer))
    trainer.start_masks(options, args)
    # What the saved LoRA says it is: tools that load it know this name.
    args.network_module = f"networks.{name}"


def _caller() -> tuple[Any, Any]:
    """Returns the trainer that is building its network, and its arguments, from the frames of the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        trainer, args = frame.f_locals.get("self"), frame.f_locals.get("args")
        if hasattr(trainer, "call_dit") and hasattr(args, "network_module"):
            return trainer, args
        frame = frame.f_back  # type: ignore[assignment]
    raise UserError("this network module switches on masked loss in a trainer, and no trainer is building it")
