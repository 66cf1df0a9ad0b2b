"""How sure gates of several masks make us."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def bootstrap(
    values: Float[Tensor, "mask layer head"], level: float, draws: int = 2000, seed: int = 0
) -> tuple[Float[Tensor, "layer head"], Float[Tensor, "layer head"]]:
    """A confidence interval for the mean over masks (percentile bootstrap, Efron 1979).

    Of a single mask it is that mask's value.
    """
    count = len(values)
    generator = torch.Generator().manual_seed(seed)
    # How often each mask is drawn, instead of the draws: a product then makes every mean.
    drawn = torch.randint(count, (draws, count), generator=generator)
    weights = torch.zeros(draws, count).scatter_add_(1, drawn, torch.ones(draws, count)) / count
    means = torch.einsum("dm,mlh->dlh", weights, values.float())
    outside = (1 - level) / 2
    low, high = torch.quantile(means, torch.tensor([outside, 1 - outside]), dim=0)
    return low, high


def correlation(open_: Float[Tensor, "mask gate"]) -> Float[Tensor, "gate gate"]:
    """Correlation over masks of whether gates are open; nan for a gate that always or never is."""
    centred = open_ - open_.mean(0)
    norm = centred.norm(dim=0)
    norm = torch.where(norm > 0, norm, torch.nan)
    return (centred.T @ centred) / (norm[:, None] * norm)


def fleiss_kappa(open_: Float[Tensor, "mask gate"]) -> float:
    """Agreement of masks on which gates are open, beyond chance (Fleiss 1971).

    1 where all agree, 0 where they agree as often as chance would have it; nan for one mask, or where every
    gate is open, or none.
    """
    raters, total = len(open_), open_.mean()
    if raters < 2 or total in (0, 1):
        return float("nan")
    opened = open_.sum(0)
    shut = raters - opened
    agreement = ((opened**2 + shut**2 - raters) / (raters * (raters - 1))).mean()
    chance = total**2 + (1 - total) ** 2
    return float((agreement - chance) / (1 - chance))
