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
        ctx: Any,
        center: Tensor,
        weight: Tensor,
        bias: Tensor,
        x: Tensor,
        made: Tensor,
        places: Places,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.places = places
        return made[places.rows, places.cols].to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        places: Places = ctx.places
        # Sorting small numbers takes a third of the time.
        small = torch.int16 if len(weight) < 2**15 else torch.int32
        by_concept = places.cols.to(small).argsort(stable=True)
        counts = places.cols.bincount(minlength=len(weight))
        by_weight = F.embedding_bag(
            places.rows[by_concept],
            x,
            F.pad(counts.cumsum(0), (1, 0)),
            mode="sum",
            per_sample_weights=grad[by_concept],
            include_last_offset=True,
        )
        by_bias = torch.zeros_like(weight[:, 0]).index_add_(0, places.cols, grad)
        by_center = -(by_bias @ weight) if ctx.needs_input_grad[0] else None
        return by_center, by_weight, by_bias, None, None, None


class _Whole(torch.autograd.Function):
    """All of ``x @ weight.T + bias``, once it has been made."""

    @staticmethod
    def forward(
        ctx: Any, center: Tensor, weight: Tensor, bias: Tensor, x: Tensor, made: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        return made.view_as(made)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        by_bias = grad.sum(0)
        by_center = -(by_bias @ weight) if ctx.needs_input_grad[0] else None
        return by_center, grad.T @ x, by_bias, None, None


@dataclass(frozen=True)
class Linear:
    """``made = (u - center) @ weight.T + bias``: made once, without a graph, and given out with one.

    The gradient by what is taken off all rows needs no product of all codes with all atoms: it is that by the
    bias, times the atoms.

    Attributes:
        x: ``u - center``, without a graph.
        made: What the layer makes of it.
        center: What is taken off; it gets a gradient if it wants one.
        weight: One row for each concept.
        bias: One number for each.
    """

    x: Float[Tensor, "row d"]
    made: Float[Tensor, "row concept"]
    center: Float[Tensor, " d"]
    weight: Float[Tensor, "concept d"]
    bias: Float[Tensor, " concept"]

    def whole(self) -> Float[Tensor, "row concept"]:
        """All of it."""
        return _Whole.apply(self.center, self.weight, self.bias, self.x, self.made)

    def at(self, places: Places) -> Float[Tensor, " code"]:
        """Its entries at some places."""
        return _Pick.apply(self.center, self.weight, self.bias, self.x, self.made, places)
