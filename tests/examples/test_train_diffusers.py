"""The example script: the real diffusers classes with tiny configurations, from caches to a LoRA that diffusers loads."""

import dataclasses

import diffusers
import pytest
import torch
from accelerate.utils import set_seed
from latent_caches import Batches, CachedLatents, collate, find_items
from model_families import FAMILIES, pack, tiny_transformer, unpack
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from train_diffusers import main, micro_batch_loss, step_normalizer, teacher_prediction

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from tests.support.caches import caches

NAMES = sorted(FAMILIES)
CONFIG = MaskedLossConfig(prior_weight=0.5)


def run(lab, output, *flags):
    """Trains in this process and returns the tensors of the LoRA."""
    command = ["--arch", lab.arch, "--tiny", "--cpu", "--cache", lab.cache, "--output", output, "--workers", 0]
    assert main([str(word) for word in [*command, *flags]]) == 0
    return load_file(output / "pytorch_lora_weights.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def assert_close(one, other, tolerance):
    """The LoRA as a whole: Adam divides each gradient by its size, and makes rounding visible where there is little else."""
    assert one.keys() == other.keys()
    one, other = (torch.cat([tensors[key].flatten() for key in sorted(tensors)]) for tensors in (one, other))
    assert (one - other).norm() <= tolerance * one.norm()


def transformer_with_lora(name, moved=True):
    """A tiny transformer whose LoRA does something, unlike a new one."""
    set_seed(0)
    transformer = tiny_transformer(FAMILIES[name]).requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, target_modules=FAMILIES[name].lora_targets, init_lora_weights=not moved))
    return transformer


def batch_of(lab, count=2):
    family = FAMILIES[lab.arch]
    items = find_items([lab.cache], family, use_masks=True)
    dataset = CachedLatents(items, family, seed=1, shift=3.0)
    return collate([dataset[index, index] for index in range(count)])


def loss_of(name, transformer, batch, config=CONFIG, **options):
    family = options.pop("family", FAMILIES[name])
    return micro_batch_loss(transformer, transformer, family, batch, config, dtype=torch.float32, **options)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_loads_the_lora(name, tmp_path, capsys):
    """Caches, training with prior and accumulation, saving, and diffusers' own way to load."""
    lab = caches(tmp_path / "data", name)
    flags = "--steps 2 --batch_size 2 --gradient_accumulation_steps 2 --prior_weight 0.5 --learning_rate 0.01"
    saved = run(lab, tmp_path / "lora", *flags.split())
    assert "step 2/2" in capsys.readouterr().out
    assert all(value.abs().sum() > 0 for key, value in saved.items() if ".to_q.lora_B" in key)

    pipeline = getattr(diffusers, FAMILIES[name].pipeline)
    state, metadata = pipeline.lora_state_dict(tmp_path / "lora", return_lora_metadata=True)
    set_seed(0)
    transformer = tiny_transformer(FAMILIES[name])
    batch = batch_of(lab)
    with torch.no_grad():
        before = FAMILIES[name].predict(transformer, batch["noise"], batch["sigma"], batch["text"])
        pipeline.load_lora_into_transformer(state, transformer, adapter_name="default", metadata=metadata)
        after = FAMILIES[name].predict(transformer, batch["noise"], batch["sigma"], batch["text"])
    loaded = get_peft_model_state_dict(transformer, adapter_name="default")
    assert_same({f"transformer.{key}": value for key, value in loaded.items()}, saved)
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_white_mask_is_no_mask_bit_for_bit(name, tmp_path):
    white, none = (caches(tmp_path / masks, name, masks) for masks in ("white", "none"))
    flags = ["--steps", "2", "--batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "0.01"]
    one = run(white, tmp_path / "one", *flags)
    other = run(none, tmp_path / "other", *flags, "--ignore_masks")
    assert_same(one, other)
    disc = run(caches(tmp_path / "disc", name), tmp_path / "third", *flags)
    assert any(not torch.equal(one[key], disc[key]) for key in one)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_outside_the_mask(name, tmp_path):
    batch = batch_of(caches(tmp_path, name))
    predictions = []

    def keeping(*arguments):
        predictions.append(FAMILIES[name].predict(*arguments))
        predictions[-1].retain_grad()
        return predictions[-1]

    family = dataclasses.replace(FAMILIES[name], predict=keeping)
    loss_of(name, transformer_with_lora(name), batch, family=family).backward()
    gradient, mask = predictions[0].grad, batch["mask"].expand_as(predictions[0])
    assert 0 < (mask == 0).float().mean() < 1
    assert gradient[mask == 0].abs().max() == 0
    assert (gradient[mask > 0] != 0).float().mean() > 0.99


def test_packed_tokens_have_the_loss_of_the_latents(tmp_path):
    """Qwen-Image: the mask packed along with prediction and target weights each of a token's four positions by itself."""
    batch = batch_of(caches(tmp_path, "qwen"))
    pred, target = torch.randn_like(batch["noise"]), batch["noise"] - batch["latents"]
    mask = batch["mask"].float().expand_as(pred)
    tokens = [pack(value).unsqueeze(1) for value in (pred, target, mask)]
    loss = masked_loss(pred, FlowTarget(batch["noise"], batch["latents"]), batch["mask"], CONFIG)
    torch.testing.assert_close(masked_loss(*tokens, CONFIG), loss, rtol=1e-6, atol=0)
    # One weight per token, the mistake, is another number.
    coarse = torch.nn.functional.avg_pool2d(batch["mask"][:, :, 0].float(), 2).flatten(1).unsqueeze(-1)
    wrong = masked_loss(*tokens[:2], coarse.expand_as(tokens[0][:, 0]).unsqueeze(1), CONFIG)
    assert abs(wrong - loss) > 1e-4 * loss


def test_packing_is_that_of_the_pipeline():
    latents = torch.randn(2, 16, 1, 6, 10)
    theirs = diffusers.QwenImagePipeline._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 6, 10), diffusers.QwenImagePipeline._unpack_latents(theirs, 48, 80, 8))
    assert torch.equal(unpack(pack(latents), 6, 10), latents)
    with pytest.raises(ValueError, match=r"one frame of even height and width, got \(2, 16, 1, 6, 9\)"):
        pack(latents[..., :9])


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_is_the_base_model(name, tmp_path):
    batch = batch_of(caches(tmp_path, name))
    transformer, family = transformer_with_lora(name), FAMILIES[name]
    set_seed(0)
    base = tiny_transformer(family)
    prior = teacher_prediction(transformer, family, batch["noise"], batch)
    with torch.no_grad():
        assert torch.equal(prior, family.predict(base, batch["noise"], batch["sigma"], batch["text"]))
        student = family.predict(transformer, batch["noise"], batch["sigma"], batch["text"])
    assert (student - prior).abs().max() > 1e-4
    assert all(value.requires_grad for key, value in transformer.named_parameters() if "lora" in key)


def test_the_lora_is_back_after_a_teacher_that_fails(tmp_path):
    batch, transformer = batch_of(caches(tmp_path, "wan")), transformer_with_lora("wan")
    with torch.no_grad():
        before = FAMILIES["wan"].predict(transformer, batch["noise"], batch["sigma"], batch["text"])
    broken = {**batch, "text": {}}
    with pytest.raises(KeyError):
        teacher_prediction(transformer, FAMILIES["wan"], batch["noise"], broken)
    with torch.no_grad():
        assert torch.equal(before, FAMILIES["wan"].predict(transformer, batch["noise"], batch["sigma"], batch["text"]))


@pytest.mark.parametrize("name", NAMES)
def test_a_prior_of_weight_0_is_no_prior(name, tmp_path):
    batch, transformer = batch_of(caches(tmp_path, name)), transformer_with_lora(name)
    parameters = [value for value in transformer.parameters() if value.requires_grad]

    def gradients(config, use_prior):
        loss = loss_of(name, transformer, batch, config, use_prior=use_prior)
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True)

    off_loss, off = gradients(CONFIG, False)
    zero_loss, zero = gradients(CONFIG.replace(prior_weight=0), True)
    on_loss, _ = gradients(CONFIG, True)
    torch.testing.assert_close(zero_loss, off_loss, rtol=1e-6, atol=0)
    for one, other in zip(off, zero, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    assert on_loss > 1.0001 * off_loss


@pytest.mark.parametrize(
    "flags", ["", "--normalize_per_sample", "--mask_normalization mean"], ids=["", "sample", "mean"]
)
@pytest.mark.parametrize("prior", ["0", "0.5"])
def test_micro_batches_are_the_batch(prior, flags, tmp_path):
    lab = caches(tmp_path / "data", "wan", stems="abc")
    common = ["--steps", 3, "--prior_weight", prior, "--learning_rate", 0.01, "--mask_probability", 0.7, *flags.split()]
    whole = run(lab, tmp_path / "whole", *common, "--batch_size", 3)
    parts = run(lab, tmp_path / "parts", *common, "--batch_size", 1, "--gradient_accumulation_steps", 3)
    assert_close(parts, whole, 1e-3)


@pytest.mark.parametrize("use_prior", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_micro_batches_is_that_of_the_batch(name, use_prior, tmp_path):
    """And an average over them is not, since a's mask is fourteen times as large as b's."""
    batch, transformer = batch_of(caches(tmp_path, name)), transformer_with_lora(name)
    halves = [batch_slice(batch, part) for part in (slice(0, 1), slice(1, 2))]
    parameters = [value for key, value in transformer.named_parameters() if "to_q.lora_B" in key]
    normalizer = step_normalizer(halves, CONFIG, use_prior)

    def of(batches, **options):
        loss = sum(loss_of(name, transformer, one, use_prior=use_prior, **options) for one in batches)
        return loss, torch.cat([value.flatten() for value in torch.autograd.grad(loss, parameters)])

    (whole, gradient), (exact, exact_gradient) = of([batch]), of(halves, normalizer=normalizer)
    torch.testing.assert_close(exact, whole, rtol=1e-5, atol=0)
    assert (exact_gradient - gradient).norm() < 1e-4 * gradient.norm()
    average, average_gradient = of(halves)
    assert abs(average / 2 - whole) > 1e-3 * whole
    assert (average_gradient / 2 - gradient).norm() > 0.05 * gradient.norm()


def batch_slice(value, part):
    return {key: batch_slice(one, part) for key, one in value.items()} if isinstance(value, dict) else value[part]


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name, tmp_path):
    batch, transformer = batch_of(caches(tmp_path, name)), transformer_with_lora(name, moved=False)
    optimizer = torch.optim.AdamW([value for value in transformer.parameters() if value.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        loss = loss_of(name, transformer, batch, use_prior=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_routing_computes_some_of_the_tokens(name, tmp_path):
    """All tokens, through the hooks and weights of a routed step, are the unrouted training; half of them are another one."""
    lab = caches(tmp_path / "data", name)
    flags = [
        "--steps",
        "2",
        "--batch_size",
        "1",
        "--gradient_accumulation_steps",
        "2",
        "--learning_rate",
        "0.01",
        "--mask_routing",
    ]
    plain, every, half = (run(lab, tmp_path / keep, *flags, keep) for keep in ("1", "0.99999", "0.5"))
    assert_same(plain, every)
    assert any(not torch.equal(plain[key], half[key]) for key in plain)
    late = run(lab, tmp_path / "late", *flags, "0.5", "--mask_routing_until", "0.4")
    assert_same(plain, late)


@pytest.mark.parametrize("flags", [["--mask_routing", "0"], ["--mask_routing", "0.5", "--ignore_masks"]])
def test_routing_that_cannot_be_is_refused(flags, tmp_path, capsys):
    command = ["--arch", "wan", "--tiny", "--cache", str(tmp_path), "--output", str(tmp_path), *flags]
    assert main(command) == 2
    assert "--mask_routing" in capsys.readouterr().err


def test_mask_probability_0_trains_on_everything(tmp_path):
    lab = caches(tmp_path / "data", "wan")
    flags = ["--steps", "1", "--batch_size", "2", "--learning_rate", "0.01"]
    gated = run(lab, tmp_path / "gated", *flags, "--mask_probability", 0)
    assert_same(gated, run(lab, tmp_path / "none", *flags, "--ignore_masks"))


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_in_bfloat16(name, tmp_path, capsys):
    """--model with a folder: the weights as diffusers saves them, and the inputs in bfloat16."""
    set_seed(0)
    tiny_transformer(FAMILIES[name]).save_pretrained(tmp_path / "model" / "transformer")
    lab = caches(tmp_path / "data", name)
    command = [
        "--arch",
        name,
        "--model",
        tmp_path / "model",
        "--cpu",
        "--cache",
        lab.cache,
        "--output",
        tmp_path / "lora",
    ]
    flags = [
        "--steps",
        "1",
        "--workers",
        "0",
        "--prior_weight",
        "0.5",
        "--gradient_checkpointing",
        "--learning_rate",
        "0.01",
    ]
    assert main([str(word) for word in [*command, *flags]]) == 0
    saved = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert any(value.abs().sum() > 0 for key, value in saved.items() if "lora_B" in key)

    other = NAMES[NAMES.index(name) - 1]
    there = caches(tmp_path / "other", other)
    command[1], command[6] = other, there.cache
    capsys.readouterr()
    assert main([str(word) for word in command]) == 2
    error = capsys.readouterr().err
    assert f"is a {FAMILIES[name].transformer}, --arch asks for a {FAMILIES[other].transformer}" in error


def test_every_process_sees_its_share_of_the_same_samples(tmp_path):
    items = find_items([caches(tmp_path, "wan").cache], FAMILIES["wan"], use_masks=True)

    def first(count, **options):
        batches = iter(Batches(items, seed=3, **options))
        return [next(batches) for _ in range(count)]

    alone = first(20, batch_size=2)
    shared = [first(10, batch_size=2, process=process, processes=2) for process in range(2)]
    assert alone == [batch for pair in zip(*shared, strict=True) for batch in pair]
    assert all(len({items[index].shape for index, _ in batch}) == 1 for batch in alone)
    assert [draw for batch in alone for _, draw in batch] == list(range(sum(map(len, alone))))
    epoch = [index for batch in alone[:3] for index, _ in batch]
    assert sorted(epoch) == [0, 1, 2, 3]
