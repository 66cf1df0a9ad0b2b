"""Where rows come from that are not all there at once: texts through the model, or any iterable of rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError
from ..granularity import Aggregation, Granularity
from ..split_points import ModelWithSplitPoints

_RUN = 16
"""Batches of texts that are sorted by length together, so that little of them is padding."""
_SIGNED = 64
"""Texts that a checkpoint knows the others by."""


@dataclass(frozen=True)
class Streaming:
    """How rows that are not all there at once come to a fit.

    Attributes:
        buffer: Rows that are mixed with each other; what a fit keeps of them at a time.
        texts_per_batch: How many texts run through the model together.
        granularity: What a row stands for.
        aggregation: How the rows of several tokens become one.
        rows: How many rows an epoch has at most. Needed where nobody knows how many there are.
        checkpoint_every: Keep the state after so many batches, too, and not after each epoch alone; it holds
            the buffer then.
    """

    buffer: int = 131_072
    texts_per_batch: int = 16
    granularity: Granularity = Granularity.TOKEN
    aggregation: Aggregation = Aggregation.MEAN
    rows: int | None = None
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("buffer", "texts_per_batch", "rows", "checkpoint_every"):
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (is_whole and value >= 1):
                raise InputError(f"{name} is at least 1, got {value!r}")


class Source:
    """Rows in pieces, as often as wanted.

    Args:
        given: What they are made of: a sequence, or an iterable.
        read: What makes rows of some of it.
        size: How much of it at a time.
    Attributes:
        length: How much there is of what was given; None where nobody knows.
        is_one_way: Whether it can be gone through once only.
    """

    def __init__(
        self,
        given: Any,
        read: Callable[[list[Any]], Mapping[str, Tensor]],
        size: int,
    ) -> None:
        self.given, self.read, self.size = given, read, size
        self.is_sequence = hasattr(given, "__len__") and hasattr(given, "__getitem__")
        self.length = len(given) if self.is_sequence else None
        self.is_one_way = not self.is_sequence and iter(given) is given

    def pieces(self, order: torch.Generator, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        """Rows, piece by piece: a sequence in an order drawn anew, anything else as it comes.

        Args:
            order: Where the order is drawn from.
            start: How many pieces to leave out.
        """
        for items in self._items(order, start):
            yield self.read(items)

    def _items(self, order: torch.Generator, start: int) -> Iterator[list[Any]]:
        if self.length is not None:
            drawn = torch.randperm(self.length, generator=order)[start * self.size :]
            for at in range(0, len(drawn), self.size):
                yield [self.given[i] for i in drawn[at : at + self.size].tolist()]
            return
        items = islice(self.given, start * self.size, None)
        while piece := list(islice(items, self.size)):
            yield piece

    def signature(self) -> list[int] | None:
        """What tells one sequence of texts from another: their number, and a checksum of the first."""
        if self.length is None:
            return None
        first = [self.given[i] for i in range(min(_SIGNED, self.length))]
        if not all(isinstance(item, str) for item in first):
            return [self.length]
        return [self.length, zlib.crc32("\0".join(first).encode())]


def source_of(
    given: Any, bridge: TransformerBridge, tokenizer: Any, names: Sequence[str], how: Streaming
) -> Source:
    """What rows come from.

    Args:
        given: Texts, or rows: a tensor [n, d], or one by hook point, at a time.
        bridge: The model that reads texts.
        tokenizer: What they are read with.
        names: The hook points, each once.
        how: Sizes.
    Raises:
        InputError: Something else, or nothing.
    """
    if isinstance(given, (str, Tensor, Mapping)):
        given = [given]
    if not isinstance(given, Iterable):
        raise InputError(
            f"fit takes activations [n, d], texts, or an iterable of either; got {type(given).__name__}"
        )
    first, given = _first(given)
    if isinstance(first, str):
        split = ModelWithSplitPoints(bridge, tokenizer, list(names), batch_size=how.texts_per_batch)
        read = lambda texts: _read_texts(split, names, texts, how)  # noqa: E731
        return Source(given, read, _RUN * how.texts_per_batch)
    if isinstance(first, (Tensor, Mapping)):
        return Source(given, lambda items: _read_rows(bridge, names, items[0]), 1)
    raise InputError(
        "fit takes activations [n, d], texts, or an iterable of either; got an iterable of "
        f"{type(first).__name__} (of a dataset, give its column of texts)"
    )


def _first(given: Any) -> tuple[Any, Any]:
    """The first of an iterable, and the whole of it."""
    items = iter(given)
    for first in items:
        # What was taken from an iterator is put back in front.
        return first, chain([first], items) if items is given else given
    raise InputError("there is nothing to learn from: no activations, and no texts")


def _read_texts(
    split: ModelWithSplitPoints, names: Sequence[str], texts: list[Any], how: Streaming
) -> Mapping[str, Tensor]:
    made: Any
    made, _ = split.get_activations(texts, how.granularity, how.aggregation, device=None)
    return made if isinstance(made, dict) else {names[0]: made}


def _read_rows(bridge: TransformerBridge, names: Sequence[str], item: Any) -> Mapping[str, Tensor]:
    made = {names[0]: item} if isinstance(item, Tensor) and len(names) == 1 else item
    if not isinstance(made, Mapping):
        raise InputError(
            f"rows for {len(names)} places come as a mapping of hook points to tensors, got "
            f"{type(item).__name__}"
        )
    # What else a store has of a text (its tokens) is no point.
    known = {key: rows for key, rows in made.items() if key in bridge.registry}
    made = {str(bridge.registry[key].name): rows.flatten(1) for key, rows in known.items()}
    missing = [name for name in names if name not in made]
    if missing:
        raise InputError(
            f"there are no rows for {', '.join(missing)}, only for {', '.join(map(str, item))}"
        )
    sizes = {name: len(made[name]) for name in names}
    if len(set(sizes.values())) > 1:
        raise InputError(f"rows of several places belong together, and here are {sizes}")
    return {name: made[name] for name in names}
