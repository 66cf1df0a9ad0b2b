"""Items: the samples of a dataset, one by one, as the model reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError

_KINDS = (
    "texts, token ids [n, pos], what a tokenizer returns, a map-style Dataset, a Hugging Face dataset, or "
    "any iterable of texts, ids or mappings with `input_ids` or `text`"
)


@dataclass(frozen=True)
class Item:
    """A sample.

    Attributes:
        ids: Its token ids, without padding.
        start: How many columns of padding stood in front of them.
        width: How many columns there were in all.
        types: Which part of a pair of texts each token belongs to; None where all are of the first.
    """

    ids: NDArray[Any]
    start: int
    width: int
    types: NDArray[Any] | None = None


def items_of(
    dataset: Any, bridge: TransformerBridge, max_length: int | None = None
) -> Iterator[Item]:
    """The samples of a dataset, in its order. Nothing is read ahead.

    Args:
        dataset: Texts; token ids [n, pos]; what a tokenizer returns; a map-style Dataset; a Hugging Face
            dataset, streaming or not; any iterable of texts, ids or mappings.
        bridge: The model; its tokenizer makes ids of texts as `TransformerBridge.to_tokens` does.
        max_length: How many tokens of a sample are read; all of them unless given.
    Raises:
        InputError: Something else.
    """
    for index, given in enumerate(_each(dataset)):
        item = _item(given, index, bridge)
        if max_length is not None and len(item.ids) > max_length:
            types = None if item.types is None else item.types[:max_length]
            item = Item(item.ids[:max_length], item.start, item.width, types)
        yield item


def check_dataset(dataset: Any) -> None:
    """Refuse what is no dataset before anything runs."""
    if isinstance(dataset, torch.utils.data.DataLoader):
        raise InputError("a DataLoader gives batches: give the dataset behind it, and batch_size=")
    indexed = isinstance(dataset, torch.utils.data.Dataset) or (
        isinstance(dataset, Sized) and callable(getattr(dataset, "__getitem__", None))
    )
    if isinstance(dataset, (bytes, int, float)) or not (isinstance(dataset, Iterable) or indexed):
        raise InputError(f"a dataset is {_KINDS}; got {type(dataset).__name__}")
    if isinstance(dataset, Sized) and not len(dataset):
        raise InputError("the dataset is empty")


def size_of(dataset: Any) -> int | None:
    """How many samples there are, where that is known."""
    if isinstance(dataset, str):
        return 1
    if isinstance(dataset, Mapping):
        return len(_column(dataset))
    return len(dataset) if isinstance(dataset, Sized) else None


def _each(dataset: Any) -> Iterator[Any]:
    if isinstance(dataset, str):
        yield dataset
    elif isinstance(dataset, Mapping):
        yield from _rows(dataset)
    elif isinstance(dataset, Tensor):
        if dataset.dim() != 2:
            raise InputError(f"token ids have shape [n, pos], got {list(dataset.shape)}")
        yield from dataset
    elif isinstance(dataset, Iterable):
        yield from dataset
    else:  # a map-style Dataset promises no more than a length and indices
        for index in range(len(dataset)):
            yield dataset[index]


def _column(given: Mapping[str, Any]) -> Any:
    for name in ("input_ids", "text"):
        if given.get(name) is not None:
            return given[name]
    raise InputError(
        f"a mapping has input_ids or text, got one of {', '.join(map(str, given)) or 'nothing'}"
    )


def _rows(table: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rows of what a tokenizer returned."""
    names = [
        name
        for name in ("input_ids", "text", "attention_mask", "token_type_ids")
        if table.get(name) is not None
    ]
    n = len(_column(table))
    if any(len(table[name]) != n for name in names):
        sizes = ", ".join(f"{name} {len(table[name])}" for name in names)
        raise InputError(f"the columns of the input have unequal numbers of rows: {sizes}")
    for index in range(n):
        yield {name: table[name][index] for name in names}


def _item(given: Any, index: int, bridge: TransformerBridge) -> Item:
    beside: Mapping[str, Any] = {}
    if isinstance(given, Mapping):
        given, beside = _column(given), given
    if isinstance(given, str):
        ids = bridge.to_tokens(given, move_to_device=False)[0].numpy()
        return Item(ids, 0, len(ids))
    ids = _whole(given, index, "token ids")
    if not len(ids):
        raise InputError(f"sample {index} has no tokens")
    mask, types = (
        None if beside.get(name) is None else _whole(beside[name], index, name)
        for name in ("attention_mask", "token_type_ids")
    )
    for name, values in (("attention_mask", mask), ("token_type_ids", types)):
        if values is not None and len(values) != len(ids):
            raise InputError(
                f"sample {index} has {len(ids)} token ids but {name} says something of {len(values)}"
            )
    start, stop = _span(mask, index, len(ids))
    types = None if types is None or not types.any() else types[start:stop]
    return Item(ids[start:stop], start, len(ids), types)


def _whole(given: Any, index: int, what: str) -> NDArray[Any]:
    """A row of whole numbers."""
    wrong = f"{what} of sample {index}"
    if isinstance(given, Tensor):
        given = given.detach().cpu().numpy()
    elif not isinstance(given, (np.ndarray, Sequence)):
        raise InputError(f"a dataset gives {_KINDS}; sample {index} is {type(given).__name__}")
    try:
        row = np.asarray(given, dtype=np.int64 if not len(given) else None)
    except ValueError as error:
        raise InputError(f"{wrong} are one row of whole numbers: {error}") from error
    if row.ndim != 1 or (row.dtype.kind not in "iu" and what != "attention_mask"):
        hint = "; give samples, not batches of them" if row.ndim == 2 else ""
        raise InputError(
            f"{wrong} are one row of whole numbers, got {list(row.shape)} {row.dtype}{hint}"
        )
    return row.astype(np.int64)


def _span(mask: NDArray[Any] | None, index: int, width: int) -> tuple[int, int]:
    """Where the tokens stand between padding."""
    if mask is None:
        return 0, width
    real = mask.nonzero()[0]
    if not len(real):
        raise InputError(f"sample {index} is nothing but padding")
    start, stop = int(real[0]), int(real[-1]) + 1
    if stop - start != len(real):
        raise InputError(
            f"the attention_mask of sample {index} leaves out tokens between others; padding stands in front "
            "or behind (to leave rows out, give positions= a mask)"
        )
    return start, stop
