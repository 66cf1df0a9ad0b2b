"""Shuffled rows: a buffer that is filled from places all over the shards, for training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Shaped
from torch import Tensor

from ...hooks import InputError
from ..numbers import whole
from .files import Files

_PIECES = 64
"""How many places a full buffer comes from: more mix better, and read less at a time."""


class ShuffledRows:
    """Batches of rows in random order; each row once an epoch.

    An epoch takes all pieces of all shards in random order, fills a buffer with them, mixes it and gives it
    away. Iterating goes on where it was: ``iter()`` does not begin anew.

    Args:
        files: The shards.
        name: The point.
        sizes: How many rows each shard has.
        batch_size: How many rows a batch has; an epoch's last one has what is left.
        buffer_rows: How many rows are mixed at a time.
        seed: Of the order.
        epochs: How often all rows come.
    """

    def __init__(
        self,
        files: Files,
        name: str,
        sizes: Sequence[int],
        batch_size: int,
        buffer_rows: int,
        seed: int,
        epochs: int,
    ) -> None:
        self._files = files
        self._name = name
        self._sizes = list(sizes)
        self.batch_size = whole("batch_size", batch_size)
        self.buffer_rows = whole("buffer_rows", buffer_rows)
        self.epochs = whole("epochs", epochs)
        self.seed = seed
        self._epoch = self._given = 0
        self._stream: Iterator[Tensor] | None = None

    def __len__(self) -> int:
        """How many batches there are in all."""
        return self.epochs * self._per_epoch

    @property
    def _per_epoch(self) -> int:
        return -(-sum(self._sizes) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Shaped[Tensor, "batch ..."]:
        while self._epoch < self.epochs:
            if self._stream is None:
                self._stream = self._batches(self._epoch, self._given)
            made = next(self._stream, None)
            if made is not None:
                self._given += 1
                return made
            self._stream, self._given = None, 0
            self._epoch += 1
        raise StopIteration

    # --- going on --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, int]:
        """Where it is, for `load_state_dict`."""
        return {"epoch": self._epoch, "batches": self._given, **self._order}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where another one was that was made alike.

        Raises:
            InputError: It was of another order, or this is no such state.
        """
        for what, ours in self._order.items():
            if state.get(what) != ours:
                raise InputError(
                    f"that state has {what} {state.get(what)!r}; this one has {ours!r}"
                )
        epoch, given = state.get("epoch"), state.get("batches")
        if type(epoch) is not int or type(given) is not int or epoch < 0 or given < 0:
            raise InputError(f"no state of shuffled rows: {dict(state)!r:.200}")
        self._epoch, self._given, self._stream = epoch, given, None

    @property
    def _order(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "buffer_rows": self.buffer_rows,
            "rows": sum(self._sizes),
        }

    # --- order -----------------------------------------------------------------------------------

    def _batches(self, epoch: int, skip: int) -> Iterator[Tensor]:
        """The batches of an epoch, without the first ones, whose rows are not read."""
        random = torch.Generator().manual_seed(self.seed)
        # A seed for each epoch, that no other seed's epochs share.
        draws = torch.randint(2**62, (epoch + 1,), generator=random)
        random.manual_seed(int(draws[-1]))
        left = skip * self.batch_size
        rest: Tensor | None = None
        for pieces in self._buffers(random):
            order = torch.randperm(sum(stop - start for _, start, stop in pieces), generator=random)
            if left >= len(order):
                left -= len(order)
                continue
            buffer = torch.cat([self._files.tensor(i, self._name)[a:b] for i, a, b in pieces])
            order, left = order[left:], 0
            # Behind the rows that were left over from the buffer before.
            while len(order) and (rest is not None or len(order) >= self.batch_size):
                need = self.batch_size - (0 if rest is None else len(rest))
                rows, order = buffer[order[:need]], order[need:]
                rest = rows if rest is None else torch.cat([rest, rows])
                if len(rest) == self.batch_size:
                    yield rest
                    rest = None
            if len(order):
                rest = buffer[order]
        if rest is not None:
            yield rest

    def _buffers(self, random: torch.Generator) -> Iterator[list[tuple[int, int, int]]]:
        """Pieces of shards (shard, start, stop) that are mixed together."""
        length = max(1, self.buffer_rows // _PIECES)
        pieces = [
            (shard, start, min(start + length, size))
            for shard, size in enumerate(self._sizes)
            for start in range(0, size, length)
        ]
        together: list[tuple[int, int, int]] = []
        rows = 0
        for at in torch.randperm(len(pieces), generator=random).tolist():
            _, start, stop = pieces[at]
            if rows + stop - start > self.buffer_rows and together:
                yield together
                together, rows = [], 0
            together.append(pieces[at])
            rows += stop - start
        if together:
            yield together
