"""Benchmark of the MoE layer: forward and backward with router, capacity predictor and its loss.

    python -m benchmarks.moe_layer --json --threads 2
    python -m benchmarks.moe_layer --tokens 65536 --width 1024 --experts 16 --dtype bf16

All opponents compute as many expert rows as there are tokens (capacity 1):

- "products": the matrix products of both passes that router, capacity predictor and experts need, and nothing else;
- "products + activation": also GELU and its gradient;
- "dense FFN": one FFN on all tokens, without router and predictor;
- "module loop": one `Mlp` per expert, in a loop that indexes the tokens and adds the outputs, with the same router,
  predictor and selection;
- "DeepSpeed MoE" and "DeepSpeed AutoEP": DeepSpeed's layers with top-1 routing, which have no capacity predictor.

Legend: T tokens, D width, E experts, K = T / E rows of an expert.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.compare import (
    DTYPES,
    common_settings,
    compare,
    print_cases,
    progress,
    run_benchmark,
)
from benchmarks.models import model_config
from diffmoe_ds.cli.arguments import require_positive
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.layers import Mlp
from diffmoe_ds.moe.capacity import capacity_loss
from diffmoe_ds.moe.layer import MoELayer

NAME = "benchmarks.moe_layer"
OURS, PRODUCTS, ACTIVATION, DENSE_FFN, LOOP = (
    "diffmoe", "products", "products + activation", "dense FFN", "module loop",
)  # fmt: skip
NATIVE, AUTOEP = "DeepSpeed MoE", "DeepSpeed AutoEP"
BASELINES = (PRODUCTS, ACTIVATION, DENSE_FFN)


class Shape(NamedTuple):
    """A case to measure."""

    tokens: int
    width: int
    experts: int
    dtype: str

    def __str__(self) -> str:
        return f"T {self.tokens:,}, D {self.width:,}, E {self.experts}, {self.dtype}"


SHAPES = (
    Shape(2048, 384, 16, "fp32"), Shape(8192, 384, 16, "fp32"), Shape(32768, 384, 16, "fp32"),
    Shape(4096, 1024, 16, "fp32"), Shape(8192, 384, 16, "bf16"),
)  # fmt: skip
QUICK_SHAPES = (Shape(256, 64, 4, "fp32"), Shape(256, 64, 4, "bf16"))


def bench_layer(shape: Shape, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure all opponents at one shape.

    Returns:
        A case of a report; ``skipped`` says why opponents are missing.
    """
    torch.manual_seed(0)
    dtype = DTYPES[shape.dtype]
    x_BSD = torch.randn(1, shape.tokens, shape.width, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x_BSD)
    layer = make_layer(shape, device, dtype)
    loop = ModuleLoop(layer)
    check_equal(layer, loop, x_BSD)
    dense = Mlp(shape.width, 4 * shape.width).to(device, dtype)
    opponents: dict[str, Callable[[], object]] = {
        OURS: lambda: _both_passes(layer, _ours, x_BSD, gradient),
        PRODUCTS: products(layer, x_BSD[0], gradient[0], activation=False),
        ACTIVATION: products(layer, x_BSD[0], gradient[0], activation=True),
        DENSE_FFN: lambda: _both_passes(dense, _only_output, x_BSD, gradient),
        LOOP: lambda: _both_passes(loop, _only_output_and_loss, x_BSD, gradient),
    }
    skipped = _add_deepspeed(opponents, shape, x_BSD, gradient)
    rows = compare(opponents, rounds=rounds, device=device, baselines=BASELINES)
    return {"case": str(shape), "shape": shape._asdict(), "opponents": rows, "skipped": skipped}


def _both_passes(
    module: nn.Module, forward: Callable[[Any], list[Tensor]], x_BSD: Tensor, gradient_BSD: Tensor
) -> None:
    """Run forward and backward from the output and, if there is one, the loss."""
    module.zero_grad(set_to_none=True)
    x_BSD.grad = None
    out, *losses = forward(module(x_BSD))
    torch.autograd.backward([out, *losses], [gradient_BSD, *(None for _ in losses)])


def _ours(output: Any) -> list[Tensor]:
    out, routing = output
    return [out, capacity_loss(routing.capacity_logits_TE, routing.mask_TE)]


def _only_output(output: Any) -> list[Tensor]:
    return [output]


def _only_output_and_loss(output: Any) -> list[Tensor]:
    return list(output)


def _native(output: Any) -> list[Tensor]:
    out, balance_loss, _ = output
    return [out, balance_loss]


def _add_deepspeed(opponents: dict[str, Any], shape: Shape, x_BSD: Tensor, gradient: Tensor) -> dict[str, str]:
    """Add DeepSpeed's layers; return why they are missing if they are."""
    try:
        from benchmarks.deepspeed_layers import autoep, native_moe
    except ImportError as error:
        return dict.fromkeys((NATIVE, AUTOEP), f"DeepSpeed is not installed: {error}")
    native = native_moe(shape.width, shape.experts).to(x_BSD.device, x_BSD.dtype)
    opponents[NATIVE] = lambda: _both_passes(native, _native, x_BSD, gradient)
    layer = autoep(shape.width, shape.experts).to(x_BSD.device, x_BSD.dtype)
    opponents[AUTOEP] = lambda: _both_passes(layer, _only_output, x_BSD, gradient)
    return {}


def make_layer(shape: Shape, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """Return our layer in training mode with random weights."""
    layer = MoELayer(model_config("S", shape.experts, "batch_pool"), shape.width)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    layer.expert_threshold.zero_()
    layer.to(device)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(dtype)
    return layer.train()


class ModuleLoop(nn.Module):
    """The MoE layer that everybody writes: a list of FFNs and a loop over it."""

    def __init__(self, layer: MoELayer) -> None:
        """Copy the weights of our layer, so that the outputs can be compared."""
        super().__init__()
        w1, w2, w3 = (weight.detach() for weight in (layer.experts.w1, layer.experts.w2, layer.experts.w3))
        experts, hidden, width = w1.shape
        self.gate = nn.Linear(width, experts, bias=False)
        assert layer.capacity_predictor is not None
        self.capacity_predictor = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, experts))
        self.experts = nn.ModuleList([Mlp(width, hidden) for _ in range(experts)])
        self.to(w1.device, w1.dtype)
        self.gate.load_state_dict({"weight": layer.gate_weight})
        self.capacity_predictor.load_state_dict(layer.capacity_predictor.state_dict())
        for expert, a, b, (bias,) in zip(self.experts, w1, w2, w3, strict=True):
            weights = {"fc1.weight": a, "fc1.bias": bias[:hidden], "fc2.weight": b, "fc2.bias": bias[hidden:]}
            expert.load_state_dict(weights)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the capacity predictor's loss."""
        x_TD = x_BSD.flatten(0, 1)
        scores_TE = F.linear(x_TD.float(), self.gate.weight.float()).softmax(dim=-1)
        logits_TE = self.capacity_predictor(x_TD.detach())
        weight_KE, token_KE = scores_TE.topk(len(x_TD) // len(self.experts), dim=0)
        out_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            rows = expert(x_TD[token_KE[:, e]]) * weight_KE[:, e, None]
            out_TD = out_TD.index_add(0, token_KE[:, e], rows.to(x_TD.dtype))
        target_TE = torch.zeros_like(scores_TE).scatter_(0, token_KE, 1.0)
        loss = F.binary_cross_entropy_with_logits(logits_TE.float(), target_TE)
        return out_TD.view(x_BSD.shape), loss


def check_equal(layer: MoELayer, loop: ModuleLoop, x_BSD: Tensor) -> None:
    """Check that our layer and the loop compute the same.

    Raises:
        AssertionError: they do not.
    """
    with torch.no_grad():
        ours, theirs = layer(x_BSD)[0], loop(x_BSD)[0]
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert error < (1e-4 if x_BSD.dtype == torch.float32 else 0.05), f"the outputs differ by {error:.2g}"


def products(layer: MoELayer, x_TD: Tensor, gradient_TD: Tensor, activation: bool) -> Callable[[], object]:
    """Return a function that runs the matrix products of both passes, on operands that are ready.

    Args:
        layer: whose weights are multiplied.
        x_TD: tokens.
        gradient_TD: the output's gradient.
        activation: also compute GELU and its gradient.
    """
    assert layer.capacity_predictor is not None
    first, last = (layer.capacity_predictor.get_parameter(f"{i}.weight").detach() for i in (0, 2))
    gate, w1, w2 = (weight.detach() for weight in (layer.gate_weight, layer.experts.w1, layer.experts.w2))
    experts, width = gate.shape
    x_TD, rows = x_TD.detach(), len(x_TD) // experts * experts
    x_EKD, gradient_EKD = x_TD[:rows].view(experts, -1, width), gradient_TD[:rows].view(experts, -1, width)
    gradient_TE = torch.randn(len(x_TD), experts, device=x_TD.device, dtype=x_TD.dtype)

    def run() -> None:
        # router and capacity predictor; the predictor's input is detached
        x_TD @ gate.T
        between_TD = x_TD @ first.T
        between_TD @ last.T
        gradient_TE.T @ x_TD
        gradient_TE @ gate
        gradient_TE.T @ between_TD
        (gradient_TE @ last).T @ x_TD
        # experts
        before = torch.bmm(x_EKD, w1.mT)
        hidden = F.gelu(before, approximate="tanh") if activation else before
        torch.bmm(hidden, w2.mT)
        torch.bmm(gradient_EKD.mT, hidden)
        gradient = torch.bmm(gradient_EKD, w2)
        if activation:
            gradient = torch.ops.aten.gelu_backward(gradient, before, approximate="tanh")
        torch.bmm(gradient.mT, x_EKD)
        torch.bmm(gradient, w1)

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the results and return the exit code."""
    parser = argparse.ArgumentParser(description="Compare the MoE layer with its matrix products and other layers.")
    add = parser.add_argument
    text = "measure this shape instead of the five of docs/results.md; needs --width and --experts"
    add("--tokens", type=int, metavar="T", help=text)
    add("--width", type=int, metavar="D", help="width of a token")
    add("--experts", type=int, metavar="E", help="number of experts")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="with --tokens: dtype (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="threads of torch (default: torch's)")
    return run_benchmark(parser, _run, argv, rounds=15)


def _run(args: argparse.Namespace) -> None:
    device = common_settings(args)
    cases = []
    for shape in _shapes(args):
        progress(f"moe_layer: {shape}")
        cases.append(bench_layer(shape, device, args.rounds))
    print_cases(NAME, args, cases)


def _shapes(args: argparse.Namespace) -> tuple[Shape, ...]:
    given = {name: getattr(args, name) for name in ("tokens", "width", "experts")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return QUICK_SHAPES if args.quick else SHAPES
    if missing:
        raise ConfigError(f"--tokens, --width and --experts must be given together; add {' and '.join(missing)}.")
    require_positive(args, *given)
    if args.tokens < args.experts:
        raise ConfigError(f"--tokens must be at least --experts ({args.experts}), got {args.tokens}.")
    return (Shape(**given, dtype=args.dtype),)


if __name__ == "__main__":
    sys.exit(main())
