"""Generate many images batch by batch, decoded to uint8, without holding more than one batch.

Legend: N images, B images of a batch, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffmoe_ds.errors import NonFiniteError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.fields import Progress
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.grid import Pixels, to_uint8

DECODED_TOGETHER = 4
"""Number of images to decode at once. Decoding one 256x256 image in fp32 takes about 1 GB of activations."""

Decode = Callable[[Tensor], Tensor]
"""A model's output, fp32 [B, C, H, W] -> pixels in about [-1, 1]."""


def generate_batches(
    model: DiT,
    labels_N: Tensor,
    seeds_N: Sequence[int],
    settings: SamplingSettings,
    decode: Decode,
    batch_size: int,
    progress: Progress | None = None,
    guide: DiT | None = None,
) -> Iterator[tuple[int, Pixels]]:
    """Generate one rank's images, in batches of consecutive ones.

    This function communicates only through the model. If ranks share experts, all must generate the same number of
    batches of the same sizes; `turns.deal` arranges that. Because an error may occur on a single rank, callers
    should use `consensus.raise_on_all_ranks` for every batch.

    Args:
        model: in eval mode, in any dtype.
        labels_N: int64 labels.
        seeds_N: one per image; the noise of an image depends on its seed alone.
        settings: sampler and guidance.
        decode: decodes what the model generates; called with at most `DECODED_TOGETHER` images.
        batch_size: images per batch; the last batch may be smaller.
        progress: called after each step of a batch with (steps done, total steps).
        guide: the model of ``settings.autoguidance``; see `generate`.

    Yields:
        The position of the batch's first image in ``seeds_N``, and uint8 [B, H, W, C].

    Raises:
        NonFiniteError: an image contains NaN or Inf.
    """
    device = model.pos_embed.device
    for first in range(0, len(seeds_N), batch_size):
        chosen = slice(first, first + batch_size)
        images_BCHW = generate(model, labels_N[chosen].to(device), seeds_N[chosen], settings, progress, guide)
        yield first, _decode(images_BCHW, decode, settings)


@torch.inference_mode()
def _decode(images_BCHW: Tensor, decode: Decode, settings: SamplingSettings) -> Pixels:
    """Return the decoded images, uint8 [B, H, W, C]."""
    decoded = torch.cat([decode(part) for part in images_BCHW.split(DECODED_TOGETHER)])
    if not decoded.isfinite().all():
        raise NonFiniteError(
            f"the generated images contain NaN or Inf; try a smaller guidance scale than {settings.cfg_scale:g} or an "
            "earlier checkpoint."
        )
    return to_uint8(decoded)
