"""Load the models of a sampling plan, and generate batches of its images with them."""

from __future__ import annotations

from functools import partial

import torch

from diffmoe_ds.checkpoint.load import restore_weights
from diffmoe_ds.cli.capacity import Dial, set_capacity
from diffmoe_ds.cli.sample_set import Generate
from diffmoe_ds.cli.sampling_plan import SamplingPlan, dtype_of, model_settings
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT, allocate, empty_model
from diffmoe_ds.sampling.fields import Progress
from diffmoe_ds.sampling.grid import Pixels
from diffmoe_ds.sampling.stream import Decode, generate_batches


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
    if plan.capacity is not None:
        key = partial(model_settings, plan, dtype_of(plan, device))
        dial = Dial(plan.capacity, plan.reader, key, plan.settings, plan.batch_size)
        set_capacity(model, guide, dial, rendezvous)
    return model, batch_generator(plan, model, guide, decode)


def load_model(plan: SamplingPlan, device: torch.device) -> DiT:
    """Return the model with this rank's experts, in eval mode on the device. Every rank must call this.

    Raises:
        CheckpointError: the weights cannot be read.
        ConfigError: the model does not support the routing.
    """
    config, topology = plan.reader.config, plan.topology
    dtype = dtype_of(plan, device)
    if topology.ep_size == 1:
        model = allocate(empty_model(config), device, dtype)
    else:
        from diffmoe_ds.training.setup import build_model  # imports DeepSpeed

        # Images compete only within their rank's batch, as when every rank holds all experts.
        routing = config.routing.model_copy(update={"pool": "rank"})
        model = build_model(config.model_copy(update={"routing": routing}), topology, device, dtype)
    model.set_inference(plan.routing)
    restore_weights(model, plan.reader, topology, plan.kind)
    return model.eval()


def load_guide(plan: SamplingPlan, device: torch.device) -> DiT | None:
    """Return the guiding model of autoguidance, if any; see `load_model`."""
    return None if plan.guide is None else load_model(plan.guide, device)


def load_decoder(plan: SamplingPlan, device: torch.device) -> Decode:
    """Return the function that decodes the model's output to pixels in about [-1, 1].

    Raises:
        ConfigError: the VAE cannot be loaded, or its latents have a different number of channels.
    """
    if plan.vae is None:
        return lambda pixels: pixels
    from diffmoe_ds.data.vae import VAE  # imports diffusers, an extra

    vae, channels = VAE(plan.vae, device), plan.reader.config.model.in_channels
    if vae.settings["latent_channels"] != channels:
        raise ConfigError(
            f"--vae {plan.vae} decodes latents of {vae.settings['latent_channels']} channels, but the model generates "
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
