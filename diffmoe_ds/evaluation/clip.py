"""CLIP score (Hessel et al., arXiv 2104.08718) by torchmetrics, with a model of transformers.

By itself, torchmetrics 1.9 fails with transformers 5, whose models return embeddings in an object; it accepts only
names of a few publishers, may read pickled weights, and truncates long prompts before the token from which CLIP pools.
Adapters for the model and the processor avoid this.

Legend: B images, C channels, H, W height and width, E width of the embeddings, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe_ds.data.pretrained import (
    HUB_FILES,
    LOCAL,
    check_all_loaded,
    check_size,
    load_tokenizer,
    load_transformers,
    model_folder,
    quiet_loading,
    read_config,
    state_digest,
    to_rgb,
)
from diffmoe_ds.distributed.collectives import all_reduce
from diffmoe_ds.errors import ConfigError, DataError, NonFiniteError
from diffmoe_ds.evaluation.images import Images
from diffmoe_ds.evaluation.outputs import one_line

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
"""Either describes how images are resized and normalized."""


class ClipScore:
    """The mean of 100 times the cosine similarity of images and their prompts, at least 0.

    Attributes:
        name: identifies the model: its folder's name and the checksum of its weights.
    """

    def __init__(self, path: str, device: torch.device) -> None:
        """Load the model from safetensors.

        Args:
            path: a folder with a CLIPModel in Hugging Face format, or a name on the hub.
            device: where to run it.

        Raises:
            ConfigError: the model does not exist, or a library is missing.
            DataError: it cannot be loaded.
        """
        transformers = load_transformers("--clip")
        if not hasattr(transformers, "CLIPImageProcessorPil"):
            raise ConfigError(f"--clip needs transformers 5, found {transformers.__version__}.")
        folder = model_folder(path, "--clip", (*HUB_FILES, *IMAGE_FILES))
        try:
            model = _load(folder, transformers)
            adapters: Any = _Model(model), _Processor(folder, model, transformers)
        except Exception as error:  # transformers, tokenizers and safetensors raise many types
            raise DataError(f"--clip {path}: cannot be loaded: {one_line(error)}.") from None
        from torchmetrics.multimodal import CLIPScore  # imported lazily: torchmetrics takes seconds

        model = model.to(device).eval().requires_grad_(False)
        self.name = f"{path.rstrip('/').rpartition('/')[2]}:{state_digest(model)}"
        self._device = device
        self._metric: Any = CLIPScore(lambda: adapters, sync_on_compute=False).to(device)

    @torch.inference_mode()
    def update(self, images_BCHW: Tensor, prompts: Sequence[str]) -> None:
        """Add images, uint8 [B, 1 or 3, H, W], each with its prompt.

        Raises:
            NonFiniteError: an embedding contains NaN or Inf.
        """
        self._metric.update(list(to_rgb(images_BCHW).to(self._device)), list(prompts))
        if not self._metric.score.isfinite():
            raise NonFiniteError(f"--clip {self.name}: the embedding of an image or a prompt contains NaN or Inf.")

    def compute(self, world: int) -> float:
        """Return the score of the images of all ranks. Every rank must call this.

        Args:
            world: number of ranks.
        """
        if world > 1:
            self._metric.score = all_reduce(self._metric.score.cpu())
            self._metric.n_samples = all_reduce(self._metric.n_samples.cpu())
        return float(self._metric.compute())


class ScoredImages:
    """Images whose CLIP score is computed while they are read for another purpose; implements `Images`."""

    def __init__(self, images: Images, prompts: Sequence[str], clip: ClipScore) -> None:
        """Wrap images.

        Args:
            images: the images.
            prompts: the prompt of each.
            clip: to be updated.
        """
        self._images = images
        self._prompts = prompts
        self._clip = clip
        self.size = images.size

    def __len__(self) -> int:
        return len(self._images)

    @property
    def together(self) -> int:
        """See `Images`."""
        return self._images.together

    def batches(self, start: int, stop: int, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [B, C, H, W], after updating the score.

        Raises:
            DiffMoEError: an image cannot be read, or an embedding contains NaN or Inf.
        """
        for batch_BCHW in self._images.batches(start, stop, batch_size):
            self._clip.update(batch_BCHW, self._prompts[start : start + len(batch_BCHW)])
            start += len(batch_BCHW)
            yield batch_BCHW


def _load(folder: Path, transformers: Any) -> Any:
    """Return the model of a folder.

    Raises:
        ValueError: it is not a CLIP model with weights for both halves.
    """
    tree = read_config(folder)
    if tree.get("model_type") != "clip":
        raise ValueError(f"model_type in config.json must be clip, got {str(tree.get('model_type'))[:80]}")
    config = transformers.CLIPConfig.from_pretrained(folder, **LOCAL)
    config.return_dict = True  # otherwise the network returns tuples
    check_size(transformers.CLIPModel, config, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    with quiet_loading():
        model, info = transformers.CLIPModel.from_pretrained(
            folder, config=config, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **LOCAL
        )
    check_all_loaded(info["missing_keys"])
    return model


class _Model(nn.Module):
    """A CLIP model whose features are tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model
        self.config = model.config

    def get_image_features(self, pixels_BCHW: Tensor) -> Tensor:
        """Return the embeddings of images, [B, E]."""
        features_BE: Tensor = self._model.get_image_features(pixels_BCHW).pooler_output
        return features_BE

    def get_text_features(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the embeddings of prompts, [B, E]."""
        features_BE: Tensor = self._model.get_text_features(ids_BL, mask_BL).pooler_output
        return features_BE


class _Processor:
    """The tokenizer and the image processor of a CLIP model, which resizes with Pillow instead of torchvision."""

    def __init__(self, folder: Path, model: Any, transformers: Any) -> None:
        self._tokenizer = load_tokenizer(folder, model.text_model)
        if not any((folder / name).is_file() for name in IMAGE_FILES):
            raise ValueError(f"{folder} has no {IMAGE_FILES[0]}")
        self._images = transformers.CLIPImageProcessorPil.from_pretrained(folder, **LOCAL)
        self._tokens = model.config.text_config.max_position_embeddings

    def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
        if text is None:
            return self._images(images=images, return_tensors="pt")
        return self._tokenizer(text, truncation=True, max_length=self._tokens, **options)
