"""Inference with the text encoders and the conditioner of a DiffMoE text-to-image model in diffusers.

This file needs torch, diffusers and transformers only. It was exported by diffmoe-ds together with the weights next to
it. The text encoders are not in the folder: ``config.json`` names their folders or hub IDs, and they are loaded for the
first prompt. To load one from elsewhere, change its ``name`` there.

Legend: B prompts, L maximum tokens, l tokens of the longest prompt, F width of a token, P width of the pooled vector,
D width, W width of a context, N values of a row of features.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

T5_MODELS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
CLIP_MODELS = ("clip", "clip_text_model")
DECODERS = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""Models whose last token is the pooled vector; except for CLIP, that of others is the mean of the tokens."""
MAX_FP16 = 65504.0
NULL_TOLERANCE = 0.05
"""Largest accepted error of the features of the empty prompt, relative to their largest value; machines differ."""


class TextEncoder:
    """A text encoder of transformers, as diffmoe-ds uses it."""

    def __init__(self, name: str, tokens: int) -> None:
        """Load it.

        Args:
            name: folder or hub ID.
            tokens: maximum tokens L of a prompt; the rest is ignored.
        """
        import transformers

        config = transformers.AutoConfig.from_pretrained(name)
        self.kind, self.tokens = config.model_type, tokens
        model_class = getattr(transformers, T5_MODELS.get(self.kind, "AutoModel"))
        if self.kind in CLIP_MODELS:
            plain = getattr(config, "architectures", None) == ["CLIPTextModel"]
            model_class = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
        self.model = model_class.from_pretrained(name, use_safetensors=True, dtype=torch.float32).eval()
        try:
            self.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(name)
        except (OSError, ValueError):  # no tokenizer.json, parts of which AutoTokenizer may rebuild
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        self.tokenizer.truncation_side = "right"

    def encode(self, prompt: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the pooled vector [P] and the tokens [l, F] of a prompt, fp16."""
        ids = self.tokenizer(prompt if prompt.strip() else "", truncation=True, max_length=self.tokens)["input_ids"]
        end, padding = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id or 0
        ids_1l = torch.tensor([ids or [padding if end is None else end]], device=device)
        found = self.model.to(device)(input_ids=ids_1l, attention_mask=torch.ones_like(ids_1l))
        tokens_lF = found.last_hidden_state[0]
        if self.kind in CLIP_MODELS:
            projected = getattr(found, "text_embeds", None)
            pooled_P = (found.pooler_output if projected is None else projected)[0]
        else:
            pooled_P = tokens_lF[-1] if self.kind in DECODERS else tokens_lF.mean(0)
        return pooled_P.clamp(-MAX_FP16, MAX_FP16).half(), tokens_lF.clamp(-MAX_FP16, MAX_FP16).half()


class DiffMoETextConditioner(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is untyped
    """Turns prompts into what `DiffMoETransformer2DModel` reads."""

    null_row: Tensor
    """[N]: the features of the empty prompt, the null condition of guidance."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, width: int, context_width: int, encoders: list[dict[str, Any]]) -> None:
        """Allocate the weights; the arguments are the keys of ``config.json``."""
        super().__init__()
        self.pooled_proj = nn.Sequential(
            nn.Linear(sum(e["pooled"] for e in encoders), width), nn.SiLU(), nn.Linear(width, width)
        )
        self.token_projs = nn.ModuleList(nn.Linear(e["width"], context_width) for e in encoders)
        values = sum(1 + e["pooled"] + e["tokens"] * e["width"] for e in encoders)
        self.register_buffer("null_row", torch.empty(values + values % 2))
        self._loaded: list[TextEncoder] = []

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """Return the features of prompts, fp16 rows [B, N]; those of empty prompts are the null condition.

        Raises:
            ValueError: an encoder is not the one that the model was trained with.
        """
        if not self._loaded and any(prompt.strip() for prompt in prompts):
            loaded = [TextEncoder(encoder["name"], encoder["tokens"]) for encoder in self.config.encoders]
            self._check(loaded)
            self._loaded = loaded
        null_N = self.null_row.half()
        return torch.stack([self._row(self._loaded, prompt) if prompt.strip() else null_N for prompt in prompts])

    def _row(self, encoders: list[TextEncoder], prompt: str) -> Tensor:
        parts = []
        for encoder, shape in zip(encoders, self.config.encoders, strict=True):
            pooled_P, tokens_lF = encoder.encode(prompt, self.null_row.device)
            if (len(pooled_P), tokens_lF.shape[1]) != (shape["pooled"], shape["width"]):
                raise ValueError(f"the text encoder {shape['name']} gives features of another width than in training.")
            padding = (shape["tokens"] - len(tokens_lF)) * shape["width"]
            parts += [pooled_P.new_tensor([len(tokens_lF)]), pooled_P, F.pad(tokens_lF.flatten(), (0, padding))]
        row_N = torch.cat(parts)
        return F.pad(row_N, (0, len(self.null_row) - len(row_N)))

    def _check(self, encoders: list[TextEncoder]) -> None:
        """Check that the features of the empty prompt are those from training."""
        difference = (self._row(encoders, "").float() - self.null_row.float()).abs().max()
        if difference > NULL_TOLERANCE * self.null_row.abs().max():
            names = ", ".join(encoder["name"] for encoder in self.config.encoders)
            raise ValueError(f"{names}: not the text encoders, or not the versions, that the model was trained with.")

    def forward(self, rows_BN: Tensor) -> dict[str, Tensor]:
        """Return the arguments of `DiffMoETransformer2DModel.forward` that describe the prompts."""
        dtype, start = self.pooled_proj[0].weight.dtype, 0
        pooled, tokens, valid = [], [], []
        for encoder, project in zip(self.config.encoders, self.token_projs, strict=True):
            L, W, P = encoder["tokens"], encoder["width"], encoder["pooled"]
            length_B1, pooled_BP, tokens_BV = rows_BN[:, start : start + 1 + P + L * W].split([1, P, L * W], dim=1)
            tokens_BLF = tokens_BV.unflatten(1, (L, W)).to(dtype)
            pooled.append(F.layer_norm(pooled_BP.to(dtype), (P,), eps=1e-6))
            tokens.append(project(F.layer_norm(tokens_BLF, (W,), eps=1e-6)))
            valid.append(torch.arange(L, device=rows_BN.device) < length_B1)
            start += 1 + P + L * W
        return {
            "pooled_projections": self.pooled_proj(torch.cat(pooled, dim=1)),
            "encoder_hidden_states": torch.cat(tokens, dim=1),
            "encoder_attention_mask": torch.cat(valid, dim=1),
        }
