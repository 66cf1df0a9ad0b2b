"""The one place that overcomplete is imported at, when it is first needed; its classes, mended.

What is mended is in `models` and `variants`; overcomplete is T. Fel's (Kempner Institute), MIT.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...hooks import InputError
from . import pursuit, variants
from .jump import Kernel
from .models import Autoencoder

_MISSING = (
    "SAE concepts need overcomplete: pip install 'lensbridge[sae]' (overcomplete==0.3.0 with matplotlib<3.9, "
    "on python<3.13)"
)
KERNELS = [
    "rectangle",
    "gaussian",
    "triangular",
    "cosine",
    "epanechnikov",
    "quartic",
    "silverman",
    "cauchy",
]
"""Overcomplete's, for the thresholds of JumpReLU."""
_FACTORS: dict[str, Any] = {
    "gaussian": lambda width: 2.0,
    "silverman": lambda width: 0.5,
    "cosine": lambda width: 1 / width,
}
"""What overcomplete's kernels must be multiplied by to integrate to one, where it is not 1."""


@cache
def engine() -> SimpleNamespace:
    """Overcomplete's autoencoders, mended, by name.

    Raises:
        InputError: Overcomplete is missing or cannot be imported; says what to install.
    """
    try:
        import overcomplete.sae as upstream
        from overcomplete.sae import kernels
        from overcomplete.sae.archetypal_dictionary import RelaxedArchetypalDictionary
    except (ImportError, AttributeError) as error:
        # With matplotlib 3.9 its import ends in an AttributeError.
        raise InputError(f"{_MISSING}; importing it ended with: {error}") from error
    return _mended(upstream, kernels, RelaxedArchetypalDictionary)


def rectangle(distance: Tensor, bandwidth: Tensor) -> Tensor:
    """Overcomplete's rectangle in fewer steps; it is the kernel unless another is asked for."""
    return (distance.abs() <= bandwidth / 2).to(distance.dtype) / bandwidth


def density(kernel: Any, name: str) -> Kernel:
    """One of overcomplete's kernels, integrating to one."""
    if name == "rectangle":
        return rectangle
    factor = _FACTORS.get(name, lambda width: 1.0)

    def normalised(distance: Tensor, bandwidth: Tensor) -> Tensor:
        return kernel(distance, bandwidth) * factor(bandwidth)

    return normalised


def _mended(upstream: Any, given: Any, archetypal: Any) -> SimpleNamespace:
    class Dictionary(upstream.DictionaryLayer):  # type: ignore[misc]
        """Atoms that only `project` rewrites, and no second copy that could be out of date."""

        def get_dictionary(self) -> Tensor:
            is_learnt = isinstance(self.multiplier, nn.Parameter)
            return self._weights * torch.exp(self.multiplier) if is_learnt else self._weights

        @torch.no_grad()
        def start_from(self, atoms: Tensor) -> None:
            self._weights.copy_(atoms)

        @torch.no_grad()
        def project(self) -> None:
            self._weights.copy_(self.normalization(self._weights))

        @torch.no_grad()
        def flatten_gradient(self) -> None:
            """Of unit atoms, leave out what would only make them longer."""
            grad = self._weights.grad
            if grad is not None and self.normalization is self.NORMALIZATIONS["l2"]:
                along = (grad * self._weights).sum(1, keepdim=True)
                grad.addcmul_(along, self._weights, value=-1)

        def train(self, mode: bool = True) -> Any:
            return nn.Module.train(self, mode)

    class Archetypal(archetypal):  # type: ignore[misc]
        """Atoms near the convex hull of points."""

        def get_dictionary(self) -> Tensor:
            return (self.W @ self.C + self.Relax) * torch.exp(self.multiplier)

        @torch.no_grad()
        def project(self) -> None:
            shares = self.W.relu()
            self.W.copy_(shares / (shares.sum(-1, keepdim=True) + 1e-8))
            length = self.Relax.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            self.Relax.mul_((self.delta / length).clamp(max=1))

        def flatten_gradient(self) -> None:
            """Nothing: these atoms have their own lengths."""

        def train(self, mode: bool = True) -> Any:
            return nn.Module.train(self, mode)

    both = {"dictionary_class": Dictionary, "archetypal_class": Archetypal}
    kernels = {name: density(getattr(given, f"{name}_kernel"), name) for name in KERNELS}

    def mended(mixin: type[Autoencoder], name: str) -> Any:
        return type(name, (mixin, getattr(upstream, name)), {**both, "kernels": kernels})

    return SimpleNamespace(
        SAE=mended(variants.Vanilla, "SAE"),
        TopKSAE=mended(variants.TopK, "TopKSAE"),
        BatchTopKSAE=mended(variants.BatchTopK, "BatchTopKSAE"),
        JumpSAE=mended(variants.Jump, "JumpSAE"),
        MpSAE=mended(pursuit.MatchingPursuit, "MpSAE"),
        OMPSAE=mended(pursuit.OrthogonalPursuit, "OMPSAE"),
        QSAE=mended(pursuit.Quantized, "QSAE"),
        RATopKSAE=mended(pursuit.ArchetypalTopK, "RATopKSAE"),
        RAJumpSAE=mended(pursuit.ArchetypalJump, "RAJumpSAE"),
    )
