"""Attribution by gradients: what activations count for in a number that is read off the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from ..bridge import TransformerBridge
from ..hooks import InputError
from .measured import MeasuredRun, Metric, ValueAndGradient, differentiable, prepared, unreached

# --- one gradient -----------------------------------------------------------------------------------------


def gradients(
    bridge: TransformerBridge, input: Any, metric: Metric, points: Any, **run_kwargs: Any
) -> dict[str, ValueAndGradient]:
    """Values and gradients at many points, from one forward and one backward pass.

    Nothing of the model is touched: no ``.grad``, no ``requires_grad``, no mode. It may be frozen, and the
    caller may be inside ``torch.no_grad()``.

    Args:
        bridge: The model.
        input: As in `TransformerBridge.forward`, or a mapping of its keywords.
        metric: See `Metric`; one number a row is summed over rows.
        points: Anything that selects points: a name, a glob, a list of them...
        **run_kwargs: Further keywords of the model's forward.
    Returns:
        By canonical name, in the order the model passed them. Of the points that a filter selects, those that
        hold whole numbers and those that the metric does not depend on are left out.
    Raises:
        GradientError: A point given by name that no gradient reaches, or a metric without a graph.
        InputError: A metric that does not give one number, or one a row.
        HookNotFiredError: A point given by name that the run did not pass.
    Source: Simonyan et al. 2013, "Deep Inside Convolutional Networks", for the gradient as saliency.
    """
    with differentiable(bridge):
        return MeasuredRun(bridge, prepared(bridge, input, run_kwargs), metric).gradients(points)


def input_x_gradient(
    bridge: TransformerBridge,
    input: Any,
    metric: Metric,
    *,
    point: str = "embed.hook_out",
    **run_kwargs: Any,
) -> Tensor:
    """What a point showed, times the gradient of the metric there.

    Args:
        bridge: The model.
        input: As in `TransformerBridge.forward`, or a mapping of its keywords.
        metric: See `Metric`.
        point: Where; the token embeddings unless given.
        **run_kwargs: Further keywords of the model's forward.
    Returns:
        Attributions, shaped like the point's tensor.
    Raises:
        GradientError, InputError, HookNotFiredError: As in `gradients`.
    Source: Shrikumar et al. 2016, "Not Just a Black Box".
    """
    name = bridge.registry.canonical(point)
    found = gradients(bridge, input, metric, [name], **run_kwargs)[name]
    return _product(found.value, found.gradient)


def attribution_patching(
    bridge: TransformerBridge,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    points: Any = None,
    *,
    into: str = "corrupted",
    **run_kwargs: Any,
) -> dict[str, Tensor]:
    """What patching each activation of one run into the other would do to the metric, to first order.

    ``into="corrupted"`` patches clean activations into the corrupted run, as Nanda does: (clean - corrupted)
    times the gradient in the corrupted run, which sums to about ``metric(patched) - metric(corrupted)``.
    ``into="clean"`` goes the other way: (corrupted - clean) times the gradient in the clean run. Where the
    metric is linear in an activation, the sum over that activation is what patching it does.

    Args:
        bridge: The model.
        clean: One input, as in `TransformerBridge.forward`, or a mapping of its keywords.
        corrupted: The other, of as many rows and tokens.
        metric: See `Metric`.
        points: Anything that selects points; every default point unless given.
        into: Which run would be patched; the gradient is taken there.
        **run_kwargs: Further keywords of the model's forward, for both runs.
    Returns:
        By canonical name, shaped like the point's tensor: sum over what is patched together.
    Raises:
        InputError: Runs whose activations differ in shape, or another ``into``; or as in `gradients`.
        GradientError, HookNotFiredError: As in `gradients`.
    Source: Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale".
    """
    if into not in ("corrupted", "clean"):
        raise InputError(f"into must be 'corrupted' or 'clean', got {into!r}")
    here, other = (corrupted, clean) if into == "corrupted" else (clean, corrupted)
    with differentiable(bridge):
        found = MeasuredRun(bridge, prepared(bridge, here, run_kwargs), metric).gradients(points)
        source = MeasuredRun(bridge, prepared(bridge, other, run_kwargs), metric).values(
            list(found)
        )
    for name, at in found.items():
        if source[name].shape != at.value.shape:
            raise InputError(
                f"{name} is {list(at.value.shape)} in the {into} run and {list(source[name].shape)} in the "
                "other: give inputs of as many rows and tokens"
            )
    return {
        name: _product(_difference(source[name], at.value), at.gradient)
        for name, at in found.items()
    }


def _difference(end: Tensor, start: Tensor) -> Tensor:
    """None between equals, which masked scores are too: minus infinity."""
    return torch.where(end == start, 0.0, end - start)


def _product(change: Tensor, gradient: Tensor) -> Tensor:
    """None where the gradient is none, whatever the change: a masked score counts for nothing."""
    return torch.where(gradient == 0, 0.0, change * gradient)


# --- along a path -----------------------------------------------------------------------------------------


@overload
def integrated_gradients(
    bridge: TransformerBridge,
    input: Any,
    metric: Metric,
    *,
    point: str = ...,
    baseline: Any = ...,
    baseline_input: Any = ...,
    n_steps: int = ...,
    method: str = ...,
    batch_size: int | None = ...,
    return_convergence_delta: Literal[False] = ...,
    **run_kwargs: Any,
) -> Tensor: ...


@overload
def integrated_gradients(
    bridge: TransformerBridge,
    input: Any,
    metric: Metric,
    *,
    point: str = ...,
    baseline: Any = ...,
    baseline_input: Any = ...,
    n_steps: int = ...,
    method: str = ...,
    batch_size: int | None = ...,
    return_convergence_delta: Literal[True],
    **run_kwargs: Any,
) -> tuple[Tensor, Tensor]: ...


def integrated_gradients(
    bridge: TransformerBridge,
    input: Any,
    metric: Metric,
    *,
    point: str = "embed.hook_out",
    baseline: Any = None,
    baseline_input: Any = None,
    n_steps: int = 50,
    method: str = "gausslegendre",
    batch_size: int | None = None,
    return_convergence_delta: bool = False,
    **run_kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The mean gradient on the straight line from a baseline to what a point showed, times their difference.

    The attributions sum to ``metric(input) - metric(baseline)``, up to the error of the quadrature. Only what
    the point shows is replaced: whatever else the model makes of the input (masks, positions) is the input's.

    Where an RMS norm reads the variable, gradients grow without bound towards a baseline of zeros and the sum
    stays off even with many steps; a ``baseline_input`` has no such trouble.

    Args:
        bridge: The model.
        input: As in `TransformerBridge.forward`, or a mapping of its keywords.
        metric: See `Metric`. A function is given the logits of the input's rows, one step at a time.
        point: The variable, any point; the token embeddings unless given.
        baseline: Where the line begins, a tensor of the point's shape, or one that expands to it;
            zeros unless given.
        baseline_input: Instead, another input; what the point shows for it is the baseline.
        n_steps: How many gradients are taken.
        method: The quadrature: ``"gausslegendre"``, ``"riemann_left"``, ``"riemann_middle"``,
            ``"riemann_right"`` or ``"riemann_trapezoid"``. All are captum's but the last: its weights sum to
            one here, and to ``1 - 1 / n_steps`` in captum.
        batch_size: How many steps to run at once, as rows of one forward pass; all unless given. They run one
            by one where rows cannot be repeated: under hooks of the caller that edit, or with inputs that are
            not [batch, ...].
        return_convergence_delta: Also return by how much the attributions miss the difference of the metric.
        **run_kwargs: Further keywords of the model's forward.
    Returns:
        Attributions, shaped like the point's tensor, in float32 at least. With ``return_convergence_delta``
        also their sum less the difference of the metric: [batch] where metric and point have rows, else [].
    Raises:
        InputError: Two baselines or one that does not fit, an option that cannot be, a point that is passed
            more than once; or as in `gradients`.
        GradientError, HookNotFiredError: As in `gradients`.
    Source: Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks".
    """
    nodes, weights = _quadrature(method, n_steps)
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size counts steps and is 1 or more, got {batch_size}")
    if baseline is not None and baseline_input is not None:
        raise InputError("give baseline or baseline_input, not both")
    name = bridge.registry.canonical(point)
    with differentiable(bridge):
        run = MeasuredRun(bridge, prepared(bridge, input, run_kwargs), metric)
        value = run.values([name], once=True)[name]
        if not value.is_floating_point():
            raise unreached(name, value)
        if baseline_input is not None:
            other = MeasuredRun(bridge, prepared(bridge, baseline_input, run_kwargs), metric)
            baseline = other.values([name], once=True)[name]
        start = _fitting(baseline, value, name)
        difference = _difference(value.to(start), start)
        if not bool(difference.isfinite().all()):
            raise InputError(
                f"no line leads from the baseline to {name}, which is infinite elsewhere (as masked scores): "
                "give a baseline that is infinite at the same places, such as a baseline_input"
            )
        by_row = run.has_rows(name, value)
        size = min(batch_size or n_steps, n_steps) if by_row and run.repeats else 1
        mean = torch.zeros_like(difference)
        for first in range(0, n_steps, size):
            chosen = slice(first, first + size)
            steps = [(start + node * difference).to(value) for node in nodes[chosen]]
            mean += run.slope(name, steps, weights[chosen])
        made = difference * mean
        if not return_convergence_delta:
            return made
        gained = (run.metric_at(name, value) - run.metric_at(name, start.to(value))).to(made)
    if by_row and gained.dim():
        return made, made.flatten(1).sum(1) - gained
    return made, made.sum() - gained.sum()


def _quadrature(method: str, n_steps: int) -> tuple[list[float], list[float]]:
    """Where on [0, 1] to look, and how much each place counts; the weights sum to one."""
    rules: dict[str, Callable[[], tuple[Any, Any]]] = {
        "gausslegendre": lambda: np.polynomial.legendre.leggauss(n_steps),
        "riemann_left": lambda: (np.arange(n_steps), np.ones(n_steps)),
        "riemann_middle": lambda: (np.arange(n_steps) + 0.5, np.ones(n_steps)),
        "riemann_right": lambda: (np.arange(n_steps) + 1, np.ones(n_steps)),
        "riemann_trapezoid": lambda: (
            np.linspace(0, 1, n_steps),
            np.r_[0.5, np.ones(n_steps - 2), 0.5],
        ),
    }
    if method not in rules:
        raise InputError(f"method must be one of {', '.join(rules)}; got {method!r}")
    least = 2 if method == "riemann_trapezoid" else 1
    if not isinstance(n_steps, int) or isinstance(n_steps, bool) or n_steps < least:
        raise InputError(f"n_steps of {method} is a whole number from {least}, got {n_steps!r}")
    nodes, weights = rules[method]()
    if method == "gausslegendre":
        nodes = (nodes + 1) / 2
    elif method != "riemann_trapezoid":
        nodes = nodes / n_steps
    return nodes.tolist(), (weights / weights.sum()).tolist()


def _fitting(baseline: Any, value: Tensor, name: str) -> Tensor:
    """The baseline in the value's shape, wide enough that small steps are not lost."""
    wide = torch.promote_types(value.dtype, torch.float32)
    if baseline is None:
        return torch.zeros_like(value, dtype=wide)
    if not isinstance(baseline, Tensor):
        raise InputError(
            f"a baseline is a tensor, got {type(baseline).__name__}: {baseline!r}; to have the activation of "
            "another input as the baseline, give that as baseline_input="
        )
    ahead = value.dim() - baseline.dim()
    if ahead < 0 or any(
        own not in (1, size) for own, size in zip(baseline.shape, value.shape[ahead:], strict=True)
    ):
        raise InputError(
            f"the baseline has shape {list(baseline.shape)} and {name} {list(value.shape)}; give one of that "
            "shape, or one that expands to it"
        )
    return baseline.detach().to(value.device, wide).expand_as(value)
