"""Pretrained networks: folders in Hugging Face format, which are checked and read without running their code or
unpickling anything, and how images are converted to a network's input.

Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffmoe_ds.control_files import MAX_TEXT_BYTES, read_json
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.files import expand_user
from diffmoe_ds.text import reason

MAX_LABELS = 100_000
"""Most labels in a `config.json`, those of classifiers."""
MAX_LAYERS = 512
"""Most layers of a network; large ones have about 100."""
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of ``from_pretrained``; without the second, transformers asks whether to run the code of a folder."""

TOKENIZER_FILES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
VOCABULARIES = (
    ("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("spiece.model",),
    ("sentencepiece.bpe.model",), ("tokenizer.model",),
)  # fmt: skip
"""The files that hold the vocabulary of a tokenizer; one of these sets is needed."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ("config.json", *TOKENIZER_FILES, WEIGHTS, WEIGHTS_INDEX, "model-*.safetensors")
"""What is downloaded of a model."""


def load_transformers(what: str) -> Any:
    """Import transformers, which is an extra and slow to import.

    Args:
        what: what needs it, for messages.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{what} needs transformers, which is not installed: pip install 'diffmoe_ds[text]'."
        ) from None
    return transformers


def model_folder(path: str, what: str, files: Sequence[str], others: str = "") -> Path:
    """Return the folder of a model; one on the hub is downloaded.

    Args:
        path: a folder, or a name on the Hugging Face hub.
        what: the model or option, for messages.
        files: patterns of the files to download.
        others: what else the user could pass, for messages.

    Raises:
        ConfigError: there is neither, or it cannot be downloaded.
    """
    folder = expand_user(path)
    if folder.is_dir():
        return folder.resolve()
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(
            f"{what} {path} is neither a folder with a model of transformers, nor a name on the Hugging Face "
            f"hub{f', {others}' if others else ''}."
        )
    return download(path, files, what)


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """Return the folder of a network on the Hugging Face hub, which is downloaded unless it is in the cache.

    Args:
        name: its name on the hub.
        patterns: of the files that are needed.
        what: names it in messages.

    Raises:
        ConfigError: it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub's client raises many types
        why = " ".join(reason(error).split())[:300]
        raise ConfigError(f"{what} {name} cannot be downloaded from the Hugging Face hub: {why}.") from None


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hide the warning that weights are not used, such as those of T5's decoder, and the bar of a load of seconds."""
    import transformers

    logging = transformers.utils.logging
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def load_tokenizer(folder: Path, model: Any) -> Any:
    """Return the tokenizer of a model.

    Args:
        folder: in Hugging Face format.
        model: of transformers, with embeddings of tokens.

    Raises:
        ValueError: it has no vocabulary, no fast implementation, or more tokens than the model.
    """
    import transformers

    # Without a vocabulary, transformers makes a tokenizer for which all words are unknown.
    if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
        expected = ", ".join(" and ".join(names) for names in VOCABULARIES)
        raise ValueError(f"{folder} has no vocabulary of a tokenizer; expected one of {expected}")
    # AutoTokenizer may rebuild parts of a tokenizer instead of taking them from its file.
    has_file = (folder / "tokenizer.json").is_file()
    tokenizer_class: Any = transformers.PreTrainedTokenizerFast if has_file else transformers.AutoTokenizer
    with quiet_loading():
        tokenizer = tokenizer_class.from_pretrained(folder, **LOCAL)
    if not tokenizer.is_fast:
        raise ValueError("its tokenizer has no fast implementation; expected a tokenizer.json")
    tokenizer.truncation_side = "right"
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(f"its tokenizer has {len(tokenizer):,} tokens, but the model has embeddings of {known:,}")
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Return a `config.json`, checked before transformers reads it, which builds a name for each of ``num_labels``.

    Raises:
        OSError: it cannot be read, or is too large.
        ValueError: it is invalid, or has too many labels.
    """
    tree = read_json(folder / "config.json", MAX_TEXT_BYTES)
    if not isinstance(tree, dict):
        raise ValueError("config.json must contain an object")
    labels = tree.get("num_labels", 0)
    if type(labels) is not int or not 0 <= labels <= MAX_LABELS:
        raise ValueError(f"num_labels in config.json must be from 0 to {MAX_LABELS:,}, got {labels}")
    return tree


def check_size(build: Callable[[Any], nn.Module], config: Any, stored: int) -> None:
    """Check that a network is not larger than its weights, so that a hostile `config.json` costs little memory.

    Args:
        build: returns the network for a configuration.
        config: the configuration of transformers; that of CLIP has one for each half.
        stored: bytes of the weight files.

    Raises:
        ValueError: it is.
    """
    halves = [getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name)]
    for part in halves or [config]:
        layers = part.num_hidden_layers
        if type(layers) is not int or not 0 < layers <= MAX_LAYERS:
            raise ValueError(f"num_hidden_layers in config.json must be from 1 to {MAX_LAYERS}, got {layers}")
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build(config).parameters())
    if count > stored:
        raise ValueError(f"config.json describes {count:,} parameters, but the weight files have {stored:,} bytes")


def check_all_loaded(missing: Iterable[str]) -> None:
    """Check that the files of a network hold all its weights; transformers would initialize the others at random.

    Args:
        missing: the weights that they lack.

    Raises:
        ValueError: they lack some.
    """
    names = sorted(missing)
    if names:
        raise ValueError(f"its files lack {len(names)} of the weights, such as {names[0]}")


def to_rgb(images_BCHW: Tensor) -> Tensor:
    """Return uint8 images with 3 channels; a single channel is repeated."""
    assert images_BCHW.dtype == torch.uint8 and images_BCHW.shape[1] in (1, 3), describe(images_BCHW)
    return images_BCHW.expand(-1, 3, -1, -1)


def resize(images_BCHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize uint8 images bicubically with antialiasing to a height and width, ignoring the aspect ratio."""
    if images_BCHW.shape[-2:] == size:
        return images_BCHW
    resized = functional.interpolate(images_BCHW.float(), size, mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)


def state_digest(network: nn.Module) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def describe(tensor: Tensor) -> str:
    """Return dtype and shape, for messages."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
