"""Slices as a caller writes them, of the dimension that a point's axes say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hooks import InputError

SliceInput = Any
"""None (all), an index (drops the dimension), a slice or (start, stop[, step]), or a list of indices."""


def pos_dim(axes: str) -> int:
    """Which dimension runs over positions; the query dimension of scores and patterns."""
    names = axes.split()
    return names.index("pos" if "pos" in names else "query")


def take(tensor: Tensor, what: SliceInput, dim: int) -> Tensor:
    """Slice one dimension; an int drops it.

    Raises:
        InputError: Not a slice.
    """
    if what is None:
        return tensor
    if isinstance(what, bool):
        raise InputError(
            "a slice is None, an int, a slice, (start, stop), or a list of indices, got a bool"
        )
    dim = dim % tensor.dim()
    length = tensor.shape[dim]
    if isinstance(what, int):
        _check_index(what, length)
        return tensor.select(dim, what)
    if isinstance(what, tuple):
        what = slice(*what)
    if isinstance(what, slice):
        index: list[Any] = [slice(None)] * dim
        return tensor[(*index, what)]
    if isinstance(what, (list, Tensor)):
        indices = torch.as_tensor(what, device=tensor.device).reshape(-1)
        indices = indices if indices.numel() else indices.long()  # an empty list says no dtype
        for entry in indices.tolist():
            _check_index(entry, length)
        # index_select knows no negative indices.
        return tensor.index_select(dim, torch.where(indices < 0, indices + length, indices))
    raise InputError(
        f"a slice is None, an int, a slice, (start, stop), or a list of indices, got {type(what).__name__}"
    )


def _check_index(index: int, length: int) -> None:
    if not -length <= index < length:
        raise InputError(f"index {index} is outside the {length} entries of that dimension")
