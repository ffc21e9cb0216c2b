"""The compute dial: calibrated thresholds, the measured capacity, and the file next to the checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from diffmoe_ds.cli import capacity as command
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.model.dit import DiT
from diffmoe_ds.moe import expert_ffn
from diffmoe_ds.sampling import capacity as dial
from diffmoe_ds.sampling.capacity import Calibration, Ranks, apply, calibrate, check_capacity, quantile_logits
from diffmoe_ds.sampling.capacity_file import CapacityFile
from diffmoe_ds.sampling.generate import SamplingSettings, generate
from diffmoe_ds.sampling.observer import CapacityMeter, capacities, observing
from tests.helpers.syncs import SyncCounter
from tests.unit.test_generate import config_of, model_of

SETTINGS = SamplingSettings("euler", 2, 2.0)


def model_with(kind: str = "batch_pool", rule: str = "per_token") -> DiT:
    model = model_of(config_of(kind))
    model.set_inference(rule)
    return model


def counts_of(model: DiT, images: int = 96, seed: int = 1000) -> Tensor:
    """Return the counts of a meter while new images are generated."""
    labels, seeds = torch.arange(images) % model.config.model.num_classes, range(seed, seed + images)
    with observing(model, CapacityMeter(model)) as meter:
        generate(model, labels, seeds, SETTINGS)
    assert model.observer is None
    return meter.counts


@pytest.mark.parametrize(
    ("kind", "rule", "capacity"),
    [
        *(("batch_pool", "per_token", capacity) for capacity in (0.25, 0.5, 1, 2, 3.9, 4)),
        *(("batch_pool", "dynamic", capacity) for capacity in (0.5, 2)),
        ("batch_pool", "static", 0.5),
        ("expert_choice", "dynamic", 2),
        ("expert_choice", "static", 4),
        ("token_choice", "static", 3),
    ],
)
def test_fresh_images_have_the_capacity_that_was_asked_for(kind, rule, capacity):
    model = model_with(kind, rule)
    before = copy.deepcopy(model.state_dict())
    found = calibrate(model, SETTINGS, capacity)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "calibrating changes nothing"
    assert {layer.capacity for layer in model.moe_layers().values()} == {model.config.routing.capacity}
    apply(model, found)
    mean_L = capacities(counts_of(model))
    assert float(mean_L.mean()) == pytest.approx(capacity, rel=0.05)
    assert found.measured == pytest.approx(capacity, rel=dial.TOLERANCE)
    assert found.threshold_LE is None or found.threshold_LE.dtype == torch.float32


def test_a_small_capacity_is_reached_although_all_probabilities_are_1_in_fp32():
    model = model_with()
    for layer in model.moe_layers().values():
        last = layer.capacity_predictor[-1]
        torch.nn.init.constant_(last.bias, 30)
    assert float(capacities(counts_of(model, 4)).mean()) == 4
    found = calibrate(model, SETTINGS, 0.1)
    assert found.measured == pytest.approx(0.1, rel=dial.TOLERANCE)
    apply(model, found)
    assert float(capacities(counts_of(model)).mean()) == pytest.approx(0.1, rel=0.1)


def test_every_number_of_ranks_finds_the_same_thresholds():
    """Three ranks share eight batches, so one of them repeats a batch."""
    model = model_with()
    alone = calibrate(model, SETTINGS, 0.5)
    barrier, lock, tables, results = threading.Barrier(3), threading.Lock(), {}, {}

    def run(rank: int, model: DiT) -> None:
        def add_up(counts: Tensor) -> Tensor:
            with lock:
                tables[rank] = counts
            barrier.wait(60)
            total = sum(tables.values())
            barrier.wait(60)
            return total

        results[rank] = calibrate(model, SETTINGS, 0.5, ranks=Ranks(rank, 3, add_up))

    threads = [threading.Thread(target=run, args=(rank, copy.deepcopy(model)), daemon=True) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for found in (results[0], results[1], results[2], calibrate(model, SETTINGS, 0.5, batch_size=3)):
        assert torch.equal(found.threshold_LE, alone.threshold_LE)


def test_the_search_does_not_alternate_between_two_sets_of_thresholds(monkeypatch):
    """For a model that overreacts: the more experts tokens take, the lower the probabilities of all experts become."""
    model = model_with()

    def overreacting(self, progress):
        logits = torch.linspace(-4, 4, 4001)
        threshold_E = model.moe_layers()[1].logit_threshold_E
        threshold = 0.0 if threshold_E is None else threshold_E[0]
        logits -= 0.95 * (threshold - 1)
        histogram = torch.histc(logits, 2 * 64 * 128, -64, 64).long().expand(len(model.moe_layers()), 4, -1)
        return 4 * float((logits > threshold).float().mean()), histogram

    monkeypatch.setattr(dial._Round, "generate", overreacting)
    found = calibrate(model, SETTINGS, 0.5)
    assert found.measured == pytest.approx(0.5, rel=0.01) and found.rounds < dial.ROUNDS


def test_quantiles_of_a_histogram():
    torch.manual_seed(0)
    model = model_with()
    census = dial.Census(model)
    layers, E = len(model.moe_layers()), 4
    logits_LTE = 3 * torch.randn(layers, 5000, E) - 1
    logits_LTE[0, :3, 0] = torch.tensor([-1e30, 1e30, torch.nan])
    mask_TE = torch.ones(5000, E, dtype=torch.bool)
    routing = tuple(SimpleNamespace(mask_TE=mask_TE, capacity_logits_TE=logits_TE) for logits_TE in logits_LTE)
    census.observe(torch.zeros(1), torch.zeros(1), SimpleNamespace(routing=routing))
    census.keep()
    assert census.histogram_LEN.sum(2).unique().tolist() == [5000]
    for fraction in (0.05, 0.125, 0.5, 0.95):
        exact_LE = logits_LTE.nan_to_num(nan=-99).double().quantile(1 - fraction, dim=1)
        torch.testing.assert_close(quantile_logits(census.histogram_LEN, fraction), exact_LE, rtol=0, atol=0.05)


def test_the_meter_neither_waits_for_the_device_nor_counts_repeated_steps(monkeypatch):
    model = model_with()
    expected = counts_of(model, 3)
    monkeypatch.setattr(expert_ffn, "GROUPED", {("cpu", torch.float32)})
    model.assumed_capacities = 8.0
    waits = []
    for meter in (CapacityMeter(model), dial.Census(model)):
        with observing(model, meter), SyncCounter() as counter:
            generate(model, torch.arange(3), range(1000, 1003), SETTINGS)
        waits.append(counter.counts["__bool__"])
        del counter.counts["__bool__"], counter.counts["tensor from the host"]
        assert not counter.counts
        torch.testing.assert_close(meter.counts, expected, rtol=0, atol=2)
    assert waits == [1, 1], "rows lost or not, after the last step"
    model.assumed_capacities = 0.1
    torch.testing.assert_close(counts_of(model, 3), expected, rtol=0, atol=2)
    assert model.assumed_capacities == 0.2, "all steps were repeated"


@pytest.mark.parametrize(
    ("kind", "rule", "capacity", "message"),
    [
        ("dense", "static", 1.0, "needs a model with experts"),
        ("batch_pool", "per_token", 0.0, "must be positive and at most the number of experts, 4, got 0"),
        ("batch_pool", "per_token", float("nan"), "got nan"),
        ("batch_pool", "dynamic", 4.5, "at most the number of experts, 4, got 4.5"),
        ("token_choice", "static", 1.5, "must be an integer for a token_choice model"),
        ("expert_choice", "static", 0.2, "must be at least 0.25 with static routing"),
    ],
)
def test_an_impossible_capacity_is_refused(kind, rule, capacity, message):
    with pytest.raises(ConfigError, match=f"^--capacity .*{message}"):
        check_capacity(capacity, rule, config_of(kind))


def found_for(capacity: float = 0.5) -> Calibration:
    return Calibration(capacity, torch.tensor([[0.1, 0.2, 0.3, 1 / 3]] * 2), 0.499, 3)


DAMAGE = {
    "cut off": lambda text: text[: len(text) // 2],
    "a threshold that someone edited": lambda text: text.replace("0.10000000149011612", "0.9", 1),
    "of another checkpoint": lambda text: text.replace("abc", "abd"),
    "no number": lambda text: resealed(text, [[float("nan")] * 4] * 2),
    "of another shape": lambda text: resealed(text, [[0.5] * 3] * 2),
    "ragged": lambda text: resealed(text, [[0.5] * 3, [0.5] * 4]),
    "infinite": lambda text: resealed(text, [[float("inf")] * 4] * 2),
    "another document": lambda text: "[1, 2]",
    "deeply nested": lambda text: "[" * 100_000,
}


def resealed(text: str, thresholds: object) -> str:
    """Return the text with other thresholds and a matching checksum."""
    from diffmoe_ds.sampling.capacity_file import _digest

    tree = json.loads(text)
    tree["calibration"]["thresholds"] = thresholds
    return json.dumps({**tree, "sha256": _digest(tree["calibration"])})


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_not_believed(tmp_path, damage):
    file = CapacityFile(tmp_path, 0.5, {"checkpoint": "abc", "interval": (0.0, 1.0)})
    assert file.read(2, 4) is None
    file.write(found_for())
    found = file.read(2, 4)
    assert found is not None and torch.equal(found.threshold_LE, found_for().threshold_LE)
    assert dataclasses.replace(found, threshold_LE=None) == dataclasses.replace(found_for(), threshold_LE=None)
    text = file.path.read_text()
    damaged = DAMAGE[damage](text)
    assert damaged != text
    file.path.write_text(damaged)
    assert file.read(2, 4) is None
    other = CapacityFile(tmp_path, 0.5, {"checkpoint": "abc", "interval": (0.0, 0.9)})
    assert other.path != file.path and other.read(2, 4) is None


def test_the_batch_size_belongs_to_the_file_only_where_images_compete(tmp_path):
    def names(rule: str) -> set[str]:
        model = model_with(rule=rule)
        found = command.Dial(0.5, SimpleNamespace(path=tmp_path), lambda: {}, SETTINGS, 50)
        return {
            command._file(found, dial.calibration_batch(model, batch_size)).path.name for batch_size in (50, 16, 15, 8)
        }

    assert len(names("per_token")) == 1
    assert len(names("dynamic")) == 2


def test_thresholds_are_kept_used_and_found_again_after_damage(tmp_path, monkeypatch, capsys):
    model, calls = model_with(), []

    def counted(*arguments):
        calls.append(arguments[2])
        return calibrate(*arguments)

    monkeypatch.setattr(command, "calibrate", counted)
    rendezvous = Rendezvous(Launch(0, 1, 0, 1, "a test"), ("here",), None, 1.0)

    def set_capacity(folder: Path, capacity: float = 0.5, batch_size: int = 50) -> list[Tensor]:
        for layer in model.moe_layers().values():
            layer.logit_threshold_E = None
        reader = SimpleNamespace(path=folder)
        found = command.Dial(capacity, reader, lambda: {"checkpoint": "abc"}, SETTINGS, batch_size)
        command.set_capacity(model, None, found, rendezvous)
        return [layer.logit_threshold_E for layer in model.moe_layers().values()]

    first = set_capacity(tmp_path)
    (path,) = tmp_path.iterdir()
    assert str(path) in capsys.readouterr().out
    assert torch.equal(torch.cat(set_capacity(tmp_path, batch_size=2)), torch.cat(first)) and calls == [0.5]
    text = path.read_text()
    path.write_text(text.replace('"measured"', '"measure"'))
    assert torch.equal(torch.cat(set_capacity(tmp_path)), torch.cat(first)) and calls == [0.5, 0.5]
    assert path.read_text() == text
    assert all(threshold_E.eq(-torch.inf).all() for threshold_E in set_capacity(tmp_path, 4.0))
    assert len(list(tmp_path.iterdir())) == 1, "no calibration, nothing to keep"
    assert "note" not in capsys.readouterr().out
    monkeypatch.setattr(command, "calibrate", lambda *arguments: dataclasses.replace(found_for(0.25), measured=0.3))
    set_capacity(tmp_path, 0.25)
    assert "the calibration reached 0.3 instead of 0.25" in capsys.readouterr().out
    set_capacity(tmp_path, 0.25)
    assert "the calibration reached 0.3 instead of 0.25" in capsys.readouterr().out, "also with saved thresholds"
    monkeypatch.setattr(command, "calibrate", counted)
    path.unlink()
    path.mkdir()  # cannot be written to, even by root
    capsys.readouterr()
    assert torch.equal(torch.cat(set_capacity(tmp_path)), torch.cat(first))
    assert "the thresholds cannot be saved" in capsys.readouterr().out
