"""SAM 3 through transformers' own classes and from_pretrained: the real code at a tiny size, and trained on shapes."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.cli import main
from masked_loss_triton.errors import UserError
from masked_loss_triton.generate import choice, sam3
from masked_loss_triton.generate.choice import choose_backend
from masked_loss_triton.generate.prompts import MaskRequest, Prompt
from tests.generate.conftest import blue_picture, red_picture
from tests.generate.shapes import iou, scene
from tests.generate.support import write_clip

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "Sam3VideoModel"):
    pytest.skip(f"transformers {transformers.__version__} has no SAM 3", allow_module_level=True)
from tests.generate import tiny_sam3  # noqa: E402

BOTH = MaskRequest(prompts=(Prompt("red"), Prompt("blue", 0.5)), min_score=0.01)  # random weights are sure of nothing


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """The folder of one with random weights, for pictures and clips."""
    return tiny_sam3.sam3(tmp_path_factory.mktemp("sam3"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one for pictures that knows the colours of shapes."""
    return tiny_sam3.trained_sam3(tmp_path_factory.mktemp("trained_sam3"))


def load(folder, request=BOTH, **changes):
    return sam3.load(request, **{"device": "cpu", "dtype": "float32", "sam3_model": str(folder), **changes})


def generate(folder, model, *flags) -> int:
    paths = ["--images", str(folder / "in"), "--masks", str(folder / "out"), "--sheet_limit", "0", "--device", "cpu"]
    return main(["generate", *paths, "--backend", "sam3", "--sam3_model", str(model), *map(str, flags)])


def test_the_masks_are_what_transformers_makes_of_each_picture_and_word(random_weights):
    from transformers import Sam3Model, Sam3Processor

    pictures = [red_picture(), blue_picture(), red_picture()[:, ::-1].copy()]
    found = load(random_weights).find_in(pictures)
    model, processor = Sam3Model.from_pretrained(random_weights).eval(), Sam3Processor.from_pretrained(random_weights)
    for picture, one in zip(pictures, found, strict=True):
        assert set(one) == {"red", "blue"}
        for words, instances in one.items():
            inputs = processor(images=picture, text=words, return_tensors="pt")
            sizes = inputs.pop("original_sizes").tolist()
            with torch.inference_mode():
                out = model(**inputs)
            (expected,) = processor.post_process_instance_segmentation(out, 0.01, target_sizes=sizes)
            kept = expected["masks"].flatten(1).any(1)
            assert 0 < len(instances) == int(kept.sum())
            for instance, mask, score in zip(instances, expected["masks"][kept], expected["scores"][kept], strict=True):
                assert instance.mask.dtype == bool
                # The order in which a batch is summed up moves a logit by a hair.
                assert (instance.mask != mask.bool().numpy()).mean() < 0.002
                assert instance.score == pytest.approx(float(score), abs=1e-4)
                left, top, right, bottom = instance.box
                assert 0 <= left < right <= picture.shape[1]
                assert 0 <= top < bottom <= picture.shape[0]
    first = {words: [one.mask.tobytes() for one in instances] for words, instances in found[0].items()}
    assert first["red"] != first["blue"], "words change nothing: the test has shown nothing"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_clip_has_a_mask_for_every_frame_of_every_chunk(random_weights, dtype):
    engine = load(random_weights, dtype=dtype, sam3_frames=3)
    read = []

    def frames():
        for number in range(7):
            read.append(number)
            yield np.roll(red_picture(), 3 * number, axis=1)

    masks = engine.masks_of_clip(frames(), None)
    made = [next(masks)]
    assert read == [0, 1, 2], "no more frames than a chunk has are in memory"
    made += masks
    assert len(made) == 7
    assert all(one.mask.shape == (48, 80) and one.mask.dtype == np.uint8 for one in made)
    assert engine.video[0].dtype == getattr(torch, dtype)
    assert any(one.found for one in made)


def test_of_a_clip_the_same_thing_is_chosen_in_all_frames(random_weights):
    """Chosen where it is largest: not another one in each frame."""
    engine = load(random_weights, MaskRequest(prompts=(Prompt("red"),), select="largest"))

    def thing(left, right):
        mask = np.zeros((8, 16), bool)
        mask[:, left:right] = True
        return sam3.Packed(sam3.Instance(mask, (left, 0, right, 8), 0.9, None))

    tracks = [
        {"red": {4: thing(0, 3), 7: thing(8, 10)}},
        {"red": {4: thing(0, 1), 7: thing(8, 12)}},
        {"red": {4: thing(0, 2)}},
        {},
    ]
    chosen = [[one.box[:3:2] for one in found.get("red", [])] for found in engine._choose(tracks)]
    assert chosen == [[(8, 10)], [(8, 12)], [], []]
    assert [found["red"][0].mask.sum() for found in list(engine._choose(tracks))[:2]] == [16, 32]


def test_no_code_comes_from_a_hub(random_weights, monkeypatch):
    module = importlib.import_module("transformers.models.sam3_video.modeling_sam3_video")

    def fetch(*_args, **_kwargs):
        raise AssertionError("it fetches code")

    monkeypatch.setattr(module, "cv_utils_kernel", None)
    monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(module, "get_kernel", fetch, raising=False)
    monkeypatch.setattr(module.logger, "warning_once", fetch)  # it catches the error, and says so here
    engine = load(random_weights)
    assert len(list(engine.masks_of_clip([red_picture()] * 2, None))) == 2


def test_min_score_is_the_threshold_and_half_without_it(random_weights):
    assert load(random_weights, MaskRequest(prompts=(Prompt("red"),))).find_in([red_picture()]) == [{}]
    engine = load(random_weights)
    engine._video()
    model = engine.video[0]
    assert (engine.threshold, model.score_threshold_detection, model.new_det_thresh) == (0.01, 0.01, 0.01)
    engine = load(random_weights, MaskRequest(prompts=(Prompt("red"),)))
    engine._video()
    model = engine.video[0]
    assert (engine.threshold, model.score_threshold_detection, model.new_det_thresh) == (0.5, 0.5, 0.7)


def test_the_command_masks_pictures_and_clips_and_goes_on_where_it_was(folder, random_weights, capsys):
    Image.fromarray(red_picture()).save(folder / "in" / "red.png")
    write_clip(folder / "in" / "clip.mp4", [red_picture()] * 5)
    flags = ["--text_prompt", "red", "--min_score", "0.01"]
    assert generate(folder, random_weights, *flags) == 0
    assert "2 masks written, 0 without a detection, 0 problems" in capsys.readouterr().out
    with Image.open(folder / "out" / "red.png") as mask:
        note = json.loads(mask.info["masked_loss_triton"])
    assert (note["backend"], note["sam3_model"], note["sam3_frames"]) == ("sam3", random_weights.name, 128)
    assert all(0 < one["score"] <= 1 and one["mask_score"] is None for one in note["found"])
    assert len(list((folder / "out" / "clip").iterdir())) == 5
    assert generate(folder, random_weights, *flags) == 0
    assert "0 masks written" in capsys.readouterr().out


def test_things_it_never_saw_are_found_by_their_colour(folder, trained):
    """Trained on shapes (train_sam3.py): with random weights an IoU means nothing."""
    rng, truth = np.random.default_rng(2003), {}
    for number in range(16):
        picture, things = scene(rng, 128)
        truth[f"{number}"] = [one for one in things if one.colour in ("red", "blue")]
        Image.fromarray(picture).save(folder / "in" / f"{number}.png")
    assert 2 <= sum(not things for things in truth.values()) <= 14, "the test needs both"
    assert generate(folder, trained, "--text_prompt", "red", "blue=0.5") == 0
    reached = []
    for name, things in truth.items():
        assert (folder / "out" / f"{name}.png").exists() == bool(things), f"{name}: {[one.colour for one in things]}"
        if not things:
            continue
        with Image.open(folder / "out" / f"{name}.png") as made:
            mask = np.asarray(made)
        for grey, colour in ((255, "red"), (128, "blue")):
            wanted = np.zeros((128, 128), bool)
            for one in things:
                wanted |= one.mask & (one.colour == colour)
            if wanted.any():
                reached.append(iou(mask == grey, wanted))
            else:
                assert not (mask == grey).any(), f"{name} has nothing {colour}"
    print(f"SAM 3, {len(truth)} pictures: IoU {np.mean(reached):.2f}, lowest {min(reached):.2f}")
    assert np.mean(reached) > 0.8, reached


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--text_prompt", "a very long prompt of many letters " * 2], "tokens, SAM 3 reads 32: shorten it"),
        (["--text_prompt", "red", "--sam3_frames", "1"], "--sam3_frames must be 2 or more, got 1"),
        ([], "say what to look for"),
    ],
)
def test_bad_flags_are_one_line(folder, random_weights, capsys, flags, text):
    Image.fromarray(red_picture()).save(folder / "in" / "red.png")
    assert generate(folder, random_weights, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert text in line


def test_absent_weights_and_those_of_another_model_are_one_line(models):
    with pytest.raises(UserError, match="hf download facebook/sam3"):
        load(sam3.MODEL)
    with pytest.raises(UserError, match=r"--sam3_model .* is a model of type 'sam2_video', not sam3_video or sam3"):
        load(models[1])


def test_a_transformers_without_sam_3_is_one_line(random_weights, monkeypatch):
    class Older:
        """A transformers from before it, as `load_pretrained` sees it."""

        __version__ = "4.57.1"

    monkeypatch.setattr("masked_loss_triton.generate.models._transformers", Older)
    with pytest.raises(UserError, match=r"transformers 4.57.1 has no Sam3Model: pip install -U transformers"):
        load(random_weights)


@pytest.mark.parametrize(
    ("there", "models", "backend"),
    [
        (("facebook/sam3",), {}, "sam3"),
        (("facebook/sam3", "florence-community/Florence-2-large", "facebook/sam2.1-hiera-large"), {}, "florence2+sam2"),
        ((), {"sam3_model": "folder"}, "sam3"),
        ((), {"sam3_model": sam3.MODEL}, "florence2+sam2"),
    ],
)
def test_it_is_chosen_where_it_is_named_or_alone(monkeypatch, there, models, backend):
    monkeypatch.setattr(choice, "is_here", lambda model: model in there)
    assert choose_backend(True, models)[0] == backend
