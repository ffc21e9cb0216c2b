"""Errors of the file system where none is expected, such as a network disk that fails: a sentence on every rank."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from diffmoe_ds.cli import main
from diffmoe_ds.data.prepare import preparation
from diffmoe_ds.distributed.consensus import raise_on_all_ranks
from diffmoe_ds.distributed.launch import Launch
from diffmoe_ds.distributed.rendezvous import Rendezvous
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.training.plan import TrainPlan
from diffmoe_ds.training.session import Session
from tests.helpers.training import training_arguments, write_json

MESSAGE = "/disk/file: cannot be used: Stale file handle."


def fail(*arguments: object) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "/disk/file")


def test_a_command_reports_a_file_that_the_system_refuses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(TrainPlan, "with_start", fail)
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--dry-run"], handle_signals=False) == 5
    assert capsys.readouterr().err == f"diffmoe: error: {MESSAGE}\n"


def test_prepare_names_the_file_and_the_reason(tmp_path, capsys, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    monkeypatch.setattr(preparation, "write_once", fail)
    out = tmp_path / "out"
    assert main(["prepare", "images", "--images", str(tmp_path / "images"), "--out", str(out), "--size", "8"]) == 5
    assert f"--out {out} cannot be used: Stale file handle: '/disk/file'.\n" in capsys.readouterr().err


def test_other_system_errors_are_not_hidden(tmp_path, monkeypatch):
    def lose(*arguments: object) -> None:
        raise ConnectionResetError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(TrainPlan, "with_start", lose)
    with pytest.raises(ConnectionResetError):
        main(["train", "--run-dir", str(tmp_path / "run"), "--dry-run"], handle_signals=False)


def test_ranks_vote_on_a_file_that_the_system_refuses():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rendezvous = Rendezvous(Launch(0, 1, 0, 1, "a test"), ("here",), None, 1.0)
        for vote in (
            lambda: raise_on_all_ranks(torch.device("cpu"), fail),
            lambda: rendezvous.raise_on_all_ranks("name", fail),
            lambda: rendezvous.on_main("name", fail),
        ):
            with pytest.raises(CheckpointError, match=MESSAGE):
                vote()
    finally:
        dist.destroy_process_group()


def test_an_error_of_the_last_check_does_not_make_a_saved_run_fail(tmp_path, capsys, monkeypatch):
    finish = Session.finish

    def fail_to_read(session: Session, *arguments: object) -> None:
        with monkeypatch.context() as context:
            context.setattr(Path, "is_file", fail)
            finish(session, *arguments)

    monkeypatch.setattr(Session, "finish", fail_to_read)
    config = write_json(tmp_path / "ds.json", ep=1, zero=0)
    assert main(["train", *training_arguments(config, tmp_path / "run")]) == 0
    assert "manifest.json: cannot be read: Stale file handle; it was saved before" in capsys.readouterr().err
