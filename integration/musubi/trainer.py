"""The trainer's class with masked loss in it, by subclassing; no line of the trainer changes.

Two generations of one family have different seams:

- musubi-tuner 0.3: `call_dit` returns a prediction and its target, `compute_loss` makes a loss of them
  (training/trainer_base.py:1094-1186).
- musubi-tuner 0.2 and blissful-tuner 0.12 to 0.13: the loss stands in the middle of `train`, as the mean of
  `mse_loss(pred, target) * weighting` (hv_train_network.py). There `call_dit` returns one number and 0 in place of prediction
  and target: the root of our loss. Its square is our loss, and what flows back is its gradient, for every loss type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import sys
import types
from typing import Any

import torch

from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import aliases, caches
from masked_loss_triton.integration.musubi.options import PREFIXES, MaskOptions, from_namespace
from masked_loss_triton.integration.musubi.routing import check_routing
from masked_loss_triton.integration.musubi.training import MaskedTraining, Step

# Recorded from musubi-tuner 0.2.14 to 0.3.4 and blissful-tuner 0.12.66 and 0.13.66; a third argument may end in _arg.
SEAMS = {
    "call_dit": [
        "args",
        "accelerator",
        "transformer",
        "latents",
        "batch",
        "noise",
        "noisy_model_input",
        "timesteps",
        "network_dtype",
    ],
    "handle_model_specific_args": ["args"],
    "resume_from_local_or_hf_if_specified": ["accelerator", "args"],
    "get_noisy_model_input_and_timesteps": [
        "args",
        "noise",
        "latents",
        "timesteps",
        "noise_scheduler",
        "device",
        "dtype",
    ],
}
COMPUTE_LOSS = ["args", "output", "timesteps", "noise_scheduler", "dit_dtype", "network_dtype"]
SUPPORTED = "musubi-tuner 0.2.14 to 0.3.4, blissful-tuner 0.12.66 to 0.13.66"


def has_loss_seam(trainer: type) -> bool:
    """Whether the trainer makes its loss in a method of its own.

    Raises:
        UserError: when a method that masked loss hooks into is missing or takes other arguments, naming the versions that work.
    """
    expected = dict(SEAMS)
    if hasattr(trainer, "compute_loss"):
        expected["compute_loss"] = COMPUTE_LOSS
    for name, names in expected.items():
        method = getattr(trainer, name, None)
        got = [] if method is None else _positional(method)
        optional = ["global_step"] if name == "compute_loss" else []
        if got[: len(names)] != names or not set(got[len(names) :]) <= set(optional):
            shown = f"takes ({', '.join(got)})" if method is not None else "is missing"
            raise UserError(
                f"this trainer's {trainer.__name__}.{name} {shown}, where masked loss expects ({', '.join(names)}): "
                f"supported are {SUPPORTED}"
            )
    return "compute_loss" in expected


def _positional(method: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    names = [name for name, one in inspect.signature(method).parameters.items() if one.kind in kinds]
    return [name.removesuffix("_arg") for name in names if name != "self"]


def masked_class(trainer: type, whole_model: bool = False) -> type:
    """A subclass of the trainer's class that trains with masks when `--use_mask_loss` is given.

    Args:
        trainer: a class of the trainer.
        whole_model: it trains the model itself, in a loop that never asks for its method `compute_loss`.
    """
    mixin: type = _LossMethod if has_loss_seam(trainer) else _LossInline
    mixin = _WholeModel if whole_model else mixin
    return type(f"Masked{trainer.__name__}", (mixin, trainer), {})


class Masked:
    """What both generations share."""

    masked: MaskedTraining | None = None

    def train(self, args: Any) -> Any:
        for name, what in (("dataset_config", "the dataset file"), ("dit", "the model's weights")):
            if getattr(args, name, "") is None:
                raise UserError(f"--{name} is missing: name {what}", 2)
        return super().train(args)  # type: ignore[misc]

    def handle_model_specific_args(self, args: Any) -> None:
        super().handle_model_specific_args(args)  # type: ignore[misc]
        options, module = from_namespace(args), str(getattr(args, "network_module", ""))
        if options.use_mask_loss and module.startswith("masked_loss_triton."):
            raise UserError(
                f"masks are switched on twice, by --use_mask_loss and by --network_module {module}: name the trainer's own "
                "network module, or leave out --use_mask_loss",
                2,
            )
        self.start_masks(options, args)

    def start_masks(self, options: MaskOptions, args: Any) -> None:
        """Checks options and caches, says what will happen, and switches masks on.

        Raises:
            UserError: before anything is loaded.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        notes = options.idle(world, getattr(args, "gradient_accumulation_steps", 1) or 1) + aliases.idle(vars(args))
        if not options.use_mask_loss:
            _say(*notes, "masks are not used: --use_mask_loss is not given")
            return
        check_routing(options, self.architecture, args)  # type: ignore[attr-defined]
        report = caches.inspect_caches(args.dataset_config, self.architecture)  # type: ignore[attr-defined]
        masked = MaskedTraining(options, report.family, report, _say)
        if options.mask_given_frames == "ignore":
            if report.family.given_mask is None and not report.family.given_first:
                raise UserError(
                    "--mask_given_frames ignore: it is not known which frames this model family is given", 2
                )
            if not getattr(self, "i2v_training", False):
                notes.append("--mask_given_frames ignore does nothing: this training is given no frames")
        factors = ", ".join(f"{label} {factor:.3g}" for label, factor in masked.factors.items())
        labels = [f"labels weigh, in units of the largest weight: {factors}"] if factors else []
        _say(*banner(options), *report.summary(), *labels, *notes, *_misspelled(args), *report.warnings(options))
        aliases.switch_off(vars(args))
        self.masked = masked

    def resume_from_local_or_hf_if_specified(self, accelerator: Any, args: Any) -> Any:
        masked = self.masked
        if masked is not None:
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: masked.save(folder))

            def load(models: Any, folder: str) -> None:
                if not masked.load(folder):
                    _say(f"{folder} was saved without masks: the counts of masked training start at 0")

            accelerator.register_load_state_pre_hook(load)
        return super().resume_from_local_or_hf_if_specified(accelerator, args)  # type: ignore[misc]

    def generate_step_logs(self, *given: Any, **named: Any) -> dict[str, Any]:
        logs = super().generate_step_logs(*given, **named)  # type: ignore[misc]
        return {**logs, **self.masked.logs()} if self.masked is not None else logs

    def _with_teacher(self, parent: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        """The step and the parent's own result; the teacher's prediction, where one is needed, came first."""
        args, accelerator, transformer, _, batch, _, _, timesteps = given[:8]
        assert self.masked is not None
        image_to_video = bool(getattr(self, "i2v_training", False))
        step = self.masked.begin(args, accelerator, transformer, batch, timesteps, image_to_video)
        if step.needs_teacher:
            assert self.masked.teacher is not None
            with self.masked.teacher.in_place(accelerator.device):
                step.prior = _prediction(parent(*given, **named))
            if self.blocks_to_swap:  # type: ignore[attr-defined]
                # Only the backward pass brings swapped blocks back; the teacher has none.
                accelerator.unwrap_model(transformer).switch_block_swap_for_training()
        routing = self.masked.routing
        model = accelerator.unwrap_model(transformer)
        with routing.through(model, step.routed) if routing is not None else contextlib.nullcontext():
            return step, parent(*given, **named)

    def _weighting(self, args: Any, timesteps: torch.Tensor, noise_scheduler: Any, dtype: torch.dtype) -> Any:
        return self._trainer_module().compute_loss_weighting_for_sd3(
            args.weighting_scheme, noise_scheduler, timesteps, timesteps.device, dtype
        )

    def _trainer_module(self) -> Any:
        """The module of the trainer's base class, which holds its helpers."""
        classes = (one for one in type(self).__mro__ if not issubclass(one, Masked))
        return sys.modules[next(one for one in classes if "generate_step_logs" in vars(one)).__module__]


class _LossMethod(Masked):
    """Trainers whose loss is a method."""

    def call_dit(self, *given: Any, **named: Any) -> Any:
        parent = super().call_dit  # type: ignore[misc]
        if self.masked is None or not torch.is_grad_enabled():
            return parent(*given, **named)
        step, output = self._with_teacher(parent, given, named)
        output.extra["masked_loss"] = step
        return output

    def compute_loss(
        self,
        args: Any,
        output: Any,
        timesteps: torch.Tensor,
        noise_scheduler: Any,
        dit_dtype: Any,
        *rest: Any,
        **named: Any,
    ) -> Any:
        if self.masked is None or "masked_loss" not in output.extra:
            return super().compute_loss(  # type: ignore[misc]
                args, output, timesteps, noise_scheduler, dit_dtype, *rest, **named
            )
        step = output.extra["masked_loss"]
        weighting = None
        if self.masked.family.weighting_scheme:
            weighting = self._weighting(args, timesteps, noise_scheduler, dit_dtype)
        loss = self.masked.loss(output.pred, output.target, step, weighting)
        return self._with_own_terms(loss, step, args, output, (timesteps, noise_scheduler, dit_dtype, *rest), named)

    def _with_own_terms(
        self, loss: torch.Tensor, step: Step, args: Any, output: Any, rest: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss with what a family adds to it, and the family's own numbers for the log."""
        assert self.masked is not None
        if getattr(args, "log_loss_stats", False):  # Ideogram 4
            with torch.no_grad():
                return loss, super().compute_loss(args, output, *rest, **named)[1]  # type: ignore[misc]
        if getattr(args, "dino_loss_weight", 0) > 0:  # HiDream-O1: a perceptual term of whole pictures
            pred = self.masked.inside(output.pred, output.target, step)
            global_step = named["global_step"] if "global_step" in named else rest[-1]
            grid = output.extra["pixel_grid_hw"]
            return self.apply_dino_loss(args, loss, pred, output.target, grid, global_step)  # type: ignore[attr-defined]
        return loss, {}

    def extra_metadata(self, args: Any) -> dict[str, Any]:
        found = super().extra_metadata(args)  # type: ignore[misc]
        return {**found, **self.masked.options.metadata()} if self.masked is not None else found


class _LossInline(Masked):
    """Trainers whose loss stands in the middle of their training loop."""

    _noise_scheduler: tuple[Any, Any] | None = None

    def start_masks(self, options: MaskOptions, args: Any) -> None:
        super().start_masks(options, args)
        if self.masked is not None:
            # Their metadata has no seam either; a part of it is built by a function, when the LoRA is saved.
            spec = self._trainer_module().sai_model_spec
            build, ours = spec.build_metadata, options.metadata()
            spec.build_metadata = lambda *given, **named: {**build(*given, **named), **ours}

    def get_noisy_model_input_and_timesteps(self, *given: Any, **named: Any) -> Any:
        self._noise_scheduler = given[4], given[6]
        return super().get_noisy_model_input_and_timesteps(*given, **named)  # type: ignore[misc]

    def call_dit(self, *given: Any, **named: Any) -> Any:
        parent = super().call_dit  # type: ignore[misc]
        if self.masked is None or not torch.is_grad_enabled():
            return parent(*given, **named)
        step, output = self._with_teacher(parent, given, named)
        pred, target = output if isinstance(output, tuple) else (output.pred, output.target)
        args, timesteps = given[0], given[7]
        assert self._noise_scheduler is not None
        weighting = self._weighting(args, timesteps, *self._noise_scheduler)
        loss = self.masked.loss(pred, target, step, weighting)
        if weighting is not None:
            # The trainer multiplies what it gets by the weighting and takes the mean of that.
            loss = loss / weighting.float().mean()
        root = _Root.apply(loss).reshape(1)
        return root, torch.zeros_like(root)


class _WholeModel(_LossInline):
    """Scripts of musubi-tuner 0.3 that train the model itself: `call_dit` is a method there, and the loss stands in the loop."""

    def start_masks(self, options: MaskOptions, args: Any) -> None:
        if options.use_mask_loss and options.prior_on:
            raise UserError(
                "--inverted_mask_prior needs a LoRA that can be switched off: drop it to train the whole model", 2
            )
        if options.use_mask_loss and options.mask_normalize_across == "accumulation":
            raise UserError(
                "--mask_normalize_across accumulation is for LoRAs: use rank or world to train the whole model", 2
            )
        if options.use_mask_loss and getattr(args, "dino_loss_weight", 0) > 0:
            raise UserError("--dino_loss_weight goes with masks when a LoRA is trained: drop it, or train a LoRA", 2)
        Masked.start_masks(self, options, args)

    def call_dit(self, *given: Any, **named: Any) -> Any:
        output = super().call_dit(*given, **named)
        if not isinstance(output, tuple):
            return output
        root, zero = (one.as_subclass(_Float32) for one in output)
        return types.SimpleNamespace(pred=root, target=zero, extra={"pixel_grid_hw": None})


class _Float32(torch.Tensor):
    """A tensor that the trainer's `.to(dtype)` leaves as it is: in bfloat16 the loss would be rounded."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def to(self, *given: Any, **named: Any) -> torch.Tensor:
        return self


class _Root(torch.autograd.Function):
    """Returns `root` of a loss >= 0 such that `root.square()` is that loss, with the gradient of the loss itself, also at 0."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        root = loss.sqrt()
        ctx.save_for_backward(root)
        return root

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (root,) = ctx.saved_tensors
        return torch.where(root == 0, torch.zeros_like(gradient), gradient / (2 * root))


def _prediction(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.pred


def _misspelled(args: Any) -> list[str]:
    """Returns a warning for each key of a --config_file that looks like one of our flags and is none: the trainer takes any key."""
    known = {field.name for field in dataclasses.fields(MaskOptions)} | aliases.ALIASES.keys() | aliases.IDLE.keys()
    names = sorted(name for name in vars(args) if name.startswith(PREFIXES) and name not in known)
    return [f"{name} in the configuration file is no flag, and does nothing" for name in names]


def banner(options: MaskOptions) -> list[str]:
    """What is on, one line each."""
    defaults = MaskOptions(use_mask_loss=True).metadata()
    changed = [f"{name[3:]}={value}" for name, value in options.metadata().items() if value != defaults[name]]
    return [f"masks are on: {', '.join(changed) or 'all options at their defaults'}"]


def _say(*lines: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        for line in lines:
            print(f"masked-loss: {line}", flush=True)
