"""Following the tensors of a run: what each operation does to what is known of them.

A sum adds terms up, a multiplication by a number scales them, a cast, reshape or idle dropout keeps them;
whatever else a model does makes a new source. Roots are gathered from all operands, and start anew at layers
with weights, at attention, and where a tensor is the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .attention import ADDING_PRODUCTS, PRODUCTS, SOFTMAX
from .seen import (
    BIAS,
    NO_ROOTS,
    TIMES,
    Attended,
    Operand,
    Root,
    Roots,
    Terms,
    Visit,
    head_of,
)

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
_FILLED = {torch.masked_fill, Tensor.masked_fill, Tensor.masked_fill_}
_BOUNDED = {torch.clamp, Tensor.clamp, Tensor.clamp_}
_GROWS = {Tensor.expand, Tensor.repeat_interleave, torch.repeat_interleave}
_DROPOUT = {F.dropout, torch.dropout}
_TOPK = {torch.topk, Tensor.topk}
_ASKS = {Tensor.__bool__, Tensor.__contains__}
_SAME_SHAPE = {
    F.layer_norm,
    F.rms_norm,
    F.gelu,
    F.silu,
    torch.tanh,
    torch.rsqrt,
    Tensor.neg,
    torch.pow,
    Tensor.pow,
    Tensor.__pow__,
}
_BINARY = {torch.add, Tensor.add, Tensor.__add__, torch.mul, Tensor.mul, Tensor.__mul__}
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


class Follower(TorchFunctionMode):
    """Follows tensors through a run."""

    def __init__(self, constants: dict[int, str]) -> None:
        super().__init__()
        self.constants = constants
        # Tensors are kept beside what is known of them: an id is only good while its object lives.
        self.known: dict[int, tuple[Tensor, Terms]] = {}
        self.rooted: dict[int, tuple[Tensor, Roots]] = {}
        self.bases: dict[int, tuple[Tensor, str, str]] = {}
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
        """A tensor as a combination of sources; a new one where nothing is known of it."""
        held = self.known.get(id(tensor))
        if held is not None:
            return held[1]
        return self.name(tensor, self.new_source())

    def new_source(self, kind: str = "value") -> str:
        """A source nobody has had yet."""
        self.count += 1
        return f"{kind} {self.count}"

    def name(self, tensor: Tensor, source: str) -> Terms:
        """Make a tensor a source of its own."""
        return self.keep(tensor, {source: 1.0})

    def keep(self, tensor: Tensor, terms: Terms) -> Terms:
        """Remember what a tensor is a sum of."""
        self.known[id(tensor)] = (tensor, terms)
        return terms

    def roots(self, tensor: Tensor) -> Roots:
        """What a tensor came from; of a view of a layer's output, which features."""
        if not tensor.numel():
            return NO_ROOTS
        base = self.bases.get(_storage(tensor))
        if base is not None:
            return frozenset({Root(base[1], _features(tensor, base[0]))})
        filled = self.filled.get(_storage(tensor))
        if filled is not None:
            return filled[1]
        held = self.rooted.get(id(tensor))
        return NO_ROOTS if held is None else held[1]

    def root(self, tensor: Tensor, roots: Roots) -> None:
        """Remember what a tensor came from."""
        self.bases.pop(_storage(tensor), None)
        self.rooted[id(tensor)] = (tensor, roots)

    def base(self, tensor: Tensor, path: str, label: str = "") -> None:
        """A layer with weights made this tensor (or, with another label, the features of it)."""
        if tensor.dim() and tensor.stride(-1) == 1:
            self.bases[_storage(tensor)] = (tensor, path, label or path)
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
            roots = NO_ROOTS
        elif func in _COPIED_INTO:
            target = args[0]
            self.filled[_storage(target)] = (target, self.roots(target) | roots)
        out = _shape_only(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            if func in _BOUNDED and len(roots) == 1 and out.shape == args[0].shape:
                # Feature by feature, so they keep their places; but not their values.
                root = next(iter(roots))
                if root.features is None and _storage(args[0]) in self.bases:
                    self.base(out, root.path, f"{root.path} bounded")
            if func in _EXPANDS and id(args[0]) in self.constants:
                self.name(out, f"{BIAS}{self.constants[id(args[0])]}")
            elif func in _CASTS and id(args[0]) in self.constants:
                self.constants[id(out)] = self.constants[id(args[0])]
                self.kept.append(out)
            elif _is_number(out):
                self.note(func, args, out, terms, roots)
                self.notice(func, args, kwargs, out)
        elif isinstance(out, (tuple, list)) and roots:
            for part in out:
                if isinstance(part, Tensor) and _is_number(part):
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
        changed = func not in _SAME and any(out is a for a in args)
        if changed:
            self.bases.pop(_storage(out), None)
        if terms is not None and self.is_whole(func, args, out):
            self.keep(out, terms)
        elif changed:
            self.name(out, self.new_source())  # changed in place by something unknown
        elif id(out) not in self.known and (base := self.bases.get(_storage(out))) is not None:
            # A view of part of a layer's features: the same part has the same name each time.
            self.name(out, f"{base[2]}[{_features(out, base[0])}]")
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
        return self.is_pattern(args[0])  # with a sink column cut off it is still the pattern

    def is_pattern(self, tensor: Tensor) -> bool:
        """Whether this is a softmax's result over a product of two computed tensors."""
        return next(iter(self.terms(tensor)), "").startswith("pattern ")

    def gathered(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Roots:
        """Everything the operands came from."""
        found: Roots = NO_ROOTS
        for value in _tensors((*args, *kwargs.values())):
            if _is_number(value):
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
        if func in _SAME or (func in _FILLED and self.is_pattern(args[0])):
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
        both = id(left) in self.known and id(right) in self.known
        return both and 2 <= right.dim() <= left.dim()

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
                self.operand(q),
                self.operand(k),
                self.operand(v),
                square,
                {},
                self.calls(),
            )
            self.attend(made, v, out)
        elif func in SOFTMAX:
            self.softmax(args[0] if args else kwargs["input"], out)
        elif func in PRODUCTS:
            operands = [x for x in _tensors((*args, *kwargs.values())) if x.dim() >= 3]
            operands = operands[1:] if func in ADDING_PRODUCTS else operands
            if len(operands) == 2:
                self.product(operands[0], operands[1], out, func is not torch.einsum)

    def product(self, left: Tensor, right: Tensor, out: Tensor, is_plain: bool) -> None:
        """A matrix product: of a pattern with values, or of two computed tensors."""
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
        """What is known of a tensor that enters a product."""
        return Operand(self.roots(tensor), dict(self.terms(tensor)), tuple(tensor.shape))

    def softmax(self, x: Tensor, out: Tensor) -> None:
        """A softmax over a product of two computed tensors is a pattern."""
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
            q,
            k,
            Operand(NO_ROOTS, {}, ()),
            tuple(out.shape),
            nth,
            self.calls(),
            is_plain,
            False,
        )
        self.name(out, name)
        self.root(out, frozenset({Root(name)}))

    def calls(self) -> dict[str, int]:
        """When the modules that are running began."""
        return {visit.path: visit.began for visit in self.stack}

    def attend(self, pattern: Attended, v: Tensor, out: Tensor) -> None:
        """A pattern met its values."""
        name = self.new_source("attended")
        self.attended[name] = replace(
            pattern, calls=self.calls(), v=self.operand(v), is_complete=True
        )
        self.name(out, name)
        self.root(out, frozenset({Root(name)}))


def _shape_only(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Tensor | None:
    """What an operation gives on the meta device, where that is clear from the shapes; None where it is not.

    PyTorch finds out by decomposing the operation in Python, a hundred times slower.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.device.type != "meta" or not x.is_floating_point():
        return None
    if func is F.scaled_dot_product_attention and len(args) >= 3:
        return x.new_empty((*x.shape[:-1], args[2].shape[-1]))
    if func in _SAME_SHAPE and not kwargs.get("inplace"):
        return torch.empty_like(x)
    if func in _BINARY and len(args) == 2:
        other = args[1]
        if isinstance(other, float):
            return torch.empty_like(x)
        if isinstance(other, Tensor) and other.dtype == x.dtype and other.device == x.device:
            if other.shape == x.shape:
                return torch.empty_like(x)
            return x.new_empty(torch.broadcast_shapes(x.shape, other.shape))
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return x.new_empty((args[1].shape[0], args[2].shape[1]))
    return None


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


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
