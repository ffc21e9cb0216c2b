"""TensorBoard files of a report that someone else has written, or that are damaged."""

from __future__ import annotations

import os

import pytest

from diffmoe_ds.evaluation.report.history import MAX_EVENT_BYTES, read_history

pytest.importorskip("tensorboard")


def write_events(path, *events: bytes) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    with path.open("wb") as file:
        writer = RecordWriter(file)
        for event in events:
            writer.write(event)


def scalar(tag: str, value: float, step: int) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    return Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])).SerializeToString()


@pytest.fixture
def events(tmp_path):
    (tmp_path / "tensorboard").mkdir()
    return tmp_path / "tensorboard" / "events.out.tfevents.1"


def test_only_thresholds_of_experts_in_blocks_are_read(tmp_path, events):
    tags = ("threshold/block_01/expert_00", "threshold/", "threshold//", "threshold/x/y", "threshold/block_/a", "other")
    write_events(events, *(scalar(tag, 0.5, 8) for tag in tags), scalar(tags[0], float("inf"), 9))
    (curves,) = read_history(tmp_path).thresholds["block_01"]
    assert (curves.images_P.tolist(), curves.value_P.tolist()) == ([8], [0.5])
    assert len(read_history(tmp_path).thresholds) == 1


def test_an_event_that_is_not_one_is_ignored(tmp_path, events):
    write_events(events, b"\xff" * 50)
    assert read_history(tmp_path).thresholds == {}


@pytest.mark.parametrize("length", (MAX_EVENT_BYTES + 1, 2**62))
def test_huge_events_are_not_read(tmp_path, events, length):
    from tensorboard.summary.writer.record_writer import masked_crc32c

    header = length.to_bytes(8, "little")
    events.write_bytes(header + masked_crc32c(header).to_bytes(4, "little"))
    assert read_history(tmp_path).thresholds == {}


def test_what_is_not_a_file_is_not_opened(tmp_path, events):
    os.mkfifo(events)
    assert read_history(tmp_path).thresholds == {}
