"""Training several autoencoders on rows that pass by once an epoch, in one pass for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...hooks import InputError
from . import fitting
from .buffer import ShuffleBuffer
from .fitting import Bar, Schedule
from .streaming import Source, Streaming
from .training import Trainer

_BUFFER = "buffer/"


class StreamFit:
    """A fit on a stream.

    Args:
        places: The hook point of each autoencoder.
        make: What makes their trainers, told how many rows an epoch has.
        source: Where rows come from.
        how: Sizes.
        schedule: How often, and what is written on the way.
        identity: What a checkpoint must agree with.
        width: How wide the rows of a place are.
        device: Where the autoencoders, and the buffer, are.
    """

    def __init__(
        self,
        places: Sequence[str],
        make: Callable[[int], list[Trainer]],
        source: Source,
        how: Streaming,
        schedule: Schedule,
        identity: dict[str, Any],
        width: Mapping[str, int],
        device: torch.device,
    ) -> None:
        self.places, self.make, self.source, self.how = places, make, source, how
        self.schedule, self.width, self.device = schedule, width, device
        sizes = fitting.described({**vars(how), "checkpoint_every": None})
        self.identity = {**identity, **sizes, "source": source.signature()}
        self.order = torch.Generator().manual_seed(schedule.seed)
        self.buffer = ShuffleBuffer(how.buffer, self.order)
        self.trainers: list[Trainer] = []
        self.n_rows = 0  # in an epoch; as far as one can tell
        self._next()

    def _next(self) -> None:
        """Begin an epoch."""
        self.draw = int(torch.randint(2**48, (), generator=self.order))
        """What the order of its texts is drawn from."""
        self.pieces = self.seen = self.steps = self.kept = 0
        self._left = self._pieces()

    def run(self) -> list[Trainer]:
        """Train, from the start or a checkpoint to the end.

        Raises:
            InputError: Rows of another width, or with NaN; a source that ends too early, or whose length is
                not known; a checkpoint of another fit; a loss that is not finite.
        """
        schedule = self.schedule
        if self.source.is_one_way and schedule.nb_epochs > 1:
            raise InputError(
                f"an iterator can be gone through once, not nb_epochs={schedule.nb_epochs} times: give a "
                "list, a dataset's column, or an object whose __iter__ begins anew"
            )
        with fitting.training(schedule.seed, self.device):
            if schedule.resumes is not None:
                self._resume(*fitting.opened(schedule.resumes, self.identity))
            else:
                self._begin()
            expected = math.ceil(self.n_rows / schedule.batch_size)
            with Bar(schedule, self.trainers, expected, self.steps) as bar:
                while self.trainers[0].epoch < schedule.nb_epochs:
                    self._epoch(bar)
        return self.trainers

    # --- rows ----------------------------------------------------------------------------------------

    def _pieces(self) -> Iterator[dict[str, Tensor]]:
        """What is left of this epoch, at most as many rows as it may have."""
        pieces = self.source.pieces(torch.Generator().manual_seed(self.draw), self.pieces)
        most = self.how.rows
        while most is None or self.seen < most:
            made = next(pieces, None)
            if made is None:
                return
            left = None if most is None else most - self.seen
            rows = {
                name: fitting.rows_of(own, self.width[name])[:left] for name, own in made.items()
            }
            self.pieces += 1
            self.seen += len(next(iter(rows.values())))
            yield {name: own.to(self.device, torch.float32) for name, own in rows.items()}

    def _fill(self) -> bool:
        """Fill the buffer; whether it is full."""
        while not self.buffer.is_full:
            rows = next(self._left, None)
            if rows is None:
                return False
            self.buffer.add(rows)
        return True

    # --- the loop ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Make the trainers, from the first rows that the buffer holds."""
        is_full = self._fill()
        if not self.buffer.n:
            raise InputError("there is nothing to learn from: no row came")
        found = {name: fitting.spread_of(rows) for name, rows in self.buffer.rows.items()}
        self.n_rows = self._expected(is_full)
        self.trainers = self.make(self.n_rows)
        for place, trainer in zip(self.places, self.trainers, strict=True):
            trainer.begin(*found[place])

    def _expected(self, goes_on: bool) -> int:
        """How many rows an epoch has: counted if all were seen, else by how many the first texts gave."""
        if not goes_on:
            return self.seen
        if self.source.length is None:
            if self.how.rows is None:
                raise InputError(
                    "nobody knows how long this stream is: say how many rows an epoch has, "
                    "stream=Streaming(rows=...)"
                )
            return self.how.rows
        estimate = math.ceil(self.seen * self.source.length / (self.pieces * self.source.size))
        return max(self.seen, min(estimate, self.how.rows or estimate))

    def _epoch(self, bar: Bar) -> None:
        goes_on = True
        while goes_on:
            goes_on = self._fill()
            for batch in self.buffer.draw(self.schedule.batch_size, all_of_it=not goes_on):
                for place, trainer in zip(self.places, self.trainers, strict=True):
                    trainer.train(batch[place])
                self.steps += 1
                bar.step()
            if goes_on:
                self._keep_now_and_then()
        if not self.trainers[0].n_rows:
            raise InputError(
                f"epoch {self.trainers[0].epoch + 1} had no rows: what was given can be gone through once"
            )
        for trainer in self.trainers:
            trainer.end_epoch()
        bar.show()
        self._next()
        self._keep()

    # --- checkpoints ---------------------------------------------------------------------------------

    def _keep_now_and_then(self) -> None:
        every = self.how.checkpoint_every
        if every is not None and self.steps - self.kept >= every:
            self.kept = self.steps
            self._keep()

    def _keep(self) -> None:
        if self.schedule.checkpoint is None:
            return
        held = {f"{_BUFFER}{name}": rows for name, rows in self.buffer.rows.items()}
        fitting.keep(
            self.trainers,
            self.order,
            self.schedule.checkpoint,
            self.identity,
            tensors=held,
            draw=self.draw,
            at=[self.pieces, self.seen, self.steps],
            n_rows=self.n_rows,
        )

    def _resume(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.n_rows = facts["n_rows"]
        self.trainers = self.make(self.n_rows)
        fitting.resume(self.trainers, self.order, tensors, facts)
        self.draw = facts["draw"]
        self.pieces, self.seen, self.steps = facts["at"]
        self.kept = self.steps
        held = {n.removeprefix(_BUFFER): x for n, x in tensors.items() if n.startswith(_BUFFER)}
        if held:
            self.buffer.add({name: x.to(self.device) for name, x in held.items()})
        self._left = self._pieces()
