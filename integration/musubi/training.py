"""Masked training of one run: which batches are masked, the teacher, the loss, its denominators, and what is logged."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from masked_loss_triton import mask_weights, masked_loss
from masked_loss_triton.cache.families import FAMILIES, Family
from masked_loss_triton.checks import refuse_bytes_as_floats
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import schedule
from masked_loss_triton.integration.musubi.caches import CacheReport
from masked_loss_triton.integration.musubi.given import at_frames, generated_frames
from masked_loss_triton.integration.musubi.label_masks import Shares, shares_of, weighted
from masked_loss_triton.integration.musubi.layouts import grid_of, masked_loss_layout, on_grid, times_watermark
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.integration.musubi.proof import Proof
from masked_loss_triton.integration.musubi.routing import Routing, models
from masked_loss_triton.integration.musubi.routing.cross_attention import CrossAttentionGate
from masked_loss_triton.integration.musubi.teacher import Teacher, adapters_of
from masked_loss_triton.integration.musubi.window import Window
from masked_loss_triton.routing import RoutedWeights

STATE_FILE = "masked_loss.safetensors"
MASK_PREFIX = "mask_weights"


@dataclasses.dataclass
class Step:
    """What one micro-batch was given.

    Attributes:
        mask: (B, 1, F, H, W) as cached, or None where this batch is not masked.
        timesteps: (B,), 0 clean to 1000 noise.
        prior_gate: (B,) bool, or None when every sample may have a prior.
        prior_weight: a number, or (B,) float32.
        positions: (F, H, W) of the loss; F counts layers.
        labels: the share of each label, like the mask; none where it has none.
        needs_teacher: whether any sample has a prior region, and this step is one of those with a prior.
        keeps_region: the prior does not apply to this step, and its region is no part of the target nevertheless.
        prior: the teacher's prediction, of the shape of pred.
        layout: of pred, see `masked_loss`.
        frames: those of pred that count, which mask, positions and labels have alone; None where all do.
        routed: which tokens the student computes, and the weights that are left; None where it computes all.
    """

    mask: torch.Tensor | None
    timesteps: torch.Tensor
    positions: tuple[int, int, int]
    labels: Shares = dataclasses.field(default_factory=dict)
    prior_gate: torch.Tensor | None = None
    prior_weight: torch.Tensor | float = 0.0
    needs_teacher: bool = False
    keeps_region: bool = False
    prior: torch.Tensor | None = None
    layout: str = "channels_first"
    frames: list[int] | None = None
    routed: RoutedWeights | None = None

    @property
    def prior_factor(self) -> float:
        """What the prior's term of the batch is multiplied by: schedules, gates and probability in it. Waits for the device."""
        if self.prior is None:
            return 0.0
        factor = torch.as_tensor(self.prior_weight, dtype=torch.float32, device=self.timesteps.device)
        return float((factor if self.prior_gate is None else factor * self.prior_gate).mean())


def mask_of(
    batch: dict[str, Any], latents: torch.Tensor, first_layer_dropped: bool, axes: str = "CFHW"
) -> torch.Tensor:
    """The cached weights of a batch, (B, 1, F, H, W) on its device.

    Args:
        batch: the trainer's; weights are under a name that starts with "mask_weights".
        latents: (B, ...); F counts layers for layered pictures.
        axes: of the latents after the batch, see `grid_of`.
        first_layer_dropped: the loss is over all layers but the first.

    Raises:
        UserError: when there is none, or one of another shape: some items of the batch have none, or masks of other latents.
    """
    names = [name for name in batch if name.startswith(MASK_PREFIX)]
    again = "run masked-loss cache on this dataset"
    if len(names) != 1:
        what = f"several masks ({', '.join(sorted(names))})" if names else "no mask weights"
        raise UserError(f"a batch of the dataset has {what}: {again}")
    mask = batch[names[0]]
    expected = (latents.shape[0], 1, *grid_of(latents, axes))
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != expected:
        got = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UserError(
            f"{names[0]} of a batch is {got}, its latents need {expected}: some of its items have no mask, or one of other "
            f"latents; {again}"
        )
    try:
        refuse_bytes_as_floats(names[0], mask)
    except ValueError as error:
        raise UserError(f"{error}; {again}") from error
    return mask[:, :, 1:] if first_layer_dropped else mask


class MaskedTraining:
    """State and arithmetic of one run. The trainer's adapter calls `begin`, then `loss`, once per micro-batch."""

    def __init__(
        self,
        options: MaskOptions,
        family: Family = FAMILIES["wan"],
        report: CacheReport | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self.options, self.family = options, family
        self.config = options.config()
        self.proof = Proof(self.config, report, say)
        self.factors = report.label_factors(options) if report is not None else {}
        self.step = 0  # micro-batches
        self.optimizer_step = 0
        self._resumed_at = 0
        self.masked = 0
        self.taught = 0
        self.teacher: Teacher | None = None
        self.routing: Routing | None = None
        self._last: Step | None = None
        self._gate: CrossAttentionGate | None = None
        self._seed: int | None = None
        self._saved_average: dict[str, torch.Tensor] = {}
        self._stepped = False
        self._window: Window | None = None

    def begin(
        self,
        args: Any,
        accelerator: Any,
        transformer: torch.nn.Module,
        batch: dict[str, Any],
        timesteps: torch.Tensor,
        image_to_video: bool = False,
    ) -> Step:
        """Before the forward pass of a micro-batch: what applies to it.

        Waits for the device once when there is a prior, to learn whether any sample has a region for it.
        """
        if self._window is None:
            self._start(args, accelerator, transformer)
        self._after_optimizer_step()
        layered = bool(getattr(args, "is_layered", False))
        dropped = layered and bool(getattr(args, "remove_first_image_from_target", False))
        mask = mask_of(batch, batch["latents"], dropped, self.family.latent_axes)
        shares = shares_of(batch, mask, dropped)
        whole = mask = weighted(mask, shares, self.factors)
        kept = None
        if self.options.mask_given_frames == "ignore":
            kept = generated_frames(batch, self.family, image_to_video)
            mask, shares = at_frames(mask, kept), {label: at_frames(share, kept) for label, share in shares.items()}
        assert self._seed is not None
        frames, height, width = mask.shape[2:]
        layout = "layered" if layered else masked_loss_layout(self.family.loss_axes)
        step = Step(mask, timesteps, (frames, height, width), labels=shares, layout=layout, frames=kept)
        masked = schedule.this_time("masked_loss", self.options.mask_probability, self._seed, self.step)
        step.mask = times_watermark(mask if masked else None, batch, step.positions, self.options.invert_mask)
        if masked:
            self.masked += 1
            if self.options.prior_on:
                self._plan_prior(step, args, timesteps)
            self._plan_routing(step, args, accelerator)
        if self._gate is not None:
            heard = step.mask if kept is None or step.mask is None else whole
            self._gate.plan(heard, self.config, (whole.shape[2], height, width), step.routed)
        self.proof.show(batch["latents"], step, self.optimizer_step)
        self.step += 1
        self.taught += step.needs_teacher
        self._stepped = accelerator.sync_gradients
        return step

    def inside(self, pred: torch.Tensor, target: torch.Tensor, step: Step) -> torch.Tensor:
        """Tokens (B, N, C) of the prediction where the mask has its full weight, of the target where it has none."""
        if step.mask is None:
            return pred
        weights, _ = mask_weights(step.mask, self.config, shape=(step.mask.shape[0], *step.positions), has_prior=False)
        return torch.lerp(target.to(pred.dtype), pred, weights.flatten(1).unsqueeze(-1).to(pred.dtype))

    def _start(self, args: Any, accelerator: Any, transformer: torch.nn.Module) -> None:
        if self._seed is None:
            # Without --seed every process draws its own.
            seed = [args.seed]
            if accelerator.num_processes > 1:
                torch.distributed.broadcast_object_list(seed)
            self._seed = int(seed[0] or 0)
        model = accelerator.unwrap_model(transformer)
        if self.options.prior_on:
            decay = self.options.prior_ema_decay if self.options.prior_teacher == "ema" else None
            self.teacher = Teacher(model, decay)
            if self._saved_average:
                self.teacher.load(self._saved_average)
        if self.options.mask_routing < 1:
            self.routing = Routing(self.options, model, self._seed)
        if self.options.mask_cross_attention:
            self._gate = CrossAttentionGate(models.layout_of(model))
        self.proof.start(args, accelerator)
        trained = [value for adapter in adapters_of(model).values() for value in adapter.parameters()]
        self._window = Window(self.options.mask_normalize_across, accelerator, self.config, trained)

    def _after_optimizer_step(self) -> None:
        if self._stepped:
            self.optimizer_step += 1
            if self.teacher is not None:
                self.teacher.update()
        self._stepped = False

    def _plan_prior(self, step: Step, args: Any, timesteps: torch.Tensor) -> None:
        options = self.options
        scale = schedule.warmup(self.optimizer_step, args.max_train_steps, options.prior_warmup_ratio)
        weight: torch.Tensor | float = options.inverted_mask_prior_weight * scale / options.prior_probability
        if weight == 0:
            return
        shares = schedule.decay(timesteps, options.prior_decay_schedule, options.prior_decay_timestep_start)
        weight = weight if shares is None else weight * shares
        if options.prior_timestep_threshold > 0:
            step.prior_gate = timesteps > options.prior_timestep_threshold
        assert step.mask is not None
        assert self._seed is not None
        if not schedule.this_time("prior", options.prior_probability, self._seed, self.step):
            # The target leaves the region alone at every step, or at some its gradient would be another one.
            step.keeps_region = options.prior_mask_threshold is not None
            return
        shape = (step.mask.shape[0], *step.positions)
        _, region = mask_weights(step.mask, self.config, shape=shape, prior_gate=step.prior_gate)
        wanted = (region.flatten(1).amax(1) > 0) & (torch.as_tensor(weight, device=region.device) > 0)
        step.prior_weight, step.needs_teacher = weight, bool(wanted.any())

    def _plan_routing(self, step: Step, args: Any, accelerator: Any) -> None:
        if self.routing is not None:
            assert step.mask is not None
            step.routed = self.routing.weights(
                step.mask,
                self.config,
                (step.mask.shape[0], *step.positions),
                step.prior_gate,
                has_prior=step.needs_teacher or step.keeps_region,
                step=self.step,
                rank=accelerator.process_index,
                # A resumed run trains that many steps more.
                progress=self.optimizer_step / (self._resumed_at + args.max_train_steps),
            )

    def loss(
        self, pred: torch.Tensor, target: torch.Tensor, step: Step, weighting: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss of a micro-batch, 0-d float32.

        Args:
            pred, target: as the trainer's `call_dit` returns them.
            step: from `begin`, with `prior` filled in where it needs the teacher.
            weighting: the trainer's factor per sample, or None.
        """
        assert self._window is not None
        pred, target = (self._counted(one, step) for one in (pred, target))
        call: dict[str, Any] = {"layout": step.layout, "weighting": weighting, "return_stats": True}
        if step.prior is not None:
            call.update(prior=self._counted(step.prior, step), prior_weight=step.prior_weight)
        elif step.keeps_region:
            call.update(prior=pred.detach(), prior_weight=0.0)
        left = None if step.routed is None else step.routed.target
        call.update(self._window.denominators(pred, step.mask, step.positions, left))
        if step.routed is not None:
            loss, stats = step.routed.loss(pred, target, **call)
        else:
            gate = step.prior_gate if "prior" in call else None
            loss, stats = masked_loss(pred, target, step.mask, self.config, prior_gate=gate, **call)
        self.proof.note(step, stats, pred, target)
        self._last = step
        return loss

    def _counted(self, tensor: torch.Tensor, step: Step) -> torch.Tensor:
        """A prediction or target as `masked_loss` takes it, without the frames that do not count."""
        return at_frames(on_grid(tensor, self.family.loss_axes, step.positions), step.frames, step.layout)

    def logs(self) -> dict[str, float]:
        """The numbers of the last micro-batch and the rates so far, for the trainer's trackers. Waits for the device."""
        if self._last is None:
            return {}
        found = {**self.proof.logs(), "mask/masked_rate": self.masked / self.step}
        if self.options.prior_on:
            found["mask/prior_factor"] = self._last.prior_factor
            found["mask/teacher_rate"] = self.taught / self.step
        return {**found, **self.routing.logs(self._last.routed)} if self.routing is not None else found

    def save(self, folder: str) -> None:
        """Writes counters and the teacher's average beside the trainer's state."""
        from safetensors.torch import save_file

        self._after_optimizer_step()
        counters = {
            "step": self.step,
            "optimizer_step": self.optimizer_step,
            "masked": self.masked,
            "taught": self.taught,
            "watch": self.proof.state(),
        }
        average = self.teacher.average if self.teacher is not None else {}
        tensors = {name: value.contiguous() for name, value in average.items()}
        save_file(
            tensors, Path(folder) / STATE_FILE, metadata={"counters": json.dumps({**counters, "seed": self._seed})}
        )

    def load(self, folder: str) -> bool:
        """Reads what `save` wrote; False when the state was saved without masks, and all counters start at 0.

        Raises:
            UserError: naming the file, when it is damaged or has no average although the teacher needs one.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder) / STATE_FILE
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                counters = json.loads(file.metadata()["counters"])
                self._saved_average = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.step, self.optimizer_step = int(counters["step"]), int(counters["optimizer_step"])
            self._resumed_at = self.optimizer_step
            self.masked, self.taught, self._seed = int(counters["masked"]), int(counters["taught"]), counters["seed"]
            self.proof.load(counters.get("watch"))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error}): resume from another state, or delete it to start anew"
            ) from error
        if self.options.prior_on and self.options.prior_teacher == "ema" and not self._saved_average:
            raise UserError(
                f"{path} holds no teacher: it was saved without --prior_teacher ema; use base, or start anew"
            )
        return True
