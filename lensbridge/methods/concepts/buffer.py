"""A buffer that mixes rows which come in order, so that a batch is not all of one text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor


class ShuffleBuffer:
    """Rows of several places, mixed by one order for all.

    Half of the rows leave when it is full, drawn at random; the others mix with those that come next. Every
    row leaves once.

    Args:
        capacity: How many rows make it full.
        order: Where the order is drawn from.
    Attributes:
        n: How many rows are in it.
    """

    def __init__(self, capacity: int, order: torch.Generator) -> None:
        self.capacity, self.order = capacity, order
        self.n = 0
        self._held: dict[str, Tensor] = {}

    @property
    def is_full(self) -> bool:
        """Whether rows should leave."""
        return self.n >= self.capacity

    @property
    def rows(self) -> dict[str, Tensor]:
        """What is in it, [row, d] by place; views."""
        return {name: held[: self.n] for name, held in self._held.items()}

    def add(self, rows: Mapping[str, Tensor]) -> None:
        """Take rows in, as many at every place; more than fit make it larger."""
        (count,) = {len(own) for own in rows.values()}
        stop = self.n + count
        for name, own in rows.items():
            held = self._held.get(name)
            if held is None or len(held) < stop:
                room = own.new_empty(max(self.capacity, stop), own.shape[1])
                if held is not None:
                    room[: self.n] = held[: self.n]
                held = self._held[name] = room
            held[self.n : stop] = own
        self.n = stop

    def draw(self, batch_size: int, *, all_of_it: bool = False) -> Iterator[dict[str, Tensor]]:
        """Batches that leave: half of the rows, or all, the last batch then as small as it comes."""
        if not self.n:
            return
        order = torch.randperm(self.n, generator=self.order)
        least = 0 if all_of_it else self.n // 2
        leaving = self.n if all_of_it else (self.n - least) // batch_size * batch_size
        for picked in order[:leaving].split(batch_size):
            yield {
                name: held.index_select(0, picked.to(held.device))
                for name, held in self._held.items()
            }
        left = order[leaving:].sort().values
        for held in self._held.values():
            held[: len(left)] = held[left.to(held.device)]
        self.n = len(left)
