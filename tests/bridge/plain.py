"""Reading and editing a bare model with plain PyTorch hooks, by module path. Nothing of lensbridge is used.

A place is a module path for what the module returns (the first item of a tuple), or ``"path<"`` for what it is
called with. Loaded by the fixture `plain`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


def examples(kind: str, name: str) -> dict[str, Tensor]:
    """Inputs that fit a tiny model, as `tiny_configs.json` describes them."""
    entry = json.loads((Path(__file__).parents[1] / "tiny_configs.json").read_text())[kind][name]
    seed = torch.Generator().manual_seed(3)
    made: dict[str, Tensor] = {}
    for key, told in entry["inputs"].items():
        if told["kind"] == "values":
            made[key] = torch.tensor(told["data"], dtype=getattr(torch, told["dtype"]))
        elif told["kind"] == "long":
            made[key] = torch.randint(8, told["high"], told["shape"], generator=seed)
        else:
            made[key] = torch.randn(*told["shape"], generator=seed)
    return made


def _swapped(value: Any, tensor: Tensor) -> Any:
    """A module's output with its tensor replaced."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, dict):
        twin = type(value)(**value)
        twin[next(iter(value))] = tensor
        return twin
    return type(value)((tensor, *value[1:]))


def _item(value: Any) -> Any:
    return value if isinstance(value, Tensor) else value[0]


@contextmanager
def watching(
    model: nn.Module, place: str, see: Callable[[Tensor, int], Tensor | None]
) -> Iterator[None]:
    """Call ``see(value, count)`` at a place; what it returns replaces the value."""
    module = model.get_submodule(place.removesuffix("<"))
    count = [-1]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        count[0] += 1
        name = None if args else next(k for k, v in kwargs.items() if isinstance(v, Tensor))
        new = see(args[0] if name is None else kwargs[name], count[0])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        count[0] += 1
        new = see(_item(output), count[0])
        return None if new is None else _swapped(output, new)

    if place.endswith("<"):
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        # First, so that Hugging Face's own records of hidden states, which some models read, see the edit.
        handle = module.register_forward_hook(after, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def output_of(model: nn.Module, given: Mapping[str, Any] | Tensor) -> Tensor:
    """The model's main output: logits, or the last hidden state."""
    out: Any = model(given) if isinstance(given, Tensor) else model(**given)
    return out.logits if "logits" in out else out[0]


def read(
    model: nn.Module, given: Mapping[str, Any] | Tensor, *places: str
) -> dict[str, list[Tensor]]:
    """The values at some places in one run, one for each call."""
    seen: dict[str, list[Tensor]] = {place: [] for place in places}
    with ExitStack() as stack, torch.no_grad():
        for place, found in seen.items():
            keep = lambda value, count, found=found: found.append(value.clone())  # noqa: E731
            stack.enter_context(watching(model, place, keep))
        model(given) if isinstance(given, Tensor) else model(**given)
    return seen


def edited(
    model: nn.Module,
    given: Mapping[str, Any] | Tensor,
    place: str,
    fn: Edit,
    call: int | None = None,
) -> Tensor:
    """The model's output with ``fn`` applied at a place, in every call of the module or in one."""
    see = lambda value, count: fn(value) if call in (None, count) else None  # noqa: E731
    with torch.no_grad(), watching(model, place, see):
        return output_of(model, given)


def noisy(x: Tensor) -> Tensor:
    """Another value in every place, of the value's own size."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
    return x * 1.5 + noise * x.abs().mean()


def gap(left: Tensor, right: Tensor) -> float:
    """Largest difference over the largest value; infinite where shapes differ."""
    if left.shape != right.shape:
        return float("inf")
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))
