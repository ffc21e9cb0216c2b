"""All ranks continue from the same checkpoint, and every byte of it was read before."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from diffmoe_ds.checkpoint.layout import checkpoint_images
from diffmoe_ds.checkpoint.verify import check_contents, check_sizes, no_valid_one, shares, warn_skipped
from diffmoe_ds.errors import CheckpointError


def agree_on_checkpoint(choices: list[Path], directory: Path, device: torch.device) -> Path | None:
    """The first choice that is whole; the ranks share the reading, and each that finds damage names the file.

    Args:
        choices: rank 0's are taken; the others must see the same checkpoints.
        directory: the run's directory, for the error.
        device: where collectives take their tensors.

    Returns:
        The checkpoint; none if there are no choices.

    Raises:
        CheckpointError: on all ranks, if there are choices and none is whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    count = _from_main(torch.tensor(len(choices), device=device))
    for number in range(count):
        mine = choices[number] if number < len(choices) else None
        images = -1 if mine is None else checkpoint_images(mine.name) or 0
        wanted = _from_main(torch.tensor(images, device=device))
        try:
            if images != wanted:
                raise CheckpointError(
                    f"{directory}: rank 0 sees a checkpoint of {wanted:,} images there and rank {rank} does not; all "
                    "ranks need the same file system."
                )
            check_contents(mine, shares(check_sizes(mine), rank, world))
            failure = None
        except CheckpointError as error:
            failure = error
        # all may find the same file missing: the first of them says so
        first = torch.tensor(world if failure is None else rank, dtype=torch.int32, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first == world:
            return mine
        if first == rank:
            warn_skipped(mine or directory, failure)
    if count:
        raise no_valid_one(directory, count)
    return None


def _from_main(value: torch.Tensor) -> int:
    dist.broadcast(value, src=0)
    return int(value)
