"""Florence-2 and SAM 2 through transformers' own classes and from_pretrained: the real code at a tiny size."""

from __future__ import annotations

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.cli import main
from masked_loss_triton.errors import UserError
from masked_loss_triton.generate import florence2, sam2
from masked_loss_triton.generate.mask_files import write_mask
from masked_loss_triton.generate.prompts import MaskRequest, Prompt
from tests.generate.conftest import LEFT, RIGHT, blue_picture, red_picture

OPTIONS = MaskRequest(prompts=(Prompt("red"),))


def arguments(name, models, **changes) -> dict:
    values = {
        "florence2_model": str(models[0]),
        "sam2_model": str(models[1]),
        "florence2_task": "detection",
        "florence2_beams": 3,
        "batch_size": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    wanted = (name, "batch", "device", "dtype")
    return {key: value for key, value in {**values, **changes}.items() if key.startswith(wanted)}


def generate(folder, *flags) -> int:
    paths = ["--images", str(folder / "in"), "--masks", str(folder / "out")]
    return main(["generate", *paths, *map(str, flags)])


def near(box, expected) -> bool:
    """To one location token: a thousandth of a side, rounded to pixels."""
    return all(abs(a - b) <= 1 for a, b in zip(box, expected, strict=True))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_what_was_learned_is_found_in_the_picture_that_has_it(models, beams, batch_size):
    detector = florence2.load(OPTIONS, **arguments("florence2", models, florence2_beams=beams, batch_size=batch_size))
    found = detector.detect([red_picture(), blue_picture()], ["red", "blue"])
    assert [[len(by_words) for by_words in picture] for picture in found] == [[1, 0], [0, 1]]
    assert near(found[0][0][0].box, LEFT)
    assert near(found[1][1][0].box, RIGHT)
    assert all(0.8 < found[i][i][0].score <= 1 for i in range(2))


def test_the_score_is_the_probability_of_locations_near_the_chosen_ones(models):
    detector = florence2.load(OPTIONS, **arguments("florence2", models))
    text = "<OPEN_VOCABULARY_DETECTION>red"
    inputs = detector.processor(text=[text], images=[red_picture()], return_tensors="pt")
    ids = detector.processor.tokenizer("</s><s>red<loc_62><loc_208><loc_5><loc_999>", add_special_tokens=False)
    sequence = torch.tensor([ids["input_ids"]])
    with torch.inference_mode():
        sure = detector._sure(inputs, sequence)[0]
        logits = detector.model(**inputs, decoder_input_ids=sequence[:, :-1]).logits[0].double()
    tokens = detector.processor.tokenizer.convert_tokens_to_ids([f"<loc_{i}>" for i in range(1000)])
    probability = logits.softmax(-1)[:, tokens]
    for position, chosen in zip(range(-4, 0), (62, 208, 5, 999), strict=True):
        expected = probability[position, max(chosen - 20, 0) : chosen + 21].sum()
        assert abs(float(sure[position]) - float(expected)) < 1e-5


@pytest.mark.parametrize(
    ("task", "answer", "boxes"),
    [
        ("detection", "</s><s>car<loc_53><loc_334><loc_933><loc_775>dog<loc_0><loc_0><loc_99><loc_99></s>", 2),
        ("detection", "</s><s>car<loc_53><loc_334><loc_933><loc_775><loc_711><loc_203><loc_906><loc_546></s>", 2),
        ("detection", "car<poly><loc_100><loc_200><loc_300><loc_200><loc_300><loc_500></poly></s>", 1),
        ("detection", "car<loc_53><loc_334><loc_933></s>", 0),
        ("detection", "car<loc_53><loc_334><loc_53><loc_775></s>", 0),
        ("detection", "<loc_53><loc_334><loc_933><loc_775></s>", 0),
        ("detection", "car<loc_1><loc_1><loc_9><loc_9>a car<loc_1><loc_1><loc_9><loc_9></s>", 1),
        ("detection", "no such thing</s><pad><pad>", 0),
        ("grounding", "a car<loc_53><loc_334><loc_933><loc_775>a dog<loc_5><loc_5><loc_9><loc_9></s>", 2),
    ],
)
def test_answers_are_read_as_the_processor_reads_them(models, task, answer, boxes):
    detector = florence2.load(OPTIONS, **arguments("florence2", models, florence2_task=task))
    tokens = detector.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    sure = np.linspace(0.1, 0.9, len(tokens)).tolist()
    found = list(detector.parse(tokens, sure, (1000, 500)))
    assert len(found) == boxes
    whole = detector.processor.post_process_generation(answer, task=detector.task, image_size=(1000, 500))[
        detector.task
    ]
    expected = {tuple(box) for box in whole["bboxes"] if box[2] > box[0] and box[3] > box[1]}
    if "poly" in answer:
        expected = {(100, 100, 300, 250)}
    assert {one.box for one in found} == expected
    if boxes == 2 and task == "detection":
        # The first four locations are the first box, the next four the second.
        places = [i for i, token in enumerate(tokens) if token in detector.locations]
        for one, four in zip(found, (places[:4], places[4:]), strict=True):
            assert one.score == pytest.approx(np.prod([sure[i] for i in four]) ** 0.25)


def test_prompts_are_the_ones_florence_2_was_trained_with(models):
    detector = florence2.load(OPTIONS, **arguments("florence2", models))
    inputs = detector.processor(text=[detector.task + "a red car"], images=[red_picture()], return_tensors="pt")
    text = detector.processor.tokenizer.decode(inputs["input_ids"][0])
    assert text == "<image>" * 5 + "<s>Locate a red car in the image.</s>"
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sam_2_masks_have_the_size_of_the_picture_in_every_dtype(models, dtype):
    segmenter = sam2.load(OPTIONS, **arguments("sam2", models, dtype=dtype))
    assert segmenter.model.dtype == getattr(torch, dtype)
    pictures = [red_picture(), blue_picture(), red_picture()]
    found = segmenter.segment(pictures, [[LEFT, (0, 0, 80, 48)], [RIGHT], []])
    assert [len(one) for one in found] == [2, 1, 0]
    for picture, cutouts in zip(pictures, found, strict=True):
        for cutout in cutouts:
            assert cutout.mask.shape == picture.shape[:2]
            assert cutout.mask.dtype == bool
            assert 0 <= cutout.score <= 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_florence_2_answers_in_half_precision(models, dtype):
    detector = florence2.load(OPTIONS, **arguments("florence2", models, dtype=dtype))
    assert near(detector.detect([red_picture()], ["red"])[0][0][0].box, LEFT)


def test_a_batch_of_unequal_numbers_of_boxes_equals_one_after_the_other(models):
    segmenter = sam2.load(OPTIONS, **arguments("sam2", models))
    pictures, boxes = [red_picture(), blue_picture()], [[LEFT, (0, 0, 80, 48), (40, 0, 80, 20)], [RIGHT]]
    together = segmenter.segment(pictures, boxes)
    alone = [segmenter.segment([pictures[i]], [[box]])[0][0] for i in range(2) for box in boxes[i]]
    for first, second in zip([one for found in together for one in found], alone, strict=True):
        assert np.array_equal(first.mask, second.mask)
        assert first.score == pytest.approx(second.score, abs=1e-5)
    assert len({one.mask.tobytes() for one in together[0]}) > 1, "boxes change nothing: the test has shown nothing"


def test_the_mask_is_what_transformers_makes_of_the_box(models):
    from transformers import Sam2Model, Sam2Processor

    mask = sam2.load(OPTIONS, **arguments("sam2", models)).segment([red_picture()], [[LEFT]])[0][0].mask
    model, processor = Sam2Model.from_pretrained(models[1]).eval(), Sam2Processor.from_pretrained(models[1])
    inputs = processor(images=red_picture(), input_boxes=[[list(map(float, LEFT))]], return_tensors="pt")
    with torch.inference_mode():
        out = model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False)
    expected = processor.post_process_masks(out.pred_masks, inputs["original_sizes"])[0][0, 0].numpy()
    assert np.array_equal(mask, expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_following_gives_every_frame_the_masks_in_their_order(models, dtype):
    segmenter = sam2.load(OPTIONS, **arguments("sam2", models, dtype=dtype))
    frames = [np.roll(red_picture(), 3 * t, axis=1) for t in range(5)]
    first = [np.zeros((48, 80), bool), np.zeros((48, 80), bool)]
    first[0][10:40, 5:30] = True
    first[1][:8, 60:] = True
    followed = list(segmenter.follow(frames, first))
    assert len(followed) == 5
    assert all(np.array_equal(a, b) for a, b in zip(followed[0], first, strict=True))
    assert all(len(masks) == 2 and masks[0].shape == (48, 80) and masks[0].dtype == bool for masks in followed)
    assert [len(masks) for masks in segmenter.follow(frames[:1], first)] == [2]


def test_the_command_makes_layers_from_two_prompts(tmp_path, models, model_flags, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.fromarray(red_picture()).save(tmp_path / "in" / "red.png")
    Image.fromarray(blue_picture()).save(tmp_path / "in" / "deep" / "blue.webp", lossless=True)
    assert generate(tmp_path, *model_flags, "--text_prompt", "red", "blue=0.5") == 0
    said = capsys.readouterr().out
    red, blue = Image.open(tmp_path / "out" / "red.png"), Image.open(tmp_path / "out" / "deep" / "blue.png")
    segmenter = sam2.load(OPTIONS, **arguments("sam2", models))
    box = [one["box"] for one in json.loads(red.info["masked_loss_triton"])["found"]]
    expected = segmenter.segment([red_picture()], [box])[0][0].mask * np.uint8(255)
    assert np.array_equal(np.array(red), expected)
    assert set(np.unique(np.array(blue))) == {0, 128}
    assert "2 masks written, 0 without a detection, 0 problems" in said
    assert (tmp_path / "out_sheet.png").exists()
    assert (tmp_path / "out_sheet.html").exists()


def test_a_picture_without_the_thing_is_listed_and_its_old_mask_goes(tmp_path, model_flags, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(red_picture()).save(tmp_path / "in" / "red.png")
    Image.fromarray(blue_picture()).save(tmp_path / "in" / "blue.png")
    write_mask(tmp_path / "out" / "red.png", np.full((48, 80), 255, np.uint8), {})
    flags = [*model_flags, "--text_prompt", "blue", "--overwrite"]
    assert generate(tmp_path, *flags) == 0
    said = capsys.readouterr().out
    assert "1 masks written, 1 without a detection, 0 problems" in said
    assert f"Nothing found: {tmp_path / 'in' / 'red.png'}" in said
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["blue.png"]
    assert generate(tmp_path, *flags, "--strict") == 1
    assert generate(tmp_path, *flags, "--no_detection", "black") == 0
    assert np.array(Image.open(tmp_path / "out" / "red.png")).max() == 0
    # The substitute is there now and is not made again, and still counts as nothing found.
    assert generate(tmp_path, *flags[:-1], "--no_detection", "black", "--strict") == 1


def test_a_clip_is_followed_from_its_key_frames(tmp_path, model_flags):
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 80, 48, "yuv444p"
        stream.options = {"crf": "0"}
        for _ in range(7):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(red_picture(), format="rgb24")))
        container.mux(stream.encode())
    flags = [*model_flags, "--text_prompt", "red", "--key_interval", "3"]
    assert generate(tmp_path, *flags) == 0
    files = sorted((tmp_path / "out" / "clip").iterdir())
    assert [file.name for file in files] == [f"{t:06d}.png" for t in range(7)]
    masks = [np.array(Image.open(file)) for file in files]
    assert all(mask.shape == (48, 80) and mask.dtype == np.uint8 for mask in masks)
    key = [masks[t] for t in (0, 3, 6)]
    assert all(np.array_equal(key[0], one) for one in key), "key frames show the same picture"
    assert key[0].any()
    assert generate(tmp_path, *flags, "--overwrite", "--clip_output", "video") == 0
    assert not (tmp_path / "out" / "clip").exists(), "the cache command would read the frames before the video"
    with av.open(str(tmp_path / "out" / "clip.mkv")) as container:
        decoded = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert np.array_equal(np.stack(decoded), np.stack(masks))


def test_both_absent_models_are_named_at_once(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(red_picture()).save(tmp_path / "in" / "red.png")
    assert generate(tmp_path, "--text_prompt", "red") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "hf download florence-community/Florence-2-large" in line
    assert "--florence2_model FOLDER" in line
    assert "hf download facebook/sam2.1-hiera-large" in line
    assert "grabcut needs no weights" in line


def test_the_wrong_model_is_refused(models):
    with pytest.raises(UserError, match=r"--florence2_model .* is a model of type 'sam2_video', not florence2"):
        florence2.load(OPTIONS, **arguments("florence2", (models[1], models[1])))


def test_weights_in_another_format_are_refused(models, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in models[0].iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(models[0] / "model.safetensors")
    renamed = {f"old.{name}": tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ of \d+ weights"):
        florence2.load(OPTIONS, **arguments("florence2", (tmp_path, models[1])))


def test_an_incomplete_folder_is_refused(models, tmp_path):
    (tmp_path / "config.json").write_bytes((models[1] / "config.json").read_bytes())
    with pytest.raises(UserError, match="--sam2_model"):
        sam2.load(OPTIONS, **arguments("sam2", (models[0], tmp_path)))


@pytest.mark.parametrize(("version", "text"), [("4.55.4", "this is 4.55.4"), (None, r"\[generate\]")])
def test_an_old_or_absent_transformers_is_one_line(models, monkeypatch, version, text):
    import sys

    import transformers

    if version:
        monkeypatch.setattr(transformers, "__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=text):
        sam2.load(OPTIONS, **arguments("sam2", models))


def test_a_device_that_is_not_there_is_one_line(models):
    with pytest.raises(UserError, match="--device"):
        sam2.load(OPTIONS, **arguments("sam2", models, device="toaster"))
