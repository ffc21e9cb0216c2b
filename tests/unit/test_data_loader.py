"""The loader: the same stream for every layout, start position and number of workers."""

import multiprocessing
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from diffmoe_ds.data.shuffle import sample_index
from diffmoe_ds.data.sources.shard_paths import expand
from diffmoe_ds.data.sources.shards import ShardDataset
from diffmoe_ds.errors import DataError
from diffmoe_ds.rng import TrainingDraws, training_draws
from tests.helpers.data import GREY, IMAGES, SHAPE, assert_same, by_position, image_file, loader, npy, take, write_tar
from tests.helpers.processes import Finished, run_ranks, wait_for_end


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> ShardDataset:
    """21 images of 5x6 with their number in the pixels, in a plain and a gzipped shard."""
    folder = tmp_path_factory.mktemp("small")
    for shard, name in enumerate(("s-0.tar", "s-1.tar.gz")):
        numbers = range(shard * 10, 10 if shard == 0 else IMAGES)
        files = [{"png": image_file(GREY + i), "cls": b"%d\n" % (i % 4)} for i in numbers]
        members = [(f"{i:03d}.{k}", data) for i, file in zip(numbers, files, strict=True) for k, data in file.items()]
        write_tar(folder / name, members)
    return ShardDataset(expand(folder))


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 16, 1), (2, 8, 1), (4, 2, 2), (1, 4, 4)])
def test_the_stream_does_not_depend_on_the_layout(small, world, micro, accumulation):
    whole = by_position(take(3, loader(small)))
    assert sorted(whole) == list(range(48))
    split = []
    for rank in range(world):
        layout = {"rank": rank, "world": world, "micro_batch": micro, "accumulation": accumulation}
        batches = take(3 * accumulation, loader(small, **layout))
        assert batches[1].position[0] == world * micro + rank * micro
        split += batches
    assert_same(by_position(split), whole)


@pytest.mark.parametrize("start", [16, 20, 45])
def test_a_later_start_continues_exactly(small, start):
    whole = by_position(take(5, loader(small)))
    tail = by_position(take(2, loader(small, start_position=start)))
    assert_same(tail, {position: whole[position] for position in range(start, start + 32)})


def test_workers_change_nothing(small):
    alone = take(12, loader(small, micro_batch=4, accumulation=4))
    with_workers = take(12, loader(small, micro_batch=4, accumulation=4, num_workers=2))
    assert_same(by_position(alone), by_position(with_workers))


def test_micro_batch_contents(small):
    batch = take(1, loader(small))[0]
    assert batch.posterior is None
    assert [field.dtype for field in batch[:6]] == [
        torch.float32,
        torch.int64,
        torch.float32,
        torch.float32,
        torch.bool,
        torch.int64,
    ]
    assert batch.x.shape == batch.noise.shape == (16, *SHAPE)
    for row in range(16):
        number = sample_index(5, row, IMAGES)
        draws = training_draws(5, row, SHAPE, 0.3)
        pixels = GREY + number
        expected = np.full(SHAPE, -1.0, np.float32)
        expected[0, 1:6, 1:7] = (pixels[:, ::-1] if draws.flip else pixels) / 127.5 - 1
        np.testing.assert_allclose(batch.x[row], expected, atol=1e-6)
        assert (batch.noise[row].numpy() == draws.noise).all()
        assert (batch.label[row], batch.time[row], batch.drop[row]) == (number % 4, draws.time, draws.drop)
    assert {training_draws(5, row, SHAPE, 0.3).flip for row in range(16)} == {True, False}


def test_white_is_one_and_latents_are_kept(tmp_path):
    latent = np.random.default_rng(0).standard_normal((4, 2, 2)).astype(np.float32)
    still = TrainingDraws(False, False, 0.5, np.zeros((4, 2, 2), np.float32))
    one = {"global_batch": 1, "micro_batch": 1}
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", [("a.npy", npy(latent)), ("a.cls", b"0")])])
    assert (
        take(1, loader(dataset, image_shape=(4, 2, 2), draws=lambda _: still, **one))[0].x[0].numpy() == latent
    ).all()
    white = image_file(np.full((8, 8), 255, np.uint8))
    dataset = ShardDataset([write_tar(tmp_path / "b.tar", [("b.png", white), ("b.cls", b"0")])])
    assert (take(1, loader(dataset, **one))[0].x == 1).all()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (image_file(GREY), 4, "the label 4; the model has 4 classes, 0 to 3"),
        (
            image_file(np.zeros((9, 8), np.uint8)),
            0,
            "shape (1, 9, 8); the model takes 1 channel of at most 8x8",
        ),
        (
            image_file(np.zeros((8, 8, 3), np.uint8)),
            0,
            "shape (3, 8, 8); the model takes 1 channel of at most 8x8",
        ),
        (
            npy(np.zeros((1, 8, 7), np.float32)),
            0,
            "shape (1, 8, 7); the model takes 1 channel of exactly 8x8",
        ),
    ],
    ids=["label", "size", "channels", "latent"],
)
def test_images_that_do_not_fit_the_model(tmp_path, image, label, message, num_workers):
    name = "a.npy" if image.startswith(b"\x93NUMPY") else "a.png"
    dataset = ShardDataset([write_tar(tmp_path / "a.tar", [(name, image), ("a.cls", b"%d" % label)])])
    pattern = f"^sample 'a' of shard .*a.tar has {re.escape(message)}$"
    with pytest.raises(DataError, match=pattern) as caught:
        take(1, loader(dataset, num_workers=num_workers))
    assert "\n" not in str(caught.value)


def test_layouts_that_do_not_add_up_are_bugs(small):
    with pytest.raises(AssertionError):
        loader(small, micro_batch=8)
    with pytest.raises(AssertionError):
        loader(small, rank=1)


def test_global_random_state_is_left_alone(small):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    take(2, loader(small))
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


def test_workers_exit_with_an_unfinished_iterator(small):
    """Also if an exception whose traceback refers to the loader is still alive, and without being terminated."""
    batches = iter(loader(small, num_workers=2))
    next(batches), next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    with pytest.raises(RuntimeError) as caught:
        batches.throw(RuntimeError("the caller failed"))
    assert caught.traceback[-1].path.name == "loader.py"
    assert multiprocessing.active_children() == [] and [worker.exitcode for worker in workers] == [0, 0]


OPEN = """
import multiprocessing, os, signal, sys, time
from functools import partial
from diffmoe_ds.data import loader as loader_module
from diffmoe_ds.data.sources.shards import EMBEDDED, ShardDataset
from diffmoe_ds.rng import training_draws
from tests.helpers.data import loader

def open_batches(workers):
    draws = partial(training_draws, 5, shape=(1, 28, 28), label_dropout=0.3)
    dataset = ShardDataset([EMBEDDED])
    return iter(loader(dataset, image_shape=(1, 28, 28), num_classes=10, draws=draws, num_workers=workers))
"""
SIGNALLED = f"""{OPEN}
batches = open_batches(2)
next(batches), next(batches)  # one from each worker, so both have started
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    for _ in range(10):
        next(batches)
assert len(multiprocessing.active_children()) == 2
print("went on")
sys.exit(7)
"""

LOST = f"""{OPEN}
from diffmoe_ds.errors import WorkerLostError
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # a process can inherit this
batches = open_batches(1)
next(batches)
os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
time.sleep(0.5)  # the kernel tells this process about it here
try:
    for _ in range(10):
        next(batches)
except WorkerLostError as error:
    print(error)
"""
KILLED = f"""{OPEN}
start_worker = loader_module._start_worker

def start(parent, *arguments):
    print("worker", os.getpid(), flush=True)
    os.kill(parent, signal.SIGKILL)
    while os.getppid() == parent:
        time.sleep(0.01)
    start_worker(parent, *arguments)

loader_module._start_worker = start
next(open_batches(1))
"""


def run(script: Path, text: str) -> Finished:
    script.write_text(text)
    return run_ranks(1, [str(script)])


def test_a_worker_exits_if_its_process_is_killed_while_it_starts(tmp_path):
    """torch's worker compares its parent with the one that it finds at its own start."""
    finished = run(tmp_path / "killed.py", KILLED)
    assert finished.code == -signal.SIGKILL, finished.output
    wait_for_end(int(re.search(r"worker (\d+)", finished.output)[1]))


def test_workers_survive_the_signals_that_stop_a_run_and_exit_with_it(tmp_path):
    finished = run(tmp_path / "signalled.py", SIGNALLED)
    assert "went on" in finished.output and finished.code == 7 and "Traceback" not in finished.output


def test_a_lost_worker_is_noticed_where_the_signal_of_its_end_is_ignored(tmp_path):
    finished = run(tmp_path / "lost.py", LOST)
    assert finished.code == 0 and "was killed by SIGKILL" in finished.output, finished.output
