"""Scopes: who adds listeners owns their removal, and learns whether they fired."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from .errors import HookNotFiredError, InputError
from .point import HookFunction, HookPoint, Listener, attach, describe, discard


@runtime_checkable
class Registry(Protocol):
    """What a scope needs of a registry."""

    depth: int
    scopes: list[HookScope]

    def select(self, selection: Any = None) -> list[HookPoint]:
        """Points a filter means."""

    def order(self, point: HookPoint) -> int:
        """Where a point comes in a run."""

    def settle(self) -> None:
        """Close whatever an interrupted run left open."""


class HookScope:
    """Listeners that live as long as a ``with`` block.

    Everything is resolved before anything is attached, so a wrong name leaves no trace. On leaving, the
    listeners go, whatever happened inside. If the block ran the model to its end and a hook's point was
    never passed, that is a `HookNotFiredError`: a name must fire, a filter must fire somewhere.

    Args:
        registry: Where the points are.
        fwd_hooks: Pairs (selection, ``fn(tensor, hook)``).
        bwd_hooks: Pairs (selection, ``fn(grad, hook)``). Gradient functions belong to the graph of the runs
            made inside the block and fire whenever that graph is differentiated, also after the block.
        clear_contexts: Empty the points' ``ctx`` on leaving.
    """

    def __init__(
        self,
        registry: Registry,
        fwd_hooks: Iterable[Any] = (),
        bwd_hooks: Iterable[Any] = (),
        *,
        clear_contexts: bool = False,
    ) -> None:
        self.registry = registry
        self.clear_contexts = clear_contexts
        self._plan: list[tuple[Any, list[Listener]]] = []
        for pair in fwd_hooks:
            self._plan.append(_resolve(registry, pair, "fwd"))
        for pair in bwd_hooks:
            self._plan.append(_resolve(registry, pair, "bwd"))
        self._ran = False
        self._stopped_at: int | None = None

    def __enter__(self) -> HookScope:
        self.registry.depth += 1
        self.registry.scopes.append(self)
        self._ran, self._stopped_at = False, None
        for _, group in self._plan:
            for listener in group:
                listener.level = self.registry.depth
                listener.fired = False
        attach([listener for _, group in self._plan for listener in group])
        return self

    def observe(
        self,
        points: Iterable[HookPoint],
        fn: HookFunction,
        dir: str = "fwd",
        *,
        must_fire: bool = False,
    ) -> None:
        """Add one function that only looks to many points, for the life of the scope.

        Args:
            points: Where.
            fn: ``fn(tensor, hook)``; what it returns is ignored.
            dir: Whether it sees values or gradients.
            must_fire: Whether a point that stays silent is an error.
        """
        level = self.registry.depth
        made = [Listener(fn, point, dir, level=level, observes=True) for point in points]
        self._plan.extend([(x.point.name, [x]) for x in made] if must_fire else [(None, made)])
        attach(made)

    def note_run(self, stopped_at: HookPoint | None = None) -> None:
        """Told by whoever ran the model inside the scope.

        Args:
            stopped_at: Where the run was cut short on purpose; points from there on owe nothing.
        """
        self._ran = True
        if stopped_at is not None:
            order = self.registry.order(stopped_at)
            self._stopped_at = order if self._stopped_at is None else min(order, self._stopped_at)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        if error is None:
            self._check_fired()

    def _leave(self) -> None:
        registry = self.registry
        listeners = [listener for _, group in self._plan for listener in group]
        # Not listener.remove(): gradient hooks on this scope's graphs stay live.
        discard(listeners)
        if self.clear_contexts:
            for listener in listeners:
                listener.point.clear_context()
        registry.depth -= 1
        registry.scopes.remove(self)
        registry.settle()

    def _check_fired(self) -> None:
        # A gradient hook counts as fired when the run passed it; the backward pass is the caller's.
        if not (self._ran or any(x.fired for _, group in self._plan for x in group)):
            return
        for what, group in self._plan:
            if what is not None:
                check_fired(self.registry, group, self._stopped_at)


def check_fired(registry: Registry, group: list[Listener], stopped_at: int | None) -> None:
    """Refuse silence: of listeners that were set together, one must have fired.

    Args:
        registry: Where their points are.
        group: The listeners of one name or filter.
        stopped_at: Where in the order of points the run was cut short on purpose.
    """
    owing = [x for x in group if not x.cancelled]
    if stopped_at is not None:
        owing = [x for x in owing if registry.order(x.point) < stopped_at]
    if owing and not any(listener.fired for listener in group):
        names = ", ".join(str(x.point.name) for x in owing[:3])
        raise HookNotFiredError(
            f"hook {describe(owing[0].fn)} was set at {names} and never fired: "
            "the run did not pass that point (was it started at a later layer?)"
        )


def _resolve(registry: Registry, pair: Any, dir: str) -> tuple[Any, list[Listener]]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InputError(f"a hook is a pair (name or filter, function), got {pair!r}")
    what, fn = pair
    if isinstance(what, HookPoint):
        what = what.name
    if not callable(fn):
        raise InputError(
            f"hook function for {what!r} must be callable, got {type(fn).__name__}: {fn!r}"
        )
    name = "every point" if what is None else what
    return name, [Listener(fn, point, dir) for point in registry.select(what)]
