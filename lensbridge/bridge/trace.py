"""One small run of the model, watched: which modules ran, what each tensor is a sum of, where it came from.

Two things are known of every tensor. Its *terms*: a linear combination of named sources - a sum adds them up,
a multiplication by a number scales them, a cast, reshape or idle dropout keeps them, whatever else a model
does makes a new source. And its *roots*: the layers with weights (and which of their features), attention
results or layer inputs it was last computed from. So "the output is the input plus what attention made plus
what the MLP made" and "these features of that layer are the queries" are read off exactly, for any module
tree, without comparing numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..hooks.tap import watch

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
_NONE: Roots = frozenset()

_ADD = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, Tensor.add_}
_SUB = {torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__isub__, Tensor.sub_}
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
    torch.squeeze,
    Tensor.unsqueeze,
    torch.unsqueeze,
    Tensor.flatten,
    torch.flatten,
    Tensor.unflatten,
    Tensor.transpose,
    torch.transpose,
    Tensor.permute,
    torch.permute,
    Tensor.movedim,
    torch.movedim,
    Tensor.swapaxes,
    Tensor.expand,
    Tensor.repeat_interleave,
    torch.repeat_interleave,
    Tensor.__getitem__,
}
_CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16}
_EXPANDS = {Tensor.expand, Tensor.expand_as}
_GROWS = {Tensor.expand, Tensor.repeat_interleave, torch.repeat_interleave}
_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_MATMUL = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm}
_ADDING_MATMUL = {torch.baddbmm, Tensor.baddbmm}
_PRODUCT = _MATMUL | _ADDING_MATMUL | {torch.einsum}
_DROPOUT = {F.dropout, torch.dropout}
_TOPK = {torch.topk, Tensor.topk}
_ASKS = {Tensor.__bool__, Tensor.__contains__}
_COPIED_INTO = {Tensor.copy_, Tensor.__setitem__}
_FRESH = {
    Tensor.new_empty,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_full,
    torch.empty_like,
    torch.zeros_like,
    torch.ones_like,
    torch.full_like,
}
# What lets one position see another, besides attention.
_MIXING = {
    torch.conv1d,
    F.conv1d,
    torch.conv2d,
    F.conv2d,
    F.pad,
    F.fold,
    F.avg_pool2d,
    torch.cumsum,
    Tensor.cumsum,
    torch.roll,
    torch.fft.fft,
    torch.fft.fftn,
    torch.fft.rfft2,
    torch.fft.rfft,
}


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
    roots_in: Roots = _NONE
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
        within: Modules that were running, outermost first.
        q, k, v: What was multiplied.
        square: Shape of the pattern.
        nth: Which softmax of each module that was running it is; empty for a fused attention.
        is_plain: Whether q and k met in a plain product, [..., query, d] by [..., d, key].
        is_complete: Whether the product of pattern and values was seen as well.
    """

    within: tuple[str, ...]
    q: Operand
    k: Operand
    v: Operand
    square: tuple[int, ...]
    nth: dict[str, int]
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


class _Follower(TorchFunctionMode):
    """Follows tensors through a run."""

    def __init__(self, constants: dict[int, str]) -> None:
        super().__init__()
        self.constants = constants
        # Tensors are kept beside what is known of them: an id is only good while its object lives.
        self.known: dict[int, tuple[Tensor, Terms]] = {}
        self.rooted: dict[int, tuple[Tensor, Roots]] = {}
        self.bases: dict[int, tuple[Tensor, str]] = {}
        self.products: dict[str, tuple[Operand, Operand, bool]] = {}
        self.patterns: dict[str, Attended] = {}
        self.stack: list[Visit] = []
        self.attended: dict[str, Attended] = {}
        self.gated: dict[str, tuple[Terms, Roots, Terms, Roots]] = {}
        self.filled: dict[int, tuple[Tensor, Roots]] = {}
        self.routed: list[tuple[tuple[str, ...], Roots]] = []
        self.mixing: set[str] = set()
        self.kept: list[Tensor] = []
        self.summands: set[int] = set()
        self.stream = ""
        self.count = 0

    # --- what is known of a tensor ---------------------------------------------------------------

    def terms(self, tensor: Tensor) -> Terms:
        held = self.known.get(id(tensor))
        if held is not None:
            return held[1]
        return self.name(tensor, self.new_source())

    def new_source(self, kind: str = "value") -> str:
        self.count += 1
        return f"{kind} {self.count}"

    def name(self, tensor: Tensor, source: str) -> Terms:
        return self.keep(tensor, {source: 1.0})

    def keep(self, tensor: Tensor, terms: Terms) -> Terms:
        self.known[id(tensor)] = (tensor, terms)
        return terms

    def roots(self, tensor: Tensor) -> Roots:
        if not tensor.numel():
            return _NONE
        base = self.bases.get(_storage(tensor))
        if base is not None:
            return frozenset({Root(base[1], _features(tensor, base[0]))})
        filled = self.filled.get(_storage(tensor))
        if filled is not None:
            return filled[1]
        held = self.rooted.get(id(tensor))
        return _NONE if held is None else held[1]

    def root(self, tensor: Tensor, roots: Roots) -> None:
        self.bases.pop(_storage(tensor), None)
        self.rooted[id(tensor)] = (tensor, roots)

    def base(self, tensor: Tensor, path: str) -> None:
        """A layer with weights made this tensor."""
        if tensor.dim() and tensor.stride(-1) == 1:
            self.bases[_storage(tensor)] = (tensor, path)
        else:
            self.root(tensor, frozenset({Root(path)}))

    def enter(self, tensor: Tensor, source: str) -> None:
        """This tensor is the residual stream entering a layer."""
        self.name(tensor, source)
        self.root(tensor, frozenset({Root(source)}))
        self.stream = source

    # --- what an operation does to it ------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ASKS and args[0].device.type == "meta":
            # A mask asks whether anything is masked; either way the layers are the same.
            return func is not Tensor.__contains__
        # Read before the call: it may be in place.
        terms = self.combined(func, args, kwargs)
        roots = self.gathered(func, args, kwargs)
        if func in _FRESH:
            roots = _NONE
        elif func in _COPIED_INTO:
            target = args[0]
            self.filled[_storage(target)] = (target, self.roots(target) | roots)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if func in _EXPANDS and id(args[0]) in self.constants:
                self.name(out, f"{BIAS}{self.constants[id(args[0])]}")
            elif func in _CASTS and id(args[0]) in self.constants:
                self.constants[id(out)] = self.constants[id(args[0])]
                self.kept.append(out)
            elif out.is_floating_point():
                self.note(func, args, out, terms, roots)
                self.notice(func, args, kwargs, out)
        elif isinstance(out, (tuple, list)) and roots:
            for part in out:
                if isinstance(part, Tensor) and part.is_floating_point():
                    self.note(func, args, part, None, roots)
            if func in _TOPK:
                self.routed.append((tuple(visit.path for visit in self.stack), roots))
        return out

    def note(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        out: Tensor,
        terms: Terms | None,
        roots: Roots,
    ) -> None:
        """Keep what is known of a result."""
        changed = any(out is a for a in args)
        if changed:
            self.bases.pop(_storage(out), None)
        if terms is not None and self.is_whole(func, args, out):
            self.keep(out, terms)
        elif changed and func not in _SAME:
            self.name(out, self.new_source())  # changed in place by something unknown
        elif id(out) not in self.known and (base := self.bases.get(_storage(out))) is not None:
            # A view of part of a layer's features: the same part has the same name each time.
            self.name(out, f"{base[1]}[{_features(out, base[0])}]")
        if any(
            head_of(source)[0] == self.stream for source in (self.known.get(id(out)) or (0, ()))[1]
        ):
            roots = frozenset({Root(self.stream)})
        if changed or _storage(out) not in self.bases:
            self.rooted[id(out)] = (out, roots)

    def is_whole(self, func: Callable[..., Any], args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether a result holds all of what its terms speak of."""
        if func not in _SAME or func in _GROWS or out.numel() == args[0].numel():
            return True
        # A softmax's result with a sink column cut off is still the pattern.
        return next(iter(self.terms(args[0])), "").startswith("pattern ")

    def gathered(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Roots:
        found: Roots = _NONE
        for value in _tensors((*args, *kwargs.values())):
            if value.is_floating_point():
                found |= self.roots(value)
        if found and func in _MIXING:
            self.mixing.update(visit.path for visit in self.stack)
        return found

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
        if (func in _ADD or func in _SUB) and self.adds_up(left, right):
            self.summands |= {id(left), id(right)}
            sign = 1.0 if func in _ADD else -1.0
            return _sum(self.terms(left), self.terms(right), sign * float(kwargs.get("alpha") or 1))
        if func in _MUL or func in _DIV:
            name = self.constants.get(id(right)) if func in _MUL else None
            if name is not None:
                self.summands.add(id(left))
                return {f"{source}{TIMES}{name}": c for source, c in self.terms(left).items()}
            name = self.constants.get(id(left)) if func in _MUL else None
            if name is not None and isinstance(right, Tensor) and right.is_floating_point():
                self.summands.add(id(right))
                return {f"{source}{TIMES}{name}": c for source, c in self.terms(right).items()}
            factor = _number(right)
            if factor:
                self.summands.add(id(left))
                by = factor if func in _MUL else 1.0 / factor
                return {source: value * by for source, value in self.terms(left).items()}
        return None

    def adds_up(self, left: Tensor, right: Any) -> bool:
        """Whether two things are values to be followed through their sum: no biases, no masks."""
        if not isinstance(right, Tensor) or not right.is_floating_point():
            return False
        if right.shape == left.shape:
            return True
        if _squeezed(right) == _squeezed(left):
            return True
        # Positions are the same for every row.
        return right.dim() == left.dim() and id(left) in self.known and id(right) in self.known

    # --- attention -------------------------------------------------------------------------------

    def notice(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        out: Tensor,
    ) -> None:
        """Recognise attention, fused or written out."""
        if func in _MUL and len(args) > 1 and isinstance(args[1], Tensor):
            left, right = args[0], args[1]
            if left.shape == right.shape and (self.roots(left) or self.roots(right)):
                sides = self.terms(left), self.roots(left), self.terms(right), self.roots(right)
                source = next(iter(self.terms(out)))
                self.gated[source] = (dict(sides[0]), sides[1], dict(sides[2]), sides[3])
        elif func is F.scaled_dot_product_attention:
            q, k, v = (
                args[i] if len(args) > i else kwargs[name]
                for i, name in enumerate(("query", "key", "value"))
            )
            square = (*q.shape[:-1], k.shape[-2])
            made = Attended(
                self.within(), self.operand(q), self.operand(k), self.operand(v), square, {}
            )
            self.attend(made, v, out)
        elif func in _SOFTMAX:
            self.softmax(args[0] if args else kwargs["input"], out)
        elif func in _PRODUCT:
            operands = [x for x in _tensors((*args, *kwargs.values())) if x.dim() >= 3]
            operands = operands[1:] if func in _ADDING_MATMUL else operands
            if len(operands) == 2:
                self.product(operands[0], operands[1], out, func is not torch.einsum)

    def product(self, left: Tensor, right: Tensor, out: Tensor, is_plain: bool) -> None:
        for operand, other in ((left, right), (right, left)):
            source = next(iter(self.terms(operand)), "")
            if source.startswith("pattern "):
                self.attend(self.patterns[source], other, out)
                return
        roots = self.roots(left), self.roots(right)
        if all(roots):
            self.mixing.update(visit.path for visit in self.stack)
            name = self.new_source("product")
            self.products[name] = (self.operand(left), self.operand(right), is_plain)
            self.root(out, frozenset({Root(name)}))

    def operand(self, tensor: Tensor) -> Operand:
        return Operand(self.roots(tensor), dict(self.terms(tensor)), tuple(tensor.shape))

    def softmax(self, x: Tensor, out: Tensor) -> None:
        nth = {visit.path: visit.softmaxes for visit in self.stack}
        for visit in self.stack:
            visit.softmaxes += 1
        made = [root.path for root in self.roots(x) if root.path.startswith("product ")]
        if not made or out.dim() not in (3, 4):
            return
        # Relative positions add products of their own, and come second.
        q, k, is_plain = self.products[min(made, key=lambda name: int(name.split()[1]))]
        name = self.new_source("pattern")
        self.patterns[name] = self.attended[name] = Attended(
            self.within(), q, k, Operand(_NONE, {}, ()), tuple(out.shape), nth, is_plain, False
        )
        self.name(out, name)
        self.root(out, frozenset({Root(name)}))

    def within(self) -> tuple[str, ...]:
        return tuple(visit.path for visit in self.stack)

    def attend(self, pattern: Attended, v: Tensor, out: Tensor) -> None:
        name = self.new_source("attended")
        self.attended[name] = replace(
            pattern, within=self.within(), v=self.operand(v), is_complete=True
        )
        self.name(out, name)
        self.root(out, frozenset({Root(name)}))


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """A shape without the ones it begins with."""
    shape = tuple(tensor.shape)
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _features(tensor: Tensor, whole: Tensor) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """Which features (last dimension) of ``whole`` a view of it holds; None for all of them."""
    width = whole.shape[-1]
    if tensor.numel() == whole.numel() or width == 1:
        return None
    first = int(tensor.storage_offset() - whole.storage_offset()) % width
    dims = [
        (size, step)
        for size, step in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and 0 < step < width
    ]
    count = 1
    for size, _ in dims:
        count *= size
    return None if count == width else (first, tuple(sorted(dims, key=lambda x: -x[1])))


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


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among values, and in the lists among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def first_item(value: Any) -> Any:
    """The value itself, or the first item of a tuple, list or Hugging Face output."""
    if isinstance(value, Mapping):
        return next(iter(value.values()), None)
    return value[0] if isinstance(value, (tuple, list)) and value else value


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first tensor a module was called with."""
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


def trace(
    model: nn.Module, blocks: frozenset[str], run: Callable[[], Any], root: str = ""
) -> Trace:
    """Watch one run.

    Args:
        model: The model.
        blocks: Paths of the layers; each one's input becomes a source of its own.
        run: Runs the model on something small.
        root: Where the model is in a larger one; all paths are given from there.
    Returns:
        What was seen of every module.
    """
    start = f"{root}." if root else ""
    held = [*model.named_parameters(), *model.named_buffers()]
    follower = _Follower({id(x): start + name for name, x in held if x.is_floating_point()})
    visits: dict[str, list[Visit]] = {}
    before_blocks: dict[str, Terms] = {}
    modules = {start + path: module for path, module in model.named_modules() if path}
    weighted = {path for path, module in modules.items() if has_weights(module)}
    clock = [0]
    entered: dict[str, int] = {}

    def before(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        clock[0] += 1
        visit = Visit(path, args, kwargs, clock[0])
        tensor = first_tensor(args, kwargs)
        if tensor is not None:
            visit.versions = (version_of(tensor), 0)
        if tensor is not None and tensor.is_floating_point():
            if path in blocks:
                source = into(path, entered.get(path, 0))
                entered[path] = entered.get(path, 0) + 1
                before_blocks[source] = dict(follower.terms(tensor))
                follower.enter(tensor, source)
            visit.terms_in = dict(follower.terms(tensor))
            visit.roots_in = follower.roots(tensor)
        follower.stack.append(visit)

    def after(path: str, output: Any) -> None:
        visit = follower.stack.pop()
        clock[0] += 1
        visit.ended = clock[0]
        visit.output = output
        value = visit.value
        if isinstance(value, Tensor):
            visit.versions = (visit.versions[0], version_of(value))
            if value.is_floating_point():
                if path in weighted:
                    if value is visit.entering:
                        follower.name(value, follower.new_source())
                    follower.base(value, path)
                visit.terms_out = dict(follower.terms(value))
        visits.setdefault(path, []).append(visit)

    with torch.no_grad(), watch(modules, before, after), follower:
        answer = first_item(run())
    return Trace(
        visits,
        follower.attended,
        follower.gated,
        {name: left.roots | right.roots for name, (left, right, _) in follower.products.items()},
        follower.routed,
        frozenset(follower.mixing),
        frozenset(follower.summands),
        before_blocks,
        dict(follower.terms(answer)) if isinstance(answer, Tensor) else {},
    )


def into(path: str, call: int = 0) -> str:
    """The name of the residual stream entering a layer."""
    return f"into {path}" if call == 0 else f"into {path} again {call}"


def has_weights(module: nn.Module) -> bool:
    """Whether a module is a single layer with a matrix of its own: linear, embedding, convolution..."""
    return any(p is not None and p.dim() >= 2 for p in module._parameters.values()) and not any(
        part is not None and next(part.parameters(), None) is not None
        for part in module._modules.values()
    )


def head_of(source: str) -> tuple[str, str]:
    """A source without the parameters it is scaled by, and those."""
    head, times, rest = source.partition(TIMES)
    return head, times + rest
