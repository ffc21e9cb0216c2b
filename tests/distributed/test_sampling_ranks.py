"""``diffmoe sample`` on several ranks: one error message, the same images on any number of ranks, and recovery."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.data.text_encoder import TextEncoders
from tests.helpers import processes, sampling
from tests.helpers.encoders import tiny_encoder
from tests.helpers.processes import WORKERS, Finished, run_ranks

TIMEOUT = 120


def sample(world: int, model: Path, out: Path, *options: str, code: int = 0) -> str:
    """Generate seven images with three steps and return the output."""
    arguments = ["sample", "--checkpoint", str(model), "--num-images", "7", "--steps", "3", "--out", str(out)]
    finished = run_ranks(world, ["-m", "diffmoe_ds.cli", *arguments, *options], timeout=TIMEOUT)
    assert finished.code == code, finished.output
    return finished.output


def capacity_in(output: str) -> float:
    (line,) = (line for line in output.splitlines() if line.strip().startswith("capacity"))
    return float(line.split()[1])


def images_in(out: Path) -> np.ndarray:
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4, 5, 6] and file["arr_1"].dtype == np.int64
        return file["arr_0"].astype(int)


@pytest.mark.slow
def test_errors_are_reported_once(tmp_path):
    model, out = sampling.write_random_model(tmp_path / "model"), tmp_path / "out"
    (tmp_path / "file").touch()
    for options, code, message in (
        (("--checkpoint", "/nowhere"), 5, "--checkpoint /nowhere: not a checkpoint, run directory or exported model"),
        (("--routing", "dynamo"), 2, "did you mean 'dynamic'?"),
        (("--out", str(tmp_path / "file" / "out")), 5, "cannot create the directory"),
        (("--cfg-scale", "1e38", "--experts", "sharded"), 3, "the generated images contain NaN or Inf"),
    ):
        output = sample(2, model, out, *options, code=code)
        assert output.count(message) == 1 and "Traceback" not in output, output
    assert not list(out.glob("*"))


@pytest.mark.slow
def test_images_of_prompts_do_not_depend_on_the_ranks(tmp_path):
    """Prompts are encoded on every rank; the warning about a long one is printed once."""
    encoder = str(tiny_encoder("bert"))
    model = sampling.write_random_model(tmp_path / "model", text=TextEncoders([encoder], torch.device("cpu"), 6).format)
    lines = [json.dumps({"prompt": prompt}) for prompt in ("a red apple", "the car " * 5, "")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    options = ("--geneval", str(tmp_path / "metadata.jsonl"), "--batch-size", "5", "--cfg-scale", "2")
    found = []
    for world in (1, 2):
        arguments = ["sample", "--checkpoint", str(model), "--steps", "2", "--out", str(tmp_path / f"{world}")]
        command = ["-m", "diffmoe_ds.cli", *arguments, *options, "--negative-prompt", "house"]
        finished = run_ranks(world, command, timeout=TIMEOUT)
        assert finished.code == 0 and finished.output.count("has 11 tokens") == 1, finished.output
        files = sorted(path for path in (tmp_path / f"{world}").rglob("*") if path.is_file())
        found.append({str(path.relative_to(tmp_path / f"{world}")): path.read_bytes() for path in files})
    assert found[0] == found[1] and len(found[0]) == 3 * 5 + 2


@pytest.mark.slow
def test_images_do_not_depend_on_ranks_batches_and_expert_placement(capsys, tmp_path, monkeypatch):
    """Seven images: ranks that share experts also generate images that are discarded."""
    model = sampling.write_random_model(tmp_path / "model")
    guided = ("--cfg-scale", "2")

    def alone(routing: str, *options: str) -> np.ndarray:
        """Return what one process generates."""
        options = ("--num-images", "7", "--routing", routing, *guided, *options)
        return sampling.sample(model, tmp_path / "alone", *options).astype(int)

    guide = sampling.write_random_model(tmp_path / "guide", seed=1)
    autoguided = ("--autoguidance", str(guide), "--guidance-interval", "0.2", "0.9", "--sampler", "sde")
    for world, batch_size, how in ((2, 3, ()), (4, 2, autoguided)):
        out, sharded = tmp_path / f"sharded-{world}", ("--experts", "sharded", "--batch-size", str(batch_size))
        output = sample(world, model, out, *guided, *sharded, *how)
        assert f"{4 // world} of 4 on each rank, EP size {world}" in output
        capsys.readouterr()
        assert np.abs(images_in(out) - alone("per_token", *how)).max() <= 1
        capacity = capacity_in(capsys.readouterr().out)
        assert abs(capacity_in(output) / capacity - 1) < 2e-3, "discarded images are not counted"

    # a second model guides at some noise levels, every step adds noise, and thresholds are calibrated
    guide = sampling.write_random_model(tmp_path / "guide", seed=1)
    chosen = ("--sampler", "sde", "--autoguidance", str(guide), "--guidance-interval", "0.2", "0.9", "--capacity", "2")
    sample(2, model, tmp_path / "chosen", *guided, *chosen, "--experts", "sharded", "--batch-size", "3")
    assert np.abs(images_in(tmp_path / "chosen") - alone("per_token", *chosen)).max() <= 1

    # the images in a batch compete, whichever rank generates it
    sample(2, model, tmp_path / "static", "--routing", "static", *guided, "--experts", "sharded", "--batch-size", "3")
    static = images_in(tmp_path / "static")
    assert np.abs(static - alone("static", "--batch-size", "3")).max() <= 1
    assert np.abs(static - alone("static", "--batch-size", "7")).max() > 1

    # one of four ranks is killed; two continue, and write the bytes of a process that was never interrupted
    out, options = tmp_path / "killed", ("--routing", "dynamic", *guided, "--batch-size", "1")
    monkeypatch.setattr(processes, "GRACE", TIMEOUT)
    killed = kill_rank(4, 1, 1, model, out, *options)
    left = {path.name for path in out.iterdir() if not path.name.startswith(".writing-sample-")}  # of all ranks
    assert killed.code == 85 and left == {"unfinished"}, killed.output
    assert f"diffmoe: error: rank 1 on {socket.gethostname()} died" in killed.output, killed.output
    assert "Traceback" not in killed.output, killed.output
    output = sample(2, model, out, *options)
    assert "4 of 7 shards are finished" in output and not list(out.glob(".*"))
    capsys.readouterr()
    alone("dynamic", "--batch-size", "1")
    assert capacity_in(output) == capacity_in(capsys.readouterr().out), "of all seven images"
    assert (out / "samples.npz").read_bytes() == (tmp_path / "alone" / "samples.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_that_is_killed_before_the_process_group_is_named(tmp_path, monkeypatch, rank):
    monkeypatch.setattr(processes, "GRACE", TIMEOUT)
    killed = kill_rank(2, rank, 0, sampling.write_random_model(tmp_path / "model"), tmp_path / "out")
    assert killed.code == (85 if rank else -9) and "Traceback" not in killed.output, killed.output
    assert f"diffmoe: error: rank {rank} on {socket.gethostname()} " in killed.output, killed.output
    assert f"rank {1 - rank} on" not in killed.output, killed.output


def kill_rank(world: int, rank: int, shards: int, model: Path, out: Path, *options: str) -> Finished:
    """Generate images on several ranks, one of which is killed after some shards, or before the process group."""
    arguments = ["sample", "--checkpoint", str(model), "--num-images", "7", "--steps", "3", "--out", str(out)]
    worker = [str(WORKERS / "killed_sampling.py"), str(rank), str(shards)]
    return run_ranks(world, [*worker, *arguments, *options], timeout=TIMEOUT)
