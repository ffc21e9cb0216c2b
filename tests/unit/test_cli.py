"""The command line in one process: mistakes give one sentence and an exit code, runs write the promised files."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffmoe_ds
from diffmoe_ds import cli
from diffmoe_ds.cli import main
from diffmoe_ds.config.deepspeed import read_deepspeed_json
from tests.helpers.processes import REPOSITORY, run_ranks
from tests.helpers.sampling import sample
from tests.helpers.training import read_metrics, training_arguments, write_json


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def wrong(capsys, arguments: list[str], code: int, message: str) -> None:
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("diffmoe: error: ") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    (
        (["--config", "fashon"], 2, "did you mean 'fashion'?"),
        (["--set", "model.nme=x"], 2, "did you mean 'name'?"),
        (["--deepspeed_config", "nowhere.json"], 2, "nowhere.json: cannot be read"),
        (["--set", "expert_parallel.autoep_size=2"], 2, "autoep_size is 2 in the recipe or --set, but 1 in"),
        (
            ["--set", "sample.sampler=ddpm"],
            2,
            "sample.sampler must be euler, heun, dopri5 or sde for a flow model, got 'ddpm'",
        ),
        (
            ["--set", "deepspeed.zero_optimization.stage=7"],
            2,
            "error: --set: deepspeed: zero_optimization.stage must be 0, 1, 2 or 3, got 7.",
        ),
        (["--set", "deepspeed.train_batch_size=auto"], 2, "error: fashion with --set: deepspeed: train_batch_size or"),
        (["--set", "sample.steps=0"], 2, "error: --set: sample.steps must be positive and at most 100000, got 0"),
        (["--set", "objective.kind=ddpm", "sample.steps=1001"], 2, "sample.steps must be an integer from 1 to 1000"),
        (
            ["--set", "routing.pool_images=3"],
            2,
            "must be one of 1, 2, 4, 8, 16, 32, because the pool has 1 rank(s) with 32 images each, got 3.",
        ),
        (
            ["--set", "routing.kind=dense", "routing.pool_images=2"],
            2,
            "must be unset for the router dense, got 2; only",
        ),
        (["--set", "routing.capacity=0.0001"], 2, "gives each of 8 experts less than one"),
        (["--set", "data.path=/nowhere/x.tar"], 4, "/nowhere/x.tar"),
        (["--config", "imagenet-256", "--dry-run"], 4, "--size 256 --out latents` makes it"),
        (["--config", "emoji"], 4, "data.path emoji does not exist; in a checkout, `npm pack emoji"),
        (
            ["--set", "data.path=pets"],
            4,
            "data.path pets does not exist; set it to a folder of images or to shards, or",
        ),
        (["--config", "pets"], 2, "the path of a YAML file; `diffmoe init IMAGES` writes one that fits your images."),
        (["--set", "model.in_channels=3", "--dry-run"], 4, "data.path is not set, and the embedded images do not fit"),
        (["--resume", "/nowhere"], 5, "--resume /nowhere: not a checkpoint"),
    ),
)
def test_train_mistakes(capsys, tmp_path, arguments, code, message):
    directory = tmp_path / "run"
    wrong(capsys, ["train", "--run-dir", str(directory), *arguments], code, message)
    assert not directory.exists(), "nothing half-written"


@pytest.mark.parametrize("chosen", (None, *cli.ALLOCATOR_VARIABLES))
def test_gpu_memory_is_allocated_in_expandable_segments_unless_the_user_chose_otherwise(monkeypatch, chosen):
    for name in cli.ALLOCATOR_VARIABLES:
        monkeypatch.setenv(name, "max_split_size_mb:64")  # so that monkeypatch restores it
        if name != chosen:
            monkeypatch.delenv(name)
    assert main(["config", "run"]) == 0
    found = {name: os.environ[name] for name in cli.ALLOCATOR_VARIABLES if name in os.environ}
    assert found == (
        {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if chosen is None else {chosen: "max_split_size_mb:64"}
    )


def test_unreadable_shard_is_named(capsys, tmp_path):
    shard = tmp_path / "cut.tar"
    with tarfile.open(shard, "w") as tar:
        tar.add(__file__, "a.png")
    shard.write_bytes(shard.read_bytes()[:700])
    wrong(capsys, ["train", "--run-dir", str(tmp_path / "run"), "--set", f"data.path={shard}"], 4, "cut.tar")


def test_dry_run_prints_json_for_scripts(capsys, tmp_path):
    arguments = training_arguments(None, tmp_path / "run", options=("--dry-run", "--json"))
    assert main(["train", *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["run_dir"] == str(tmp_path / "run") and not (tmp_path / "run").exists()
    assert (plan["checkpoint"], plan["complete"], plan["total_images"]) == (None, False, 80)
    assert (plan["world"], plan["ep_size"]) == (1, 1) and plan["params_total"] > plan["params_activated"] > 0


def test_json_needs_a_dry_run(capsys, tmp_path):
    wrong(capsys, ["train", "--run-dir", str(tmp_path / "run"), "--json"], 2, "--json needs --dry-run")


def test_dry_run_prints_the_banner_and_writes_nothing(capsys, tmp_path):
    assert main(["train", "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    for part in ("M activated", "world  1 = EP 1 x EDP 1, ZeRO 1, fp32", "takes K = ", "versions", "embedded"):
        assert part in out
    assert main(["train", "--dry-run", "--run-dir", str(tmp_path / "run"), "--set", "model.depth=2"]) == 0
    assert "custom-E8: 2 blocks" in capsys.readouterr().out, "a model is not called by a name that it does not fit"
    assert main(["train", "--dry-run", "--run-dir", str(tmp_path / "run"), "--set", "objective.kind=ddpm"]) == 0
    unused = "objective.flow_time_scale, objective.time_distribution, objective.time_mean"
    assert f"note  no effect with ddpm: {unused}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_runs_own_recipe_continues_it(run_copy, capsys):
    """The packaged recipe may have changed since."""
    recipe = run_copy / "resolved.yaml"
    assert main(["train", "--config", str(recipe), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert Path(plan["run_dir"]) == run_copy and plan["checkpoint"]["images"] > 0
    assert main(["train", "--run-dir", str(run_copy), "--dry-run"]) == 5
    error = capsys.readouterr().err
    assert "belongs to another model" in error and f"to continue that run, pass --config {recipe}." in error


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny run with everything that it may write."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_json(folder / "ds.json", ep=2, zero=2, tensorboard={"enabled": True})
    overrides = ("run.sample_every_images=48", "sample.num_images=10", "sample.steps=2")
    finished = run_ranks(2, ["diffmoe_ds/train.py", *training_arguments(config, folder / "run", *overrides)])
    assert finished.code == 0, finished.output
    (folder / "output").write_text(finished.output)
    return folder / "run"


def test_a_run_directory_holds_what_scripts_rely_on(trained):
    assert {p.name for p in trained.iterdir()} == {
        "resolved.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "samples",
    }  # fmt: skip
    keys = {
        "step", "images", "loss", "diffusion_loss", "capacity_loss", "grad_norm", "lr", "images_per_s",
        "peak_memory_mb", "data_s",
    }  # fmt: skip
    rows = read_metrics(trained)
    assert [row["images"] for row in rows] == [16, 32, 48, 64, 80] and all(set(row) == keys for row in rows)
    output = (trained.parent / "output").read_text()
    assert output.count("parameters  ") == 1, "one banner, from rank 0"
    assert "ETA" in output and "world  2 = EP 2 x EDP 1, ZeRO 2" in output
    assert output.count(" MB of host memory") == output.count("; the most of 2 ranks") == 1
    with Image.open(trained / "samples" / "images_000000000080.png") as picture:
        assert picture.width >= 600


def test_tensorboard_shows_losses_experts_thresholds_and_samples(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    for tag in (
        "loss/loss", "loss/diffusion_loss", "loss/capacity_loss", "train/grad_norm", "train/lr", "train/images_per_s",
        "train/peak_memory_mb", "load_per_expert/block_01/expert_03", "tokens_by_experts_taken/block_03/experts_00",
        "threshold/block_03/expert_00",
    ):  # fmt: skip
        assert tag in scalars, tag
    assert any(tag.startswith("capacity_by_noise_level/block_01/noise_") for tag in scalars)
    assert tags["images"] == ["samples"] and len(events.Images("samples")) == 2
    loads = [events.Scalars(f"load_per_expert/block_01/expert_{e:02d}")[-1].value for e in range(4)]
    assert loads == pytest.approx([1.0] * 4), "a world pool is perfectly balanced"
    shares = [events.Scalars(f"tokens_by_experts_taken/block_01/experts_{n:02d}")[-1].value for n in range(5)]
    assert sum(shares) == pytest.approx(1)
    assert sum(n * share for n, share in enumerate(shares)) == pytest.approx(1), "C = 1 expert per token on average"


def test_image_depends_on_its_seed_alone(trained, tmp_path):
    """And on its class: the batch, the ranks and the first seed do not matter with per_token routing."""
    whole = sample(trained, tmp_path / "a", "--num-images", "10", "--routing", "per_token", "--cfg-scale", "1.5")
    batched = ["--num-images", "10", "--routing", "per_token", "--cfg-scale", "1.5", "--batch-size", "3"]
    assert np.abs(sample(trained, tmp_path / "b", *batched).astype(int) - whole).max() <= 1
    shown = ("--classes", "6,7,8,9", "--num-images", "4")
    later = sample(trained, tmp_path / "c", *shown, "--seed", "6", "--cfg-scale", "1.5")
    assert np.abs(later.astype(int) - whole[6:]).max() <= 1
    arguments = ["-m", "diffmoe_ds.cli", "sample", "--checkpoint", str(trained), "--steps", "3", *batched]
    finished = run_ranks(2, [*arguments, "--out", str(tmp_path / "d")])
    assert finished.code == 0, finished.output
    with np.load(tmp_path / "d" / "samples.npz") as file:
        assert np.abs(file["arr_0"].astype(int) - whole).max() <= 1
        assert file["arr_1"].tolist() == list(range(10))


def test_every_inference_choice_of_one_checkpoint(trained, tmp_path):
    for routing, sampler in (("static", "euler"), ("dynamic", "heun"), ("per_token", "euler")):
        options = ("--num-images", "2", "--routing", routing, "--sampler", sampler)
        sample(trained, tmp_path / f"{routing}-{sampler}", *options)
    for options in (("--sampler", "dopri5", "--rtol", "1e-2"), ("--sampler", "sde")):
        sample(trained, tmp_path / options[1], "--num-images", "2", *options)
    raw = sample(trained, tmp_path / "raw", "--num-images", "2", "--weights", "raw")
    averaged = sample(trained, tmp_path / "ema", "--num-images", "2")
    assert not np.array_equal(raw, averaged)
    itself = ("--cfg-scale", "3", "--autoguidance", str(trained), "--guidance-interval", "0.1", "1")
    unchanged = sample(trained, tmp_path / "auto", "--num-images", "2", *itself)
    assert np.abs(unchanged.astype(int) - averaged).max() <= 1, "a model that guides itself changes nothing"
    rough = sample(trained, tmp_path / "bf16", "--num-images", "2", "--dtype", "bf16").astype(int)
    assert 0 < np.abs(rough - averaged).mean() < 2


@pytest.mark.parametrize(
    ("options", "code", "message"),
    (
        (["--sampler", "ddim"], 2, "--sampler must be euler, heun, dopri5 or sde for a flow model, got 'ddim'"),
        (["--sampler", "oiler"], 2, "did you mean 'euler'?"),
        (["--routing", "dynamo"], 2, "did you mean 'dynamic'?"),
        (["--guide-channels", "2"], 2, "--guide-channels must be all or a number from 1 to 1, got 2"),
        (["--guidance-interval", "0", "1"], 2, "--guidance-interval needs guidance; set --cfg-scale"),
        (["--autoguidance", "/nowhere", "--cfg-scale", "2"], 5, "--autoguidance /nowhere: not a checkpoint"),
        (["--sampler", "heun", "--rtol", "0.01"], 2, "--rtol 0.01 has no effect with the sampler heun; omit it"),
        (["--sampler", "dopri5", "--rtol", "0"], 2, "--rtol must be a positive number, got 0.0"),
        (["--num-images", "0"], 2, "--num-images must be positive, got 0"),
        (["--steps", "0"], 2, "--steps must be positive, got 0"),
        (["--seed", "-1"], 2, "got -1"),
        (["--checkpoint", "/nowhere"], 5, "--checkpoint /nowhere: not a checkpoint, run directory"),
    ),
)
def test_sample_mistakes(capsys, trained, tmp_path, options, code, message):
    out = tmp_path / "out"
    wrong(capsys, ["sample", "--checkpoint", str(trained), "--out", str(out), *options], code, message)
    assert not out.exists()


@pytest.mark.parametrize(
    ("command", "options"),
    (
        ("train", ["--run-dir", "--config", "--deepspeed_config", "--resume"]),
        ("sample", ["--checkpoint", "--out", "--vae", "--autoguidance"]),
        ("evaluate", ["--samples", "--checkpoint", "--reference", "--validation", "--save-reference"]),
        ("report", ["path", "--out", "--checkpoint", "--classes"]),
        ("prepare images", ["--images", "--out", "--cache-dir"]),
        ("prepare latents", ["--vae"]),
        ("checkpoint export", ["path", "--out"]),
    ),
)
def test_empty_paths_are_refused(capsys, command, options):
    """They come from unset shell variables and would mean the current directory, or the option's default."""
    for option in options:
        with pytest.raises(SystemExit, match="2"):
            main([*command.split(), "" if option == "path" else f"{option}="])
        name = {"report": "RUN"}.get(command, "path") if option == "path" else option
        assert f"error: argument {name}: must not be empty" in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"diffmoe {diffmoe_ds.__version__}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    (
        ("train --lr 3", "unrecognized arguments: --lr 3; keys of the recipe are set with --set optimizer.lr=VALUE"),
        ("train --total-images=9 --x", "--total-images=9 --x; keys of the recipe are set with --set run.total_images="),
        ("train --model.depth 3", "are set with --set model.depth=VALUE"),
        ("train --learning 3", "unrecognized arguments: --learning 3\n"),
        ("train --batch-size 4", "--set deepspeed.train_batch_size=N (images per step)"),
        ("train --epochs=3", "the length of a run is a number of images: --set run.total_images=N"),
        ("train --x", "usage: diffmoe train [-h]"),
        ("checkpoint inspect a --x", "usage: diffmoe checkpoint "),
        ("doctor --seed 3", "unrecognized arguments: --seed 3\n"),
    ),
)
def test_options_that_are_keys_of_the_recipe(capsys, command, message):
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ("train", "sample", "prepare", "checkpoint", "doctor"))
def test_help_ends_with_commands_to_paste(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert f"diffmoe {command}" in text.split("examples:")[1]
    if command == "sample":
        assert "per_token" in text and "compete" in " ".join(text.split())


def test_repository_json_is_strict():
    for path in REPOSITORY.glob("ds_configs/*.json"):
        read_deepspeed_json(path)


@pytest.mark.parametrize("text", ("\u0663", " 1", "1\n"))
@pytest.mark.parametrize("option", ("--steps", "--cfg-scale"))
def test_numbers_of_options_have_ascii_digits(capsys, option, text):
    """Python's own conversion takes digits of any script, and spaces."""
    with pytest.raises(SystemExit):
        main(["sample", "--checkpoint", "x", "--out", "y", option, text])
    assert f"argument {option}: invalid {'int' if option == '--steps' else 'float'} value: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", (["plan", "--world", "1" * 50_000], ["plan", "--" + "x" * 50_000]))
def test_errors_do_not_repeat_endless_arguments(capsys, arguments):
    with pytest.raises(SystemExit):
        main(arguments)
    assert len(capsys.readouterr().err.partition("error: ")[2]) <= cli.MAX_MESSAGE + 1


def test_absurd_numbers_are_refused(capsys, tmp_path):
    """They would take hours."""
    assert main(["init", str(tmp_path), "--size", "1000000000"]) == 2
    assert "--size must be at most 16,384, got 1,000,000,000" in capsys.readouterr().err
    assert main(["checkpoint", "reshard", str(tmp_path), "--world", "1000000000", "--out", str(tmp_path / "out")]) == 2
    assert "--world must be at most 1,048,576, got 1,000,000,000" in capsys.readouterr().err
