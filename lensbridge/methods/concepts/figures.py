"""How well and how sparsely activations are rebuilt, by exact definitions."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ...hooks import InputError


class Spread:
    """The mean of rows and the sum of their squared distances from it, in float64, batch by batch."""

    def __init__(self, d: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean = torch.zeros(d, dtype=torch.float64, device=device)
        self.total = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, rows: Float[Tensor, "row d"]) -> None:
        """Take rows in."""
        x = rows.to(self.mean)
        own = x.mean(0)
        away = own - self.mean
        n = self.n + len(x)
        # Sums of squares around zero would lose all digits where the mean is large.
        self.total += (x - own).square().sum() + away.square().sum() * self.n * len(x) / n
        self.mean += away * len(x) / n
        self.n = n


def explained_variance(x: Float[Tensor, "row d"], x_hat: Float[Tensor, "row d"]) -> float:
    """1 - sum ||x - x_hat||² / sum ||x - mean of x||², in float64.

    Args:
        x: Activations.
        x_hat: Their reconstructions.
    Returns:
        1 for a perfect reconstruction, 0 for the mean; below it for worse.
    Raises:
        InputError: All activations are equal.
    """
    spread = Spread(x.shape[1], x.device)
    spread.add(x)
    if not spread.total:
        raise InputError(f"{len(x)} equal rows have no variance to explain")
    error = (x.double() - x_hat.double()).square().sum()
    return float(1 - error / spread.total)
