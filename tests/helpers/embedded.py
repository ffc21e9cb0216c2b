"""Importing this reads the embedded dataset, once for all later uses in this process and its forks.

Each would take half a second to decompress and scan it.
"""

from __future__ import annotations

import pickle

from diffmoe_ds.data.sources.shards import EMBEDDED, ShardDataset
from diffmoe_ds.data.sources.tar_index import Index

_scan = ShardDataset._scan
_dataset = ShardDataset([EMBEDDED])
_stored = pickle.dumps((_dataset.index, _dataset._unpacked[0]))
del _dataset  # with its temporary file, which no fork should inherit


def _scan_once(dataset: ShardDataset, number: int) -> Index:
    if dataset._shards[number] != str(EMBEDDED):
        return _scan(dataset, number)
    index, dataset._unpacked[number] = pickle.loads(_stored)
    return index


ShardDataset._scan = _scan_once
