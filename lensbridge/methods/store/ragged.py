"""Ragged: rows of samples of unequal lengths, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """Rows of samples, one sample after the other.

    Attributes:
        values: All rows, [row, ...].
        offsets: Where each sample's rows begin, and where the last one's end, [n + 1].
    """

    values: Shaped[Tensor, "row ..."]
    offsets: Int[Tensor, " ends"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Tensor:
        """The rows of a sample, [row, ...]; a view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} is not one of {len(self)}")
        start, stop = self.offsets[index % len(self) :][:2].tolist()
        return self.values[start:stop]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        shape, dtype = list(self.values.shape), self.values.dtype
        return f"Ragged({len(self)} samples, values {shape} {dtype})"

    @property
    def lengths(self) -> Int[Tensor, " n"]:
        """How many rows each sample has."""
        return self.offsets.diff()

    def padded(self) -> tuple[Shaped[Tensor, "n longest ..."], Bool[Tensor, "n longest"]]:
        """All samples as long as the longest, zeros behind, and where rows are."""
        longest = int(self.lengths.max()) if len(self) else 0
        mask = torch.arange(longest) < self.lengths[:, None]
        made = self.values.new_zeros(len(self), longest, *self.values.shape[1:])
        made[mask.to(made.device)] = self.values
        return made, mask


def shaped(values: Shaped[Tensor, "row ..."], counts: Int[Tensor, " n"]) -> Tensor | Ragged:
    """Rows of all samples: a tensor where each sample has as many as any other, else ragged.

    Args:
        values: The rows, one sample after the other.
        counts: How many each sample has.
    """
    per_sample = int(counts[0])
    if bool((counts == per_sample).all()):
        return values.view(len(counts), per_sample, *values.shape[1:])
    return Ragged(values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
