"""NCCL's flight recorder: torch's variables, the files and the watchdog's message, without NCCL."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from diffmoe_ds.distributed import flight_recorder, watchdog

NAMES = (*(name for names in flight_recorder.DEFAULTS for name in names), *flight_recorder.FILES)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_it_is_on_by_default(tmp_path):
    flight_recorder.enable(tmp_path / "f", 2)
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "f/rank_"),
    }
    assert (tmp_path / "f").is_dir(), "torch does not create it"


def test_the_variables_of_the_user_are_kept(tmp_path, monkeypatch):
    mine = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "500", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/x/trace_"}
    for name, value in mine.items():
        monkeypatch.setenv(name, value)
    flight_recorder.enable(tmp_path / "f", 2)
    assert {name: os.environ[name] for name in NAMES if name in os.environ} == {
        **mine, "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }  # fmt: skip
    assert not (tmp_path / "f").exists()
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert flight_recorder.path(3) == "/x/trace_3"


@pytest.mark.parametrize("name", ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"))
def test_no_file_is_named_or_written_if_the_user_has_switched_it_off(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    flight_recorder.enable(tmp_path / "f", 2)
    flight_recorder.dump(1)
    assert flight_recorder.path(1) == "" and not list(tmp_path.glob("f/*"))


def test_a_folder_that_cannot_be_created_does_not_end_the_run(tmp_path):
    (tmp_path / "f").write_text("a file")
    flight_recorder.enable(tmp_path / "f", 2)


def test_files_of_an_earlier_larger_layout_are_removed(tmp_path):
    for name in ("rank_0", "rank_1", "rank_2", "rank_10", "rank_x", "notes"):
        (tmp_path / name).touch()
    flight_recorder.enable(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"rank_0", "rank_1", "rank_x", "notes"}


@pytest.mark.parametrize("nccl", (True, False))
def test_the_watchdog_names_and_writes_the_file(tmp_path, monkeypatch, capsys, nccl):
    flight_recorder.enable(tmp_path, 2)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False)
    codes: list[int] = []
    monkeypatch.setattr(watchdog, "_exit_now", lambda code, with_workers: codes.append(code))
    watchdog.Watchdog(1, 2, 60)._exit("rank 0 on a has been stuck for 60 s in step 5", 85, False, False)
    error = "diffmoe: error: rank 0 on a has been stuck for 60 s in step 5; rank 1 exits"
    hint = f" (its last collectives: {tmp_path / 'rank_1'})" if nccl else ""
    assert capsys.readouterr().err == f"{error}{hint}.\n" and codes == [85]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([b"trace"] if nccl else [])
