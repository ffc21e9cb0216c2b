"""The trace of profiled steps: which steps it covers, on which rank, and that a full disk does not end the run."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.config.load import load_config
from diffmoe_ds.distributed.ownership import Owner
from diffmoe_ds.errors import ConfigError
from diffmoe_ds.training.profiler import ProfileSteps, profiled_steps
from diffmoe_ds.training.run_log import RunLog


def train(directory, profile_steps, start: int = 0, steps: int = 8, is_main: bool = True) -> SimpleNamespace:
    """Run steps that each mark themselves in the profile."""
    config = load_config("fashion", [f"run.profile_steps={profile_steps}"])
    owner = Owner("0" * 16)
    run = SimpleNamespace(
        config=config, is_main=is_main, directory=directory, owner=owner, step=start, is_complete=False
    )  # fmt: skip
    if is_main:
        owner.claim(directory)
    hook = ProfileSteps(run, RunLog())
    for step in range(start + 1, start + steps + 1):
        with torch.profiler.record_function(f"optimizer step {step}"):
            torch.ones(2).sum()
        run.step, run.is_complete = step, step == start + steps
        hook(None)
    return run


def recorded(path) -> list[int]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [re.fullmatch(r"optimizer step (\d+)", event.get("name", "")) for event in events]
    return sorted({int(name[1]) for name in names if name})


@pytest.mark.parametrize(
    ("profile_steps", "start", "expected"),
    (
        ("3-5", 0, {"steps_3-5": [3, 4, 5]}),
        ("4", 0, {"steps_4-4": [4]}),
        ("1", 0, {"steps_1-1": [1]}),
        ("3-5", 3, {"steps_3-5": [4, 5]}),  # resumed at step 4
        ("7-20", 0, {"steps_7-8": [7, 8]}),  # the run ends before
        ("3-5", 5, {}),
        ("0", 0, {}),
        ("9-10", 0, {}),
    ),
)
@pytest.mark.filterwarnings("ignore:Profiler won't be using warmup")
def test_the_trace_has_exactly_the_steps(tmp_path, profile_steps, start, expected):
    train(tmp_path, profile_steps, start)
    paths = {path.name.removesuffix(".pt.trace.json.gz"): path for path in tmp_path.glob("profile/*")}
    assert {name: recorded(path) for name, path in paths.items()} == expected


def test_only_rank_0_profiles(tmp_path):
    train(tmp_path, "3-5", is_main=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ("a file in the place of its directory", "a full disk"))
def test_a_profile_that_cannot_be_written_is_a_warning(tmp_path, capsys, monkeypatch, fault):
    """Nothing half-written is left in its directory."""

    def fill(finished: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    reason = "No space left on device"
    if fault == "a full disk":
        monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", fill)
    else:
        (tmp_path / "profile").write_text("not a directory")
        reason = "Not a directory"
    assert train(tmp_path, "3").step == 8
    assert f"steps_3-3.pt.trace.json.gz: cannot be written: {reason} ***" in capsys.readouterr().err
    assert not list(tmp_path.glob("profile/*"))


@pytest.mark.parametrize("value", ("-1", "5-3", "0-3", "3-", "1-2-3", "true", "[1, 2]", "1.5", "x"))
def test_a_wrong_range_is_named(value):
    with pytest.raises(ConfigError, match=r"run\.profile_steps must be a step, such as 20, or a range of steps"):
        load_config("fashion", [f"run.profile_steps={value}"])


def test_ranges_are_read():
    assert [profiled_steps(value) for value in (0, 7, "7-7", "2-4")] == [
        range(0),
        range(7, 8),
        range(7, 8),
        range(2, 5),
    ]
