"""What gates are fitted to: a loss for each place that counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from ...hooks import InputError
from .answers import Answers

Objective = Callable[[Answers], Tensor]
"""Given what a model says, a loss in nats at each place, [n], to be lowered by the gates that are kept.
With an attribute ``needs_full = True`` it gets the whole model's logits too, as `Answers.full`."""


@dataclass(frozen=True)
class TargetTokens:
    """Minus the log-probability of the targets or labels: the paper's objective."""

    needs_full: bool = False

    def __call__(self, answers: Answers) -> Float[Tensor, " n"]:
        """Cross-entropy at each place."""
        return -answers.log_probs()


@dataclass(frozen=True)
class KLToFull:
    """How far the answers are from the whole model's, KL(full || gated), whatever the targets are."""

    needs_full: bool = True

    def __call__(self, answers: Answers) -> Float[Tensor, " n"]:
        """The divergence at each place."""
        if answers.full is None:
            raise InputError("KLToFull compares with the whole model: give its logits as full=")
        full = answers.full.log_softmax(-1)
        return (full.exp() * (full - answers.logits.log_softmax(-1))).sum(-1)


@dataclass(frozen=True)
class LogitDifference:
    """The logit of the foil minus that of the target: lower is better, without a bound."""

    needs_full: bool = False

    def __call__(self, answers: Answers) -> Float[Tensor, " n"]:
        """The difference at each place."""
        if answers.foils is None:
            raise InputError(
                "LogitDifference needs the token that should not be said: make the dataset with foils="
            )
        ids = answers.targets, answers.foils
        right, wrong = (answers.logits.gather(-1, i[:, None])[:, 0] for i in ids)
        return wrong - right
