"""The averaged weights: decay, warm-up, and what is said while they hold much of the initial weights."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmoe_ds.checkpoint.description import read_description
from diffmoe_ds.checkpoint.layout import META
from diffmoe_ds.checkpoint.verify import newest_valid
from diffmoe_ds.cli import main
from diffmoe_ds.config.load import config_to_dict, load_config
from diffmoe_ds.config.schema import Config
from diffmoe_ds.config.sections import EMAConfig
from diffmoe_ds.training.resume import continued
from tests.helpers.checkpoints import reseal
from tests.helpers.training import training_arguments, write_json


@given(st.floats(0, 0.9999), st.integers(0, 3000), st.booleans())
def test_the_initial_share_is_the_product_of_the_decays(decay, steps, warmup):
    ema = EMAConfig(decay=decay, warmup=warmup)
    expected = math.prod(ema.decay_after(step) for step in range(steps))
    assert ema.initial_share(steps) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_the_warmup_ends_at_the_decay():
    ema = EMAConfig(decay=0.9)
    assert [ema.decay_after(n) for n in (0, 1, 79, 80, 81, 10**9)] == [0.1, 2 / 11, 80 / 89, 0.9, 0.9, 0.9]
    assert EMAConfig(decay=0.9, warmup=False).decay_after(0) == 0.9


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The configuration and directory of a run of five steps whose average has no warm-up."""
    folder = tmp_path_factory.mktemp("short")
    config = write_json(folder / "ds.json", ep=1, zero=0)
    assert main(["train", *training_arguments(config, folder / "run", "ema.decay=0.9999", "ema.warmup=false")]) == 0
    return config, folder / "run"


def test_a_warning_where_the_average_holds_mostly_initial_weights(short_run, tmp_path, capsys):
    config, run = short_run
    planned = ["train", *training_arguments(config, tmp_path / "other", "ema.decay=0.9999", options=["--dry-run"])]
    assert main([*planned, "ema.warmup=false"]) == 0
    assert "at the end, the averaged weights will contain 100% of the initial weights" in capsys.readouterr().out
    assert main(planned) == 0
    assert "initial weights" not in capsys.readouterr().out

    said = "warning: the averaged weights still contain 100% of the initial weights, because ema.decay is 0.9999"
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "ema")]) == 0
    assert said in capsys.readouterr().err
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "raw"), "--weights", "raw"]) == 0
    assert "initial weights" not in capsys.readouterr().err
    for path, warns in ((run, True), (tmp_path / "ema", True), (tmp_path / "raw", False)):
        command = ["sample", "--checkpoint", str(path), "--num-images", "1", "--steps", "1", "--out"]
        assert main([*command, str(tmp_path / "out")]) == 0
        assert (said.removeprefix("warning: ") in capsys.readouterr().out) == warns


def test_what_a_resumed_run_keeps():
    """The order of the images and the warm-up of runs from before these keys or their defaults, unless they are set."""
    plain = config_to_dict(Config())
    del plain["data"]["shuffle"], plain["ema"]["warmup"]
    oldest = read_description({"config": plain}, "old").config
    window = load_config(None, ["data.shuffle=window", "data.shuffle_window=30"])
    assert Config().data.shuffle == "feistel" and continued(Config(), Config()) == Config()
    for own, saved, shuffle, size, warmup in (
        ([], oldest, "whole", 16_384, False),
        ([], window, "window", 30, True),
        (["data.shuffle=feistel"], oldest, "feistel", 16_384, False),
        (["data.shuffle=window", "data.shuffle_window=40", "ema.warmup=true"], window, "window", 40, True),
    ):
        config = continued(load_config("imagenet-256", own), saved)
        assert (config.data.shuffle, config.data.shuffle_window, config.ema.warmup) == (shuffle, size, warmup)
        assert config.data.num_workers == 4


@pytest.mark.slow
def test_a_resumed_run_keeps_what_its_checkpoint_did(short_run, capsys):
    """Checkpoints of versions without the key had no warm-up; a value that is set wins."""
    config, run = short_run
    checkpoint = newest_valid(run, full=True)
    meta = json.loads((checkpoint / META).read_text())
    del meta["config"]["ema"]["warmup"]
    reseal(checkpoint, meta)
    for total, values, warmup, changed in (
        (96, [], False, False), (112, ["ema.warmup=true"], True, True), (128, [], True, False),
    ):  # fmt: skip
        arguments = training_arguments(config, run, "ema.decay=0.9999", f"run.total_images={total}", *values)
        assert main(["train", *arguments]) == 0
        assert ("ema.warmup False -> True" in capsys.readouterr().out) == changed
        assert load_config(str(run / "resolved.yaml")).ema.warmup == warmup
