"""Tiny transformers of diffusers, and the oracle of routing: the full sequence, with the dropped tokens masked out of the keys of
self-attention and passed by. It knows of a model only where its blocks are and where the tokens stand among the keys."""

from __future__ import annotations

import collections
import contextlib
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
from model_families import FAMILIES

GRID = (3, 8, 12)  # F, H, W of the latents: 72 tokens
TOKENS = 72
TEXT = 5


class Case:
    """A tiny model of one family with random weights everywhere, and a way to run it."""

    def __init__(self, name, layers=4, device="cpu", dtype=torch.float32, **changes):
        torch.manual_seed(0)
        family = FAMILIES[name]
        config = {**family.tiny, "num_layers": layers, **changes}
        if name == "hv":
            config["num_single_layers"] = layers
        with torch.device(device):
            model = getattr(diffusers, family.transformer)(**config)
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.2)
        self.name, self.family, self.dtype, self.device = name, family, dtype, device
        self.model = model.to(dtype).train()
        mask = torch.ones(2, TEXT, dtype=torch.bool, device=device)
        mask[1, 3:] = name == "wan"  # whose text has no mask
        draw = {"generator": torch.Generator(device).manual_seed(1)} if device != "meta" else {}
        embeds, pooled = (2, TEXT, 3584 if name == "qwen" else 4096), (2, 768)
        self.text = {
            "embeds": torch.randn(embeds, dtype=dtype, device=device, **draw),
            "mask": mask,
            "pooled": torch.randn(pooled, dtype=dtype, device=device, **draw),
        }
        self.sigma = torch.tensor([0.3, 0.8], dtype=dtype, device=device)
        self.resize(*GRID if name != "qwen" else (1, GRID[1] * 3, GRID[2]))

    def resize(self, frames, height, width):
        self.shape = (2, frames, height, width)
        generator = torch.Generator().manual_seed(2)
        self.noisy = torch.randn(2, 16, *self.shape[1:], generator=generator).to(self.device, self.dtype)

    @property
    def lanes(self):
        """(blocks, place of the image tokens in what they return) of each kind of block."""
        if self.name == "hv":
            return [(self.model.transformer_blocks, 0), (self.model.single_transformer_blocks, 0)]
        return [(self.model.transformer_blocks, 1)] if self.name == "qwen" else [(self.model.blocks, None)]

    @property
    def text_first(self):
        return self.name == "qwen"

    def predict(self):
        return self.family.predict(self.model, self.noisy, self.sigma, self.text)

    def run(self, weight, within=contextlib.nullcontext):
        """The prediction and all gradients of a weighted sum of its squares."""
        self.model.zero_grad(set_to_none=True)
        with within():
            pred = self.predict()
        (pred.square() * weight).sum().backward()
        return pred.detach(), {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}


@contextlib.contextmanager
def in_float64():
    """Where a model asks for float32 it gets float64, as it would be exact."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


@contextlib.contextmanager
def oracle(lanes, index, blocks, tokens=TOKENS, text_first=False):
    """Within, blocks first to last of a model leave the tokens that are not in `index`, (B or 1, K), as they are, and look at none
    of them."""
    attend = F.scaled_dot_product_attention
    on = torch.zeros(2, tokens, dtype=torch.bool).scatter_(1, index.expand(2, -1), True)
    inside = []

    def masked(query, key, value, attn_mask=None, **named):
        if inside and key.shape[-2] == query.shape[-2] >= tokens:
            rest = torch.ones(2, key.shape[-2] - tokens, dtype=torch.bool)
            keys = torch.cat([rest, on] if text_first else [on, rest], 1)[:, None, None]
            attn_mask = keys if attn_mask is None else attn_mask & keys
        return attend(query, key, value, attn_mask=attn_mask, **named)

    def by(place, full, output):
        inside.pop()
        if place is None:
            return kept_of(output, full)
        return (*output[:place], kept_of(output[place], full), *output[place + 1 :])

    def kept_of(output, full):
        put = torch.where(on[..., None], output[:, :tokens], full[:, :tokens])
        return torch.cat([put, output[:, tokens:]], 1)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", masked))
        blocks_of = [(block, place) for lane, place in lanes for block in lane]
        for number in range(blocks[0], blocks[1] + 1):
            block, place = blocks_of[number]
            seen = {}

            def before(block, args, kwargs, seen=seen):
                inside.append(None)
                seen["x"] = args[0] if args else kwargs["hidden_states"]

            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            after = lambda block, args, output, seen=seen, place=place: by(place, seen["x"], output)  # noqa: E731
            stack.callback(block.register_forward_hook(after).remove)
        yield


def assert_equal_up_to(tolerance, ours, expected):
    """Predictions and gradients; a gradient against the largest one of its block, since some (a bias before a softmax) are sums of
    what cancels."""
    assert (ours[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    assert ours[1].keys() == expected[1].keys()
    scales = collections.defaultdict(float)
    for name, value in expected[1].items():
        block = ".".join(name.split(".")[:2])
        scales[block] = max(scales[block], float(value.abs().max()))
    for name, value in expected[1].items():
        assert (ours[1][name] - value).abs().max() <= tolerance * scales[".".join(name.split(".")[:2])], name


def subjects(shape):
    """(B, 1, F, H, W): a box in each sample, not the same, about a sixth of the picture."""
    mask = torch.zeros(shape[0], 1, *shape[1:])
    mask[0, :, :, 1:5, 3:9] = 0.5
    mask[1:, :, :, 4:, 5:10] = 1
    return mask
