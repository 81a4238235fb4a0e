"""Tiny Florence-2 and SAM 2 with random weights and their real processors, in folders as the hub has them. No network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers

SPECIAL = ["<od>", "</od>", "<ocr>", "</ocr>", "<loc_{}>", "<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>"]
SPECIAL += [
    "<grounding>",
    "</grounding>",
    "<seg>",
    "</seg>",
    "<sep>",
    "<region_cap>",
    "</region_cap>",
    "<poly>",
    "</poly>",
]
PARSERS = ["ocr", "phrase_grounding", "pure_text", "description_with_bboxes", "description_with_polygons", "polygons"]
PARSERS += ["bboxes", "description_with_bboxes_or_polygons"]

TRAINED_SAM2 = Path(__file__).parent / "trained_sam2.safetensors"
TRAINED_FLORENCE2 = Path(__file__).parent / "trained_florence2.safetensors"
TRAINED_SIDE = 128  # of its pictures, pixels


def save_weights(model, file: Path) -> None:
    """Writes the weights of a tiny model in half precision."""
    from safetensors.torch import save_file

    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, file)


def trained_sam2(folder: Path) -> Path:
    """A SAM 2 that was trained on shapes, see `train_sam2.py`."""
    from safetensors.torch import load_file
    from transformers import Sam2VideoModel

    model = Sam2VideoModel.from_pretrained(sam2(folder, single=True))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(TRAINED_SAM2).items()})
    model.save_pretrained(folder)
    return folder


def tokenizer(folder: Path):
    """A BART tokenizer whose words are bytes, with Florence-2's location tokens and marks."""
    from transformers import BartTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = []
    for token in SPECIAL:
        special += [token.format(i) for i in range(1000)] if "{" in token else [token]
    result = BartTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": "<image>"})
    result.add_tokens(special, special_tokens=True)
    return result


def florence2(folder: Path, lessons: list[tuple[np.ndarray, str, str]] = (), steps: int = 200) -> Path:
    """A Florence-2 of 64 x 64 pixels: a picture is four tokens and one more for all of it.

    Random weights answer nothing, so it learns a few lessons by heart: picture, task with words, answer.
    """
    model, processor = new_florence2(folder, 64, [16, 16, 16, 16], 32)
    if lessons:
        learn(model.eval(), processor, lessons, steps)
    return save_florence2(model, processor, folder)


def wider_florence2(folder: Path) -> Path:
    """One that is large enough to be trained, see `train_florence2.py`: a picture is sixteen tokens and one more."""
    return save_florence2(*new_florence2(folder, TRAINED_SIDE, [16, 32, 48, 64], 64), folder)


def trained_florence2(folder: Path) -> Path:
    """The same, trained on shapes."""
    from safetensors.torch import load_file
    from transformers import Florence2ForConditionalGeneration

    model = Florence2ForConditionalGeneration.from_pretrained(wider_florence2(folder))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(TRAINED_FLORENCE2).items()})
    model.save_pretrained(folder)
    return folder


def save_florence2(model, processor, folder: Path) -> Path:
    """Saves both as the hub has them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def new_florence2(folder: Path, side: int, widths: list[int], width: int):
    """Model and processor, with random weights. `widths` are of the four stages that see, `width` of the text."""
    from transformers import CLIPImageProcessor, Florence2Config, Florence2ForConditionalGeneration, Florence2Processor

    words = tokenizer(folder / "words")
    pixels = CLIPImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
    pixels.image_seq_length = (side // 32) ** 2 + 1
    processor = Florence2Processor(
        image_processor=pixels, tokenizer=words, post_processor_config={name: {} for name in PARSERS}
    )
    vision = {
        "depths": [1, 1, 1, 1],
        "embed_dim": widths,
        "num_heads": [2, 2, 2, 2],
        "num_groups": [2, 2, 2, 2],
        "window_size": 4,
        "projection_dim": width,
    }
    text = {
        "model_type": "bart",
        "vocab_size": len(words),
        "d_model": width,
        **dict.fromkeys(["encoder_layers", "decoder_layers"], 1),
        **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 2),
        **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim"], width),
        "max_position_embeddings": 1024,
        "forced_eos_token_id": None,
    }
    torch.manual_seed(5)
    config = Florence2Config(vision_config=vision, text_config=text, image_token_id=words.image_token_id)
    return Florence2ForConditionalGeneration(config), processor


def learn(model, processor, lessons, steps: int) -> None:
    pictures, prompts, answers = map(list, zip(*lessons, strict=True))
    inputs = processor(text=prompts, images=pictures, padding=True, return_tensors="pt")
    labels = processor.tokenizer([f"<s>{one}</s>" for one in answers], padding=True, add_special_tokens=False)
    labels = torch.tensor(labels["input_ids"])
    start = torch.full((len(labels), 1), model.config.text_config.decoder_start_token_id)
    inputs["decoder_input_ids"] = torch.cat([start, labels[:, :-1]], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    for _ in range(steps):
        logits = model(**inputs).logits
        padding = processor.tokenizer.pad_token_id
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=padding)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert loss.item() < 0.02, f"the tiny model has not learned its lessons: {loss.item()}"


def sam2(folder: Path, single: bool = False) -> Path:
    """A SAM 2 of 64 x 64 pixels. Saved as the video model, like Meta's repositories, which serve pictures as well.

    With `single` it has one answer to everything, as the trained one was trained, and not three to choose from.
    """
    import transformers
    from transformers import Sam2VideoConfig, Sam2VideoModel, Sam2VideoProcessor, Sam2VideoVideoProcessor

    side = 64
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [side, side],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads": 1,
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [4, 4, 4, 4],
        "window_positional_embedding_background_size": [4, 4],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[side // 4] * 2, [side // 8] * 2, [side // 16] * 2],
        "fpn_hidden_size": 128,
    }
    config = Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 128, "image_size": side},
        mask_decoder_config={"hidden_size": 128, "iou_head_hidden_dim": 32, "mlp_dim": 32, "num_attention_heads": 2},
        image_size=side,
        memory_attention_hidden_size=128,
        memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[side // 16] * 2,
        memory_encoder_hidden_size=128,
        memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128,
        memory_fuser_num_layers=1,
        memory_fuser_embed_dim=128,
        memory_fuser_intermediate_dim=32,
    )
    if single:
        config.multimask_output_in_sam = config.mask_decoder_config.dynamic_multimask_via_stability = False
    torch.manual_seed(7)
    model = Sam2VideoModel(config)
    # Real weights have one embedding of places, for prompts and pictures; with two, a box says nothing about where it is.
    places = model.shared_image_embedding.positional_embedding
    model.prompt_encoder.shared_embedding.positional_embedding.copy_(places)
    model.save_pretrained(folder)
    # Until transformers 4 it had this name.
    pixels = getattr(transformers, "Sam2ImageProcessor", None) or transformers.Sam2ImageProcessorFast
    size = {"height": side, "width": side}
    mask_size = {"height": side // 4, "width": side // 4}
    Sam2VideoProcessor(
        image_processor=pixels(size=size, mask_size=mask_size),
        video_processor=Sam2VideoVideoProcessor(size=size),
        target_size=side,
    ).save_pretrained(folder)
    return folder
