"""Tiny text encoders with random weights, saved as transformers saves them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = ("red", "green", "blue", "apple", "pear", "car", "house", "small", "large", "a", "the", "on", "of", "in")
SPECIAL = ("<pad>", "</s>", "<unk>")
WIDTH = 16


def tokenizer(with_end: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of words, which appends `</s>`; without, the empty prompt has no tokens."""
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_end:
        core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


COUNT = len(SPECIAL) + len(WORDS)
SHAPE = {"vocab_size": COUNT, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2}


def _t5() -> Any:
    config = transformers.T5Config(vocab_size=COUNT, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)  # with the decoder, as published ones are


def _clip(projection: bool) -> Any:
    config = transformers.CLIPTextConfig(
        **SHAPE, **HEADS, projection_dim=12, max_position_embeddings=20, eos_token_id=1, bos_token_id=0, pad_token_id=0
    )
    model_class = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return model_class(config)


def _bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SHAPE, **HEADS, max_position_embeddings=24))


def _decoder(config_class: Any, model_class: Any) -> Any:
    heads = {**HEADS, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64}
    return model_class(config_class(**SHAPE, **heads, eos_token_id=1, pad_token_id=0))


KINDS = {
    "t5": _t5,
    "clip": lambda: _clip(True),
    "clip-plain": lambda: _clip(False),
    "bert": _bert,
    "gemma": lambda: _decoder(transformers.GemmaConfig, transformers.GemmaForCausalLM),
    "qwen2": lambda: _decoder(transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="encoders-")


@functools.cache
def tiny_encoder(kind: str) -> Path:
    """Return the folder of an encoder of a kind, which is made once per process and must not be changed."""
    folder = Path(_folder().name) / kind
    with torch.random.fork_rng():
        torch.manual_seed(sorted(KINDS).index(kind))
        KINDS[kind]().save_pretrained(folder)
    tokenizer(with_end=kind != "qwen2").save_pretrained(folder)
    return folder
