"""Metrics during training, comparing images generated from the averaged weights with all held-out images.

All ranks generate images and extract features, in equal shares; rank 0 computes the metrics on its CPU.

Legend: N images, B images of a batch, C channels, H, W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffmoe_ds.distributed.collectives import gather_to_main
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.evaluation.extractors import Extractor, load_extractor, reported_as
from diffmoe_ds.evaluation.held_out import HeldOut, decoder_path
from diffmoe_ds.evaluation.outputs import Outputs
from diffmoe_ds.evaluation.selected import ImageFeatures, selected_metrics
from diffmoe_ds.evaluation.stored_prompts import evenly_spaced
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.sampling.generate import SamplingSettings, share_of_rank
from diffmoe_ds.sampling.grid import Pixels, to_uint8
from diffmoe_ds.sampling.labels import cycle_labels
from diffmoe_ds.sampling.prompts import set_prompts
from diffmoe_ds.sampling.stream import DECODED_TOGETHER, Decode, generate_batches
from diffmoe_ds.training.batches import load_vae
from diffmoe_ds.training.lockstep import lockstep, num_batches, reading
from diffmoe_ds.training.setup import Run


class OnlineMetrics:
    """Computes the metrics of ``eval.metrics``; the features of the held-out images are computed once."""

    def __init__(self, run: Run, held_out: HeldOut, watchdog: Watchdog) -> None:
        self._run = run
        self._held_out = HeldOut(held_out.dataset, run.config)  # all images, not only those of the validation loss
        self._watchdog = watchdog

    def compute(self, model: DiT) -> dict[str, Any]:
        """Return the metrics of images that a model generates. Every rank must call this.

        Args:
            model: with the averaged weights, in eval mode.

        Returns:
            ``extractor``, ``n``, ``n_reference`` and, on rank 0, the metrics, named as in ``diffmoe evaluate --json``.

        Raises:
            DiffMoEError: on all ranks, if any rank cannot read an image or load the extractor or VAE, or generates NaN.
        """
        run, names, count = self._run, self._run.config.eval.metrics, self._run.config.eval.metric_images
        decode, reference = self._decode, self._reference
        if run.config.is_text:  # captions that can be read: they were, with the images of the reference
            set_prompts(model, evenly_spaced(self._held_out.dataset, count))
        samples = self._features(self._generated_images(model, decode), count, "generate")

        def compare() -> dict[str, float]:
            if samples is None or reference is None:  # not rank 0
                return {}
            return selected_metrics(names, samples, reference, self._watchdog.alive)

        found = raise_on_all_ranks(run.device, compare)
        return {"extractor": self._extractor.name, "n": count, "n_reference": len(self._held_out), **found}

    @cached_property
    def _extractor(self) -> Extractor:
        run = self._run
        return raise_on_all_ranks(run.device, lambda: load_extractor(run.config.eval.extractor, run.device))

    @cached_property
    def _reference(self) -> ImageFeatures | None:
        """The features of all held-out images, on rank 0."""
        return self._features(self._held_out_images(self._decode), len(self._held_out), "reference")

    @cached_property
    def _decode(self) -> Decode:
        """The function that decodes the model's output to pixels."""
        device, path = self._run.device, decoder_path(self._run.config)
        if path is None:
            return lambda pixels: pixels
        return raise_on_all_ranks(device, lambda: load_vae(path, device)).decode

    def _held_out_images(self, decode: Decode) -> Iterator[Tensor]:
        """Yield this rank's share of the held-out images, uint8 [B, C, H, W]."""
        run, topology = self._run, self._run.topology
        holds_latents = decoder_path(run.config) is not None and run.config.data.vae is None
        for batch in reading(self._held_out.batches(run.settings.micro_batch, topology.rank, topology.world)):
            images_BCHW = batch.x
            if holds_latents:
                parts = images_BCHW.to(run.device).split(DECODED_TOGETHER)
                images_BCHW = torch.cat([decode(part) for part in parts])
            yield _channels_first(to_uint8(images_BCHW))

    def _generated_images(self, model: DiT, decode: Decode) -> Iterator[Tensor]:
        """Yield this rank's share of the generated images, uint8 [B, C, H, W], with the same seeds every time."""
        run, sample = self._run, self._run.config.sample
        seeds = share_of_rank(run.config.eval.metric_images, 0, run.topology.rank, run.topology.world)
        labels = cycle_labels(seeds, range(model.y_embedder.num_labels))
        settings = SamplingSettings(sample.sampler or run.objective.samplers[0], sample.steps, sample.cfg_scale)
        for _, pixels in generate_batches(
            model, labels, seeds, settings, decode, run.settings.micro_batch,
            lambda done, total: self._watchdog.alive(),
        ):  # fmt: skip
            yield _channels_first(pixels)

    def _features(self, images: Iterator[Tensor], count: int, what: str) -> ImageFeatures | None:
        """Extract the features of this rank's share of images, and gather all features on rank 0.

        Args:
            images: the same number on all ranks; images beyond ``count`` over all ranks are dropped.
            count: N.
            what: label of the progress bar.
        """
        run, extractor = self._run, self._extractor

        def extract(images_BCHW: Tensor) -> Outputs:
            with reported_as("eval.extractor"):
                return extractor.extract(images_BCHW)

        outputs = map(extract, images)
        parts = list(lockstep(outputs, num_batches(count, run), what, run, self._watchdog))
        features_NF = self._collect([part.features_BF for part in parts], count)
        logits_NK = self._collect([part.logits_BK for part in parts if part.logits_BK is not None], count)
        return None if features_NF is None else ImageFeatures(features_NF, logits_NK)

    def _collect(self, parts: list[Tensor], count: int) -> Tensor | None:
        """Return the rows of all ranks on rank 0; None on other ranks or if there are no parts."""
        if not parts:
            return None
        every = gather_to_main(torch.cat(parts).to(self._run.device))
        return None if every is None else torch.cat(every)[:count].cpu()


def _channels_first(images_BHWC: Pixels) -> Tensor:
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
