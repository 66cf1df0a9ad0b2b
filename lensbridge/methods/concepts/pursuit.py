"""Autoencoders that have no encoder, or other atoms: matching pursuit, quantised, archetypal."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ...hooks import InputError
from .models import Autoencoder, Pass
from .sparse import Places, combine
from .variants import Jump, TopK, count, number

_GRAM_MOST = 8192
"""The atoms' products with each other are kept up to this number of concepts."""


class MatchingPursuit(Autoencoder):
    """k times the atom that has most of what is left over; there is no encoder beside the dictionary."""

    learns_encoder = False
    k: int
    dropout: float | None

    def __init__(
        self,
        d: int,
        nb_concepts: int,
        *,
        k: int | None = None,
        dropout: float | int | None = None,
        **common: Any,
    ) -> None:
        rate = None if dropout is None else number("dropout", dropout, most=1.0)
        self._build(d, nb_concepts, k=count("k", k, nb_concepts), dropout=rate, **common)

    def inside(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-codes (the input's products with the atoms; overcomplete gives what is left over) and codes."""
        atoms = self.get_dictionary()
        places, values = self._pursue(centered, atoms)[:2]
        codes = centered.new_zeros(len(centered), self.nb_concepts)
        return centered @ atoms.T, codes.index_put((places.rows, places.cols), values, True)

    def training_pass(self, u: Float[Tensor, "row d"]) -> Pass:
        """A batch in the units inside, differentiable by all parameters."""
        x = self.centered(u)
        places, values, left = self._pursue(x, self.get_dictionary())
        fired = torch.zeros(self.nb_concepts, dtype=torch.bool, device=u.device)
        fired[places.cols[values.detach() > 0]] = True
        # An atom chosen twice is one code.
        codes = places.rows * self.nb_concepts + places.cols
        l0 = codes[values.detach() > 0].unique().numel()
        return Pass(u - left, None, fired, torch.tensor(float(l0), device=u.device))

    def _pursue(self, x: Tensor, atoms: Tensor) -> tuple[Places, Tensor, Tensor]:
        """Which atoms, how much of each, and what is left over."""
        chosen = self._choose(x.detach(), atoms.detach())
        places = Places.of_each_row(chosen)
        left, values = x, []
        for atom in F.embedding(chosen, atoms).unbind(1):
            value = (left * atom).sum(-1, keepdim=True).relu()
            left = left - value * atom
            values.append(value)
        return places, torch.cat(values, 1).flatten(), left

    @torch.no_grad()
    def _choose(self, x: Tensor, atoms: Tensor) -> Tensor:
        if self.training and self.dropout:
            dropped = torch.rand(len(atoms), 1, device=atoms.device) < self.dropout
            atoms = atoms.masked_fill(dropped, 0)
        chosen = []
        products = x @ atoms.T
        n, c = products.shape
        gram = atoms @ atoms.T if c <= _GRAM_MOST and c <= n * self.k else None
        for nth in range(self.k):
            best = products.max(1)
            chosen.append(best.indices)
            if nth + 1 == self.k:
                break
            value = best.values.relu()[:, None]
            if gram is not None:
                products = torch.addcmul(products, gram[best.indices], value, value=-1)
            else:
                x = x - value * atoms[best.indices]
                products = x @ atoms.T
        return torch.stack(chosen, 1)

    def of_dead(
        self, u: Tensor, x_hat: Tensor, dead: Tensor, k: int
    ) -> Float[Tensor, "row d"] | None:
        """What dead atoms make of what the others leave over."""
        atoms = self.get_dictionary()[dead]
        left = (u - x_hat).detach()
        best = (left @ atoms.T).topk(min(k, len(dead)), dim=1)
        return combine(best.values.relu().flatten(), Places.of_each_row(best.indices), atoms)


class OrthogonalPursuit(Autoencoder):
    """Overcomplete's, whose dropout ended for good with the first evaluation."""

    learns_encoder = False
    dropout: float | None

    def __init__(
        self,
        d: int,
        nb_concepts: int,
        *,
        k: int | None = None,
        dropout: float | int | None = None,
        max_iter: int = 10,
        **common: Any,
    ) -> None:
        rate = None if dropout is None else number("dropout", dropout, most=1.0)
        most = count("max_iter", max_iter)
        self._build(
            d, nb_concepts, k=count("k", k, nb_concepts), dropout=rate, max_iter=most, **common
        )

    def inside(self, centered: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-codes (the input's products with the atoms) and codes."""
        rate = self.dropout
        self.dropout = rate if self.training else None
        try:
            _, codes = super().inside(centered)
        finally:
            self.dropout = rate
        return centered @ self.get_dictionary().T, codes


class Quantized(Autoencoder):
    """Overcomplete's: codes of a few learnt levels, which are in the units inside."""

    is_homogeneous = False

    def __init__(
        self, d: int, nb_concepts: int, *, q: int = 4, hard: bool = False, **common: Any
    ) -> None:
        self._build(d, nb_concepts, q=count("q", q, least=2), hard=hard, **common)

    def training_pass(self, u: Float[Tensor, "row d"]) -> Pass:
        """A batch in the units inside, differentiable by all parameters."""
        pre, codes, x_hat = self.dense(u)
        return self._pass(x_hat, codes, pre)


class Archetypal(Autoencoder):
    """Atoms that are close to the convex hull of points; Fel et al., arXiv 2502.12892.

    Points are activations; inside they are centred and scaled as the data are.
    """

    archetypal_class: Any

    def __init__(
        self,
        d: int,
        nb_concepts: int,
        *,
        points: Float[Tensor, "point d_in"],
        delta: float | int = 1.0,
        use_multiplier: bool = True,
        **options: Any,
    ) -> None:
        hull: dict[str, Any] = {
            "points": points,
            "delta": number("delta", delta),
            "use_multiplier": use_multiplier,
        }
        super().__init__(d, nb_concepts, **hull, **options)

    def _new_dictionary(self, d: int, params: dict[str, Any], upstream: dict[str, Any]) -> Any:
        if params:
            raise InputError("an archetypal dictionary takes points=, delta= and use_multiplier=")
        points = upstream["points"]
        if points.shape[1] != d or len(points) < self.nb_concepts:
            raise InputError(
                f"points are activations [n, {d}], at least {self.nb_concepts} of them; got "
                f"{list(points.shape)}"
            )
        return self.archetypal_class(
            d,
            self.nb_concepts,
            points.float().clone(),
            upstream["delta"],
            upstream["use_multiplier"],
        )

    @torch.no_grad()
    def begin(self, mean: Float[Tensor, " d"], scale: Float[Tensor, ""]) -> None:
        """Take the data's mean as offset, and its scale; nothing without a bias."""
        super().begin(mean, scale)
        self.dictionary.C.sub_(self.b_dec / self.scale).mul_(self.scale)
        self._tie()


class ArchetypalTopK(Archetypal, TopK):
    """`TopK` with archetypal atoms."""


class ArchetypalJump(Archetypal, Jump):
    """`Jump` with archetypal atoms."""
