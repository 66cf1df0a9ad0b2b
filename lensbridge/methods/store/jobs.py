"""Jobs: samples that run together, the same ones whoever runs them and wherever he began."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from .items import Item
from .positions import Positions

WINDOW = 64
"""How many batches are sorted by length together: that much of a dataset is read ahead, and no more."""


@dataclass(frozen=True)
class Job:
    """Samples that run together, padded behind to the longest.

    Attributes:
        number: Which batch of the dataset it is.
        samples: Which samples of the dataset they are.
        items: The samples themselves.
        kept: Of each sample, the tokens that have rows.
        pools: Whether a sample has one row, made of those tokens.
    """

    number: int
    samples: list[int]
    items: list[Item]
    kept: list[NDArray[Any]]
    pools: bool

    @cached_property
    def lengths(self) -> NDArray[Any]:
        """The number of tokens of each sample."""
        return np.array([len(item.ids) for item in self.items])

    @cached_property
    def counts(self) -> NDArray[Any]:
        """The number of rows of each sample."""
        return np.array([1 if self.pools else len(own) for own in self.kept])

    @cached_property
    def tokens(self) -> NDArray[Any]:
        """The ids of all samples, one after the other."""
        return np.concatenate([item.ids for item in self.items])

    @property
    def width(self) -> int:
        """The length of the longest sample."""
        return int(self.lengths.max())

    @cached_property
    def is_token(self) -> NDArray[Any]:
        """Where tokens are, [batch, pos]; the rest is padding."""
        return np.arange(self.width) < self.lengths[:, None]

    @property
    def is_padded(self) -> bool:
        """Whether some sample is shorter than another."""
        return int(self.lengths.min()) < self.width

    def table(self, each: Iterable[NDArray[Any]], fill: int) -> Int[Tensor, "batch pos"]:
        """Numbers of each token as the model takes them."""
        made = np.full(self.is_token.shape, fill, dtype=np.int64)
        made[self.is_token] = np.concatenate(list(each))
        return torch.from_numpy(made)

    def inputs(self, pad_id: int) -> tuple[Int[Tensor, "batch pos"], dict[str, Tensor]]:
        """Token ids, and what else the model's forward is told."""
        beside = {}
        if (
            self.is_padded
        ):  # without padding the model is called as on bare ids, fast kernels and all
            beside["attention_mask"] = torch.from_numpy(self.is_token.astype(np.int64))
        if any(item.types is not None for item in self.items):
            types = [np.zeros_like(x.ids) if x.types is None else x.types for x in self.items]
            beside["token_type_ids"] = self.table(types, 0)
        return self.table((item.ids for item in self.items), pad_id), beside

    @cached_property
    def takes_all(self) -> bool:
        """Whether each column is a row, so that none needs looking for."""
        return not self.is_padded and all(
            len(own) == self.width and (own == np.arange(self.width)).all() for own in self.kept
        )

    @cached_property
    def places(self) -> Tensor:
        """Where the tokens of all rows are, in states without their batch dimension, [token]."""
        starts = [row * self.width for row in range(len(self.items))]
        each = [own + start for own, start in zip(self.kept, starts, strict=True)]
        return torch.from_numpy(np.concatenate(each))

    @property
    def mark(self) -> int:
        """A checksum of what is run: the samples, their tokens, and which have rows."""
        told = zlib.crc32(np.array([*self.samples, *self.lengths, *self.counts]).tobytes())
        return zlib.crc32(self.tokens.tobytes(), told)


def jobs_of(
    items: Iterable[Item],
    positions: Positions,
    batch_size: int,
    *,
    pads: bool = True,
    window: int = WINDOW,
) -> Iterator[Job]:
    """Batch a dataset: samples of like length together, the longest of a window first.

    Args:
        items: The samples, in the order of the dataset.
        positions: Which tokens have rows.
        batch_size: How many samples run together.
        pads: False has only samples of one length run together.
        window: How many batches are sorted together.
    """
    number, stream = 0, enumerate(items)
    while held := list(islice(stream, window * batch_size)):
        held.sort(key=lambda sample: -len(sample[1].ids))
        alike = groupby(held, lambda sample: pads or len(sample[1].ids))
        for run in [list(own) for _, own in alike]:
            for at in range(0, len(run), batch_size):
                samples, own = zip(*run[at : at + batch_size], strict=True)
                kept = [positions.of(item, i) for i, item in zip(samples, own, strict=True)]
                yield Job(number, list(samples), list(own), kept, positions.pools)
                number += 1
