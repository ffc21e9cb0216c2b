"""A call that never returns ends the run within the time limit, and the rank that it was called on is named."""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from diffmoe_ds.cli import main
from tests.faults.shim import Rule, fault_environment
from tests.helpers.processes import MODULES, REPOSITORY, ForkServer, free_port, rank_environment
from tests.helpers.training import training_arguments, write_json

LIMIT_S = 240


@pytest.fixture(scope="module")
def server():
    server = ForkServer(MODULES, **fault_environment())
    yield server
    server.close()


def train(
    server: ForkServer, folder: Path, victim: int, rules: Rule | Sequence[Rule], *overrides: str
) -> tuple[list[int], str]:  # fmt: skip
    """Train on two ranks with faults on one of them; return the exit codes and the output."""
    rules = [rules] if isinstance(rules, Rule) else rules
    config = write_json(folder / "ds.json", ep=2, zero=2)
    settings = ("run.total_images=4800", "run.save_every_images=32", "run.rank_timeout_s=6", *overrides)
    arguments = ["diffmoe_ds/train.py", *training_arguments(config, folder / "run", *settings)]
    port = free_port()
    with tempfile.TemporaryFile("w+") as output:
        ranks = [
            server.start(
                arguments,
                rank_environment(rank, 2, port, **fault_environment(*(rules if rank == victim else []))),
                REPOSITORY,
                output,
            )
            for rank in range(2)
        ]
        deadline = time.monotonic() + LIMIT_S
        try:
            while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
                time.sleep(0.02)
            output.seek(0)
            text = output.read()
            assert all(rank.poll() is not None for rank in ranks), text
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
    return [rank.poll() or 0 for rank in ranks], text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "operation", "pattern"),
    (
        (1, "write", "*/rank_00001.safetensors"),
        (0, "fsync", "*/rank_00000.safetensors"),
        (0, "rename", "*/manifest.json"),
        (0, "rename", "*/images_000000000032"),
    ),
)
def test_a_hung_save_names_the_rank_whose_disk_hangs(server, tmp_path, victim, operation, pattern):
    codes, text = train(server, tmp_path, victim, Rule(operation, pattern, "sleep:1000"))
    assert codes == [85, 85], text
    assert f"rank {victim} on {socket.gethostname()} has been stuck for 6 s" in text, text
    assert f"rank {1 - victim} on" not in text, text


@pytest.mark.slow
def test_a_slow_disk_is_no_hang(server, tmp_path):
    """The last save, and then the removal of the checkpoint before it, take longer than the limit, but progress."""
    slow_calls = (
        Rule("fsync", "*/checkpoints*", "sleep:2", n=8, repeats=True),
        Rule("unlink", "*/.removing-images_*", "sleep:2", repeats=True),
    )
    overrides = ("run.total_images=64", "checkpoint.keep_last=1")
    codes, text = train(server, tmp_path, 0, slow_calls, *overrides)
    assert codes == [0, 0], text
    assert "saved" in text


@pytest.mark.slow
def test_hung_metrics_name_rank_0_although_the_others_wait_in_the_hook_of_the_save(server, tmp_path):
    codes, text = train(server, tmp_path, 0, Rule("write", "*/metrics.jsonl", "sleep:1000", n=2))
    assert codes == [85, 85], text
    assert f"rank 0 on {socket.gethostname()} has been stuck for 6 s in step" in text, text
    assert "rank 1 on" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize("n", (1, 4))
def test_a_hung_read_of_a_resume_names_the_rank_whose_disk_hangs(server, tmp_path, n):
    """While it verifies its share of the files, and while it restores them."""
    rules = Rule("rename", "*/nothing", "EIO")
    codes, text = train(server, tmp_path, 0, rules, "run.total_images=64")
    assert codes == [0, 0], text
    reading = Rule("read", "*/checkpoints/images_*/rank_*", "sleep:1000", n=n)
    codes, text = train(server, tmp_path, 1, reading, "run.total_images=128")
    assert codes == [85, 85], text
    assert f"rank 1 on {socket.gethostname()} has been stuck for 6 s in startup" in text, text
    assert "rank 0 on" not in text, text


@pytest.mark.slow
def test_a_hung_read_of_the_initial_model_names_the_rank_whose_disk_hangs(server, tmp_path):
    codes, text = train(server, tmp_path, 0, Rule("rename", "*/nothing", "EIO"), "run.total_images=32")
    assert codes == [0, 0], text
    (tmp_path / "run").rename(tmp_path / "source")
    assert main(["checkpoint", "export", str(tmp_path / "source"), "--out", str(tmp_path / "model")]) == 0
    initial = f"model.init_from={tmp_path / 'model'}"
    weights = Rule("read", "*/model/model.safetensors", "sleep:1000", n=3)  # after the two parts of the header
    codes, text = train(server, tmp_path, 1, weights, initial)
    assert codes == [85, 85], text
    assert f"rank 1 on {socket.gethostname()} has been stuck for 6 s in startup" in text, text
    assert "rank 0 on" not in text, text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "pattern"), (("open", "*/run/metrics.jsonl"), ("fsync", "*/.writing-metrics*"), ("read", "*.jsonl"))
)
def test_a_log_file_that_hangs_at_the_start_names_rank_0(server, tmp_path, operation, pattern):
    codes, text = train(server, tmp_path, 0, Rule("rename", "*/nothing", "EIO"), "run.total_images=32")
    assert codes == [0, 0], text
    codes, text = train(server, tmp_path, 0, Rule(operation, pattern, "sleep:1000"), "run.total_images=64")
    assert codes == [85, 85], text
    assert f"rank 0 on {socket.gethostname()} has been stuck for 6 s in startup" in text, text
    assert "rank 1 on" not in text, text
