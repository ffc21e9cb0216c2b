"""What a resume opens, reads, exchanges and holds is within what ``diffmoe plan`` says."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import resume
from diffmoe_ds.planning.resume import resume_cost

QUANTITIES = {"opens", "read", "exchanged", "host_memory"}


@pytest.mark.parametrize(("zero", "rank"), ((1, 0), (3, 63)))
def test_one_rank_of_64(tmp_path, zero, rank):
    """The memory of this process is not that of a rank, so it is not compared."""
    args = argparse.Namespace(model="nano-E4", overrides=["routing.capacity=1"], ranks=64, ep=4, zero=zero)
    layout = resume.layout_of(args)
    path = resume.write_checkpoint(layout, tmp_path, rank)
    found = resume.measure(layout, tmp_path, rank, resume.gathered_rows(path, layout.world))
    planned = asdict(resume_cost(layout))
    assert found.keys() == planned.keys() == QUANTITIES
    for name in ("opens", "read", "exchanged"):
        assert planned[name] / 5 < found[name] <= planned[name], name
    assert found["opens"] == (11 if rank == 0 else 8)
    handles = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [name for name in (*handles, Path("/proc/self/maps").read_text()) if str(tmp_path) in name]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("zero", (1, 3))
def test_one_rank_of_1024(zero):
    """L-E8; the old code read 1.9 GB per rank and held 450 MB of descriptions of pieces at ZeRO 3."""
    command = [sys.executable, "-m", "benchmarks.resume", "--zero", str(zero), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=1200, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == QUANTITIES
    for name, figures in found.items():
        assert figures["measured"] <= figures["planned"], name
    assert found["read"]["planned"] < 50e6 and found["host_memory"]["planned"] < 200e6


def test_only_one_rank_reads_much_and_only_at_zero_0():
    """At ZeRO 0, rank 0 saves all that it holds; otherwise a rank reads its share of the state."""
    read = {}
    for zero in (0, 1, 3):
        args = argparse.Namespace(model="L-E8", overrides=[], ranks=1024, ep=8, zero=zero)
        layout = resume.layout_of(args)
        cost = resume_cost(layout)
        assert cost.exchanged >= 4 * (layout.elements(False) + layout.elements(True))
        assert cost.host_memory < 200e6
        read[zero] = cost.read
    assert read[1] < 50e6 and read[3] < 50e6 < read[0]
