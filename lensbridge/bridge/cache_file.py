"""A cache in a file: safetensors, with what is no tensor in its header. Nothing is ever unpickled."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ..hooks import HookPoint, HookRegistry, InputError, PointError
from .files import read_tensors, write_tensors
from .slicing import pos_dim
from .whole import Whole

KIND = "lensbridge activation cache"
_GRAD = "_grad"


def write_cache(
    path: str | os.PathLike[str],
    registry: HookRegistry,
    values: dict[str, Tensor],
    beside: dict[str, Tensor | None],
    facts: dict[str, Any],
) -> None:
    """Write a cache's file, whole or not at all.

    Args:
        path: Where.
        registry: The points of the model.
        values: The tensors, in order.
        beside: Mask and tokens.
        facts: What else the cache is made of.
    """
    owner = registry.owner
    tensors = {f"value/{name}": value for name, value in values.items()}
    tensors.update({name: value for name, value in beside.items() if value is not None})
    known = {"kind": KIND, "names": list(values), "layers": _layers(registry)}
    model = owner.kind if isinstance(owner, Whole) else None
    write_tensors(Path(path), tensors, {**facts, **known, "model": model})


def read_cache(
    path: str | os.PathLike[str], registry: HookRegistry
) -> tuple[dict[str, Tensor], dict[str, Tensor | None], dict[str, Any]]:
    """Read what `write_cache` wrote, if it can be of a model.

    Args:
        path: Where.
        registry: The points of the model.
    Returns:
        The tensors in their order, mask and tokens, and the other facts.
    Raises:
        FileNotFoundError: No such file.
        InputError: No such cache, or one of another model; says what does not fit.
    """
    tensors, facts = read_tensors(Path(path), KIND)
    layers, whose = _layers(registry), facts["model"] or "a model"
    if facts["layers"] != layers:
        raise InputError(
            f"{path} is a cache of {whose} with {facts['layers']} layers, and this model has {layers}"
        )
    values = {name: tensors.pop(f"value/{name}") for name in facts["names"]}
    for name, value in values.items():
        bare = name if name in registry else name.removesuffix(_GRAD)
        try:
            point = registry[bare]
        except PointError as error:
            raise InputError(
                f"{path} is a cache of {whose}, which is another model than this: {error}"
            ) from error
        why = _differs(point, value, facts["has_batch_dim"])
        if why:
            raise InputError(f"{path} is a cache of {whose}, which is another model: {name} {why}")
    return values, {name: tensors.get(name) for name in ("mask", "tokens")}, facts


def _layers(registry: HookRegistry) -> int:
    start = f"{registry.layers}."
    return len({name.split(".")[1] for name in registry if name.startswith(start)})


def _differs(point: HookPoint, value: Tensor, has_batch_dim: bool) -> str:
    """How a tensor is not one of a point's; empty where it may be."""
    axes = point.axes.split()
    if not {"pos", "query"} & set(axes):
        return ""  # images and the like, and places of the caller's own naming
    position = axes[pos_dim(point.axes)]
    if not has_batch_dim:
        axes = axes[1:]
    if value.dim() == len(axes) - 1:  # one position was picked
        axes.remove(position)
    fits = value.dim() == len(axes) and all(
        point.sizes.get(axis, size) == size for axis, size in zip(axes, value.shape, strict=True)
    )
    sizes = " ".join(f"{a}={point.sizes[a]}" if a in point.sizes else a for a in axes)
    return "" if fits else f"is {list(value.shape)} there and [{sizes}] here"
