"""The models, batches and passes that several benchmarks measure.

Legend: B images, S tokens per image, T tokens, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.diffusion.objective import make_objective
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe.layer import Routing

RECIPE = "imagenet-256"
"""Latents 4x32x32 in patches of 2: S = 256."""
WEIGHT_STD = 0.02
DENSE = "dense"
ROUTINGS = ("batch_pool", "token_choice", "expert_choice")


def model_config(size: str, experts: int, routing: str, overrides: Sequence[str] = ()) -> Config:
    """Return the configuration of a model with an exact pool per micro-batch.

    Args:
        size: ``S``, ``B``, ``L``, ...
        experts: E; ignored for ``dense``.
        routing: ``routing.kind``.
        overrides: further ``section.key=value``.
    """
    number = 1 if routing == DENSE else experts
    chosen = [f"model.name={size}-E1", f"routing.num_experts={number}", f"routing.kind={routing}", "routing.pool=rank"]
    return load_config(RECIPE, [*chosen, *overrides])


@torch.no_grad()
def make_model(config: Config, device: torch.device, dtype: torch.dtype) -> DiT:
    """Return a model in training mode with random weights; buffers stay fp32.

    All weights are random: with the zeros of adaLN-zero, blocks would be identities without gradients.
    """
    with torch.device("meta"):
        model = DiT(config)
    model.to_empty(device=device).reset_positions()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.normal_(std=WEIGHT_STD, generator=generator).to(dtype)
    for layer in model.moe_layers().values():
        if layer.capacity_predictor is not None:
            layer.expert_threshold.zero_()
    return model.train()


def make_batch(config: Config, images: int, device: torch.device, seed: int = 0) -> MicroBatch:
    """Return random images with noise, times and labels."""
    generator = torch.Generator().manual_seed(seed)
    model = config.model
    shape = (images, model.in_channels, model.input_size, model.input_size)
    return MicroBatch(
        x=torch.randn(shape, generator=generator),
        label=torch.randint(model.num_classes, (images,), generator=generator),
        noise=torch.randn(shape, generator=generator),
        time=torch.rand(images, generator=generator),
        drop=torch.rand(images, generator=generator) < model.label_dropout,
        position=torch.arange(images),
    ).to(device)


def forward_loss(model: torch.nn.Module, batch: MicroBatch, config: Config) -> tuple[torch.Tensor, tuple[Routing, ...]]:
    """Return the training loss of a micro-batch, with everything that a training step differentiates, and its routing.

    Args:
        model: a `DiT`, or the engine around it.
        batch: on the model's device.
        config: the model's configuration.
    """
    from diffmoe_ds.training.loss import training_loss  # loads DeepSpeed, which layer and sampling do without

    objective = make_objective(config.objective.kind)
    t_B = objective.model_time(batch.time)
    output = model(objective.corrupt(batch.x, batch.noise, t_B), t_B, batch.label, batch.drop)
    return training_loss(output, batch, t_B, objective, config).total, output.routing


def training_pass(model: DiT, batches: Sequence[MicroBatch]) -> None:
    """Run forward and backward over the micro-batches of a step; gradients start as None, as after `zero_grad`."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        (forward_loss(model, batch, model.config)[0] / len(batches)).backward()
