"""Implementation of ``diffmoe evaluate``: features of the samples, then of the reference, then the metrics."""

from __future__ import annotations

import argparse
import json
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
from diffmoe_ds.evaluation.images import Images, open_images
from diffmoe_ds.evaluation.reference import SAVED_FEATURES, Reference, open_reference, save_reference
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


def _evaluate(args: argparse.Namespace, rendezvous: Rendezvous) -> None:
    launch = rendezvous.launch
    device = local_device(launch)
    set_tf32(False)
    samples = rendezvous.raise_on_all_ranks("samples", lambda: open_samples(args, launch))
    extractor = rendezvous.raise_on_all_ranks("extractor", lambda: load_extractor(args.extractor, device))
    reference = rendezvous.raise_on_all_ranks(
        "reference", lambda: open_reference(args.reference, extractor, samples.size)
    )
    held_out = rendezvous.raise_on_all_ranks("validation", lambda: open_validation(args, samples))
    rendezvous.raise_on_all_ranks("save", lambda: _check_saving(args, reference))
    rendezvous.check_same("extractor name", extractor.name, "loads a different --extractor than rank 0.")
    team = Team(launch.rank, launch.world)
    if team.world > 1:
        init_process_group("gloo", rendezvous.init_method())
    check_features(extractor, samples.size, team)
    if isinstance(samples, GeneratedImages):
        samples.load(device, rendezvous)
    sample_set = features_of_images(samples, extractor, team, args.batch_size, "samples")
    reference_set = features_of_reference(args, reference, extractor, team, samples.size)
    with _bar(team, steps_of(sample_set, reference_set), "metrics", "step") as bar:
        result = compute_metrics(sample_set, reference_set, extractor, bar.update)
    if isinstance(samples, GeneratedImages):
        result |= metrics_of_model(samples, held_out, team)
    if team.rank == 0:
        text = (
            [json.dumps(finite_or_none(result), allow_nan=False)]
            if args.json
            else metric_lines(result, extractor.is_inception)
        )
        print("\n".join(text))


def open_samples(args: argparse.Namespace, launch: Launch) -> Images:
    """Return the images to evaluate.

    Raises:
        DiffMoEError: they cannot be read, or the options do not fit the checkpoint.
    """
    if args.checkpoint is None:
        return open_images(args.samples)
    return GeneratedImages(plan_sampling(args, launch))


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
    share = team.share(len(images), images.together if isinstance(images, GeneratedImages) else 1)
    batches = images.batches(share.start, share.stop, batch_size)
    with _bar(team, len(share), what, "image") as bar:
        return extract_features(extractor, batches, team, bar.update, classify=what == "samples")


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
