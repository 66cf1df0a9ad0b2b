"""One small run of a model, watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.tap import watch
from .follow import Follower
from .seen import (
    Root,
    Terms,
    Trace,
    Visit,
    first_item,
    first_tensor,
    has_weights,
    into,
    version_of,
    widths_of,
)


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
    follower = Follower({id(x): start + name for name, x in held if x.is_floating_point()})
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
                    if value.shape[-1] in widths_of(modules[path]):
                        follower.base(value, path)
                    else:  # a convolution: its features are not the last dimension
                        follower.root(value, frozenset({Root(path)}))
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
