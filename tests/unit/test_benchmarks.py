"""Every benchmark runs with ``--quick`` and prints the keys that `benchmarks/README.md` promises."""

from __future__ import annotations

import json
import socket

import pytest
import torch

from benchmarks import compare, moe_layer, sample, selection, step
from benchmarks.moe_layer import SHAPES, Shape
from tests.helpers.processes import run_ranks

CPU = torch.device("cpu")
ROW = {"median_ms", "q1_ms", "q3_ms", "peak_mb", "over"}
MACHINE = {"command", "date", "cpu", "cores", "threads", "python", "torch", "device"}


def check_report(text, name, opponents, baseline, keys=()):
    """Check the JSON object in the last line of a benchmark's output, and return its cases."""
    report = json.loads(text.splitlines()[-1])
    assert report["benchmark"] == name
    assert set(report["machine"]) >= MACHINE
    assert report["machine"]["command"].startswith(f"python -m benchmarks.{name} ")
    assert report["rounds"] == 2 and report["cases"]
    for case in report["cases"]:
        assert case["case"] and set(case) >= set(keys)
        if opponents is not None:
            assert set(case["opponents"]) == set(opponents)
        for row in case["opponents"].values():
            assert set(row) == ROW
            assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] and row["peak_mb"] >= 0
            assert row["over"][baseline] == pytest.approx(
                row["median_ms"] / case["opponents"][baseline]["median_ms"], rel=1e-9
            )
    return report["cases"]


def test_moe_layer(capsys):
    """The benchmark itself checks that our layer and the loop over modules give the same output."""
    assert moe_layer.main(["--quick", "--json"]) == 0
    names = {moe_layer.OURS, moe_layer.LOOP, moe_layer.NATIVE, moe_layer.AUTOEP, *moe_layer.BASELINES}
    cases = check_report(capsys.readouterr().out, "moe_layer", names, moe_layer.PRODUCTS, ("shape", "skipped"))
    assert [case["shape"]["dtype"] for case in cases] == ["fp32", "bf16"]
    assert not any(case["skipped"] for case in cases)


def test_moe_layer_takes_a_shape(capsys):
    assert moe_layer.main(["--quick", "--tokens", "96", "--width", "32", "--experts", "4"]) == 0
    text = capsys.readouterr().out
    assert "T 96, D 32, E 4, fp32" in text and "over products + activation" in text
    assert len(SHAPES) == 5 and Shape(8192, 384, 16, "bf16") in SHAPES


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (["--tokens", "64"], "must be given together; add --width and --experts."),
        (["--tokens", "4", "--width", "8", "--experts", "8"], "--tokens must be at least --experts (8), got 4."),
        (["--rounds", "0"], "--rounds must be positive, got 0."),
    ),
)
def test_wrong_options(arguments, message, capsys):
    assert moe_layer.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_step(capsys):
    assert step.main(["--quick", "--json", "--routing", *step.ROUTINGS, "--micro-batch", "1"]) == 0
    opponents = {"dense", *step.ROUTINGS}
    (case,) = check_report(capsys.readouterr().out, "step", opponents, "dense", ("images", "threads", "tflop_per_s"))
    assert set(case["tflop"]) == opponents and all(value > 0 for value in case["tflop"].values())


@pytest.mark.slow
def test_whole_step_under_deepspeed():
    finished = run_ranks(1, ["-m", "benchmarks.step", "--quick", "--json", "--deepspeed"])
    assert finished.code == 0, finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith('{"benchmark"')]
    _, whole = check_report(line, "step", ("dense", "batch_pool"), "dense", ("measures",))
    assert whole["parameters"]["batch_pool"] > whole["parameters"]["dense"]
    for shares in whole["shares"].values():
        assert set(shares) == {"forward", "backward", "thresholds", "optimizer", "ema"}
        assert sum(shares.values()) == pytest.approx(1)


def test_sample(capsys):
    assert sample.main(["--quick", "--json"]) == 0
    (case,) = check_report(capsys.readouterr().out, "sample", ("dense", *sample.RULES), "dense", ("mean_capacity",))
    assert case["mean_capacity"] == pytest.approx(dict.fromkeys(sample.RULES, 1.0), rel=0.02)


def test_thresholds_give_mean_capacity_1_with_different_counts():
    probability = torch.rand(160, 16, generator=torch.Generator().manual_seed(0))
    counts = (probability > sample.thresholds(probability)).sum(0)
    assert counts.sum() == 160
    assert counts.min() == 8 and counts.max() == 12


@pytest.mark.slow
def test_selection_on_one_and_two_ranks(capfd, monkeypatch):
    """Both ways give the same mask; the benchmark checks it."""
    monkeypatch.delenv("RANK", raising=False)  # left by a training run in this process
    assert selection.main(["--quick", "--json"]) == 0
    cases = check_report(
        capfd.readouterr().out, "selection", (selection.OURS, selection.SORT), selection.SORT, ("sent",)
    )
    assert [case["ranks"] for case in cases] == [1, 2]
    assert all(sent["collectives"] == 0 for sent in cases[0]["sent"].values())
    gathered = cases[1]["sent"][selection.SORT]
    assert gathered["collectives"] == 1 and gathered["bytes"] == 2 * 64 * 4 * 4
    assert cases[1]["sent"][selection.OURS]["collectives"] > 0


def test_dispatch():
    finished = run_ranks(2, ["-m", "benchmarks.dispatch", "--quick", "--json"])
    assert finished.code == 0, finished.output
    (line,) = [line for line in finished.output.splitlines() if line.startswith('{"benchmark"')]
    (case,) = check_report(line, "dispatch", None, "all_to_all_single", ("sent", "ranks"))
    rows = 4 * 64 * 16 * 4
    assert case["sent"]["all_to_all_single"] == {
        "collectives": 4, "bytes": rows, "by": {"all_to_all": {"calls": 4, "bytes": rows}},
    }  # fmt: skip
    assert case["sent"]["diffmoe, equal counts"]["bytes"] == rows


def test_peak_bytes_counts_live_storages_once():
    kept = torch.ones(1000)

    def run():
        a = kept * 2  # 4,000 bytes
        view = a[:10].view(2, 5)
        b = view.sum(1) + a[:2]  # a few bytes
        a.add_(1)  # in place
        del a, view
        c = kept.clone()  # after a was freed
        return b, c

    assert 4000 <= compare.peak_bytes(run, CPU) < 4100
    assert compare.peak_bytes(lambda: kept.view(10, 100).mT, CPU) == 0
    assert compare.peak_bytes(lambda: [kept * 2, kept * 3], CPU) == 8000


def test_opponents_take_turns_in_both_orders():
    calls = []
    names = ("a", "b", "c")
    rows = compare.compare(
        {name: lambda name=name: calls.append(name) for name in names},
        rounds=2,
        device=CPU,
        baselines=("b", "missing"),
        calls=1,
    )
    assert "".join(calls) == "aabbcc" + "abc" + "cba" + "abc"  # warm-up, two rounds, memory
    assert all(set(row["over"]) == {"b"} for row in rows.values())


def test_facts_contain_no_host_name():
    facts = compare.machine_facts("benchmarks.step", ["--json"])
    assert socket.gethostname() not in json.dumps(facts)
    assert facts["cpu"] and facts["cores"] >= 1
