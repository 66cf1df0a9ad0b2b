"""Inside a normalisation module: the scale it divides by and the normalised value before its weights.

No norm is written again for the model to run: the formulas serve only to *name* the two values inside the
module Hugging Face built, and each module is first shown to be reproduced by one of them.
"""

from __future__ import annotations

import copy
import itertools

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from .architecture import Norm
from .graft import graft
from .ranks import own_parameter

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def describe_norm(module: nn.Module, path: str) -> Norm:
    """Find the formula of a norm by trying the known ones against the module itself.

    The module's own ``forward`` runs once on a few random numbers with made-up weights, so it does not matter
    where its real weights are (meta, disk, another device).
    """
    eps = next(
        (float(value) for name in _EPS_NAMES if (value := _number(module, name)) is not None), None
    )
    if eps is None:
        return Norm(path)
    weights = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    facts = {n: v for n, v in module.__dict__.items() if isinstance(v, (bool, int, float, str))}
    facts.pop("training", None)
    key = (type(module), eps, *weights.items(), *facts.items())
    if key not in _FORMULAS:
        _FORMULAS[key] = _find_formula(module, weights, eps)
    found = _FORMULAS[key]
    return Norm(path) if found is None else Norm(path, found[0], eps, found[1], is_open=True)


_FORMULAS: dict[tuple[object, ...], tuple[bool, float] | None] = {}


def _find_formula(
    module: nn.Module, weights: dict[str, tuple[int, ...]], eps: float
) -> tuple[bool, float] | None:
    if not set(weights) <= {"weight", "bias"} or any(len(shape) != 1 for shape in weights.values()):
        return None
    width = next(iter(weights.values()), (16,))[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, width, generator=generator) * 2 + 1
    made = {name: torch.randn(shape, generator=generator) for name, shape in weights.items()}
    # A shallow twin with weights of its own: the user's module is neither run nor touched.
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {name: made.get(name) for name in module._parameters}
    with torch.no_grad():
        try:
            given = x.clone()
            expected = type(module).forward(twin, given)
        except (RuntimeError, TypeError, AttributeError, ValueError, IndexError):
            return None  # not callable as a plain norm: then its inside has no names
        if not torch.equal(given, x):
            return None  # works in place
        for center, offset in itertools.product((False, True), (0.0, 1.0)):
            norm = Norm("", center, eps, offset, is_open=True)
            out = affine(
                norm, made.get("weight"), made.get("bias"), normalize(norm, x, scale(norm, x))
            )
            if isinstance(expected, Tensor) and torch.allclose(out, expected, rtol=1e-4, atol=1e-4):
                return center, offset
    return None


def _number(module: nn.Module, name: str) -> float | None:
    value = module.__dict__.get(name)
    return value if isinstance(value, (int, float)) else None


def scale(norm: Norm, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """What the input is divided by, in float32 (float64 for a float64 input)."""
    x = _centered(norm, _wide(x))
    return x.square().mean(-1, keepdim=True).add_(norm.eps).sqrt_()


def normalize(
    norm: Norm, x: Float[Tensor, "*batch d"], by: Float[Tensor, "*batch 1"]
) -> Float[Tensor, "*batch d"]:
    """The input, centred if the norm centres, over the scale; in the input's dtype."""
    return (_centered(norm, _wide(x)) / by).to(x.dtype)


def affine(
    norm: Norm, weight: Tensor | None, bias: Tensor | None, normalized: Float[Tensor, "*batch d"]
) -> Float[Tensor, "*batch d"]:
    """The module's output from the normalised value."""
    out = normalized
    if weight is not None:
        out = (out * (weight + norm.offset)).to(normalized.dtype)
    return out if bias is None else out + bias


def output_from(
    norm: Norm,
    module: nn.Module,
    x: Float[Tensor, "*batch d"],
    normalized: Float[Tensor, "*batch d"],
    original: Float[Tensor, "*batch d"],
) -> Float[Tensor, "*batch d"]:
    """The output for a given normalised value; bit for bit `original` where that was not changed."""
    with torch.no_grad():
        untouched = normalized == normalize(norm, x, scale(norm, x))
    # accelerate may keep the weights elsewhere until the module itself runs.
    with align_module_device(module):
        weight, bias = own_parameter(module, "weight"), own_parameter(module, "bias")
        return graft(original, affine(norm, weight, bias, normalized), untouched)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _centered(norm: Norm, x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True) if norm.center else x
