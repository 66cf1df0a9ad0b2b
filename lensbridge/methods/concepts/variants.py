"""The kinds of autoencoder: what makes codes sparse, and what is lowered beside the squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ...hooks import InputError
from .jump import Kernel, heaviside, jump_relu
from .models import Autoencoder
from .sparse import Places

REACH = {"rectangle": 0.5, "triangular": 0.5, "epanechnikov": 0.5, "quartic": 0.5, "cosine": 1.0}
"""How many bandwidths from the threshold a kernel is not zero; the others are nowhere."""


class Vanilla(Autoencoder):
    """A ReLU; sparse by the sum of its codes, which unit atoms keep honest."""

    def __init__(self, d: int, nb_concepts: int, *, l1: float | int = 1.25, **common: Any) -> None:
        self._build(d, nb_concepts, **common)
        self.l1 = number("l1", l1)

    def _penalty(self, codes: Tensor, pre: Tensor, cols: Tensor | None, n: int) -> Tensor:
        return self.l1 * codes.sum() / (n * self.b_dec.numel())


class TopK(Autoencoder):
    """The k largest of each row."""

    top_k: int

    def __init__(
        self, d: int, nb_concepts: int, *, top_k: int | None = None, **common: Any
    ) -> None:
        self._build(d, nb_concepts, top_k=count("top_k", top_k, nb_concepts), **common)

    def inside(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-codes and codes, in the units inside."""
        pre, codes = self.encoder(centered)
        best = codes.topk(self.top_k, dim=-1)
        return pre, torch.zeros_like(codes).scatter(-1, best.indices, best.values)

    def _matters(self, made: Tensor) -> Places:
        return Places.of_each_row(made.topk(self.top_k, dim=-1, sorted=False).indices)


class BatchTopK(Autoencoder):
    """The k largest a row on average over a batch; of single rows, those above a threshold.

    Attributes:
        top_k: For each row; overcomplete counts them for the batch.
        threshold: The moving mean of the least codes that batches kept; part of the state.
    """

    top_k: int
    threshold_momentum: float
    threshold: Tensor
    n_seen: Tensor

    def __init__(
        self,
        d: int,
        nb_concepts: int,
        *,
        top_k: int | None = None,
        threshold_momentum: float | int = 0.9,
        **common: Any,
    ) -> None:
        k = count("top_k", top_k, nb_concepts)
        momentum = number("threshold_momentum", threshold_momentum, most=1.0)
        self._build(d, nb_concepts, top_k=k, threshold_momentum=momentum, **common)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))

    def inside(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-codes and codes, in the units inside."""
        pre, codes = self.encoder(centered)
        if self.training:
            least = self._least(codes.detach())
            return pre, torch.where(codes >= least, codes, 0)
        return pre, torch.where(codes > self.threshold, codes, 0)

    @torch.no_grad()
    def _least(self, made: Tensor) -> Tensor:
        """The least pre-code that is kept of a batch; notes it."""
        wanted = min(self.top_k * len(made), made.numel())
        # Sorting out a million numbers is slow; nearly all of them are far below what the last batches kept.
        likely = made[made > self.threshold / 2] if int(self.n_seen) else made.flatten()
        if len(likely) < wanted:
            likely = made.flatten()
        kept = likely.topk(wanted, sorted=False).values
        # Codes that are not positive are none, though there may be too few others.
        least = kept.min().clamp(min=torch.finfo(made.dtype).tiny).to(self.threshold)
        rate = self.threshold_momentum
        moved = rate * self.threshold + (1 - rate) * least
        self.threshold.copy_(torch.where(self.n_seen == 0, least, moved))
        self.n_seen.add_(1)
        return least.to(made.dtype)

    def _matters(self, made: Tensor) -> Bool[Tensor, "row concept"]:
        return made >= self._least(made)

    def _activated(self, pre: Tensor, cols: Tensor | None) -> Tensor:
        if cols is not None:
            return pre.relu()
        return torch.where(pre >= self._last(pre), pre, 0).relu()

    def _last(self, pre: Tensor) -> Tensor:
        wanted = min(self.top_k * len(pre), pre.numel())
        return pre.detach().flatten().topk(wanted, sorted=False).values.min()

    def _fold_rest(self) -> None:
        self.threshold.div_(self.scale)


class Jump(Autoencoder):
    """JumpReLU with a threshold for each concept, raw and not below zero.

    Attributes:
        target_l0: How many codes a row should have; the penalty is quadratic in what is missed, relatively.
        l0: What it weighs.
    """

    thresholds: nn.Parameter
    bandwidth: Tensor
    kernels: Mapping[str, Kernel]

    def __init__(
        self,
        d: int,
        nb_concepts: int,
        *,
        kernel: str = "rectangle",
        bandwidth: float | int = 0.2,
        threshold: float | int = 0.5,
        target_l0: int | None = None,
        l0: float | int = 0.3,
        **common: Any,
    ) -> None:
        if kernel not in self.kernels:
            raise InputError(f"kernel is one of {', '.join(self.kernels)}; got {kernel!r}")
        self._build(d, nb_concepts, **common)
        first, width = number("threshold", threshold), number("bandwidth", bandwidth)
        if not width:
            raise InputError("bandwidth is above 0")
        del self.bandwidth
        self.register_buffer("bandwidth", torch.tensor(width))
        self.thresholds = nn.Parameter(torch.full((nb_concepts,), first))
        self.kernel_fn = self.kernels[kernel]
        self.reach = REACH.get(kernel, float("inf"))
        self.target_l0 = float(count("target_l0", target_l0, nb_concepts))
        self.l0 = number("l0", l0)

    def inside(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-codes and codes, in the units inside."""
        pre, _ = self.encoder(centered)
        return pre, self._activated(pre, None)

    def _matters(self, made: Tensor) -> Bool[Tensor, "row concept"]:
        return made > self.thresholds - self.reach * self.bandwidth

    def _activated(self, pre: Tensor, cols: Tensor | None) -> Tensor:
        thresholds = self.thresholds if cols is None else self.thresholds[cols]
        return jump_relu(pre, thresholds, self.kernel_fn, self.bandwidth)

    def _penalty(self, codes: Tensor, pre: Tensor, cols: Tensor | None, n: int) -> Tensor:
        thresholds = self.thresholds if cols is None else self.thresholds[cols]
        l0 = heaviside(pre, thresholds, self.kernel_fn, self.bandwidth).sum() / n
        return self.l0 * (l0 / self.target_l0 - 1).square()

    @torch.no_grad()
    def after_step(self) -> None:
        """Between the optimizer's step and the next batch."""
        super().after_step()
        self.thresholds.clamp_(min=0)

    def _fold_rest(self) -> None:
        self.thresholds.data.div_(self.scale)
        self.bandwidth.div_(self.scale)


def count(name: str, given: Any, most: int | None = None, *, least: int = 1) -> int:
    """A whole number; of codes a row, 32 or an eighth of the concepts unless given."""
    if given is None and most is not None:
        return max(1, min(32, most // 8))
    if not isinstance(given, int) or isinstance(given, bool) or given < least:
        raise InputError(f"{name} is a whole number, at least {least}; got {given!r}")
    if most is not None and given > most:
        raise InputError(f"{name}={given} codes a row, and there are {most} concepts")
    return given


def number(name: str, given: Any, most: float = float("inf")) -> float:
    """A number from 0 on."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= most:
        within = "at least 0" if most == float("inf") else f"from 0 to {most:g}"
        raise InputError(f"{name} is a number {within}; got {given!r}")
    return float(given)
