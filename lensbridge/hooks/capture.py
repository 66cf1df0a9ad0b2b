"""Watching plain modules: the gradients a backward pass brings them, the keywords they are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import GradientError, HookNotFiredError, HookValueError, InputError

Gradients = list[tuple[Tensor | None, ...]]


class _Calls:
    """Gathers the gradients of each call of a module, one tuple for each time a call is differentiated."""

    def __init__(self, found: Gradients, where: str) -> None:
        self.found = found
        self.where = where
        self.is_empty = True

    def watch(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors to go on with, each telling its gradient."""
        if not tensors:
            raise GradientError(
                f"nothing at the {self.where} is a floating-point tensor, which a gradient needs"
            )
        record = _Record(len(tensors))
        watched = [_with_graph(tensor) for tensor in tensors]
        for index, tensor in enumerate(watched):
            tensor.register_hook(partial(self._hear, record, index))
        return watched

    def _hear(self, record: _Record, index: int, grad: Tensor) -> None:
        # One tuple a backward pass, which alone knows where it begins.
        task = torch._C._current_graph_task_id()
        if task != record.task:
            record.begin(task, len(self.found))
            self.found.append(())
        record.slots[index] = grad.detach().clone()
        self.found[record.place] = tuple(record.slots)


class _Record:
    """The gradients of one call, as the backward pass in progress brings them."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.task = -1
        self.begin(-1, 0)

    def begin(self, task: int, place: int) -> None:
        """Another backward pass, whose tuple stands at that place."""
        self.task, self.place = task, place
        self.slots: list[Tensor | None] = [None] * self.n


def _with_graph(tensor: Tensor) -> Tensor:
    """The tensor with a graph to carry its gradient: of its own where the model is frozen."""
    if not tensor.requires_grad:
        return tensor.detach().requires_grad_()
    # A view: others use the tensor too, and what they make of it is not told here.
    return tensor.view_as(tensor)


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _check_enabled(module: nn.Module) -> None:
    if not torch.is_grad_enabled():
        raise GradientError(
            f"gradients at {type(module).__name__}: gradients are disabled; leave torch.no_grad() / "
            "torch.inference_mode() for the forward pass"
        )


@contextmanager
def module_gradients(
    module: nn.Module, site: Literal["output", "input"] = "output"
) -> Iterator[Gradients]:
    """Gradients at a module's outputs or inputs, for the length of a ``with`` block.

    Args:
        module: Which module; its forward must run inside the block.
        site: ``"output"`` or ``"input"``; inputs are positional and keyword arguments, in that order.
    Yields:
        A list that grows by one tuple each time a call is differentiated: a gradient for every floating-point
        tensor (None where none arrived).
    Raises:
        InputError: Another site.
        GradientError: On the forward pass, when gradients are disabled or nothing there can carry one.
        HookNotFiredError: On leaving, when the module was not called.
    """
    if site not in ("output", "input"):
        raise InputError(f"site must be 'output' or 'input', got {site!r}")
    found: Gradients = []
    calls = _Calls(found, f"{site} of {type(module).__name__}")

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        calls.is_empty = False
        _check_enabled(module)
        given = [*args, *kwargs.values()]
        watched = iter(calls.watch([x for x in given if _carries(x)]))
        replaced = [next(watched) if _carries(x) else x for x in given]
        return tuple(replaced[: len(args)]), dict(zip(kwargs, replaced[len(args) :], strict=True))

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        calls.is_empty = False
        _check_enabled(module)
        if isinstance(output, Tensor):
            return calls.watch([output] if _carries(output) else [])[0]
        if not isinstance(output, (list, tuple, dict)):
            return calls.watch([])
        items = list(output.values() if isinstance(output, dict) else output)
        watched = iter(calls.watch([x for x in items if _carries(x)]))
        replaced = [next(watched) if _carries(x) else x for x in items]
        if isinstance(output, dict):
            return type(output)(**dict(zip(output.keys(), replaced, strict=True)))
        kind = type(output)
        return kind(*replaced) if hasattr(output, "_fields") else kind(replaced)

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if site == "input"
        else module.register_forward_hook(after)
    )
    try:
        yield found
    finally:
        handle.remove()
    if calls.is_empty:
        raise HookNotFiredError(
            f"{type(module).__name__} was not called inside the block: run the forward pass there, not before"
        )


@contextmanager
def module_kwargs(
    module: nn.Module, modify: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments of every call of a module, for the length of a ``with`` block.

    Args:
        module: Which module.
        modify: Given a copy of them; what it returns, or the copy as it changed it, is what the module gets.
    Yields:
        A list that grows by one dictionary a call: the keywords as they came.
    Raises:
        HookValueError: ``modify`` returned something else than a dictionary.
    """
    found: list[dict[str, Any]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        found.append(dict(kwargs))
        if modify is None:
            return None
        changed = dict(kwargs)
        new = modify(changed)
        changed = changed if new is None else new
        if not isinstance(changed, dict):
            raise HookValueError(
                f"modify returned {type(changed).__name__}; return a dictionary of keyword arguments, or "
                "None to use the one that was given"
            )
        return args, changed

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def tensor_gradients(tensor: Tensor, retain_grad: bool = True) -> Iterator[list[Tensor]]:
    """The gradients that reach a tensor, for the length of a ``with`` block.

    Args:
        tensor: Part of a graph.
        retain_grad: Keep the last one as ``tensor.grad`` too.
    Yields:
        A list that grows by one gradient, of the tensor's shape, each backward pass.
    Raises:
        GradientError: The tensor has no graph.
    """
    if not tensor.requires_grad:
        raise GradientError(
            f"a tensor of shape {list(tensor.shape)} has no graph, so no gradient reaches it: compute it "
            "with gradients enabled from something that requires them, or name a hook point instead"
        )
    found: list[Tensor] = []
    if retain_grad and not tensor.is_leaf:
        tensor.retain_grad()
    handle = tensor.register_hook(lambda grad: found.append(grad.detach().clone()))
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def node_gradients(tensor: Tensor) -> Iterator[list[tuple[Tensor | None, ...]]]:
    """What the operation that made a tensor passes on backward, for the length of a ``with`` block.

    Args:
        tensor: The result of an operation.
    Yields:
        A list that grows by one tuple each backward pass: the gradient for each input of that operation, None
        where it has none. Shapes are those of the operation (a matrix product may see two dimensions).
    Raises:
        InputError: The tensor is no operation's result.
    """
    found: list[tuple[Tensor | None, ...]] = []
    handle = on_node(tensor, found)
    try:
        yield found
    finally:
        handle.remove()


def on_node(tensor: Tensor, found: list[tuple[Tensor | None, ...]]) -> Any:
    """Listen at the operation that made a tensor; gives the handle. It goes with the graph.

    Raises:
        InputError: The tensor is no operation's result.
    """
    if tensor.grad_fn is None:
        raise InputError(
            f"a tensor of shape {list(tensor.shape)} was made by no differentiable operation (a leaf, or "
            "computed without gradients): there is no autograd node to listen at"
        )

    def hear(passed_on: tuple[Tensor | None, ...], came: Any) -> None:
        found.append(tuple(None if g is None else g.detach().clone() for g in passed_on))

    return tensor.grad_fn.register_hook(hear)
