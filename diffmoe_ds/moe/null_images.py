"""Images whose label or prompt is dropped, as far as the experts treat them in their own way (ProMoE).

Legend: B images of a batch, N null images among them, S tokens per image, T = B * S.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NullImages(NamedTuple):
    """The null images of a batch. Their number is known to the host."""

    is_null_B: Tensor
    """bool."""
    null_N: Tensor
    """int64: the null images."""
    others: Tensor
    """int64 [B - N]: the other ones."""

    def without(self, tokens_T: Tensor) -> Tensor:
        """Return the tokens of the other images.

        Args:
            tokens_T: [T, ...].
        """
        return self._of(tokens_T, self.others)

    def only(self, tokens_T: Tensor) -> Tensor:
        """Return the tokens of the null images.

        Args:
            tokens_T: [T, ...].
        """
        return self._of(tokens_T, self.null_N)

    def exclude(self, mask_TE: Tensor) -> Tensor:
        """Return a mask without the tokens of the null images."""
        return (self._by_image(mask_TE) & ~self.is_null_B[:, None, None]).flatten(0, 1)

    def _of(self, tokens_T: Tensor, images: Tensor) -> Tensor:
        return self._by_image(tokens_T).index_select(0, images).flatten(0, 1)

    def _by_image(self, tokens_T: Tensor) -> Tensor:
        by_image: Tensor = tokens_T.unflatten(0, (len(self.is_null_B), -1))
        return by_image

    def add(self, tokens_TD: Tensor, added: Tensor) -> Tensor:
        """Return the tokens plus what is added to those of the null images.

        Args:
            tokens_TD: of all images.
            added: [N * S, D].
        """
        tokens_BSD = self._by_image(tokens_TD)
        added_NSD = added.view(len(self.null_N), *tokens_BSD.shape[1:])
        return tokens_BSD.index_add(0, self.null_N, added_NSD).flatten(0, 1)


def find_null_images(is_null_B: Tensor) -> NullImages:
    """Return the null images of a batch; waits for the device.

    Args:
        is_null_B: bool.
    """
    order_B = is_null_B.to(torch.int8).argsort(stable=True)
    others = len(is_null_B) - int(is_null_B.sum())
    return NullImages(is_null_B, order_B[others:], order_B[:others])
