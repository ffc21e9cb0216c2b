"""Text features in micro-batches: the same captions for every layout, worker count and start; what does not fit."""

import json
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.data import encoded_captions
from diffmoe_ds.data.dataset import (
    check_classes,
    check_first_image,
    missing_classes,
    open_dataset,
    truncated_captions,
    with_text,
)
from diffmoe_ds.data.encoded_captions import EncodedCaptions
from diffmoe_ds.data.shuffle import sample_index
from diffmoe_ds.data.sources.index_files import save_index
from diffmoe_ds.data.sources.latents import LatentFormat
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.evaluation.held_out import HeldOut, read_held_out
from diffmoe_ds.files import sha256_of
from diffmoe_ds.rng import Purpose, caption_choice, philox, training_draws
from diffmoe_ds.text_features import padded_row
from tests.helpers.data import (
    GREY,
    IMAGES,
    SHAPE,
    assert_same,
    by_position,
    caption,
    format_member,
    image_file,
    loader,
    take,
    text_features,
    text_member,
    write_tar,
)

FORM = text_features()
TEXTS = [[f"number {number} {'again ' * place}".strip() for place in range(1 + number % 3)] for number in range(IMAGES)]
"""One to three captions of each image."""


def shard(path, damaged=()):
    """An image of 5x6 for each of `TEXTS`, with its number in the pixels and in the label."""
    files = [format_member(FORM)]
    for number, texts in enumerate(TEXTS):
        image = b"no picture" if number in damaged else image_file(GREY + number)
        files += [(f"{number:03d}.png", image), (f"{number:03d}.cls", b"%d" % number)]
        files.append(text_member(f"{number:03d}", *texts))
    return write_tar(path, files)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ShardDataset:
    return ShardDataset([shard(tmp_path_factory.mktemp("text") / "a.tar.gz")])


def rows(texts):
    return np.stack([padded_row(FORM.layout, caption(text).features) for text in texts])


def texts_of(batch):
    """The captions of a micro-batch."""
    known = {padded_row(FORM.layout, caption(text).features).tobytes(): text for texts in TEXTS for text in texts}
    return [known[row.numpy().tobytes()] for row in batch.text]


def read(dataset, count=3, **changes):
    return take(count, loader(dataset, **{"reads_text": True, "num_classes": 1, **changes}))


def config_of(path=None, **model):
    tree = {"name": "nano-E4", "patch_size": 4, "in_channels": 1, "input_size": 8, "conditioning": "text", **model}
    return config_from_dict({"model": tree, "data": {} if path is None else {"path": str(path)}}, "a test")


def test_micro_batches_hold_the_chosen_captions(small):
    plain = take(3, loader(small, num_classes=IMAGES))
    assert all(batch.text is None for batch in plain)
    seen = Counter()
    for batch, other in zip(read(small), plain, strict=True):
        assert batch.text.dtype == torch.float16 and batch.text.shape == (16, FORM.layout.values)
        for field in ("x", "noise", "time", "drop", "position"):
            assert torch.equal(getattr(batch, field), getattr(other, field)), "text changes no other draw"
        assert not batch.label.any() and other.label.any()
        for position, text in zip(batch.position.tolist(), texts_of(batch), strict=True):
            texts = TEXTS[sample_index(5, position, IMAGES)]
            assert text == texts[int(caption_choice(5, position) * len(texts))]
            seen[len(texts), texts.index(text)] += 1
    assert len(seen) == 6, "every caption is chosen at some position"


def test_the_choice_has_a_stream_of_its_own():
    choices = np.array([caption_choice(5, position) for position in range(2000)])
    assert choices.min() >= 0 and choices.max() < 1 and abs(choices.mean() - 0.5) < 0.03
    assert caption_choice(5, 7) != caption_choice(6, 7) and caption_choice(5, 7) == choices[7]
    assert Purpose.CAPTIONS == 10
    assert caption_choice(5, 7) == np.random.Generator(philox(5, Purpose.CAPTIONS, 7)).random()


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(2, 8, 1), (4, 2, 2), (1, 4, 4)])
def test_captions_do_not_depend_on_the_layout(small, world, micro, accumulation):
    whole, split = by_position(read(small)), []
    for rank in range(world):
        layout = {"rank": rank, "world": world, "micro_batch": micro, "accumulation": accumulation}
        split += read(small, 3 * accumulation, **layout)
    assert_same(by_position(split), whole)


@pytest.mark.parametrize("start", [16, 20, 45])
def test_a_later_start_continues_with_the_same_captions(small, start):
    whole = by_position(read(small, 5))
    tail = by_position(read(small, 2, start_position=start, num_workers=1))
    assert_same(tail, {position: whole[position] for position in range(start, start + 32)})


def test_an_image_that_replaces_another_has_its_own_caption(tmp_path):
    dataset = ShardDataset([shard(tmp_path / "a.tar", damaged=range(0, IMAGES, 2))])
    for batch in read(dataset, replaces_unreadable=True):
        assert batch.unreadable
        for image, text in zip(batch.x, texts_of(batch), strict=True):
            number = round(float((image[0, 1:6, 1:7].mean() + 1) * 127.5 - GREY.mean()))
            assert number % 2 == 1 and text in TEXTS[number]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prepared_latents_have_text_as_well(tmp_path, num_workers):
    latents = LatentFormat(1, 8, 64, "float16", 1.0, 0.0, "vae")
    moments = np.random.default_rng(0).standard_normal((2, 2, 1, 8, 8))
    head = [("__latents__", json.dumps(latents.to_json()).encode()), format_member(FORM)]
    path = write_tar(tmp_path / "a.tar", [*head, ("a.npy", latents.encode(moments)), text_member("a", TEXTS[4][1])])
    draws = partial(training_draws, 5, shape=SHAPE, label_dropout=0.3, posterior=True)
    (batch,) = read(ShardDataset([path]), 1, draws=draws, num_workers=num_workers)
    assert batch.posterior is None and texts_of(batch) == [TEXTS[4][1]] * 16


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_features_name_their_sample(tmp_path, num_workers):
    files = [format_member(FORM), ("a.png", image_file(GREY)), ("a.text", text_member("a", "x")[1][:-2] + b"\xff\x7f")]
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", files)])
    message = r"^sample 'a' of shard .*a.tar has a .text that cannot be decoded: a record contains NaN or Inf$"
    with pytest.raises(DataError, match=message):
        read(dataset, num_workers=num_workers)


def test_held_out_images_use_their_first_caption(tmp_path):
    config = config_of(shard(tmp_path / "a.tar"))
    config = with_text(config, open_dataset(config))
    held_out = read_held_out(config, config.data.path, "data.validation_path")
    for world in (1, 2):
        batches = [batch for rank in range(world) for batch in held_out.batches(4, rank, world)]
        found = [text for batch in batches for text in texts_of(batch)]
        assert found[:IMAGES] == [texts[0] for texts in TEXTS]
    plain = config_of(config.data.path, conditioning="class", num_classes=IMAGES)
    assert next(HeldOut(held_out.dataset, plain).batches(2)).text is None


def test_held_out_images_keep_their_text_features(tmp_path):
    """`data.text_encoder` is for the training images."""
    config = config_of(shard(tmp_path / "a.tar"))
    config = with_text(config, open_dataset(config))
    config = config.model_copy(update={"data": config.data.model_copy(update={"text_encoder": ("missing",)})})
    with pytest.raises(ConfigError, match=r"already holds text features; remove data\.text_encoder"):
        open_dataset(config)
    assert read_held_out(config, config.data.path, "data.validation_path").dataset.text == FORM


def test_the_configuration_takes_the_shapes_of_the_set(tmp_path):
    config = config_of(shard(tmp_path / "a.tar"))
    dataset = open_dataset(config)
    found = with_text(config, dataset)
    assert found.model.text_encoders == ((4, 3, 2),) and found.model.num_classes == 1
    assert found.text_layout == FORM.layout and with_text(found, dataset) == found
    check_classes(found, dataset)  # labels of 21 classes are ignored
    check_first_image(found, dataset)
    assert missing_classes(found, dataset) is None
    other = config_of(config.data.path, text_encoders=[[4, 5, 2]])
    message = r"model.text_encoders is \[\[4, 5, 2\]\], but the text features of .*a.tar are \[\[4, 3, 2\]\]"
    with pytest.raises(ConfigError, match=message):
        with_text(other, dataset)
    with pytest.raises(ConfigError, match=message):
        read_held_out(other, config.data.path, "data.validation_path")
    plain = config_of(config.data.path, conditioning="class")
    assert with_text(plain, dataset) is plain


def test_a_set_without_text_says_how_to_add_it(tmp_path):
    config = config_of(write_tar(tmp_path / "a.tar", [("a.png", image_file(GREY))]))
    message = r"a.tar has no text features, .* `diffmoe prepare text --images .*a.tar .*, or set data.text_encoder"
    with pytest.raises(DataError, match=message):
        with_text(config, open_dataset(config))


class Encoders:
    """Makes the features of `caption`, and counts the captions."""

    format = FORM

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.long: set[str] = set()

    def encode(self, prompts):
        self.encoded += prompts
        return [caption(text) for text in prompts]

    def too_long(self, prompt):
        return "too long" if prompt in self.long else None


@pytest.fixture
def encoders(monkeypatch):
    found = Encoders()
    monkeypatch.setattr(encoded_captions, "load_encoders", lambda paths: found)
    return found


def captioned(path):
    """The images of `shard` with the same captions, not encoded."""
    files = []
    for number, texts in enumerate(TEXTS):
        files += [(f"{number:03d}.png", image_file(GREY + number)), (f"{number:03d}.txt", "\n".join(texts).encode())]
    return write_tar(path, files)


def test_captions_of_small_sets_are_encoded_at_startup(tmp_path, small, encoders):
    config = config_of(captioned(tmp_path / "a.tar"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"text_encoder": ("tiny",)})})
    dataset = open_dataset(config)
    assert isinstance(dataset, EncodedCaptions) and dataset.text == FORM
    assert encoders.encoded == list(dict.fromkeys(text for texts in TEXTS for text in texts)), "each once"
    assert [dataset.captions(number) for number in range(IMAGES)] == TEXTS
    assert with_text(config, dataset).model.text_encoders == ((4, 3, 2),)
    assert_same(by_position(read(dataset, num_workers=1)), by_position(read(small)))
    assert truncated_captions(config, dataset) is None and truncated_captions(config_of(tmp_path), small) is None
    encoders.long = {TEXTS[0][0], TEXTS[1][0]}
    long = "data.text_encoder truncates 2 captions of the training set to its maximum number of tokens"
    assert truncated_captions(config, open_dataset(config)) == long
    stored = config.model_copy(update={"data": config.data.model_copy(update={"path": str(shard(tmp_path / "b.tar"))})})
    with pytest.raises(ConfigError, match=r"data.text_encoder is tiny, but .*b.tar already holds text features"):
        open_dataset(stored)


def test_captions_that_take_too_much_memory(tmp_path, monkeypatch, encoders):
    monkeypatch.setattr(encoded_captions, "MAX_BYTES", 100)
    dataset = ShardDataset([captioned(tmp_path / "a.tar")])
    with pytest.raises(DataError, match=r"text features of \d captions take more than .* GiB of memory; encode"):
        EncodedCaptions(dataset, dataset, encoders)


def check(path, capsys):
    capsys.readouterr()
    code = main(["prepare", "check", str(path), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_prepare_check_decodes_text(tmp_path, capsys):
    path = shard(tmp_path / "a.tar")
    code, report = check(path, capsys)
    assert code == 0 and report["captions"] == sum(map(len, TEXTS)) and report["text_encoders"][0]["name"] == "tiny"
    main(["prepare", "check", str(path)])
    assert "42 captions encoded by tiny (4 tokens of width 3)" in capsys.readouterr().out
    place = path.read_bytes().index(b"number 4")
    path.write_bytes(path.read_bytes()[:place] + b"\xff" + path.read_bytes()[place + 1 :])
    code, report = check(path, capsys)
    assert code == 4 and len(report["problems"]) == 1
    assert "sample '004' of shard" in report["problems"][0] and "a .text that cannot be" in report["problems"][0]


def test_prepare_check_compares_text_with_the_index_and_other_shards(tmp_path, capsys):
    path = shard(tmp_path / "a.tar")
    index = ShardDataset([path]).index
    named = replace(index, shards=(index.shards[0]._replace(name="a.tar"),))
    save_index(named, tmp_path, {"sha256": {"a.tar": sha256_of(path)}})
    assert check(tmp_path, capsys)[0] == 0
    named.text[[0, 3], 3:] = named.text[[3, 0], 3:]
    save_index(named, tmp_path, {"sha256": {"a.tar": sha256_of(path)}})
    assert "2 samples of shard a.tar another offset, label, key, text or" in check(tmp_path, capsys)[1]["problems"][0]
    for file in tmp_path.glob("index*"):
        file.unlink()
    form = text_features(width=5)
    write_tar(tmp_path / "b.tar", [format_member(form), ("x.png", image_file(GREY)), text_member("x", "y", width=5)])
    code, report = check(tmp_path, capsys)
    assert code == 4 and "b.tar holds other text features than the first shard" in report["problems"][0]
