"""Load the models of a sampling plan, and generate batches of its images with them."""

from __future__ import annotations

from functools import partial

import torch

from diffmoe_ds.checkpoint.load import WeightsReader
from diffmoe_ds.checkpoint.restore import restore_weights
from diffmoe_ds.cli.capacity import Dial, set_capacity
from diffmoe_ds.cli.sample_prompts import open_prompts
from diffmoe_ds.cli.sample_set import Generate
from diffmoe_ds.cli.sampling_plan import SamplingPlan, dtype_of, model_settings
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT, allocate, empty_model
from diffmoe_ds.sampling.fields import Progress
from diffmoe_ds.sampling.grid import Pixels
from diffmoe_ds.sampling.prompts import PromptSet, set_prompts
from diffmoe_ds.sampling.stream import Decode, generate_batches
from diffmoe_ds.topology import Topology


def load_generator(plan: SamplingPlan, device: torch.device, rendezvous: Rendezvous) -> tuple[DiT, Generate]:
    """Load the models that generate the plan's images, and calibrate the capacity. Every rank must call this.

    Returns:
        The model, and the function that generates one batch of the images with it.

    Raises:
        DiffMoEError: on all ranks, if any rank cannot load its part.
    """
    model = rendezvous.raise_on_all_ranks("weights", lambda: load_model(plan, device))
    guide = rendezvous.raise_on_all_ranks("guide", lambda: load_guide(plan, device))
    decode = rendezvous.raise_on_all_ranks("vae", lambda: load_decoder(plan, device))
    prompts = rendezvous.raise_on_all_ranks("prompts", lambda: load_prompts(plan, device))
    for each in (model, guide):
        if prompts is not None and each is not None:
            set_prompts(each, prompts)
    if plan.capacity is not None:
        key = partial(model_settings, plan, dtype_of(plan, device))
        dial = Dial(plan.capacity, plan.reader, key, plan.settings, plan.batch_size)
        set_capacity(model, guide, dial, rendezvous)
    return model, batch_generator(plan, model, guide, decode)


def load_model(plan: SamplingPlan, device: torch.device) -> DiT:
    """Return the plan's model; see `read_model`."""
    return read_model(plan.reader, plan.kind, plan.routing, plan.topology, device, dtype_of(plan, device))


def read_model(
    reader: WeightsReader, kind: str, routing: str, topology: Topology, device: torch.device, dtype: torch.dtype
) -> DiT:
    """Return a model with this rank's experts, in eval mode. Every rank must call this.

    Args:
        reader: the weights.
        kind: which of them, a kind of the reader.
        routing: the inference rule.
        topology: the ranks and the expert placement.
        device: where the model runs.
        dtype: of its weights and activations.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: the model does not support the routing.
    """
    config = reader.config
    if topology.ep_size == 1:
        model = allocate(empty_model(config), device, dtype)
    else:
        from diffmoe_ds.training.setup import build_model  # imports DeepSpeed

        # Images compete only within their rank's batch, as when every rank holds all experts.
        pool_of_rank = config.routing.model_copy(update={"pool": "rank"})
        model = build_model(config.model_copy(update={"routing": pool_of_rank}), topology, device, dtype)
    model.set_inference(routing)
    restore_weights(model, reader, topology, kind)
    return model.eval()


def load_guide(plan: SamplingPlan, device: torch.device) -> DiT | None:
    """Return the guiding model of autoguidance, if any; see `load_model`."""
    return None if plan.guide is None else load_model(plan.guide, device)


def load_prompts(plan: SamplingPlan, device: torch.device) -> PromptSet | None:
    """Return the prompts of a text model, and print a warning on rank 0 if some are too long."""
    chosen, text = plan.images.prompts, plan.reader.text
    if chosen is None or text is None:
        return None
    prompts, warning = open_prompts(chosen, text, device)
    if warning is not None and plan.topology.rank == 0:
        print(f"{'warning':>11}  {warning}", flush=True)
    return prompts


def load_decoder(plan: SamplingPlan, device: torch.device) -> Decode:
    """Return the function that decodes the model's output to pixels in about [-1, 1]; see `read_decoder`."""
    if plan.vae is None:
        return lambda pixels: pixels
    return read_decoder(plan.vae, plan.reader.config.model.in_channels, device)


def read_decoder(path: str, channels: int, device: torch.device) -> Decode:
    """Return the decoder of a VAE.

    Args:
        path: directory or hub ID, the value of ``--vae``.
        channels: of the latents that the model generates.
        device: where the decoder runs.

    Raises:
        ConfigError: the VAE cannot be loaded, or its latents have a different number of channels.
    """
    from diffmoe_ds.data.vae import VAE  # imports diffusers, an extra

    vae = VAE(path, device)
    if vae.settings["latent_channels"] != channels:
        raise ConfigError(
            f"--vae {path} decodes latents of {vae.settings['latent_channels']} channels, but the model generates "
            f"{channels}."
        )
    return vae.decode


def batch_generator(plan: SamplingPlan, model: DiT, guide: DiT | None, decode: Decode) -> Generate:
    """Return the function that generates one batch of the plan's images."""

    def generate(images: range, progress: Progress) -> Pixels:
        seeds, labels = plan.images.seeds_of(images), plan.images.labels_of(images)
        ((_, pixels),) = generate_batches(model, labels, seeds, plan.settings, decode, len(images), progress, guide)
        return pixels

    return generate
