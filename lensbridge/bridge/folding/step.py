"""The steps of processing weights, and what there is to do in each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..architecture import Attention, Norm
from .flow import Read

FOLD, CENTER, UNEMBED, VALUES, REFACTOR = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
STEPS = (FOLD, CENTER, UNEMBED, VALUES, REFACTOR)


@dataclass(frozen=True)
class NormFold:
    """A norm whose weight goes into what reads it.

    Attributes:
        norm: The norm.
        reads: The parameters, and the dimension of each that its features are summed over.
        keeps_bias: Whether its bias, divided by its weight, stays.
    """

    norm: Norm
    reads: tuple[Read, ...]
    keeps_bias: bool = False


@dataclass(frozen=True)
class Centering:
    """A matrix whose mean over one dimension is subtracted, and the bias beside it.

    Attributes:
        weight: Name of the parameter.
        dim: The dimension.
        bias: Name of the bias; None without one.
    """

    weight: str
    dim: int
    bias: str | None = None


@dataclass(frozen=True)
class Heads:
    """An attention to be rewritten.

    Attributes:
        name: Its canonical name.
        attn: Its parts.
        qk, ov: Whether the pair is (used by the refactoring).
    """

    name: str
    attn: Attention
    qk: bool = False
    ov: bool = False


@dataclass
class Step:
    """One kind of rewriting.

    Attributes:
        name: As the argument of `process_weights`.
        todo: What can be done.
        left: Parts that should be rewritten and cannot be: name -> why.
        notes: What else there is to say of a part.
        unties: Whether it writes on a matrix that embedding and head share.
    """

    name: str
    todo: list[Any] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    unties: bool = False

    @property
    def reason(self) -> str:
        """Why the step cannot be done wholly; empty when it can."""
        said = [f"{part}: {why}" for part, why in self.left.items()]
        more = f"; and {len(said) - 3} more" if len(said) > 3 else ""
        return "; ".join(said[:3]) + more
