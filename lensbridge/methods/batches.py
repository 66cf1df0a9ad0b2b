"""Batches: texts that run together, and the rows of them that a split point shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Num, Shaped
from torch import Tensor

from ..hooks import HookPoint, InputError
from .granularity import Aggregation, Groups
from .samples import Sample

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
        # In NumPy, whose small arrays cost a fraction of PyTorch's: next to a small model it shows.
        lengths = np.array([len(sample.ids) for sample in samples])
        width = int(lengths.max())
        firsts = width - lengths if in_front else np.zeros_like(lengths)
        columns = np.arange(width) - firsts[:, None]
        is_token = (columns >= 0) & (columns < lengths[:, None])

        def table(rows: Iterable[Sequence[int]], fill: int) -> Tensor:
            made = np.full(is_token.shape, fill, dtype=np.int64)
            made[is_token] = list(chain.from_iterable(rows))
            return torch.from_numpy(made)

        self.ids = table((sample.ids for sample in samples), pad_id)
        self.mask = torch.from_numpy(is_token.astype(np.int64))
        self.types: Tensor | None = None
        if any(sample.types for sample in samples):
            self.types = table((s.types or [0] * len(s.ids) for s in samples), 0)
        self.firsts = firsts.tolist()
        self.counts = [len(own.sizes) for own in groups]
        sizes = [*chain.from_iterable(own.sizes for own in groups)]
        self._sizes = torch.tensor(sizes, dtype=torch.long)
        # Where the tokens of all rows are, one row after the other, in states without their batch dimension.
        tokens = np.array([*chain.from_iterable(own.tokens for own in groups)], dtype=np.int64)
        self._is_single = len(tokens) == len(sizes)
        starts = firsts + width * np.arange(len(samples))
        self._places = torch.from_numpy(tokens + starts.repeat([len(own.tokens) for own in groups]))

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
                f"{rows} x {width} tokens, not [batch, pos, d]: it has no row for each token"
            )
        # One row for all texts: positions, mostly.
        return shown.flatten(2).expand(rows, -1, -1)

    def rows(self, states: Num[Tensor, "batch pos d"]) -> Num[Tensor, "row d"]:
        """The rows of all texts, one text after the other; copies."""
        tokens = states.flatten(0, 1)[self._places.to(states.device)]
        if self._is_single:
            return tokens
        made = tokens.new_empty(len(self._sizes), tokens.shape[1])
        ends = self._sizes.cumsum(0)
        for n in self._sizes.unique().tolist():
            # All rows of one size at once: words are few sizes, and a batch has thousands of them.
            which = (self._sizes == n).nonzero()[:, 0]
            own = (ends[which] - n)[:, None] + torch.arange(n)
            made[which.to(made.device)] = self.how.aggregate(tokens[own.to(tokens.device)])
        return made

    def put_back(
        self, rows: Num[Tensor, "row d"], states: Num[Tensor, "batch pos d"]
    ) -> Num[Tensor, "batch pos d"]:
        """The states with the rows in the places they were taken from."""
        values = rows if self._is_single else self.how.unfold(rows, self._sizes.to(rows.device))
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
        self.counts = np.array(counts)
        self.starts = self.counts.cumsum() - self.counts
        self.flatten = flatten
        self.all: Tensor | None = None
        self.each: list[Any] = [None] * len(counts)

    def put(self, texts: list[int], rows: Num[Tensor, "row d"]) -> None:
        """Keep the rows of some texts, which come one text after the other."""
        counts = self.counts[texts]
        if not self.flatten:
            for text, own in zip(texts, rows.split(counts.tolist()), strict=True):
                self.each[text] = own.clone()  # a view would keep the whole batch
            return
        if self.all is None:
            self.all = rows.new_empty(int(self.counts.sum()), rows.shape[1])
        # From where the rows of a text came to where they go.
        moves = self.starts[texts] - (counts.cumsum() - counts)
        places = np.arange(len(rows)) + moves.repeat(counts)
        self.all[torch.from_numpy(places).to(rows.device)] = rows

    def result(self) -> Activations:
        """All rows: one tensor [row, d], or one a text."""
        return self.each if self.all is None else self.all
