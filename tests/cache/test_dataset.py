"""The trainer's dataset file is read as the trainer reads it, our keys from every place they may stand, faults in one line."""

from __future__ import annotations

import json

import pytest

from masked_loss_triton.cache.dataset import MASK_KEYS, load_datasets, refuse_slips, without_mask_keys
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.items import bucket_size, find_caches, find_sources
from masked_loss_triton.errors import UserError
from tests.support.trainer_geometry import STORED


def write(tmp_path, text, name="d.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


IMAGES = 'image_directory = "pictures"\nresolution = [64, 64]\n'


def test_defaults_are_the_trainers(tmp_path):
    (dataset,) = load_datasets(write(tmp_path, '[[datasets]]\nimage_directory = "pictures"\n'))
    assert dataset.resolution == (960, 544)
    assert not dataset.enable_bucket
    assert str(dataset.cache_directory) == "pictures"
    assert not dataset.has_mask_source
    (video,) = load_datasets(write(tmp_path, '[[datasets]]\nvideo_directory = "clips"\nresolution = 512\n'))
    assert video.is_video
    assert video.enable_bucket, "clips always go to buckets"
    assert video.resolution == (512, 512)


def test_keys_are_taken_from_the_most_particular_place(tmp_path):
    first = write(
        tmp_path,
        "[general]\nmask_dilate = 1\nmask_blur = 0.001\nmask_seed = 1\nrequire_mask = true\nmask_time = 'max'\n"
        f"[[datasets]]\n{IMAGES}mask_dilate = 2\nmask_blur = 0.002\nmask_seed = 2\n",
    )
    second = write(tmp_path, "[general]\nmask_seed = 9\nalpha_mask = true\n[[datasets]]\nmask_blur = 0.003\n", "m.toml")
    (dataset,) = load_datasets(first, second, {"mask_dilate": 5, "mask_blur": None})
    operations = dataset.operations
    assert (operations.mask_dilate, operations.mask_blur, operations.mask_seed) == (5, 0.003, 2)
    assert operations.mask_time == "max"
    assert dataset.alpha_mask
    assert dataset.require_mask


def test_the_trainer_gets_its_file_without_our_keys(tmp_path):
    ours = "alpha_mask = true\nmask_directory = 'm'\nmask_dilate = 1\nrequire_mask = true\n"
    path = write(tmp_path, f"[general]\nbatch_size = 2\n{ours}[[datasets]]\n{IMAGES}{ours}")
    stripped = without_mask_keys(path)
    assert stripped == {
        "general": {"batch_size": 2},
        "datasets": [{"image_directory": "pictures", "resolution": [64, 64]}],
    }
    assert set(load_datasets(path)[0].__dataclass_fields__) > {"alpha_mask", "mask_directory", "require_mask"}
    assert "mask_bake_gamma" in MASK_KEYS


def test_json_is_read_too(tmp_path):
    path = write(tmp_path, json.dumps({"datasets": [{"image_directory": "x", "alpha_mask": True}]}), "d.json")
    assert load_datasets(path)[0].alpha_mask


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "has no [[datasets]]"),
        ("datasets = 3", "datasets must be a list of tables"),
        ("general = 3\n", "must hold [general] and [[datasets]]"),
        ("x = [", "is not valid"),
        ("[[datasets]]\nresolution = [64, 64]\n", "no image_directory"),
        ("[[datasets]]\nimage_jsonl_file = 'x.jsonl'\n", "no cache_directory"),
        (f"[[datasets]]\n{IMAGES}enable_bucket = 1\n", "enable_bucket must be true or false, got 1"),
        (f"[[datasets]]\n{IMAGES}alpha_mask = 'yes'\n", "alpha_mask must be true or false"),
        (f"[[datasets]]\n{IMAGES}mask_directory = 3\n", "mask_directory must be text"),
        (f"[[datasets]]\n{IMAGES}mask_directory = 'pictures'\n", "is the folder pictures itself"),
        (f"[[datasets]]\n{IMAGES}mask_dilate = 0.5\n", "mask_dilate must be a whole number"),
        (f"[[datasets]]\n{IMAGES}mask_blur = 2\n", "mask_blur must be a number between 0 and 0.05"),
        (f"[[datasets]]\n{IMAGES}default_mask = 'no.png'\n", "default_mask no.png is not a file"),
        (f"[[datasets]]\n{IMAGES}[[datasets]]\n{IMAGES}", "two datasets share a cache_directory"),
        *(
            (f"[[datasets]]\nimage_directory = 'x'\nresolution = {size}\n", "each 16 to 16384 pixels")
            for size in ("[0, 64]", "1", "true", "[1, 1]", "100000000", "[64, 1e3]", "[64]", "'64'")
        ),
        ("[[datasets]]\nvideo_directory = 'x'\nsource_fps = '30'\n", "source_fps must be a number"),
        *(
            (f"[[datasets]]\nvideo_directory = 'x'\nsource_fps = {rate}\n", "source_fps must be between 0.01 and 1000")
            for rate in ("0", "inf", "nan", "1e300", "1e-300", "-24")
        ),
        (f"[[datasets]]\n{IMAGES}mask_dialte = 8\n", "unknown key 'mask_dialte': did you mean 'mask_dilate'?"),
        (f"[[datasets]]\n{IMAGES}mask-dilate = 8\n", "did you mean 'mask_dilate'?"),
        (f"[general]\nrequire_masks = true\n[[datasets]]\n{IMAGES}", "did you mean 'require_mask'?"),
        (f"[[datasets]]\n{IMAGES}alpha_maks = true\n", "did you mean 'alpha_mask'?"),
        (f"[[datasets]]\n{IMAGES}masks = 'm'\n", "unknown key 'masks'; known are alpha_mask, mask_directory"),
        (f"mask_dilate = 8\n[[datasets]]\n{IMAGES}", "'mask_dilate' stands outside [general] and [[datasets]]"),
        (f"[[datasets]]\n{IMAGES}mask_directory = 'a\\u0000b'\n".replace("'", '"'), "is no path"),
        (f"x = {'[' * 5000}{']' * 5000}\n", "nested too deep"),
    ],
)
def test_a_fault_gives_one_line_and_status_2(tmp_path, text, line):
    with pytest.raises(UserError) as caught:
        load_datasets(write(tmp_path, text))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


# Every key of musubi-tuner 0.3.4's schema, and those of forks that speak of masks.
TRAINERS_KEYS = """caption_extension batch_size num_repeats resolution enable_bucket bucket_no_upscale image_directory
image_jsonl_file cache_directory control_directory multiple_target fp_latent_window_size fp_1f_clean_indices
fp_1f_target_index fp_1f_no_post no_resize_control control_resolution video_directory video_jsonl_file target_frames
frame_extraction frame_stride frame_sample max_frames source_fps debug_dataset flux_kontext_no_resize_control
qwen_image_edit_control_resolution num_timestep_buckets watermark_mask_suffix loss_mask_directory"""


def test_the_trainers_own_keys_pass():
    refuse_slips("d.toml", dict.fromkeys([*TRAINERS_KEYS.split(), *MASK_KEYS]), MASK_KEYS)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (dataset,) = load_datasets(write(tmp_path, f"\ufeff[[datasets]]\n{IMAGES}"))
    assert dataset.resolution == (64, 64)


def listing(tmp_path, lines):
    path = tmp_path / "items.jsonl"
    path.write_text(lines, encoding="utf-8")
    text = f"[[datasets]]\nimage_jsonl_file = '{path}'\ncache_directory = 'c'\nresolution = 64\n"
    return find_sources(load_datasets(write(tmp_path, text))[0])


def test_lines_may_be_empty_and_begin_with_a_byte_order_mark(tmp_path):
    sources = listing(
        tmp_path, '\ufeff{"image_path": "a/b.png", "mask_path": "m.png"}\n\n{"image_path_0": "c.png"}\n\n'
    )
    assert sorted(sources) == ["b", "c"]
    assert str(sources["b"].mask) == "m.png"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("3", "must be an object"),
        ('{"caption": "x"}', "image_path must be a path, got None"),
        ('{"image_path": 3}', "image_path must be a path, got 3"),
        ('{"image_path": "a.png", "mask_path": "a\\u0000b"}', "mask_path must be a path"),
        ('{"image_path": "a.png", "mask_path": "\\ud800"}', "mask_path must be a path"),
        ('{"image_path": "a.png", "mask_paht": "m"}', "did you mean 'mask_path'?"),
    ],
)
def test_a_faulty_line_is_named_by_its_number(tmp_path, line, said):
    with pytest.raises(UserError, match=r"items\.jsonl, line 3: ") as caught:
        listing(tmp_path, '{"image_path": "a.png"}\n\n' + line + "\n")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_faults_of_the_second_file(tmp_path):
    first = write(tmp_path, f"[[datasets]]\n{IMAGES}")
    for text, line in (
        ("[[datasets]]\n[[datasets]]\n", "has 2 [[datasets]] and"),
        ("[general]\nmask_dialte = 3\n", "unknown key 'mask_dialte': did you mean 'mask_dilate'?"),
        ("[[datasets]]\nimage_directory = 'x'\n", "unknown key 'image_directory'"),
    ):
        with pytest.raises(UserError) as caught:
            load_datasets(first, write(tmp_path, text, "m.toml"))
        assert line in str(caught.value)
    for path in (tmp_path / "absent.toml", tmp_path, write(tmp_path, "x", "d.yaml")):
        with pytest.raises(UserError):
            load_datasets(path)


@pytest.mark.parametrize("case", STORED["buckets"], ids=lambda case: str(case["resolution"]))
def test_buckets_are_those_the_trainer_gave(tmp_path, case):
    text = f"[[datasets]]\nimage_directory = 'x'\nresolution = {case['resolution']}\n"
    text += f"enable_bucket = {str(case['enable']).lower()}\nbucket_no_upscale = {str(case['no_upscale']).lower()}\n"
    (dataset,) = load_datasets(write(tmp_path, text))
    chosen = [list(bucket_size(tuple(size), dataset, FAMILIES["wan"])) for size in STORED["sizes"]]
    assert chosen == case["buckets"]


def test_pictures_and_caches_are_listed_as_the_trainer_lists_them(tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    cache.mkdir()
    for name in ("a.png", "a.txt", "b.PNG", "b.txt", "no_caption.png", "c.tif", "c.txt", "d_0.v1.jpg", "d_0.v1.txt"):
        (images / name).touch()
    names = [
        "a_0010x0020_wan.safetensors",
        "d_0.v1_12345x0020_wan.safetensors",
        "a_wan_te.safetensors",
        "a_0010x0020_hv.safetensors",
        ".a_0010x0020_wan.safetensors.77.masktmp",
        "gone_0010x0020_wan.safetensors",
    ]
    for name in names:
        (cache / name).touch()
    text = f"[general]\ncaption_extension = '.txt'\n[[datasets]]\nimage_directory = '{images}'\n"
    (dataset,) = load_datasets(write(tmp_path, text + f"cache_directory = '{cache}'\n"))
    sources = find_sources(dataset)
    assert sorted(sources) == ["a", "b", "d_0.v1"]
    items = find_caches(dataset, FAMILIES["wan"], sources)
    assert [(item.stem, item.size) for item in items] == [
        ("a", (10, 20)),
        ("d_0.v1", (12345, 20)),
        ("gone", (10, 20)),
    ]
    assert items[0].source is sources["a"]
    assert items[2].source is None


def test_windows_of_clips_come_from_the_names(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("my_clip_00004-009_0128x0128_hv.safetensors", "my_clip_0128x0128_hv.safetensors"):
        (cache / name).touch()
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "my_clip.mp4").touch()
    text = f"[[datasets]]\nvideo_directory = '{tmp_path}/clips'\ncache_directory = '{cache}'\n"
    (dataset,) = load_datasets(write(tmp_path, text))
    (item,) = find_caches(dataset, FAMILIES["hv"], find_sources(dataset))
    assert (item.stem, item.window, item.size) == ("my_clip", (4, 9), (128, 128))
    assert item.source is not None
