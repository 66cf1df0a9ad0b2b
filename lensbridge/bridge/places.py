"""Places: the taps that points are made of, each a pair of read and write on one module call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from ..hooks import Action, ArchitectureError, Call, Tap
from . import norm as norms
from .architecture import Norm, Projection, Split
from .graft import graft
from .matrix import bias_of, plain_weight
from .seen import first_item

# --- the whole tensor -----------------------------------------------------------------------------------


@cache
def _first_parameter(kind: Any) -> str:
    names = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
    return names[0] if names else ""


def _kind(module: nn.Module) -> Any:
    return type(module)  # Any: to mypy, a class of modules is not hashable


def get_input(call: Call) -> Tensor:
    """The hidden state a module was called with: its first argument, by position or by name."""
    if call.args:
        return call.args[0]
    name = _first_parameter(_kind(call.module))
    if name not in call.kwargs:
        raise ArchitectureError(
            f"{type(call.module).__name__} was called without its first argument {name!r}; "
            f"it got {', '.join(call.kwargs) or 'nothing'}"
        )
    return call.kwargs[name]


def set_input(call: Call, value: Tensor) -> None:
    """Replace the hidden state a module is called with."""
    call.changed = True
    if call.args:
        call.args = (value, *call.args[1:])
    else:
        call.kwargs = {**call.kwargs, _first_parameter(_kind(call.module)): value}


def get_output(call: Call) -> Tensor:
    """What a module returned; the first item of a tuple, list or Hugging Face output."""
    return _first(call.output)


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def set_output(call: Call, value: Tensor) -> None:
    """Replace what a module returned, in whatever it was wrapped."""
    set_item(call, 0, value)


def set_item(call: Call, index: int, value: Tensor) -> None:
    """Replace one item of what a module returned (a bare tensor is its own only item)."""
    call.changed = True
    if isinstance(call.output, Tensor):
        call.output = value
    elif isinstance(call.output, dict):  # ModelOutput
        twin = type(call.output)(**call.output)
        twin[list(call.output.keys())[index]] = value
        call.output = twin
    else:
        items = list(call.output)
        items[index] = value
        kind = type(call.output)
        call.output = kind(*items) if hasattr(kind, "_fields") else kind(items)


def whole_input() -> Tap:
    """A module's input as it is."""
    return Tap("input", get_input, set_input)


def input_at(index: int) -> Tap:
    """One positional argument of a module."""

    def write(call: Call, value: Tensor) -> None:
        call.changed = True
        call.args = (*call.args[:index], value, *call.args[index + 1 :])

    return Tap("input", lambda call: call.args[index], write)


def named_input(index: int, name: str) -> Tap:
    """One argument of a module, by position or by name."""

    def read(call: Call) -> Tensor:
        return call.args[index] if len(call.args) > index else call.kwargs[name]

    def write(call: Call, value: Tensor) -> None:
        call.changed = True
        if len(call.args) > index:
            call.args = (*call.args[:index], value, *call.args[index + 1 :])
        else:
            call.kwargs = {**call.kwargs, name: value}

    return Tap("input", read, write)


def whole_output() -> Tap:
    """A module's output as it is."""
    return Tap("output", get_output, set_output, _first)


def output_item(index: int) -> Tap:
    """One item of a tuple a module returns."""
    return Tap(
        "output", lambda call: call.output[index], lambda call, value: set_item(call, index, value)
    )


# --- heads and shares -----------------------------------------------------------------------------------


def as_heads(x: Tensor, n: int, d: int) -> Tensor:
    """[..., n * d] as [..., n, d], a view."""
    return x.view(*x.shape[:-1], n, d)


def input_heads(n: int, d: int) -> Tap:
    """A module's input seen as heads."""
    return Tap(
        "input",
        lambda call: as_heads(get_input(call), n, d),
        lambda call, value: set_input(call, value.flatten(-2)),
    )


def take_share(x: Tensor, split: Split, index: int) -> Tensor:
    """One projection out of a joint output, [..., width]."""
    start = sum(split.sizes[:index])
    if split.groups == 1:
        return x.narrow(-1, start, split.sizes[index])
    runs = x.unflatten(-1, (split.groups, sum(split.sizes)))
    return runs.narrow(-1, start, split.sizes[index]).flatten(-2)


def put_share(x: Tensor, split: Split, index: int, value: Tensor) -> Tensor:
    """The joint output with one projection replaced."""
    runs = x.unflatten(-1, (split.groups, sum(split.sizes)))
    shares = list(runs.split(split.sizes, dim=-1))
    shares[index] = value.unflatten(-1, (split.groups, split.sizes[index]))
    return torch.cat(shares, dim=-1).flatten(-2)


def projection_output(projection: Projection, heads: tuple[int, int] | None) -> Tap:
    """What a projection makes, as heads when ``heads = (n, d)`` is given."""
    split, index = projection.split, projection.index

    def read(call: Call) -> Tensor:
        x = get_output(call)
        if split is not None:
            if split.groups > 1 and heads == (split.groups, split.sizes[index]):
                start = sum(split.sizes[:index])  # one head a run: no copy needed
                return x.unflatten(-1, (split.groups, -1)).narrow(-1, start, split.sizes[index])
            x = take_share(x, split, index)
        return x if heads is None else as_heads(x, *heads)

    def write(call: Call, value: Tensor) -> None:
        if heads is not None:
            value = value.flatten(-2)
        set_output(
            call, value if split is None else put_share(get_output(call), split, index, value)
        )

    return Tap("output", read, write)


def shared_input(projection: Projection, split: Split) -> tuple[Tap, Action]:
    """What one share of a joint projection reads. A change touches this share and leaves the others alone."""
    changed: list[Tensor] = []

    def read(call: Call) -> Tensor:
        changed.clear()  # of a call that was interrupted
        return get_input(call)

    def apply(call: Call) -> None:
        if changed:
            # Run the joint projection again on the changed input and take this share of the result.
            share = take_share(call.module.forward(changed.pop()), split, projection.index)
            set_output(call, put_share(get_output(call), split, projection.index, share))

    return Tap("input", read, lambda call, value: changed.append(value)), Action(apply)


# --- layouts --------------------------------------------------------------------------------------------


class Rows:
    """How many rows and positions the layer that is running has: [batch, pos] of what entered it."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None  # None: a single sequence

    def note(self) -> Action:
        """What to do when the layer begins."""

        def run(call: Call) -> None:
            shape = get_input(call).shape
            self.shape = (shape[0], shape[1]) if len(shape) > 2 else None

        return Action(run, "input")

    def split(self, x: Tensor) -> Tensor:
        """[batch * pos, ...] as [batch, pos, ...]."""
        return x if self.shape is None else x.unflatten(0, self.shape)


def through(tap: Tap, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tap:
    """A tap that shows its tensor in another layout."""
    return Tap(
        tap.side,
        lambda call: there(tap.read(call)),
        lambda call, value: tap.write(call, back(value)),
    )


def unflattened(tap: Tap, rows: Rows) -> Tap:
    """[batch * pos, ...] as [batch, pos, ...]."""
    return through(tap, rows.split, lambda x: x.flatten(0, 1))


def swapped(tap: Tap, first: int, second: int) -> Tap:
    """Two axes the other way round."""
    back = lambda x: x.transpose(first, second).contiguous()  # noqa: E731 - models view what they made
    return through(tap, lambda x: x.transpose(first, second), back)


def squeezed(tap: Tap, axis: int) -> Tap:
    """Without an axis of length one."""
    return through(tap, lambda x: x.squeeze(axis), lambda x: x.unsqueeze(axis))


# --- inside a norm --------------------------------------------------------------------------------------


def norm_scale(norm: Norm) -> Tap:
    """The scale a norm divides by, [..., 1]."""

    def write(call: Call, value: Tensor) -> None:
        x = get_input(call)
        normalized = norms.normalize(norm, x, value)
        set_output(call, norms.output_from(norm, call.module, x, normalized, get_output(call)))
        call.scratch["scale"] = value

    def read(call: Call) -> Tensor:
        by = call.scratch["scale"] = norms.scale(norm, get_input(call))
        return by

    return Tap("output", read, write)


def norm_normalized(norm: Norm) -> Tap:
    """The normalised value before the norm's weights."""

    def read(call: Call) -> Tensor:
        x = get_input(call)
        by = call.scratch.get("scale")
        return norms.normalize(norm, x, norms.scale(norm, x) if by is None else by)

    def write(call: Call, value: Tensor) -> None:
        x, out = get_input(call), get_output(call)
        set_output(call, norms.output_from(norm, call.module, x, value, out))

    return Tap("output", read, write)


# --- what each head adds --------------------------------------------------------------------------------


def head_results(n: int, d: int) -> Tap:
    """What each head writes into the residual stream, [batch, pos, head, d_model], read at W_O."""

    def read(call: Call) -> Tensor:
        z = as_heads(get_input(call), n, d)
        if z.is_meta:
            # A call of the weightless twin: the model's own layer may be packed or sharded, and not take it.
            out = get_output(call)
            return out.new_empty(*z.shape[:-1], out.shape[-1])
        return _results(call.module, z)

    def write(call: Call, value: Tensor) -> None:
        with torch.no_grad():
            same = (value == read(call)).flatten(-2).all(-1, keepdim=True)
        total = value.sum(-2)
        bias = bias_of(call.module, get_input(call))
        set_output(call, graft(get_output(call), total if bias is None else total + bias, same))

    return Tap("output", read, write)


def _results(module: nn.Module, z: Float[Tensor, "*rows head d_head"]) -> Tensor:
    n, d = z.shape[-2:]
    with align_module_device(module):
        weight = plain_weight(module)
        if weight is not None:
            return torch.einsum("...hd,hdm->...hm", z, weight.unflatten(0, (n, d)))
    # A layer whose weight is no plain matrix (quantised, LoRA): one head at a time through the layer itself.
    alone = torch.diag_embed(z.transpose(-1, -2), dim1=-3, dim2=-2).flatten(-2)
    # Flat: packed layers know no more than three axes.
    out = first_item(module.forward(alone.flatten(0, -2))).unflatten(0, alone.shape[:-1])
    bias = bias_of(module, z.flatten(-2))
    return out if bias is None else out - bias.unsqueeze(-2)
