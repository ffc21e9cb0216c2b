"""``diffmoe evaluate`` on two ranks: the same numbers as on one, and errors reported once."""

from __future__ import annotations

import json
import socket
from typing import Any

import numpy as np
import pytest

from diffmoe_ds.cli import main
from diffmoe_ds.data.sources.images import png
from diffmoe_ds.files import write_tar
from tests.helpers import processes, sampling
from tests.helpers.clip import save_clip
from tests.helpers.data import numbered_shard
from tests.helpers.features import assert_same
from tests.helpers.processes import run_ranks


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one_and_report_errors_once(tmp_path, capsys, monkeypatch):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (54, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=pixels[:25])
    files = [(f"{k:03}.png", png(image.transpose(2, 0, 1))) for k, image in enumerate(pixels[25:])]
    write_tar(tmp_path / "reference.tar", files)
    files[20] = (files[20][0], b"damaged")  # in the share of the second rank
    write_tar(tmp_path / "damaged.tar", files)

    arguments = ["evaluate", "--samples", str(tmp_path / "samples.npz"), "--reference"]
    options = ["--extractor", "tests.helpers.features:Averages", "--batch-size", "6", "--json"]
    assert main([*arguments, str(tmp_path / "reference.tar"), *options]) == 0
    alone = json.loads(capsys.readouterr().out)

    def evaluate(reference: str, *more: str, code: int = 0) -> str:
        return on_two_ranks(*arguments, str(tmp_path / reference), *options, *more, code=code)

    output = evaluate("reference.tar", "--save-reference", str(tmp_path / "saved.npz"))
    assert_same(result_in(output), alone)
    assert main([*arguments, str(tmp_path / "saved.npz"), *options]) == 0
    assert_same(json.loads(capsys.readouterr().out), alone)

    np.savez(tmp_path / "small.npz", arr_0=pixels[:2])  # two images on four ranks
    assert main([*arguments, str(tmp_path / "small.npz"), "--save-reference", str(tmp_path / "two.npz"), *options]) == 0
    two = json.loads(capsys.readouterr().out)
    command = ["-m", "diffmoe_ds.cli", *arguments, str(tmp_path / "two.npz"), *options]
    finished = run_ranks(4, command, timeout=120)
    assert finished.code == 0, finished.output
    assert_same(result_in(finished.output), two)

    output = evaluate("damaged.tar", code=4)
    assert output.count("diffmoe: error: ") == 1 and "cannot be decoded" in output, output

    output = evaluate("reference.tar", "--extractor", "tests.helpers.features:VaryingOverRanks", code=2)
    assert output.count("diffmoe: error: ") == 1, output
    assert "returned 3 features per image on rank 0, but 4 on rank 1." in output, output

    monkeypatch.setattr(processes, "GRACE", 120)
    output = evaluate("reference.tar", "--extractor", "tests.helpers.features:DiesOnRank1", code=85)
    assert f"diffmoe: error: rank 1 on {socket.gethostname()} died" in output, output


@pytest.mark.slow
def test_two_ranks_generate_the_images_of_one(tmp_path, capsys):
    """Images that compete stay in one batch, and both ranks calibrate and compute the validation loss."""
    model = sampling.write_random_model(tmp_path / "model")
    held_out = numbered_shard(tmp_path / "held_out.tar", 21)
    arguments = ["evaluate", "--checkpoint", str(model), "--reference", str(held_out)]
    arguments += ["--extractor", "tests.helpers.features:Averages", "--num-images", "7", "--steps", "2", "--json"]
    # 21 held-out images are 7 batches of 3: not as many for each rank
    for chosen in (["--routing", "static"], ["--routing", "dynamic"], ["--capacity", "1.5"]):
        chosen += ["--validation", str(held_out)]
        assert main([*arguments, *chosen, "--batch-size", "3"]) == 0
        alone = json.loads(capsys.readouterr().out)
        for file in tmp_path.rglob("capacity-*.json"):
            file.unlink()
        assert_same(result_in(on_two_ranks(*arguments, *chosen, "--batch-size", "3")), alone, rel=1e-4)


@pytest.mark.slow
def test_two_ranks_score_prompts_as_one(tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (25, 8, 8, 3), np.uint8)
    prompts = [f"red {number % 7}" for number in range(25)]
    np.savez(tmp_path / "samples.npz", arr_0=pixels, arr_1=np.arange(25) % 9)
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts[:9]))
    files = []
    for number, image in enumerate(pixels):
        files += [(f"{number:03}.png", png(image.transpose(2, 0, 1))), (f"{number:03}.txt", prompts[number].encode())]
    write_tar(tmp_path / "dataset.tar", files)
    arguments = ["evaluate", "--samples", str(tmp_path / "samples.npz"), "--clip", str(save_clip(tmp_path / "clip"))]
    options = ["--extractor", "tests.helpers.features:Averages", "--batch-size", "6", "--json"]
    for more in ([], ["--retrieval", str(tmp_path / "dataset.tar")]):
        assert main([*arguments, *more, *options]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert_same(result_in(on_two_ranks(*arguments, *more, *options)), alone, rel=1e-6)
    assert 0 < alone["retrieval_precision"] < 1 and alone["clip_score"] > 0


def on_two_ranks(*arguments: str, code: int = 0) -> str:
    """Return the output of a command on two ranks."""
    finished = run_ranks(2, ["-m", "diffmoe_ds.cli", *arguments], timeout=120)
    assert finished.code == code and "Traceback" not in finished.output, finished.output
    return finished.output


def result_in(output: str) -> dict[str, Any]:
    (found,) = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return found
