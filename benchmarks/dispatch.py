"""Benchmark of the exchange of rows between ranks, against a bare ``all_to_all_single`` of the same rows.

    python -m benchmarks.dispatch --json --ranks 2
    torchrun --nproc_per_node 8 -m benchmarks.dispatch --tokens 8192 --width 1024 --dtype bf16

A call sends rows to their experts and back, then the gradients the same way: four exchanges. The ranks use NCCL if each
has a GPU, otherwise gloo. "equal counts" is the exchange of ``pool=rank``, whose sizes are known; "counts sent" also
exchanges the number of rows of each expert.

Legend: R = T rows of a rank, D width, E experts, W ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.compare import (
    DTYPES,
    common_settings,
    compare,
    require_positive_list,
    run_benchmark,
)
from benchmarks.ranks import count_collectives, report_on_ranks
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.moe.dispatch import AllToAllDispatcher
from diffmoe_ds.moe.top_k import Selection

NAME = "benchmarks.dispatch"
EQUAL, COUNTED, BARE = "diffmoe, equal counts", "diffmoe, counts sent", "all_to_all_single"


def bench_dispatch(
    tokens: int, args: argparse.Namespace, rank: int, world: int, device: torch.device
) -> dict[str, Any]:
    """Measure the exchanges on this rank; every rank must call this.

    Args:
        tokens: R, a multiple of E.
        args: the command line.
        rank: this rank.
        world: W.
        device: of the rows.

    Returns:
        A case of a report; ``sent`` are the collectives and bytes of a call on one rank.
    """
    assert dist.group.WORLD is not None
    rows_RD = torch.randn(tokens, args.width, device=device, dtype=DTYPES[args.dtype], requires_grad=True)
    gradient_RD = torch.randn_like(rows_RD)
    mask_RE = torch.arange(args.experts, device=device).repeat(tokens // args.experts)[:, None] == torch.arange(
        args.experts, device=device
    )  # every token goes to one expert
    ways: dict[str, Callable[[], object]] = {
        name: _ours(AllToAllDispatcher(dist.group.WORLD), selection, rows_RD, gradient_RD)
        for name, selection in ((EQUAL, Selection(mask_RE, tokens // args.experts)), (COUNTED, Selection(mask_RE)))
    }
    ways[BARE] = lambda: _bare(rows_RD.detach(), gradient_RD)
    sent = {name: count_collectives(run) for name, run in ways.items()}
    rows = compare(
        ways, rounds=args.rounds, device=device, baselines=(BARE,), calls=args.calls, before=dist.barrier
    )  # fmt: skip
    title = f"R {tokens:,}, D {args.width:,}, E {args.experts}, {args.dtype}, {world} ranks, {dist.get_backend()}"
    return {"case": title, "tokens": tokens, "ranks": world, "opponents": rows, "sent": sent}


def _ours(
    dispatcher: AllToAllDispatcher, selection: Selection, rows_RD: Tensor, gradient_RD: Tensor
) -> Callable[[], object]:
    def run() -> None:
        rows_RD.grad = None
        counts = dispatcher.count(selection, is_grouped=False)
        dispatcher.combine(dispatcher.start_dispatch(rows_RD, counts)(), counts).backward(gradient_RD)

    return run


def _bare(rows_RD: Tensor, gradient_RD: Tensor) -> None:
    for rows in (rows_RD, rows_RD, gradient_RD, gradient_RD):
        dist.all_to_all_single(torch.empty_like(rows), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the exchange of rows with a bare all-to-all.")
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[2048, 8192], metavar="R", help="rows of a rank (default: 2048 8192)")
    add("--width", type=int, default=384, metavar="D", help="default: %(default)s")
    add("--experts", type=int, default=16, metavar="E", help="default: %(default)s")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="default: %(default)s")
    add("--ranks", type=int, nargs="+", default=[2], metavar="W", help="ranks to start (default: 2)")
    add("--calls", type=int, default=3, metavar="N", help="calls of a sample (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of all ranks together (default: torch's)")
    return run_benchmark(parser, _run, argv, rounds=15)


def _run(args: argparse.Namespace) -> None:
    common_settings(args)
    if args.quick:
        args.tokens, args.width, args.experts = [64], 16, 4
    _check(args)
    report_on_ranks(NAME, args, bench_dispatch)


def _check(args: argparse.Namespace) -> None:
    require_positive(args, "width", "experts", "calls")
    require_positive_list("--tokens", args.tokens)
    require_positive_list("--ranks", args.ranks)
    for tokens in args.tokens:
        if tokens % args.experts:
            raise ConfigError(f"--tokens must be a multiple of --experts ({args.experts}), got {tokens}.")
    for ranks in args.ranks:
        if args.experts % ranks:
            raise ConfigError(f"--ranks must divide --experts ({args.experts}), got {ranks}.")


if __name__ == "__main__":
    sys.exit(main())
