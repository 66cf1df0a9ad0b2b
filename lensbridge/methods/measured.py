"""Runs of a model that end in one number, and its gradients at points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge import Inputs, TransformerBridge, frozen
from ..hooks import GradientError, HookPoint, InputError
from .scoring import select_final_token

Metric = Any
"""What is attributed: a function of the logits [batch, pos, d_vocab] that gives one number ([]) or one a row
([batch]); token ids, one for all rows or one a row: their logits at each row's last real position; or
`logit_difference`."""


@dataclass(frozen=True)
class LogitLead:
    """A metric: at each row's last real position, the logit of one token less that of another.

    Attributes:
        correct, incorrect: Token ids, or strings that are one token each; one for all rows, or one a row.
    """

    correct: Any
    incorrect: Any


def logit_difference(correct: Any, incorrect: Any) -> LogitLead:
    """How far one answer leads another at each row's end: ``logit_difference(" Mary", " John")``.

    The end is the last real position.

    Args:
        correct: A token id, a string that is one token, or a list of one a row.
        incorrect: Likewise.
    Returns:
        A metric for whatever takes one: activation, path and attribution patching, gradients.
    Source: Wang et al. 2022, "Interpretability in the Wild".
    """
    return LogitLead(correct, incorrect)


class ValueAndGradient(NamedTuple):
    """What a point showed, and the gradient of a metric there, of the same shape."""

    value: Tensor
    gradient: Tensor


@contextmanager
def differentiable(bridge: TransformerBridge) -> Iterator[None]:
    """Gradients, whatever the caller is in, and parameters left out of the graph."""
    with frozen(bridge.original_model), torch.inference_mode(False), torch.enable_grad():
        yield


def prepared(bridge: TransformerBridge, input: Any, run_kwargs: dict[str, Any]) -> Inputs:
    """An input as `TransformerBridge.forward` takes it, or a mapping of its keywords."""
    if isinstance(input, Mapping):
        return bridge.prepare(**{**input, **run_kwargs})
    return bridge.prepare(input, **run_kwargs)


@dataclass
class MeasuredRun:
    """An input, as often as it must be run, and the number that is read off its logits."""

    bridge: TransformerBridge
    inputs: Inputs
    metric: Metric

    # --- rows ------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """How many rows the input has."""
        given = self.inputs.kwargs.values()
        return next(len(x) for x in given if isinstance(x, Tensor) and x.dim() > 1)

    @property
    def repeats(self) -> bool:
        """Whether the rows can be run several times over at once."""
        live = self.bridge.registry.live
        if any(not listener.observes for point in live for listener in point.fwd):
            return False  # a hook of the caller expects the rows the caller knows
        return all(
            # Position ids of more dimensions have those in front.
            x.dim() > 1 and len(x) == self.rows and (name != "position_ids" or x.dim() == 2)
            if isinstance(x, Tensor)
            else x is None or isinstance(x, (bool, int, float, str))
            for name, x in self.inputs.kwargs.items()
        )

    def has_rows(self, name: str, value: Tensor) -> bool:
        """Whether a point shows a value for each row."""
        return self.bridge.registry[name].axes.startswith("batch") and len(value) == self.rows

    def logits(self, times: int = 1) -> tuple[Tensor, ...]:
        """The logits of the rows, as many times over."""
        given = self.inputs.kwargs
        if times > 1:
            given = {
                name: x.repeat(times, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) else x
                for name, x in given.items()
            }
        return self.bridge(**given).chunk(times)

    # --- the metric ------------------------------------------------------------------------------

    def measured(self, logits: Tensor) -> Tensor:
        """The metric of the logits of the rows, [] or [batch]."""
        if isinstance(self.metric, LogitLead):
            final = self._final(logits)
            lead = [
                _of_tokens(final, self._ids(getattr(self.metric, what)), what)
                for what in ("correct", "incorrect")
            ]
            return lead[0] - lead[1]
        if not callable(self.metric):
            return _of_tokens(self._final(logits), self.metric, "the metric")
        found, rows = self.metric(logits), len(logits)
        is_tensor = isinstance(found, Tensor)
        if not is_tensor or found.shape not in ((), (rows,)):
            got = (
                f"shape {list(found.shape)}" if is_tensor else f"{type(found).__name__}: {found!r}"
            )
            raise InputError(
                f"the metric must give a tensor of one number, [], or of one a row, [{rows}]; of logits "
                f"{list(logits.shape)} it made {got}"
            )
        return found

    def _ids(self, tokens: Any) -> Any:
        """Tokens, those given as strings by their ids."""
        if isinstance(tokens, str):
            return self.bridge.to_single_token(tokens)
        if isinstance(tokens, (list, tuple)):
            return [self._ids(token) if isinstance(token, str) else token for token in tokens]
        return tokens

    def _final(self, logits: Tensor) -> Float[Tensor, "batch d_vocab"]:
        """The logits at each row's last real position."""
        mask = self.inputs.mask
        if logits.dim() != 3 or (mask is not None and mask.dim() != 2):
            here = f"logits {list(logits.shape)}" if mask is None else f"a mask {list(mask.shape)}"
            raise InputError(
                "a token as metric is its logit at the last real position of [batch, pos]; here is "
                f"{here}: give a function of the logits"
            )
        # A mask may cover a past as well, and logits may be asked for at the last positions only.
        return select_final_token(logits, None if mask is None else mask[:, -logits.shape[1] :])

    # --- activations -----------------------------------------------------------------------------

    def values(self, names: list[str], *, once: bool = False) -> dict[str, Tensor]:
        """What points show."""
        held: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint) -> None:
            if once and hook.name in held:
                raise InputError(
                    f"the run passes {hook.name} more than once, so it has no one value"
                )
            held[str(hook.name)] = tensor.clone()

        with torch.no_grad(), self.bridge.registry.hooks() as scope:
            scope.observe(self.bridge.registry.select(names), keep, must_fire=True)
            self.logits()
        return held

    def gradients(self, points: Any) -> dict[str, ValueAndGradient]:
        """What points show, and the gradients of the metric there."""
        items = list(points) if isinstance(points, (list, tuple, set, frozenset)) else [points]
        held: dict[str, Tensor] = {}

        def keep(tensor: Tensor, hook: HookPoint) -> Tensor | None:
            if not tensor.is_floating_point():
                return None
            # Without parameters in the graph, it begins at the first point.
            value = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
            held[str(hook.name)] = value
            return value.clone() if hook.is_volatile else value

        found: dict[str, Tensor] = {}
        with self.bridge.hooks(fwd_hooks=[(item, keep) for item in items]):
            (logits,) = self.logits()
            if held:
                found = _differentiated(self.measured(logits).sum(), held)
        for item in items:
            if isinstance(item, HookPoint) or (
                isinstance(item, str) and not set("*?[") & set(item)
            ):
                name = self.bridge.registry.canonical(getattr(item, "name", item))
                if name not in found:
                    raise unreached(name, held.get(name))
        return {name: ValueAndGradient(held[name].detach(), grad) for name, grad in found.items()}

    def slope(self, name: str, steps: list[Tensor], weights: list[float]) -> Tensor:
        """The weighted sum of the gradients where a point shows each of some values instead of its own."""
        leaf = torch.cat(steps).requires_grad_()
        with self.bridge.hooks(fwd_hooks=[(name, _replacing(leaf))]):
            parts = zip(self.logits(len(steps)), weights, strict=True)
            total = torch.stack([self.measured(part).sum() * weight for part, weight in parts])
            found = _differentiated(total.sum(), {name: leaf})
        if name not in found:
            raise unreached(name, leaf)
        wide = found[name].to(torch.promote_types(leaf.dtype, torch.float32))
        return wide.unflatten(0, (len(steps), -1)).sum(0)

    def metric_at(self, name: str, value: Tensor) -> Tensor:
        """The metric where a point shows another value."""
        with torch.no_grad(), self.bridge.hooks(fwd_hooks=[(name, _replacing(value))]):
            return self.measured(self.logits()[0])


def _of_tokens(final: Float[Tensor, "batch d_vocab"], tokens: Any, what: str) -> Tensor:
    """The logits of one token a row."""
    ids = token_ids(tokens, *final.shape, what=what).to(final.device)
    return final.gather(-1, ids[:, None])[:, 0]


def _replacing(value: Tensor) -> Callable[[Tensor, HookPoint], Tensor]:
    # A copy: some models go on to change the tensor in place.
    return lambda tensor, hook: value.clone()


def _differentiated(total: Tensor, held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a number, where there are any; nothing else hears of the backward pass."""
    if not total.requires_grad:
        raise GradientError(
            "the metric has no gradient: it is not computed from the logits, or they lose their graph on the "
            "way (.item(), .detach(), argmax, torch.no_grad())"
        )
    found = torch.autograd.grad(total, list(held.values()), allow_unused=True)
    return {name: grad for name, grad in zip(held, found, strict=True) if grad is not None}


def unreached(name: str, value: Tensor | None) -> GradientError:
    """Why a point has no gradient."""
    if value is None or not value.is_floating_point():
        return GradientError(f"{name} holds whole numbers, which have no gradient")
    return GradientError(
        f"no gradient reaches {name}: the metric does not depend on it, or goes round it because of another "
        "point that was asked for (hook_q_input goes round q.hook_in)"
    )


def token_ids(
    tokens: Any, rows: int, d_vocab: int, *, what: str = "tokens"
) -> Int[Tensor, " batch"]:
    """One token a row.

    Args:
        tokens: A token id, or a list or tensor of one a row.
        rows: How many rows there are.
        d_vocab: How many tokens there are.
        what: What to call them in an error.
    Raises:
        InputError: Something else, or an id outside the vocabulary.
    """
    wanted = f"{what} must be a token id or {rows} of them, one a row"
    items = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    items = list(items) if isinstance(items, (list, tuple)) else [items] * rows
    if any(not isinstance(item, int) or isinstance(item, bool) for item in items):
        raise InputError(f"{wanted}; got {tokens!r}")
    if len(items) != rows:
        raise InputError(f"{wanted}; got {len(items)}")
    outside = [item for item in items if not 0 <= item < d_vocab]
    if outside:
        raise InputError(f"{what}: id {outside[0]} is outside the vocabulary of {d_vocab}")
    return torch.tensor(items)
