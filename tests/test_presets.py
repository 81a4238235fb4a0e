"""Each preset computes what its trainer computes, and where it means to differ, it does."""

import functools

import pytest
import torch

from bench import recipes
from bench.recipes import RECIPES
from masked_loss_triton import MaskedLossConfig, masked_loss

BATCH, CHANNELS, FRAMES, HEIGHT, WIDTH = 2, 4, 3, 6, 10
# Loss and gradient, relative to the largest gradient. In float32 the recipes themselves are off by about 3e-7.
TOLERANCE = {"reference": 1e-12, "torch": 2e-6, "triton": 2e-6}

# OneTrainer's data loader antialiases; the preset says that it does not.
WITHOUT_ANTIALIASING = {
    name: functools.partial(recipes.onetrainer, antialias=False, normalized="normalized" in name)
    for name in RECIPES
    if name.startswith("OneTrainer")
}
# ai-toolkit resizes the prior's mask by bicubic taps: that has tests of its own.
NAMES_AND_SIZES = [(name, size) for name in RECIPES for size in (1, 8) if (name, size) != ("ai-toolkit + prior", 8)]
PLAIN_MEANS = [
    name for name, recipe in RECIPES.items() if recipe.config.normalization == "mean" and not recipe.takes_prior
]


def make(dtype, size, frames=FRAMES, batch=BATCH):
    """(pred, target, mask, prior); frames=None: images."""
    grid = (HEIGHT, WIDTH) if frames is None else (frames, HEIGHT, WIDTH)
    generator = torch.Generator().manual_seed(3)
    pred, target, prior = torch.randn((3, batch, CHANNELS, *grid), generator=generator).to(dtype)
    mask = torch.rand((batch, 1, HEIGHT * size, WIDTH * size), generator=generator).to(dtype)
    return pred.requires_grad_(), target, mask, prior


def loss_and_gradient(function, pred, *arguments, **call):
    loss = function(pred, *arguments, **call)
    (gradient,) = torch.autograd.grad(loss * 3, pred)
    return loss.detach(), gradient


def assert_equal(ours, theirs, tolerance):
    loss, gradient = ours
    assert abs(loss - theirs[0]) <= tolerance * abs(theirs[0])
    assert (gradient - theirs[1]).abs().max() <= tolerance * theirs[1].abs().max()


def assert_different(ours, theirs):
    assert (ours[1] - theirs[1]).abs().max() > 1e-3 * theirs[1].abs().max()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("name", "size"), NAMES_AND_SIZES)
def test_preset_is_the_recipe_of_its_trainer(name, size, backend):
    recipe = RECIPES[name]
    function = recipe.function
    # What the presets mean to differ in has tests of its own, below.
    frames, batch = FRAMES, BATCH
    if name.startswith("OneTrainer"):
        function = WITHOUT_ANTIALIASING[name]
    if "normalized" in name:
        frames = None
    if name == "ai-toolkit + prior":
        batch = 1
    pred, target, mask, prior = make(torch.float64 if backend == "reference" else torch.float32, size, frames, batch)
    prior = prior if recipe.takes_prior else None
    # eps is part of blissful's formula and of no other.
    config = recipe.config if name.startswith("blissful") else recipe.config.replace(eps=1e-30)
    ours = loss_and_gradient(masked_loss, pred, target, mask, config, prior=prior, backend=backend)
    assert_equal(ours, loss_and_gradient(function, pred, target, mask, prior), TOLERANCE[backend])


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_blissful_keeps_its_floor_and_its_gamma(backend):
    pred, target, mask, prior = make(torch.float64 if backend == "reference" else torch.float32, 8)
    options = dict(min_weight=0.05, gamma=0.7, prior_weight=0.3)
    config = MaskedLossConfig.preset("blissful", **options)
    ours = loss_and_gradient(masked_loss, pred, target, mask, config, prior=prior, backend=backend)
    theirs = loss_and_gradient(functools.partial(recipes.blissful, **options), pred, target, mask, prior)
    assert_equal(ours, theirs, 3 * TOLERANCE[backend])


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_computes_in_float32_what_it_gets_in_bfloat16(name):
    pred, target, mask, prior = make(torch.bfloat16, 1)
    prior = prior if RECIPES[name].takes_prior else None
    assert RECIPES[name](pred, target, mask, prior).dtype == torch.float32


@pytest.mark.parametrize("name", PLAIN_MEANS)
def test_plain_mean_presets_shrink_with_the_mask(name):
    """sd-scripts, SimpleTuner, OneTrainer and diffusion-pipe do: the learning rate follows the area of the mask."""
    pred, target, mask, _ = make(torch.float64, 1)
    few = torch.zeros_like(mask)
    few[..., :1] = 1
    assert RECIPES[name].ours(pred, target, few) < 0.3 * RECIPES[name].ours(pred, target, torch.ones_like(mask))


# What the presets do not reproduce, in the order of their docstring.


def test_sd_scripts_loss_weights_are_the_argument_weighting():
    pred, target, mask, _ = make(torch.float64, 8)
    loss_weights = torch.tensor([0.25, 3.0], dtype=torch.float64)

    def theirs(pred):
        loss = (pred - target) ** 2 * recipes._resized(mask, pred, "area")
        return (loss.mean(dim=(1, 2, 3, 4)) * loss_weights).mean()

    ours = functools.partial(RECIPES["sd-scripts"].ours, weighting=loss_weights)
    assert_equal(loss_and_gradient(ours, pred, target, mask), loss_and_gradient(theirs, pred), 1e-12)


def test_simpletuner_segmentation_grows_the_mask_by_a_latent_cell():
    pred, target, mask, _ = make(torch.float64, 8)
    mask = torch.zeros_like(mask)
    mask[..., 8, 8] = 1e-3  # one dark pixel
    ours = loss_and_gradient(RECIPES["SimpleTuner segmentation"].ours, pred, target, mask)[1]
    assert (ours != 0).sum() == BATCH * CHANNELS * FRAMES
    assert (ours != 0)[:, :, :, 1, 1].all()


def test_simpletuner_takes_the_masks_of_videos_that_fail_there():
    pred, target, _, _ = make(torch.float64, 1)
    mask = torch.rand(BATCH, FRAMES, 8 * HEIGHT, 8 * WIDTH, dtype=torch.float64)
    still = mask[:, :1]
    per_frame = RECIPES["SimpleTuner mask"].ours(pred, target, mask)
    assert torch.isfinite(per_frame)
    assert per_frame != RECIPES["SimpleTuner mask"].ours(pred, target, still)


def test_ai_toolkit_prior_mask_of_ours_stays_in_bounds_and_is_nearest():
    """Theirs is bicubic, leaves [0, 1] beside hard edges, and trains away from the prior there."""
    pred, target, mask, prior = make(torch.float64, 8, batch=1)
    mask = (mask > 0.5).double()
    theirs = loss_and_gradient(RECIPES["ai-toolkit + prior"], pred, target, mask, prior)
    ours = loss_and_gradient(RECIPES["ai-toolkit + prior"].ours, pred, target, mask, prior)
    assert_different(ours, theirs)
    assert recipes._resized(mask, pred, "bicubic").min() < 0

    nearest = recipes._resized(mask, pred, "nearest")
    corrected = loss_and_gradient(RECIPES["ai-toolkit + prior"], pred, target, nearest.squeeze(1), prior)
    assert_equal(ours, corrected, 1e-7)


def test_ai_toolkit_prior_mask_of_ours_belongs_to_each_sample():
    """Theirs is that of sample 0 for the whole batch."""
    pred, target, mask, prior = make(torch.float64, 1)
    mask[0], mask[1] = 0.5, 1.0
    theirs = RECIPES["ai-toolkit + prior"](pred, target, mask, prior)
    without = RECIPES["ai-toolkit"](pred, target, mask)
    (gradient,) = torch.autograd.grad(theirs - without, pred)
    assert gradient[1].abs().max() > 0
    difference = RECIPES["ai-toolkit + prior"].ours(pred, target, mask, prior) - RECIPES["ai-toolkit"].ours(
        pred, target, mask
    )
    (gradient,) = torch.autograd.grad(difference, pred)
    assert gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


@pytest.mark.parametrize("name", ["ai-toolkit", "ai-toolkit + prior"])
def test_ai_toolkit_divides_by_zero_for_an_empty_mask_and_ours_does_not(name):
    pred, target, mask, prior = make(torch.float64, 1)
    prior = prior if RECIPES[name].takes_prior else None
    assert torch.isnan(RECIPES[name](pred, target, torch.zeros_like(mask), prior))
    ours = RECIPES[name].ours(pred, target, torch.zeros_like(mask), prior)
    assert torch.isfinite(ours)
    assert (ours > 0) == (prior is not None)


def test_onetrainer_mask_of_ours_is_not_antialiased():
    pred, target, mask, _ = make(torch.float64, 8)
    ours = loss_and_gradient(RECIPES["OneTrainer"].ours, pred, target, mask)
    assert_different(ours, loss_and_gradient(RECIPES["OneTrainer"], pred, target, mask))
    # Given the mask that its data loader caches, they agree.
    cached = torch.nn.functional.interpolate(mask, (HEIGHT, WIDTH), mode="bilinear", antialias=True)
    assert_equal(
        loss_and_gradient(RECIPES["OneTrainer"].ours, pred, target, cached),
        loss_and_gradient(RECIPES["OneTrainer"], pred, target, mask),
        1e-12,
    )


def test_onetrainer_normalizes_videos_by_column_and_ours_by_sample():
    """A mask that is constant in each column is cancelled completely there."""
    pred, target, _, _ = make(torch.float64, 1)
    columns = torch.linspace(0.2, 1, WIDTH, dtype=torch.float64).expand(BATCH, 1, HEIGHT, WIDTH)
    theirs = loss_and_gradient(RECIPES["OneTrainer normalized"], pred, target, columns)
    plain = loss_and_gradient(RECIPES["OneTrainer"], pred, target, torch.ones_like(columns))
    assert_equal(theirs, plain, 1e-12)
    assert_different(loss_and_gradient(RECIPES["OneTrainer normalized"].ours, pred, target, columns), plain)


def test_onetrainer_gives_nan_for_a_full_mask_with_prior_and_ours_does_not():
    pred, target, mask, prior = make(torch.float64, 1, frames=None)
    full = torch.ones_like(mask)
    assert torch.isnan(RECIPES["OneTrainer normalized + prior"](pred, target, full, prior))
    ours = RECIPES["OneTrainer normalized + prior"].ours(pred, target, full, prior)
    assert torch.allclose(ours, ((pred - target) ** 2).mean())


def test_onetrainer_has_no_prior_unless_asked():
    assert MaskedLossConfig.preset("onetrainer").prior_weight == 0


def test_diffusion_pipe_keeps_masks_in_float16_and_ours_as_they_come():
    pred, target, mask, _ = make(torch.float64, 1)
    halved = loss_and_gradient(RECIPES["diffusion-pipe"], pred, target, mask.half().double())
    ours = loss_and_gradient(RECIPES["diffusion-pipe"].ours, pred, target, mask)
    assert 0 < (ours[1] - halved[1]).abs().max() < 1e-3 * ours[1].abs().max()
    assert_equal(loss_and_gradient(RECIPES["diffusion-pipe"].ours, pred, target, mask.half()), halved, 1e-12)


def test_diffusion_pipe_variant_for_ltx_is_mean_one():
    pred, target, mask, _ = make(torch.float64, 8)
    config = MaskedLossConfig.preset("diffusion-pipe", normalization="mean_one", eps=1e-30)

    def theirs(pred):
        weights = recipes._resized(mask, pred, "nearest-exact")
        return ((pred - target) ** 2 * weights / weights.mean()).mean()

    ours = loss_and_gradient(masked_loss, pred, target, mask, config)
    assert_equal(ours, loss_and_gradient(theirs, pred), 1e-12)


def test_blissful_mask_loss_scale_cancels_out():
    """sum(k w e) / sum(k w): so there is no such option here."""
    pred, target, mask, _ = make(torch.float64, 1)
    assert_equal(
        loss_and_gradient(recipes.blissful, pred, target, mask * 0.2),
        loss_and_gradient(recipes.blissful, pred, target, mask),
        1e-8,
    )
    with pytest.raises(TypeError, match="mask_loss_scale"):
        MaskedLossConfig.preset("blissful", mask_loss_scale=5.0)
