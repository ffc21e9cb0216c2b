"""Save a calibration in a file next to its checkpoint, named after everything that it depends on.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from diffmoe_ds.control_files import read_json
from diffmoe_ds.files import write_json
from diffmoe_ds.sampling.capacity import IMAGES, Calibration

FORMAT = 2
"""Increment this when the same settings would give different thresholds."""


class CapacityFile:
    """The file of a calibration, which may not exist."""

    def __init__(self, folder: Path, capacity: float, settings: Mapping[str, Any]) -> None:
        """Choose the file's name without accessing it.

        Args:
            folder: directory of the checkpoint.
            capacity: c.
            settings: plain data: everything else that determines the thresholds, including the checkpoint's identity.
        """
        key = {"format": FORMAT, "images": IMAGES, "capacity": capacity, **settings}
        self._key = json.loads(json.dumps(key))  # tuples become lists, as in the file
        self._capacity = capacity
        self.path = folder / f"capacity-{capacity:g}-{_digest(self._key)[:12]}.json"

    def read(self, layers: int, experts: int) -> Calibration | None:
        """Return the calibration, or None if the file is missing, damaged or belongs to other settings.

        Args:
            layers: L.
            experts: E.
        """
        try:
            tree = read_json(self.path)
            content = tree["calibration"]
            if tree["key"] != self._key or tree["sha256"] != _digest(content):
                return None
            if not all(type(value) in (int, float) for row in content["thresholds"] for value in row):
                return None
            threshold_LE = torch.tensor(content["thresholds"], dtype=torch.float32)
            measured, rounds = float(content["measured"]), int(content["rounds"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        is_valid = threshold_LE.shape == (layers, experts) and bool(threshold_LE.isfinite().all())
        return Calibration(self._capacity, threshold_LE, measured, rounds) if is_valid else None

    def write(self, calibration: Calibration) -> None:
        """Write a calibration with thresholds, atomically.

        Raises:
            CheckpointError: the file cannot be written.
        """
        assert calibration.threshold_LE is not None
        content = {
            "measured": calibration.measured,
            "rounds": calibration.rounds,
            "thresholds": calibration.threshold_LE.tolist(),
        }
        write_json(self.path, {"key": self._key, "calibration": content, "sha256": _digest(content)})


def _digest(tree: Any) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
