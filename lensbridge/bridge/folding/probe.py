"""Whether the head, and the values and queries of attentions, can be rewritten: tried on what they compute.

Each rewriting is a symmetry: a constant added to all logits leaves the log-probabilities, one added to the
values comes out of the pattern as it was, a matrix on the values of a head and its inverse behind the pattern
cancel, so do a matrix on queries and its inverse on keys. That is what is tried here, at the hook points,
before any weight is touched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...hooks import ArchitectureError, HookPoint, LensError
from ..architecture import Architecture, Attention
from ..seen import first_item
from .facts import is_linear
from .flow import Flow
from .step import REFACTOR, VALUES, Heads, NormFold, Step

Change = Callable[[Tensor], Tensor]


@runtime_checkable
class _Hooked(Protocol):
    def hooks(self, fwd_hooks: Any) -> Any: ...

    def why(self, name: str) -> str | None: ...

    def get_hook_point(self, name: str) -> HookPoint: ...


def plan_head(bridge: _Hooked, step: Step, run: Callable[[], Any]) -> None:
    """Take the head out of a plan if a constant added to all logits is not nothing.

    Args:
        bridge: Has the hook points.
        step: The step about the head.
        run: Runs the model on something small.
    """
    name = "unembed.hook_out"
    if not step.todo:
        return
    why = bridge.why(name)
    if why is None:
        random = torch.Generator().manual_seed(0)
        shifts: list[Tensor] = []

        def shift(logits: Float[Tensor, "..."], hook: HookPoint) -> Tensor:
            by = 4 + 4 * torch.rand(*logits.shape[:-1], 1, generator=random)
            shifts.append(by)
            return logits + by.to(logits)

        with torch.no_grad():
            plain = first_item(run())
            with bridge.hooks(fwd_hooks=[(name, shift)]):
                shifted = first_item(run())
        if isinstance(plain, Tensor) and isinstance(shifted, Tensor):
            left, right = plain.double().log_softmax(-1), shifted.double().log_softmax(-1)
            size = float(plain.double().abs().max()) + 8
            if not float((left - right).abs().max()) <= 10 * _eps(plain) * size:
                why = "a constant added to all logits changes the log-probabilities (a soft cap?)"
        else:
            why = "the model returns no logits"
    if why is not None:
        step.todo.clear()
        step.left["unembed"] = why


def plan_attentions(
    bridge: _Hooked,
    model: nn.Module,
    architecture: Architecture,
    flow: Flow,
    steps: dict[str, Step],
    run: Callable[[], Any],
) -> None:
    """Add the attentions to a plan.

    Args:
        bridge: Has the hook points.
        model: The Hugging Face model.
        architecture: Its parts.
        flow: What the watched run showed.
        steps: The plan; the two steps about attention are filled in.
        run: Runs the model on something small.
    """
    folded: list[NormFold] = steps["fold_ln"].todo
    told = _Told(model, flow, folded)
    values: dict[str, Heads] = {}
    pairs: dict[str, Heads] = {}
    for name, attn in _attentions(architecture, flow):
        if told.has_value_bias(attn):
            why = told.why_not_ov(attn) or told.why_not_biased(attn)
            if why:
                steps[VALUES].left[name] = why
            else:
                values[name] = Heads(name, attn)
        step = steps[REFACTOR]
        why_ov, why_qk = told.why_not_ov(attn, alone=True), told.why_not_qk(attn)
        if why_ov:
            step.left[f"{name} (OV)"] = why_ov
        if why_qk and attn.is_rotary:
            step.notes[f"{name} (QK)"] = why_qk
        elif why_qk:
            step.left[f"{name} (QK)"] = why_qk
        if not why_ov or not why_qk:
            pairs[name] = Heads(name, attn, qk=not why_qk, ov=not why_ov)
    probe = _Probe(bridge, run)
    for name, why in probe.constants(values).items():
        del values[name]
        steps[VALUES].left[name] = why
    for name, why in probe.matrices(pairs, "ov").items():
        pairs[name] = replace(pairs[name], ov=False)
        steps[REFACTOR].left[f"{name} (OV)"] = why
    for name, why in probe.matrices(pairs, "qk").items():
        pairs[name] = replace(pairs[name], qk=False)
        steps[REFACTOR].left[f"{name} (QK)"] = why
    steps[VALUES].todo = list(values.values())
    steps[REFACTOR].todo = [heads for heads in pairs.values() if heads.qk or heads.ov]


def _attentions(architecture: Architecture, flow: Flow) -> list[tuple[str, Attention]]:
    """The attentions the run passed, each module once."""
    found: dict[str, tuple[str, Attention]] = {}
    for tower in architecture.towers:
        for index, block in enumerate(tower.blocks):
            for branch in (*block.branches, *block.inner):
                part = branch.part
                inside = isinstance(part, Attention) and any(
                    name.startswith(part.path + ".") for name in flow.touched
                )
                if isinstance(part, Attention) and inside and part.path not in found:
                    found[part.path] = (f"{tower.prefix}blocks.{index}.{branch.name}", part)
    return list(found.values())


@dataclass
class _Told:
    """What can be told without a run.

    Attributes:
        model: The Hugging Face model.
        flow: What the watched run showed.
        folded: The norms that are going to be folded.
    """

    model: nn.Module
    flow: Flow
    folded: list[NormFold]
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            self.counts[id(parameter)] = self.counts.get(id(parameter), 0) + 1

    def has_value_bias(self, attn: Attention) -> bool:
        """Whether values have a constant part, or will have when the norms are folded."""
        if attn.v is None:
            return False
        module = self.model.get_submodule(attn.v.path)
        bias = module._parameters.get("bias")
        if bias is None:
            return False
        fed = any(
            read.parameter == f"{attn.v.path}.weight" and not fold.keeps_bias
            for fold in self.folded
            if self.model.get_submodule(fold.norm.path)._parameters.get("bias") is not None
            for read in fold.reads
        )
        if fed or attn.v.split is None:
            return fed or bool((bias != 0).any())
        rows = rows_of(attn.v, attn.n_key_value_heads, attn.d_head_v)
        return bool((bias[rows.flatten()] != 0).any())

    def why_not_linear(self, path: str | None, role: str) -> str:
        """Why a layer's rows cannot be rewritten; empty when they can."""
        if path is None:
            return f"it has no layer that makes {role} alone"
        module = self.model.get_submodule(path)
        if not is_linear(module):
            return f"{path} is a {type(module).__name__}, not a plain linear layer"
        weight = f"{path}.weight"
        if self.counts[id(module._parameters["weight"])] > 1:
            return f"{weight} is shared"
        used = {read.dim for read in self.flow.partners if read.parameter == weight}
        if len(used) != 1 or self.flow.uses.get(weight):
            return f"{weight} has another use"
        return ""

    def why_not_ov(self, attn: Attention, alone: bool = False) -> str:
        """Why values and output cannot be rewritten together; empty when they can."""
        if attn.v is None:
            return attn.absent.get("v", "it has no layer that makes v alone")
        if alone and attn.n_heads != attn.n_key_value_heads:
            return "its heads share values in groups"
        return self.why_not_linear(attn.v.path, "v") or self.why_not_linear(attn.o, "its output")

    def why_not_biased(self, attn: Attention) -> str:
        """Why the output projection can take no constant; empty when it can."""
        bias = self.model.get_submodule(str(attn.o))._parameters.get("bias")
        if bias is None:
            return f"{attn.o} has no bias to take it"
        return f"{attn.o}.bias is shared" if self.counts[id(bias)] > 1 else ""

    def why_not_qk(self, attn: Attention) -> str:
        """Why queries and keys cannot be rewritten together; empty when they can."""
        if attn.q is None or attn.k is None:
            return "it has no layers that make q and k alone"
        if attn.q_norm is not None or attn.k_norm is not None:
            return "its queries and keys are normalised"
        if attn.is_rotary:
            return "its queries and keys change between projection and product (rotary positions)"
        if attn.n_heads != attn.n_key_value_heads:
            return "its heads share keys in groups"
        return self.why_not_linear(attn.q.path, "q") or self.why_not_linear(attn.k.path, "k")


def rows_of(projection: Any, n_heads: int, width: int) -> Tensor:
    """Which features of a layer each head of a projection is, [head, width]."""
    if projection.split is None:
        return torch.arange(n_heads * width).reshape(n_heads, width)
    sizes, groups = projection.split.sizes, projection.split.groups
    start = sum(sizes[: projection.index])
    inside = torch.arange(start, start + sizes[projection.index])
    return (torch.arange(groups)[:, None] * sum(sizes) + inside).reshape(n_heads, width)


class _Probe:
    """Runs in which a symmetry is tried."""

    def __init__(self, bridge: _Hooked, run: Callable[[], Any]) -> None:
        self.bridge = bridge
        self.run = run
        self.plain: dict[str, Tensor] = {}
        self.answer = torch.empty(0)
        self.random = torch.Generator().manual_seed(0)

    def constants(self, found: dict[str, Heads]) -> dict[str, str]:
        """Attentions out of which a constant added to all values does not come as it went in."""
        before: dict[str, Change] = {}
        behind: dict[str, Change] = {}
        for name, heads in found.items():
            attn = heads.attn
            constant = self.draw(attn.n_key_value_heads, attn.d_head_v)
            spread = constant.repeat_interleave(attn.n_heads // attn.n_key_value_heads, 0)
            before[f"{name}.v.hook_out"] = _adding(constant)
            behind[name] = _adding(-spread)
        why = "a constant added to every value does not come out of its pattern as it went in (a sink?)"
        return self.compare(before, behind, why)

    def matrices(self, found: dict[str, Heads], pair: str) -> dict[str, str]:
        """Attentions in which a matrix and its inverse do not cancel."""
        before: dict[str, Change] = {}
        behind: dict[str, Change] = {}
        for name, heads in found.items():
            if not getattr(heads, pair):
                continue
            attn = heads.attn
            width = attn.d_head_v if pair == "ov" else attn.d_head
            there, back = self.matrix(attn.n_heads, width)
            if pair == "ov":
                before[f"{name}.v.hook_out"] = _times(there)
                behind[name] = _times(back)
            else:
                before[f"{name}.q.hook_out"] = _times(there)
                before[f"{name}.k.hook_out"] = _times(back.mT)
                behind[name] = _same
        what = "values" if pair == "ov" else "queries and keys"
        return self.compare(before, behind, f"a matrix on its {what} and its inverse do not cancel")

    def matrix(self, n_heads: int, width: int) -> tuple[Tensor, Tensor]:
        """Well-conditioned matrices, not orthogonal, and their inverses: [head, width, width] each."""
        turn = torch.linalg.qr(self.draw(n_heads, width, width))[0]
        size = 0.8 + 0.2 * self.draw(n_heads, 1, width).tanh()
        return turn * size, (turn / size).mT

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def compare(
        self, before: dict[str, Change], behind: dict[str, Change], why: str
    ) -> dict[str, str]:
        """The attentions whose z is another one when something is done before and undone behind."""
        failed: dict[str, str] = {}
        for name in list(behind):
            points = [n for n in before if n.startswith(f"{name}.")]
            absent = next((w for n in (*points, f"{name}.o.hook_in") if (w := self.why_not(n))), "")
            if absent:
                failed[name] = absent
                del behind[name]
                for point in points:
                    del before[point]
        wrong = self.tried(list(behind), before, behind, why)
        if len(behind) > 1 and None in wrong.values():  # it shows only behind them all: one by one
            wrong = {}
            for name in behind:
                wrong |= self.tried([name], before, behind, why)
        more = "something besides its pattern reads what would be changed"
        return failed | {name: told or more for name, told in wrong.items()}

    def tried(
        self, names: list[str], before: dict[str, Change], behind: dict[str, Change], why: str
    ) -> dict[str, str | None]:
        """Which attentions are changed, and why; None where z alone does not show it."""
        if not names:
            return {}
        own = {n: change for n, change in before.items() if n.rsplit(".", 2)[0] in names}
        try:
            if not self.plain.keys() >= set(names):
                self.plain, self.answer = self.z_of({}, dict.fromkeys(behind, _same), {})
            changed, answer = self.z_of(own, {name: behind[name] for name in names}, self.plain)
        except (LensError, RuntimeError) as error:
            return dict.fromkeys(names, None if len(names) > 1 else str(error))
        if _error(answer, self.answer) > 100 * _eps(self.answer):
            return dict.fromkeys(names, None)
        return {
            name: why
            for name in names
            if _error(changed[name], self.plain[name]) > 100 * _eps(changed[name])
        }

    def why_not(self, name: str) -> str:
        """Why a point shows no heads; empty when it does."""
        why = self.bridge.why(name)
        if why is not None:
            return f"{name} is not there: {why}"
        axes = self.bridge.get_hook_point(name).axes.split()
        return "" if len(axes) > 1 and axes[-2].endswith("head") else f"{name} is not given by head"

    def z_of(
        self, before: dict[str, Change], behind: dict[str, Change], instead: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What each output projection would read, and the answer; it reads what is given instead."""
        seen: dict[str, Tensor] = {}

        def at(name: str, change: Change) -> Callable[[Tensor, HookPoint], Tensor]:
            def hook(z: Float[Tensor, "..."], hook: HookPoint) -> Tensor:
                seen[name] = change(z).clone()
                return instead.get(name, z)

            return hook

        hooks: list[tuple[str, Any]] = [
            (name, lambda x, hook, change=change: change(x)) for name, change in before.items()
        ]
        hooks += [(f"{name}.o.hook_in", at(name, change)) for name, change in behind.items()]
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=hooks):
            answer = first_item(self.run())
        if not isinstance(answer, Tensor):
            raise ArchitectureError("the model returns no tensor to compare")
        return seen, answer


def _same(x: Tensor) -> Tensor:
    return x


def _adding(constant: Tensor) -> Change:
    return lambda x: x + constant.to(x)


def _times(matrices: Tensor) -> Change:
    return lambda x: torch.einsum("...hd,hde->...he", x, matrices.to(x))


def _error(left: Tensor, right: Tensor) -> float:
    """How far apart two values are, by the size of the second (constants added are about one)."""
    size = float(right.double().abs().max())
    error = float((left.double() - right.double()).abs().max())
    return float("inf") if math.isnan(error) else error / max(size, 0.1)


def _eps(tensor: Tensor) -> float:
    """Rounding of a value; models work in float32 here and there whatever their dtype."""
    return max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
