"""What a watched run shows: the calls of modules, what their tensors are sums of, where those came from.

Two things are known of every tensor. Its *terms*: a linear combination of named sources. Its *roots*: what it
was last computed from - layers with weights (and which of their features), attention, layer inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Terms = dict[str, float]
"""A linear combination: source -> coefficient. A source scaled by a parameter of the model is written
``"source * parameter"``."""


@dataclass(frozen=True)
class Root:
    """Something a tensor was computed from.

    Attributes:
        path: A layer with weights; ``"into <layer>"`` for a residual stream; ``"attended <n>"`` and
            ``"product <n>"`` for what attention makes.
        features: Which output features of that layer: (first, ((how many, step), ...)); None for all.
    """

    path: str
    features: tuple[int, tuple[tuple[int, int], ...]] | None = None


TIMES = " * "
BIAS = "bias "
Roots = frozenset[Root]
NO_ROOTS: Roots = frozenset()


@dataclass
class Visit:
    """One call of a module.

    Attributes:
        path: Which module.
        began, ended: When, counted in module calls begun and ended.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        output: What it returned.
        terms_in: Its first tensor argument as a combination of sources, when it was called.
        terms_out: Its (first) output likewise.
        roots_in: What its tensor arguments were computed from.
        versions: In-place versions of the first tensor going in and the one coming out, at that time.
        softmaxes: How many were computed inside.
    """

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    began: int = 0
    ended: int = 0
    output: Any = None
    terms_in: Terms | None = None
    terms_out: Terms | None = None
    roots_in: Roots = NO_ROOTS
    versions: tuple[int, int] = (0, 0)
    softmaxes: int = 0

    @property
    def value(self) -> Any:
        """The output, or the first item of it."""
        return first_item(self.output)

    @property
    def entering(self) -> Any:
        """The first tensor it was called with."""
        return first_tensor(self.args, self.kwargs)

    def is_overwritten(self, side: str) -> bool:
        """Whether the model changed that tensor in place after the module got or returned it."""
        tensor = self.entering if side == "input" else self.value
        then = self.versions[0 if side == "input" else 1]
        return isinstance(tensor, Tensor) and version_of(tensor) != then


@dataclass(frozen=True)
class Operand:
    """A tensor on its way into a product: what it came from, what it is a sum of, its shape."""

    roots: Roots
    terms: Terms
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Attended:
    """One softmax attention.

    Attributes:
        q, k, v: What was multiplied.
        square: Shape of the pattern.
        nth: Which softmax of each module that was running it is; empty for a fused attention.
        calls: The modules that were running, outermost first, and when each began, which tells calls of one
            module apart.
        is_plain: Whether q and k met in a plain product, [..., query, d] by [..., d, key].
        is_complete: Whether the product of pattern and values was seen as well.
    """

    q: Operand
    k: Operand
    v: Operand
    square: tuple[int, ...]
    nth: dict[str, int]
    calls: dict[str, int]
    is_plain: bool = True
    is_complete: bool = True


@dataclass(frozen=True)
class Trace:
    """What was seen.

    Attributes:
        visits: Calls by module path, in order.
        attended: Every attention by the source its result became.
        gated: Every product of two computed tensors of one shape, by the source it became: terms and roots
            of both.
        products: What the two operands of every other matrix product were computed from.
        routed: Modules that were running when something chose its k largest, with what it chose from.
        mixing: Modules that were running when positions were mixed other than by attention.
        summands: Ids of the tensors that were added up, scaled on the way or not.
        before: What each layer's input was a combination of, before it became a source of its own.
        answer: The model's first output as a combination of sources.
        verdicts: Filled as points are built on this run: what it says of each place.
    """

    visits: dict[str, list[Visit]]
    attended: dict[str, Attended]
    gated: dict[str, tuple[Terms, Roots, Terms, Roots]]
    products: dict[str, Roots]
    routed: list[tuple[tuple[str, ...], Roots]]
    mixing: frozenset[str]
    summands: frozenset[int]
    before: dict[str, Terms]
    answer: Terms = field(default_factory=dict)
    verdicts: dict[str, Any] = field(default_factory=dict)

    def one(self, path: str | None) -> Visit | None:
        """The call of a module that was called exactly once."""
        found = self.visits.get(path or "", [])
        return found[0] if len(found) == 1 else None

    def is_summand(self, tensor: Any) -> bool:
        """Whether the model went on adding to this very tensor."""
        return id(tensor) in self.summands


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return -1 if tensor.is_inference() else tensor._version


def first_item(value: Any) -> Any:
    """The value itself, or the first item of a tuple, list or Hugging Face output."""
    if isinstance(value, Mapping):
        return next(iter(value.values()), None)
    return value[0] if isinstance(value, (tuple, list)) and value else value


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor a module was called with."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def into(path: str, call: int = 0) -> str:
    """The name of the residual stream entering a layer."""
    return f"into {path}" if call == 0 else f"into {path} again {call}"


def has_weights(module: nn.Module) -> bool:
    """Whether a module is a single layer with a matrix of its own: linear, embedding, convolution..."""
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values()) and not any(
        part is not None and next(part.parameters(), None) is not None
        for part in module._modules.values()
    )


def widths_of(module: nn.Module) -> set[int]:
    """The widths a layer's matrices have, one of which its output has."""
    held = (p for p in module._parameters.values() if p is not None)
    return {size for p in held if p.dim() == 2 for size in p.shape}


def head_of(source: str) -> tuple[str, str]:
    """A source without the parameters it is scaled by, and those."""
    head, times, rest = source.partition(TIMES)
    return head, times + rest
