"""Load exported folders with diffusers, as a user without this package does; run as a script.

Its argument is a folder with ``jobs.json``, a list of {"folder", "class", "load", "call"} and optionally "save",
a folder through which the pipeline goes before the call, and "inputs", an npz file. The results go to ``0.npz``,
``1.npz``, ... in it: images, and outputs of the transformer for the inputs x, t and y of that file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch

sys.modules["diffmoe_ds"] = None  # type: ignore[assignment]  # any import of it fails


def run(job: dict) -> dict[str, np.ndarray]:
    """Return the results of one job."""
    pipe = getattr(diffusers, job["class"]).from_pretrained(job["folder"], **job["load"])
    if "save" in job:
        pipe.save_pretrained(job["save"])
        pipe = diffusers.DiffusionPipeline.from_pretrained(job["save"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    if "generator" in job["call"]:
        job["call"]["generator"] = torch.Generator().manual_seed(job["call"]["generator"])
    results = {"images": np.stack([np.asarray(image) for image in pipe(**job["call"]).images])}
    if "inputs" in job:
        with np.load(job["inputs"]) as file, torch.no_grad():
            x, t, y = (torch.from_numpy(file[name]) for name in ("x", "t", "y"))
            results["outputs"] = pipe.transformer(x, timestep=t, class_labels=y).sample.numpy()
    return results


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for index, job in enumerate(json.loads((place / "jobs.json").read_text())):
        np.savez(place / f"{index}.npz", **run(job))
