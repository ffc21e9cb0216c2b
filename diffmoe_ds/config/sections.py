"""The sections of a recipe but `routing`, one class each, in the order of `diffmoe_ds.config.schema.Config`.

The string below a field documents it: `diffmoe config`, the JSON schema and ``docs/configuration.md`` print it.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from diffmoe_ds.config.fields import (
    Betas,
    ClassCount,
    Count,
    Dimension,
    FeatureShape,
    Flag,
    Fraction,
    GeneratedImages,
    Gigabytes,
    Integer,
    LearningRate,
    Metrics,
    ModelName,
    NonNegativeInteger,
    NonNegativeNumber,
    Number,
    PositiveInteger,
    PositiveNumber,
    SamplerSteps,
    Seconds,
    Section,
    Seed,
    SmallInteger,
    Steps,
    Text,
    TextEncoders,
    Texts,
)


class ModelConfig(Section):
    """The diffusion transformer (DiT, arXiv 2212.09748)."""

    name: ModelName = "tiny-E8"
    """Model size and number of experts as `SIZE-E<experts>`, such as `S-E16` or `L-E8`; `Dense-L`, the same as `L-E1`,
    has no experts. Sizes: `nano`, `tiny`, `mini`, `S`, `B`, `L`, `XL`, `T2I`; numbers of experts: 1, 2, 4, 8, 16."""
    init_from: Text | None = None
    """Exported model, checkpoint or run directory from which a new run takes its initial weights (fine-tuning), and its
    architecture, except for keys that your own recipe or `--set` sets."""
    hidden_size: Dimension | None = None
    """Width D of a token; defaults to that of the named size. Must be divisible by 4 and by `num_heads`."""
    depth: Count | None = None
    """Number of transformer blocks; defaults to that of the named size."""
    num_heads: Count | None = None
    """Number of attention heads; defaults to that of the named size."""
    input_size: Dimension = 32
    """Height and width of the network's input: of the image in pixels or, for latents, of the latent."""
    in_channels: Count = 4
    """Channels of the network's input: 4 for Stable Diffusion latents, 3 for RGB images, 1 for grayscale."""
    patch_size: Dimension = 2
    """Height and width of a patch, which becomes one token; must divide `input_size`."""
    conditioning: Literal["class", "text"] | None = None
    """What an image is generated from: a class label (`class`), or a prompt (`text`), whose features every block reads
    by cross-attention. Defaults to that of the named size: `text` for `T2I`, `class` for all others."""
    num_classes: ClassCount = Field(default="auto", validate_default=True)
    """Number of class labels: `auto` is that of the training set, 1 without labels. The embedding has one extra row for
    "no label". Text models have no classes."""
    text_encoders: TextEncoders = Field(default="auto", validate_default=True)
    """Shape of the text features as `[tokens, width, pooled width]` for each text encoder, for example
    `[[77, 768, 768]]`; `auto` is that of the training set. Class models have none."""
    text_qk_norm: Flag = True
    """Normalize queries and keys of the cross-attention to text (RMSNorm per head), which keeps training stable."""
    label_dropout: Fraction = 0.1
    """Fraction of training images whose label is dropped, or whose caption is replaced by the empty prompt, as
    classifier-free guidance requires; 0 disables both."""
    mlp_ratio: PositiveNumber = 4.0
    """Hidden width of an FFN or expert, as a multiple of `hidden_size`."""
    mlp: Literal["gelu", "silu", "swiglu"] = "gelu"
    """FFN and expert type: `gelu` has two layers with biases and tanh-GELU; `silu`, for FFNs only, has SiLU instead;
    `swiglu` has three without biases."""
    qk_norm: Literal["none", "layer", "rms"] = "none"
    """Normalize the queries and keys of each head in self-attention, which keeps the training of large models stable
    (arXiv 2302.05442): with LayerNorm (`layer`, as in ProMoE) or with RMSNorm (`rms`, as in SD3, arXiv 2403.03206)."""
    norm: Literal["layer", "rms"] = "layer"
    """Norms before attention and FFN: LayerNorm without weights, as in DiT, or RMSNorm (arXiv 1910.07467) with weights,
    as in DSMoE."""
    positions: Literal["sincos", "rope"] = "sincos"
    """Positions of tokens: `sincos` adds fixed embeddings to them, as DiT does; `rope` rotates queries and keys by row
    and column instead (2-D RoPE, arXiv 2403.13298), as in DSMoE. Needs a head width divisible by 4."""
    activation_checkpointing: Flag = False
    """Recompute each block in the backward pass instead of storing its activations: less memory, slower steps."""
    compile: Flag = False
    """Compile each block with `torch.compile` for training: a slow start, then faster steps on GPUs."""


class ObjectiveConfig(Section):
    """What the network learns to predict."""

    kind: Literal["flow", "ddpm"] = "flow"
    """`flow` is rectified flow (predicts velocity); `ddpm` is DDPM with learned variance (predicts noise and variance,
    so twice the output channels)."""
    flow_time_scale: PositiveNumber = 1.0
    """Factor applied to the flow time, in [0, 1], before it is embedded. The reference implementation uses 1; 1000
    matches the range of DDPM time steps, for which the embedding was designed, and trains faster."""
    flow_direction: Literal["noise_to_data", "data_to_noise"] = "noise_to_data"
    """Direction of time in the network of `flow`: `data_to_noise` shows it the noise level and lets it predict noise -
    data, as in ProMoE and SD3. All that a run reads and writes, such as training times, is the same for both."""
    time_distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the training times of `flow`; `logit_normal` trains more at medium noise levels (arXiv
    2403.03206)."""
    time_mean: Number = 0.0
    """Mean of the logit of the noise level under `logit_normal`; positive values mean more noise."""
    time_std: PositiveNumber = 1.0
    """Standard deviation of the logit of the noise level under `logit_normal`."""
    time_shift: PositiveNumber = 1.0
    """Factor for the odds of noise against data in the training times of `flow`; above 1, images are noisier. Common
    for latents of high resolution, with values of about 3."""

    min_snr_gamma: PositiveNumber | None = None
    """Weight the squared error of `ddpm` by min(SNR, gamma) / SNR, so that images with little noise do not dominate
    training (min-SNR, arXiv 2303.09556, which uses 5). The loss of the variance and validation are not weighted."""

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys of the recipe that have no effect with its other keys, such as those of `flow` under `ddpm`."""
        keys: tuple[str, ...] = ("time_mean", "time_std") if self.time_distribution == "uniform" else ()
        if self.kind == "flow":
            keys += ("min_snr_gamma",)
        if self.kind != "flow":
            keys = ("flow_time_scale", "flow_direction", "time_distribution", "time_mean", "time_std", "time_shift")
        default = ObjectiveConfig()
        return tuple(key for key in keys if getattr(self, key) != getattr(default, key))


class LossConfig(Section):
    """Losses in addition to that of the objective."""

    repa_weight: NonNegativeNumber = 0.0
    """Weight of the REPA loss (arXiv 2410.06940), which aligns the tokens of one block, through a small projector, with
    image features stored in the training set (`diffmoe prepare latents` or `images` with `--features`). 0 disables it;
    the paper uses 0.5."""
    repa_block: Count | None = None
    """Block whose output is aligned, from 1; defaults to a third of the depth."""
    repa_hidden: Dimension = 2048
    """Hidden width of the projector, which has three layers and is not used in sampling."""
    repa_features: FeatureShape = Field(default="auto", validate_default=True)
    """Shape of the image features as `[side, width]`: a grid of side x side tokens of that width; `auto` is that of the
    training set."""


class DataConfig(Section):
    """Where training images come from."""

    path: Text | None = None
    """WebDataset shards (a file, a directory, a pattern such as `shards-{000..127}.tar`, URLs, `pipe:` commands) or a
    folder of images (`DIR/CLASS/*.jpg` or `DIR/*.jpg`). Defaults to the embedded Fashion-MNIST."""
    validation_path: Text | None = None
    """Held-out images for `eval.every_images`, in any form that `path` accepts; neither mirrored nor shuffled."""
    horizontal_flip: Flag = True
    """Mirror each image with probability 0.5; prepared latents include the latent of the mirrored image for this."""
    num_workers: SmallInteger = 0
    """Loader processes per rank; 0 loads in the training process."""
    shuffle: Literal["feistel", "whole", "window"] = "feistel"
    """`feistel` permutes the whole dataset every epoch: the best mixing, but random access to all shards, so use it on
    a local disk. Its permutation, a Feistel cipher, is computed image by image and takes no memory. `whole`, which was
    the default, also permutes the whole dataset, but every process stores the permutation. `window` shuffles and
    concatenates the shards, then shuffles within windows of `shuffle_window` images: nearly sequential reads, for
    network file systems and URLs; mixing depends on the window size and the shards (`diffmoe prepare` shuffles across
    them). All of them read every image once per epoch on any number of ranks and resume exactly. A resumed run keeps
    the shuffle of its checkpoint unless its recipe sets another one."""
    shuffle_window: PositiveInteger = 16_384
    """Window size for `shuffle: window`, in images; larger windows mix better and read from more shards at a time."""
    max_unreadable: Fraction = 0.01
    """Largest fraction of the images that may be unreadable. Such an image is named and replaced by that of the next
    position; if there are more, the run saves and stops (exit code 4). All ranks count together, each image once; the
    count starts again when a run resumes, because images may have been repaired. Prepared latents must all be
    readable."""
    vae: Text | None = None
    """Directory or hub ID of an `AutoencoderKL` that encodes raw images during training; for small datasets."""
    text_encoder: Texts = ()
    """Text encoders that encode the captions of the training images at startup, for small datasets (prepare larger ones
    with `diffmoe prepare text`): directories, hub IDs or `minilm`."""
    captions: Text | None = None
    """CSV or JSONL file with the captions for `text_encoder`, also those of `validation_path`; by default they are read
    from `.txt` or `.json` files or shard members next to the images."""
    cache_dir: Text | None = None
    """Directory for shards downloaded from URLs, shared by the ranks of a host; defaults to `~/.cache/diffmoe-ds`."""
    cache_gb: Gigabytes = 100.0
    """Maximum size of `cache_dir` in GB (10^9 bytes); the least recently used shards are evicted."""


class OptimizerConfig(Section):
    """Values for `"auto"` in the optimizer section of the DeepSpeed JSON."""

    lr: LearningRate = 1e-4
    """Learning rate of AdamW."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of Adam's first and second moment estimates."""
    eps: PositiveNumber = 1e-8
    """Adam's epsilon, added to the denominator."""
    weight_decay: NonNegativeNumber = 0.0
    """Decoupled weight decay."""
    warmup_images: NonNegativeInteger = 0
    """Images over which the learning rate rises linearly from 0; rounded up to whole optimizer steps. As in all of
    DeepSpeed's warm-ups, it is 0 in the first two steps, which initialize Adam's moments, and reaches `lr` two steps
    after the warm-up. Ignored, like `schedule`, if the DeepSpeed JSON has a scheduler."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling to 0 at `run.total_images` along half a cosine."""


class EMAConfig(Section):
    """Exponential moving average of the weights, used for sampling."""

    decay: Fraction = 0.9999
    """Decay per optimizer step; averages over roughly the last 1 / (1 - decay) steps."""
    warmup: Flag = True
    """Use a decay of at most (1 + n) / (10 + n) after n steps, so that the average of a short run forgets the initial
    weights. Unless set, a resumed run does what its checkpoint did."""

    def decay_after(self, steps: int) -> float:
        """Return the decay of the update that follows this many others."""
        return min(self.decay, (1 + steps) / (10 + steps)) if self.warmup else self.decay

    def initial_share(self, steps: int) -> float:
        """Return the share of the initial weights in the average after this many updates."""
        # the decay of the warm-up is reached after this many
        warming = min(steps, max(0, math.ceil((10 * self.decay - 1) / (1 - self.decay)))) if self.warmup else 0
        # the product of (1 + n) / (10 + n) for n < N is N! 9! / (N + 9)!
        log_share = math.lgamma(warming + 1) + math.lgamma(10) - math.lgamma(warming + 10)
        return math.exp(log_share) * self.decay ** (steps - warming)


class RunConfig(Section):
    """Length, intervals and timeouts of a run. Intervals in images do not depend on the batch size."""

    total_images: PositiveInteger = 100_000
    """Length of training in images, rounded up to whole optimizer steps."""
    seed: Seed = 0
    """Seed of the initial weights, data order, noise, time steps, label dropout and flips."""
    save_every_images: NonNegativeInteger = 0
    """Checkpoint interval in images; 0 does not save by images."""
    save_every_minutes: NonNegativeNumber = 15.0
    """Also save when this many minutes have passed since the last save, so that a crash loses no more than them; 0 does
    not save by time. There is always a checkpoint at the end."""
    log_every_images: PositiveInteger = 2_000
    """Logging interval in images, for the console and TensorBoard."""
    sample_every_images: NonNegativeInteger = 0
    """Interval in images between sample grids, written to TensorBoard and `samples/`, plus one at the end; 0 disables
    them."""
    start_timeout_s: Seconds = 300.0
    """Seconds to wait at startup for all ranks; then the run fails and names the missing ranks. Later, ranks wait that
    long, and at least 60 s, for one that hangs before its first batch."""
    straggler_steps: NonNegativeInteger = 100
    """Interval in optimizer steps between comparisons of the ranks' compute times; 0 disables them."""
    straggler_ratio: PositiveNumber = 1.5
    """Report the slowest rank if it takes more than this multiple of the median of the other ranks."""
    nonfinite_skips: NonNegativeInteger = 0
    """Number of consecutive steps with a non-finite loss or gradient to skip; one more ends the run (exit code 3)."""
    deterministic: Flag = False
    """Use deterministic algorithms on GPUs, so that a resumed run is bit-identical to an uninterrupted one, at the cost
    of slower steps. Runs on CPUs always are."""
    profile_steps: Steps = 0
    """Optimizer step, or range of steps such as `20-24`, of which rank 0 writes a profile to `profile/`; 0 disables
    it."""
    rank_timeout_s: Seconds = 300.0
    """Seconds without progress on a rank after which the other ranks exit (exit code 85)."""


class CheckpointConfig(Section):
    """How checkpoints are written and which ones are kept."""

    keep_last: NonNegativeInteger = 3
    """Number of most recent checkpoints to keep; 0 keeps all."""
    keep_every_images: NonNegativeInteger = 0
    """Also keep, permanently, the first checkpoint after each multiple of this many images; 0 disables this."""
    async_save: Flag = True
    """Write checkpoints in the background from a copy in host memory; `false` pauses training during the write."""
    on_error: Literal["stop", "continue"] = "stop"
    """If a checkpoint cannot be written (for example, the disk is full): exit with code 5, or warn and continue."""


class SampleConfig(Section):
    """How the sample grids of a training run are generated."""

    num_images: GeneratedImages = 40
    """Images per grid, rounded up to a multiple of the number of ranks."""
    steps: SamplerSteps = 25
    """Number of sampler steps."""
    sampler: Text | None = None
    """Name of the sampler. `flow`: `euler` (default), `heun`, `dopri5` or `sde`; `ddpm`: `ddpm` (default), `ddim` or
    `dpm`."""
    cfg_scale: NonNegativeNumber = 1.0
    """Scale of classifier-free guidance; 1 disables guidance."""
    prompts: Texts = ()
    """Prompts of the grids of text models; by default, they show captions of the training images."""


class EvalConfig(Section):
    """Evaluation of the EMA weights on held-out images (`data.validation_path`) during training."""

    every_images: NonNegativeInteger = 0
    """Interval in training images between evaluations, plus one at the end; 0 disables evaluation."""
    num_images: NonNegativeInteger = 0
    """Number of held-out images for the validation loss, evenly spaced in the dataset; 0 uses all images."""
    metrics: Metrics = ()
    """Metrics that compare generated images with all held-out images, as in `diffmoe evaluate`, for example
    `[frechet, kid, precision, recall]`. The `sample` section sets how images are generated, as for sample grids."""
    metric_images: GeneratedImages = 1_000
    """Number of images to generate for the metrics; values for different numbers of images are not comparable."""
    extractor: Text = "efficientnet-lite0"
    """Feature extractor of the metrics, as in `diffmoe evaluate --extractor`."""
    vae: Text | None = None
    """Directory or hub ID of the `AutoencoderKL` that decodes latents for the metrics; defaults to `data.vae`."""


class ExpertParallelConfig(Section):
    """A cross-check of the DeepSpeed JSON, where the expert-parallel size is set."""

    autoep_size: Integer | None = None
    """If set, it must equal `expert_parallel.autoep_size` of the DeepSpeed JSON; otherwise the run fails."""
