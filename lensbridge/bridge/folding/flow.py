"""Who reads what in one run of a model: norms' outputs, parameters, and what linear layers write.

Every operation of the run is seen at the lowest level, below modules and functions. A tensor is known by its
storage and strides, so views need no rules; what copies, multiplies or adds has one; whatever else touches a
followed tensor is written down as a reader that nothing is known of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...hooks.tap import watch
from ..architecture import Norm
from ..seen import first_item, first_tensor
from .held import Axis, Held, features, is_last, storage_of, tensors_in

_aten = torch.ops.aten
_FRESH = {
    _aten.empty_like,
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.rand_like,
    _aten.randn_like,
    _aten.new_empty,
    _aten.new_zeros,
    _aten.new_ones,
    _aten.new_full,
    _aten.new_empty_strided,
}
_COPIES = {_aten.clone, _aten._to_copy, _aten.contiguous}
_PRODUCTS = {_aten.mm, _aten.bmm, _aten.matmul, _aten.linear, _aten._grouped_mm, _aten.mv}
_ADDING = {_aten.addmm, _aten.baddbmm}
_SUMS = {_aten.add, _aten.add_, _aten.sub, _aten.sub_}
_SCALES = {_aten.mul, _aten.mul_, _aten.div, _aten.div_}
_FILLS = {_aten.masked_fill, _aten.masked_fill_}


class Read(NamedTuple):
    """A parameter that a tensor was multiplied by, and which of its dimensions was summed over."""

    parameter: str
    dim: int


@dataclass
class Reading:
    """What happened to the output of one norm.

    Attributes:
        reads: The parameters it was multiplied by.
        others: Whatever else used it, in words.
        is_scaled: Whether it was multiplied by the same for all its features before it was read.
        is_answer: Whether it is what the model returns first.
        is_returned: Whether the model returns it besides.
    """

    reads: set[Read] = field(default_factory=set)
    others: dict[str, None] = field(default_factory=dict)
    is_scaled: bool = False
    is_answer: bool = False
    is_returned: bool = False


@dataclass
class Flow:
    """What one run showed.

    Attributes:
        norms: By path of the norm.
        partners: For each parameter's dimension that was summed over, the norms whose output it met; None
            stands for any other tensor.
        uses: Other uses of a parameter, in words.
        touched: Parameters that anything used.
        absorbed: Parameters whose product (or looked-up rows) reached a norm that subtracts the mean.
        spoiled: Parameters whose product was also used where its mean matters, and where.
    """

    norms: dict[str, Reading] = field(default_factory=dict)
    partners: dict[Read, set[str | None]] = field(default_factory=dict)
    uses: dict[str, dict[str, None]] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    absorbed: set[str] = field(default_factory=set)
    spoiled: dict[str, str] = field(default_factory=dict)


def flow_of(
    model: nn.Module, norms: Mapping[str, Norm], head: str | None, run: Callable[[], Any]
) -> Flow:
    """Watch one run.

    Args:
        model: The model.
        norms: Those to follow, by path.
        head: Path of the head, which writes no stream; it may share its matrix with an embedding, which does.
        run: Runs the model on something small.
    """
    watcher = _Watcher(model, norms, head)
    modules = {path: module for path, module in model.named_modules() if path}
    watching = watch(modules, watcher.before, watcher.after)
    with torch.inference_mode(False), torch.no_grad(), watching, watcher:
        out = run()
    watcher.end(out)
    return watcher.flow


class _Watcher(TorchDispatchMode):
    def __init__(self, model: nn.Module, norms: Mapping[str, Norm], head: str | None) -> None:
        super().__init__()
        self.norms = norms
        self.head = head
        self.flow = Flow(norms={path: Reading() for path in norms})
        self.stack: list[str] = []
        self.inside = 0  # of a followed norm
        self.normed: dict[int, Held] = {}
        self.written: dict[int, Held] = {}
        self.parameters: dict[int, Held] = {}
        for name, parameter in model.named_parameters():
            axes = (
                Axis(dim, size, stride)
                for dim, (size, stride) in enumerate(
                    zip(parameter.shape, parameter.stride(), strict=True)
                )
            )
            names = frozenset({name})
            other = self.parameters.get(storage_of(parameter))
            if other is not None:
                names |= other.names
                self.use(replace(other, names=names), "parameters share their memory")
            held = Held(parameter, names, tuple(axes), int(parameter.storage_offset()))
            self.parameters[storage_of(parameter)] = held

    # --- calls of modules ------------------------------------------------------------------------

    def before(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call begins."""
        self.stack.append(path)
        norm = self.norms.get(path)
        if norm is None:
            return
        tensor = first_tensor(args, kwargs)
        if tensor is not None and not self.inside:
            self.spend_norm(tensor, f"{path} reads it")
            held = self.written.get(storage_of(tensor))
            if held is not None and norm.center and norm.is_open and is_last(held, tensor):
                self.flow.absorbed |= held.names
            elif held is not None:
                self.spoil(held, f"{path} does not subtract the mean")
        self.inside += 1

    def after(self, path: str, output: Any) -> None:
        """A call is over."""
        self.stack.pop()
        if path not in self.norms:
            return
        self.inside -= 1
        value = first_item(output)
        if isinstance(value, Tensor) and value.dim() and not self.inside:
            held = self.written.pop(storage_of(value), None)
            if held is not None:
                self.spoil(held, f"{path} hands it on")
            self.normed[storage_of(value)] = features(value, frozenset({path}))

    def end(self, out: Any) -> None:
        """The run is over: what it returned."""
        answer = {id(tensor) for tensor in tensors_in([first_item(out)])}
        for tensor in tensors_in([out]):
            held = self.normed.get(storage_of(tensor))
            for name in held.names if held else ():
                reading = self.flow.norms[name]
                reading.is_answer |= id(tensor) in answer
                reading.is_returned |= id(tensor) not in answer
            held = self.written.get(storage_of(tensor))
            if held is not None:
                self.spoil(held, "the model returns it")

    # --- operations ------------------------------------------------------------------------------

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = tensors_in((*args, *kwargs.values()))
        is_followed = False
        for tensor in given:
            at = storage_of(tensor)
            held = self.parameters.get(at)
            if held is not None:
                self.flow.touched |= held.names
            is_followed |= held is not None or at in self.normed or at in self.written
        if is_followed and not self.inside:
            self.see(func, args, given, out)
        return out

    def see(self, func: Any, args: tuple[Any, ...], given: list[Tensor], out: Any) -> None:
        """An operation on something followed."""
        kind = func.overloadpacket
        made = tensors_in([out])
        if kind in _FRESH or (not made and not func._schema.is_mutable):
            return
        held = {storage_of(tensor) for tensor in given}
        if not func._schema.is_mutable and all(storage_of(tensor) in held for tensor in made):
            return  # a view
        where = f"{kind.__name__} in {self.stack[-1] if self.stack else 'the model'}"
        if kind in _COPIES and len(made) == 1:
            self.copy(args[0], made[0], 0)
        elif kind is _aten.index and _is_leading(args):
            count = len(args[1])
            table = self.parameters.get(storage_of(args[0]))
            if table is not None and len(table.axes) == 2:
                self.look_up(args[0], made[0])
            else:
                self.copy(args[0], made[0], made[0].dim() - args[0].dim(), skip=count)
        elif kind is _aten.index_select:
            self.copy(args[0], made[0], 0, skip=args[1], only=True)
        elif kind is _aten.repeat and self.normed.get(storage_of(args[0])) and args[1][-1] == 1:
            self.copy(args[0], made[0], made[0].dim() - args[0].dim(), skip=args[0].dim() - 1)
        elif kind is _aten.cat and self.joined(args, made[0]):
            return
        elif kind in _PRODUCTS or kind in _ADDING:
            self.product(kind, given, made[0], where)
        elif kind is _aten.embedding:
            if storage_of(args[0]) in self.parameters:
                self.look_up(args[0], made[0])
            else:
                for tensor in given:
                    self.spend(tensor, where)
        else:
            self.reckon(kind, args, given, made, where)

    def copy(self, old: Tensor, new: Tensor, shift: int, skip: int = 0, only: bool = False) -> None:
        """The same values elsewhere, dimension for dimension; those that were indexed are not known."""
        for known in (self.normed, self.written, self.parameters):
            held = known.get(storage_of(old))
            if held is None:
                continue
            dims = held.dims(old)
            axes = tuple(
                Axis(dims[place], int(old.shape[place]), int(new.stride(place + shift)))
                for place in dims
                if (place != skip if only else place >= skip)
            )
            known[storage_of(new)] = Held(new, held.names, axes, int(new.storage_offset()))

    def joined(self, args: tuple[Any, ...], out: Tensor) -> bool:
        """Whether rows of one norm's output were put together."""
        parts, dim = args[0], args[1] if len(args) > 1 else 0
        first = parts[0]
        held = self.normed.get(storage_of(first))
        last = first.dim() - 1
        if held is None or dim % first.dim() == last or not is_last(held, first):
            return False
        for part in parts:
            other = self.normed.get(storage_of(part))
            if other is None or other.names != held.names or not is_last(other, part):
                return False
        self.normed[storage_of(out)] = features(out, held.names)
        return True

    def product(self, kind: Any, given: list[Tensor], out: Tensor, where: str) -> None:
        """A matrix product: does a parameter meet a norm's output along its features?"""
        pair = given[1:3] if kind in _ADDING else given[:2]
        for tensor in given:
            if all(tensor is not x for x in pair):
                self.spend(tensor, where)
        if len(pair) != 2:
            for tensor in pair:
                self.spend(tensor, where)
            return
        left, right = pair
        summed = (left.dim() - 1, right.dim() - (1 if kind in (_aten.linear, _aten.mv) else 2))
        for this, that, mine, yours in ((left, right, *summed), (right, left, *summed[::-1])):
            held = self.parameters.get(storage_of(this))
            if held is None:
                continue
            dim = held.dims(this).get(mine)
            name = next(iter(held.names))
            if dim is None:
                self.use(held, where)
                self.spend_norm(that, where)
                continue
            normed = self.normed.get(storage_of(that))
            is_whole = normed is not None and yours in normed.dims(that)
            read = Read(name, dim)
            partners = self.flow.partners.setdefault(read, set())
            if normed is not None and is_whole:
                partners |= normed.names
                for norm in normed.names:
                    self.flow.norms[norm].reads.add(read)
            else:
                partners.add(None)
                self.spend_norm(that, where)
            self.write(held, this, dim, out)
        if not any(storage_of(x) in self.parameters for x in pair):
            for tensor in pair:
                self.spend_norm(tensor, where)
        for tensor in pair:
            self.spend_written(tensor, where)

    def write(self, held: Held, weight: Tensor, dim: int, out: Tensor) -> None:
        """A whole matrix made something, whose features are the matrix's other dimension."""
        if self.stack and self.stack[-1] == self.head:
            return
        if len(held.axes) == 2 and weight.dim() == 2 and len(held.dims(weight)) == 2:
            other = next(axis for axis in held.axes if axis.dim != dim)
            if out.dim() and out.shape[-1] == other.size:
                self.written[storage_of(out)] = features(out, held.names)

    def look_up(self, table: Tensor, out: Tensor) -> None:
        """Rows of an embedding."""
        held = self.parameters[storage_of(table)]
        for name in held.names:
            self.flow.uses.setdefault(name, {})["embedding"] = None
        if held.dims(table).get(table.dim() - 1) == 1 and len(held.axes) == 2:
            self.written[storage_of(out)] = features(out, held.names)

    def reckon(
        self, kind: Any, args: tuple[Any, ...], given: list[Tensor], made: list[Tensor], where: str
    ) -> None:
        """Sums and scales of the stream, norms of it; everything else is a reader nothing is known of."""
        for tensor in given:
            held = self.parameters.get(storage_of(tensor))
            if held is None:
                continue
            if kind in _SUMS and len(held.axes) == 2 and tensor.dim() >= 2:
                self.look_up(tensor, tensor)  # a table of positions, added as it is
            else:
                self.use(held, where)
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if kind in _SCALES and first is not None and self.is_scaling(first, args[1], made[0]):
            held = self.normed[storage_of(first)]
            self.normed[storage_of(made[0])] = features(made[0], held.names)
            for name in held.names:
                self.flow.norms[name].is_scaled = True
            return
        kept = self.stream_after(kind, args, made)
        for tensor in given:
            self.spend_norm(tensor, where)
            if kept is None:
                self.spend_written(tensor, where)
        for tensor in made:
            self.normed.pop(storage_of(tensor), None)
            self.written.pop(storage_of(tensor), None)
        if kept:
            self.written[storage_of(made[0])] = features(made[0], kept)

    def is_scaling(self, tensor: Tensor, by: Any, out: Tensor) -> bool:
        """Whether a norm's output is multiplied by something that is the same for all its features."""
        held = self.normed.get(storage_of(tensor))
        return held is not None and out is not tensor and is_last(held, tensor) and _is_one(by)

    def stream_after(
        self, kind: Any, args: tuple[Any, ...], made: list[Tensor]
    ) -> frozenset[str] | None:
        """Whose writing a result still holds, mean and all; None where the mean of something is lost."""
        if not made or not made[0].dim():
            return None
        if kind is _aten.native_layer_norm:
            held = self.written.get(storage_of(args[0]))
            if held is None or len(args[1]) != 1 or not is_last(held, args[0]):
                return None
            self.flow.absorbed |= held.names
            return frozenset()
        if kind in _SUMS:
            names: frozenset[str] = frozenset()
            for value in args[:2]:
                held = self.written.get(storage_of(value)) if isinstance(value, Tensor) else None
                if held is not None:
                    if not is_last(held, value) or value.shape[-1] != made[0].shape[-1]:
                        return None
                    names |= held.names
            return names
        if kind in _SCALES or kind in _FILLS:
            held = self.written.get(storage_of(args[0]))
            by = args[1]
            others = [x for x in args[1:] if isinstance(x, Tensor)]
            if held is None or not is_last(held, args[0]):
                # The stream may stand on the right of a product.
                if kind in _SCALES and isinstance(by, Tensor) and held is None:
                    return self.scaled(by, args[0])
                return None
            if any(storage_of(x) in self.written or not _is_one(x) for x in others):
                return None
            return held.names
        return None

    def scaled(self, stream: Tensor, by: Any) -> frozenset[str] | None:
        held = self.written.get(storage_of(stream))
        if held is None or not is_last(held, stream) or not _is_one(by):
            return None
        return held.names

    # --- notes -----------------------------------------------------------------------------------

    def use(self, held: Held, where: str) -> None:
        """A parameter was used in a way that is not a product along a dimension."""
        for name in held.names:
            self.flow.uses.setdefault(name, {})[where] = None

    def spend(self, tensor: Tensor, where: str) -> None:
        """A reader nothing is known of."""
        held = self.parameters.get(storage_of(tensor))
        if held is not None:
            self.use(held, where)
        self.spend_norm(tensor, where)
        if held is None:
            self.spend_written(tensor, where)

    def spend_norm(self, tensor: Tensor, where: str) -> None:
        """The same, of a norm's output."""
        held = self.normed.get(storage_of(tensor))
        for name in held.names if held is not None else ():
            self.flow.norms[name].others[where] = None

    def spend_written(self, tensor: Tensor, where: str) -> None:
        """The same, of what a linear layer wrote."""
        held = self.written.get(storage_of(tensor))
        if held is not None:
            self.spoil(held, where)

    def spoil(self, held: Held, where: str) -> None:
        """The mean of what these parameters write matters."""
        for name in held.names:
            self.flow.spoiled.setdefault(name, where)


def _is_one(value: Any) -> bool:
    """Whether something is the same for all features: a number, or a tensor with one in that dimension."""
    if isinstance(value, Tensor):
        return value.dim() == 0 or value.shape[-1] == 1
    return isinstance(value, (int, float))


def _is_leading(args: tuple[Any, ...]) -> bool:
    """Whether only the first dimensions are indexed."""
    indices = args[1]
    return len(indices) < args[0].dim() and all(isinstance(x, Tensor) for x in indices)
