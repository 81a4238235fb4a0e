"""Which tokens are kept."""

import random

import pytest
import torch
import torch.nn.functional as F

from masked_loss_triton.routing import Router

PATCH = (1, 2, 2)


def draw(step=0):
    return random.Random(f"test {step}")


def weights(*boxes, batch=1, grid=(2, 12, 16)):
    """(B, F, H, W): 1 in the boxes (sample, frame, y, x), each one position."""
    found = torch.zeros(batch, *grid)
    for box in boxes:
        found[box] = 1
    return found


def tokens_of(positions):
    """(B, tokens) from (B, F, H, W)."""
    return F.max_pool3d(positions.float().unsqueeze(1), PATCH).flatten(1) > 0


def choose(router, w, step=0, **named):
    kept = router.choose(w, PATCH, draw(step), **named)
    assert torch.equal(kept.index, kept.index.sort(1).values)
    assert torch.equal(tokens_of(kept.positions).float().sum(1).long().unique(), torch.tensor([kept.index.shape[1]]))
    return kept, tokens_of(kept.positions)


def test_the_number_kept_depends_on_keep_alone():
    for keep, count in ((1.0, 96), (0.75, 72), (0.5, 48), (0.26, 25), (1e-9, 1)):
        for w in (weights(), torch.ones(1, 2, 12, 16), weights((0, 0, 3, 5))):
            assert choose(Router(keep=keep), w)[0].index.shape == (1, count)
    assert Router(keep=0.07).count(100) == 7  # and not 8, as 0.07 x 100 in floating point would have it


def test_a_patch_with_any_weight_is_kept_and_its_neighbours_before_the_background():
    """One position of 1e-4 out of the four of its patch; half of all others are dropped, none of the eight around it."""
    w = weights()
    w[0, 1, 5, 8] = 1e-4
    for step in range(20):
        _, on = choose(Router(keep=0.2), w, step)
        on = on.view(2, 6, 8)
        assert on[1, 1:4, 3:6].all()
        assert not on.all()
    tight = Router(keep=1 / 96, grow=0)
    assert choose(tight, w)[0].index.item() == 48 + 2 * 8 + 4
    far = choose(Router(keep=25 / 96, grow=2, background=0), w)[1].view(2, 6, 8)
    assert far[1, 0:5, 2:7].all()
    assert far.sum() == 25


def test_the_background_is_drawn_at_random_and_the_same_from_the_same_step():
    w = weights((0, 0, slice(0, 4), slice(0, 4)))
    router = Router(keep=0.5)
    state = torch.random.get_rng_state()
    first, again = choose(router, w, 3)[0].index, choose(router, w, 3)[0].index
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), state)
    counts = sum(choose(router, w, step)[1].float() for step in range(200)).view(2, 6, 8) / 200
    assert (counts[0, :3, :3] == 1).all()  # the box and what is near it
    outside = torch.cat([counts[0, 3:].flatten(), counts[1].flatten()])
    assert outside.min() > 0.25
    assert outside.max() < 0.65


def test_when_more_carry_weight_than_fit_a_random_part_of_them_sits_out():
    w = weights((0, slice(None), slice(0, 10)))  # 80 of 96 tokens
    counts = sum(choose(Router(keep=0.5, background=0), w, step)[1].float() for step in range(200)) / 200
    counts = counts.view(2, 6, 8)
    assert counts[:, 5].max() == 0
    assert counts[:, :5].min() > 0.4


def test_a_share_of_the_places_is_the_background_s():
    w = weights((0, slice(None), slice(0, 10)))
    on = choose(Router(keep=0.5, background=0.25, grow=0), w)[1].view(2, 6, 8)
    assert on[:, 5].sum() == 12
    assert on[:, :5].sum() == 36
    white = choose(Router(keep=0.5, background=0.25), torch.ones(1, 2, 12, 16))[1]
    assert white.sum() == 48


def test_a_floor_is_no_subject():
    w = weights((0, 0, slice(0, 4), slice(0, 4))) * 0.95 + 0.05
    kept, on = choose(Router(keep=0.2), w, floor=0.05)
    assert on.view(2, 6, 8)[0, :3, :3].all()
    assert kept.weighted == pytest.approx(4 / 96)


def test_samples_choose_for_themselves_or_share_the_union():
    w = weights((0, 0, slice(0, 4), slice(0, 4)), (1, 1, slice(4, 8), slice(8, 12)), batch=2)
    kept, on = choose(Router(keep=0.3), w)
    assert kept.index.shape == (2, 29)
    assert not torch.equal(on[0], on[1])
    kept, on = choose(Router(keep=0.3), w, shared=True)
    assert kept.index.shape == (1, 29)
    assert torch.equal(on[0], on[1])
    assert on[0].view(2, 6, 8)[0, :2, :2].all()
    assert on[0].view(2, 6, 8)[1, 2:4, 4:6].all()


@pytest.mark.parametrize("bad", [{"keep": 0}, {"keep": 1.1}, {"background": 1}, {"grow": -1}, {"grow": 0.5}])
def test_bad_options_are_named(bad):
    with pytest.raises(ValueError, match=f"^{next(iter(bad))} must be"):
        Router(**bad)


def test_positions_that_are_no_whole_patches_are_refused():
    with pytest.raises(ValueError, match="cannot be cut into tokens"):
        Router().choose(torch.ones(1, 1, 5, 4), PATCH, draw())
