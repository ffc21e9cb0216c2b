"""The Inception network of FID: the TensorFlow graph of 2015-12-05 as implemented by torch-fidelity, an extra.

The outputs are those of ADM's evaluator (arXiv 2105.05233): pool_3, the first 7 channels of mixed_6/conv, and the
logits without bias. Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffmoe_ds.checkpoint.reference_weights import RefusedFileError, check_pickles
from diffmoe_ds.control_files import open_regular
from diffmoe_ds.data.pretrained import state_digest, to_rgb
from diffmoe_ds.errors import ConfigError, DataError
from diffmoe_ds.evaluation.outputs import Outputs, one_line

SPATIAL_CHANNELS = 7
WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"


class InceptionExtractor:
    """Inception with weights from a file: 2,048 features, 2,023 spatial features, 1,008 logits."""

    is_inception = True

    def __init__(self, path: Path, device: torch.device) -> None:
        """Load the weights.

        Args:
            path: torch-fidelity's weights file; only tensors are read from it.
            device: where to run it.

        Raises:
            ConfigError: torch-fidelity cannot be imported.
            DataError: the file cannot be read or does not hold these weights.
        """
        network_class = _network_class()
        self._network: nn.Module = _load(network_class, path)
        self._network.to(device)
        self._device = device
        self._spatial: Tensor | None = None
        # mixed_6/conv in TensorFlow's graph is this branch, after its ReLU: 192 channels of 17x17.
        self._network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep_spatial)
        self.name = f"inception:{state_digest(self._network)}"

    @torch.inference_mode()
    def extract(self, images_BCHW: Tensor) -> Outputs:
        """Return pool_3, spatial features and logits; the network resizes images to 299x299 as in TensorFlow."""
        features_BF, logits_BK = self._network(to_rgb(images_BCHW).to(self._device))
        return Outputs(features_BF, self._spatial, logits_BK)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return fp32 pool_3 features [B, 2048]."""
        return self.extract(images_BCHW).features_BF

    def _keep_spatial(self, _module: nn.Module, _inputs: Any, output_BCHW: Tensor) -> None:
        # Flattened channels-last, the order of the means and covariances in ADM's files.
        self._spatial = output_BCHW[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def _network_class() -> Any:
    """Import torch-fidelity's network.

    torch-fidelity imports torchvision, although the network does not need it. With a CPU build of torch, the PyPI build
    of torchvision lacks its operators, and its import fails when it registers fake implementations of them; defining
    the two operators first avoids that.
    """
    try:
        return _import_network()
    except ImportError as error:
        raise ConfigError(
            f"--extractor inception needs torch-fidelity and torchvision, which cannot be imported "
            f"({one_line(error)}): pip install 'diffmoe_ds[inception]'."
        ) from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise ConfigError(
                f"--extractor inception: torchvision does not work with torch {torch.__version__}: {one_line(error)}."
            ) from None
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "torch_fidelity")]:
        del sys.modules[name]  # partially imported
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return _import_network()


def _import_network() -> Any:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    return FeatureExtractorInceptionV3


def _load(network_class: Any, path: Path) -> nn.Module:
    """Return the network with the weights of a file, in eval mode."""
    problem = f"--extractor inception:{path}"
    try:
        check_pickles(path)
        with open_regular(path) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        # torch-fidelity would unpickle arbitrary objects, so pass it a copy that holds only tensors.
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        network: nn.Module = network_class(
            "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=copy
        )
    except OSError as error:
        raise DataError(f"{problem}: cannot be read: {error.strerror or one_line(error)}.") from None
    except RefusedFileError as error:
        raise DataError(f"{problem}: {error}, so it was not loaded.") from None
    except Exception as error:  # the type depends on the defect
        raise DataError(
            f"{problem}: does not hold the weights of the 2015 Inception graph, published by torch-fidelity as "
            f"{WEIGHTS_NAME}: {one_line(error)}."
        ) from None
    return network.eval()
