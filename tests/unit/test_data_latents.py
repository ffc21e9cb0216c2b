"""Prepared latents in the loader: mirror, posterior, scaling, windows; and raw images that are encoded on the fly."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffmoe_ds.config.load import load_config
from diffmoe_ds.data.dataset import image_shape, open_dataset
from diffmoe_ds.data.loader import MicroBatch
from diffmoe_ds.data.shuffle import sample_index
from diffmoe_ds.data.sources import shard_paths, shards, tar_headers
from diffmoe_ds.data.sources.index_files import load_index, save_index, subset
from diffmoe_ds.data.sources.latents import FORMAT_MEMBER, LatentFormat
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.data.sources.tar_index import join, scan
from diffmoe_ds.data.vae import VAE
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.rng import philox, posterior_noise, training_draws
from tests.helpers.data import PNG, assert_same, by_position, loader, npy, photographs, take, tiny_vae, write_tar

SHAPE = (2, 3, 5)
KNOWN_POSTERIOR = [-0.1108208, 1.0096399, 1.3917893]
FORM = LatentFormat(2, 4, 32, "float16", 0.25, 0.5, "ab" * 32)
SQUARE = (2, 4, 4)


def moments(number: int) -> np.ndarray:
    """Mean and log-variance of image ``number`` and of its mirror image, fp16."""
    return np.random.default_rng(number).standard_normal((2, 2, *SQUARE)).astype(np.float16)


def write_latents(folder: Path, count: int, shards: int = 3, form: LatentFormat = FORM) -> Path:
    folder.mkdir()
    each = -(-count // shards)
    for shard in range(shards):
        members = [(FORMAT_MEMBER, json.dumps(form.to_json()).encode())]
        for number in range(shard * each, min((shard + 1) * each, count)):
            members += [(f"{number}.npy", form.encode(moments(number))), (f"{number}.cls", b"%d" % (number % 4))]
        write_tar(folder / f"s-{shard}.tar", members)
    return folder


def index_of(folder: Path) -> Path:
    """Write the index of a folder of shards and return the folder."""
    parts = []
    for path in sorted(folder.glob("*.tar")):
        with open(path, "rb") as file:
            parts.append(scan(path.name, file, path.stat().st_size))
    save_index(join(parts), folder)
    return folder


draws = functools.partial(training_draws, 5, shape=SQUARE, label_dropout=0.3, posterior=True)
latent_loader = functools.partial(loader, image_shape=SQUARE, draws=draws)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents") / "set", 21)


def test_the_posterior_is_sampled_by_position(folder):
    batch = take(1, latent_loader(ShardDataset(expand(folder))))[0]
    flips = set()
    for row in range(16):
        number, each = sample_index(5, row, 21), draws(row)
        mean, log_variance = moments(number)[int(each.flip)].astype(np.float64)
        expected = (mean + np.exp(log_variance / 2) * each.posterior - 0.5) * 0.25
        np.testing.assert_allclose(batch.x[row], expected, rtol=1e-5, atol=1e-6)
        assert batch.label[row] == number % 4
        flips.add(each.flip)
    assert flips == {True, False} and batch.posterior is None and batch.x.dtype == torch.float32


def test_posterior_noise_is_normal_and_leaves_the_other_draws_alone():
    noise = np.concatenate([posterior_noise(philox(1, 1, i), (4, 32, 32)).ravel() for i in range(50)]).astype(float)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01 and abs((noise**4).mean() - 3) < 0.1
    with_noise, without = draws(9), training_draws(5, 9, SQUARE, 0.3)
    assert with_noise[:3] == without[:3] and (with_noise.noise == without.noise).all() and without.posterior is None
    assert len({draws(p).posterior.tobytes() for p in range(40)}) == 40
    assert posterior_noise(philox(1, 1, 1), SHAPE).shape == SHAPE
    known = training_draws(7, 12348, (1, 1, 3), 0.5, posterior=True).posterior.ravel()  # old runs depend on it
    np.testing.assert_allclose(known, KNOWN_POSTERIOR, 1e-6)


@pytest.mark.parametrize("window", [0, 5])
def test_the_stream_does_not_depend_on_layout_workers_or_start(folder, window):
    make = functools.partial(latent_loader, ShardDataset(expand(folder)), shuffle_window=window)
    whole = by_position(take(4, make()))
    split = []
    for rank in range(2):
        layout = {"rank": rank, "world": 2, "micro_batch": 4, "accumulation": 2, "num_workers": rank}
        split += take(8, make(**layout))
    assert_same(by_position(split), whole)
    assert_same(by_position(take(2, make(start_position=20))), {p: whole[p] for p in range(20, 52)})


def test_an_index_opens_without_reading_the_shards(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "set")
    alone = by_position(take(2, latent_loader(ShardDataset(expand(tmp_path / "set")))))
    index_of(tmp_path / "set")
    monkeypatch.setattr(shards, "scan", lambda *_: pytest.fail("the shards were scanned"))
    with_index = ShardDataset(expand(tmp_path / "set"))
    assert_same(by_position(take(2, latent_loader(with_index))), alone)
    some = ShardDataset(expand(f"{tmp_path}/set/s-{{2,0}}.tar"))
    assert [some.key(i) for i in range(len(some))] == [str(i) for i in (*range(14, 21), *range(7))]
    assert (
        some.shard_sizes == [7, 7] and (some.read_moments([0], [True]) == with_index.read_moments([14], [True])).all()
    )
    monkeypatch.chdir(tmp_path / "set")
    assert len(ShardDataset(expand("s-1.tar"))) == 7


def test_the_index_of_a_big_scanned_dataset_is_kept(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "set")
    monkeypatch.setattr(shard_paths, "KEEP_INDEX_FROM_BYTES", 1)
    first = ShardDataset(expand(tmp_path / "set"))
    with monkeypatch.context() as patched:
        patched.setattr(shards, "scan", lambda *_: pytest.fail("the shards were scanned again"))
        again = ShardDataset(expand(tmp_path / "set"))
    assert (again.labels == first.labels).all() and again.latents == first.latents
    write_tar(tmp_path / "set" / "s-3.tar", [("x.png", PNG), ("x.cls", b"1")])
    with pytest.raises(DataError, match="hold latents of different formats"):
        ShardDataset(expand(tmp_path / "set"))
    write_tar(tmp_path / "p.tar", [("x.png", PNG)])
    (tmp_path / "p.tar").chmod(0o444)
    tmp_path.chmod(0o555)
    try:
        assert len(ShardDataset([tmp_path / "p.tar"])) == 1
    finally:
        tmp_path.chmod(0o755)


def damaged(folder: Path, name: str, how: str) -> None:
    path = folder / name
    if how == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        path.write_bytes(
            {"not json": b"{", "a pickle": b"\x80\x04N.", "of another set": npy(np.zeros((3, 7), int))}[how]
        )


@pytest.mark.parametrize("name", ["index.json", "index-samples.npy", "index-keys.npy"])
@pytest.mark.parametrize("how", ["cut", "not json", "a pickle", "of another set"])
def test_a_damaged_index_is_refused(folder, tmp_path, name, how):
    shutil.copytree(folder, tmp_path / "set")
    damaged(index_of(tmp_path / "set"), name, how)
    with pytest.raises(DataError, match=r"index .*index.json (cannot be read|do not match)|index.json do not match"):
        ShardDataset(expand(tmp_path / "set"))


def test_a_shard_that_does_not_match_its_index(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    index_of(tmp_path / "set")
    with open(tmp_path / "set" / "s-1.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"s-1.tar has \d+ bytes, but its index says \d+: it has changed"):
        ShardDataset(expand(tmp_path / "set"))


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written to"])
def test_a_shard_that_changes_while_it_is_read(folder, tmp_path, change):
    shutil.copytree(folder, tmp_path / "set")
    dataset = ShardDataset(expand(tmp_path / "set"))
    dataset.read_moments([8], [False])
    path = tmp_path / "set" / "s-1.tar"
    size = path.stat().st_size
    if change == "is written to":
        with open(path, "r+b") as file:
            file.seek(700)
            file.write(b"changed")
        os.utime(path, ns=(0, 12345))
    else:
        os.truncate(path, size + 512 if change == "grows" else size - 4096)
    for index in (7, 8):
        with pytest.raises(DataError, match=r"s-1.tar has \d+ bytes where .*: it changed after opening"):
            dataset.read_moments([index], [True])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.npy", FORM.encode(moments(0))[:-1])], "has a .npy of .* bytes; expected a .npy latent of"),
        ([("a.png", PNG)], "has a .png of .* bytes; expected a .npy latent of"),
        ([("a.npy", b"x" + FORM.encode(moments(0))[1:])], "has a .npy that is not a latent of"),
        (
            [("a.npy", FORM.encode(np.full((2, 2, *SQUARE), np.nan)))],
            "sample 'a' .* has a latent that contains NaN or Inf",
        ),
    ],
)
def test_latents_that_are_refused(tmp_path, members, message):
    members = [(FORMAT_MEMBER, json.dumps(FORM.to_json()).encode()), *members]
    path = write_tar(tmp_path / "a.tar", members)
    changes = {"num_classes": 1, "global_batch": 1, "micro_batch": 1, "draws": lambda p: draws(p)._replace(flip=False)}
    with pytest.raises(DataError, match=message):
        take(1, latent_loader(ShardDataset([path]), **changes))


def test_formats_and_labels_that_do_not_fit(folder, tmp_path):
    with pytest.raises(DataError, match=r"latents of shape .* set model.in_channels to 2 and model.input_size to 4"):
        loader(ShardDataset(expand(folder)), image_shape=(4, 4, 4))
    with pytest.raises(DataError, match=r"sample '3' .* has the label 3; the model has 3 classes, 0 to 2"):
        latent_loader(ShardDataset(expand(folder)), num_classes=3)
    for text in (b"{}", b"[]", b"{", json.dumps({**FORM.to_json(), "dtype": "object"}).encode()):
        with pytest.raises(DataError, match="invalid __latents__, which describes latents"):
            ShardDataset([write_tar(tmp_path / "a.tar", [(FORMAT_MEMBER, text), ("a.npy", b"")])])
    unlabelled = ShardDataset([write_tar(tmp_path / "b.tar", [("a.png", PNG), ("b.png", PNG)])])
    with pytest.raises(DataError, match="and all others have no label, but the model has 4 classes"):
        loader(unlabelled)
    assert set(take(1, loader(unlabelled, num_classes=1))[0].label.tolist()) == {0}


def test_subset_needs_all_names(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    index = load_index(index_of(tmp_path / "set"))
    assert subset(index, ["s-0.tar", "s-9.tar"]) is None
    assert tar_headers.MAX_MEMBER_BYTES == 64 << 20


# --- raw images ----------------------------------------------------------------------------------------------


def test_raw_images_are_encoded_on_the_fly(tmp_path):
    from diffmoe_ds.data.vae import VAE, EncodingLoader

    photographs(tmp_path / "photographs", 10, size=24)
    tiny_vae(tmp_path / "vae")
    overrides = [f"data.path={tmp_path / 'photographs'}", f"data.vae={tmp_path / 'vae'}", "model.num_classes=3"]
    config = load_config("fashion", [*overrides, "model.in_channels=4", "model.input_size=4", "model.patch_size=2"])
    dataset, shape = open_dataset(config), (4, 4, 4)
    assert image_shape(config) == (3, 16, 16) and dataset[0].image.shape == (3, 16, 16)
    some = functools.partial(training_draws, 5, shape=shape, label_dropout=0.3, posterior=True)
    vae = VAE(str(tmp_path / "vae"))

    def batches(micro_batch: int) -> list[MicroBatch]:
        pixels = loader(
            dataset, image_shape=(3, 16, 16), draws=some, micro_batch=micro_batch, accumulation=16 // micro_batch
        )
        return take(16 // micro_batch, EncodingLoader(pixels, vae))

    batch = batches(16)[0]
    assert batch.x.shape == batch.noise.shape == (16, *shape) and batch.posterior is None
    batch.x.requires_grad_()  # an inference tensor could not
    for row in range(16):
        image = dataset[sample_index(5, row, 10)].image
        each = some(row)
        mean, log_variance = vae.moments(np.ascontiguousarray(image[None, :, :, ::-1] if each.flip else image[None]))[0]
        expected = (mean + np.exp(log_variance / 2) * each.posterior) * 0.5
        np.testing.assert_allclose(batch.x[row].detach(), expected, atol=1e-5)
    for row, small in enumerate(batches(1)):
        torch.testing.assert_close(small.x[0], batch.x[row].detach(), atol=1e-5, rtol=1e-5)


def test_a_vae_that_does_not_fit(tmp_path, folder):
    tiny_vae(tmp_path / "vae")
    photographs(tmp_path / "photographs", 3, size=24)
    with pytest.raises(ConfigError, match=r"model.in_channels is 1, but the latents of data.vae .* have 4 channels"):
        open_dataset(load_config("fashion", [f"data.path={tmp_path / 'photographs'}", f"data.vae={tmp_path / 'vae'}"]))
    with pytest.raises(ConfigError, match=r"holds latents already; remove data.vae"):
        open_dataset(load_config("fashion", [f"data.path={folder}", f"data.vae={tmp_path / 'vae'}"]))


def test_a_broken_raw_image_names_its_file(tmp_path):
    photographs(tmp_path / "photographs", 3, size=24)
    (tmp_path / "photographs" / "class-1" / "00001.jpg").write_bytes(b"")
    dataset = open_dataset(load_config("fashion", [f"data.path={tmp_path / 'photographs'}"]))
    with pytest.raises(DataError, match=r"image .*class-1/00001.jpg cannot be decoded: the file is empty"):
        dataset[1]


@pytest.mark.parametrize(
    ("change", "message"),
    (
        (None, r"config\.json that is not an object, but None"),
        ({"block_out_channels": [16_384] * 3}, "parameters; the limit is 268,435,456"),
        ({}, "its files lack 1 of the weights, such as decoder.conv_in.bias"),
    ),
)
def test_a_vae_without_its_weights_or_absurdly_large_is_refused(tmp_path, change, message):
    """Diffusers would initialize what is missing at random, whatever memory it takes."""
    path = tiny_vae(tmp_path) / "config.json"
    path.write_text(json.dumps(None if change is None else {**json.loads(path.read_text()), **change}))
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        VAE(str(tmp_path))
