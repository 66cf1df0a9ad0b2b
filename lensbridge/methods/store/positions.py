"""Positions: which tokens of a sample have rows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...hooks import InputError
from .items import Item


class Positions:
    """Which tokens have rows.

    Args:
        given: ``"all"``; ``"last"``; ``"mean"``, one row for the mean over all tokens; an index or several,
            negative ones from a sample's end; a mask [n, pos], or one for each sample, over the columns of
            the dataset as it was given.
    Raises:
        InputError: Something else.

    Attributes:
        pools: Whether a row is made of all tokens of a sample.
        is_single: Whether each sample has one row by itself, which needs no dimension.
    """

    def __init__(self, given: Any = "all") -> None:
        self._indices: NDArray[Any] | None = None
        self._mask: Any = None
        self._name = given if isinstance(given, str) else None
        if isinstance(given, str):
            if given not in ("all", "last", "mean"):
                raise _wrong(given)
            if given == "last":
                self._indices = np.array([-1])
        elif isinstance(given, int) and not isinstance(given, bool):
            self._indices = np.array([given])
        elif _is_mask(given):
            self._mask = given
        elif isinstance(given, (Sequence, Tensor, np.ndarray)) and len(given):
            self._indices = np.asarray(given)
            if self._indices.ndim != 1 or self._indices.dtype.kind not in "iu":
                raise _wrong(given)
        else:
            raise _wrong(given)
        self.pools = self._name == "mean"
        self.is_single = self._name in ("last", "mean") if self._name else isinstance(given, int)

    def of(self, item: Item, index: int) -> NDArray[Any]:
        """The tokens of a sample that have rows, or that its row is made of.

        Raises:
            InputError: A position the sample does not have, or a mask of another size.
        """
        n = len(item.ids)
        if self._mask is not None:
            return self._row(item, index)[item.start : item.start + n].nonzero()[0]
        if self._indices is None:
            return np.arange(n)
        beyond = (self._indices < -n) | (self._indices >= n)
        if beyond.any():
            raise InputError(
                f"position {self._indices[beyond][0]} is not one of the {n} of sample {index}"
            )
        return self._indices % n

    def _row(self, item: Item, index: int) -> NDArray[Any]:
        if index >= len(self._mask):
            raise InputError(
                f"the mask given as positions= has {len(self._mask)} rows, but the dataset has more samples"
            )
        row = np.asarray(self._mask[index]).astype(bool)
        is_table = isinstance(self._mask, Tensor)
        if row.ndim != 1 or len(row) < item.width or (len(row) > item.width and not is_table):
            raise InputError(
                f"the mask given as positions= has {list(row.shape)} for sample {index}, which has "
                f"{item.width} columns"
            )
        return row

    def count(self, item: Item, index: int) -> int:
        """How many rows a sample has."""
        return 1 if self.pools else len(self.of(item, index))

    @property
    def described(self) -> Any:
        """What tells these positions from others, for JSON."""
        if self._name is not None:
            return self._name
        if self._indices is not None:
            return self._indices.tolist()
        digest = hashlib.sha256()
        for row in self._mask:
            held = np.asarray(row).astype(np.uint8)
            digest.update(len(held).to_bytes(8, "little") + held.tobytes())
        return {"mask": digest.hexdigest()}


def _is_mask(given: Any) -> bool:
    if isinstance(given, (Tensor, np.ndarray)):
        return given.ndim == 2 and given.dtype in (torch.bool, np.dtype(bool))
    return (
        isinstance(given, Sequence)
        and len(given) > 0
        and all(isinstance(row, (Sequence, Tensor, np.ndarray)) for row in given)
        and not any(isinstance(row, str) for row in given)
    )


def _wrong(given: Any) -> InputError:
    shown = list(given.shape) if isinstance(given, (Tensor, np.ndarray)) else repr(given)
    return InputError(
        "positions is 'all', 'last', 'mean', indices, a bool mask [n, pos] or one mask a sample, got "
        f"{shown}"
    )
