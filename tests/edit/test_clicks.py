"""Masks from clicks: SAM 2 with tiny random weights, GrabCut without any, and masks that follow a clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.edit.clicks import Click, Selector, follow_by_flow
from masked_loss_triton.errors import UserError
from masked_loss_triton.generate import saliency
from tests.generate import tiny

BOX = (20.0, 10.0, 90.0, 60.0)


@pytest.fixture(scope="module")
def sam2_folder(tmp_path_factory):
    pytest.importorskip("transformers")
    return tiny.sam2(tmp_path_factory.mktemp("models") / "sam2")


def picture(size=(120, 80)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("clicks", "box", "several"),
    [
        ([Click(30, 20, True)], None, True),
        ([Click(30, 20, True), Click(100, 70, False)], None, False),
        ([], BOX, False),
        ([Click(30, 20, False)], BOX, False),
    ],
)
def test_sam_2_says_what_transformers_says(sam2_folder, clicks, box, several):
    from transformers import Sam2Model, Sam2Processor

    model, processor = Sam2Model.from_pretrained(sam2_folder).eval(), Sam2Processor.from_pretrained(sam2_folder)
    points = [[[[click.x, click.y] for click in clicks]]] if clicks else None
    labels = [[[int(click.positive) for click in clicks]]] if clicks else None
    boxes = [[list(box)]] if box else None
    inputs = processor(
        images=Image.fromarray(picture()),
        input_points=points,
        input_labels=labels,
        input_boxes=boxes,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model(
            **{key: value for key, value in inputs.items() if key != "original_sizes"}, multimask_output=several
        )
    masks = processor.post_process_masks(out.pred_masks, inputs["original_sizes"])[0][0]
    expected = masks[int(out.iou_scores[0, 0].argmax())].numpy()
    found, maker = Selector(str(sam2_folder), device="cpu").select(
        picture(), clicks, box, np.zeros((80, 120), np.uint8)
    )
    assert maker == "SAM 2"
    assert found.dtype == np.uint8
    assert np.array_equal(found > 0, expected)
    assert set(np.unique(found)) <= {0, 255}


def test_sam_2_follows(sam2_folder):
    frames = [np.roll(picture(), step, axis=1) for step in range(4)]
    mask = np.zeros((80, 120), np.uint8)
    mask[20:50, 30:70] = 255
    masks = list(Selector(str(sam2_folder), device="cpu").follow(frames, mask))
    assert len(masks) == 3
    assert all(one.shape == (80, 120) and set(np.unique(one)) <= {0, 255} for one in masks)


def test_without_weights_grabcut_answers_and_says_why(tmp_path):
    colours = np.full((80, 120, 3), (20, 30, 200), np.uint8)
    colours[20:60, 30:80] = (220, 40, 30)
    colours += np.random.default_rng(0).integers(0, 12, colours.shape, dtype=np.uint8)
    selector = Selector(str(tmp_path / "absent"), str(tmp_path / "u2netp.onnx"), "cpu")
    found, maker = selector.select(colours, [Click(50, 40, True)], None, np.zeros((80, 120), np.uint8))
    assert maker == "GrabCut"
    assert "absent" in selector.why_not[0]
    assert "u2netp.onnx" in selector.why_not[1]
    truth = np.zeros((80, 120), bool)
    truth[20:60, 30:80] = True
    assert ((found > 0) & truth).sum() / ((found > 0) | truth).sum() > 0.9
    # A second subject of the same colour, and a click that says that it is none.
    colours[20:60, 95:115] = colours[20:60, 40:60]
    wide = np.where(truth, 255, 0).astype(np.uint8)
    wide[20:60, 95:115] = 255
    found, _ = selector.select(colours, [Click(50, 40, True), Click(105, 40, False)], None, wide)
    assert found[40, 105] == 0
    assert found[40, 50] == 255
    with pytest.raises(UserError, match="click on the subject"):
        selector.select(colours, [], None, wide)


def test_flow_moves_grey_values_with_the_picture():
    import cv2

    base = cv2.GaussianBlur(np.random.default_rng(1).integers(0, 256, (160, 240), dtype=np.uint8), (0, 0), 3)
    base = cv2.normalize(base, None, 0, 255, cv2.NORM_MINMAX)
    frames = [np.repeat(np.roll(base, 3 * step, axis=1)[..., None], 3, axis=2) for step in range(6)]
    mask = np.zeros((160, 240), np.uint8)
    mask[40:100, 60:120] = 128
    *_, last = follow_by_flow(frames, mask)
    truth = np.roll(mask, 15, axis=1) > 64
    assert ((last > 64) & truth).sum() / ((last > 64) | truth).sum() > 0.93
    assert last.max() == 128


def test_u2_net_knows_the_whole_where_colours_do_not(tmp_path):
    from skimage import data

    try:
        saliency.find_weights()
    except UserError as error:
        pytest.skip(str(error))
    selector, rocket = Selector(str(tmp_path / "absent"), device="cpu"), data.rocket()
    blank = np.zeros(rocket.shape[:2], np.uint8)
    box = (290.0, 20.0, 350.0, 350.0)
    found, maker = selector.select(rocket, [], box, blank)
    assert maker == "U2-Net"
    rows, columns = np.nonzero(found)
    assert rows.max() - rows.min() > 200, "the rocket is tall"
    assert 290 <= columns.min() < columns.max() < 350
    inside = int(np.median(columns[rows == 200])), 200
    clicked, maker = selector.select(rocket, [Click(*inside, True)], box, blank)
    assert maker == "U2-Net and GrabCut"
    assert clicked[inside[1], inside[0]] == 255
    # A click on what does not stand out is believed, and GrabCut alone answers.
    _, maker = selector.select(rocket, [Click(20, 20, True)], None, blank)
    assert maker == "GrabCut"
