"""Names that blissful-tuner (DustyL's, which has masks of its own) gives to options that are ours too.

They are taken as flags, as keys of a configuration file and in --network_args; what they mean is in docs/musubi.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

from masked_loss_triton.errors import UserError


class Alias(NamedTuple):
    """Another name of an option of ours, and its value that asks for nothing."""

    name: str
    neutral: Any
    kind: type


ALIASES = {
    "mask_blur_radius": Alias("mask_blur_kernel_size", 0, int),
    "prior_preservation_weight": Alias("inverted_mask_prior_weight", 0.0, float),
    "prior_preservation_timestep_threshold": Alias("prior_timestep_threshold", None, float),
    "prior_teacher_mode": Alias("prior_teacher", "base", str),
    "prior_teacher_ema_decay": Alias("prior_ema_decay", 0.999, float),
    "prior_decay_warmup_ratio": Alias("prior_warmup_ratio", 0.0, float),
}
# Taken, and said to do nothing: the value that is silent, and why.
IDLE: dict[str, tuple[Any, str]] = {
    "mask_loss_scale": (
        1.0,
        "every weight times one number is divided out again: use --mask_gamma or --mask_min_weight",
    ),
    "prior_teacher_eval": (
        False,
        "the teacher runs in the model's own mode, and these models have no layer that knows it",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the other names to a trainer's parser, but those that it has."""
    group = parser.add_argument_group("masked loss, as blissful-tuner names it")
    for alias, (name, _, kind) in ALIASES.items():
        if f"--{alias}" not in parser._option_string_actions:
            also = " and --inverted_mask_prior" if alias == "prior_preservation_weight" else ""
            group.add_argument(f"--{alias}", type=kind, help=f"--{name}{also}")
    for alias, (_, reason) in IDLE.items():
        if f"--{alias}" not in parser._option_string_actions:
            takes: dict[str, Any] = {"type": float} if alias == "mask_loss_scale" else {"action": "store_true"}
            group.add_argument(f"--{alias}", help=f"does nothing: {reason}", **takes)


def translated(given: Mapping[str, Any], values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our options with those that stand under other names among them.

    Args:
        given: our options by our names.
        values: everything that was given, with other names among it.
        defaults: of our options.

    Raises:
        UserError: when both names are given with different values.
    """
    found = dict(given)
    for alias, (name, neutral, _) in ALIASES.items():
        value = values.get(alias)
        if value is None or value == neutral:
            continue
        ours = found.get(name, defaults[name])
        if ours not in (defaults[name], value):
            raise UserError(f"--{alias} {value} is --{name}, which is {ours}: give one of them", 2)
        found[name] = value
        if alias == "prior_preservation_weight":
            found["inverted_mask_prior"] = True
    return found


def idle(values: Mapping[str, Any]) -> list[str]:
    """Says of every other name that does nothing why, where it was given."""
    asked = {name: values.get(name) for name in IDLE}
    return [
        f"--{name} does nothing: {IDLE[name][1]}" for name, value in asked.items() if value not in (None, IDLE[name][0])
    ]


def switch_off(values: dict[str, Any]) -> None:
    """Switches off the trainer's own masked loss among its arguments, where it has one: one of the two is enough."""
    values["use_mask_loss"] = False
    for alias, (_, neutral, _) in ALIASES.items():
        if alias in values:
            values[alias] = neutral
