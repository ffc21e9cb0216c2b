"""Run one rank's forward and backward pass on fake tensors and count what it allocates and sends.

The code is the training code, the world is as large as asked, and nothing is computed: tensors have shapes but no
storage (`FakeTensorMode`), and collectives of the fake process group return at once.  Sizes that depend on data, which
fake tensors do not have, are those of even routing: every expert takes the same number of this rank's tokens.

Legend: B images of a micro-batch, T their tokens, E experts, R routed rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffmoe_ds.config.schema import Config
from diffmoe_ds.distributed.fake import fake_ranks
from diffmoe_ds.model.dit import DiT, DiTOutput
from diffmoe_ds.model.layers import time_frequencies
from diffmoe_ds.moe.capacity import capacity_loss
from diffmoe_ds.moe.expert_parallel import ExpertParallelMoE, make_part_of_pool
from diffmoe_ds.planning.counting import Counter
from diffmoe_ds.planning.layout import Layout
from diffmoe_ds.topology import Topology


@dataclass(frozen=True)
class Simulation:
    """What a rank's forward and backward pass allocates and sends, without DeepSpeed's share."""

    weights: int
    """Bytes of the model: parameters and buffers."""
    saved: int
    """Bytes alive between the passes besides the model: saved activations, inputs and outputs."""
    forward_peak: int
    """Peak of the forward pass, besides the model."""
    backward_peak: int
    """Peak of the backward pass, besides the model, if every weight gradient is freed as soon as it is complete."""
    operators: int
    """Operators of both passes."""
    messages: tuple[tuple[str, int], ...]
    """Collective and bytes of every call, in order."""
    assumed: tuple[str, ...]
    """Operators whose sizes depend on data and were assumed to be even; empty if everything was counted."""


def simulate(config: Config, topology: Topology, micro_batch: int, dtype: torch.dtype) -> Simulation:
    """Simulate the forward and backward pass of one micro-batch.

    Args:
        config: the run's configuration.
        topology: the ranks, and the one to simulate.
        micro_batch: images B of this rank.
        dtype: of weights and activations.
    """
    expected = EvenRouting(config, micro_batch * config.tokens_per_image)
    counter = Counter()
    time_frequencies(torch.device("cpu"))  # cached by the process, so it must be a real tensor
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_ranks(topology) as ep_group, fake, expected, counter:
        part = make_part_of_pool(config.routing.pool_images, micro_batch, topology, ep_group)
        make_moe = partial(ExpertParallelMoE, topology=topology, ep_group=ep_group, part_of_pool=part)
        model = DiT(config, make_moe).train()
        _prepare_weights(model, dtype)
        inputs = _inputs(config, micro_batch)
        weights = counter.live
        with torch.no_grad():
            model(*inputs)  # the first search of a pool sends more than later ones
        counter.reset()
        output: DiTOutput = model(*inputs)
        forward_peak = counter.peak
        loss = _loss(output)
        saved = counter.live
        counter.peak = saved
        loss.backward()
        return Simulation(
            weights, saved - weights, forward_peak - weights, counter.peak - weights, counter.operators,
            tuple(counter.messages), tuple(sorted(expected.used)),
        )  # fmt: skip


@dataclass(frozen=True)
class Passes:
    """Bytes of a forward and backward pass, without weights and their gradients."""

    saved: int
    """Saved activations, inputs and outputs."""
    temporary: int
    """What the passes need at most beyond these."""
    operators: int
    """Operators that the passes launch."""


def estimate_passes(layout: Layout) -> Passes:
    """Return the bytes of the passes of a model, from simulations of two models with fewer blocks.

    All blocks of a kind are the same, so memory grows by the same amount with every pair of them.
    """
    config, depth = layout.config, layout.config.size.depth
    shallow = 2 + depth % 2 + 2 * math.ceil(config.routing.dense_blocks / 2)
    depths = (shallow, shallow + 2) if depth > shallow + 2 else (depth,)
    saved, peak, operators = [], [], []
    for blocks in depths:
        model = config.model.model_copy(update={"depth": blocks})
        # where the projector's temporary tensors meet the most saved activations
        loss = config.loss.model_copy(update={"repa_block": blocks})
        shorter = config.model_copy(update={"model": model, "loss": loss})
        found = simulate(shorter, layout.topology, layout.settings.micro_batch, layout.dtype)
        saved.append(found.saved)
        peak.append(max(found.forward_peak, found.backward_peak))
        operators.append(found.operators)
    pairs = (depth - depths[-1]) // 2
    grown = [part[-1] + pairs * (part[-1] - part[0]) for part in (saved, peak, operators)]
    return Passes(saved=grown[0], temporary=grown[1] - grown[0], operators=grown[2])


def _inputs(config: Config, micro_batch: int) -> tuple[Tensor, ...]:
    """Return noisy images, times, labels or text features, and drop flags."""
    model = config.model
    x = torch.empty(micro_batch, model.in_channels, model.input_size, model.input_size)
    is_flow = config.objective.kind == "flow"
    t_B = torch.empty(micro_batch, dtype=torch.float32 if is_flow else torch.int64)
    drop_B = torch.empty(micro_batch, dtype=torch.bool)
    if config.is_text:
        condition = torch.empty(micro_batch, config.text_layout.values, dtype=torch.float16)
    else:
        condition = torch.empty(micro_batch, dtype=torch.int64)
    return x, t_B, condition, drop_B


def _loss(output: DiTOutput) -> Tensor:
    loss = output.prediction.square().mean()
    for routing in output.routing:
        if routing.capacity_logits_TE is not None:
            loss = loss + capacity_loss(routing.capacity_logits_TE, routing.mask_TE)
        loss = sum(routing.auxiliary.values(), start=loss)
    if output.aligned_BSF is not None:
        loss = loss + output.aligned_BSF.square().mean()
    return loss


def _prepare_weights(model: DiT, dtype: torch.dtype) -> None:
    """Convert the weights, and let each gradient be freed once it is complete."""

    def free(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.register_post_accumulate_grad_hook(free)


class EvenRouting(TorchDispatchMode):
    """While entered, gives operators whose output size depends on data the size that even routing has."""

    def __init__(self, config: Config, tokens: int) -> None:
        """Compute the rows of even routing.

        Args:
            config: the run's configuration.
            tokens: tokens T of this rank.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = round(config.routing.capacity * tokens * (1 - config.null_fraction))
        self.null_images = round(tokens // config.tokens_per_image * config.null_fraction)
        self.used: set[str] = set()
        """The operators that were given a size."""

    def __enter__(self) -> EvenRouting:
        self._patch = self._patched_tolist()
        self._patch.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patch.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            self.used.add("nonzero")
            return torch.empty((self.rows, args[0].dim()), dtype=torch.int64)
        if func is torch.ops.aten.repeat_interleave.Tensor:
            self.used.add("repeat_interleave")
            return torch.empty((self.rows,), dtype=torch.int64)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            self.used.add("bool")  # whether something unusual happened, such as an overflow: no
            return False
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.int64:
            self.used.add("item")
            return self.null_images
        return func(*args, **(kwargs or {}))

    @contextmanager
    def _patched_tolist(self) -> Iterator[None]:
        """Let `tolist` of a fake tensor of counts, [..., E] or [..., P, E / P], return even ones."""
        original = FakeTensor.tolist

        def tolist(tensor: FakeTensor) -> Any:
            self.used.add("tolist")
            return self._split(tuple(tensor.shape))

        FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            FakeTensor.tolist = original  # type: ignore[method-assign]

    def _split(self, shape: tuple[int, ...]) -> Any:
        if len(shape) == 3:  # counts sent and received
            return [self._split(shape[1:]) for _ in range(shape[0])]
        ranks, experts = (1, *shape)[-2:]
        total = ranks * experts
        counts = [self.rows // total + (index < self.rows % total) for index in range(total)]
        return counts if len(shape) == 1 else [counts[i * experts : (i + 1) * experts] for i in range(ranks)]
