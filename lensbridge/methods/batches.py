"""Batches: texts that run together, and the rows of them that a split point shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby
from typing import Any

import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from ..hooks import HookPoint, InputError
from .granularity import Aggregation
from .samples import Sample

Groups = list[list[int]]
"""The tokens of each row of a text."""

Activations = Tensor | list[Tensor]
"""Rows of several texts: one after the other in one tensor [row, d], or a list of tensors, one a text."""


class Batch:
    """Texts that run together, padded to the longest.

    Args:
        texts: Which texts they are.
        samples: The texts themselves, as many.
        groups: The tokens of each of their rows.
        how: How the rows of several tokens become one.
        pad_id: What to fill up with.
        in_front: Whether padding stands in front of shorter texts.

    Attributes:
        ids: Token ids, [batch, pos].
        mask: 1 at tokens, 0 at padding, [batch, pos].
        types: Which part of a pair of texts a token is of, [batch, pos]; None where all are of the first.
        firsts: The column of each text's first token.
        counts: The number of rows of each text.
    """

    def __init__(
        self,
        texts: Sequence[int],
        samples: Sequence[Sample],
        groups: Sequence[Groups],
        how: Aggregation,
        *,
        pad_id: int,
        in_front: bool,
    ) -> None:
        self.texts = list(texts)
        self.how = how
        lengths = [len(sample.ids) for sample in samples]
        width = max(lengths)
        self.firsts = [width - n if in_front else 0 for n in lengths]

        def table(rows: list[Sequence[int]], fill: int) -> Tensor:
            return torch.tensor(
                [
                    [*[fill] * first, *row, *[fill] * (width - first - len(row))]
                    for row, first in zip(rows, self.firsts, strict=True)
                ]
            )

        self.ids = table([sample.ids for sample in samples], pad_id)
        self.mask = table([[1] * n for n in lengths], 0)
        self.types: Tensor | None = None
        if any(sample.types for sample in samples):
            self.types = table([s.types or [0] * len(s.ids) for s in samples], 0)
        self.counts = [len(own) for own in groups]
        self._sizes = [len(group) for own in groups for group in own]
        starts = [row * width + first for row, first in enumerate(self.firsts)]
        # Where the tokens of all rows are, one row after the other, in states without their batch dimension.
        self._places = torch.tensor(
            [
                start + token
                for start, own in zip(starts, groups, strict=True)
                for group in own
                for token in group
            ],
            dtype=torch.long,
        )

    def inputs(self) -> dict[str, Tensor]:
        """What the model's forward is told of the batch beside its ids."""
        made = {} if self.types is None else {"token_type_ids": self.types}
        # Without padding the model is called as on bare ids, fast kernels and all.
        return made if bool(self.mask.all()) else {"attention_mask": self.mask, **made}

    def states(self, shown: Tensor, hook: HookPoint) -> Shaped[Tensor, "batch pos d"]:
        """What a point shows, a row for each token; heads, or what else there is of a token, side by side.

        Raises:
            InputError: It shows something else.
        """
        axes = hook.axes.split()
        per_token = axes[:1] == ["..."] or axes[:2] == ["batch", "pos"]
        rows, width = self.ids.shape
        if (
            not per_token
            or shown.dim() < 3
            or shown.shape[1] != width
            or len(shown) not in (1, rows)
        ):
            named = "" if axes[:1] == ["..."] else f" ({', '.join(axes)})"
            raise InputError(
                f"split point {str(hook.name).removeprefix('raw:')!r} shows {list(shown.shape)}{named} of "
                f"{rows} texts of {width} tokens, not [batch, pos, d]: it has no row for each token"
            )
        # One row for all texts: positions, mostly.
        return shown.flatten(2).expand(rows, -1, -1)

    def rows(self, states: Num[Tensor, "batch pos d"]) -> Num[Tensor, "row d"]:
        """The rows of all texts, one text after the other; copies."""
        tokens = states.flatten(0, 1)[self._places.to(states.device)]
        if len(self._places) == len(self._sizes):
            return tokens
        return torch.cat([self.how.aggregate(group) for group in tokens.split(self._sizes)])

    def put_back(
        self, rows: Num[Tensor, "row d"], states: Num[Tensor, "batch pos d"]
    ) -> Num[Tensor, "batch pos d"]:
        """The states with the rows in the places they were taken from."""
        if not self._sizes:
            return states
        values = rows
        if len(self._places) != len(self._sizes):
            each = zip(rows.split(1), self._sizes, strict=True)
            values = torch.cat([self.how.unfold(row, n) for row, n in each])
        places = self._places.to(states.device)
        return states.flatten(0, 1).index_put((places,), values).view(states.shape)


def cut(samples: Sequence[Sample], size: int, *, pads: bool = True) -> list[list[int]]:
    """Which texts run together: texts of like length, the longest first.

    Args:
        samples: The texts.
        size: How many run together.
        pads: False has only texts of one length run together.
    """
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids))
    alike = groupby(order, lambda i: pads or len(samples[i].ids))
    runs = [list(texts) for _, texts in alike]
    return [run[at : at + size] for run in runs for at in range(0, len(run), size)]


class Rows:
    """Rows of texts, kept in the order of the texts, whatever order they come in.

    Args:
        counts: How many rows each text has.
        flatten: Whether to keep them in one tensor instead of a list.
    """

    def __init__(self, counts: list[int], flatten: bool) -> None:
        self.counts = counts
        self.starts = [0, *accumulate(counts)]
        self.flatten = flatten
        self.all: Tensor | None = None
        self.each: list[Any] = [None] * len(counts)

    def put(self, texts: list[int], rows: Tensor) -> None:
        """Keep the rows of some texts, which come one text after the other."""
        if not self.flatten:
            for text, own in zip(texts, rows.split([self.counts[i] for i in texts]), strict=True):
                self.each[text] = own.clone()  # a view would keep the whole batch
            return
        if self.all is None:
            self.all = rows.new_empty(self.starts[-1], rows.shape[1])
        for text, own in zip(texts, rows.split([self.counts[i] for i in texts]), strict=True):
            self.all[self.starts[text] : self.starts[text + 1]] = own

    def result(self) -> Activations:
        """All rows: one tensor [row, d], or one a text."""
        return self.each if self.all is None else self.all
