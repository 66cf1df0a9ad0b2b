"""What a storage holds: a followed tensor is known by its memory and strides, in whatever view."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class Axis(NamedTuple):
    """One dimension of what a storage holds: which of the original it is, its size and stride."""

    dim: int
    size: int
    stride: int


@dataclass(frozen=True)
class Held:
    """What a storage holds.

    Attributes:
        tensor: Keeps it alive: a storage's address is only good as long as it lives.
        names: Norms, or parameters.
        axes: The dimensions that are known; of a norm's output and of the stream the features only.
        offset: Where it begins.
    """

    tensor: Tensor
    names: frozenset[str]
    axes: tuple[Axis, ...]
    offset: int

    def dims(self, tensor: Tensor) -> dict[int, int]:
        """Which dimension of a view is which known one; only those the view has the whole of."""
        found: dict[int, int] = {}
        shift = int(tensor.storage_offset()) - self.offset
        for place, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            for axis in self.axes:
                begins = axis.stride and (shift // axis.stride) % axis.size == 0
                if size > 1 and stride == axis.stride and size == axis.size and begins:
                    found[place] = axis.dim
                    break
        return found


def features(tensor: Tensor, names: frozenset[str]) -> Held:
    """A tensor whose last dimension is features."""
    axis = Axis(0, int(tensor.shape[-1]), int(tensor.stride(-1)))
    return Held(tensor, names, (axis,), int(tensor.storage_offset()))


def is_last(held: Held, tensor: Tensor) -> bool:
    """Whether all features are the last dimension of a view."""
    return tensor.dim() > 0 and tensor.dim() - 1 in held.dims(tensor)


def storage_of(tensor: Tensor) -> int:
    """Which memory a tensor is in."""
    return tensor.untyped_storage()._cdata


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values and what they hold."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            found += tensors_in(value.values())
        elif isinstance(value, (tuple, list)):
            found += tensors_in(value)
    return found
