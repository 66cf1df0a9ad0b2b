"""Models that are spread over processes: what a process sees of one, and what it does not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..hooks import ArchitectureError

SPLIT = frozenset({"head", "kv_head", "d_head", "d_mlp", "expert"})
"""Axes that tensor parallelism cuts: a process holds its share of them, and nothing in it says so."""


def tensor_parallel(model: nn.Module) -> int:
    """Over how many processes each layer is spread; 1 where it is not."""
    size = getattr(model, "_tp_size", None)
    return size if isinstance(size, int) else 1


def needs_all(model: nn.Module) -> bool:
    """Whether a run of the model needs all processes at once, which hold its parameters together."""
    held = [*model.parameters(), *model.buffers()]
    return tensor_parallel(model) > 1 or any(isinstance(x, DTensor) for x in held)


def why_split(model: nn.Module) -> str:
    """Why a process cannot show what is cut; empty where nothing is."""
    ranks = tensor_parallel(model)
    if ranks == 1:
        return ""
    return (
        f"under tensor parallelism each of the {ranks} processes has its own part of it; points as wide as "
        "the model (the stream, norms, what attention and MLP make, logits) are whole everywhere. Load the "
        "model without tp_plan to read this"
    )


def is_split(model: nn.Module, path: str) -> bool:
    """Whether a process may have only its part of what a module reads or makes.

    So it is with modules the plan names, and with those beside them, which work on what these make.
    """
    if tensor_parallel(model) == 1:
        return False
    plan: Any = getattr(model, "_tp_plan", None) or {}
    parents = {
        name if style == "local_params" else name.rpartition(".")[0]
        for name, style in plan.items()
        if ".*." in name
    }
    own = _generic(path)
    return any(own.startswith(f"{parent}.") for parent in parents)


def own_parameter(module: nn.Module, name: str) -> Tensor | None:
    """A parameter of a module, or None. One that is spread over processes is gathered: all have to ask."""
    own = module._parameters.get(name)
    return own.full_tensor() if isinstance(own, DTensor) else own


def _generic(path: str) -> str:
    """A path with the indices of layers, experts and the like left open."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def check_whole(model: nn.Module) -> None:
    """Refuse a model of whose layers this process has only some.

    Raises:
        ArchitectureError: It is one stage of a pipeline.
    """
    stages = getattr(model, "_pp_size", None) or 1
    idle = [
        path for path, m in model.named_modules() if type(m).__name__ == "PipelineIdentityLayer"
    ]
    if stages > 1 or idle or getattr(model, "_pp_forward_wrapped", False):
        raise ArchitectureError(
            f"this process has one stage of a pipeline: {', '.join(idle[:3]) or 'other layers'} and others "
            "only hand on what they are given, and hooks on them would show that. Load the model with "
            "tp_plan or device_map instead, or whole in each process (data parallel)"
        )
