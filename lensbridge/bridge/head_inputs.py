"""What each head reads: a copy of the residual stream for every head, edited one head at a time.

The model computes no such copies; they exist while somebody listens. An edit is carried out where the
projection makes its output: each head's share is computed again from that head's own copy. Listening for
gradients counts as an edit: the gradient then flows through the copies, past the norm's and projection's own
points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hooks import Action, Call, Tap
from .architecture import Projection
from .places import get_input, get_output, projection_output, take_share

_ALL = "all heads"


class HeadInputs:
    """The head inputs of one attention layer.

    Args:
        norm: The norm between the residual stream and the projections.
    """

    def __init__(self, norm: nn.Module) -> None:
        self.norm = norm
        self.edited: dict[str, Tensor] = {}

    def tap(self, part: str | None, n: int) -> Tap:
        """The stream as the heads of q, k or v read it (None: all three), [batch, pos, head, d_model]."""
        parts = ("q", "k", "v") if part is None else (part,)

        def read(call: Call) -> Tensor:
            if _ALL in call.scratch:
                return call.scratch[_ALL]
            for name in parts:
                self.edited.pop(name, None)  # of a call that was interrupted
            x = get_input(call)
            return x.unsqueeze(-2).expand(*x.shape[:-1], n, x.shape[-1]).clone()

        def write(call: Call, value: Tensor) -> None:
            if part is None:
                call.scratch[_ALL] = value
            for name in parts:
                self.edited[name] = value

        return Tap("input", read, write)

    def action(self, part: str, projection: Projection, heads: tuple[int, int]) -> Action:
        """Give each head of a projection what it makes of its own input."""
        place = projection_output(projection, heads)

        def apply(call: Call) -> None:
            value = self.edited.pop(part, None)
            if value is None:
                return
            every = get_output(
                Call(call.module, (), {}, call.module.forward(self.norm.forward(value)))
            )
            if projection.split is not None:
                every = take_share(every, projection.split, projection.index)
            # every[..., i, :] is what all heads would make of head i's input; head i's own part is wanted.
            own = every.unflatten(-1, heads).diagonal(dim1=-3, dim2=-2).movedim(-1, -2)
            place.write(call, own if torch.is_grad_enabled() else own.contiguous())

        return Action(apply)
