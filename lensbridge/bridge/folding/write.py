"""Rewriting weights as planned: in float64 (float32 where there is none), cast back at the end."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...hooks import ArchitectureError
from ..architecture import Attention
from ..factored import FactoredMatrix
from ..matrix import linear_map
from .facts import tying_configs
from .probe import rows_of
from .step import Centering, Heads, NormFold

_AT_ONCE = 1 << 26
"""Numbers of a parameter that are worked on at a time."""


def untie(model: nn.Module) -> None:
    """Give every tied weight memory of its own, and let the config say so."""
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in declared.items():
        path, _, name = target.rpartition(".")
        home = model.get_submodule(path)
        if home is model.get_submodule(source.rpartition(".")[0]):
            continue
        held, other = home._parameters[name], model.get_parameter(source)
        if held is other:
            home._parameters[name] = nn.Parameter(
                other.detach().clone(), requires_grad=other.requires_grad
            )
    for config in tying_configs(model):
        config.tie_word_embeddings = False
    for module in model.modules():
        if "all_tied_weights_keys" in module.__dict__:
            module.__dict__["all_tied_weights_keys"] = {}


def fold_norm(model: nn.Module, fold: NormFold) -> None:
    """Move a norm's weight (and bias) into what reads it; the norm multiplies by one then."""
    norm = model.get_submodule(fold.norm.path)
    weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
    factor = None if weight is None else _wide(weight) + fold.norm.offset
    for read in fold.reads:
        parameter = model.get_parameter(read.parameter)
        if bias is not None and not fold.keeps_bias and bool((bias != 0).any()):
            home = model.get_submodule(read.parameter.rpartition(".")[0])
            _add(home.get_parameter("bias"), _product(parameter, read.dim, _wide(bias)))
        if factor is not None:
            _scale(parameter, read.dim, factor)
    if bias is not None:
        bias.copy_(_wide(bias) / factor if fold.keeps_bias and factor is not None else 0 * bias)
    if weight is not None:
        weight.fill_(1.0 - fold.norm.offset)


def center(model: nn.Module, centering: Centering) -> None:
    """Take the mean over one dimension of a matrix away, and that of its bias."""
    weight = model.get_parameter(centering.weight)
    count = weight.shape[centering.dim]
    ones = torch.ones(count, dtype=_wide(weight[:0]).dtype)
    mean = (_product(weight, centering.dim, ones) / count).unsqueeze(centering.dim)
    for part in _parts(weight):
        rows = _wide(weight[part]) - (mean if centering.dim == 0 else mean[part])
        weight[part] = rows.to(weight.dtype)
    if centering.bias is not None:
        bias = model.get_parameter(centering.bias)
        bias.copy_(_wide(bias) - _wide(bias).mean())


def fold_values(model: nn.Module, heads: Heads) -> None:
    """Move the constant part of the values, which the pattern hands on as it is, into the output's bias."""
    attn = heads.attn
    module, rows, out = _values(model, attn)
    biases = module.get_parameter("bias")
    constant = _wide(biases[rows])  # [key/value head, d_head_v]
    spread = constant.repeat_interleave(attn.n_heads // attn.n_key_value_heads, 0).flatten()
    _add(out.get_parameter("bias"), _product(out.get_parameter("weight"), _inputs_of(out), spread))
    biases[rows] = 0.0


def refactor(model: nn.Module, heads: Heads) -> None:
    """Make the two factors of each head's QK (and OV) matrix alike: orthogonal columns of equal lengths."""
    attn = heads.attn
    if heads.qk and attn.q is not None and attn.k is not None:
        q, k = model.get_submodule(attn.q.path), model.get_submodule(attn.k.path)
        rows_q = rows_of(attn.q, attn.n_heads, attn.d_head)
        rows_k = rows_of(attn.k, attn.n_heads, attn.d_head)
        for at_q, at_k in zip(rows_q, rows_k, strict=True):
            left, right = _even(_extended(q, at_q).mT, _extended(k, at_k))
            _put(q, at_q, left.mT)
            _put(k, at_k, right)
    if heads.ov:
        v, rows, out = _values(model, attn)
        matrix = _matrix(out)
        for index, at in enumerate(rows):
            span = slice(index * attn.d_head_v, (index + 1) * attn.d_head_v)
            left, right = _even(_wide(matrix[:, span]), _extended(v, at))
            matrix[:, span] = left.to(matrix.dtype)
            _put(v, at, right)


# --- arithmetic ----------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    is_small = tensor.device.type == "mps"  # has no float64
    return tensor.detach().to(torch.float32 if is_small else torch.float64)


def _parts(parameter: Tensor) -> Iterator[slice]:
    """Stretches of the first dimension that are worked on at a time."""
    step = max(_AT_ONCE * len(parameter) // max(parameter.numel(), 1), 1)
    for start in range(0, len(parameter), step):
        yield slice(start, start + step)


def _scale(parameter: Tensor, dim: int, factor: Tensor) -> None:
    """Multiply along a dimension."""
    shape = [1] * parameter.dim()
    shape[dim] = -1
    by = factor.to(parameter.device).reshape(shape)
    for part in _parts(parameter):
        rows = _wide(parameter[part]) * (by[part] if dim == 0 else by)
        parameter[part] = rows.to(parameter.dtype)


def _product(matrix: Tensor, dim: int, vector: Tensor) -> Tensor:
    """A matrix times a vector, summed over a dimension of the matrix."""
    vector = vector.to(matrix.device)
    if dim == 1:
        return torch.cat([_wide(matrix[part]) @ vector for part in _parts(matrix)])
    parts = [vector[part] @ _wide(matrix[part]) for part in _parts(matrix)]
    return torch.stack(parts).sum(0)


def _add(bias: Tensor, more: Tensor) -> None:
    bias.copy_(_wide(bias) + more.to(bias.device))


# --- heads ---------------------------------------------------------------------------------------


def _inputs_of(module: nn.Module) -> int:
    """Which dimension of a linear layer's weight is its input."""
    return 0 if isinstance(module, Conv1D) else 1


def _matrix(module: nn.Module) -> Tensor:
    """A linear layer's weight as [out, in], a view."""
    return linear_map(module, None, module.get_parameter("weight"))[0].mT


def _values(model: nn.Module, attn: Attention) -> tuple[nn.Module, Tensor, nn.Module]:
    """The layer that makes values, which of its features they are, and the output projection."""
    if attn.v is None or attn.o is None:
        raise ArchitectureError(f"{attn.path} has no values or no output projection of its own")
    rows = rows_of(attn.v, attn.n_key_value_heads, attn.d_head_v)
    return model.get_submodule(attn.v.path), rows, model.get_submodule(attn.o)


def _extended(module: nn.Module, rows: Tensor) -> Tensor:
    """Rows of a layer with their bias as a last column (zeros without one), [row, in + 1]."""
    matrix = _wide(_matrix(module)[rows])
    bias = module._parameters.get("bias")
    column = torch.zeros_like(matrix[:, :1]) if bias is None else _wide(bias[rows])[:, None]
    return torch.cat([matrix, column], 1)


def _put(module: nn.Module, rows: Tensor, extended: Tensor) -> None:
    matrix, bias = _matrix(module), module._parameters.get("bias")
    matrix[rows] = extended[:, :-1].to(matrix.dtype)
    if bias is not None:
        bias[rows] = extended[:, -1].to(bias.dtype)


def _even(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors [m, d] and [d, n] with the same product, both holding the root of its singular values."""
    back = right.device
    first, second = FactoredMatrix(left, right.to(left.device)).make_even().pair
    missing = (
        left.shape[1] - first.shape[1]
    )  # heads wider than the model have no more values than that
    first, second = (
        nn.functional.pad(first, (0, missing)),
        nn.functional.pad(second, (0, 0, 0, missing)),
    )
    return first, second.to(back)
