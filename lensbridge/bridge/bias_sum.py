"""What biases alone add to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from ..hooks import AbsentPointError, ArchitectureError
from .architecture import Attention, Block, Branch, Mixer, Mlp
from .linear import visit_of
from .matrix import first_float
from .parameters import WeightTable
from .whole import Whole


class BiasSum:
    """Adds up the output biases of layers.

    Args:
        whole: The model and its architecture.
        weights: Its weights.
    """

    def __init__(self, whole: Whole, weights: WeightTable) -> None:
        self.whole = whole
        self.tower = whole.architecture.main
        self.weights = weights

    def up_to(self, index: int, *, mlp_input: bool, include_mlp_biases: bool) -> Tensor:
        """What has come together where a layer, or its MLP, reads the stream; [d_model]."""
        held: Tensor | None = None
        for at, block in enumerate(self.tower.blocks[: index + mlp_input]):
            for branch in block.branches if at < index else before_mlp(block):
                is_mlp = isinstance(branch.part, Mlp)
                if is_mlp and not include_mlp_biases:
                    own = self.nothing()
                else:
                    own = self.added(f"{self.tower.prefix}blocks.{at}", block, branch)
                before = torch.zeros_like(own) if held is None else held.to(own.device)
                before = self.scaled(before, branch.skip, branch.skip_by)
                held = before + self.scaled(own, branch.scale, branch.scale_by)
                for name in branch.bias:
                    held = held + self.whole.parameter(name).to(held.device)
        return self.nothing() if held is None else held

    def added(self, home: str, block: Block, branch: Branch) -> Tensor:
        """What the biases of a branch's last layer add, [d_model]."""
        why = self.tower.unproved or block.unproved
        if branch.place != "before" or branch.ln_post is not None or block.ln_out is not None:
            why = why or "a norm stands between what a layer adds and the stream"
        if why:
            raise self.refused(home, why)
        part, name = branch.part, f"{home}.{branch.name}"
        if isinstance(part, Mlp) and part.router is not None:
            return self.none_of_experts(name, part)
        if isinstance(part, Attention):
            last, bias = part.o, f"{name}.b_O"
        elif isinstance(part, Mixer):
            last, bias = dict(part.parts).get("out"), f"{name}.out.b"
        else:
            last, bias = part.out, f"{name}.b_out"
        try:
            value: Tensor = self.weights.read(bias)
        except AbsentPointError as error:
            raise self.refused(home, str(error)) from error
        leaving = branch.adds or branch.makes or part.path
        ends = visit_of(self.tower, block, leaving), visit_of(self.tower, block, last)
        if (
            leaving != last
            and value.any()
            and (ends[0] is None or ends[1] is None or ends[0].terms_out != ends[1].terms_out)
        ):
            raise self.refused(home, f"what {last} makes is changed before it is added")
        return value

    def none_of_experts(self, name: str, part: Mlp) -> Tensor:
        """Zeros, if the experts have no biases; with biases, which count depends on the token."""
        names = [f"{name}.b_out"] + [f"{name}.shared.b_out"] * (part.shared is not None)
        try:
            values = [self.weights.read(own) for own in names]
        except (AbsentPointError, ArchitectureError) as error:
            raise self.refused(name, str(error)) from error
        if any(bool(value.any()) for value in values):
            raise self.refused(name, "how much of an expert's bias is added depends on the router")
        return torch.zeros_like(values[0][0])

    def refused(self, where: str, why: str) -> AbsentPointError:
        """The exception for a layer whose biases do not add up."""
        return AbsentPointError(f"the biases of {where} are not simply added to the stream: {why}")

    def scaled(self, value: Tensor, factor: float, by: tuple[str, ...]) -> Tensor:
        """A term of a sum as it enters it."""
        for name in by:
            value = value * self.whole.parameter(name).to(value.device)
        return value if factor == 1.0 else value * factor

    def nothing(self) -> Tensor:
        """Zeros as wide as the stream."""
        width = None
        if self.tower.blocks:
            visit = visit_of(self.tower, self.tower.blocks[0], self.tower.blocks[0].path)
            width = None if visit is None else getattr(visit.entering, "shape", (None,))[-1]
        if width is None:
            raise AbsentPointError(f"it is not known how wide the stream is: {self.tower.unproved}")
        return first_float(self.whole.model).new_zeros(width)


def before_mlp(block: Block) -> tuple[Branch, ...]:
    """What a layer has added when its MLP reads the stream: nothing of what runs beside that."""
    branches = block.branches
    first = next((i for i, b in enumerate(branches) if isinstance(b.part, Mlp)), len(branches))
    while 0 < first < len(branches) and branches[first].joins:
        first -= 1
    return branches[:first]
