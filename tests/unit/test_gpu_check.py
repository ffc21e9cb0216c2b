"""``make gpu-check`` survives failing parts, keeps to its time budget, and writes what it found after every part."""

from __future__ import annotations

import json
from functools import partial
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import PARTS, Part, check, part_environment, run_part, summary, targets
from tests.helpers.sources import ROOT

LAYER = {"cases": [{"case": "T", "opponents": {"diffmoe": {"over": {"dense FFN": 1.05, "products": 1.2}}}}]}
STEP = {
    "machine": {"device": "NVIDIA H100 80GB HBM3"},
    "cases": [
        {"case": "L", "opponents": {"dense": {"over": {"dense": 1.0}}, "batch_pool": {"over": {"dense": 1.3}}},
         "tflop_per_s": {"dense": 500, "batch_pool": 494.5}}
    ],
}  # fmt: skip


def python(name, code, limit_s=20, **options):
    return Part(name, ("-c", code, *options.pop("arguments", ())), limit_s, **options)


def test_a_failing_part_does_not_stop_the_others(monkeypatch):
    monkeypatch.setenv("KEY", "value")
    parts = [
        python("wrong", "import sys; print('said'); sys.exit('it broke')"),
        python("slow", "import time; time.sleep(60)", limit_s=1),
        python("text", "print('no object')", arguments=["--json"]),
        python("missing", "", needs="no_such_package"),
        python("layer", f"import json; print('noise'); print(json.dumps({LAYER}))", arguments=["--json"]),
        python("tests", "import os; print(os.environ['KEY'], '3 passed')"),
    ]
    saved = []
    with part_environment() as environment:
        run = partial(run_part, environment=environment)
        report = check(parts, run, 60, lambda report: saved.append(json.loads(json.dumps(report))))
    assert [part["status"] for part in report["parts"]] == ["failed"] * 4 + ["ok"] * 2
    reasons = [part.get("why") for part in report["parts"]]
    assert reasons[:4] == [
        "exit code 1", "did not finish within 1 s", "did not print a JSON object", "no_such_package is not installed",
    ]  # fmt: skip
    assert report["ok"] is False and [len(state["parts"]) for state in saved] == [1, 2, 3, 4, 5, 6]
    text = summary(report)
    assert "it broke" in text and "value 3 passed" in text and "diffmoe 1.05 over dense FFN, 1.20 over products" in text


def test_parts_without_time_are_not_run():
    report = check([python("a", ""), python("b", "")], lambda part, limit: pytest.fail("was run"), 0, lambda _: None)
    assert [part["status"] for part in report["parts"]] == ["not run"] * 2
    assert not report["ok"] and "not run" in summary(report)


def test_a_part_gets_the_time_that_is_left():
    limits = []

    def run(part, limit):
        limits.append(limit)
        return {"status": "ok", "seconds": 0.0, "output": "fine"}

    assert check([python("a", "", limit_s=5), python("b", "", limit_s=100)], run, 50, lambda _: None)["ok"]
    assert limits[0] == 5 and 45 < limits[1] <= 50


def test_targets():
    found = targets({"layer": LAYER, "step": STEP, "tests": None})
    assert [(target["value"], target["met"]) for target in found] == [(1.05, True), (1.3, False), (0.5, True)]
    assert targets({}) == []
    unknown = {**STEP, "machine": {"device": "another GPU"}}
    assert len(targets({"step": unknown})) == 1  # no MFU without the GPU's peak


def test_a_checkout_that_is_not_installed_still_has_a_version(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(gpu_check, "version", missing)
    code = (
        "import sys; sys.path.remove(''); "  # an editable installation leaves metadata in the checkout
        "import importlib.metadata as m; print(m.distribution('diffmoe_ds').locate_file(''), m.version('diffmoe_ds'))"
    )
    with part_environment() as environment:
        first, stub = environment["PYTHONPATH"].split(":")[:2]
        assert first == str(ROOT)
        result = run_part(python("version", code), 20, {**environment, "PYTHONPATH": stub})
    assert result["output"].split() == [stub, "0.1.0"], result


def test_parts_exist_and_fit_into_the_budget():
    assert gpu_check.BUDGET_S < 15 * 60
    for part in PARTS:
        assert part.arguments[0] == "-m" and 0 < part.limit_s < gpu_check.BUDGET_S
        name = part.arguments[1].replace(".", "/")
        assert part.arguments[1] == "pytest" or (ROOT / f"{name}.py").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is wrong without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path / "out.json")]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert gpu_check.main(["--only", "nothing"]) == 2
    assert "--only nothing: no such part; valid: tests, layer," in capsys.readouterr().err
