"""Splice: a coder put into a model at a point, with points of its own."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from torch import Tensor

from .errors import HookValueError, InputError
from .point import HookPoint, Listener, attach, discard
from .registry import HookRegistry

Code = Callable[[Tensor], Tensor]
"""Rows in, rows out: [n, d] -> [n, concept], or back."""

PARTS = ("hook_in", "hook_acts", "hook_error", "hook_out")
"""What a splice shows, in the order in which it shows it."""


class Splice:
    """A coder (a sparse autoencoder, say) at a hook point.

    What passes the point is encoded, decoded again, and goes on as the reconstruction, with or without what
    the coder missed. Behind the point's name come ``.sae.hook_in`` (what is encoded), ``.sae.hook_acts``
    [batch, pos, concept], ``.sae.hook_error`` (what the reconstruction misses, without a graph) and
    ``.sae.hook_out`` (what goes on), to be read, edited and cached like any other point.

    With the error nothing changes until something is edited: the value that goes on is then the model's own,
    bit for bit, and while nobody listens nothing is computed.

    Args:
        registry: The points of the model.
        at: Where.
        encode, decode: The coder, on rows.
        width: How wide its rows are.
        include_error: Whether what the reconstruction misses is added again.
        name: What to call it in names; ``"sae"`` unless several stand at one point.
    Raises:
        InputError: The point is none that has rows of features.
        PointError: The name is taken there.
    """

    def __init__(
        self,
        registry: HookRegistry,
        at: HookPoint,
        encode: Code,
        decode: Code,
        width: int,
        *,
        include_error: bool = True,
        name: str = "sae",
    ) -> None:
        if not name.isidentifier():
            raise InputError(f"name= is one word of a dotted name, got {name!r}")
        if at.is_index or "pos" not in at.axes.split():
            raise InputError(
                f"a coder takes features of positions, and {at.name} shows [{at.axes or '?'}]"
            )
        self.registry = registry
        self.at = at
        self.encode = encode
        self.decode = decode
        self.width = width
        self.include_error = include_error
        self.points = [self._point(name, part) for part in PARTS]
        registry.add_behind(at, self.points)
        self._listener = Listener(self._pass, at, is_permanent=True)
        # In front: who listens at the point sees what goes on, whenever they came.
        attach([self._listener], prepend=True)

    def _point(self, name: str, part: str) -> HookPoint:
        axes = "batch pos concept" if part == "hook_acts" else self.at.axes
        names = [f"{own}.{name}.{part}" for own in (self.at.name, *self.at.aliases)]
        return HookPoint(names[0], tuple(names[1:]), axes=axes)

    def __repr__(self) -> str:
        error = "with" if self.include_error else "without"
        return f"Splice({self.points[1].name}, {error} its error)"

    # --- life ------------------------------------------------------------------------------------

    def remove(self) -> None:
        """Take the coder out again, its points and whoever listens there; doing it twice is harmless."""
        discard([self._listener])
        self.registry.drop(self.points)

    def __enter__(self) -> Splice:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    # --- running ---------------------------------------------------------------------------------

    def _pass(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        into, acts_at, error_at, out_at = self.points
        if self.include_error and not any(point.fwd or point.bwd for point in self.points):
            return None
        entering = into.fire(value)
        x = value if entering is None else entering
        acts = self._coded(x)
        error = None
        if self.include_error:
            with torch.no_grad():
                error = x - self._decoded(acts, x)
        edited = acts_at.fire(acts)
        shown = None if error is None else error_at.fire(error)
        if error is not None and entering is None and edited is None and shown is None:
            out = value  # the model's own, not a sum that is almost it
        else:
            out = self._decoded(acts if edited is None else edited, x)
            if error is not None:
                out = out + (error if shown is None else shown)
        left = out_at.fire(out)
        made = out if left is None else left
        return None if made is value and left is None else made

    def _rows(self, x: Tensor) -> Tensor:
        """Rows of the coder's width: heads lie side by side if it was made for all of them."""
        if x.shape[-1] == self.width:
            return x.reshape(-1, self.width)
        if x.dim() == 4 and x.shape[-2] * x.shape[-1] == self.width:  # [batch, pos, head, d_head]
            return x.reshape(-1, self.width)
        raise HookValueError(
            f"the coder at {self.at.name} takes rows of {self.width}, and {list(x.shape)} passes there"
        )

    def _coded(self, x: Tensor) -> Tensor:
        return self.encode(self._rows(x)).unflatten(0, x.shape[:2])

    def _decoded(self, acts: Tensor, like: Tensor) -> Tensor:
        return self.decode(acts.flatten(0, 1)).to(like.dtype).reshape(like.shape)
