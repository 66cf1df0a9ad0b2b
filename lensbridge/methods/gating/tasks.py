"""What one update is fitted to: batches drawn in a reproducible order, and a loss for each mask."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from ...hooks import InputError
from .chg import CHG
from .data import CHGBatch, CHGDataset
from .objectives import Objective


class Order:
    """Batches of a dataset, each row once an epoch, in an order that only its seed decides."""

    def __init__(self, dataset: CHGDataset, batch_size: int, seed: int) -> None:
        self.dataset = dataset
        self.batch_size = min(batch_size, len(dataset))
        self.generator = torch.Generator().manual_seed(seed)
        self.left = torch.zeros(0, dtype=torch.long)

    def next(self) -> CHGBatch:
        """The next batch; what an epoch has left over goes in front of the next one."""
        if len(self.left) < self.batch_size:
            drawn = torch.randperm(len(self.dataset), generator=self.generator)
            self.left = torch.cat([self.left, drawn])
        taken, self.left = self.left[: self.batch_size], self.left[self.batch_size :]
        return self.dataset.batch(taken.tolist())

    def state(self) -> dict[str, Tensor]:
        """Where it is."""
        return {"left": self.left, "generator": self.generator.get_state()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from there."""
        self.left = state["left"]
        self.generator.set_state(state["generator"])


@runtime_checkable
class Task(Protocol):
    """Gives the losses of one micro-batch."""

    def losses(self, gates: Float[Tensor, "mask layer head"]) -> Float[Tensor, " mask"]:
        """The mean loss of a new batch under each mask."""

    def orders(self) -> dict[str, Order]:
        """What draws its batches."""


def losses_of(
    chg: CHG, objective: Objective, batch: CHGBatch, gates: Float[Tensor, "mask layer head"]
) -> Float[Tensor, "batch mask"]:
    """The loss of each row of a batch under each mask, in nats."""
    full = None
    if getattr(objective, "needs_full", False):
        with torch.no_grad():
            full = chg.answers(batch).logits
    answers = chg.answers(batch, gates, full=full)
    loss: Any = objective(answers)
    if not isinstance(loss, Tensor) or loss.shape != answers.targets.shape:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(
            f"an objective gives a loss for each of the {len(answers.targets)} places, "
            f"[{len(answers.targets)}]; {objective!r} gave {got}"
        )
    return answers.per_row(loss).view(len(batch), len(gates))


class FitTask:
    """One dataset, one objective."""

    def __init__(self, chg: CHG, order: Order, objective: Objective) -> None:
        self.chg = chg
        self.order = order
        self.objective = objective

    def losses(self, gates: Float[Tensor, "mask layer head"]) -> Float[Tensor, " mask"]:
        """The mean loss of the next batch under each mask."""
        return losses_of(self.chg, self.objective, self.order.next(), gates).mean(0)

    def orders(self) -> dict[str, Order]:
        """What draws its batches."""
        return {"rows": self.order}


class ContrastTask:
    """Keep one task and lose another (contrastive causal head gating).

    The loss is that of the kept task, plus the forgotten one's log-probability as far as it lies less than
    ``margin`` nats below the kept one's.
    """

    def __init__(
        self, chg: CHG, retain: Order, forget: Order, objective: Objective, margin: float
    ) -> None:
        self.chg = chg
        self.retain = retain
        self.forget = forget
        self.objective = objective
        self.margin = margin

    def losses(self, gates: Float[Tensor, "mask layer head"]) -> Float[Tensor, " mask"]:
        """The mean loss of the next two batches under each mask."""
        kept = losses_of(self.chg, self.objective, self.retain.next(), gates).mean(0)
        lost = losses_of(self.chg, self.objective, self.forget.next(), gates).mean(0)
        # Log-probabilities are minus the losses; the kept task sets the mark and is not pulled by it.
        return kept + (kept.detach() - lost).clamp(min=-self.margin)

    def orders(self) -> dict[str, Order]:
        """What draws its batches."""
        return {"retain": self.retain, "forget": self.forget}
