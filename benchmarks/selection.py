"""Benchmark of the exact selection of a pool, against gathering all scores and sorting them.

    python -m benchmarks.selection --json --ranks 2
    torchrun --nproc_per_node 8 -m benchmarks.selection

Both return the same mask, which is checked first. Collectives and bytes are those of one call on one rank.

Legend: T tokens of a rank, E experts, W ranks, K = T * W / E tokens of an expert.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.compare import (
    common_settings,
    compare,
    require_positive_list,
    run_benchmark,
)
from benchmarks.ranks import count_collectives, report_on_ranks
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.moe.pool import GroupPool
from diffmoe_ds.moe.search import Pool, WarmStart
from diffmoe_ds.moe.top_k import LocalPool, select_top_k

NAME = "benchmarks.selection"
OURS, SORT = "diffmoe", "gather and sort"
DRAWS = 4
"""Different scores that the calls take in turn."""


def bench_selection(
    tokens: int, args: argparse.Namespace, rank: int, world: int, device: torch.device
) -> dict[str, Any]:
    """Measure both ways on this rank; every rank must call this.

    Args:
        tokens: T.
        args: the command line.
        rank: this rank.
        world: W; without process group if 1.
        device: of the scores.

    Returns:
        A case of a report; ``sent`` are the collectives and bytes of a call.
    """
    group = dist.group.WORLD if world > 1 else None
    pool: Pool = LocalPool() if group is None else GroupPool(group)
    generator = torch.Generator(device).manual_seed(rank)
    shape = (DRAWS, tokens, args.experts)  # other tokens in each call, as in training
    draws = torch.randn(shape, generator=generator, device=device).softmax(dim=-1)
    ours, theirs = itertools.cycle(draws), itertools.cycle(draws)
    k, warm = tokens * world // args.experts, WarmStart()
    ways: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: select_top_k(next(ours), k, pool, warm).mask_TE,
        SORT: lambda: gather_and_sort(next(theirs), k, rank, world),
    }
    for _ in draws:
        assert torch.equal(ways[OURS](), ways[SORT]()), "the selections differ"
    sent = {name: count_collectives(run) for name, run in ways.items()}
    rows = compare(
        ways, rounds=args.rounds, device=device, baselines=(SORT,),
        calls=None if world == 1 else args.calls, before=dist.barrier if world > 1 else None,
    )  # fmt: skip
    title = f"T {tokens:,} of each of {world} rank(s), E {args.experts}, {_backend(world)}"
    return {"case": title, "tokens": tokens, "ranks": world, "opponents": rows, "sent": sent}


def gather_and_sort(scores_TE: Tensor, k: int, rank: int, world: int) -> Tensor:
    """Return the mask of this rank's tokens from the sorted scores of all ranks.

    Args:
        scores_TE: scores of this rank's tokens; the same number on every rank.
        k: K.
        rank: this rank.
        world: W.
    """
    every = scores_TE
    if world > 1:
        every = scores_TE.new_empty((world * len(scores_TE), scores_TE.shape[1]))
        dist.all_gather_into_tensor(every, scores_TE)
    best_KE = every.sort(dim=0, descending=True, stable=True).indices[:k]
    mask = torch.zeros_like(every, dtype=torch.bool).scatter_(0, best_KE, True)
    return mask[rank * len(scores_TE) : (rank + 1) * len(scores_TE)]


def _backend(world: int) -> str:
    return "no communication" if world == 1 else str(dist.get_backend())


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the exact selection with gathering and sorting the scores.")
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[2048, 32768], metavar="T", help="of a rank (default: 2048 32768)")
    add("--experts", type=int, default=16, metavar="E", help="default: %(default)s")
    add("--ranks", type=int, nargs="+", default=[1, 2], metavar="W", help="ranks to start (default: 1 2)")
    add("--calls", type=int, default=3, metavar="N", help="calls of a sample on several ranks (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of all ranks together (default: torch's)")
    return run_benchmark(parser, _run, argv, rounds=15)


def _run(args: argparse.Namespace) -> None:
    device = common_settings(args)
    if args.quick:
        args.tokens, args.experts = [64], 4
    require_positive(args, "experts", "calls")
    require_positive_list("--tokens", args.tokens)
    require_positive_list("--ranks", args.ranks)
    report_on_ranks(NAME, args, bench_selection, device)


if __name__ == "__main__":
    sys.exit(main())
