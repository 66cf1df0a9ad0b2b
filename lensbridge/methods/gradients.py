"""Five context managers that capture gradients and keywords, at modules, paths and hook points.

Each takes a module as it is, or a name (a canonical point, an alias, or the path of a module) together with
the bridge it is looked up in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from ..bridge import TransformerBridge
from ..hooks import (
    GradientError,
    HookNotFiredError,
    HookPoint,
    InputError,
    Listener,
    UnknownPointError,
    module_gradients,
    module_kwargs,
    node_gradients,
    on_node,
    tensor_gradients,
)

Target = nn.Module | str
"""A module, a `HookPoint`, or the name of a point or module in a bridge."""


def resolve(target: Target, bridge: TransformerBridge | None) -> nn.Module:
    """The hook point or module behind a name.

    Raises:
        UnknownPointError, AbsentPointError: Neither a point nor a module is called that.
        InputError: A name without a bridge, or something that is neither.
    """
    if isinstance(target, nn.Module):
        return target
    if not isinstance(target, str):
        raise InputError(
            f"give a module, a hook point or a name, got {type(target).__name__}: {target!r}"
        )
    if bridge is None:
        raise InputError(f"{target!r} is a name: say in which model, as bridge=")
    try:
        found = bridge.registry.select(target)
        if len(found) > 1:
            raise InputError(f"{target!r} names {len(found)} points; give one")
        return found[0]
    except UnknownPointError:
        module = dict(bridge.unwrapped_model.named_modules()).get(target)
        if module is None:
            raise
        return module


@contextmanager
def capture_gradients(
    target: Target,
    site: Literal["output", "input"] = "output",
    *,
    bridge: TransformerBridge | None = None,
) -> Iterator[list[tuple[Tensor | None, ...]]]:
    """Gradients at a module or hook point; run forward (and backward) inside the block.

    On a frozen model the graph starts there, so that the gradient exists to be seen.

    Args:
        target: A module, or a name.
        site: The module's ``"output"`` or its ``"input"``, keyword arguments among them. A hook point is one
            tensor and has no sides.
        bridge: Where a name is looked up.
    Yields:
        A list that grows by one tuple each time a call is differentiated: the gradient of each tensor there.
    Raises:
        InputError: Another site, or a name without a bridge.
        GradientError: On the forward pass, when gradients are disabled or nothing there can carry one.
        HookNotFiredError: On leaving, when no forward pass came by.
    """
    place = resolve(target, bridge)
    if not isinstance(place, HookPoint):
        with module_gradients(place, site) as found:
            yield found
        return
    if site != "output":
        raise InputError(
            f"{place.name!r} is one tensor and has no {site!r}: name the point before it, or give the module"
        )
    found = []
    with place.listening(
        lambda grad, hook: found.append((grad.detach().clone(),)), "bwd"
    ) as listener:
        yield found
    _check_fired(listener)


@contextmanager
def capture_backward_pre(
    target: Target, *, bridge: TransformerBridge | None = None
) -> Iterator[list[tuple[Tensor | None, ...]]]:
    """What a backward pass brings to a module's outputs, before it goes through the module.

    Args:
        target: A module, or a name.
        bridge: Where a name is looked up.
    Yields:
        As `capture_gradients` at the output.
    Raises:
        InputError: A name without a bridge.
        GradientError: On the forward pass, when gradients are disabled.
    """
    with capture_gradients(target, bridge=bridge) as found:
        yield found


@contextmanager
def capture_kwargs_hook(
    target: Target,
    modify: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
    *,
    bridge: TransformerBridge | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """The keyword arguments a module is called with, and a way to change them.

    Args:
        target: A module, or a name; of a hook point, the module it sits at.
        modify: Given a copy of them; what it returns, or the copy as it changed it, is what the module gets.
        bridge: Where a name is looked up.
    Yields:
        A list that grows by one dictionary a call: the keywords as they came.
    Raises:
        InputError: A name without a bridge.
        HookValueError: ``modify`` returned something else than a dictionary.
    """
    place = resolve(target, bridge)
    if isinstance(place, HookPoint):
        owners = [module for x in place.owners if (module := getattr(x, "module", None))]
        if not owners:
            raise InputError(f"{place!r} sits at no module of a model: name the module instead")
        place = owners[0]
    with module_kwargs(place, modify) as found:
        yield found


@contextmanager
def tensor_grad_hook(
    target: Callable[[], Tensor] | Tensor | str | HookPoint,
    retain_grad: bool = True,
    *,
    bridge: TransformerBridge | None = None,
) -> Iterator[list[Tensor]]:
    """The gradients that reach one tensor.

    Args:
        target: The tensor, or a function without arguments that gives it (asked on entering, so the forward
            pass comes first); or a hook point's name, whose forward pass comes inside the block.
        retain_grad: Keep the last gradient as the tensor's ``.grad`` too; not for a name.
        bridge: Where a name is looked up.
    Yields:
        A list that grows by one gradient each backward pass.
    Raises:
        GradientError: The tensor has no graph.
        InputError: A module, or a function that gives no tensor.
    """
    if isinstance(target, (str, HookPoint)):
        point = resolve(target, bridge)
        if not isinstance(point, HookPoint):
            raise InputError(f"{target!r} is a module, not a tensor; use capture_gradients")
        grads: list[Tensor] = []
        with point.listening(
            lambda grad, hook: grads.append(grad.detach().clone()), "bwd"
        ) as listener:
            yield grads
        _check_fired(listener)
        return
    if isinstance(target, nn.Module) or not (isinstance(target, Tensor) or callable(target)):
        raise InputError(
            f"the gradient of a tensor was asked for, got {type(target).__name__}: give the tensor, a "
            "function that gives it, or a hook point's name; of what a module takes or makes, use "
            "capture_gradients"
        )
    tensor = target if isinstance(target, Tensor) else target()
    if not isinstance(tensor, Tensor):
        raise InputError(
            f"the function gave {type(tensor).__name__}, not a tensor: run the forward pass before entering"
        )
    with tensor_gradients(tensor, retain_grad) as grads:
        yield grads


@contextmanager
def autograd_node_hook(
    target: Tensor | str | HookPoint, *, bridge: TransformerBridge | None = None
) -> Iterator[list[tuple[Tensor | None, ...]]]:
    """What the operation that made a tensor passes on to its own inputs in a backward pass.

    Args:
        target: The result of an operation; or a hook point's name, whose forward pass comes inside the block.
        bridge: Where a name is looked up.
    Yields:
        A list that grows by one tuple each backward pass: a gradient for each input of the operation, None
        where it has none. Shapes are those of the operation, which may have folded dimensions together.
    Raises:
        InputError: The tensor is no differentiable operation's result.
        GradientError: The same of a point, on the forward pass.
    """
    if isinstance(target, Tensor):
        with node_gradients(target) as found:
            yield found
        return
    point = resolve(target, bridge)
    if not isinstance(point, HookPoint):
        raise InputError(f"{target!r} is a module, not a tensor; use capture_gradients")
    found = []

    def listen(tensor: Tensor, hook: HookPoint) -> Tensor:
        if tensor.grad_fn is None:
            raise GradientError(
                f"{hook.name!r} was computed without a graph (a frozen model, or gradients disabled): no "
                "operation passes anything on there; capture_gradients starts a graph itself"
            )
        on_node(tensor, found)
        return tensor  # so that what is shown is what the model goes on with

    with point.listening(listen, observes=False) as listener:
        yield found
    _check_fired(listener)


def _check_fired(listener: Listener) -> None:
    """Refuse silence, where a forward pass was to come by."""
    if not listener.fired:
        raise HookNotFiredError(
            f"{listener.point.name!r} was not passed inside the block: run the forward pass there, not before"
        )
