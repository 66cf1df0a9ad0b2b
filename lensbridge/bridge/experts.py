"""The weights of a mixture of experts, with an axis for the expert, and of its router.

transformers keeps the experts of a layer in joint parameters and says on the module how they lie there. The
few classes that do not say are listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from ..hooks import ArchitectureError
from .architecture import Mlp
from .matrix import linear_map
from .ranks import own_parameter

AXES = {
    "W_in": "expert d_model d_mlp",
    "b_in": "expert d_mlp",
    "W_gate": "expert d_model d_mlp",
    "b_gate": "expert d_mlp",
    "W_out": "expert d_mlp d_model",
    "b_out": "expert d_model",
}
"""What experts have, by its own name."""


@dataclass(frozen=True)
class _Layout:
    """How the parameters of experts lie.

    Attributes:
        is_gated: Whether there is a gate, in one parameter with the projection it gates.
        is_transposed: Whether matrices are [expert, d_in, d_out] rather than [expert, d_out, d_in].
        is_concatenated: Whether gate and projection lie one after the other, rather than in turns.
    """

    is_gated: bool = True
    is_transposed: bool = False
    is_concatenated: bool = True


_KNOWN = {
    "Llama4TextExperts": _Layout(is_transposed=True),
    "LongcatFlashExperts": _Layout(),
}
_DECLARED = ("has_gate", "is_transposed", "is_concatenated")
_SEPARATE = {"DbrxExperts": {"gate": "w1", "in": "v1", "out": "w2"}}
"""Classes whose experts lie below each other in matrices of a part ``mlp``, [expert * d_mlp, d_model]."""


def find(model: nn.Module, part: Mlp) -> tuple[nn.Module | None, str]:
    """The module that holds the experts of a layer, or why its weights cannot be told."""
    home = model.get_submodule(str(part.path))
    found = [model.get_submodule(part.experts)] if part.experts else list(home.children())
    for module in found:
        if type(module).__name__ in _SEPARATE or _layout(module) is not None:
            return module, ""
    kinds = ", ".join(sorted({type(module).__name__ for module in found}))
    return None, f"how the weights of experts lie in {kinds} is not known"


def is_gated(module: nn.Module) -> bool:
    """Whether the experts have a gate."""
    layout = _layout(module)
    return layout is None or layout.is_gated


def _layout(module: nn.Module) -> _Layout | None:
    known = _KNOWN.get(type(module).__name__)
    facts = [module.__dict__.get(fact) for fact in _DECLARED]
    if known is None and all(isinstance(fact, bool) for fact in facts):
        known = _Layout(*facts)  # type: ignore[arg-type]
    wanted = "gate_up_proj" if known is not None and known.is_gated else "up_proj"
    has_all = all(own_parameter(module, name) is not None for name in (wanted, "down_proj"))
    return known if has_all else None


def read(module: nn.Module, own: str) -> Tensor:
    """A weight or bias of all experts of a layer, a view of the parameter.

    Args:
        module: What `find` found.
        own: ``"W_in"`` and so on, as in `AXES`.
    """
    kind, role = own.split("_")
    if type(module).__name__ in _SEPARATE:
        return _separate(module, kind, role)
    layout = _layout(module)
    if layout is None:
        raise ArchitectureError(
            f"the experts of {type(module).__name__} have lost their parameters"
        )
    joint = "gate_up_proj" if layout.is_gated else "up_proj"
    with align_module_device(module):
        down = module._parameters["down_proj"]
        held = down if role == "out" else module._parameters[joint]
        bias = own_parameter(module, f"{'down_proj' if role == 'out' else joint}_bias")
    if not isinstance(held, nn.Parameter) or not held.is_floating_point() or down is None:
        raise ArchitectureError(f"the weights of {type(module).__name__} are no plain tensors")
    rows: Tensor = held[: len(down)]  # experts behind these only copy (LongCat)
    matrix = rows if layout.is_transposed else rows.mT
    if kind == "W":
        return _share(matrix, role, layout)
    if bias is not None:
        return _share(bias, role, layout)
    return _share(rows.new_zeros(len(rows), matrix.shape[-1]), role, layout)


def _share(x: Tensor, role: str, layout: _Layout) -> Tensor:
    if role == "out" or not layout.is_gated:
        return x
    first, second = x.chunk(2, dim=-1) if layout.is_concatenated else (x[..., ::2], x[..., 1::2])
    return first if role == "gate" else second


def _separate(module: nn.Module, kind: str, role: str) -> Tensor:
    inner: nn.Module = module.get_submodule("mlp")
    with align_module_device(inner):
        held = inner._parameters[_SEPARATE[type(module).__name__][role]]
    count = module.__dict__["num_experts"]
    rows = held.unflatten(0, (count, -1))  # type: ignore[union-attr]
    matrix = rows if role == "out" else rows.mT
    return matrix if kind == "W" else matrix.new_zeros(count, matrix.shape[-1])


def read_router(module: nn.Module, own: str, n_experts: int | None) -> Tensor:
    """A router's matrix [d_model, expert] or bias [expert], zeros where it has none.

    Raises:
        ArchitectureError: The scores are not one matrix product.
    """
    held = [
        part
        for part in (module, *module.children())
        if (weight := part._parameters.get("weight")) is not None
        and weight.dim() == 2
        and weight.shape[0] == n_experts
    ]
    if len(held) != 1:
        raise ArchitectureError(
            f"{type(module).__name__} does not score {n_experts} experts by one matrix of its own"
        )
    matrix: Tensor
    bias: Tensor | None
    if type(held[0]) is nn.Linear:
        matrix, bias = linear_map(held[0], None, held[0].weight)
    else:
        with align_module_device(held[0]):
            matrix, bias = held[0].get_parameter("weight").T, held[0]._parameters.get("bias")
    if own == "W":
        return matrix
    return torch.zeros_like(matrix[0]) if bias is None else bias
