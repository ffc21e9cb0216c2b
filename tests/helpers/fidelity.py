"""Compare our metrics and our Inception features with those of torch-fidelity; prints one JSON object.

Runs in a process of its own, as ``python tests/helpers/fidelity.py FOLDER``: with torchvision importable, diffusers and
transformers would import it, which fails beside a CPU build of torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from diffmoe_ds.cli import main
from diffmoe_ds.errors import DataError
from diffmoe_ds.evaluation import metrics
from diffmoe_ds.evaluation.inception import InceptionExtractor, _network_class
from diffmoe_ds.evaluation.moments import Moments

NETWORK = _network_class()  # before the next imports, which need what it declares
from torch_fidelity import feature_extractor_inceptionv3 as theirs  # noqa: E402
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_isc import isc_features_to_metric  # noqa: E402
from torch_fidelity.metric_kid import kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import prc_features_to_metric  # noqa: E402

FOLDER = Path(sys.argv[1])


def compare_metrics() -> dict[str, tuple[float, float]]:
    """Return pairs (ours, theirs) on the same features."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(250, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    x, y = x * torch.linspace(0.2, 2, 40) + 0.1, y @ torch.randn(40, 40, generator=generator, dtype=torch.float64) / 6
    first, second = Moments(40).add(x), Moments(40).add(y)
    fid = metrics.frechet_distance(first.mean_F, first.covariance(), second.mean_F, second.covariance())
    statistics = [fid_features_to_statistics(each) for each in (x, y)]
    kid = metrics.kid(x, y, subsets=1)
    options = {"kid_subset_size": 250, "kid_subsets": 1, "verbose": False, "save_cpu_ram": False}
    precision, recall = metrics.precision_recall(x, y)
    prc = prc_features_to_metric(x, y, **options)
    return {
        "fid": (fid, fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"]),
        "kid": (kid.mean, kid_features_to_metric(x, y, **options)["kernel_inception_distance_mean"]),
        "precision": (precision, prc["precision"]),
        "recall": (recall, prc["recall"]),
        "inception_score": (
            metrics.inception_score(x, split=125)[0],
            isc_features_to_metric(x, splits=2, shuffle=False)["inception_score_mean"],
        ),
    }


def random_weights() -> Path:
    """Write weights of random numbers, scaled so that activations neither vanish nor explode."""
    theirs.load_state_dict_from_url = lambda *_, **__: None  # instead of a download
    NETWORK.load_state_dict = lambda *_, **__: None
    network = NETWORK("random", ["2048"])
    del NETWORK.load_state_dict
    generator = torch.Generator().manual_seed(1)
    state = network.state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(("bias", "mean")):
            value.normal_(0, 0.1, generator=generator)
    torch.save(state, FOLDER / "weights.pth")
    return FOLDER / "weights.pth"


def compare_features(weights: Path) -> dict[str, float]:
    """Return the largest differences between our outputs and their network's."""
    images = torch.randint(0, 256, (3, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    network = NETWORK("direct", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    kept = []
    network.Mixed_6d.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    features, logits = network(images)
    ours = InceptionExtractor(weights, torch.device("cpu")).extract(images)
    # mixed_6 begins with the channels of its first branch, mixed_6/conv; ADM flattens [17, 17, 7]
    spatial = np.stack([image[:7].numpy().transpose(1, 2, 0).reshape(-1) for image in kept[0]])
    assert features.shape[1] == 2048 and spatial.shape[1] == 2023 and logits.shape[1] == 1008
    pairs = {
        "features": (ours[0], features),
        "spatial": (ours[1], torch.from_numpy(spatial)),
        "logits": (ours[2], logits),
    }
    assert all(theirs.std() > 0.01 for _, theirs in pairs.values()), "the random network is not degenerate"
    return {name: float((mine - other).abs().max()) for name, (mine, other) in pairs.items()}


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(FOLDER / "unpickled"),)


def refused_weights() -> list[str]:
    """Return the messages for files that do not hold these weights."""
    torch.save({"fc.weight": Evil()}, FOLDER / "evil.pth")
    torch.save({"fc.weight": torch.zeros(2)}, FOLDER / "other.pth")
    (FOLDER / "text.pth").write_text("no weights")
    messages = []
    for name in ("evil", "other", "text", "missing"):
        try:
            InceptionExtractor(FOLDER / f"{name}.pth", torch.device("cpu"))
        except DataError as error:
            messages.append(str(error))
    assert not (FOLDER / "unpickled").exists()
    return messages


def evaluate(weights: Path) -> list[dict[str, object]]:
    """Run the command against images, against the saved reference, and against a file in ADM's format."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), np.uint8)
    np.savez(FOLDER / "samples.npz", arr_0=pixels[:5])
    np.savez(FOLDER / "reference.npz", arr_0=pixels[5:])
    saved, adm = FOLDER / "saved.npz", FOLDER / "adm.npz"
    found = []
    for reference, options in ((FOLDER / "reference.npz", ("--save-reference", str(saved))), (saved, ()), (adm, ())):
        arguments = ["--samples", str(FOLDER / "samples.npz"), "--reference", str(reference)]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(["evaluate", *arguments, "--extractor", f"inception:{weights}", "--json", *options])
        assert code == 0, out.getvalue()
        found.append(json.loads(out.getvalue()))
        if reference == saved:
            with np.load(saved) as file:
                np.savez(adm, arr_0=pixels[5:], **{name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s")})
    return found


if __name__ == "__main__":
    file = random_weights()
    print(json.dumps({
        "metrics": compare_metrics(), "features": compare_features(file), "refused": refused_weights(),
        "evaluate": evaluate(file),
    }))  # fmt: skip
