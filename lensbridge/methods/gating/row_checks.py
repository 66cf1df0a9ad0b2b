"""What rows of a dataset must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...hooks import InputError
from .text_rows import same_number


def as_rows(given: Any, name: str) -> list[Tensor]:
    """One tensor a row, as given; lists become tensors."""
    what = f"{name} is a list of rows, [pos] each, or one tensor [row, pos]"
    if isinstance(given, Tensor) and given.dim() != 2:
        raise InputError(f"{what}; got {list(given.shape)}")
    if not isinstance(given, (Tensor, Sequence)) or isinstance(given, (str, bytes)):
        raise InputError(f"{what}; got {type(given).__name__}")
    rows = []
    for index, row in enumerate(given):
        try:
            rows.append(row if isinstance(row, Tensor) else torch.tensor(row))
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{what}; row {index} is {row!r}") from error
        if rows[-1].dim() != 1:
            raise InputError(f"{what}; row {index} is {list(rows[-1].shape)}")
    return rows


def as_labels(given: Any, count: int, name: str) -> Int[Tensor, " row"]:
    """One class a row."""
    values = given.tolist() if isinstance(given, Tensor) else given
    values = [x.item() if isinstance(x, Tensor) else x for x in values]
    same_number(range(count), values, ("rows", name))
    for index, value in enumerate(values):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"row {index} of {name} is a class, a number from 0; got {value!r}")
    return torch.tensor(values)


def check_beside(rows: list[Tensor], named: Mapping[str, list[Tensor] | None]) -> None:
    """Refuse what does not go with rows of ids, row by row and token by token."""
    for name, beside in named.items():
        if beside is None:
            continue
        same_number(rows, beside, ("rows of input_ids", f"rows of {name}"))
        for index, (ids, own) in enumerate(zip(rows, beside, strict=True)):
            if own.shape != ids.shape:
                raise InputError(
                    f"row {index} of {name} is {list(own.shape)} and of input_ids {list(ids.shape)}; they go "
                    "together token by token"
                )


def check_ids(index: int, ids: Tensor, name: str) -> None:
    """Refuse what is no token id."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"row {index} of {name} holds {ids.dtype}; token ids are whole numbers")
    if int(ids.min()) < 0:
        raise InputError(
            f"row {index} of {name} holds {int(ids.min())}; token ids are numbers from 0 (loss_masks say "
            "what does not count, attention_mask says what is padding)"
        )


def check_loss(index: int, loss: Tensor, has_label: bool, causal: bool) -> None:
    """Refuse a row with nothing to predict, or with what nothing predicts."""
    if loss.dtype != torch.bool and bool(((loss != 0) & (loss != 1)).any()):
        raise InputError(f"row {index} of loss_masks holds other values than True and False")
    if not bool(loss.any()):
        if has_label:
            return
        raise InputError(
            f"row {index} has no loss token: its mask is False everywhere (was its target cut off?)"
        )
    if causal and bool(loss[0]):
        raise InputError(
            f"row {index}: its first token is to be predicted, and nothing stands before it to predict it "
            "from; give it a prompt, or a BOS token in front (prepend_bos=True)"
        )


def real_part(index: int, mask: Tensor) -> slice:
    """Where a padded row has its own tokens."""
    places = mask.nonzero().flatten()
    if not len(places):
        raise InputError(f"row {index} has no tokens: its attention mask is 0 everywhere")
    start, end = int(places[0]), int(places[-1]) + 1
    if end - start != len(places):
        raise InputError(
            f"row {index}: its attention mask has a hole; padding stands in front of a row or behind it"
        )
    return slice(start, end)


def check_edges(rows: list[Tensor], pad: int) -> None:
    """Refuse to guess whether a padding token at the edge of a row is padding."""
    for index, row in enumerate(rows):
        if len(row) and pad in (int(row[0]), int(row[-1])):
            raise InputError(
                f"row {index} begins or ends with the padding token {pad}, which may be padding or not: pass "
                "attention_mask= with 0 at padding (torch.ones_like(input_ids) if there is none), or a list "
                "of rows of their own lengths"
            )


def low_to_high(numbers: list[int]) -> str:
    """``3`` or ``3 to 5``."""
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"
