"""Generate images and record how their tokens are routed, as plain arrays for figures.

With classifier-free guidance, only the conditional pass is counted: the unconditional one has no class or prompt.

Legend: N images, I images with heat maps, B images of a batch, S tokens per image, V noise levels of heat maps, K bins
of the noise level, L MoE layers, E experts, C channels, H, W height and width, R, Q rows and columns of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.model.dit import DiT, DiTOutput
from diffmoe_ds.sampling.fields import Progress
from diffmoe_ds.sampling.generate import SamplingSettings
from diffmoe_ds.sampling.grid import Pixels, to_uint8
from diffmoe_ds.sampling.observer import observing
from diffmoe_ds.sampling.stream import Decode, generate_batches

NOISE_BINS = 10
"""Bins of the noise level, from 0 (clean) to 1 (pure noise)."""
LEVELS = (0.95, 0.75, 0.5, 0.25, 0.05)
"""Noise levels of the heat maps; the nearest sampler step is shown."""

Array = npt.NDArray[Any]


class Images(NamedTuple):
    """The images to generate."""

    label_N: Tensor
    """int64 class labels, or numbers of prompts."""
    seeds: Sequence[int]
    """Seed of each image."""
    heat_maps: int = 0
    """I: number of first images for which the sampler states and the compute per token are recorded."""


@dataclass(frozen=True)
class HeatMaps:
    """Compute per token of a few images."""

    level_IV: Array
    """The noise levels, float32, from noise to clean; equal for all images if they take the same steps."""
    states_IV: tuple[Pixels, ...]
    """The sampler's state at each level: V entries, each uint8 [I, H, W, C]."""
    experts_IVRQ: Array
    """Experts per token, averaged over the MoE layers, float32."""
    mean_IRQ: Array
    """The same averaged over all steps, float32."""


@dataclass(frozen=True)
class Probe:
    """Generated images and the routing of their tokens."""

    label_N: Array
    """int64 class labels, or numbers of prompts."""
    picture_NHWC: Pixels
    """uint8 images."""
    layers: tuple[int, ...] = ()
    """Block index of each MoE layer; for a dense model this is empty and all fields below are None."""
    capacity_NKL: Array | None = None
    """Experts per token of each image by noise level and layer, float64; NaN where the sampler takes no step."""
    tokens_LE: Array | None = None
    """Tokens that each expert took, over all images and steps, int64."""
    taken_LT: Array | None = None
    """Tokens that took 0, 1, ..., E experts, int64 [L, E + 1]."""
    heat_maps: HeatMaps | None = None
    """Heat maps of the first I images."""


@torch.inference_mode()
def probe(
    model: DiT,
    images: Images,
    settings: SamplingSettings,
    decode: Decode,
    batch_size: int,
    progress: Progress | None = None,
    guide: DiT | None = None,
) -> Probe:
    """Generate images and record their routing.

    Args:
        model: in eval mode.
        images: the images.
        settings: sampler and guidance.
        decode: decodes the model's output to pixels in about [-1, 1].
        batch_size: images per batch.
        progress: called after each step of a batch with (steps done, total steps).
        guide: the model of ``settings.autoguidance``; its routing is not recorded.

    Raises:
        NonFiniteError: an image contains NaN or Inf.
    """
    pictures, records = [], []
    with recording(model, images.heat_maps) as recorder:
        batches = generate_batches(model, *images[:2], settings, decode, batch_size, progress, guide)
        for _, picture_BHWC in batches:
            pictures.append(picture_BHWC)
            records.append(recorder.take())
    label_N, picture_NHWC = images.label_N.cpu().numpy(), np.concatenate(pictures)
    if not recorder.layers:
        return Probe(label_N, picture_NHWC)
    return Probe(
        label_N=label_N,
        picture_NHWC=picture_NHWC,
        layers=recorder.layers,
        capacity_NKL=np.concatenate([record.capacity_BKL for record in records]),
        tokens_LE=np.sum([record.tokens_LE for record in records], axis=0),
        taken_LT=np.sum([record.taken_LT for record in records], axis=0),
        heat_maps=_heat_maps([record for record in records if len(record.mean_IS)], decode),
    )


def _heat_maps(records: Sequence[Record], decode: Decode) -> HeatMaps | None:
    """Join the heat maps of batches."""
    if not records:
        return None
    experts_IVS = np.concatenate([record.experts_IVS for record in records])
    side = round(experts_IVS.shape[2] ** 0.5)  # tokens are patches in row-major order
    states = [torch.cat([record.states_V[v] for record in records]) for v in range(len(LEVELS))]
    return HeatMaps(
        level_IV=np.concatenate([record.level_IV for record in records]),
        states_IV=tuple(to_uint8(torch.cat([decode(part) for part in state.split(4)])) for state in states),
        experts_IVRQ=experts_IVS.reshape(*experts_IVS.shape[:2], side, side),
        mean_IRQ=np.concatenate([record.mean_IS for record in records]).reshape(-1, side, side),
    )


class Record(NamedTuple):
    """The routing of one batch."""

    capacity_BKL: Array
    """See `Probe`."""
    tokens_LE: Array
    """See `Probe`."""
    taken_LT: Array
    """See `Probe`."""
    level_IV: Array
    """See `HeatMaps`."""
    states_V: tuple[Tensor, ...]
    """fp32 [I, C, H, W] at each level, for the images of this batch with heat maps."""
    experts_IVS: Array
    """Experts per token at each level."""
    mean_IS: Array
    """Experts per token, averaged over all steps."""


class Recorder:
    """Accumulates the routing of every forward pass, on the model's device until the end of a batch (an `Observer`)."""

    def __init__(self, model: DiT, heat_maps: int) -> None:
        """Start with no batch.

        Args:
            model: the model.
            heat_maps: how many of the first images to keep states and heat maps of.
        """
        self.layers = tuple(model.moe_layers())
        self._model = model
        self._noise_level = make_objective(model.config.objective.kind).noise_level
        self._left = heat_maps
        self.start()

    def start(self) -> None:
        """Start or restart a batch; see `Observer.start`."""
        self._sum_BKL: Tensor | None = None
        self._nearest: list[tuple[Tensor, ...]] = []

    def see_inputs(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Note the state of the sampler; a forward pre-hook of the model."""
        self._x_BCHW = inputs[0]

    def observe(self, t_B: Tensor, y_B: Tensor, output: DiTOutput) -> None:
        """Add a forward pass of the model; see `Observer.observe`."""
        is_cond_B = y_B < self._model.y_embedder.num_labels  # which is the label of the null condition
        if not output.routing or not is_cond_B.any():
            return
        x_BCHW = self._x_BCHW
        mask_LBSE = torch.stack([routing.mask_TE.unflatten(0, (len(y_B), -1)) for routing in output.routing])
        mask_LBSE = mask_LBSE[:, is_cond_B]
        taken_LBS = mask_LBSE.sum(-1)
        level_B = self._noise_level(t_B[is_cond_B]).clamp(0, 1)  # dopri5 may go beyond clean images
        if self._sum_BKL is None:
            self._start(mask_LBSE.shape, x_BCHW.device)
        assert self._sum_BKL is not None
        bins_B = (level_B * NOISE_BINS).long().clamp(0, NOISE_BINS - 1)
        bins_BK = F.one_hot(bins_B, NOISE_BINS).double()
        self._sum_BKL += bins_BK[:, :, None] * taken_LBS.double().mean(2).T[:, None, :]
        self._steps_BK += bins_BK
        self._tokens_LE += mask_LBSE.sum((1, 2))
        self._taken_LT += F.one_hot(taken_LBS.flatten(1), self._taken_LT.shape[1]).sum(1)
        if self._kept:
            kept = slice(self._kept)
            self._keep(x_BCHW[is_cond_B][kept], level_B[kept], taken_LBS[:, kept].float().mean(0))

    def _start(self, shape: torch.Size, device: torch.device) -> None:
        """Allocate the sums of a batch whose masks have the shape [L, B, S, E]."""
        L, B, S, E = shape
        self._sum_BKL = torch.zeros(B, NOISE_BINS, L, dtype=torch.float64, device=device)
        self._steps_BK = torch.zeros(B, NOISE_BINS, dtype=torch.float64, device=device)
        self._tokens_LE = torch.zeros(L, E, dtype=torch.int64, device=device)
        self._taken_LT = torch.zeros(L, E + 1, dtype=torch.int64, device=device)
        self._kept = min(self._left, B)
        self._sum_IS = torch.zeros(self._kept, S, device=device)

    def _keep(self, state_ICHW: Tensor, level_I: Tensor, experts_IS: Tensor) -> None:
        """Keep a step for the heat maps of all levels to which it is the nearest so far, separately for each image."""
        self._sum_IS += experts_IS
        found = level_I, state_ICHW, experts_IS
        if not self._nearest:
            self._nearest = [found] * len(LEVELS)
        for v, wanted in enumerate(LEVELS):
            is_nearer_I = (level_I - wanted).abs() < (self._nearest[v][0] - wanted).abs()
            self._nearest[v] = tuple(
                torch.where(is_nearer_I.view(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(found, self._nearest[v], strict=True)
            )

    def keep(self) -> None:
        """End a batch, whose record is then to be taken; see `Observer.keep`."""

    def take(self) -> Record:
        """Return the record of the generated batch."""
        if self._sum_BKL is None:
            empty = np.empty(0)
            return Record(empty, empty, empty, empty, (), empty, empty)
        self._left -= self._kept
        steps_BK = self._steps_BK.cpu().numpy()
        with np.errstate(invalid="ignore"):
            capacity_BKL = self._sum_BKL.cpu().numpy() / steps_BK[:, :, None]
        levels = [level_I.cpu().numpy() for level_I, _, _ in self._nearest]
        experts = [experts_IS.cpu().numpy() for _, _, experts_IS in self._nearest]
        return Record(
            capacity_BKL=capacity_BKL,
            tokens_LE=self._tokens_LE.cpu().numpy(),
            taken_LT=self._taken_LT.cpu().numpy(),
            level_IV=np.stack(levels, axis=1) if levels else np.empty(0),
            states_V=tuple(state.float() for _, state, _ in self._nearest),
            experts_IVS=np.stack(experts, axis=1) if experts else np.empty(0),
            mean_IS=self._sum_IS.cpu().numpy() / steps_BK[0].sum(),
        )


@contextmanager
def recording(model: DiT, heat_maps: int = 0) -> Iterator[Recorder]:
    """Record every forward pass of a model within the context.

    Args:
        model: in eval mode.
        heat_maps: how many of the first images to keep states and heat maps of.
    """
    recorder = Recorder(model, heat_maps)
    handle = model.register_forward_pre_hook(recorder.see_inputs)
    try:
        with observing(model, recorder):
            yield recorder
    finally:
        handle.remove()
