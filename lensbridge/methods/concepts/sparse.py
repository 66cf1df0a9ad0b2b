"""The few codes of a batch that are not zero, and products with them that touch nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Places:
    """Which codes of a batch are looked at, row by row.

    Attributes:
        rows, cols: The row and the concept of each.
        starts: Where each row begins among them, and where the last one ends.
    """

    rows: Int[Tensor, " code"]
    cols: Int[Tensor, " code"]
    starts: Int[Tensor, " row_and_1"]

    @classmethod
    def of_mask(cls, mask: Bool[Tensor, "row concept"]) -> Places:
        """Where a mask is true."""
        rows, cols = mask.nonzero(as_tuple=True)
        starts = F.pad(mask.sum(1).cumsum(0), (1, 0))
        return cls(rows, cols, starts)

    @classmethod
    def of_each_row(cls, cols: Int[Tensor, "row k"]) -> Places:
        """The same number in each row."""
        n, k = cols.shape
        rows = torch.arange(n, device=cols.device).repeat_interleave(k)
        starts = torch.arange(0, n * k + 1, k, device=cols.device)
        return cls(rows, cols.reshape(-1), starts)


def combine(
    values: Float[Tensor, " code"], places: Places, atoms: Float[Tensor, "concept d"]
) -> Float[Tensor, "row d"]:
    """Codes times atoms: each row the sum of its few atoms. Differentiable."""
    return F.embedding_bag(
        places.cols,
        atoms,
        places.starts,
        mode="sum",
        per_sample_weights=values.to(atoms.dtype),
        include_last_offset=True,
    )


class _Pick(torch.autograd.Function):
    """Some of ``x @ weight.T + bias``, whose gradients leave out the others."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, made: Tensor, places: Places
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.places = places
        return made[places.rows, places.cols].to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        places: Places = ctx.places
        by_concept = places.cols.argsort(stable=True)
        counts = places.cols.bincount(minlength=len(weight))
        grad_weight = F.embedding_bag(
            places.rows[by_concept],
            x,
            F.pad(counts.cumsum(0), (1, 0)),
            mode="sum",
            per_sample_weights=grad[by_concept],
            include_last_offset=True,
        )
        grad_bias = torch.zeros_like(weight[:, 0]).index_add_(0, places.cols, grad)
        grad_x = combine(grad, places, weight) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weight, grad_bias, None, None


def pick(
    x: Float[Tensor, "row d"],
    weight: Float[Tensor, "concept d"],
    bias: Float[Tensor, " concept"],
    made: Float[Tensor, "row concept"],
    places: Places,
) -> Float[Tensor, " code"]:
    """The entries of ``made`` at some places, as functions of what it was made of.

    Args:
        x: Rows; like weight and bias, differentiated by.
        weight: One row for each concept.
        bias: One number for each.
        made: ``x @ weight.T + bias``, without a graph.
        places: Which entries.
    """
    return _Pick.apply(x, weight, bias, made, places)  # type: ignore[no-untyped-call]
