"""Prompts as labels: an image depends on its own prompt alone, and the empty prompt is the null condition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling import prompts as prompts_module
from diffmoe_ds.sampling.capacity import calibrate
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.prompts import PromptSet, set_prompts
from diffmoe_ds.text_features import Caption, EncoderFeatures, EncoderInfo, TextFormat, encode_record
from tests.helpers.sampling import random_model

SHAPES = ((6, 5, 3), (4, 7, 7))
"""Tokens, width and pooled width of two encoders."""


def features_of(prompt: str) -> Caption:
    """Return features that depend on the prompt alone; an empty one has one token."""
    numbers = np.random.default_rng(list(prompt.encode()))
    features = []
    for tokens, width, pooled in SHAPES:
        length = min(tokens, max(1, len(prompt.split())))
        features.append(
            EncoderFeatures(
                numbers.standard_normal(pooled).astype(np.float16),
                numbers.standard_normal((length, width)).astype(np.float16),
            )
        )
    return Caption(prompt, tuple(features))


def encode(prompts: Sequence[str]) -> list[Caption]:
    assert len(prompts) == 1 and prompts[0].strip(), "each prompt is encoded alone, and empty ones are known"
    return [features_of(prompts[0])]


TEXT = TextFormat(
    tuple(EncoderInfo(*shape, name=f"encoder {i}", sha256=f"{i}" * 64) for i, shape in enumerate(SHAPES)),
    encode_record(features_of("")),
)


@pytest.fixture(scope="module")
def model() -> DiT:
    keys = ["model.conditioning=text", f"model.text_encoders={[list(shape) for shape in SHAPES]}"]
    model = random_model(load_config("fashion", ["model.name=nano-E4", "model.patch_size=8", *keys]), TEXT)
    model.set_inference("per_token")
    return model


def images_of(
    model: DiT, prompts: Sequence[str], seeds: Sequence[int], scale: float = 1.0, negative: str = "", **how: object
) -> torch.Tensor:
    """Generate one image per prompt."""
    set_prompts(model, PromptSet(prompts, TEXT, encode, negative))
    labels = torch.arange(len(prompts))
    return generate(model, labels, seeds, SamplingSettings("euler", 2, scale, **how))


def test_rows_of_labels():
    prompts = PromptSet(["a red apple", " ", "cat"], TEXT, encode, "dog")
    rows = prompts.rows([2, 1, 3, 2])
    assert rows.dtype == torch.float16 and rows.shape == (4, TEXT.layout.values) and len(prompts) == 3
    assert torch.equal(rows[0], rows[3]) and not torch.equal(rows[0], rows[2])
    assert np.array_equal(rows[1], TEXT.null_row)
    assert np.array_equal(PromptSet(["cat"], TEXT, encode).rows([1])[0], TEXT.null_row), "the default negative prompt"
    assert torch.equal(PromptSet(["x"], TEXT, encode, "cat").rows([1])[0], rows[0])


def test_features_are_kept_up_to_a_limit(monkeypatch):
    asked: list[str] = []

    def counting(prompts: Sequence[str]) -> list[Caption]:
        asked.extend(prompts)
        return encode(prompts)

    size = sum(array.nbytes for each in features_of("a b").features for array in each)
    monkeypatch.setattr(prompts_module, "CACHE_BYTES", size)
    prompts = PromptSet(["a b", "c d"], TEXT, counting)
    assert asked == [], "encoded when they are needed"
    assert torch.equal(prompts.rows([0, 1]), prompts.rows([0, 1]))
    assert asked == ["a b", "c d", "c d"]


@pytest.mark.parametrize("scale", (1.0, 3.0))
def test_an_image_does_not_depend_on_the_prompts_of_others(model, scale):
    texts = ["a red apple", "cat", "the small blue house on a large hill", ""]
    together = images_of(model, texts, range(4), scale, "grey")
    padded = images_of(model, ["dog", "cat", "x y z", "fish"], range(4), scale, "grey")
    assert torch.equal(together[1], padded[1])
    for index, text in enumerate(texts):
        same_shape = images_of(model, [text] * 4, [index] * 4, scale, "grey")
        assert torch.equal(same_shape[2], together[index])
        alone = images_of(model, [text], [index], scale, "grey")
        assert torch.allclose(alone[0], together[index], atol=1e-5), "other shapes of matrices round differently"
    assert not torch.allclose(*images_of(model, ["cat", "dog"], [0, 0], scale), atol=1e-3)


def test_the_empty_prompt_is_the_null_condition(model):
    """With an empty prompt, both halves of guidance are the same; the model drops captions to the same features."""
    assert torch.allclose(images_of(model, [""], [5]), images_of(model, [" \n"], [5], 7.5), atol=1e-4)
    rows = PromptSet(["cat", ""], TEXT, encode).rows([0, 1])
    dropped = model.y_embedder(rows, torch.tensor([True, False]))
    assert torch.equal(*dropped.vector_BD) and torch.equal(*dropped.context.tokens_BLW)


def test_negative_prompts_change_guided_images_only(model):
    plain, grey = (images_of(model, ["cat"], [0], 3.0, negative) for negative in ("", "grey"))
    assert not torch.allclose(plain, grey, atol=1e-3)
    assert torch.equal(images_of(model, ["cat"], [0], 1.0, "grey"), images_of(model, ["cat"], [0]))
    same = images_of(model, ["cat"], [0], 3.0, "cat")
    assert torch.allclose(same, images_of(model, ["cat"], [0]), atol=1e-4), "away from itself"


def test_guidance_in_an_interval(model):
    all_levels, some, none = (
        images_of(model, ["cat"], [0], scale, guidance_interval=interval)
        for scale, interval in ((3.0, None), (3.0, (0.4, 0.6)), (1.0, None))
    )
    assert not torch.allclose(some, all_levels, atol=1e-3) and not torch.allclose(some, none, atol=1e-3)


def test_capacity_is_calibrated_on_the_prompts(model):
    set_prompts(model, PromptSet(["cat", "dog"], TEXT, encode))
    found = calibrate(model, SamplingSettings("euler", 1, 1.0), 2.0)
    assert abs(found.measured - 2) < 0.2
