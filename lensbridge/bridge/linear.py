"""A linear layer of an architecture, or its share of a joint one, in the shapes of the field."""

from __future__ import annotations

from torch import Tensor, nn

from ..hooks import ArchitectureError
from .architecture import Block, Projection, Tower
from .matrix import first_float, linear_map
from .places import take_share
from .seen import Visit


class Linear:
    """A linear layer, or a share of a joint one.

    Args:
        model: The Hugging Face model.
        tower, block: Where the layer belongs; None for one outside the layers.
        path: Its module path.
        share: Which share of its output; None for all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        tower: Tower,
        block: Block | None,
        path: str,
        share: Projection | None = None,
    ) -> None:
        self.model = model
        self.module = model.get_submodule(path)
        self.width = entering_width(visit_of(tower, block, path))
        self.split = None if share is None else share.split
        self.index = 0 if share is None else share.index

    def maps(self) -> tuple[Tensor, Tensor | None]:
        """The whole layer: [d_in, d_out] and [d_out]."""
        return linear_map(self.module, self.width, first_float(self.model))

    def weight(self) -> Tensor:
        """[d_in, d_out]."""
        return self.own(self.maps()[0])

    def bias(self) -> Tensor:
        """[d_out]; zeros where the layer has none."""
        weight, bias = self.maps()
        return self.own(weight.new_zeros(weight.shape[1]) if bias is None else bias)

    def own(self, x: Tensor) -> Tensor:
        """This share of what the layer makes."""
        return x if self.split is None else take_share(x, self.split, self.index)

    def heads(self, x: Tensor, n: int, d: int) -> Tensor:
        """[..., d_out] as [..., n, d], a view where the heads are evenly spaced."""
        split = self.split
        if (
            split is not None
            and split.groups > 1
            and (split.groups, split.sizes[self.index]) == (n, d)
        ):
            runs = x.unflatten(-1, (n, sum(split.sizes)))
            return runs.narrow(-1, sum(split.sizes[: self.index]), d)
        own = self.own(x)
        if own.shape[-1] != n * d:
            raise ArchitectureError(
                f"{type(self.module).__name__} makes {own.shape[-1]} features, not {n} heads of {d}"
            )
        return own.unflatten(-1, (n, d))

    def heads_in(self, n: int, d: int) -> Tensor:
        """[n, d_in, d]."""
        return self.heads(self.maps()[0], n, d).transpose(0, 1)

    def heads_bias(self, n: int, d: int) -> Tensor:
        """[n, d]."""
        weight, bias = self.maps()
        return weight.new_zeros(n, d) if bias is None else self.heads(bias, n, d)

    def heads_out(self, n: int, d: int) -> Tensor:
        """[n, d, d_out]."""
        weight = self.weight()
        if weight.shape[0] != n * d:
            raise ArchitectureError(
                f"{type(self.module).__name__} reads {weight.shape[0]} features, not {n} heads of {d}"
            )
        return weight.unflatten(0, (n, d))


def visit_of(tower: Tower, block: Block | None, path: str | None) -> Visit | None:
    """The call of a module, in the watched run, that belongs to a layer."""
    visits = [] if tower.seen is None else tower.seen.visits.get(path or "", [])
    if block is None:
        return visits[0] if visits else None
    return visits[block.call] if block.call < len(visits) else None


def entering_width(visit: Visit | None) -> int | None:
    """How wide the tensor is that a module was called with."""
    entering = None if visit is None else visit.entering
    return int(entering.shape[-1]) if isinstance(entering, Tensor) and entering.dim() else None
