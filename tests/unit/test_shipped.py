"""Files that come with the package: DeepSpeed JSON files by name, ``diffmoe scripts``, and the shell scripts."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from diffmoe_ds.cli import main
from diffmoe_ds.config.deepspeed import read_deepspeed_json
from diffmoe_ds.config.shipped import FOLDERS, SHIPPED
from diffmoe_ds.errors import ConfigError
from tests.helpers.processes import REPOSITORY, clean_environment
from tests.helpers.sources import tracked_files

FILES = sorted(path.relative_to(SHIPPED) for name in FOLDERS for path in (SHIPPED / name).iterdir())
SBATCH = ("prepare", "sample", "train")


def test_a_name_is_a_shipped_json_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zero2 = json.loads((REPOSITORY / "ds_configs/zero2.json").read_text())
    assert read_deepspeed_json("zero2") == zero2
    Path("zero2").mkdir()
    assert read_deepspeed_json("zero2") == zero2, "a directory of that name"
    Path("zero1").write_text('{"train_batch_size": 8}')
    assert read_deepspeed_json("zero1") == {"train_batch_size": 8}
    with pytest.raises(ConfigError, match=r"'zero4' is not known; did you mean 'zero\d'\? valid: cpu, zero0, .*a path"):
        read_deepspeed_json("zero4")
    with pytest.raises(
        ConfigError,
        match=r"zero2\.json: cannot be read: No such file or directory; did you mean 'zero2'\? .* names: cpu, zero0",
    ):
        read_deepspeed_json("ds_configs/zero2.json")


def test_train_and_plan_take_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--deepspeed_config", "cpu", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bf16"] is False
    assert main(["plan", "--deepspeed_config", "zero3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["zero_stage"] == 3
    assert main(["train", "--deepspeed_config", "zero9"]) == 2
    assert "valid: cpu, zero0, zero1, zero2, zero2_offload, zero3" in capsys.readouterr().err


def test_scripts_are_copied_with_their_permissions(tmp_path, capsys):
    out = tmp_path / "my cluster"
    assert main(["scripts", "--out", str(out)]) == 0
    assert f"bash '{out}'/slurm/train.sbatch --dry-run" in capsys.readouterr().out
    copied = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert copied == FILES and {path.parent.name for path in copied} == set(FOLDERS)
    for path in FILES:
        assert (out / path).read_bytes() == (SHIPPED / path).read_bytes()
        assert os.access(out / path, os.X_OK) == (path.suffix == ".sh"), path
    (out / "slurm/train.sbatch").write_text("mine")
    assert main(["scripts", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("ds_configs exists already; remove it, or pass another --out.\n") == 1
    assert (out / "slurm/train.sbatch").read_text() == "mine"


def test_scripts_leave_nothing_half_written(tmp_path, monkeypatch, capsys):
    rename = Path.rename

    def fail_at_slurm(self: Path, target: Path) -> Path:
        if self.name == "slurm":
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_at_slurm)
    assert main(["scripts", "--out", str(tmp_path)]) == 5
    assert f"{tmp_path}: cannot be written: No space left" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_wheel_has_all_files(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    files = tracked_files()
    if files is None:
        pytest.skip("not a git checkout")
    source = tmp_path / "source"
    for path in [*files, *(SHIPPED / name for name in FOLDERS)]:
        target = source / path.relative_to(REPOSITORY)
        if not target.is_symlink() and target.parent.mkdir(parents=True, exist_ok=True) is None:
            shutil.copy2(path, target, follow_symlinks=False)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
    assert {f"diffmoe_ds/shipped/{path}" for path in FILES} <= set(modes)
    assert all(mode & 0o111 for name, mode in modes.items() if name.endswith(".sh"))


def stub(folder: Path, name: str, text: str) -> None:
    """Write a shell script that stands for a program."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder, with the stubs in its ``bin``."""
    environment = clean_environment(PATH=f"{folder / 'bin'}:/usr/bin:/bin", **variables)
    return subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


@pytest.mark.parametrize("name", ("local", "torchrun", "mpirun", "deepspeed"))
@pytest.mark.parametrize("before", (0, 1, 2))
def test_launchers_run_where_the_user_is(tmp_path, name, before):
    """They start the installed module, and leave relative paths to the user; --dry-run may be anywhere."""
    stub(tmp_path / "bin", "python", 'echo "in $PWD: $@"')
    stub(tmp_path / "bin", "mpirun", 'echo "in $PWD: $@"')
    script, options = str(REPOSITORY / f"launchers/{name}.sh"), ["--set", "data.path=a b"]
    started = run([script, *options], tmp_path, CHECK="0")
    assert started.stdout.startswith(f"in {tmp_path}: ") and "diffmoe_ds.train --set data.path=a b" in started.stdout
    dry = run([script, *options[:before], "--dry-run", *options[before:]], tmp_path)
    words = shlex.split(dry.stdout)
    assert dry.returncode == 0 and words[-3:] == ["diffmoe_ds.train", *options] and "--dry-run" not in words


def test_torchrun_with_a_range_of_nodes_is_elastic(tmp_path):
    script = str(REPOSITORY / "launchers/torchrun.sh")
    variables = {"NODES": "1:4", "MASTER_ADDR": "node1", "RESTARTS": "5", "PROCESSES": "2"}
    dry = run([script, "--dry-run"], tmp_path, RUN_ID="a", **variables)
    assert shlex.split(dry.stdout) == shlex.split(
        "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python -m torch.distributed.run --nnodes 1:4 --nproc_per_node 2 "
        "--max_restarts 5 --rdzv_backend c10d --rdzv_endpoint node1:29500 --rdzv_id a -m diffmoe_ds.train"
    ), dry.stderr
    assert "set it to the host name" in run([script], tmp_path, NODES="1:4").stderr

    def name(*options: str) -> str:
        words = shlex.split(run([script, "--dry-run", *options], tmp_path, **variables).stdout)
        return words[words.index("--rdzv_id") + 1]

    runs = {name(), name("--run-dir", "a"), name("--run-dir", "b")}
    assert len(runs) == 3 and name("--run-dir", "a") in runs, "torchrun would let one run join the other"


def test_deepspeed_with_slurm_gets_the_file_because_it_ignores_module(tmp_path):
    dry = run(
        [str(REPOSITORY / "launchers/deepspeed.sh"), "--dry-run"], tmp_path, LAUNCHER="slurm", PYTHON=sys.executable
    )
    assert shlex.split(dry.stdout)[-1] == str(REPOSITORY / "diffmoe_ds/train.py"), dry.stderr


PLAN = 'echo "        run  $PWD/run"; echo "$WORLD_SIZE ranks: $@"'


@pytest.mark.parametrize("job", (False, True))
def test_train_sbatch_prints_the_command_and_the_plan(tmp_path, job):
    stub(tmp_path / "bin", "python", PLAN)
    variables = {
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "h100:4", "SLURM_CPUS_ON_NODE": "8",
    }  # fmt: skip
    script = str(REPOSITORY / "slurm/train.sbatch")
    dry = run(["bash", script, "--set", "--dry-run", "run.seed=1"], tmp_path, **(variables if job else {}))
    assert dry.returncode == 0 and dry.stderr == ""
    command, place, plan = dry.stdout.splitlines()
    nodes, tasks, cores = (2, 4, 2) if job else (4, 8, 8)
    assert command.startswith(f"srun --nodes={nodes} --ntasks-per-node={tasks} --cpus-per-task={cores} ")
    assert command.strip().endswith("python -u -m diffmoe_ds.train --set run.seed=1") and place.endswith(
        f"{tmp_path}/run"
    )
    assert plan == f"{nodes * tasks} ranks: -m diffmoe_ds.train --dry-run --set run.seed=1"
    again = run(["bash", script], tmp_path)
    assert again.returncode == 2 and "submit this script with sbatch" in again.stdout


CRASHING_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1", "MAX_CRASHES": "2"}


def crashing_job(tmp_path: Path) -> None:
    """Let `srun` fail, and prepare the run directory `-run`."""
    stub(tmp_path / "bin", "python", 'echo "        run  -run"')
    for name, text in (("srun", "exit 1"), ("squeue", "echo RUNNING"), ("scontrol", ""), ("sleep", "")):
        stub(tmp_path / "bin", name, text)
    (tmp_path / "-run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "-run" / "checkpoints" / "latest").write_text("images_000000000016\n")


def test_crashes_are_counted_in_a_run_directory_that_looks_like_an_option(tmp_path):
    crashing_job(tmp_path)
    command = ["bash", str(REPOSITORY / "slurm/train.sbatch"), "--run-dir=-run"]
    for number, code in ((1, 85), (2, 1)):
        job = run(command, tmp_path, **CRASHING_JOB)
        assert f"crash {number} after checkpoint images_000000000016" in job.stdout and job.stderr == "", job
        assert job.returncode == code, job


@pytest.mark.parametrize(
    "content", ("junk images_000000000016", "08 images_000000000016", "BASH[$(touch${IFS}x)] none")
)
@pytest.mark.parametrize("latest", ("images_000000000016\n", "images_000000000016\nmore\n", None))
def test_crashes_are_counted_from_1_if_the_file_has_no_count(tmp_path, content, latest):
    """bash would evaluate it as an expression. A pipe in the place of `latest` is not read."""
    crashing_job(tmp_path)
    checkpoints = tmp_path / "-run" / "checkpoints"
    (checkpoints / "latest").unlink()
    if latest is None:
        os.mkfifo(checkpoints / "latest")
    else:
        (checkpoints / "latest").write_text(latest)
    (tmp_path / "-run" / "crashes").write_text(content)
    command = ["bash", str(REPOSITORY / "slurm/train.sbatch"), "--run-dir=-run"]
    for number, code in ((1, 85), (2, 1)):
        job = run(command, tmp_path, **CRASHING_JOB)
        where = "none" if latest is None else "images_000000000016\n"
        assert f"crash {number} after checkpoint {where}" in job.stdout and job.stderr == "", job
        assert job.returncode == code, job
    assert not (tmp_path / "x").exists()


def test_a_job_whose_crashes_cannot_be_counted_is_not_requeued_forever(tmp_path):
    crashing_job(tmp_path)
    (tmp_path / "-run" / "crashes").mkdir()
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch"), "--run-dir=-run"], tmp_path, **CRASHING_JOB)
    assert job.returncode == 1 and "cannot be written to count crashes: giving up" in job.stdout, job


@pytest.mark.parametrize("name, value", (("SLURM_GPUS_PER_NODE", "a100"), ("MAX_CRASHES", "x"), ("MAX_CRASHES", "0")))
def test_a_number_that_is_none_is_named(tmp_path, name, value):
    crashing_job(tmp_path)
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, **{**CRASHING_JOB, name: value})
    assert job.returncode == 2 and f"{value}; it must be a positive number" in job.stdout and not job.stderr, job


def test_a_plan_in_an_interactive_step_of_one_task(tmp_path):
    """The step's variables describe the shell, not the ranks of the plan."""
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_PER_NODE": "2"}
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node1"}
    command = ["bash", str(REPOSITORY / "slurm/train.sbatch"), "--dry-run"]
    done = run(command, tmp_path, PYTHON=sys.executable, PYTHONPATH=str(REPOSITORY), **variables, **step)
    assert done.returncode == 0 and "4 ranks, 2 on this host" in done.stdout, done


def test_sbatch_files_have_defaults_and_print_their_command(tmp_path):
    stub(tmp_path / "bin", "python", PLAN)
    for name in SBATCH:
        dry = run(["bash", str(REPOSITORY / f"slurm/{name}.sbatch"), "--dry-run"], tmp_path)
        default = "train --deepspeed_config zero2" if name == "train" else f"cli {name}"
        assert dry.stdout.splitlines()[0].strip().endswith(f"python -u -m diffmoe_ds.{default}"), name
    sweep = run(["bash", str(REPOSITORY / "slurm/sweep.sbatch"), "--dry-run"], tmp_path)
    assert sweep.returncode == 0 and sweep.stdout.count("srun --nodes=1 ") == 3
    one = run(["bash", str(REPOSITORY / "slurm/sweep.sbatch"), "--dry-run"], tmp_path, SLURM_ARRAY_TASK_ID="1")
    assert one.stdout.count("srun ") == 1 and "runs/sweep/lr-3e-4" in one.stdout


@pytest.mark.parametrize("name", SBATCH)
@pytest.mark.parametrize(("own", "tools"), ((False, "tools"), (True, "tools"), (False, "it's my $tools")))
def test_a_job_finds_env_sh_where_it_was_submitted_or_beside_the_original_script(tmp_path, name, own, tools):
    """Slurm runs a copy of the script, in a spool directory; it shows the original with its arguments, unquoted."""
    for folder, text in ((f"{tools}/slurm", "beside"), ("submit/slurm", "submitted")):
        (tmp_path / folder).mkdir(parents=True)
        if own or text == "beside":
            (tmp_path / folder / "env.sh").write_text(f"[[ $NOT_SET == x ]]\nexport PYTHON=my-{text}\n")
    submit = tmp_path / "submit"
    command = f"   Command={tmp_path}/{tools}/slurm/{name}.sbatch --set a=b"
    lines = shlex.join(["JobId=7", f"{command} --dry-run", "   WorkDir=x", "JobId=8", command])
    stub(submit / "bin", "scontrol", f"printf '%s\\n' {lines}")
    for text in ("beside", "submitted"):
        stub(submit / "bin", f"my-{text}", PLAN)
    spool = shutil.copy(REPOSITORY / f"slurm/{name}.sbatch", tmp_path / "slurm_script")
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": "."}
    for options in ([], ["--set", "a=b"]) if tools == "tools" else (["--set", "a=b"],):
        dry = run(["bash", str(spool), *options, "--dry-run"], submit, **variables)
        assert dry.returncode == 0 and dry.stderr == "", dry.stderr
        assert f" my-{'submitted' if own else 'beside'} -u -m diffmoe_ds" in dry.stdout
