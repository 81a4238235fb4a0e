"""Routing through the trainer's own transformers against the oracle: python -m tests.lab.routed_models, in a process of its own.

Prints one JSON line a model: whether all tokens through the hooks, gradient checkpointing, and blocks that are swapped out change
nothing at all, and whether NaN in dropped tokens stays there. Fails where half of the tokens are not what the oracle says.
"""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

from tests.lab import fixture, tiny

TOKENS, TEXT = 72, 7


def attend(qkv, **_):
    """The trainer's attention, without its rounding to bfloat16."""
    q, k, v = (one.transpose(1, 2) for one in qkv)
    qkv.clear()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()


def draw(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def wan(dtype, version, picture=False):
    from musubi_tuner.wan.modules import model as module

    module.flash_attention = attend
    model = module.WanModel(
        model_type="i2v" if picture else "t2v", model_version=version, dim=64, ffn_dim=128, num_heads=2, num_layers=4,
        text_len=TEXT, text_dim=32, in_dim=20 if picture else 16, attn_mode="torch",
    )  # fmt: skip
    latents, text = [*draw(2, 16, 3, 8, 12, dtype=dtype)], [*draw(2, TEXT, 32, dtype=dtype)]
    extra = {"y": [*draw(2, 4, 3, 8, 12, dtype=dtype)]} if picture else {}
    if picture and version == "2.1":
        extra["clip_fea"] = draw(2, 257, 1280, dtype=dtype)
    time = torch.tensor([300.0, 700.0], dtype=dtype)
    predict = lambda model: torch.stack(model(latents, t=time, context=text, seq_len=TOKENS, **extra))  # noqa: E731
    return model, predict, [(model.blocks, None)], (1, 2)


def hunyuan_video(dtype, split=False):
    from musubi_tuner.hunyuan_model.models import HYVideoDiffusionTransformer

    model = HYVideoDiffusionTransformer(
        text_states_dim=32, text_states_dim_2=16, in_channels=16, hidden_size=48, heads_num=2, mm_double_blocks_depth=3,
        mm_single_blocks_depth=5, rope_dim_list=[4, 8, 12], attn_mode="torch", split_attn=split,
    )  # fmt: skip
    mask = torch.ones(2, TEXT, dtype=torch.long)
    mask[1, 4:] = 0
    angles = draw(TOKENS, 24, dtype=dtype)
    given = {
        "text_states": draw(2, TEXT, 32, dtype=dtype),
        "text_mask": mask,
        "text_states_2": draw(2, 16, dtype=dtype),
        "freqs_cos": angles.cos(),
        "freqs_sin": angles.sin(),
        "guidance": torch.full((2,), 1000.0, dtype=dtype),
    }
    latents, time = draw(2, 16, 3, 8, 12, dtype=dtype), torch.tensor([300.0, 700.0], dtype=dtype)
    predict = lambda model: model(latents, time, return_dict=False, **given)  # noqa: E731
    return model, predict, [(model.double_blocks, 0), (model.single_blocks, None)], (1, 4)


def qwen_image(dtype, control=False, zero=False, split=False, layers=1):
    from musubi_tuner.qwen_image.qwen_image_model import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=4, joint_attention_dim=32, attn_mode="torch",
        split_attn=split, zero_cond_t=zero, use_layer3d_rope=layers > 1,
    )  # fmt: skip
    shapes = [*[(1, 12 // layers, 6)] * layers, *[(1, 4, 5)] * control]
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    given = {
        "hidden_states": draw(2, TOKENS + 20 * control, 64, dtype=dtype),
        "encoder_hidden_states": draw(2, TEXT, 32, dtype=dtype),
        "encoder_hidden_states_mask": None if split else mask,
        "timestep": torch.tensor([0.3, 0.7], dtype=dtype),
        "img_shapes": [shapes],
        "txt_seq_lens": [TEXT, 4],
    }
    return model, lambda model: model(**given)[:, :TOKENS], [(model.transformer_blocks, 1)], (1, 2)


CASES = {
    "wan 2.1": lambda dtype: wan(dtype, "2.1"),
    "wan 2.2": lambda dtype: wan(dtype, "2.2"),
    "wan 2.1 i2v": lambda dtype: wan(dtype, "2.1", True),
    "wan 2.2 i2v": lambda dtype: wan(dtype, "2.2", True),
    "hv": hunyuan_video,
    "hv split": lambda dtype: hunyuan_video(dtype, True),
    "qwen": qwen_image,
    "qwen split": lambda dtype: qwen_image(dtype, split=True),
    "qwen edit": lambda dtype: qwen_image(dtype, True),
    "qwen layered": lambda dtype: qwen_image(dtype, True, layers=2),
    "qwen edit 2511": lambda dtype: qwen_image(dtype, True, True),
}


def stays_where_it_is_planted(model, predict, entry, route, index) -> bool:
    """Whether NaN in the dropped tokens before a block reaches all of them in the prediction, none of the others, and no gradient
    of the block. Routed to the model's end, where tokens are on their own again."""
    on = torch.zeros(2, TOKENS, dtype=torch.bool).scatter_(1, index.expand(2, -1), True)

    def plant(block, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        x[:, :TOKENS][~on] = float("nan")
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    model.zero_grad(set_to_none=True)
    planted = entry.register_forward_pre_hook(plant, with_kwargs=True)
    with route:
        pred = predict(model)
    planted.remove()
    if pred.dim() == 5:
        batch, channels, frames, height, width = pred.shape
        cells = pred.view(batch, channels, frames, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
        pred = cells.flatten(4).flatten(1, 3)
    pred[on].square().sum().backward()
    gradients = [value.grad for value in entry.parameters() if value.grad is not None]
    kept_whole = bool(gradients) and all(value.isfinite().all() for value in (pred[on], *gradients))
    return kept_whole and bool(pred[~on].isnan().all())


@contextlib.contextmanager
def swapped_blocks(model):
    """Within, the trainer's own block swap moves two blocks of the model, HunyuanVideo's one and three; without a GPU, weights that
    are away are NaN."""
    from musubi_tuner.modules import custom_offloading_utils as offloading

    away: dict[torch.nn.Module, torch.Tensor] = {}

    def move(device, leaving, returning):
        linears = lambda block: (one for one in block.modules() if type(one) is torch.nn.Linear)  # noqa: E731
        for one in linears(leaving):
            if one not in away:
                away[one] = one.weight.data
                one.weight.data = torch.full_like(one.weight, float("nan"))
        for one in linears(returning):
            one.weight.data = away.pop(one, one.weight.data)

    def place(self, blocks):
        none = torch.nn.Module()
        for number, block in enumerate(blocks):
            stays = number < self.num_blocks - self.blocks_to_swap
            move(None, *((none, block) if stays else (block, none)))

    moves = mock.Mock(side_effect=move)
    with (
        mock.patch.object(torch.cuda, "set_device"),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(offloading, "swap_weight_devices_no_cuda", moves),
        mock.patch.object(offloading.ModelOffloader, "prepare_block_devices_before_forward", place),
        contextlib.redirect_stdout(None),
    ):
        model.enable_block_swap(2, offloading.BlockSwapConfig(torch.device("cpu"), supports_backward=True))
        model.switch_block_swap_for_inference()
        with torch.no_grad():
            yield moves


def compare(name: str, dtype: torch.dtype) -> dict[str, object]:
    from masked_loss_triton.integration.musubi.routing.models import layout_of
    from masked_loss_triton.routing import Kept
    from masked_loss_triton.routing.lanes import rerouted
    from tests.routing.support import assert_equal_up_to, oracle

    torch.manual_seed(0)
    model, predict, lanes, blocks = CASES[name](dtype)
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.2)
    model = model.to(dtype).train()
    layout = layout_of(model)
    rows = 1 if layout.shared else 2

    def run(within):
        model.zero_grad(set_to_none=True)
        with within:
            pred = predict(model)
        (pred.square() * weight[: len(pred)]).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return SimpleNamespace(pred=pred.detach(), gradients=gradients)

    def kept(count):
        orders = [torch.randperm(TOKENS, generator=torch.Generator().manual_seed(row)) for row in range(rows)]
        index = torch.stack([order[:count].sort().values for order in orders])
        return Kept(index, torch.ones(1), TOKENS, torch.ones(()))

    def same(one, other, all_of_it=True):
        # Routed, the times of WAN 2.2's tokens are cut once for several blocks: their gradients are added in another order. So are
        # those of HunyuanVideo's times where blocks are swapped, also unrouted. No LoRA trains these.
        times = () if all_of_it and not name.startswith("wan 2.2") else ("time_", "vector_in", "guidance_in")
        names = [n for n in one.gradients if not n.startswith(times)]
        gradients = (torch.equal(one.gradients[n], other.gradients[n]) for n in names)
        return torch.equal(one.pred, other.pred) and all(gradients)

    weight = draw(*predict(model).shape, dtype=dtype).abs()
    half, free = kept(TOKENS // 2), run(contextlib.nullcontext())
    ours = run(rerouted(model, layout, half, blocks))
    found = {"all": same(run(rerouted(model, layout, kept(TOKENS), blocks)), free), "differs": not same(ours, free)}
    if "split" not in name:  # there each sample is attended to by itself, which the oracle does not know
        expected = run(oracle(lanes, half.index, blocks))
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert_equal_up_to(tolerance, (ours.pred, ours.gradients), (expected.pred, expected.gradients))
    last = sum(map(len, (lane for lane, _ in lanes))) - 1
    to_the_end = rerouted(model, layout, half, (1, last))
    found["nan stays"] = stays_where_it_is_planted(model, predict, lanes[0][0][1], to_the_end, half.index)
    model.enable_gradient_checkpointing()
    found["checkpointed"] = same(run(rerouted(model, layout, half, blocks)), ours)
    model.disable_gradient_checkpointing()
    with swapped_blocks(model) as moves:
        predict(model)  # the teacher's pass
        model.switch_block_swap_for_training()
        with torch.enable_grad():
            found["swapped"] = same(run(rerouted(model, layout, half, blocks)), ours, all_of_it=False)
            found["moves"] = moves.call_count
    found["prediction"] = ours.pred.double().sum().item()
    return found


def main() -> None:
    tiny.QWEN["num_layers"] = 4
    fixture.trainer_path()
    for name in CASES:
        print(json.dumps({"model": name, "dtype": "float32", **compare(name, torch.float32)}), flush=True)
        double = mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
        with double, mock.patch.object(torch, "float32", torch.float64):
            print(json.dumps({"model": name, "dtype": "float64", **compare(name, torch.float64)}), flush=True)


if __name__ == "__main__":
    main()
