"""Feature extractors: weights, preprocessing, golden features, and rejected names."""

from __future__ import annotations

import json
import math
import os
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from diffmoe_ds.data.efficientnet import SameConv2d
from diffmoe_ds.data.pretrained import resize, to_rgb
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.evaluation import inception
from diffmoe_ds.evaluation.extractors import DEFAULT, Extractor, load_extractor
from tests.helpers.sources import ROOT

GOLDEN = ROOT / "tests" / "golden" / "efficientnet_lite0.json"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> Extractor:
    return load_extractor(DEFAULT, CPU)


def waves(size: int) -> Tensor:
    """Return a deterministic color image, uint8 [1, 3, size, size]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    channels = [127.5 + 127.5 * torch.sin((a * x + b * y) * math.pi / size) for a, b in ((3, 1), (-2, 5), (7, 4))]
    return torch.stack(channels).round().to(torch.uint8)[None]


def test_efficientnet_gives_its_golden_numbers(network):
    """The numbers are those of an independent implementation with the same weights; see the file."""
    golden = json.loads(GOLDEN.read_text())
    outputs = network.extract(waves(224))
    assert outputs.features_BF.shape == (1, 1280) and outputs.logits_BK.shape == (1, 1000)
    torch.testing.assert_close(outputs.features_BF[0, ::10], torch.tensor(golden["features"]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.logits_BK[0, ::100], torch.tensor(golden["logits"]), rtol=1e-4, atol=1e-4)
    assert network.name == DEFAULT and not network.is_inception


def test_efficientnet_takes_any_size_and_gray_images(network):
    images = waves(32)
    gray = images[:, :1]
    torch.testing.assert_close(network.features(gray), network.features(gray.expand(-1, 3, -1, -1)))
    both = network.features(torch.cat([images, images.flip(3)]))
    assert both.dtype == torch.float32 and both.isfinite().all() and (both[0] - both[1]).abs().max() > 0.01
    torch.testing.assert_close(both[:1], network.features(resize(images, (224, 224))), rtol=1e-4, atol=1e-4)


def test_resizing_keeps_uint8_and_its_range():
    edges = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edges[..., 4:] = 255
    large = resize(edges, (64, 64))
    assert large.dtype == torch.uint8 and large.shape == (1, 3, 64, 64), "bicubic overshoot is clipped, not wrapped"
    assert large[..., :20].max() == 0 and large[..., -20:].min() == 255
    assert resize(edges, (8, 8)) is edges
    constant = torch.full((1, 1, 50, 30), 77, dtype=torch.uint8)
    assert (resize(constant, (20, 10)) == 77).all() and (to_rgb(constant) == 77).all()


@pytest.mark.parametrize("size", (7, 8, 15))
@pytest.mark.parametrize("kernel", (1, 3, 5))
@pytest.mark.parametrize("stride", (1, 2))
def test_same_padding_is_tensorflows(size, kernel, stride):
    """The output has ceil(size / stride) pixels; if the padding is odd, the extra pixel comes last."""
    layer = SameConv2d(1, 1, kernel, stride)
    torch.nn.init.ones_(layer.weight)
    out = layer(torch.ones(1, 1, size, size))[0, 0].detach().numpy()
    steps = -(-size // stride)
    before = max((steps - 1) * stride + kernel - size, 0) // 2
    covered = [min(k * stride - before + kernel, size) - max(k * stride - before, 0) for k in range(steps)]
    np.testing.assert_allclose(out, np.outer(covered, covered))


def test_dinov2_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    model.save_pretrained(tmp_path)
    extractor = load_extractor(f"dinov2:{tmp_path}", CPU)
    assert not extractor.is_inception and extractor.name.startswith("dinov2:")
    images = torch.cat([waves(40), waves(40).flip(2)])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (resize(images, (224, 224)).float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.inference_mode():
        expected = model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.features(images), expected, rtol=1e-4, atol=1e-5)

    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_extractor(f"dinov2:{tmp_path}", CPU)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_extractor(f"dinov2:{tmp_path}", CPU)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        DataError, match=r"the model type in config\.json must be dinov2 or dinov2_with_registers, got vit"
    ):
        load_extractor(f"dinov2:{tmp_path}", CPU)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match=r"not a folder with config\.json"):
        load_extractor(f"dinov2:{tmp_path}", CPU)


@pytest.mark.parametrize(
    ("described", "stored", "message"),
    (
        ({"num_channels": 4}, {}, "failed on images of 224x224: .*channel"),
        ({"patch_size": 500, "image_size": 1000}, {}, "failed on images of 224x224: .*[Kk]ernel"),
        ({}, {"num_labels": 10**8}, "num_labels in config.json must be from 0 to 100,000, got 100000000"),
        ({}, {"return_dict": False}, None),
    ),
)
def test_a_dinov2_that_does_not_take_images_is_refused(tmp_path, described, stored, message):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1, "image_size": 28}
    transformers.Dinov2Model(transformers.Dinov2Config(**{**sizes, **described})).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **stored}))
    with nullcontext() if message is None else pytest.raises(DataError, match=message):
        load_extractor(f"dinov2:{tmp_path}", CPU).features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("name", ("", "inception", "dinov2", "inception:", "resnet50", ":Class"))
def test_unknown_names_are_refused(name):
    with pytest.raises(ConfigError, match="expected efficientnet-lite0, inception:WEIGHTS_FILE"):
        load_extractor(name, CPU)


def test_the_code_of_a_dinov2_folder_is_never_run(monkeypatch, tmp_path):
    """Transformers would ask, wait for an answer, and import the module."""
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    config = {"model_type": "other", "auto_map": {"AutoConfig": "code.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    trap = tmp_path / "executed"
    (tmp_path / "code.py").write_text(f"from pathlib import Path\nPath({str(trap)!r}).touch()\nclass Config: pass\n")
    with pytest.raises(DataError, match="cannot be loaded"):
        load_extractor(f"dinov2:{tmp_path}", CPU)
    assert not trap.exists()


def test_a_pipe_in_the_place_of_inceptions_weights_is_refused(tmp_path):
    """torch would wait for it."""
    os.mkfifo(tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"weights\.pth: cannot be read: "):
        inception._load(None, tmp_path / "weights.pth")


HOSTILE_PICKLES = {
    "a missing memo": (b"\x80\x02h\x05.", "does not hold the weights"),
    "half a number": (b"\x80\x02M\x01", "does not hold the weights"),
    "half a pair": (b"\x80\x02}(K\x01u.", "does not hold the weights"),
    "2 GB": (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\0\0\0\x80\0\x85R.", "holds bytearray"),
    "a million objects": (b"\x80\x02" + b"}0" * 600_000 + b"N.", "more than 524,288 operations"),
}


@pytest.mark.parametrize(("pickled", "message"), HOSTILE_PICKLES.values(), ids=HOSTILE_PICKLES)
def test_hostile_weights_of_inception_are_refused(tmp_path, pickled, message):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("weights/data.pkl", pickled)
        archive.writestr("weights/version", "3\n")
        archive.writestr("weights/byteorder", "little")
    with pytest.raises(DataError, match=message):
        inception._load(None, tmp_path / "weights.pth")


def test_a_dinov2_without_its_weights_or_larger_than_them_is_refused(tmp_path):
    """Transformers would initialize what is missing at random, whatever memory it takes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"hidden_size": 1 << 20}, "parameters, but the weight files have"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers in config.json must be from 1 to 512, got 1000000"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(DataError, match=message):
            load_extractor(f"dinov2:{tmp_path}", CPU)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "layernorm.weight"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(DataError, match=r"lack 1 of the weights, such as layernorm\.weight"):
        load_extractor(f"dinov2:{tmp_path}", CPU)
