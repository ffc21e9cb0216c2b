"""The record of a shard, which marks it as done: what the index and the report of the dataset need of it."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe_ds.control_files import MAX_INDEX_BYTES, read_json
from diffmoe_ds.data.prepare.encoders import Encoded, Encoder
from diffmoe_ds.data.sources.image_features import FEATURES_COLUMNS
from diffmoe_ds.data.sources.index_files import shard_info
from diffmoe_ds.data.sources.tar_index import Entry, Index, ShardInfo
from diffmoe_ds.data.sources.text_index import TextEntry
from diffmoe_ds.errors import CheckpointError
from diffmoe_ds.text import reason

ROW = np.dtype("<i8")
STORED = slice(Entry._fields.index("suffix"), Entry._fields.index("label") + 1)
"""Columns of the index that a record has in `rows`; the others follow from the keys and the shard."""


@dataclass
class Totals:
    """What is counted while a shard or a dataset is encoded."""

    skipped: list[dict[str, str]] = field(default_factory=list)
    """`key` and `reason` of each unreadable image."""
    statistics: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """Of latents: number of values, sum of means, sum of second moments."""
    captions: int = 0
    truncated: int = 0
    """Captions with more tokens than an encoder reads."""

    def add(self, encoded: Encoded) -> None:
        """Count an image."""
        self.captions += encoded.captions
        self.truncated += encoded.truncated
        if encoded.moments is not None:
            mean, log_variance = encoded.moments.astype(np.float64)[:, 0], encoded.moments.astype(np.float64)[:, 1]
            self.statistics += mean.size, mean.sum(), (mean**2 + np.exp(log_variance)).sum()

    def add_record(self, record: dict[str, Any]) -> None:
        """Count a shard."""
        self.skipped += record["skipped"]
        self.statistics += record["statistics"]
        self.captions += record.get("captions", 0)
        self.truncated += record.get("truncated", 0)


def shard_record(index: Index, sha256: str, totals: Totals) -> dict[str, Any]:
    """Return the record of a shard.

    Args:
        index: the samples of the shard.
        sha256: of its bytes.
        totals: of its images.
    """
    return {
        **index.shards[0]._asdict(),
        "sha256": sha256,
        "skipped": totals.skipped,
        "statistics": totals.statistics.tolist(),
        "captions": totals.captions,
        "truncated": totals.truncated,
        "rows": index.samples[:, STORED].tolist(),
        "text": _encoded(index.text),
        "features": _encoded(index.features),
        "keys": [index.key(i) for i in range(len(index.samples))],
    }


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a shard.

    Raises:
        CheckpointError: it cannot be read, or is invalid.
    """
    try:
        record: dict[str, Any] = read_json(path, MAX_INDEX_BYTES)
        _check_record(record)
        return record
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}; run the command again to continue.") from None


def record_index(record: dict[str, Any], encoder: Encoder) -> Index:
    """Return the samples of a shard.

    Args:
        record: the record of the shard.
        encoder: what encoded it.
    """
    names = [key.encode("utf-8", "surrogateescape") for key in record["keys"]]
    samples = np.zeros((len(names), len(Entry._fields)), np.int64)
    samples[:, STORED] = np.array(record["rows"], np.int64).reshape(-1, 4)
    samples[:, 6] = [len(name) for name in names]
    samples[:, 5] = np.cumsum(samples[:, 6]) - samples[:, 6]
    shard = ShardInfo(record["name"], record["bytes"], record["samples"])
    text = _decoded(record.get("text"), len(names), len(TextEntry._fields))
    features = _decoded(record.get("features"), len(names), FEATURES_COLUMNS)
    keys = np.frombuffer(b"".join(names), np.uint8)
    return Index(
        (shard,), samples, keys, encoder.latents, text=text, text_format=encoder.text, features=features,
        feature_format=encoder.features,
    )  # fmt: skip


def _check_record(record: dict[str, Any]) -> None:
    """Check the record of a shard, as `shard_record` returns it; older ones have neither text nor features.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: a value is missing or invalid.
    """
    info = shard_info(record)
    rows, keys = record["rows"], record["keys"]
    valid = type(rows) is list and all(
        type(row) is list and len(row) == 4 and all(type(number) is int and -1 <= number < 2**63 for number in row)
        for row in rows
    )
    valid = valid and type(keys) is list and all(type(k) is str and k.encode(errors="surrogateescape") for k in keys)
    valid = valid and len(rows) == len(keys) == info.samples
    _decoded(record.get("text"), len(rows), len(TextEntry._fields))
    _decoded(record.get("features"), len(rows), FEATURES_COLUMNS)
    valid = valid and type(record["sha256"]) is str and type(record["skipped"]) is list
    valid = valid and all(type(entry["key"]) is type(entry["reason"]) is str for entry in record["skipped"])
    valid = valid and type(record["statistics"]) is list and len(record["statistics"]) == 3
    valid = valid and all(type(record.get(name, 0)) is int for name in ("captions", "truncated"))
    if not valid or not all(type(number) in (int, float) for number in record["statistics"]):
        raise ValueError("not the record of a shard")


def _encoded(table: np.ndarray | None) -> str | None:
    """Return a table of the index, int64 [samples, columns], in base64.

    As numbers, that of a large shard would exceed the limits of a JSON file.
    """
    return None if table is None else base64.b64encode(table.astype(ROW).tobytes()).decode()


def _decoded(text: str | None, samples: int, columns: int) -> np.ndarray | None:
    """Return the table that `_encoded` encoded."""
    if text is None:
        return None
    return np.frombuffer(base64.b64decode(text, validate=True), ROW).reshape(samples, columns).astype(np.int64)
