"""A tiny CLIP model with random weights, saved as transformers saves it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from tests.helpers.encoders import HEADS, SHAPE, tokenizer

SIZE = 16
TOKENS = 8


def save_clip(folder: Path) -> Path:
    """Write the folder of a model that reads images of 16x16 pixels and 8 tokens."""
    text = {
        **SHAPE,
        **HEADS,
        "max_position_embeddings": TOKENS,
        "eos_token_id": 1,
        "bos_token_id": 0,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "image_size": SIZE, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config={**vision, **HEADS}, projection_dim=12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    ).save_pretrained(folder)
    return folder
