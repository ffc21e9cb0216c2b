"""Implementation of ``diffmoe evaluate``: features of the samples, then of the reference, then the metrics."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe_ds.cli.evaluate_loss import open_held_out
from diffmoe_ds.cli.generated_images import GeneratedImages
from diffmoe_ds.cli.sampling_plan import plan_sampling
from diffmoe_ds.distributed.collectives import init_process_group
from diffmoe_ds.distributed.launch import Launch, local_device, resolve_launch
from diffmoe_ds.distributed.lost_ranks import naming_lost_ranks
from diffmoe_ds.distributed.rendezvous import Rendezvous, join_ranks
from diffmoe_ds.errors import CheckpointError, ConfigError
from diffmoe_ds.evaluation.clip import ClipScore, ScoredImages
from diffmoe_ds.evaluation.evaluate import (
    FeatureSet,
    ReferenceSet,
    Team,
    check_features,
    compute_metrics,
    extract_features,
    gaussian_of,
    steps_of,
)
from diffmoe_ds.evaluation.extractors import Extractor, load_extractor
from diffmoe_ds.evaluation.held_out import HeldOut
from diffmoe_ds.evaluation.images import Images, generated_images, open_images
from diffmoe_ds.evaluation.prompted import prompts_of
from diffmoe_ds.evaluation.reference import SAVED_FEATURES, Reference, open_reference, save_reference
from diffmoe_ds.evaluation.retrieval import CaptionedImages, nearest_images, open_captioned, retrieval_metrics
from diffmoe_ds.evaluation.sharded import ShardedRows
from diffmoe_ds.evaluation.table import finite_or_none, metric_lines
from diffmoe_ds.files import expand_user
from diffmoe_ds.precision import set_tf32


def run_evaluation(args: argparse.Namespace) -> None:
    """Evaluate on all ranks and print the metrics on rank 0.

    Args:
        args: of `cli.evaluate.add_evaluate_arguments`, with valid numbers.

    Raises:
        DiffMoEError: on all ranks, if any rank fails.
    """
    rendezvous = join_ranks(resolve_launch())
    with naming_lost_ranks(rendezvous):
        _evaluate(args, rendezvous)


@dataclass(frozen=True)
class Inputs:
    """What the options name."""

    samples: Images
    """The images to evaluate."""
    extractor: Extractor | None
    """The network of ``--reference`` and ``--retrieval``; None without both."""
    reference: Reference | None
    held_out: HeldOut | None
    prompts: list[str]
    """The prompt of each image, for ``--clip`` and ``--retrieval``."""
    clip: ClipScore | None
    retrieval: CaptionedImages | None


def _evaluate(args: argparse.Namespace, rendezvous: Rendezvous) -> None:
    launch = rendezvous.launch
    device = local_device(launch)
    set_tf32(False)
    inputs = open_inputs(args, rendezvous, device)
    samples, extractor = inputs.samples, inputs.extractor
    team = Team(launch.rank, launch.world)
    if team.world > 1:
        init_process_group("gloo", rendezvous.init_method())
    if extractor is not None:
        check_features(extractor, samples.size, team)
    if isinstance(samples, GeneratedImages):
        samples.load(device, rendezvous)
    result = measure(args, inputs, team)
    if isinstance(samples, GeneratedImages):
        result |= metrics_of_model(samples, inputs.held_out, team)
    if team.rank == 0:
        text = (
            [json.dumps(finite_or_none(result), allow_nan=False)]
            if args.json
            else metric_lines(result, extractor is not None and extractor.is_inception)
        )
        print("\n".join(text))


def open_inputs(args: argparse.Namespace, rendezvous: Rendezvous, device: torch.device) -> Inputs:
    """Open what the options name. Every rank must call this, before `init_process_group`.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot.
    """
    agree = rendezvous.raise_on_all_ranks
    samples = agree("samples", lambda: open_samples(args, rendezvous.launch))
    extractor = reference = clip = retrieval = None
    if args.reference is not None or args.retrieval is not None:
        extractor = network = agree("extractor", lambda: load_extractor(args.extractor, device))
        rendezvous.check_same("extractor name", network.name, "loads a different --extractor than rank 0.")
        if args.reference is not None:
            reference = agree("reference", lambda: open_reference(args.reference, network, samples.size))
    held_out = agree("validation", lambda: open_validation(args, samples))
    agree("save", lambda: None if reference is None else _check_saving(args, reference))
    prompts = agree("prompts", lambda: open_prompts(args, samples))
    if args.retrieval is not None:
        retrieval = agree("retrieval", lambda: open_captioned(args.retrieval, prompts, samples.size))
    if args.clip is not None:
        clip = agree("clip", lambda: ClipScore(args.clip, device))
        rendezvous.check_same("CLIP name", clip.name, "loads a different --clip than rank 0.")
    return Inputs(samples, extractor, reference, held_out, prompts, clip, retrieval)


def measure(args: argparse.Namespace, inputs: Inputs, team: Team) -> dict[str, Any]:
    """Return every metric of the images, except those of the model. Every rank must call this.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot read an image, or features contain NaN or Inf.
    """
    samples, extractor, clip = inputs.samples, inputs.extractor, inputs.clip
    passed = samples if clip is None else ScoredImages(samples, inputs.prompts, clip)
    result: dict[str, Any] = {"n": len(samples)}
    if extractor is None:
        pass_over(passed, team, args.batch_size)
    else:
        sample_set = features_of_images(passed, extractor, team, args.batch_size, "samples")
        result = {"extractor": extractor.name, "n": len(samples)}
        if inputs.reference is not None:
            reference_set = features_of_reference(args, inputs.reference, extractor, team, samples.size)
            with _bar(team, steps_of(sample_set, reference_set), "metrics", "step") as bar:
                result |= compute_metrics(sample_set, reference_set, extractor, bar.update)
        if inputs.retrieval is not None:
            dataset = features_of_images(inputs.retrieval.images, extractor, team, args.batch_size, "retrieval")
            result |= retrieval_metrics(nearest_images(sample_set.pooled, dataset.pooled), inputs.retrieval)
    if clip is not None:
        result |= {"clip_model": clip.name, "clip_score": clip.compute(team.world)}
    return result


def open_samples(args: argparse.Namespace, launch: Launch) -> Images:
    """Return the images to evaluate.

    Raises:
        DiffMoEError: they cannot be read, or the options do not fit the checkpoint.
    """
    if args.checkpoint is None:
        return open_images(generated_images(args.samples))
    return GeneratedImages(plan_sampling(args, launch))


def open_prompts(args: argparse.Namespace, samples: Images) -> list[str]:
    """Return the prompt of each image, if a metric needs it.

    Raises:
        DiffMoEError: an image has none, or they cannot be read.
    """
    if args.clip is None and args.retrieval is None:
        return []
    if not isinstance(samples, GeneratedImages):
        return prompts_of(samples)
    prompts = samples.prompts()
    if prompts is None:
        option = "--clip" if args.clip is not None else "--retrieval"
        raise ConfigError(f"{option} needs prompts; {args.checkpoint} generates images from classes.")
    return prompts


def open_validation(args: argparse.Namespace, samples: Images) -> HeldOut | None:
    """Return the images of ``--validation``, if it is given: pixels or prepared latents, as the model takes them.

    Raises:
        DiffMoEError: they cannot be read or do not fit the model.
    """
    if args.validation is None:
        return None
    assert isinstance(samples, GeneratedImages), "`evaluate_command` has checked that there is a checkpoint"
    return open_held_out(samples.reader, args.validation)


def metrics_of_model(samples: GeneratedImages, held_out: HeldOut | None, team: Team) -> dict[str, Any]:
    """Return results that need the model: the experts per token, and the loss on held-out images.

    Every rank must call this.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot read a held-out image.
    """
    found: dict[str, Any] = {"capacity": samples.capacity(team)}
    if held_out is not None:
        found |= samples.validation_loss(held_out, team)
    return found


def features_of_images(images: Images, extractor: Extractor, team: Team, batch_size: int, what: str) -> FeatureSet:
    """Extract the features of a set of images, with a progress bar over the share of rank 0.

    Args:
        images: the set.
        extractor: the network.
        team: the ranks.
        batch_size: images per batch.
        what: label of the bar.
    """
    share = team.share(len(images), images.together)
    batches = images.batches(share.start, share.stop, batch_size)
    with _bar(team, len(share), what, "image") as bar:
        return extract_features(extractor, batches, team, bar.update, classify=what == "samples")


def pass_over(images: Images, team: Team, batch_size: int) -> None:
    """Read a set of images once, with a progress bar over the share of rank 0. Every rank must call this.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot read or score an image.
    """
    share = team.share(len(images), images.together)
    batches = images.batches(share.start, share.stop, batch_size)
    with _bar(team, len(share), "samples", "image") as bar:

        def step() -> bool:
            batch_BCHW = next(batches, None)
            bar.update(0 if batch_BCHW is None else len(batch_BCHW))
            return batch_BCHW is not None

        team.repeat(step)


def features_of_reference(
    args: argparse.Namespace, reference: Reference, extractor: Extractor, team: Team, size: tuple[int, int]
) -> ReferenceSet:
    """Return the statistics and features of the reference, reusing those in the file; save them if requested.

    Args:
        args: of the command.
        reference: from `open_reference`.
        extractor: the network.
        team: the ranks.
        size: height and width of the images.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot read an image, or rank 0 cannot write the file.
    """
    pooled, spatial, count = reference.pooled, reference.spatial, reference.num_images
    features = None
    if reference.images is not None:
        found = features_of_images(reference.images, extractor, team, args.batch_size, "reference")
        features, count = found.pooled, len(found.pooled)
        if pooled is None:
            pooled = gaussian_of(found.pooled)
            spatial = None if found.spatial is None else gaussian_of(found.spatial)
    elif reference.features is not None:
        assert count is not None, "saved features come with their number"
        share = team.share(count)
        features = team.rows(team.agree(lambda: reference.saved_features(share.start, share.stop)))
    assert pooled is not None, "a reference has statistics or images"
    if args.save_reference is not None and features is not None:
        kept = _rows_on_main(features, team) if len(features) <= SAVED_FEATURES else None
        count_saved = len(features)

        def save() -> None:
            if team.rank == 0:
                save_reference(args.save_reference, extractor.name, size, pooled, spatial, count_saved, kept)

        team.agree(save)
    return ReferenceSet(pooled, spatial, features, count)


def _rows_on_main(rows: ShardedRows, team: Team) -> Tensor | None:
    """Return all rows on rank 0, None elsewhere. Every rank must call this."""
    kept = [block.rows_BF for block in rows.blocks() if team.rank == 0]
    return torch.cat(kept) if kept else None


def _check_saving(args: argparse.Namespace, reference: Reference) -> None:
    """Check that ``--save-reference``, if it is given, adds something and overwrites no input.

    Raises:
        DiffMoEError: it does not.
    """
    out: Path | None = args.save_reference
    if out is None:
        return
    for name in ("samples", "checkpoint", "reference", "validation"):
        given = getattr(args, name)
        path = None if given is None else expand_user(given)
        if path is not None and out.exists() and path.exists() and out.samefile(path):
            raise ConfigError(f"--save-reference {out}: would overwrite --{name} {given}; choose another file.")
    if reference.pooled is not None:
        raise ConfigError(f"--save-reference {out}: --reference {args.reference} already holds statistics; omit one.")
    if not out.parent.is_dir():
        raise CheckpointError(f"--save-reference {out}: the directory does not exist.")


def _bar(team: Team, total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, unit=unit, desc=what, disable=team.rank != 0, dynamic_ncols=True)
