"""Trains the tiny SAM 2 of `tiny.py` on shapes, pictures with boxes and then clips with its memory; a few minutes of one core.

python -m tests.generate.train_sam2        # writes tests/generate/trained_sam2.safetensors

Sam2VideoModel runs under `torch.inference_mode`, so a clip goes through its own parts here, several clips at once.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tests.generate import tiny
from tests.generate.shapes import clip, scene

SIDE = 64


class Session:
    """What Sam2VideoModel reads of an inference session, for one object in each of several clips."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.output_dict_per_obj = {0: {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}}


def iou_of(masks, truth):
    """IoU of masks and what they should be, both (..., H, W) bool."""
    return (masks & truth).sum((-1, -2)) / (masks | truth).sum((-1, -2)).clamp(min=1)


def loss_of(logits, truth, judged, there):
    """Cross entropy, dice, the error of the model's own estimate of its IoU, and of whether the thing is there."""
    shown = functional.interpolate(logits, size=truth.shape[-2:], mode="bilinear")
    share = shown.sigmoid()
    dice = 1 - (2 * (share * truth).sum((-1, -2)) + 1) / ((share + truth).sum((-1, -2)) + 1)
    with torch.no_grad():
        reached = iou_of(shown > 0, truth > 0)
    estimate = (judged.reshape(reached.shape) - reached).square().mean()
    certain = functional.binary_cross_entropy_with_logits(there, torch.ones_like(there))
    return (
        functional.binary_cross_entropy_with_logits(shown, truth) + dice.mean() + 0.2 * estimate + 0.1 * certain,
        reached,
    )


def picture_step(model, processor, rng, count: int):
    """The loss on pictures, each once for every thing in it, with a box round that one that is a little off."""
    pictures, boxes, masks = [], [], []
    for _ in range(count):
        picture, things = scene(rng, SIDE)
        for one in things:
            pictures.append(picture)
            boxes.append([[float(edge + rng.uniform(-2, 2)) for edge in one.box]])
            masks.append([one.mask])
    inputs = processor(images=pictures, input_boxes=boxes, return_tensors="pt")
    out = model._single_frame_forward(
        pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False
    )
    truth = torch.tensor(np.array(masks)).float()
    return loss_of(out.pred_masks, truth, out.iou_scores, out.object_score_logits)


def clip_step(model, processor, rng, count: int, length: int):
    """The loss on later frames of clips, of one thing each, whose mask in the first frame is given."""
    frames, masks = [], []
    for _ in range(count):
        pictures, things = clip(rng, SIDE, length)
        which = int(rng.integers(len(things[0])))
        frames.append(pictures)
        masks.append([present[which].mask for present in things])
    truth = torch.tensor(np.array(masks)).float()
    session, losses, reached = Session(), [], []
    outputs = session.output_dict_per_obj[0]
    for number in range(length):
        pixels = processor(images=[pictures[number] for pictures in frames], return_tensors="pt")["pixel_values"]
        seen = model.get_image_features(pixels, return_dict=True)
        features, places = seen.fpn_hidden_states, seen.fpn_position_encoding
        maps = [
            one.permute(1, 2, 0).view(count, -1, *size)
            for one, size in zip(features, model.backbone_feature_sizes, strict=True)
        ]
        if number == 0:
            out = model._use_mask_as_output(maps[-1], maps[:-1], truth[:, :1])
        else:
            recalled = model._prepare_memory_conditioned_features(
                session, number, 0, False, features[-1], places[-1], length
            )
            out = model._single_frame_forward(image_embeddings=[*maps[:-1], recalled], multimask_output=False)
            loss, hit = loss_of(out.pred_masks, truth[:, number : number + 1], out.iou_scores, out.object_score_logits)
            losses.append(loss)
            reached.append(hit)
        memory, where = model._encode_new_memory(
            features[-1], out.high_res_masks.view(count, 1, SIDE, SIDE), out.object_score_logits, number == 0
        )
        outputs["cond_frame_outputs" if number == 0 else "non_cond_frame_outputs"][number] = {
            "maskmem_features": memory,
            "maskmem_pos_enc": where,
            "object_pointer": out.object_pointer[:, :1],  # of a given mask there is one for every pair of clips
        }
    return torch.stack(losses).mean(), torch.stack(reached, dim=1)


def train(folder: Path, steps: int, clip_steps: int, seed: int = 0):
    """Trains the model of a folder; returns it."""
    from transformers import Sam2Processor, Sam2VideoModel

    model, processor = Sam2VideoModel.from_pretrained(folder).eval(), Sam2Processor.from_pretrained(folder)
    # transformers' own beginning, 0.02 for everything, is for wide models: this one would take far longer from there.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.reset_parameters()
    # A thing that is thought absent has no mask to learn from: it begins with the belief that all are there.
    torch.nn.init.constant_(model.mask_decoder.pred_obj_score_head.proj_out.bias, 4.0)
    # The memory's answer has the clips in its second place, which the model takes away where there is one clip.
    model.memory_attention.register_forward_hook(lambda module, given, answer: answer.transpose(0, 1))
    rng, started = np.random.default_rng(seed), time.process_time()
    for name, count, rate in (("pictures", steps, 1.5e-3), ("clips", clip_steps, 1e-3)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(count, 1), pct_start=0.1)
        recent: list[float] = []
        for step in range(1, count + 1):
            loss, reached = picture_step(model, processor, rng, 6 if name == "pictures" else 2)
            recent.append(float(reached.mean()))
            if name == "clips":
                later, reached = clip_step(model, processor, rng, 4, 4 if step < 0.7 * count else 7)
                loss, recent[-1] = 0.5 * loss + later, float(reached[:, -1].mean())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % max(1, count // 20) == 0:
                mean, recent = np.mean(recent), []
                print(f"{name} {step}: IoU {mean:.3f}, {time.process_time() - started:.0f} CPU s", flush=True)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--clip_steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=tiny.TRAINED_SAM2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        tiny.save_weights(train(tiny.sam2(Path(place), single=True), args.steps, args.clip_steps), args.output)
