"""Shared by the data tests: small images, tar files, loaders, and a VAE in diffusers' format."""

import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffmoe_ds.data.loader import LoaderSettings, PositionLoader
from diffmoe_ds.data.sources.image_features import FeatureFormat
from diffmoe_ds.rng import training_draws
from diffmoe_ds.text_features import Caption, EncoderFeatures, EncoderInfo, TextFormat, encode_member, encode_record

SHAPE = (1, 8, 8)
IMAGES = 21  # fewer than two steps read, so that steps straddle epochs


def image_file(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered_shard(path: Path, count: int, damaged: int | None = None) -> Path:
    """Write 28x28 grayscale images of class 3, each filled with its number; the image ``damaged`` cannot be decoded."""
    members = []
    for number in range(count):
        png = b"no picture" if number == damaged else image_file(np.full((28, 28), number, np.uint8))
        members += [(f"{number:04d}.png", png), (f"{number:04d}.cls", b"3")]
    return write_tar(path, members)


GREY = np.arange(30, dtype=np.uint8).reshape(5, 6)
PNG = image_file(GREY)
LABELLED = [("a.cls", b"3"), ("a.png", PNG)]


def loader(dataset, **changes) -> PositionLoader:
    settings = {
        "seed": 5,
        "global_batch": 16,
        "micro_batch": 16,
        "accumulation": 1,
        "rank": 0,
        "world": 1,
        "image_shape": SHAPE,
        "num_classes": 4,
    }
    draws = changes.pop("draws", functools.partial(training_draws, 5, shape=SHAPE, label_dropout=0.3))
    return PositionLoader(dataset, LoaderSettings(**{**settings, **changes}), draws)


def take(count: int, iterable) -> list:
    return [item for _, item in zip(range(count), iterable, strict=False)]


def by_position(batches) -> dict[int, list[torch.Tensor]]:
    """Fields of every image by position; a position read twice is an error."""
    images = {}
    for batch in batches:
        for row, position in enumerate(batch.position.tolist()):
            assert position not in images
            images[position] = [field[row] for field in batch if isinstance(field, torch.Tensor)]
    return images


def assert_same(one: dict[int, list[torch.Tensor]], other: dict[int, list[torch.Tensor]]) -> None:
    assert one.keys() == other.keys()
    for position, fields in one.items():
        assert all(torch.equal(a, b) for a, b in zip(fields, other[position], strict=True)), position


def tiny_vae(folder: Path, scaling_factor: float = 0.5) -> Path:
    """A small AutoencoderKL with random weights, f4 with 4 latent channels, saved as diffusers saves a real one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        sample_size=32,
        scaling_factor=scaling_factor,
    )
    model.save_pretrained(folder)
    return folder


def tiny_dinov2(folder: Path, registers: bool = False, **sizes: int) -> Path:
    """A DINOv2 with random weights and 4x4 patches, saved as transformers saves a real one."""
    import transformers

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56, "patch_size": 56}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**{**small, **sizes}, num_register_tokens=3)
        transformers.Dinov2WithRegistersModel(config).save_pretrained(folder)
    else:
        transformers.Dinov2Model(transformers.Dinov2Config(**{**small, **sizes})).save_pretrained(folder)
    return folder


def photographs(folder: Path, count: int, size: int = 40, classes: int = 3) -> Path:
    """JPEG crops of the photographs that scikit-image ships, in class folders; deterministic."""
    from skimage import data

    pictures = [data.astronaut(), data.cat(), data.coffee()]
    places = np.random.default_rng(0)
    for number in range(count):
        picture = pictures[number % len(pictures)]
        top, left = (int(places.integers(0, side - size)) for side in picture.shape[:2])
        path = folder / f"class-{number % classes}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture[top : top + size, left : left + size]).save(path, quality=90)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its contents."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def text_features(width: int = 3, tokens: int = 4, name: str = "tiny", sha256: str = "ab" * 32) -> TextFormat:
    """The format of a text encoder whose features `caption` makes."""
    shape = EncoderInfo(tokens=tokens, width=width, pooled=2, name=name, sha256=sha256)
    return TextFormat((shape,), encode_record(caption("", width)))


def caption(text: str, width: int = 3) -> Caption:
    """Features of a caption, which depend on its text only; as many tokens as words, from 1 to 4."""
    draws = np.random.default_rng(list(text.encode()))
    tokens = draws.standard_normal((min(max(len(text.split()), 1), 4), width)).astype(np.float16)
    return Caption(text, (EncoderFeatures(draws.standard_normal(2).astype(np.float16), tokens),))


def format_member(form: TextFormat) -> tuple[str, bytes]:
    return "__text__", json.dumps(form.to_json()).encode()


def text_member(key: str, *captions: str, width: int = 3) -> tuple[str, bytes]:
    return f"{key}.text", encode_member([caption(text, width) for text in captions])


FEATURES = FeatureFormat(side=2, width=6, name="tiny", sha256="cd" * 32)


def image_features(number: int, form: FeatureFormat = FEATURES) -> np.ndarray:
    """Features of an image and its mirror image, which depend on its number only."""
    return np.random.default_rng(number).standard_normal((2, *form.shape)).astype(np.float16)


def features_format(form: FeatureFormat = FEATURES) -> tuple[str, bytes]:
    return "__features__", json.dumps(form.to_json()).encode()


def features_member(key: str, number: int, form: FeatureFormat = FEATURES) -> tuple[str, bytes]:
    return f"{key}.features", form.encode(image_features(number, form))


def captioned_shard(
    path: Path, count: int, width: int = 3, features: FeatureFormat | None = None, **form: object
) -> Path:
    """Write 28x28 grayscale images filled with their number, with 1 to 3 captions each and their text features.

    Args:
        path: the shard.
        count: number of images.
        width: of the text features.
        features: format of the image features; None writes none.
        form: see `text_features`.
    """
    members = [format_member(text_features(width, **form)), *([] if features is None else [features_format(features)])]
    for number in range(count):
        captions = [f"image number {number}", f"grey {number}", "grey"][: number % 3 + 1]
        png = image_file(np.full((28, 28), number, np.uint8))
        members += [(f"{number:04d}.png", png), text_member(f"{number:04d}", *captions, width=width)]
        members += [] if features is None else [features_member(f"{number:04d}", number, features)]
    return write_tar(path, members)
