"""A tiny SAM 3 with random weights and its real processors, in a folder as the hub has it. No network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

SIDE, PATCH = 64, 8
WIDTH, NARROW = 128, 32  # the memory of the tracker takes no less than 128
TRAINED = Path(__file__).parent / "trained_sam3.safetensors"


def tokenizer(folder: Path):
    """A CLIP tokenizer whose words are made of letters."""
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*marks, *letters, *(letter + "</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=32)


def config(words: int, end: int, width: int):
    """Of the video model, which has the one for pictures in it."""
    from transformers import Sam3VideoConfig

    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "window_size": SIDE // PATCH // 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": SIDE // 2,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": width,
        "backbone_feature_sizes": [[scale * SIDE // PATCH] * 2 for scale in (4, 2, 1)],
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": width,
        "projection_dim": width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": 0,
        "eos_token_id": end,
    }
    layers = {"hidden_size": width, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": width}
    layers["dropout"] = 0.0
    detector = {
        "model_type": "sam3",
        "vision_config": vision,
        "text_config": text,
        "geometry_encoder_config": layers,
        "detr_encoder_config": layers,
        "detr_decoder_config": {**layers, "num_queries": 6},
        "mask_decoder_config": {"hidden_size": width, "num_attention_heads": 2},
    }
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": width, "image_size": SIDE, "patch_size": PATCH},
        "mask_decoder_config": {
            "hidden_size": width,
            "iou_head_hidden_dim": width,
            "mlp_dim": width,
            "num_attention_heads": 2,
        },
        "image_size": SIDE,
        "memory_attention_hidden_size": width,
        "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": width,
        "memory_attention_rope_feat_sizes": [SIDE // PATCH] * 2,
        "memory_encoder_hidden_size": width,
        "memory_encoder_output_channels": width // 2,
        "mask_downsampler_embed_dim": width,
        "memory_fuser_num_layers": 1,
        "memory_fuser_embed_dim": width,
        "memory_fuser_intermediate_dim": width,
    }
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=4 * SIDE // PATCH)


def save(model, folder: Path, words) -> Path:
    """Saves a model and its processors as the hub has them."""
    from transformers import Sam2VideoVideoProcessor, Sam3ImageProcessor, Sam3Processor, Sam3VideoProcessor

    model.save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    pictures = Sam3ImageProcessor(size=size, mask_size={"height": SIDE // 2, "width": SIDE // 2})
    if model.config.model_type == "sam3":
        Sam3Processor(pictures, words, target_size=SIDE).save_pretrained(folder)
    else:
        Sam3VideoProcessor(pictures, Sam2VideoVideoProcessor(size=size), words, target_size=SIDE).save_pretrained(
            folder
        )
    return folder


def sam3(folder: Path) -> Path:
    """A SAM 3 of 64 x 64 pixels. Saved as the video model, like Meta's repository, which serves pictures as well."""
    from transformers import Sam3VideoModel

    words = tokenizer(folder / "words")
    torch.manual_seed(11)
    return save(Sam3VideoModel(config(len(words), words.eos_token_id, WIDTH)), folder, words)


def pictures_sam3(folder: Path) -> Path:
    """A narrower one for pictures alone, to be trained."""
    from transformers import Sam3Model

    words = tokenizer(folder / "words")
    torch.manual_seed(11)
    return save(Sam3Model(config(len(words), words.eos_token_id, NARROW).detector_config), folder, words)


def trained_sam3(folder: Path) -> Path:
    """The one for pictures, trained on shapes, see `train_sam3.py`."""
    from safetensors.torch import load_file
    from transformers import Sam3Model

    model = Sam3Model.from_pretrained(pictures_sam3(folder))
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(TRAINED).items()})
    model.save_pretrained(folder)
    return folder
