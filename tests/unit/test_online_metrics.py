"""Evaluation during training: the metrics of `diffmoe evaluate`, rejected settings, and the log."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffmoe_ds.config.load import config_from_dict
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.evaluation.evaluate import FeatureSet, ReferenceSet, compute_metrics, gaussian_of
from diffmoe_ds.evaluation.held_out import decoder_path, open_held_out
from diffmoe_ds.evaluation.selected import ImageFeatures, selected_metrics
from diffmoe_ds.evaluation.sharded import ShardedRows
from diffmoe_ds.training.run_log import open_log
from tests.helpers.data import numbered_shard

NAMES = ("frechet", "kid", "inception_score", "precision", "recall")


class Named:
    """Stands in for an extractor."""

    name = "named"
    is_inception = False


def features_of(count: int, shift: float, seed: int) -> ImageFeatures:
    random = torch.Generator().manual_seed(seed)
    return ImageFeatures(torch.randn(count, 8, generator=random) + shift, torch.randn(count, 5, generator=random))


def test_the_values_are_those_of_evaluate():
    samples, reference = features_of(40, 0.5, 0), features_of(60, 0, 1)
    pooled = ShardedRows(reference.features_NF, world=1)
    every = compute_metrics(
        FeatureSet(ShardedRows(samples.features_NF, world=1), logits=ShardedRows(samples.logits_NK, world=1)),
        ReferenceSet(gaussian_of(pooled), None, pooled, 60),
        Named(),
    )
    calls = []
    found = selected_metrics(NAMES, samples, reference, lambda: calls.append(1))
    assert found == pytest.approx({name: every[name] for name in (*NAMES, "kid_std")}, rel=1e-9)
    assert len(calls) >= 4 and all(isinstance(value, float) for value in found.values())
    assert 0 < found["precision"] < 1, "a case that tells precision and recall apart"
    assert selected_metrics(("recall",), samples, reference, list) == {"recall": found["recall"]}


def test_features_of_nan_give_no_number():
    samples, reference = features_of(10, 0, 0), features_of(10, 0, 1)
    samples.features_NF[3] = torch.nan
    found = selected_metrics(("frechet", "kid", "precision", "recall"), samples, reference, list)
    assert len(found) == 5 and all(map(math.isnan, found.values()))


def test_without_logits_there_is_no_inception_score():
    samples = features_of(10, 0, 0)._replace(logits_NK=None)
    assert selected_metrics(("inception_score",), samples, samples, list) == {}


@pytest.mark.parametrize(
    ("channels", "evaluation", "message"),
    (
        (1, {"extractor": "efficientnet"}, "eval.extractor efficientnet: unknown; expected efficientnet-lite0"),
        (
            1,
            {"extractor": "tests.helpers.features:Empty"},
            "eval.extractor tests.helpers.features:Empty: returned uint8 [2, 0], expected a tensor of real numbers",
        ),
        (
            1,
            {"extractor": "tests.helpers.features:NamedSize"},
            "eval.extractor tests.helpers.features:NamedSize: input_img_size must be a positive integer",
        ),
        (1, {"vae": "some"}, "eval.vae is some, but the model generates pixels (1 channels); remove it."),
        (1, {"metric_images": 1}, "eval.metric_images must be at least 2, got 1."),
        (1, {"vae": "some", "metrics": []}, None),
    ),
)
def test_metrics_that_cannot_be_computed_are_refused_before_training(tmp_path, channels, evaluation, message):
    held_out = numbered_shard(tmp_path / "held_out.tar", 3)
    tree = {
        "model": {"name": "nano-E4", "patch_size": 8, "in_channels": channels, "num_classes": 10},
        "data": {"validation_path": str(held_out)},
        "eval": {"every_images": 100, "metrics": ["frechet"], **evaluation},
    }
    config = config_from_dict(tree, "a test")
    if message is None:
        assert len(open_held_out(config)) == 3
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_held_out(config)


def test_latents_need_a_decoder():
    def path(**sections) -> str | None:
        return decoder_path(config_from_dict({"model": {"in_channels": 4}, **sections}, "a test"))

    with pytest.raises(
        ConfigError, match=re.escape("eval.metrics needs eval.vae, because the model generates latents")
    ):
        path()
    assert path(data={"vae": "encoder"}) == "encoder"
    assert path(data={"vae": "encoder"}, eval={"vae": "decoder"}) == "decoder"


def row_of(step: int, **changes: object) -> dict:
    return {
        "step": step, "images": 16 * step, "validation_loss": 0.25,
        "validation_loss_by_noise_level": [None, *(0.1 * level for level in range(1, 10))], "validation_images": 9,
        "routing": "per_token", **changes,
    }  # fmt: skip


def test_an_evaluation_is_logged_everywhere(tmp_path, capsys):
    """As a row, as scalars and as a line; rows after the step of a resumed run are dropped."""
    metrics = {"extractor": "named", "n": 7, "n_reference": 9, "frechet": 12.3456, "recall": None}
    nothing = {"validation_loss": None, "metrics": {**metrics, "frechet": None}}
    for start, row in ((0, row_of(1)), (1, row_of(2, metrics=metrics)), (1, row_of(3, **nothing))):
        log = open_log(tmp_path, tmp_path / "board", 16 * start, start, 1000, evaluates=True)
        log.evaluation(row)
        log.close()
        rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
        assert rows[-1] == row and [kept["step"] for kept in rows] == sorted({1, row["step"]})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["validation", "loss", "0.2500", "on", "9", "held-out", "images"]
    assert lines[1].endswith("| frechet 12.35 of 7 generated images by named")
    assert lines[2].split()[:5] == ["validation", "loss", "nan", "on", "9"]
    assert lines[2].endswith("| no finite metric of 7 generated images by named")
    board = EventAccumulator(str(tmp_path / "board"), purge_orphaned_data=False)
    board.Reload()
    tags = board.Tags()["scalars"]
    assert {tag for tag in tags if tag.startswith("metrics/")} == {"metrics/frechet_named"}
    levels = {tag for tag in tags if tag.startswith("validation_by_noise_level/")}
    assert levels == {f"validation_by_noise_level/noise_{level / 10 + 0.05:.2f}" for level in range(1, 10)}
    assert board.Scalars("metrics/frechet_named")[0].value == pytest.approx(12.3456)
    assert [(event.step, event.value) for event in board.Scalars("validation/loss")] == [(16, 0.25), (32, 0.25)]


def test_a_run_without_evaluations_writes_no_file_but_drops_old_rows(tmp_path):
    open_log(tmp_path, None, 0, 0, 1000).close()
    path = tmp_path / "validation.jsonl"
    assert not path.exists()
    path.write_text("".join(json.dumps(row_of(step)) + "\n" for step in (1, 2, 3)))
    open_log(tmp_path, None, 32, 2, 1000).close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
