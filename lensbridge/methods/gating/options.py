"""The knobs of a fit of gates."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from ...hooks import InputError


@dataclass(frozen=True)
class FitOptions:
    """The knobs of a fit.

    Attributes:
        num_masks: How many masks are fitted from different starts, side by side.
        num_updates: Updates without a regulariser.
        num_reg_updates: Updates of both regularised masks that start from what that gave.
        l1_weight: How much a gate's logit weighs against the loss (the paper's lambda).
        reduction: Of that weight over a mask's gates: ``"mean"``, as the paper's code has it, or
            ``"sum"``, as its formula; `CHGTrainer.weight_per_gate` says what one gate feels.
        l1_clamp: Logits weigh nothing beyond this.
        lr, lr_end: Learning rate of the first phase, at its start and (linearly) end; None: as at the start.
        lr_reg, lr_reg_end: Likewise, regularised.
        grad_norm: Gradients longer than this are shortened; None for never.
        clip: Which gradient that is: each ``"mask"``'s own, so that masks do not feel each other, or
            the ``"joint"`` one of all, as in the paper's code, which also averages the loss over masks.
        batch_size: Rows of a batch.
        gradient_accum_steps: Batches of an update.
        mask_init_range: Between which gates the first ones are drawn.
        projection: Whether logits are put back inside ``l1_clamp`` after each update. Without (as in the
            paper's code) a gate that has left the clamp no longer feels the regulariser, so that of two heads
            that can stand in for each other both stay.
        jitter: With projection, logits are drawn towards 0 by up to this share before they are
            regularised, each by its own first gate. Gates that have come to the same bound would
            otherwise move as one for ever.
        patience: Stop a phase when no gate has crossed 0.5 for so many updates; None for never.
        history_every: Keep the gates of each so manieth update.
        seed: Of the first gates and of the order of rows.
    """

    num_masks: int = 10
    num_updates: int = 500
    num_reg_updates: int = 500
    l1_weight: float = 0.1
    reduction: str = "mean"
    l1_clamp: float = 4.0
    lr: float = 1.0
    lr_end: float | None = None
    lr_reg: float | None = None
    lr_reg_end: float | None = None
    grad_norm: float | None = 1.0
    clip: str = "mask"
    batch_size: int = 32
    gradient_accum_steps: int = 1
    mask_init_range: tuple[float, float] = (0.05, 0.95)
    projection: bool = True
    jitter: float = 0.25
    patience: int | None = None
    history_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("num_masks", "batch_size", "gradient_accum_steps", "history_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("num_updates", "num_reg_updates", "l1_weight"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience must be at least 1, or None, got {self.patience}")
        if not 0 <= self.jitter < 1:
            raise InputError(f"jitter must lie in [0, 1), got {self.jitter}")
        for name in ("lr", "l1_clamp"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be above 0, got {getattr(self, name)}")
        for name, allowed in (("reduction", ("mean", "sum")), ("clip", ("mask", "joint"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")


def options_of(knobs: dict[str, Any]) -> FitOptions:
    """Options with some knobs set.

    Raises:
        InputError: No such knob (the nearest are named), or a value out of range.
    """
    known = [field.name for field in fields(FitOptions)]
    for name in knobs:
        if name not in known:
            near = get_close_matches(name, known, 1, 0.6)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(f"fitting has no knob {name!r}{hint} (knobs: {', '.join(known)})")
    return replace(FitOptions(), **knobs)
