"""The shell scripts with stubs: signals, a controller that fails, odd values of Slurm's variables, and `env.sh`."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.helpers.processes import REPOSITORY
from tests.unit.test_shipped import CRASHING_JOB, PLAN, SBATCH, crashing_job, run, stub


@pytest.mark.parametrize("when", ("during the plan", "before srun", "during srun"))
def test_a_time_limit_shorter_than_the_lead_of_its_signal_does_not_requeue_forever(tmp_path, when):
    """Before srun: the signal arrives between the last check and the start, and is forwarded late."""
    crashing_job(tmp_path)
    plan = 'echo "        run  -run"'
    stub(tmp_path / "bin", "python", f"kill -USR1 $(<pid); {plan}" if when == "during the plan" else plan)
    stub(tmp_path / "bin", "srun", ("kill -USR1 $(<pid); " if when == "during srun" else "") + "exec /bin/sleep 30")
    stub(tmp_path / "bin", "sleep", "exec /bin/sleep 1")
    script = (REPOSITORY / "slurm/train.sbatch").read_text()
    script = script.replace("\nset -uo pipefail\n", "\necho $$ >pid\nset -uo pipefail\n")
    if when == "before srun":
        script = script.replace("\nsrun_pid=$!\n", "\nsrun_pid=$(kill -USR1 $$; echo $!)\n")
    (tmp_path / "train.sbatch").write_text(script)
    for number in (1, 2):
        job = run(["bash", "train.sbatch"], tmp_path, **CRASHING_JOB)
        assert f"stop {number} after checkpoint images_000000000016" in job.stdout and job.returncode in (85, 138), job
        assert ("train.sbatch: requeued" in job.stdout) == (number == 1), job
    assert "giving up; raise the time limit" in job.stdout


@pytest.mark.parametrize(
    "squeue",
    (
        "echo RUNNING; echo RUNNING",
        "echo CLUSTER: c; echo RUNNING",
        "[[ $* == *-t* ]] && echo RUNNING",
        "[[ -n ${SQUEUE_PARTITION:-} ]] || echo RUNNING",
    ),
)
def test_a_running_job_is_recognized(tmp_path, squeue):
    """Also a heterogeneous one, one of a named cluster, and with squeue's filters in the environment."""
    crashing_job(tmp_path)
    stub(tmp_path / "bin", "squeue", squeue)
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, SQUEUE_PARTITION="debug", **CRASHING_JOB)
    assert "train.sbatch: requeued" in job.stdout, job


def test_a_controller_that_hangs_is_given_up(tmp_path):
    crashing_job(tmp_path)
    stub(tmp_path / "bin", "timeout", 'exec /usr/bin/timeout 0.2 "${@:2}"')
    stub(tmp_path / "bin", "squeue", "exec /bin/sleep 300")
    stub(tmp_path / "bin", "scontrol", "exec /bin/sleep 300")
    spool = shutil.copy(REPOSITORY / "slurm/train.sbatch", tmp_path / "slurm_script")
    job = run(["bash", str(spool)], tmp_path, **CRASHING_JOB)
    assert job.returncode == 85 and "requeue failed: submit the job again" in job.stdout, job


@pytest.mark.parametrize("kind", ("pipe", "link"))
def test_crashes_are_counted_although_their_file_is_none(tmp_path, kind):
    crashing_job(tmp_path)
    (tmp_path / "precious").write_text("precious")
    crashes = tmp_path / "-run" / "crashes"
    os.mkfifo(crashes) if kind == "pipe" else crashes.symlink_to(tmp_path / "precious")
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, **CRASHING_JOB)
    assert "crash 1 after" in job.stdout and crashes.read_text().startswith("1 images_"), job
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", SBATCH)
@pytest.mark.parametrize(
    "text",
    (
        "set -- x",
        "shift",
        "options=(x) dry_run=yes",
        "set -eC",
        "IFS=:",
        "set -o posix",
        "echo ${1:+options: $*}",
        "set -k",
        "set -T; trap 'echo debug' DEBUG RETURN",
        "set -E; trap 'exit 9' ERR",
    ),
)
def test_env_sh_does_not_change_the_job(tmp_path, name, text):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/env.sh").write_text(text + "\n")
    crashing_job(tmp_path)
    stub(tmp_path / "bin", "srun", 'printf "<%s>" "$@"; exit 1')
    job = run(["bash", str(REPOSITORY / f"slurm/{name}.sbatch"), "--set", "a=b c"], tmp_path, **CRASHING_JOB)
    assert "<--set><a=b c>" in job.stdout and "options:" not in job.stdout and job.stderr == "", job
    assert job.returncode == (85 if name == "train" else 1), job


@pytest.mark.parametrize("name", SBATCH)
def test_env_sh_that_exits_is_named(tmp_path, name):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/env.sh").write_text("exit 0\n")
    job = run(["bash", str(REPOSITORY / f"slurm/{name}.sbatch")], tmp_path, **CRASHING_JOB)
    assert job.returncode == 2 and "slurm/env.sh ended the job: it must not call exit" in job.stdout, job


@pytest.mark.parametrize(
    "name, value",
    (
        ("SLURM_CPUS_ON_NODE", "16(x2)"), ("SLURM_CPUS_ON_NODE", "a[$(touch x)]"), ("SLURM_JOB_NUM_NODES", "2-4"),
        ("SLURM_JOB_NUM_NODES", "08"), ("SLURM_GPUS_PER_NODE", "h100:8,a100:2"),
    ),
)  # fmt: skip
def test_a_variable_of_slurm_that_is_no_number_is_named(tmp_path, name, value):
    crashing_job(tmp_path)
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, **{**CRASHING_JOB, name: value})
    assert job.returncode == 2 and value in job.stdout and job.stderr == "", job
    assert job.stdout.count("\n") == 1 and not (tmp_path / "x").exists()


def test_tasks_of_gres_and_ntasks(tmp_path):
    """--gres sets SLURM_GPUS_ON_NODE only; srun would take SLURM_NTASKS for its own --ntasks."""
    crashing_job(tmp_path)
    stub(tmp_path / "bin", "srun", 'echo "$@ ${SLURM_NTASKS:-unset}"')
    variables = {**CRASHING_JOB, "SLURM_NTASKS": "64", "SLURM_GPUS_ON_NODE": "4"}
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, **variables)
    assert "--ntasks-per-node=4 " in job.stdout and "zero2 unset\n" in job.stdout, job


@pytest.mark.parametrize("name", ("train", "sample"))
def test_a_finished_job_is_finished_in_posix_mode(tmp_path, name):
    stub(tmp_path / "bin", "python", PLAN)
    stub(tmp_path / "bin", "srun", "")
    script = str(REPOSITORY / f"slurm/{name}.sbatch")
    job = run(["bash", script], tmp_path, POSIXLY_CORRECT="1", **CRASHING_JOB)
    assert job.returncode == 0 and job.stderr == "", job


def test_an_error_of_the_configuration_is_not_tried_on_every_number_of_nodes(tmp_path):
    stub(tmp_path / "bin", "python", "echo >>plans; echo invalid key; exit 2")
    variables = {**CRASHING_JOB, "SLURM_JOB_NUM_NODES": "64"}
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, **variables)
    assert job.returncode == 2 and (tmp_path / "plans").read_text() == "\n\n", job


@pytest.mark.parametrize(
    "old, new",
    (
        ("#SBATCH --cpus-per-gpu=8\n", ""),
        ("--nodes=4", "--nodes=4 # mine"),
        ("--nodes=4", "-N 4"),
        ("--gpus-per-node=8", "--gpus-per-node=0\n#SBATCH --ntasks-per-node=8"),
    ),
)
def test_a_plan_with_adapted_sbatch_lines(tmp_path, old, new):
    stub(tmp_path / "bin", "python", PLAN)
    (tmp_path / "mine").write_text((REPOSITORY / "slurm/train.sbatch").read_text().replace(f"{old}", new, 1))
    dry = run(["bash", "mine", "--dry-run"], tmp_path)
    assert dry.stdout.startswith("srun --nodes=4 --ntasks-per-node=8 ") and dry.stderr == "", dry


@pytest.mark.parametrize("task", ("3", "-1", "x[$(touch x)]"))
def test_a_task_beyond_the_table_of_a_sweep_is_named(tmp_path, task):
    job = run(["bash", str(REPOSITORY / "slurm/sweep.sbatch")], tmp_path, SLURM_ARRAY_TASK_ID=task)
    assert job.returncode == 2 and f"no line {task}; use --array=0-2" in job.stdout and job.stderr == "", job


def test_sampling_that_is_stopped_at_once_is_not_requeued_forever(tmp_path):
    stub(tmp_path / "bin", "srun", "kill -USR1 $PPID; sleep 0.5; exit 7")
    job = run(["bash", str(REPOSITORY / "slurm/sample.sbatch")], tmp_path, SLURM_JOB_ID="7")
    assert job.returncode == 7 and "not requeued: the time limit leaves no time" in job.stdout, job


@pytest.mark.parametrize("name", ("local", "torchrun"))
@pytest.mark.parametrize("visible, processes", (("0,2", "2"), ("GPU-1", "1"), ("", "1")))
def test_launchers_start_one_process_per_visible_gpu(tmp_path, name, visible, processes):
    stub(tmp_path / "bin", "nvidia-smi", "for i in 0 1 2; do echo GPU $i: H100; done")
    variables = {"CUDA_VISIBLE_DEVICES": visible}
    dry = run([str(REPOSITORY / f"launchers/{name}.sh"), "--dry-run"], tmp_path, **variables)
    assert f"--nproc_per_node {processes} " in dry.stdout and dry.stderr == "", dry


@pytest.mark.parametrize("name", ("local", "torchrun"))
def test_launchers_with_processes_do_not_ask_a_driver_that_hangs(tmp_path, name):
    stub(tmp_path / "bin", "nvidia-smi", "echo >>asked")
    dry = run([str(REPOSITORY / f"launchers/{name}.sh"), "--dry-run"], tmp_path, PROCESSES="2")
    assert "--nproc_per_node 2 " in dry.stdout and not (tmp_path / "asked").exists(), dry


def test_mpirun_takes_options_of_several_lines(tmp_path):
    dry = run([str(REPOSITORY / "launchers/mpirun.sh"), "--dry-run"], tmp_path, MPI_OPTIONS="--a b\n--c d")
    assert " --a b --c d python " in dry.stdout, dry


def test_sampling_is_requeued_although_the_controller_does_not_respond_at_first(tmp_path):
    stub(tmp_path / "bin", "srun", "kill -USR1 $PPID; /bin/sleep 1; exit 7")
    stub(tmp_path / "bin", "sleep", "")
    stub(tmp_path / "bin", "scontrol", "echo $* >>calls; [[ $(wc -l <calls) == 3 ]]")
    job = run(["bash", str(REPOSITORY / "slurm/sample.sbatch")], tmp_path, SLURM_JOB_ID="7", SECONDS="60")
    assert job.returncode == 7 and "requeue failed" not in job.stdout, job
    assert (tmp_path / "calls").read_text() == "requeue 7\n" * 3


@pytest.mark.parametrize("options", (["--res", "none"], ["--resum=none"], ["--resume", "none"]))
def test_a_requeued_job_resumes_however_resume_none_is_written(tmp_path, options):
    """argparse accepts the beginning of an option."""
    stub(tmp_path / "bin", "python", PLAN)
    stub(tmp_path / "bin", "srun", 'echo "$@"')
    job = run(
        ["bash", str(REPOSITORY / "slurm/train.sbatch"), *options], tmp_path, SLURM_RESTART_COUNT="1", **CRASHING_JOB
    )
    assert " none --resume auto\n" in job.stdout.replace("=none", " none"), job


def test_the_run_directory_is_found_in_spite_of_an_encoding(tmp_path):
    crashing_job(tmp_path)
    stub(tmp_path / "bin", "python", 'echo "        run  ${PYTHONIOENCODING:--run}"')
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, PYTHONIOENCODING="ascii", **CRASHING_JOB)
    assert "crash 1 after checkpoint images_000000000016" in job.stdout, job


def test_seconds_between_retries_that_are_none_are_named(tmp_path):
    crashing_job(tmp_path)
    job = run(["bash", str(REPOSITORY / "slurm/train.sbatch")], tmp_path, RETRY_S="10s x", **CRASHING_JOB)
    assert job.returncode == 2 and "RETRY_S: 10s x; it must be a number of seconds" in job.stdout, job


def test_mpirun_gives_all_ranks_the_address(tmp_path):
    variables = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    dry = run([str(REPOSITORY / "launchers/mpirun.sh"), "--dry-run"], tmp_path, **variables)
    assert " -x MASTER_ADDR -x MASTER_PORT " in dry.stdout, dry


@pytest.mark.parametrize("options", (["--out", "images"], ["--out=images"]))
@pytest.mark.parametrize("finished", (False, True))
def test_sampling_that_finishes_no_shard_is_not_requeued_forever(tmp_path, options, finished):
    write = "mkdir -p images/unfinished; touch images/unfinished/2.npy; " if finished else ""
    stub(tmp_path / "bin", "srun", f"{write}kill -USR1 $PPID; /bin/sleep 1; exit 7")
    stub(tmp_path / "bin", "scontrol", "")
    (tmp_path / "images/unfinished").mkdir(parents=True)
    (tmp_path / "images/unfinished/1.npy").write_text("")
    job = run(["bash", str(REPOSITORY / "slurm/sample.sbatch"), *options], tmp_path, SLURM_JOB_ID="7", SECONDS="60")
    assert ("not requeued: no shard was finished" in job.stdout) != finished and job.returncode == 7, job
    assert ("sample.sbatch: requeued" in job.stdout) == finished and job.stderr == "", job
