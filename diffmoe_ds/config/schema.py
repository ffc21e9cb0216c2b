"""What a run is made of: one frozen dataclass per section of a recipe, one docstring per field.

Batch sizes, precision, ZeRO and the expert-parallel size are not here: they come from the DeepSpeed JSON
(`config/deepspeed.py`), so that a DeepSpeed user finds them where they always are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from diffmoe_ds.config.presets import Size, parse_name
from diffmoe_ds.errors import ConfigError

RoutingKind = Literal["dense", "token_choice", "expert_choice", "batch_pool"]
PoolScope = Literal["rank", "ep", "world"]

# What each router can do once it is trained; the first is what a run samples with unless told otherwise.
INFERENCE_CHOICES: dict[str, tuple[str, ...]] = {
    "dense": ("static",),
    "token_choice": ("static",),
    "expert_choice": ("static", "dynamic"),
    "batch_pool": ("per_token", "dynamic", "static"),
}

MOST_TOKENS = 2**20
"""Tokens of an image: beyond what attention can do, and still few enough for the table of positions."""


@dataclass(frozen=True)
class ModelConfig:
    """The diffusion transformer (DiT, arXiv 2212.09748)."""

    name: str = "tiny-E8"
    """Size and experts from the table in `config/presets.py`, such as ``S-E16`` or ``Dense-L``."""
    init_from: str | None = None
    """Begin a new run with the weights of an exported model, a checkpoint or a run directory (fine-tuning)."""
    hidden_size: int | None = None
    """Width D of a token; none: the named size's."""
    depth: int | None = None
    """Number of blocks; none: the named size's."""
    num_heads: int | None = None
    """Attention heads; none: the named size's."""
    input_size: int = 32
    """Height and width of the image or latent, in pixels of the latent."""
    in_channels: int = 4
    """Channels of the image or latent."""
    patch_size: int = 2
    """Height and width of a patch; it divides ``input_size``."""
    num_classes: int = 1000
    """Number of class labels; the embedding has one more row for "no label"."""
    label_dropout: float = 0.1
    """Share of training images whose label is dropped, for classifier-free guidance; 0 trains no guidance."""
    mlp_ratio: float = 4.0
    """Hidden width of an FFN or expert, in token widths."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """FFN and expert type: two layers with tanh-GELU and biases, or SwiGLU with three matrices and no bias."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class RoutingConfig:
    """Which tokens go to which expert."""

    kind: RoutingKind = "batch_pool"
    """``batch_pool`` is DiffMoE, ``expert_choice`` EC-DiT, ``token_choice`` TC-DiT, ``dense`` has no experts."""
    pool: PoolScope = "world"
    """Who competes in ``batch_pool``: one micro-batch of this rank, of its EP group, or of all ranks."""
    num_experts: int | None = None
    """Experts E of a MoE layer; none: the named model's."""
    capacity: float = 1.0
    """Average number of experts per token, C; a whole number for ``token_choice``."""
    interleave: bool = True
    """Experts in every second block (1, 3, ...) only; otherwise in every block."""
    shared_experts: int = 0
    """Experts that every token takes besides the routed ones, as one FFN of this many expert widths."""
    capacity_predictor: bool = True
    """Train the predictor that ``dynamic`` and ``per_token`` need; ``token_choice`` never has one."""
    capacity_weight: float = 1.0
    """Weight of the capacity predictor's loss; the predictor sees detached tokens, so only it is scaled."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss of ``token_choice``."""
    threshold_decay: float = 0.95
    """Decay per optimizer step of the thresholds that ``dynamic`` and ``per_token`` compare with."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the network learns to predict."""

    kind: Literal["flow", "ddpm"] = "flow"
    """Rectified flow (velocity), or DDPM with learned variance (noise and variance: twice the channels)."""
    flow_time_scale: float = 1.0
    """What flow's time in [0, 1] is multiplied by before it is embedded.  The reference takes it as it is; 1000 gives
    it the range of DDPM's steps, which the embedding's frequencies are made for, and learns faster."""


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from."""

    path: str | None = None
    """WebDataset shards (a file, a directory, a pattern with ``{000..127}``, ``https://`` or ``pipe:`` URLs as
    WebDataset has them) or a folder of images, ``DIR/CLASS/*.jpg`` or ``DIR/*.jpg``; none: the embedded
    Fashion-MNIST.  A set without labels trains with ``model.num_classes`` 1."""
    horizontal_flip: bool = True
    """Mirror half of the images; prepared latents hold the latent of the mirrored image."""
    num_workers: int = 0
    """Loader processes per rank; 0 loads in the training process."""
    shuffle: Literal["whole", "window"] = "whole"
    """``whole`` permutes the whole set every epoch: the best mixing, but it reads at random places of all shards, so
    they belong on a local disk.  ``window`` shuffles the shards, lays them end to end and permutes inside windows of
    ``shuffle_window`` images: nearly sequential, for network file systems and URLs, and only as well mixed as the
    window and the shards are (``diffmoe prepare`` mixes shards).  Both read every image once an epoch, on any
    layout, and continue exactly."""
    shuffle_window: int = 16_384
    """Images of a window; more mix better and touch more shards at a time."""
    vae: str | None = None
    """Folder or hub name of an AutoencoderKL that encodes raw images while training, for sets too small to prepare."""
    cache_dir: str | None = None
    """Where shards behind URLs are kept, shared by the ranks of a host; none: ``~/.cache/diffmoe-ds``."""
    cache_gb: float = 100.0
    """Size of that folder in GB; the shards that were used least recently make room."""


@dataclass(frozen=True)
class OptimizerConfig:
    """What ``"auto"`` in the optimizer section of the DeepSpeed JSON stands for."""

    lr: float = 1e-4
    """Learning rate of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    eps: float = 1e-8
    """Adam's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EMAConfig:
    """The moving average of the weights, which is what one samples from."""

    decay: float = 0.9999
    """Decay per optimizer step; about the last 1 / (1 - decay) steps are averaged."""


@dataclass(frozen=True)
class RunConfig:
    """Length and rhythm of a run, counted in images so that it does not change with the batch size."""

    total_images: int = 100_000
    """Train until this many images were seen, rounded up to whole steps."""
    seed: int = 0
    """Decides initial weights, data order, noise, time steps, label dropout and flips."""
    save_every_images: int = 0
    """Save a checkpoint at least every so many images; 0 saves only at the end."""
    log_every_images: int = 2_000
    """Print a line and write TensorBoard at least every so many images."""
    sample_every_images: int = 0
    """Draw a sample grid into TensorBoard and ``samples/`` every so many images and at the end; 0 draws none."""
    start_timeout_s: float = 300.0
    """Seconds that the ranks wait for each other at the start before they name who has not come."""
    straggler_steps: int = 100
    """Compare the ranks' own work every so many steps; 0 never does."""
    straggler_ratio: float = 1.5
    """The slowest rank is reported when it needs more than this many times what the others need."""
    nonfinite_skips: int = 0
    """Steps in a row whose loss or gradient may be NaN or infinite; they are skipped, the next one ends the run."""
    rank_timeout_s: float = 300.0
    """Seconds without a sign of life from a rank after which all others leave."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How a run is saved, and what is kept."""

    keep_last: int = 3
    """Newest checkpoints that are kept; 0 keeps all."""
    keep_every_images: int = 0
    """Keep for ever the first checkpoint after every multiple of so many images; 0 keeps none for that."""
    async_save: bool = True
    """Write while training goes on, from a copy in host memory; otherwise training waits for the disk."""
    on_error: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (full disk): leave with code 5, or warn and go on to the next save."""


@dataclass(frozen=True)
class SampleConfig:
    """How the sample grids of a training run are drawn."""

    num_images: int = 40
    """Images of a grid; rounded up to a multiple of the ranks."""
    steps: int = 25
    """Sampler steps."""
    sampler: str | None = None
    """Sampler name; none takes the objective's first: ``euler`` or ``ddpm``."""
    cfg_scale: float = 1.0
    """Guidance scale; 1 is without guidance."""


@dataclass(frozen=True)
class ExpertParallelConfig:
    """A place to repeat the DeepSpeed JSON's ``expert_parallel.autoep_size``, never to change it."""

    autoep_size: int | None = None
    """If set, it must equal what the JSON says."""


@dataclass(frozen=True)
class Config:
    """A whole run: what a recipe and ``--set`` resolve to."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The transformer."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    """The experts."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The diffusion process."""
    data: DataConfig = field(default_factory=DataConfig)
    """The images."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW's numbers."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """The averaged weights."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length and rhythm."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Grids drawn while training."""
    expert_parallel: ExpertParallelConfig = field(default_factory=ExpertParallelConfig)
    """A check of the DeepSpeed JSON."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """The DeepSpeed configuration that is used when no ``--deepspeed_config`` is given."""

    def __post_init__(self) -> None:
        """Check what a single field cannot: ConfigError with the key, the value and the valid ones."""
        model, routing, run = self.model, self.routing, self.run
        size, experts = self.size, self.num_experts
        _positive("model size", size, "hidden_size", "depth", "num_heads")
        _positive("routing", routing, "capacity")
        if experts < 1:
            raise ConfigError(f"routing.num_experts is {experts}, but it must be above 0.")
        _positive("model", model, "input_size", "in_channels", "patch_size", "num_classes", "mlp_ratio")
        _positive(
            "run", run, "total_images", "log_every_images", "rank_timeout_s", "start_timeout_s", "straggler_ratio"
        )
        _positive("objective", self.objective, "flow_time_scale")
        _positive("sample", self.sample, "num_images", "steps")
        _positive("data", self.data, "shuffle_window", "cache_gb")
        _positive("optimizer", self.optimizer, "lr", "eps")
        _not_negative("run", run, "seed", "save_every_images", "sample_every_images", "nonfinite_skips")
        _not_negative("run", run, "straggler_steps")
        _not_negative("checkpoint", self.checkpoint, "keep_last", "keep_every_images")
        _not_negative("routing", routing, "shared_experts", "capacity_weight", "balance_weight")
        _not_negative("data", self.data, "num_workers")
        _not_negative("optimizer", self.optimizer, "weight_decay")
        _not_negative("sample", self.sample, "cfg_scale")
        for key, value in (
            ("model.label_dropout", model.label_dropout),
            ("routing.threshold_decay", routing.threshold_decay),
            ("ema.decay", self.ema.decay),
            ("optimizer.betas", min(self.optimizer.betas)),
            ("optimizer.betas", max(self.optimizer.betas)),
        ):
            if not 0 <= value < 1:
                raise ConfigError(f"{key} is {value}, but it must be at least 0 and below 1.")
        if run.seed >= 2**64:
            raise ConfigError(f"run.seed is {run.seed}, but it must be below 2^64.")
        if self.optimizer.lr > 3e38:
            raise ConfigError(f"optimizer.lr is {self.optimizer.lr}, which no 32-bit number can hold.")
        hidden = size.hidden_size * model.mlp_ratio
        if not 1 <= hidden < 2**63:
            raise ConfigError(
                f"model.mlp_ratio is {model.mlp_ratio}: it gives an FFN of width {size.hidden_size} a hidden width of "
                f"{hidden:g}."
            )
        if model.input_size % model.patch_size:
            raise ConfigError(
                f"model.patch_size is {model.patch_size}, which does not divide model.input_size {model.input_size}."
            )
        if self.tokens_per_image > MOST_TOKENS:
            raise ConfigError(
                f"model.input_size is {model.input_size}: {self.tokens_per_image} tokens an image, but they must be "
                f"{MOST_TOKENS} at most; raise model.patch_size."
            )
        if routing.kind != "dense" and routing.capacity > experts:
            raise ConfigError(
                f"routing.capacity is {routing.capacity}, more than the {experts} expert(s) of {model.name!r}."
            )
        if routing.kind == "token_choice" and routing.capacity != int(routing.capacity):
            raise ConfigError(
                f"routing.capacity is {routing.capacity}, but token_choice takes a whole number of experts per token."
            )
        if routing.kind == "expert_choice" and self.tokens_per_image * routing.capacity < experts:
            raise ConfigError(
                f"routing.capacity is {routing.capacity}: with {self.tokens_per_image} tokens per image and "
                f"{experts} experts no expert would take a token; raise it or use a smaller model.patch_size."
            )
        if size.hidden_size % 4 or size.hidden_size % size.num_heads:
            raise ConfigError(
                f"model.hidden_size is {size.hidden_size}, but it must be divisible by 4 and by model.num_heads "
                f"{size.num_heads}."
            )

    @property
    def size(self) -> Size:
        """The transformer's size: the named one with what the recipe changes."""
        named, model = parse_name(self.model.name)[0], self.model
        return Size(
            depth=named.depth if model.depth is None else model.depth,
            hidden_size=named.hidden_size if model.hidden_size is None else model.hidden_size,
            num_heads=named.num_heads if model.num_heads is None else model.num_heads,
        )

    @property
    def num_experts(self) -> int:
        """Experts E of a MoE layer; 1 when the model is dense."""
        if self.routing.kind == "dense":
            return 1
        return parse_name(self.model.name)[1] if self.routing.num_experts is None else self.routing.num_experts

    @property
    def inference_choices(self) -> tuple[str, ...]:
        """How a trained model can route, the best first."""
        kind = self.routing.kind
        return INFERENCE_CHOICES[kind] if self.has_capacity_predictor else ("static",)

    @property
    def has_capacity_predictor(self) -> bool:
        """Whether the MoE layers learn which tokens an expert would take."""
        return self.routing.kind in ("expert_choice", "batch_pool") and self.routing.capacity_predictor

    @property
    def tokens_per_image(self) -> int:
        """Tokens S of one image."""
        return (self.model.input_size // self.model.patch_size) ** 2


def _positive(section: str, values: object, *names: str) -> None:
    for name in names:
        if not getattr(values, name) > 0:
            raise ConfigError(f"{section}.{name} is {getattr(values, name)}, but it must be above 0.")


def _not_negative(section: str, values: object, *names: str) -> None:
    for name in names:
        if not getattr(values, name) >= 0:
            raise ConfigError(f"{section}.{name} is {getattr(values, name)}, but it must not be negative.")
