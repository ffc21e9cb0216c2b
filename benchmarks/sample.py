"""Benchmark of sampling: a forward pass of a DiffMoE model in eval mode over the dense model's, at mean capacity 1.

    python -m benchmarks.sample --json --threads 2
    python -m benchmarks.sample --dtype bf16 --images 16

The thresholds of ``dynamic`` and ``per_token`` are set so that a token takes one expert on average over the batch that
is measured, while experts take between 0.8 and 1.2 times the mean, as they do in trained models; equal counts would
favor batched products.

Legend: T tokens, E experts, K tokens of an expert.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import (
    DTYPES,
    common_settings,
    compare,
    print_cases,
    progress,
    require_positive_list,
    run_benchmark,
)
from benchmarks.models import DENSE, make_batch, make_model, model_config
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.model.dit import DiT, DiTOutput

NAME = "benchmarks.sample"
RULES = ("per_token", "dynamic", "static")
SPREAD = (0.8, 1.2)
"""Fewest and most tokens of an expert, as multiples of the mean."""


def bench_sample(args: argparse.Namespace, images: int, device: torch.device) -> dict[str, Any]:
    """Measure the forward pass of the dense model and of every inference rule.

    Returns:
        A case of a report; ``mean_capacity`` is the number of experts that an average token took.
    """
    dtype = DTYPES[args.dtype]
    dense = make_model(model_config(args.size, args.experts, DENSE), device, dtype).eval()
    model = make_model(model_config(args.size, args.experts, "batch_pool"), device, dtype).eval()
    batch = make_batch(model.config, images, device)
    set_thresholds(model, batch)
    passes: dict[str, Callable[[], object]] = {DENSE: partial(predict, dense, batch, "static")}
    passes |= {rule: partial(predict, model, batch, rule) for rule in RULES}
    capacity = {rule: mean_capacity(predict(model, batch, rule)) for rule in RULES}
    rows = compare(passes, rounds=args.rounds, device=device, baselines=(DENSE,))
    threads = torch.get_num_threads()
    return {
        "case": f"{args.size}-E{args.experts}, {images} images, {args.dtype}, {threads} thread(s): forward, eval mode",
        "images": images,
        "threads": threads,
        "opponents": rows,
        "mean_capacity": capacity,
    }


@torch.no_grad()
def predict(model: DiT, batch: MicroBatch, rule: str) -> DiTOutput:
    """Run one forward pass of a sampler, without guidance."""
    model.set_inference(rule)
    output: DiTOutput = model(batch.x, batch.time, batch.label)
    return output


def mean_capacity(output: DiTOutput) -> float:
    """Return how many experts an average token took, over all layers."""
    return sum(r.mask_TE.sum().item() / len(r.mask_TE) for r in output.routing) / len(output.routing)


def set_thresholds(model: DiT, batch: MicroBatch) -> None:
    """Set the thresholds of all layers for mean capacity 1 on a batch, layer by layer, as each changes the next one."""
    for index, layer in enumerate(model.moe_layers().values()):
        logits_TE = predict(model, batch, "per_token").routing[index].capacity_logits_TE
        assert logits_TE is not None
        layer.expert_threshold.copy_(thresholds(logits_TE.float().sigmoid()))


def thresholds(probability_TE: Tensor) -> Tensor:
    """Return fp32 [E] thresholds above which the experts take T / E tokens on average, each a different number.

    Args:
        probability_TE: predicted probabilities.
    """
    tokens, experts = probability_TE.shape
    sorted_TE = probability_TE.sort(dim=0, descending=True).values
    low, high = SPREAD
    steps = max(experts - 1, 1)
    k_E = [round(tokens / experts * (low + (high - low) * e / steps)) for e in range(experts)]
    # halfway between the last token that is taken and the first that is not
    return torch.stack([sorted_TE[max(k, 1) - 1 : max(k, 1) + 1, e].mean() for e, k in enumerate(k_E)])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the forward pass of sampling with the dense model's.")
    add = parser.add_argument
    add("--size", default="S", metavar="SIZE", help="model size (default: %(default)s)")
    add("--experts", type=int, default=16, metavar="E", help="default: %(default)s")
    add("--images", type=int, nargs="+", default=[8, 16], metavar="B", help="images of a batch (default: 8 16)")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="default: %(default)s")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's)")
    return run_benchmark(parser, _run, argv, rounds=15)


def _run(args: argparse.Namespace) -> None:
    device = common_settings(args)
    if args.quick:
        args.size, args.experts, args.images = "nano", 4, [2]
    require_positive(args, "experts")
    require_positive_list("--images", args.images)
    cases = []
    for images in args.images:
        progress(f"sample: {images} images, {args.dtype}, {torch.get_num_threads()} thread(s)")
        cases.append(bench_sample(args, images, device))
        gc.collect()
    print_cases(NAME, args, cases)


if __name__ == "__main__":
    sys.exit(main())
