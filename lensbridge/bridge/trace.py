"""One small run of the model, watched: which modules ran, and which sums the residual stream is made of.

Tensors are followed as linear combinations of named sources: a sum adds them up, a multiplication by a
number scales them, a cast, reshape or idle dropout keeps them, and whatever else a model does makes a new
source. So "the block's output is its input plus what attention made plus what the MLP made" is read off
exactly, for any module tree, without comparing numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..hooks.tap import watch

Terms = dict[str, float]
"""A linear combination: source -> coefficient."""

_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_}
_MUL = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, Tensor.mul_}
_DIV = {torch.div, Tensor.div, Tensor.__truediv__, Tensor.__itruediv__, Tensor.div_}
_SAME = {
    Tensor.to,
    Tensor.type,
    Tensor.type_as,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.contiguous,
    Tensor.clone,
    torch.clone,
    Tensor.detach,
    Tensor.view,
    Tensor.view_as,
    Tensor.reshape,
    torch.reshape,
    Tensor.squeeze,
    Tensor.unsqueeze,
    Tensor.flatten,
    Tensor.transpose,
    torch.transpose,
    Tensor.permute,
    torch.permute,
    Tensor.swapaxes,
    Tensor.expand,
    Tensor.__getitem__,
}
_GROWS = {Tensor.expand}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax}
_PRODUCT = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_DROPOUT = {F.dropout, torch.dropout}


@dataclass
class Visit:
    """One call of a module.

    Attributes:
        path: Which module.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        terms_in: Its first tensor argument as a combination of sources, when it was called.
        terms_out: Its (first) output likewise.
        versions: In-place versions of the first tensor going in and the one coming out, at that time.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    terms_in: Terms | None = None
    terms_out: Terms | None = None
    versions: tuple[int, int] = (0, 0)

    @property
    def value(self) -> Any:
        """The output, or the first item of it."""
        return first_item(self.output)

    def is_overwritten(self, side: str) -> bool:
        """Whether the model changed that tensor in place after the module got or returned it."""
        tensor = first_tensor(self.args, self.kwargs) if side == "input" else self.value
        then = self.versions[0 if side == "input" else 1]
        return isinstance(tensor, Tensor) and version_of(tensor) != then


@dataclass(frozen=True)
class Trace:
    """What was seen.

    Attributes:
        visits: Calls by module path, in order.
        attending: Paths of modules during whose call a softmax attention happened.
        attended: Results of pattern times values, by source, and what the values were made of.
        verdicts: Filled as points are built on this run: why a point cannot be, and whether its tensor is
            overwritten later.
    """

    visits: dict[str, list[Visit]]
    attending: frozenset[str]
    attended: dict[str, Terms]
    verdicts: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def one(self, path: str | None) -> Visit | None:
        """The call of a module that was called exactly once."""
        found = self.visits.get(path or "", [])
        return found[0] if len(found) == 1 else None


class _Follower(TorchFunctionMode):
    """Follows tensors through a run."""

    def __init__(self) -> None:
        super().__init__()
        # The tensor is kept beside its terms: an id is only good while its object lives.
        self.known: dict[int, tuple[Tensor, Terms]] = {}
        self.stack: list[Visit] = []
        self.attending: set[str] = set()
        self.attended: dict[str, Terms] = {}
        self.count = 0

    def terms(self, tensor: Tensor) -> Terms:
        held = self.known.get(id(tensor))
        if held is None:
            self.count += 1
            return self.name(tensor, f"value {self.count}")
        return held[1]

    def name(self, tensor: Tensor, source: str) -> Terms:
        return self.keep(tensor, {source: 1.0})

    def keep(self, tensor: Tensor, terms: Terms) -> Terms:
        self.known[id(tensor)] = (tensor, terms)
        return terms

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Read before the call: it may be in place.
        terms = self.combined(func, args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            keeps = func not in _SAME or func in _GROWS or out.numel() == args[0].numel()
            if terms is not None and (keeps or self.is_pattern(args[0])):
                self.keep(out, terms)
            elif out.is_floating_point() and func not in _SAME and any(out is a for a in args):
                self.count += 1
                self.name(out, f"value {self.count}")  # changed in place by something unknown
            self.notice(func, args, kwargs, out)
        return out

    def is_pattern(self, tensor: Tensor) -> bool:
        """Whether this is a softmax's result, possibly with a sink column cut off."""
        return next(iter(self.terms(tensor)), "").startswith("pattern ")

    def combined(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Terms | None:
        """The result as a combination of sources, for the operations that keep one."""
        if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return None
        if func in _SAME:
            return self.terms(args[0])
        if func in _DROPOUT:
            training = kwargs.get("training", args[2] if len(args) > 2 else True)
            p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
            return self.terms(args[0]) if not training or p == 0 else None
        if len(args) < 2:
            return None
        left, right = args[0], args[1]
        if func in _ADD and isinstance(right, Tensor) and right.shape == left.shape:
            return _sum(self.terms(left), self.terms(right), float(kwargs.get("alpha", 1)))
        if func in _MUL or func in _DIV:
            factor = _number(right)
            if factor:
                by = factor if func in _MUL else 1.0 / factor
                return {source: value * by for source, value in self.terms(left).items()}
        return None

    def notice(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Tensor,
    ) -> None:
        """Recognise attention."""
        if func is F.scaled_dot_product_attention:
            self.attend(args[2] if len(args) > 2 else kwargs["value"], out)
        elif func in _SOFTMAX and out.dim() in (3, 4):
            self.count += 1
            self.name(out, f"pattern {self.count}")
            self.attending.update(visit.path for visit in self.stack)
        elif func in _PRODUCT and len(args) > 1 and self.is_pattern(args[0]):
            self.attend(args[1], out)

    def attend(self, values: Tensor, out: Tensor) -> None:
        self.count += 1
        self.attended[f"attended {self.count}"] = dict(self.terms(values))
        self.name(out, f"attended {self.count}")
        self.attending.update(visit.path for visit in self.stack)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _number(value: Any) -> float | None:
    if isinstance(value, Tensor):
        return None if value.numel() != 1 or value.device.type == "meta" else float(value)
    return float(value) if isinstance(value, (int, float)) else None


def _sum(left: Terms, right: Terms, alpha: float = 1.0) -> Terms:
    total = dict(left)
    for source, value in right.items():
        total[source] = total.get(source, 0.0) + alpha * value
    return total


def first_item(value: Any) -> Any:
    """The value itself, or the first item of a tuple, list or Hugging Face output."""
    if isinstance(value, Mapping):
        return next(iter(value.values()), None)
    return value[0] if isinstance(value, (tuple, list)) and value else value


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor a module was called with."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def trace(model: nn.Module, blocks: frozenset[str], run: Callable[[], Any]) -> Trace:
    """Watch one run.

    Args:
        model: The model.
        blocks: Paths of the layers; each one's input becomes a source of its own.
        run: Runs the model on something small.
    Returns:
        What was seen of every module.
    """
    follower = _Follower()
    visits: dict[str, list[Visit]] = {}

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        visit = Visit(path, args, kwargs)
        tensor = first_tensor(args, kwargs)
        if tensor is not None:
            visit.versions = (version_of(tensor), 0)
        if tensor is not None and tensor.is_floating_point():
            named = (
                follower.name(tensor, f"into {path}") if path in blocks else follower.terms(tensor)
            )
            visit.terms_in = dict(named)
        follower.stack.append(visit)

    def after(path: str, output: Any) -> None:
        visit = follower.stack.pop()
        visit.output = output
        value = visit.value
        if isinstance(value, Tensor):
            visit.versions = (visit.versions[0], version_of(value))
            if value.is_floating_point():
                visit.terms_out = dict(follower.terms(value))
        visits.setdefault(path, []).append(visit)

    modules = {path: module for path, module in model.named_modules() if path}
    with torch.no_grad(), watch(modules, before, after), follower:
        run()
    return Trace(visits, frozenset(follower.attending), follower.attended)
