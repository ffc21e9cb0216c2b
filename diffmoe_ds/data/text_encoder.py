"""Text encoders from transformers: T5, CLIP, decoders such as Gemma and Qwen, and sentence encoders such as MiniLM.

They are read from a folder or the Hugging Face hub, from safetensors only, and compute in fp32. Prompts of a batch are
padded on the right and masked, so the features of a prompt depend on its batch by rounding at most.

Legend: B prompts, L maximum tokens, l tokens of the longest prompt of a batch, F width of a token, P width of the
pooled vector.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffmoe_ds.control_files import MAX_BYTES, read_json
from diffmoe_ds.data.minilm import MINILM, minilm_folder
from diffmoe_ds.data.pretrained import (
    HUB_FILES,
    LOCAL,
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    check_all_loaded,
    check_size,
    load_tokenizer,
    load_transformers,
    model_folder,
    quiet_loading,
    read_config,
)
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.files import expand_user, sha256_of
from diffmoe_ds.precision import full_fp32
from diffmoe_ds.text import counted, reason, shortened
from diffmoe_ds.text_features import (
    MAX_CAPTION_BYTES,
    Caption,
    EncoderFeatures,
    EncoderInfo,
    TextFormat,
    encode_record,
)
from diffmoe_ds.text_layout import MAX_ENCODERS, MAX_TOKENS

NEED = "a text encoder"
T5_MODELS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
CLIP_MODELS = ("clip", "clip_text_model")
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
SENTENCE_MODELS = ("bert", "distilbert", "modernbert", "mpnet", "roberta", "xlm-roberta")
OFFSET_POSITIONS = ("mpnet", "roberta", "xlm-roberta")
"""Models that number positions from the padding token's ID + 1."""
CLIP_TOKENS, DEFAULT_TOKENS = 77, 128
MAX_FP16 = float(np.finfo(np.float16).max)


class TextEncoders:
    """One or more text encoders, whose features are used together.

    Attributes:
        format: the encoders, and their features for the empty prompt.
        device: where they run.
    """

    def __init__(
        self, paths: Sequence[str], device: torch.device, tokens: int | None = None, each: Sequence[int] = ()
    ) -> None:
        """Load the encoders.

        Args:
            paths: for each encoder a folder, a name on the hub, or `minilm`.
            device: where to run them.
            tokens: maximum tokens L of a prompt; an encoder that reads fewer truncates to its own limit. By
                default 77 for CLIP and 128 for others, or the encoder's limit if it is lower.
            each: the same for each encoder, in place of ``tokens``.

        Raises:
            ConfigError: one cannot be loaded, or ``tokens`` exceeds the limit of all of them, or leaves no token of a
                prompt beside an encoder's special tokens.
        """
        if not 1 <= len(paths) <= MAX_ENCODERS:
            raise ConfigError(f"expected 1 to {MAX_ENCODERS} text encoders, got {len(paths)}.")
        self.device = device
        counts: Sequence[int | None] = each or [tokens] * len(paths)
        self._encoders = [_Encoder(path, device, count) for path, count in zip(paths, counts, strict=True)]
        least = max(encoder.special_tokens for encoder in self._encoders) + 1
        limit = max(encoder.limit for encoder in self._encoders)
        if tokens is not None and not least <= tokens <= limit:
            names = " and ".join(paths)
            raise ConfigError(
                f"the number of tokens must be from {least} to {limit}, the limits of {names}, got {tokens}."
            )
        self._null = tuple(encoder.encode([""])[0] for encoder in self._encoders)
        pairs = zip(self._encoders, self._null, strict=True)
        infos = [
            EncoderInfo(encoder.tokens, found.tokens.shape[1], len(found.pooled), encoder.name, encoder.sha256)
            for encoder, found in pairs
        ]
        self.format = TextFormat(tuple(infos), encode_record(Caption("", self._null)))

    def encode(self, prompts: Sequence[str]) -> list[Caption]:
        """Return the features of prompts, which are encoded as one batch.

        Args:
            prompts: the prompts. Those longer than L tokens are truncated. Empty and blank ones have exactly the
                features of the empty prompt.

        Raises:
            DataError: a prompt is not valid Unicode or is too long to be stored, or its features are NaN or Inf.
        """
        for prompt in prompts:
            _check_prompt(prompt)
        texts = [prompt for prompt in prompts if prompt.strip()]
        columns = [encoder.encode(texts) if texts else [] for encoder in self._encoders]
        rows = iter(zip(*columns, strict=True))
        return [Caption(prompt, next(rows) if prompt.strip() else self._null) for prompt in prompts]

    def too_long(self, prompt: str) -> str | None:
        """Return a sentence if a prompt has more tokens than an encoder reads, which ignores the rest."""
        for encoder in self._encoders:
            if (count := encoder.count(prompt)) > encoder.tokens:
                return (
                    f"the prompt {shortened(prompt)!r} has {count} tokens, but the text encoder {encoder.name} reads "
                    f"{encoder.tokens} and ignores the rest"
                )
        return None

    def truncation(self, prompts: Sequence[str]) -> str | None:
        """Return a sentence about the prompts that are `too_long`; None if there are none."""
        found = [warning for warning in map(self.too_long, prompts) if warning is not None]
        more = f" (and {counted(len(found) - 1, 'other prompt')})" if len(found) > 1 else ""
        return f"{found[0]}{more}" if found else None


class _Encoder:
    """One encoder with its tokenizer."""

    def __init__(self, path: str, device: torch.device, tokens: int | None) -> None:
        folder = _folder(path)
        self.name = str(folder) if path != MINILM and expand_user(path).is_dir() else path
        try:
            weights = _weights(folder)
            self._kind, self._model = _load(folder, sum(file.stat().st_size for file in weights))
            self._tokenizer = load_tokenizer(folder, self._model)
            self._model.to(device)
            usual = CLIP_TOKENS if self._kind in CLIP_MODELS else DEFAULT_TOKENS
            self.limit = _limit(self._kind, self._model.config, self._tokenizer)
            self.tokens = min(self.limit, usual if tokens is None else tokens)
            self.sha256 = _sha256(folder, weights, self.tokens)
        except Exception as error:  # transformers, tokenizers and safetensors raise many types
            why = " ".join(reason(error).split())[:300]
            raise ConfigError(f"the text encoder {path} cannot be loaded: {why}.") from None
        self._device = device

    def count(self, prompt: str) -> int:
        """Return the number of tokens of a prompt before truncation."""
        return len(self._tokenizer(prompt, verbose=False)["input_ids"])

    @property
    def special_tokens(self) -> int:
        """Return the number of tokens that are added to every prompt."""
        return int(self._tokenizer.num_special_tokens_to_add())

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str]) -> list[EncoderFeatures]:
        """Return the features of one or more prompts."""
        found = self._tokenizer(list(prompts), truncation=True, max_length=self.tokens)["input_ids"]
        # A tokenizer without special tokens has none for the empty prompt.
        rows = [torch.tensor(ids or [self._filler]) for ids in found]
        lengths = [len(row) for row in rows]
        ids_Bl = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._padding)
        mask_Bl = torch.arange(ids_Bl.shape[1]) < torch.tensor(lengths)[:, None]
        with full_fp32():
            tokens_BlF, pooled_BP = self._features(ids_Bl.to(self._device), mask_Bl.to(self._device))
        tokens, pooled = tokens_BlF.float().cpu().numpy(), pooled_BP.float().cpu().numpy()
        rows_of = zip(prompts, pooled, tokens, lengths, strict=True)
        return [
            EncoderFeatures(self._stored(prompt, one), self._stored(prompt, row[:length]))
            for prompt, one, row, length in rows_of
        ]

    @property
    def _padding(self) -> int:
        return self._tokenizer.pad_token_id or 0

    @property
    def _filler(self) -> int:
        end = self._tokenizer.eos_token_id
        return self._padding if end is None else end

    def _features(self, ids_Bl: Tensor, mask_Bl: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tokens [B, l, F] and the pooled vectors [B, P]."""
        found = self._model(input_ids=ids_Bl, attention_mask=mask_Bl.long())
        tokens_BlF = found.last_hidden_state
        if self._kind in CLIP_MODELS:
            projected = getattr(found, "text_embeds", None)
            return tokens_BlF, found.pooler_output if projected is None else projected
        lengths_B = mask_Bl.sum(1)
        if self._kind in DECODERS:
            return tokens_BlF, tokens_BlF[torch.arange(len(tokens_BlF)), lengths_B - 1]
        return tokens_BlF, (tokens_BlF * mask_Bl[..., None]).sum(1) / lengths_B[:, None]

    def _stored(self, prompt: str, values: np.ndarray) -> np.ndarray:
        """Return features in fp16; finite ones beyond its range are clipped to it."""
        if not np.isfinite(values).all():
            raise DataError(f"the text encoder {self.name} gives NaN or Inf for the prompt {shortened(prompt)!r}")
        return values.clip(-MAX_FP16, MAX_FP16).astype(np.float16)


def _check_prompt(prompt: str) -> None:
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError:
        raise DataError(f"the prompt {shortened(prompt)!r} is not valid Unicode") from None
    if size > MAX_CAPTION_BYTES:
        raise DataError(
            f"the prompt {shortened(prompt)!r} has {size:,} bytes in UTF-8; the limit is {MAX_CAPTION_BYTES:,}"
        )


def _folder(path: str) -> Path:
    """Return the folder of an encoder; one on the hub is downloaded."""
    load_transformers(NEED)
    if path == MINILM:
        return minilm_folder()
    return model_folder(path, "the text encoder", HUB_FILES, f"nor {MINILM}")


def _weights(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads.

    Raises:
        OSError: the index of the files cannot be read.
        ValueError: there are none, or the index is invalid.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / WEIGHTS_INDEX).is_file():
        raise ValueError(f"{folder} has no {WEIGHTS}; other weights, such as pytorch_model.bin, are never read")
    tree = read_json(folder / WEIGHTS_INDEX, MAX_BYTES)
    table = tree.get("weight_map") if isinstance(tree, dict) else None
    names = sorted(set(map(str, table.values()))) if isinstance(table, dict) else []
    if not names or any("/" in name or not name.endswith(".safetensors") for name in names):
        raise ValueError(f"{WEIGHTS_INDEX} does not list files named *.safetensors of its folder")
    return [folder / name for name in names]


def _load(folder: Path, stored: int) -> tuple[str, Any]:
    """Return the type of a model, and the model."""
    transformers = load_transformers(NEED)
    tree = read_config(folder)
    kind = tree.get("model_type")
    if kind in CLIP_MODELS:
        # Stable Diffusion's first encoder lacks the projection.
        plain = tree.get("architectures") == ["CLIPTextModel"]
        model_class = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
    elif kind in T5_MODELS:
        model_class = getattr(transformers, T5_MODELS[kind])
    elif kind in (*DECODERS, *SENTENCE_MODELS):
        model_class = transformers.AutoModel
    else:
        known = ", ".join((*T5_MODELS, *CLIP_MODELS, *DECODERS, *SENTENCE_MODELS))
        raise ValueError(f"model_type in config.json must be one of {known}, got {str(kind)[:80]}")
    is_auto = model_class is transformers.AutoModel
    config = (transformers.AutoConfig if is_auto else model_class.config_class).from_pretrained(folder, **LOCAL)
    config.return_dict = True  # otherwise the network returns tuples
    check_size(model_class.from_config if is_auto else model_class, config, stored)
    how = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    with quiet_loading():
        model, info = model_class.from_pretrained(folder, config=config, **how, **LOCAL)
    check_all_loaded(key for key in info["missing_keys"] if not key.startswith("pooler."))  # BERT's, which is not used
    return kind, model.eval().requires_grad_(False)


def _limit(kind: str, config: Any, tokenizer: Any) -> int:
    """Return the largest number of tokens that an encoder reads; T5 has no limit of its own."""
    positions = getattr(config, "max_position_embeddings", MAX_TOKENS)
    if kind in OFFSET_POSITIONS:
        positions -= config.pad_token_id + 1
    limit = min(MAX_TOKENS, int(positions), int(tokenizer.model_max_length))
    if limit < 1:
        raise ValueError(f"it reads at most {limit} tokens")
    return limit


def _sha256(folder: Path, weights: list[Path], tokens: int) -> str:
    """Return the SHA-256 of everything that features depend on: files and settings."""
    present = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    digests = {name: sha256_of(folder / name) for name in present}
    digests |= {path.name: sha256_of(path) for path in weights}
    settings = {"layer": "last", "pooling": 1, "tokens": tokens, "files": digests}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
