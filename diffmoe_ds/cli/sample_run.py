"""Implementation of ``diffmoe sample``: plan, join the ranks, load the model, generate shards, assemble the results.

The ranks synchronize errors after each phase, so that no rank waits for a failed one and the user sees one message.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch

from diffmoe_ds.cli.capacity import print_capacity
from diffmoe_ds.cli.sample_images import format_of
from diffmoe_ds.cli.sample_model import load_generator
from diffmoe_ds.cli.sample_set import FORMATS, open_set
from diffmoe_ds.cli.sampling_plan import describe, determining_settings, dtype_of, plan_sampling, sources
from diffmoe_ds.distributed.collectives import init_process_group
from diffmoe_ds.distributed.launch import local_device, resolve_launch
from diffmoe_ds.distributed.lost_ranks import naming_lost_ranks
from diffmoe_ds.distributed.quiet import quiet_deepspeed
from diffmoe_ds.distributed.rendezvous import Rendezvous, join_ranks
from diffmoe_ds.errors import CheckpointError, DiffMoEError
from diffmoe_ds.precision import set_tf32
from diffmoe_ds.sampling.observer import CapacityMeter, observing
from diffmoe_ds.sampling.output import check_targets
from diffmoe_ds.topology import Topology


def run_sampling(args: argparse.Namespace) -> None:
    """Generate images in shards on all ranks, and assemble the results on rank 0.

    Args:
        args: of `cli.sample.add_sample_arguments`, with valid numbers.

    Raises:
        DiffMoEError: on all ranks, if any rank fails.
    """
    rendezvous = join_ranks(resolve_launch())
    with naming_lost_ranks(rendezvous):
        _sample(args, rendezvous)


def _sample(args: argparse.Namespace, rendezvous: Rendezvous) -> None:
    launch = rendezvous.launch
    rendezvous.on_main("targets", lambda: check_targets(args.out, FORMATS[format_of(args)]))
    plan = rendezvous.raise_on_all_ranks("plan", lambda: plan_sampling(args, launch))
    rendezvous.check_same(
        "model",
        sources(plan),
        "samples a different checkpoint than rank 0; pass the paths of checkpoints, not of runs.",
    )
    device = local_device(launch)
    dtype = dtype_of(plan, device)
    set_tf32(True)
    if launch.rank == 0:
        print(describe(plan, dtype), flush=True)
        if launch.world > 1:
            print(f"{'launch':>11}  {launch.describe()}", flush=True)
    models = (plan,) if plan.guide is None else (plan, plan.guide)
    topology = max((model.topology for model in models), key=lambda topology: topology.ep_size)
    work = open_set(
        plan.images, partial(determining_settings, plan, dtype), plan.batch_size, topology.ep_size > 1, rendezvous
    )
    try:
        if launch.world > 1:
            create_groups(topology, device, rendezvous)
        missing = work.missing()
        if missing:
            model, generate = load_generator(plan, device, rendezvous)
            with observing(model, CapacityMeter(model)) as meter:
                work.generate(missing, plan.batch_size, generate, meter)
        print_capacity(*work.counted(), plan.images.num_images, plan.capacity)
        work.assemble()
    except DiffMoEError as error:
        taken_over = work.files.taken_over() if isinstance(error, CheckpointError) else None
        work.discard_if_empty()
        raise taken_over or error from None


def create_groups(topology: Topology, device: torch.device, rendezvous: Rendezvous) -> None:
    """Create the process groups: gloo for errors and pixels, and the device's backend for rows of sharded experts."""
    if topology.ep_size == 1:
        init_process_group("gloo", rendezvous.init_method())
        return
    if topology.rank == 0:
        held = f"{topology.num_local_experts} of {topology.num_experts} on each rank"
        print(f"{'experts':>11}  {held}, EP size {topology.ep_size}", flush=True)
    init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", rendezvous.init_method())
    quiet_deepspeed()
    from diffmoe_ds.distributed import deepspeed_seam  # imported lazily: only sharded experts need DeepSpeed

    deepspeed_seam.init_process_group()  # adopts the group
