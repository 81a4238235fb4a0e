"""The flags of masked training, validated into one object before any model is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from masked_loss_triton.config import LOSS_TYPES, NORMALIZATIONS, MaskedLossConfig
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import aliases
from masked_loss_triton.masks.labels import parse_weights

TEACHERS = ("base", "ema")
SCHEDULES = ("constant", "linear", "cosine")
PREFIXES = ("mask_", "prior_", "inverted_mask_")  # of options of ours
NORMALIZE_ACROSS = ("rank", "world", "accumulation")


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None, kind: type | None = None) -> Any:
    return dataclasses.field(
        default=default, metadata={"help": text, "choices": choices, "kind": kind or type(default)}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """One field per flag, under the flag's name.

    Raises:
        UserError: naming the flag, its value and what is accepted, with exit status 2.
    """

    use_mask_loss: bool = _option(
        False, "weight the loss by the masks in the latent caches (masked-loss cache adds them)"
    )
    mask_weights: str | None = _option(
        None,
        "weights of the labels in the caches, as face=1.5 body=0.7 logo=0 (masked-loss cache --mask_labels); 1 where not named",
        kind=str,
    )
    mask_gamma: float = _option(1.0, "power of the mask, > 0; below 1 lifts grey values")
    mask_min_weight: float = _option(0.0, "weight of what the mask leaves out, in [0, 1); applied after gamma")
    invert_mask: bool = _option(False, "learn what the mask leaves out")
    mask_blur_kernel_size: int = _option(0, "width of a Gaussian blur in latent cells: 0 (off) or odd")
    mask_normalization: str = _option("weighted_mean", "how weighted errors become one number", NORMALIZATIONS)
    normalize_per_sample: bool = _option(False, "normalise within each sample, then average over samples")
    mask_area_scale_beta: float = _option(0.0, "scale the loss by (mean of the mask) ** BETA, to tame tiny masks; >= 0")
    mask_probability: float = _option(
        1.0, "share of the batches that are masked, in [0, 1]; the others train on everything"
    )
    loss_type: str = _option("mse", "error per element", LOSS_TYPES)
    loss_delta: float = _option(1.0, "delta of huber and pseudo_huber, beta of smooth_l1; > 0")
    inverted_mask_prior: bool = _option(False, "outside the mask, keep to the prediction of a teacher")
    inverted_mask_prior_weight: float = _option(0.5, "weight of that term, >= 0; 0 turns it off")
    prior_mask_threshold: float | None = _option(
        None, "the prior covers where the mask is below this, in [0, 1], instead of 1 - weight", kind=float
    )
    prior_teacher: str = _option(
        "base", "teacher: the model without the adapter, or with a moving average of the adapter", TEACHERS
    )
    prior_ema_decay: float = _option(0.999, "decay of that moving average per optimizer step, in [0, 1)")
    prior_timestep_threshold: float = _option(
        0.0, "samples at or below this timestep (0 clean to 1000 noise) have no prior"
    )
    prior_decay_schedule: str = _option(
        "constant", "the prior's weight by timestep: falls towards 0 below --prior_decay_timestep_start", SCHEDULES
    )
    prior_decay_timestep_start: float = _option(
        300.0, "timestep, 0 to 1000, below which that schedule falls; full above"
    )
    prior_warmup_ratio: float = _option(
        0.0, "share of the training over which the prior's weight rises from 0, in [0, 1]"
    )
    prior_probability: float = _option(
        1.0,
        "share of the batches with a prior, in (0, 1]; its weight there is divided by this, and the others need no teacher",
    )
    mask_normalize_across: str = _option(
        "rank",
        "whose weights share a denominator: one process, all processes, or also all accumulated micro-batches",
        NORMALIZE_ACROSS,
    )
    mask_given_frames: str = _option(
        "keep",
        "frames that the model is given (the first of image-to-video, control frames): keep them in the loss, as the trainer does, "
        "or ignore them",
        ("keep", "ignore"),
    )
    mask_routing: float = _option(
        1.0,
        "share of the tokens computed in the middle blocks, in (0, 1]: first what the mask trains; below 1 is faster",
    )
    mask_routing_blocks: str | None = _option(
        None,
        "first and last of those blocks, as 2-37; without it all but the two at either end",
        kind=str,
    )
    mask_routing_background: float = _option(
        0.25, "share of the computed tokens that is background where the mask could fill them all, in [0, 1)"
    )
    mask_routing_until: float = _option(
        1.0, "share of the training after which every token is computed everywhere, in (0, 1]"
    )
    mask_routing_grow: int = _option(1, "patches by which the mask is widened for this; >= 0")
    mask_cross_attention: bool = _option(
        False,
        "WAN: what cross-attention hears in the text is weighted by the mask, so that words train the subject alone",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self._check_kind(field)
        self._bounded("mask_probability", 0, 1)
        self._bounded("prior_timestep_threshold", 0, 1000)
        self._bounded("prior_decay_timestep_start", 1e-3, 1000)
        self._bounded("prior_warmup_ratio", 0, 1)
        if not 0 <= self.prior_ema_decay < 1:
            raise _refused("prior_ema_decay", "must be in [0, 1)", self.prior_ema_decay)
        if not 0 < self.prior_probability <= 1:
            raise _refused("prior_probability", "must be in (0, 1]", self.prior_probability)
        self._check_routing()
        _ = self.label_weights  # raises
        self.config()  # raises for the loss's own fields
        if self.mask_normalize_across == "accumulation" and self.mask_area_scale_beta and not self.normalize_per_sample:
            raise UserError(
                "--mask_area_scale_beta with --mask_normalize_across accumulation would scale by the area of one micro-batch: "
                "add --normalize_per_sample, or use world or rank",
                2,
            )
        if not self.prior_on:
            return
        if self.prior_decay_schedule != "constant" and not self.normalize_per_sample:
            raise UserError(
                f"--prior_decay_schedule {self.prior_decay_schedule} gives each sample a prior weight of its own: add "
                "--normalize_per_sample, or use constant",
                2,
            )
        if self.mask_normalize_across == "accumulation" and self._sums_over_batch:
            raise UserError(
                "--mask_normalize_across accumulation cannot keep two denominators, of masks and prior, over micro-batches: "
                "add --normalize_per_sample, use world or rank, or drop --inverted_mask_prior",
                2,
            )

    def _check_routing(self) -> None:
        for name in ("mask_routing", "mask_routing_until"):
            if not 0 < getattr(self, name) <= 1:
                raise _refused(name, "must be in (0, 1]", getattr(self, name))
        if not 0 <= self.mask_routing_background < 1:
            raise _refused("mask_routing_background", "must be in [0, 1)", self.mask_routing_background)
        if self.mask_routing_grow < 0:
            raise _refused("mask_routing_grow", "must be >= 0", self.mask_routing_grow)
        blocks = self.routed_blocks
        if blocks is not None and blocks[0] > blocks[1]:
            raise _refused("mask_routing_blocks", "must be FIRST-LAST", self.mask_routing_blocks)
        if self.mask_cross_attention and self.prior_on:
            raise UserError(
                "--mask_cross_attention silences the text outside, where the teacher of --inverted_mask_prior hears it: drop one",
                2,
            )
        if self.mask_routing < 1 and self.mask_given_frames == "ignore":
            raise UserError(
                "--mask_routing keeps tokens of all frames, --mask_given_frames ignore drops some: drop one", 2
            )
        if self.mask_routing < 1 and self.mask_area_scale_beta:
            raise UserError(
                "--mask_area_scale_beta scales by the whole mask, and --mask_routing trains a part of it: drop one", 2
            )
        if self.mask_routing < 1 and self.mask_normalize_across == "world" and self.prior_on:
            raise UserError(
                "--mask_normalize_across world with --mask_routing and --inverted_mask_prior cannot be had: use rank",
                2,
            )

    @property
    def routed_blocks(self) -> tuple[int, int] | None:
        """The first and the last routed block, or None for the default."""
        if self.mask_routing_blocks is None:
            return None
        found = re.fullmatch(r"(\d+)-(\d+)", self.mask_routing_blocks)
        if found is None:
            raise _refused("mask_routing_blocks", "must be FIRST-LAST, as 2-37", self.mask_routing_blocks)
        return int(found[1]), int(found[2])

    @property
    def label_weights(self) -> dict[str, float]:
        """The weight of each label that was named."""
        try:
            return parse_weights(self.mask_weights or "")
        except ValueError as error:
            raise UserError(f"--mask_weights {error}", 2) from error

    def _check_kind(self, field: dataclasses.Field[Any]) -> None:
        value, kind, choices = getattr(self, field.name), field.metadata["kind"], field.metadata["choices"]
        if choices and value not in choices:
            raise _refused(field.name, f"must be one of {', '.join(choices)}", value)
        if value is None and field.default is None:
            return
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
            raise _refused(field.name, f"must be {names[kind]}", value)

    def _bounded(self, name: str, low: float, high: float) -> None:
        if not low <= getattr(self, name) <= high:
            raise _refused(name, f"must be in [{low:g}, {high:g}]", getattr(self, name))

    @property
    def prior_on(self) -> bool:
        """Whether any step may have a prior term."""
        return self.use_mask_loss and self.inverted_mask_prior and self.inverted_mask_prior_weight > 0

    @property
    def _sums_over_batch(self) -> bool:
        return self.mask_normalization != "mean" and not self.normalize_per_sample

    def config(self) -> MaskedLossConfig:
        """The options of the loss itself."""
        try:
            return MaskedLossConfig(**{field: getattr(self, flag) for field, flag in LOSS_FLAGS.items()})
        except (ValueError, TypeError) as error:
            field, _, rest = str(error).partition(" ")
            raise UserError(f"--{LOSS_FLAGS.get(field, field)} {rest}", 2) from error

    def idle(self, world_size: int, accumulation_steps: int) -> list[str]:
        """What was asked for and does nothing, one sentence each."""
        given = {field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default}
        if not self.use_mask_loss:
            names = ", ".join(f"--{name}" for name in sorted(given))
            return [f"{names} does nothing without --use_mask_loss"] if given else []
        found = []
        prior_flags = {name for name in given if "prior" in name} - {"inverted_mask_prior"}
        if self.inverted_mask_prior and not self.prior_on:
            found.append("--inverted_mask_prior does nothing with --inverted_mask_prior_weight 0")
        elif not self.inverted_mask_prior and prior_flags:
            names = ", ".join(f"--{name}" for name in sorted(prior_flags))
            found.append(f"{names} does nothing without --inverted_mask_prior")
        if "prior_ema_decay" in given and self.prior_teacher != "ema":
            found.append("--prior_ema_decay does nothing without --prior_teacher ema")
        if "prior_decay_timestep_start" in given and self.prior_decay_schedule == "constant":
            found.append("--prior_decay_timestep_start does nothing with --prior_decay_schedule constant")
        if "loss_delta" in given and self.loss_type in ("mse", "l1"):
            found.append(f"--loss_delta does nothing with --loss_type {self.loss_type}")
        routing = sorted(f"--{name}" for name in given if name.startswith("mask_routing_"))
        if self.mask_routing == 1 and routing:
            found.append(f"{', '.join(routing)} does nothing without --mask_routing below 1")
        if self.mask_probability == 0:
            found.append("--mask_probability 0 masks no batch at all")
        if self.mask_normalize_across == "world" and world_size == 1:
            found.append("--mask_normalize_across world does nothing with one process")
        if self.mask_normalize_across == "accumulation" and world_size == 1 and accumulation_steps == 1:
            found.append("--mask_normalize_across accumulation does nothing with --gradient_accumulation_steps 1")
        return found

    def metadata(self) -> dict[str, str]:
        """`ss_*` entries for the saved LoRA, one per option."""
        return {f"ss_{name}": str(value) for name, value in dataclasses.asdict(self).items()}


LOSS_FLAGS = {
    "gamma": "mask_gamma",
    "min_weight": "mask_min_weight",
    "invert": "invert_mask",
    "blur_kernel_size": "mask_blur_kernel_size",
    "normalization": "mask_normalization",
    "per_sample": "normalize_per_sample",
    "area_scale_beta": "mask_area_scale_beta",
    "loss_type": "loss_type",
    "loss_delta": "loss_delta",
    "prior_weight": "inverted_mask_prior_weight",
    "prior_threshold": "prior_mask_threshold",
}


def _refused(name: str, expected: str, value: Any) -> UserError:
    return UserError(f"--{name} {expected}, got {value!r}", 2)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the flags to a trainer's parser. A flag that the trainer has under the same name stays the trainer's."""
    group = parser.add_argument_group("masked loss")
    for field in dataclasses.fields(MaskOptions):
        name, kind, choices = f"--{field.name}", field.metadata["kind"], field.metadata["choices"]
        if name in parser._option_string_actions:
            continue
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            group.add_argument(name, action="store_true", help=text)
        else:
            shown = text if field.default is None else f"{text} (default: {field.default})"
            several: dict[str, Any] = {"nargs": "+", "metavar": "LABEL=WEIGHT"} if field.name == "mask_weights" else {}
            group.add_argument(name, type=kind, default=field.default, choices=choices, help=shown, **several)
    aliases.add_arguments(parser)
    return parser


def from_namespace(args: argparse.Namespace) -> MaskOptions:
    """The options among a trainer's parsed arguments, also under the names of `aliases`; others have the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(MaskOptions)}
    given = {name: getattr(args, name) for name in defaults if hasattr(args, name)}
    if isinstance(weights := given.get("mask_weights"), list):
        given["mask_weights"] = " ".join(map(str, weights))
    return MaskOptions(**aliases.translated(given, vars(args), defaults))


def take_from(arguments: dict[str, Any]) -> MaskOptions:
    """The options among `--network_args name=value`, as text; takes them out of `arguments`. Masks are on.

    Raises:
        UserError: naming the argument whose text cannot be read, or that looks like one of ours and is none.
    """
    fields = {field.name: field for field in dataclasses.fields(MaskOptions)}
    kinds = {name: field.metadata["kind"] for name, field in fields.items()}
    kinds |= {name: alias.kind for name, alias in aliases.ALIASES.items()}
    kinds |= {name: type(silent) for name, (silent, _) in aliases.IDLE.items()}
    values = {name: _from_text(name, kind, arguments.pop(name)) for name, kind in kinds.items() if name in arguments}
    for name in arguments:
        if name.startswith(PREFIXES):
            near = difflib.get_close_matches(name, kinds, 1)
            hint = f": did you mean {near[0]}?" if near else ": correct or drop it"
            raise UserError(f"--network_args {name}={arguments[name]}: there is no such option{hint}", 2)
    given = {"use_mask_loss": True, **{name: value for name, value in values.items() if name in fields}}
    return MaskOptions(**aliases.translated(given, values, {name: field.default for name, field in fields.items()}))


def _from_text(name: str, kind: type, text: Any) -> Any:
    truth: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}
    try:
        return truth[str(text).lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        names = {bool: "true or false", int: "a whole number", float: "a number"}
        raise UserError(f"--network_args {name}={text}: must be {names[kind]}", 2) from error
