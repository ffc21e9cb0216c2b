"""Running mean and covariance of features in fp64, over batches and ranks.

Legend: B rows of a batch, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffmoe_ds.distributed.collectives import all_gather, all_reduce, get_world_size


class Moments:
    """Count, mean and centered sum of outer products of feature rows; fp64 on the CPU.

    Sets are merged with the update of Chan, Golub and LeVeque (1979): subtracting means before squaring avoids the
    cancellation in plain sums of squares.
    """

    def __init__(self, num_features: int) -> None:
        """Start without rows.

        Args:
            num_features: F.
        """
        self.count = 0
        """Number of rows so far."""
        self.mean_F = torch.zeros(num_features, dtype=torch.float64)
        """Mean of the rows."""
        self.scatter_FF = torch.zeros(num_features, num_features, dtype=torch.float64)
        """Sum of outer products of the rows minus their mean."""

    def add(self, features_BF: Tensor) -> Moments:
        """Add rows, of any float dtype on any device; return this object."""
        if len(features_BF):
            rows_BF = features_BF.detach().double().cpu()
            mean_F = rows_BF.mean(0)
            centered_BF = rows_BF - mean_F
            self._merge(len(rows_BF), mean_F, centered_BF.T @ centered_BF)
        return self

    def merged(self, other: Moments) -> Moments:
        """Return the moments of the combined rows; both operands are unchanged."""
        result = Moments(len(self.mean_F))
        for part in (self, other):
            result._merge(part.count, part.mean_F, part.scatter_FF)
        return result

    def without(self, part: Moments) -> Moments:
        """Return the moments without some of the rows.

        Args:
            part: the moments of those rows, which must be fewer than all.
        """
        rest = Moments(len(self.mean_F))
        rest.count = self.count - part.count
        assert rest.count > 0, "the part holds all rows"
        rest.mean_F = (self.mean_F * self.count - part.mean_F * part.count) / rest.count
        delta_F = part.mean_F - rest.mean_F
        between = part.count * rest.count / self.count
        rest.scatter_FF = self.scatter_FF - part.scatter_FF - between * torch.outer(delta_F, delta_F)
        return rest

    def reduce(self) -> Moments:
        """Return the moments over all ranks. Every rank of the process group must call this."""
        counts_W = torch.cat(all_gather(torch.tensor([self.count], dtype=torch.float64)))
        means_WF = torch.stack(all_gather(self.mean_F))
        total = Moments(len(self.mean_F))
        total.count = int(counts_W.sum())
        if total.count:
            total.mean_F = counts_W @ means_WF / total.count
        delta_F = self.mean_F - total.mean_F
        total.scatter_FF = all_reduce(self.scatter_FF + self.count * torch.outer(delta_F, delta_F))
        return total

    def covariance(self) -> Tensor:
        """Return the unbiased covariance, fp64 [F, F]; at least two rows are needed."""
        assert self.count > 1, f"a covariance needs two rows, got {self.count}"
        return self.scatter_FF / (self.count - 1)

    def _merge(self, count: int, mean_F: Tensor, scatter_FF: Tensor) -> None:
        total = self.count + count
        if not total:
            return
        delta_F = mean_F - self.mean_F
        self.scatter_FF = self.scatter_FF + scatter_FF + torch.outer(delta_F, delta_F) * (self.count * count / total)
        self.mean_F = self.mean_F + delta_F * (count / total)
        self.count = total


def moments_over_ranks(features_BF: Tensor, world: int | None = None) -> Moments:
    """Return the moments of the rows of all ranks. Every rank must call this.

    Args:
        features_BF: this rank's rows; may be empty.
        world: number of ranks; with 1, no process group is needed. Default: that of the process group.
    """
    mine = Moments(features_BF.shape[1]).add(features_BF)
    return mine if (world or get_world_size()) == 1 else mine.reduce()
