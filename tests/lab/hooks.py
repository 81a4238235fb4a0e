"""Changes to a run of `tests.lab.train`, chosen with --hooks.

`fixed_noise` gives every item noise and a timestep of its own, so that runs with other batches can be compared. `observe` writes
what reaches the loss to the JSON lines file in LAB_OBSERVE.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os


def frozen_model_on_cpu() -> None:
    """With several CPU processes accelerate wraps a model that trains nothing, which torch refuses; on GPUs it does not."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare_model

    def prepare_model(self, model, *rest, **named):
        trains = any(parameter.requires_grad for parameter in model.parameters())
        return prepare(self, model, *rest, **named) if trains else model

    Accelerator.prepare_model = prepare_model


def blissful_on_cpu() -> None:
    """blissful-tuner describes the GPU when it starts, and fails where there is none; what it does to --seed stays."""
    import musubi_tuner.hv_train_network as base

    def without_a_description(args):
        args.seed = int(args.seed)

    base.blissful_prefunc = without_a_description


def name_items() -> None:
    """Batches carry the names of their items."""
    from musubi_tuner.dataset.bucket import BucketBatchManager

    load = BucketBatchManager.__getitem__

    def load_and_name(self, index):
        batch = load(self, index)
        bucket, number = self.bucket_batch_indices[index]
        items = self.buckets[bucket][number * self.batch_size : (number + 1) * self.batch_size]
        batch["item_keys"] = [os.path.basename(item.latent_cache_path) for item in items]
        batch["item_paths"] = [item.item_key for item in items]
        batch["bucket"] = list(bucket[:2])
        return batch

    BucketBatchManager.__getitem__ = load_and_name


def fixed_noise() -> None:
    """Noise and timestep of an item depend on its name alone."""
    import torch
    from musubi_tuner.training.trainer_base import NetworkTrainer

    name_items()
    process = NetworkTrainer.process_batch

    def process_batch(self, args, accelerator, transformer, network, batch, latents, noise, *rest):
        seeds = [int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) for key in batch["item_keys"]]
        planes = [torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        batch["timesteps"] = [0.2 + 0.6 * (seed % 1000) / 1000 for seed in seeds]
        return process(
            self, args, accelerator, transformer, network, batch, latents, torch.stack(planes).to(noise), *rest
        )

    NetworkTrainer.process_batch = process_batch


def observe() -> None:
    """Compares the weights at the loss with the trainer's own resize of the mask file, and looks at the gradient outside.

    The gradient is that without the prior, whose term is noted.
    """
    import numpy as np
    import torch
    from musubi_tuner.dataset.media_utils import resize_image_to_bucket
    from PIL import Image

    from masked_loss_triton.integration.musubi.given import at_frames
    from masked_loss_triton.integration.musubi.layouts import on_grid
    from masked_loss_triton.integration.musubi.training import MaskedTraining

    name_items()
    begin, loss = MaskedTraining.begin, MaskedTraining.loss
    masks = os.environ["LAB_MASKS"]

    def expected(path: str, bucket: list[int], shape: tuple[int, ...]) -> torch.Tensor | None:
        stem = os.path.splitext(os.path.basename(path))[0]
        if not os.path.exists(os.path.join(masks, f"{stem}.png")):
            return None
        mask = resize_image_to_bucket(Image.open(os.path.join(masks, f"{stem}.png")).convert("L"), tuple(bucket))
        pixels = torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None] / 255
        return torch.nn.functional.interpolate(pixels, size=shape[-2:], mode="area")[0, :, None].expand(shape)

    def expected_loss(pred, target, prior, mask) -> float:
        """The loss of a run with no options but a prior, from float64."""

        def mean(weight, other) -> float:
            weight = weight.double().expand_as(pred)
            return float((weight * (pred.double() - other.double()) ** 2).sum() / (weight.sum() + 1e-8))

        return mean(mask, target) + (0 if prior is None else 0.5 * mean(1 - mask.double(), prior))

    def begin_and_keep(self, args, accelerator, transformer, batch, *rest):
        step = begin(self, args, accelerator, transformer, batch, *rest)
        files = [expected(path, batch["bucket"], step.mask.shape[1:]) for path in batch["item_paths"]]
        self.seen = {}
        if None not in files:
            self.seen["weight_error"] = float((step.mask.float().cpu() - torch.stack(files)).abs().max())
        return step

    def loss_and_look(self, pred, target, step, weighting):
        alone = loss(self, pred, target, dataclasses.replace(step, prior=None), weighting)
        value = loss(self, pred, target, step, weighting)
        terms = self.proof.last_stats.to_dict()
        self.seen["prior"] = terms["prior_term"] / terms["target_term"]
        axes = self.family.loss_axes
        whole = on_grid(torch.autograd.grad(alone, pred, retain_graph=True)[0], axes, step.positions)
        gradient = at_frames(whole, step.frames, step.layout)
        if step.frames is not None:
            given = [frame for frame in range(whole.shape[2]) if frame not in step.frames]
            self.seen["given"] = float(whole[:, :, given].abs().max())
        mask = step.mask.transpose(1, 2) if axes == "FCHW" else step.mask.squeeze(2) if axes == "CHW" else step.mask
        outside = (mask == 0).expand_as(gradient)
        if step.routed is not None:
            dropped = ~step.routed.kept.positions.unsqueeze(2 if step.layout == "layered" else 1).expand_as(gradient)
            self.seen["dropped"] = float(gradient[dropped].abs().max())
        self.seen.update(
            outside=float(gradient[outside].abs().max()) if outside.any() else None,
            inside=float(gradient[~outside].abs().max()),
            shapes=[list(pred.shape), list(step.mask.shape)],
            dtypes=[str(pred.dtype), str(target.dtype), str(step.mask.dtype)],
            expected_loss=expected_loss(
                *(
                    one if one is None else at_frames(on_grid(one, axes, step.positions), step.frames, step.layout)
                    for one in (pred, target, step.prior)
                ),
                mask,
            ),
        )
        with open(os.environ["LAB_OBSERVE"], "a") as file:
            file.write(json.dumps(self.seen) + "\n")
        return value

    MaskedTraining.begin, MaskedTraining.loss = begin_and_keep, loss_and_look


def watch_routing() -> None:
    """Writes, for each micro-batch, which tokens were kept, and of each pass through the first block whether it was differentiated
    and how many tokens it computed; then the hooks that are left on the model."""
    from masked_loss_triton.integration.musubi.routing import Routing
    from masked_loss_triton.integration.musubi.training import MaskedTraining

    start, loss, passes, models = Routing.__init__, MaskedTraining.loss, [], []

    def start_and_count(self, options, model, seed):
        start(self, options, model, seed)
        models.append(model)
        block = self.layout.lanes[0].blocks[0]
        forward = block.forward

        def count(x, *rest, **named):
            passes.append([x.requires_grad, x.shape[1]])
            return forward(x, *rest, **named)

        block.forward = count

    def loss_and_write(self, pred, target, step, *rest):
        kept = step.routed.kept.index.tolist()
        hooks = sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in models[0].modules())
        with open(os.environ["LAB_OBSERVE"], "a") as file:
            file.write(json.dumps({"kept": kept, "passes": passes[:], "hooks": hooks}) + "\n")
        passes.clear()
        return loss(self, pred, target, step, *rest)

    Routing.__init__, MaskedTraining.loss = start_and_count, loss_and_write


def every_token_through_the_hooks() -> None:
    """Routing keeps all tokens, and takes them through its hooks nevertheless."""
    from masked_loss_triton.routing import Router

    Router.count = lambda self, tokens: tokens


def perceptual_term() -> None:
    """HiDream-O1's perceptual term without the weights of DINO: the distance of the pictures, averaged over 4 x 4 pixels."""
    import torch
    from musubi_tuner.hidream_o1_train_network import HiDreamO1NetworkTrainer

    def distance(pred, target):
        return (torch.nn.functional.avg_pool2d(pred - target, 4) ** 2).mean()

    HiDreamO1NetworkTrainer._get_dino_loss_fn = lambda self, args, device: distance


def words_without_t5() -> None:
    """The prompts of samples, without the weights of T5: random tensors of its shape."""
    import musubi_tuner.wan_train_network as wan
    import torch

    class Encoder:
        def __init__(self, **_):
            pass

        def __call__(self, texts, device):
            return [torch.randn(7, 4096, generator=torch.Generator().manual_seed(len(text))) for text in texts]

    wan.T5EncoderModel = Encoder
