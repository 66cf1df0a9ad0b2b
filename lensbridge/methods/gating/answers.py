"""Running rows under many masks at once, and reading off only what counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ...bridge import TransformerBridge
from ...hooks import InputError, LensError
from .data import CHGBatch


@dataclass
class Answers:
    """What a model says at the places that count.

    Attributes:
        logits: One line a place, in float32 or wider, [n, d_vocab].
        rows: Which row each place is of.
        positions: Where in its row the token is that should be said; 0 for a class.
        targets: What should be said there.
        n_rows: How many rows were run.
        foils: What should not be said there.
        full: Logits of the whole model at the same places.
    """

    logits: Float[Tensor, "n d_vocab"]
    rows: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    targets: Int[Tensor, " n"]
    n_rows: int
    foils: Int[Tensor, " n"] | None = None
    full: Float[Tensor, "n d_vocab"] | None = None

    def log_probs(self) -> Float[Tensor, " n"]:
        """Log-probabilities of the targets, in nats."""
        return -F.cross_entropy(self.logits, self.targets, reduction="none")

    def is_right(self) -> Bool[Tensor, " n"]:
        """Whether the target is the likeliest."""
        return self.logits.argmax(-1) == self.targets

    def per_row(self, values: Float[Tensor, " n"], agg: str = "mean") -> Float[Tensor, " row"]:
        """Values summed or averaged over the places of each row."""
        total = values.new_zeros(self.n_rows).index_add(0, self.rows, values)
        if agg == "sum":
            return total
        ones = torch.ones_like(values)
        return total / ones.new_zeros(self.n_rows).index_add(0, self.rows, ones).clamp(min=1)


class Runner:
    """Runs a bridge from its first gated layer on, and its head only where an answer is wanted."""

    def __init__(self, bridge: TransformerBridge, first: int) -> None:
        self.bridge = bridge
        self.first = first
        self.n_layers = len(bridge.architecture.blocks)
        model: Any = bridge.original_model
        can_generate: Callable[[], bool] = getattr(model, "can_generate", bool)
        self.is_causal = bool(can_generate())
        # Whether the model can be cut there: found out once, against an uncut run.
        self._ends: bool | None = None
        self._enters: bool | None = False if first == 0 else None

    # --- keywords --------------------------------------------------------------------------------

    def kwargs(self, given: dict[str, Any]) -> dict[str, Any]:
        """Keywords of a run; position ids follow padding in front."""
        if self.bridge.architecture.main.prefix == "decoder_":
            raise InputError(
                f"{type(self.bridge.original_model).__name__} has an encoder and a decoder: a row of "
                "tokens is "
                "not enough to run it; run it yourself inside `with chg.gated(masks):`"
            )
        ids, mask = given["input_ids"], given["attention_mask"]
        device = self.bridge.device
        # Most batches of a task are of one length, and a run without a mask is the faster one.
        mask = None if mask is None or bool(mask.all()) else mask.to(device)
        return self.bridge.prepare(ids.to(device), attention_mask=mask).kwargs

    @staticmethod
    def repeated(kwargs: dict[str, Any], times: int) -> dict[str, Any]:
        """Every row several times, one behind the other."""
        if times == 1:
            return kwargs
        # Position ids of more dimensions have those in front of the rows.
        return {
            name: x.repeat_interleave(times, max(x.dim() - 2, 0) if name == "position_ids" else 0)
            if isinstance(x, Tensor) and x.dim() > 1
            else x
            for name, x in kwargs.items()
        }

    # --- runs ------------------------------------------------------------------------------------

    def whole(self, kwargs: dict[str, Any]) -> Tensor:
        """An uncut run; its logits."""
        return self.bridge(**kwargs)

    def answers(
        self,
        batch: CHGBatch,
        times: int,
        gating: Callable[[int], AbstractContextManager[Any]],
        full: Tensor | None = None,
    ) -> Answers:
        """Run a batch, each row ``times`` times.

        Args:
            batch: The rows.
            times: Under how many masks each runs.
            gating: Given how many rows of the batch a run has: the context that gates it.
            full: For `Answers.full`, one line a place of the batch.
        """
        run = self.kwargs({"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
        count = len(batch)
        if batch.labels is not None:
            with gating(count):
                logits = self._entered(run, times, self.whole)
            rows, targets, foils = torch.arange(count), batch.labels, batch.foils
            positions = torch.zeros_like(rows)
            self._check_classes(logits)
            # Rows come in the order of the batch, each as often as there are masks.
            at = None
        else:
            rows, positions = batch.loss_mask.nonzero().unbind(-1)
            targets = batch.targets[rows, positions]
            foils = None if batch.foils is None else batch.foils[rows, positions]
            at = _spread(rows, times), (self._speaks(rows, positions)).repeat_interleave(times)
            with gating(count):
                if self._cuts(run, at, times):
                    logits = self._head(_pick(self._entered(run, times, self._stream), at))
                else:
                    logits = _pick(self._entered(run, times, self.whole), at)
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

        def each(x: Tensor) -> Tensor:
            return x.to(wide.device).repeat_interleave(times, 0)

        return Answers(
            wide,
            _spread(rows, times).to(wide.device),
            each(positions),
            each(targets),
            count * times,
            None if foils is None else each(foils),
            None if full is None else each(full),
        )

    def _speaks(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where the model speaks of tokens: one earlier, if it predicts what follows."""
        if not self.is_causal:
            return positions
        first = rows[positions == 0]
        if len(first):
            raise InputError(
                f"row {int(first[0])}: the first token counts, and nothing predicts it; give the row a "
                "BOS token "
                "in front"
            )
        return positions - 1

    def _check_classes(self, logits: Tensor) -> None:
        if logits.dim() != 2:
            raise InputError(
                f"labels are for a classifier, which gives [batch, class]; "
                f"{type(self.bridge.original_model).__name__} gives {list(logits.shape)}"
            )

    # --- cutting ---------------------------------------------------------------------------------

    def _stream(self, kwargs: dict[str, Any], **more: Any) -> Tensor:
        return self.bridge(**kwargs, **more, stop_at_layer=self.n_layers)

    def _head(self, stream: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_vocab"]:
        """What the model's own end makes of a residual stream: each place is a row of one token."""
        return self.bridge(stream[:, None], start_at_layer=self.n_layers)[:, 0]

    def _entered(self, kwargs: dict[str, Any], times: int, go: Callable[..., Tensor]) -> Tensor:
        """A run of repeated rows, from the first gated layer on where that can be."""
        is_late = self._enters and times > 1
        return go(self._late(kwargs, times) if is_late else self.repeated(kwargs, times))

    @torch.no_grad()
    def _late(self, kwargs: dict[str, Any], times: int) -> dict[str, Any]:
        """Keywords that enter the first gated layer; those in front of it run here, once a row."""
        before = self.bridge(**kwargs, stop_at_layer=self.first)
        given = self.repeated(kwargs, times)
        given = {name: x for name, x in given.items() if name != "input_ids"}
        entering = before.repeat_interleave(times, 0)
        return {"input": entering, **given, "start_at_layer": self.first}

    @torch.no_grad()
    def _cuts(self, kwargs: dict[str, Any], at: tuple[Tensor, Tensor], times: int) -> bool:
        """Whether the model's end can be run by itself, and its layers be entered late: tried once."""
        if self._ends is not None:
            return self._ends
        with self.bridge.registry.silenced():
            expected = self.whole(kwargs)
            if self._enters is None:
                self._enters = self._agrees(expected, lambda: self.whole(self._late(kwargs, 1)))
            rows, positions = at[0][::times] // times, at[1][::times]
            picked = _pick(expected, (rows, positions))
            self._ends = self._agrees(
                picked, lambda: self._head(_pick(self._stream(kwargs), (rows, positions)))
            )
        return self._ends

    @staticmethod
    def _agrees(expected: Tensor, found: Callable[[], Tensor]) -> bool:
        try:
            value = found()
        except (LensError, RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return False  # this model needs more than its stream there; it is run whole
        if value.shape != expected.shape:
            return False
        size = expected.float().abs().amax().clamp(min=1)
        tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
        return bool(((value - expected).float().abs().amax() / size) < tolerance)


def _spread(rows: Int[Tensor, " n"], times: int) -> Int[Tensor, " n_times"]:
    """Rows of a batch that is repeated: row b under mask m is row b * times + m."""
    return (rows[:, None] * times + torch.arange(times)).flatten()


def _pick(value: Float[Tensor, "row pos d"], at: tuple[Tensor, Tensor]) -> Float[Tensor, "n d"]:
    rows, positions = at
    return value[rows.to(value.device), positions.to(value.device)]
