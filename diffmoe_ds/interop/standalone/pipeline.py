"""Generate images with a model of diffmoe-ds: one image per seed, the same as ``diffmoe sample`` generates.

This file needs torch, numpy, Pillow and diffusers only. It was exported by diffmoe-ds together with the weights.

    pipe = DiffusionPipeline.from_pretrained("DIR", trust_remote_code=True)
    images = pipe(class_labels=[1, 2], seeds=[0, 1]).images  # or prompt=["red apple", "blue car"], with a text encoder

Legend: B images, C channels, H, W height and width.
"""

import inspect
import json
import os
import shutil
from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

SAMPLERS = {"flow": ("euler", "heun"), "ddpm": ("ddpm", "ddim")}
"""Samplers of each objective; the first is the default."""
NOISE_STREAM = 2
"""Counter word of the random numbers of generated images in diffmoe-ds."""
TRAIN_STEPS, BETAS = 1000, (1e-4, 0.02)
"""The diffusion process of DDPM models."""
DDPM_GUIDED = 3
"""Number of channels that guidance changes in DDPM models, as in DiT."""
DECODED_TOGETHER = 4
"""Number of images that the VAE decodes at once."""

Model = Callable[[Tensor, Any], Tensor]
"""(x_BCHW, time) -> the guided prediction."""
Noise = Callable[[], Tensor]
"""() -> the next noise of the images."""


class DiffMoEPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers is untyped
    """Generates images from classes or prompts."""

    model_cpu_offload_seq = "conditioner->transformer->vae"
    _optional_components = ["vae", "scheduler", "conditioner"]  # noqa: RUF012 - as in diffusers

    def __init__(
        self, transformer: Any, vae: Any = None, scheduler: Any = None, id2label: dict[str, str] | None = None,
        conditioner: Any = None,
    ) -> None:  # fmt: skip
        """Combine the parts.

        Args:
            transformer: a `DiffMoETransformer2DModel`, or a `DiTTransformer2DModel` that diffmoe-ds exported.
            vae: the `AutoencoderKL` that decodes latents; None if the model generates pixels.
            scheduler: not used here, but by `DiTPipeline`; see the argument ``sampler`` of the call.
            id2label: name of each class.
            conditioner: the `DiffMoETextConditioner` of a text-to-image model.
        """
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, conditioner=conditioner)
        self.register_to_config(id2label=id2label)
        self.labels = {name: int(label) for label, name in (id2label or {}).items()}
        for block in getattr(transformer, "transformer_blocks", ()):  # of DiTTransformer2DModel
            # diffusers computes the frequencies of the time embedding differently than DiT and diffmoe-ds
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the pipeline together with its code, without which diffusers could not load it again."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub would upload the pipeline without its code; use pipe.push_to_hub(NAME).")
        super().save_pretrained(save_directory, *args, **kwargs)
        path = os.path.join(save_directory, "model_index.json")
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
        # diffusers names the modules under which it has imported the files
        parts = {"transformer": self.transformer, "conditioner": self.conditioner}
        for key, part, folder in (("_class_name", self, ""), *((name, part, name) for name, part in parts.items())):
            if part is not None and not type(part).__module__.startswith("diffusers."):
                source = inspect.getfile(type(part))
                name = os.path.basename(source)
                shutil.copyfile(source, os.path.join(save_directory, folder, name))
                tree[key] = [name.removesuffix(".py"), type(part).__name__]
        with open(path, "w", encoding="utf-8") as file:
            json.dump(tree, file, indent=1)

    @property
    def objective(self) -> str:
        """``flow`` or ``ddpm``."""
        return str(self.transformer.config.get("objective", {"kind": "ddpm"})["kind"])

    @property
    def num_classes(self) -> int:
        """Number of classes; this number is also the label "no label"."""
        config = self.transformer.config
        return int(config["num_classes"] if "num_classes" in config else config["num_embeds_ada_norm"])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str] | int | str | None = None,
        prompt: Sequence[str] | str | None = None,
        negative_prompt: str = "",
        seeds: Sequence[int] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        sampler: str | None = None,
        routing: str | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate images.

        Args:
            class_labels: labels or names, which repeat over the seeds; all classes if None.
            prompt: of a text-to-image model, in place of labels.
            negative_prompt: what guidance steers away from.
            seeds: one per image, from 0 to 2^64 - 1; None draws one for each label or prompt.
            num_inference_steps: sampler steps.
            guidance_scale: scale of classifier-free guidance; 1 disables guidance.
            sampler: flow: ``euler`` (default), ``heun``; ddpm: ``ddpm`` (default), ``ddim``.
            routing: ``per_token``, ``dynamic`` or ``static``, as the model supports; None is its default. Except with
                ``per_token``, the images of a call may compete for experts.
            generator: draws the seeds if they are None.
            output_type: ``pil``, ``np``, ``pt`` or ``latent`` (what the model generates).

        Raises:
            ValueError: an argument does not fit the model.
        """
        if (prompt or negative_prompt) if self.conditioner is None else class_labels is not None:
            raise ValueError(f"the model generates images from {'classes' if self.conditioner is None else 'prompts'}.")
        conditions = self._labels(class_labels) if self.conditioner is None else _prompts(prompt)
        if seeds is None:
            seeds = torch.randint(2**63 - 1, (len(conditions),), generator=generator).tolist()
        _check_seeds(seeds)
        repeated = [conditions[i % len(conditions)] for i in range(len(seeds))]
        sampler = SAMPLERS[self.objective][0] if sampler is None else sampler
        self._check(num_inference_steps, guidance_scale, sampler, output_type)
        self._set_routing(routing)
        sample = {"euler": self._euler, "heun": self._heun, "ddpm": self._ancestral, "ddim": self._ddim}[sampler]
        images_BCHW = sample(
            self._guided(repeated, negative_prompt, guidance_scale), self._noise(seeds), num_inference_steps
        )
        images = self._finish(images_BCHW, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images)

    def _set_routing(self, routing: str | None) -> None:
        """Choose which tokens experts take; None is the model's default."""
        if hasattr(self.transformer, "set_routing"):
            self.transformer.set_routing(routing or self.transformer.config.routing["rules"][0])
        elif routing not in (None, "static"):
            raise ValueError(f"routing must be static for this model, got {routing!r}.")

    def _labels(self, class_labels: Sequence[int | str] | int | str | None) -> list[int]:
        """Return the labels that were asked for, as numbers."""
        if class_labels is None:
            return list(range(self.num_classes))
        words = [class_labels] if isinstance(class_labels, (int, str)) else list(class_labels)
        if not words:
            raise ValueError("class_labels must name at least one class.")
        return [self._label(str(word)) for word in words]

    def _label(self, word: str) -> int:
        """Return the label of a class; a number is always a label, even if it is also a name."""
        named = {name.casefold(): label for name, label in self.labels.items()}
        label = int(word) if word.isdecimal() else named.get(word.casefold(), -1)
        if not 0 <= label < self.num_classes:
            names = f" or a name of {', '.join(self.labels)}" if self.labels else ""
            raise ValueError(f"class_labels must be from 0 to {self.num_classes - 1}{names}, got {word!r}.")
        return label

    def _check(self, steps: int, guidance_scale: float, sampler: str, output_type: str) -> None:
        """Check the arguments of a call."""
        config, limit = self.transformer.config, TRAIN_STEPS if self.objective == "ddpm" else 2**31
        if not 1 <= steps <= limit:
            raise ValueError(f"num_inference_steps must be from 1 to {limit}, got {steps}.")
        if guidance_scale != 1 and not config.get("has_null_class", True):
            raise ValueError(f"guidance_scale must be 1 for a model without label dropout, got {guidance_scale}.")
        if sampler not in SAMPLERS[self.objective]:
            raise ValueError(f"sampler must be {' or '.join(SAMPLERS[self.objective])}, got {sampler!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be pil, np, pt or latent, got {output_type!r}.")
        if self.vae is None and config.in_channels not in (1, 3) and output_type != "latent":
            raise ValueError("the model generates latents; pass vae=... to from_pretrained, or output_type='latent'.")

    def _noise(self, seeds: Sequence[int]) -> Noise:
        """Return a function that draws the next noise of each image from the image's own stream, fp32 [B, C, H, W]."""
        config, device = self.transformer.config, self._execution_device
        shape = (config.in_channels, config.sample_size, config.sample_size)
        counter = np.array([0, 0, 0, NOISE_STREAM], np.uint64)
        keys = [np.array([seed, 0], np.uint64) for seed in seeds]
        streams = [np.random.Generator(np.random.Philox(key=key, counter=counter)) for key in keys]

        def noise() -> Tensor:
            drawn = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
            return torch.from_numpy(drawn).to(device)

        return noise

    def _condition(self, conditions: list[Any]) -> dict[str, Tensor]:
        """Return the transformer's arguments for labels or prompts."""
        if self.conditioner is None:
            return {"class_labels": torch.tensor(conditions, device=self._execution_device)}
        found: dict[str, Tensor] = self.conditioner(self.conditioner.encode(conditions))
        return found

    def _guided(self, conditions: list[Any], negative_prompt: str, scale: float) -> Model:
        """Return the prediction with classifier-free guidance."""
        null = self.num_classes if self.conditioner is None else negative_prompt
        wanted, unwanted = self._condition(conditions), self._condition([null] * len(conditions))
        dtype, C = next(self.transformer.parameters()).dtype, self.transformer.config.in_channels

        def forward(x: Tensor, time: Any, condition: dict[str, Tensor]) -> Tensor:
            t_B = torch.as_tensor(time, device=x.device).expand(len(x))
            predicted: Tensor = self.transformer(x.to(dtype), timestep=t_B, **condition).sample.float()
            return predicted

        def model(x: Tensor, time: Any) -> Tensor:
            if scale == 1:
                return forward(x, time, wanted)
            if self.objective == "flow":  # two passes: images compete for experts only among themselves
                toward, away = forward(x, time, wanted), forward(x, time, unwanted)
                return away + scale * (toward - away)
            both = {name: torch.cat([value, unwanted[name]]) for name, value in wanted.items()}
            toward, away = forward(torch.cat([x, x]), time, both).chunk(2)
            G = min(DDPM_GUIDED, C)
            return torch.cat([away[:, :G] + scale * (toward[:, :G] - away[:, :G]), toward[:, G:]], dim=1)

        return model

    def _euler(self, model: Model, noise: Noise, steps: int) -> Tensor:
        """Integrate the velocity from time 0 (noise) to 1 (data) with Euler's method."""
        x = noise()
        for i in self.progress_bar(range(steps)):
            x = x + model(x, np.float32(i / steps)) / steps
        return x

    def _heun(self, model: Model, noise: Noise, steps: int) -> Tensor:
        """Integrate the velocity with Heun's method."""
        x = noise()
        for i in self.progress_bar(range(steps)):
            v = model(x, np.float32(i / steps))
            v = (v + model(x + v / steps, np.float32((i + 1) / steps))) / 2
            x = x + v / steps
        return x

    def _ancestral(self, model: Model, noise: Noise, steps: int) -> Tensor:
        """Sample from the model's Gaussian in every step; the last one takes its mean."""

        def step(p: "Step", x: Tensor, predicted: Tensor, fraction: Tensor) -> Tensor:
            xstart = (x - p.sigma * predicted) / p.signal
            mean: Tensor = p.mean_xstart * xstart + p.mean_xt * x
            log_variance = p.log_low + (p.log_beta - p.log_low) * (fraction + 1) / 2
            return mean if p.is_last else mean + (log_variance / 2).exp() * noise()

        return self._reverse(model, noise(), steps, step)

    def _ddim(self, model: Model, noise: Noise, steps: int) -> Tensor:
        """Take deterministic DDIM steps."""

        def step(p: "Step", x: Tensor, predicted: Tensor, fraction: Tensor) -> Tensor:
            xstart = (x - p.sigma * predicted) / p.signal
            direction = (x - p.signal * xstart) / p.sigma
            following: Tensor = p.signal_next * xstart + p.sigma_next * direction
            return following

        return self._reverse(model, noise(), steps, step)

    def _reverse(self, model: Model, x: Tensor, steps: int, step: Callable[..., Tensor]) -> Tensor:
        """Run a DDPM process of a part of the training's steps, with the same marginals (Improved DDPM, section 4)."""
        stride = np.full(steps, (TRAIN_STEPS - 1) / max(steps - 1, 1))
        stride[0] = 0.0 if steps > 1 else TRAIN_STEPS - 1
        kept = np.rint(np.cumsum(stride)).astype(np.int64)
        alphas = np.cumprod(1.0 - np.linspace(*BETAS, TRAIN_STEPS))[kept]
        process = [Step(alphas, i) for i in range(steps)]
        for i in self.progress_bar(range(steps - 1, -1, -1)):
            predicted, fraction = model(x, kept[i]).chunk(2, dim=1)
            x = step(process[i], x, predicted, fraction)
        return x

    def _finish(self, images_BCHW: Tensor, output_type: str) -> Any:
        """Decode what the model generated, and return it in the form that was asked for."""
        if output_type == "latent":
            return images_BCHW
        if self.vae is not None:
            scaling, shift = self.vae.config.scaling_factor, self.vae.config.get("shift_factor") or 0.0
            latents = (images_BCHW / scaling + shift).to(self.vae.dtype).split(DECODED_TOGETHER)
            images_BCHW = torch.cat([self.vae.decode(part).sample for part in latents]).float()
        if not images_BCHW.isfinite().all():
            raise ValueError("the generated images contain NaN or Inf; try a smaller guidance_scale.")
        if output_type == "pt":
            return images_BCHW.clamp(-1, 1) / 2 + 0.5
        pixels_BHWC = (images_BCHW.clamp(-1, 1) + 1).permute(0, 2, 3, 1).cpu()
        if output_type == "np":
            return pixels_BHWC.numpy() / 2
        arrays = (pixels_BHWC * 127.5).round().to(torch.uint8).numpy()
        return [Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def _prompts(prompt: Sequence[str] | str | None) -> list[str]:
    """Return the prompts that were asked for."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not prompts or not all(isinstance(each, str) for each in prompts):
        raise ValueError(f"prompt must be one or more texts, got {prompt!r}.")
    return prompts


def _check_seeds(seeds: Any) -> None:
    """Check that seeds are one or more integers that fit."""
    try:
        valid = len(seeds) > 0 and all(0 <= index(seed) < 2**64 for seed in seeds)
    except TypeError:  # a number instead of a list, or fractions
        valid = False
    if not valid:
        raise ValueError(f"seeds must be one or more integers from 0 to 2^64 - 1, such as range(8), got {seeds!r}.")


class Step:
    """The numbers of one step of a DDPM process (DDPM, eq. 4 and 7), computed in float64."""

    def __init__(self, alphas: Any, i: int) -> None:
        """Compute them.

        Args:
            alphas: the cumulative products of 1 - beta of all steps, least noisy first.
            i: the step.
        """
        before = [1.0, *alphas[:-1].tolist()]
        alpha, previous = float(alphas[i]), before[i]
        beta = 1 - alpha / previous
        # the posterior variance of the last step is 0; its logarithm is that of the step before
        j = max(i, 1) if len(alphas) > 1 else 0
        low = (1 - float(alphas[j]) / before[j]) * ((1 - before[j]) / (1 - float(alphas[j])) if j else 1.0)
        self.is_last = i == 0
        self.signal, self.sigma = alpha**0.5, (1 - alpha) ** 0.5
        self.signal_next, self.sigma_next = previous**0.5, (1 - previous) ** 0.5
        self.mean_xstart = beta * previous**0.5 / (1 - alpha)
        self.mean_xt = (1 - previous) * (1 - beta) ** 0.5 / (1 - alpha)
        self.log_beta, self.log_low = float(np.log(beta)), float(np.log(low))
