"""What the source of micro-batches reads."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffmoe_ds.distributed.consensus import Agreement
from diffmoe_ds.distributed.watchdog import Watchdog
from diffmoe_ds.training import batches


class Batch:
    """Stands in for a micro-batch."""

    def to(self, device: torch.device) -> Batch:
        return self


@pytest.mark.parametrize(("seen", "micro_steps"), ((0, 6), (32, 2), (33, 2), (40, 0), (48, 0)))
def test_a_run_reads_only_the_micro_batches_of_its_steps(monkeypatch, seen, micro_steps):
    """40 images in steps of 16 with 2 micro-steps each; a complete run reads none."""
    read = []
    monkeypatch.setattr(batches, "make_loader", lambda run, dataset: (read.append(1) or Batch() for _ in range(99)))
    nothing = torch.zeros(1, 0)
    monkeypatch.setattr(batches, "agree", lambda values, error, flags, _: Agreement(0, flags, values.tolist(), nothing))
    monkeypatch.setattr(batches, "get_rank", lambda: 0)
    run = SimpleNamespace(
        config=SimpleNamespace(run=SimpleNamespace(total_images=40), data=SimpleNamespace(max_unreadable=0.01)),
        images=seen, device=torch.device("cpu"),
        settings=SimpleNamespace(global_batch=16, accumulation=2),
    )  # fmt: skip
    source = batches.BatchSource(run, dataset=range(40), watchdog=Watchdog(rank=0, world=1, timeout_s=1))
    source.agree((), torch.zeros(0))
    for _ in range(micro_steps):
        source.take()
        assert source.agree((), torch.ones(1)) == [1.0]
    assert len(read) == micro_steps


class Broken(torch.utils.data.Dataset[int]):
    """A dataset whose workers run out of memory."""

    def __getitem__(self, _: int) -> int:
        raise MemoryError("17 GiB")


def test_an_error_of_a_worker_is_one_sentence_with_its_place():
    loader = torch.utils.data.DataLoader(Broken(), sampler=[0], num_workers=1, multiprocessing_context="fork")
    with pytest.raises(MemoryError) as found:
        next(iter(loader))
    expected = f"cannot read images: MemoryError: 17 GiB (in a loader worker, at {__file__}:"
    assert str(batches.as_data_error(found.value)).startswith(expected)
    assert str(batches.as_data_error(ValueError("two\nlines"))) == "cannot read images: ValueError: two lines"
