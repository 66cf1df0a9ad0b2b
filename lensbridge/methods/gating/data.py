"""What gates are fitted to: rows of tokens, some of which are to be predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset

from ...hooks import InputError
from ..spans import Reader
from .from_text import FromText
from .row_checks import (
    as_labels,
    as_rows,
    check_beside,
    check_edges,
    check_ids,
    check_loss,
    low_to_high,
    real_part,
)
from .text_rows import Row

Rows = Iterable[int] | Int[Tensor, " row"]
"""Which rows."""


@dataclass
class CHGBatch:
    """Rows of one length.

    Attributes:
        input_ids: Token ids.
        attention_mask: 1 at real tokens.
        loss_mask: Where the token that stands there is to be predicted. In a causal model the position before
            it predicts it: nothing is shifted here.
        targets: What is to be predicted there; elsewhere what stands there.
        foils: What should not be predicted there, or the wrong label of each row.
        labels: The class of each row.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    loss_mask: Bool[Tensor, "batch pos"]
    targets: Int[Tensor, "batch pos"]
    foils: Int[Tensor, "batch ..."] | None = None
    labels: Int[Tensor, " batch"] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def _each(self, change: Callable[[Tensor], Tensor]) -> CHGBatch:
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        made: dict[str, Any] = {n: None if x is None else change(x) for n, x in held.items()}
        return CHGBatch(**made)

    def to(self, device: torch.device | str) -> CHGBatch:
        """The same rows elsewhere."""
        return self._each(lambda x: x.to(device))

    def repeat(self, times: int) -> CHGBatch:
        """Each row so many times, one behind the other.

        Raises:
            InputError: Less than once.
        """
        if times < 1:
            raise InputError(f"rows are repeated at least once, got {times}")
        return self._each(lambda x: x.repeat_interleave(times, 0))


class CHGDataset(FromText, Dataset[dict[str, Tensor]]):
    """Rows of tokens of which some are to be predicted; or, for classifiers, rows with a label.

    Rows keep their own length and are padded when they are put into a batch; what is padding is known by
    length, so the padding token may occur inside rows.

    Args:
        input_ids: Token ids of each row, [pos].
        loss_masks: Which tokens of each row are to be predicted, [pos]; not needed with labels.
        targets: What is to be predicted there, [pos]; what stands there unless given.
        foils: What should not be predicted there, [pos] each; with labels, one wrong label a row.
        labels: The class of each row.
        causal: Whether a token is predicted by the one before it: then the first cannot be predicted.
        pad_token_id: What to fill batches up with; any id will do for most models.
    Raises:
        InputError: No rows, rows without anything to predict, or shapes, types and ids that cannot be.

    Example::

        data = CHGDataset.from_texts(["The capital of France is"], [" Paris"], tokenizer)
        data.batch([0]).loss_mask
    """

    def __init__(
        self,
        input_ids: Any,
        loss_masks: Any = None,
        *,
        targets: Any = None,
        foils: Any = None,
        labels: Any = None,
        causal: bool = True,
        pad_token_id: int = 0,
    ) -> None:
        self.input_ids = as_rows(input_ids, "input_ids")
        if not self.input_ids:
            raise InputError("a dataset has at least one row; input_ids is empty")
        self.causal = causal
        self.pad_token_id = pad_token_id
        self.labels = None if labels is None else as_labels(labels, len(self), "labels")
        if loss_masks is None:
            if labels is None:
                raise InputError("give loss_masks (which tokens are to be predicted), or labels")
            loss_masks = [torch.zeros_like(ids, dtype=torch.bool) for ids in self.input_ids]
        self.loss_masks = as_rows(loss_masks, "loss_masks")
        self.targets = None if targets is None else as_rows(targets, "targets")
        is_label = foils is not None and labels is not None
        self.foils: list[Tensor] | None = (
            None if foils is None or is_label else as_rows(foils, "foils")
        )
        self.foil_labels = as_labels(foils, len(self), "foils") if is_label else None
        self._check()

    def _check(self) -> None:
        named = {"targets": self.targets, "foils": self.foils}
        check_beside(self.input_ids, {"loss_masks": self.loss_masks, **named})
        if not isinstance(self.pad_token_id, int) or self.pad_token_id < 0:
            raise InputError(f"pad_token_id is an id from 0, got {self.pad_token_id!r}")
        for index, ids in enumerate(self.input_ids):
            if not len(ids):
                raise InputError(f"row {index} has no tokens")
            check_ids(index, ids, "input_ids")
            for name, rows in named.items():
                if rows is not None:
                    check_ids(index, rows[index], name)
            check_loss(index, self.loss_masks[index], self.labels is not None, self.causal)

    # --- rows ------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row: ``input_ids``, ``loss_mask``, ``targets``, [pos]; ``foils``, ``labels`` if there are."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of a dataset of {len(self)} rows")
        ids = self.input_ids[index]
        row = {"input_ids": ids, "loss_mask": self.loss_masks[index].bool()}
        row["targets"] = ids if self.targets is None else self.targets[index]
        foils = self.foils if self.foil_labels is None else self.foil_labels
        if foils is not None:
            row["foils"] = foils[index]
        if self.labels is not None:
            row["labels"] = self.labels[index]
        return row

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        lengths = [len(ids) for ids in self.input_ids]
        parts = [f"{len(self)} rows of {low_to_high(lengths)} tokens"]
        counts = [int(loss.sum()) for loss in self.loss_masks]
        if max(counts):
            parts.append(f"{low_to_high(counts)} to predict")
        if self.labels is not None:
            parts.append("with labels")
        if self.foils is not None or self.foil_labels is not None:
            parts.append("with foils")
        return f"CHGDataset({', '.join(parts)})"

    def subset(self, indices: Rows) -> CHGDataset:
        """Some of the rows, in the order given.

        Raises:
            InputError: None, or a row that is not there.
        """
        chosen = self._chosen(indices)

        def of(rows: Any) -> Any:
            return None if rows is None else [rows[index] for index in chosen]

        return CHGDataset(
            of(self.input_ids),
            of(self.loss_masks),
            targets=of(self.targets),
            foils=of(self.foils if self.foil_labels is None else self.foil_labels),
            labels=of(self.labels),
            causal=self.causal,
            pad_token_id=self.pad_token_id,
        )

    def split(self, fraction: float, seed: int = 0) -> tuple[CHGDataset, CHGDataset]:
        """Two datasets of rows drawn at random, which have no row in common.

        Args:
            fraction: What part of the rows goes into the first.
            seed: Of the draw; the global generator is left alone.
        Raises:
            InputError: A fraction that leaves one of the two empty.
        """
        count = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < count < len(self):
            raise InputError(
                f"a split leaves at least one row to either side; a fraction of {fraction} of {len(self)} "
                "rows does not"
            )
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        return self.subset(sorted(order[:count])), self.subset(sorted(order[count:]))

    def _chosen(self, indices: Rows) -> list[int]:
        chosen = [int(index) for index in indices]
        if not chosen:
            raise InputError("no rows were chosen; give at least one index")
        outside = [index for index in chosen if not -len(self) <= index < len(self)]
        if outside:
            raise InputError(
                f"row {outside[0]} is not one of the {len(self)} (0 to {len(self) - 1})"
            )
        return chosen

    # --- batches ---------------------------------------------------------------------------------

    def batch(self, indices: Rows, padding_side: str = "right") -> CHGBatch:
        """Rows padded to the longest of them.

        Args:
            indices: Which rows.
            padding_side: ``"right"`` or ``"left"``.
        Raises:
            InputError: No rows, a row that is not there, or another side.
        """
        return self.collate([self[index] for index in self._chosen(indices)], padding_side)

    def collate(
        self, rows: Sequence[Mapping[str, Tensor]], padding_side: str = "right"
    ) -> CHGBatch:
        """Rows as the dataset gives them, padded to the longest: a ``collate_fn`` for torch's ``DataLoader``.

        Args:
            rows: Some rows.
            padding_side: ``"right"`` or ``"left"``.
        Raises:
            InputError: Another side.
        """
        if padding_side not in ("right", "left"):
            raise InputError(f"padding_side must be 'right' or 'left', got {padding_side!r}")
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[Tensor], fill: int, dtype: torch.dtype) -> Tensor:
            made = torch.full((len(values), width), fill, dtype=dtype, device=values[0].device)
            for out, value in zip(made, values, strict=True):
                at = slice(0, len(value)) if padding_side == "right" else slice(-len(value), None)
                out[at] = value
            return made

        def column(name: str) -> list[Tensor]:
            return [row[name] for row in rows]

        ids = column("input_ids")
        foils = None
        if "foils" in rows[0]:
            wrong = column("foils")
            is_label = wrong[0].dim() == 0
            foils = torch.stack(wrong) if is_label else padded(wrong, self.pad_token_id, torch.long)
        return CHGBatch(
            input_ids=padded(ids, self.pad_token_id, torch.long),
            attention_mask=padded([torch.ones_like(row) for row in ids], 0, torch.long),
            loss_mask=padded(column("loss_mask"), 0, torch.bool),
            targets=padded(column("targets"), self.pad_token_id, torch.long),
            foils=foils,
            labels=torch.stack(column("labels")) if "labels" in rows[0] else None,
        )

    # --- from tokens -----------------------------------------------------------------------------

    @classmethod
    def from_tokens(
        cls,
        input_ids: Any,
        loss_masks: Any = None,
        *,
        pad_token_id: int | None = None,
        targets: Any = None,
        foils: Any = None,
        labels: Any = None,
        attention_mask: Any = None,
        causal: bool = True,
    ) -> CHGDataset:
        """Rows of token ids.

        Args:
            input_ids: One tensor a row, [pos], of any length; or [row, pos].
            loss_masks: True at the tokens that are to be predicted, of the same shape.
            pad_token_id: What to pad batches with. Ids are never taken for padding by their value.
            targets: What is to be predicted there; what stands there unless given.
            foils: What should not be predicted there; with labels, one wrong label a row.
            labels: The class of each row, for classifiers.
            attention_mask: 1 at real tokens of rows that are padded already; the padding is cut off.
            causal: As in the class.
        Raises:
            InputError: As in the class; a mask with holes; or rows of one tensor that begin or end with the
                padding token, without a mask that says what it is there.
        """
        given = {"loss_masks": loss_masks, "targets": targets}
        given["foils"] = foils if labels is None else None
        tensors = {k: None if v is None else as_rows(v, k) for k, v in given.items()}
        rows = as_rows(input_ids, "input_ids")
        if attention_mask is not None:
            masks = as_rows(attention_mask, "attention_mask")
            check_beside(rows, {"attention_mask": masks, **tensors})
            real = [real_part(index, mask) for index, mask in enumerate(masks)]
            rows = [row[at] for row, at in zip(rows, real, strict=True)]
            tensors = {
                name: None if own is None else [x[at] for x, at in zip(own, real, strict=True)]
                for name, own in tensors.items()
            }
        elif pad_token_id is not None and isinstance(input_ids, Tensor):
            check_edges(rows, pad_token_id)
        foils = foils if labels is not None else tensors["foils"]
        return cls(
            rows,
            tensors["loss_masks"],
            targets=tensors["targets"],
            foils=foils,
            labels=labels,
            causal=causal,
            pad_token_id=0 if pad_token_id is None else pad_token_id,
        )

    @classmethod
    def _of(
        cls, rows: list[Row], reader: Reader, *, causal: bool = True, **labels: Any
    ) -> CHGDataset:
        def of(name: str) -> list[Tensor] | None:
            held = [getattr(row, name) for row in rows]
            return None if held[0] is None else [torch.tensor(x) for x in held]

        made: dict[str, Any] = {"targets": of("targets"), "foils": of("foils"), **labels}
        return cls(of("ids"), of("loss"), **made, causal=causal, pad_token_id=reader.pad_id)
