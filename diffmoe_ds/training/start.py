"""Where a run starts: the checkpoint that it resumes from, if any."""

from __future__ import annotations

import os
from pathlib import Path

from diffmoe_ds.checkpoint.layout import RESOLVED_RECIPE, checkpoint_root
from diffmoe_ds.checkpoint.load import CheckpointReader, WeightsReader, check_same_model, check_same_moments
from diffmoe_ds.checkpoint.metadata import FeatureNetwork
from diffmoe_ds.checkpoint.verify import candidates, check_sizes, no_valid_one
from diffmoe_ds.config.deepspeed import DeepSpeedSettings
from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.text_features import TextFormat, difference


def resume_choices(resume: str, directory: Path, launch: Launch) -> list[Path]:
    """Return the checkpoints to resume from, in order of preference; an empty list starts a new run.

    Args:
        resume: ``auto``, ``none`` or a path.
        directory: the run directory.
        launch: this process's place among the ranks.

    Raises:
        CheckpointError: `resume` contradicts what the run directory contains, its checkpoints are all damaged, or the
            path has no checkpoint.
    """
    own = candidates(directory)
    if resume == "auto":
        return own
    if resume == "none":
        if own:
            raise CheckpointError(
                f"{checkpoint_root(directory)}: contains checkpoints of an earlier run, which --resume none would mix "
                "with its own; use another --run-dir, or use --resume auto."
            )
        return []
    newest = first_complete(own, launch)
    if newest is not None and newest.metadata.began_from == os.path.abspath(resume):
        return own  # a rerun of the command that started this run
    found = candidates(Path(resume))
    if not found:
        raise CheckpointError(f"--resume {resume}: not a checkpoint or a run directory with one.")
    if own and found[0].resolve().parent != own[0].resolve().parent:
        raise CheckpointError(
            f"{checkpoint_root(directory)}: contains checkpoints of an earlier run, which would be mixed with those "
            f"of {found[0]}; use another --run-dir."
        )
    return found


def check_resumable(
    reader: CheckpointReader,
    config: Config,
    settings: DeepSpeedSettings,
    text: TextFormat | None,
    network: FeatureNetwork | None,
) -> None:
    """Check that this run can resume from a checkpoint.

    Args:
        reader: the checkpoint.
        config: the run's configuration.
        settings: its DeepSpeed settings.
        text: the encoders of its captions, for a text model.
        network: the network of its image features, with REPA.

    Raises:
        CheckpointError: the checkpoint does not match the model, the optimizer, the text encoders or the network.
    """
    own_recipe = reader.path.parent.parent / RESOLVED_RECIPE
    hint = f"; to continue that run, pass --config {own_recipe}" if os.path.isfile(own_recipe) else ""
    check_same_model(reader, config, hint)
    check_same_moments(reader, settings.json["optimizer"]["type"])
    check_same_encoders(reader, text, str(reader.path))
    _check_same_network(reader, network)


def _check_same_network(reader: CheckpointReader, network: FeatureNetwork | None) -> None:
    before = reader.metadata.repa_network
    if before is None or network is None or before.sha256 == network.sha256:
        return
    raise CheckpointError(
        f"{reader.path}: was trained with image features of {before.name} (SHA-256 {before.sha256[:12]}), but those of "
        f"data.path are of {network.name} (SHA-256 {network.sha256[:12]}); prepare the images with the same --features."
    )


def check_same_encoders(reader: WeightsReader, text: TextFormat | None, name: str) -> None:
    """Check that a text model was trained with the encoders of a run's captions; class models have none.

    Args:
        reader: the model.
        text: the encoders of the captions.
        name: of the model, for messages.

    Raises:
        CheckpointError: it was not.
    """
    if reader.text is None or text is None:
        return
    differs = difference(text, reader.text)
    if differs is not None:
        raise CheckpointError(
            f"{name}: was trained with text encoders other than those of data.path: {differs}; "
            "encode the captions with the same encoders."
        )


def first_complete(paths: list[Path], launch: Launch, known: CheckpointReader | None = None) -> CheckpointReader | None:
    """Open the first checkpoint whose files have the right sizes; the ranks verify the contents later.

    Args:
        paths: checkpoints in order of preference.
        launch: this process's place among the ranks. Only rank 0, whose choice counts, compares the sizes.
        known: the checkpoint that was opened before, if any.

    Raises:
        CheckpointError: there are checkpoints, but all are damaged, or the metadata of a complete one cannot be used.
    """
    problems = []
    for path in paths:
        if known is not None and known.path == path and known.is_current():
            return known
        try:
            if launch.rank:
                return CheckpointReader(path)
            check_sizes(path)
        except CheckpointError as error:
            problems.append(error)
            continue
        return CheckpointReader(path)
    if problems:
        raise no_valid_one(paths[0].parent, len(paths), problems)
    return None
