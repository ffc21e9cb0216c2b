"""DINOv2 (arXiv 2304.07193) from a folder in Hugging Face format, without or with registers.

Legend: B images, C channels, H, W height and width, S tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.data.pretrained import LOCAL, check_all_loaded, check_size, read_config, resize, to_rgb

INPUT_SIZE = 224
MODELS = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}
"""Class of each ``model_type``."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the RGB channels of the images that it was trained on, in [0, 1]."""


class DINOv2:
    """The frozen network.

    Attributes:
        network: the model of transformers, fp32, in eval mode.
        prefix: number of tokens before those of the patches: CLS and the registers.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the weights from safetensors; nothing is downloaded or unpickled.

        Raises:
            ImportError: transformers is not installed.
            Exception: the network cannot be loaded; transformers and safetensors raise many types.
        """
        import transformers  # an extra, and slow to import

        kind = read_config(folder).get("model_type")
        if kind not in MODELS:
            raise ValueError(f"the model type in config.json must be {' or '.join(MODELS)}, got {str(kind)[:80]}")
        model_class: Any = getattr(transformers, MODELS[kind])
        config = model_class.config_class.from_pretrained(folder, **LOCAL)
        config.return_dict = True  # otherwise the network returns tuples
        check_size(model_class, config, sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        network, info = model_class.from_pretrained(
            folder, config=config, use_safetensors=True, output_loading_info=True, **LOCAL
        )
        check_all_loaded(info["missing_keys"])
        self.network = network.to(device, torch.float32).eval().requires_grad_(False)
        self.prefix: int = 1 + getattr(config, "num_register_tokens", 0)
        self._device = device
        self._mean, self._std = (torch.tensor(v, device=device).view(1, 3, 1, 1) * 255 for v in (MEAN, STD))

    @torch.inference_mode()
    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """Return the last hidden state, fp32 [B, S, D], of uint8 images, which are resized bicubically to 224x224.

        Raises:
            ValueError, RuntimeError: `config.json` describes other channels, or patches beyond 224.
        """
        pixels = resize(to_rgb(images_BCHW).to(self._device), (INPUT_SIZE, INPUT_SIZE)).float()
        tokens_BSD: Tensor = self.network(pixel_values=(pixels - self._mean) / self._std).last_hidden_state
        return tokens_BSD
