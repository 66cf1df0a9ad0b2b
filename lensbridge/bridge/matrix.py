"""A linear layer as ``x @ W + b``: its own parameters where they are that, else what it does to unit vectors.

So quantised layers, layers with adapters and layers that accelerate keeps elsewhere are read as well: they
are what they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..hooks import ArchitectureError
from .example import FAILURES
from .ranks import own_parameter
from .seen import first_item

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN: tuple[type, ...] = (nn.Parameter, Tensor)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
_NEARLY = 0.05
"""How far a layer may be from a linear map: layers that round what they read are some per cent off."""


def plain_weight(module: nn.Module) -> Float[Tensor, "d_in d_out"] | None:
    """W, a view of the layer's parameter, when the layer is exactly ``x @ W (+ b)``."""
    weight = own_parameter(module, "weight")
    # A tensor of another class (packed, quantised, sharded) is no plain matrix.
    if weight is None or type(weight) not in _PLAIN or weight.dtype not in _FLOATS:
        return None
    if (
        type(module) is nn.Linear
        or type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear
    ):
        return weight.T
    return weight if type(module) is Conv1D else None


def bias_of(module: nn.Module, x: Tensor) -> Tensor | None:
    """What a linear layer adds whatever its input; ``x`` is an input of it, for its shape."""
    if plain_weight(module) is None:
        return first_item(module.forward(torch.zeros_like(x[..., :1, :])))
    with align_module_device(module):
        bias: Any = own_parameter(module, "bias")
        return None if bias is None else bias.clone() if bias.device.type == "meta" else bias


def linear_map(
    module: nn.Module, width: int | None, like: Tensor
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"] | None]:
    """A layer's matrix and bias (None without one).

    Views of the layer's parameters where these are the matrix; real copies where accelerate keeps them
    elsewhere; else computed by running the layer on unit vectors.

    Args:
        module: The layer.
        width: How wide its input is; None asks the layer.
        like: A tensor of the model, for dtype and device where the layer has none of its own.
    Raises:
        ArchitectureError: The layer is no linear map.
    """
    if isinstance(module, _CONVOLUTIONS):
        raise ArchitectureError(f"a {_name(module)} is a convolution, not one matrix")
    with align_module_device(module):
        weight, bias = plain_weight(module), own_parameter(module, "bias")
        if weight is not None:
            return weight, bias
        width = _width(module) if width is None else width
        if width is None:
            raise ArchitectureError(f"it is not known how wide the input of {_name(module)} is")
        candidate = _candidate(module, width)
        if candidate is not None and _is_this(module, candidate, bias, like):
            return candidate, bias
    return _by_running(module, width, like)


def is_matrix(module: nn.Module) -> bool:
    """Whether a layer may be a linear map: no norm, no convolution."""
    parts = [module, *module.children()]  # a layer with adapters has its matrices inside
    held = [p for part in parts for p in part._parameters.values() if p is not None]
    return any(p.dim() >= 2 for p in held) and not isinstance(module, _CONVOLUTIONS)


def first_float(model: nn.Module) -> Tensor:
    """A parameter of a model, for dtype and device."""
    held = [p for p in model.parameters() if p.dtype in _FLOATS]
    return next((p for p in held if p.device.type != "meta"), held[0])


def _candidate(module: nn.Module, width: int) -> Tensor | None:
    """What would be the matrix of a linear layer of another class, if it does the usual."""
    weight = own_parameter(module, "weight")
    if weight is None or type(weight) not in _PLAIN:
        return None
    if weight.dim() != 2 or weight.shape[1] != width:
        return None
    return weight.T if weight.dtype in _FLOATS else None


@torch.no_grad()
def _is_this(module: nn.Module, weight: Tensor, bias: Tensor | None, like: Tensor) -> bool:
    """Whether a layer does to a few random vectors what its parameters say."""
    if weight.device.type == "meta":
        return False
    x = _random(2, weight.shape[0], weight)
    made = _run(module, x)
    wanted = x @ weight
    wanted = wanted if bias is None else wanted + bias
    return made.shape == wanted.shape and torch.allclose(
        made.float(), wanted.float(), rtol=1e-2 if weight.dtype.itemsize < 4 else 1e-4, atol=1e-4
    )


def _by_running(
    module: nn.Module, width: int, like: Tensor
) -> tuple[Float[Tensor, "d_in d_out"], Float[Tensor, " d_out"]]:
    held = next((p for p in module.parameters() if p.device.type != "meta"), like)
    floats = next((p for p in module.parameters() if p.dtype in _FLOATS), like)
    like = torch.empty(0, dtype=floats.dtype, device=held.device)
    none = torch.zeros(1, width, dtype=like.dtype, device=like.device)
    units = torch.eye(width, dtype=like.dtype, device=like.device)
    probe = _random(1, width, like)
    made = _run(module, torch.cat([none, units, probe]))
    if made.dim() != 2 or len(made) != width + 2:
        raise ArchitectureError(f"{_name(module)} is no linear map: it made {list(made.shape)}")
    bias = made[0]
    weight = made[1:-1] - bias
    with torch.no_grad():
        off = made[-1].float() - (probe.float() @ weight.float() + bias.float())[0]
        size = (made[-1] - bias).float().norm()
        if not off.norm() <= _NEARLY * size.clamp(min=1e-6):
            raise ArchitectureError(
                f"{_name(module)} is no linear map: what it makes of a sum is not the sum"
            )
    return weight, bias


def _run(module: nn.Module, x: Float[Tensor, "rows d_in"]) -> Tensor:
    try:
        with _without_dropout(module):
            made = first_item(module.forward(x[None]))
    except FAILURES as error:
        raise ArchitectureError(f"{_name(module)} does not run by itself: {error}") from error
    if not isinstance(made, Tensor) or made.dim() != 3:
        raise ArchitectureError(f"{_name(module)} is no linear map of [batch, pos, d]")
    return made[0]


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    try:
        for part in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _random(rows: int, width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, width, generator=generator).to(like.device, like.dtype)


def _width(module: nn.Module) -> int | None:
    width = module.__dict__.get("in_features")
    return width if isinstance(width, int) else None


def _name(module: nn.Module) -> str:
    return type(module).__name__
