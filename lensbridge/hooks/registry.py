"""HookRegistry: an ordered mapping from names to points, with aliases, selection and suggestions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .errors import AbsentPointError, PointError, SelectionError, UnknownPointError
from .point import HookPoint, Listener
from .scope import HookScope, check_fired
from .step import Clock
from .tap import Unsettled

Selection = Any
"""None (every default point), a name, alias or glob, a regex, a predicate on names, or a list of these."""

_GLOB = frozenset("*?[")


def glob_of(pattern: str) -> re.Pattern[str]:
    """Like a path: ``*`` and ``?`` stay within one dotted part, ``**`` spans several; ``[0-3]``, ``[!0]``."""
    pieces = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    special = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    sets = {x: x.replace("[!", "[^", 1) for x in pieces if x.startswith("[") and x.endswith("]")}
    return re.compile("".join({**special, **sets}.get(x, re.escape(x)) for x in pieces))


@runtime_checkable
class Extra(Protocol):
    """A source of points beyond the listed ones."""

    def knows(self, name: str) -> bool:
        """Whether a name or glob is one of its own."""
        ...

    def names(self, matches: Callable[[str], Any]) -> list[str]:
        """Its names that match.

        Raises:
            UnknownPointError: None does.
        """
        ...

    def make(self, name: str) -> HookPoint:
        """The point of that name.

        Raises:
            UnknownPointError: There is no such place.
        """
        ...


class HookRegistry(Mapping[str, HookPoint]):
    """Every point of a model by name, in execution order.

    Args:
        points: The points, each with its canonical name and aliases set.
        absent: Canonical names this model lacks, with the reason. Names may be templates with ``{i}``.
        unsettled: Shared with the sites that serve the points.
        extra: Makes further points when they are first asked for; they are in no listing.
    """

    def __init__(
        self,
        points: Iterable[HookPoint] = (),
        absent: Mapping[str, str] | None = None,
        unsettled: Unsettled | None = None,
        extra: Extra | None = None,
    ) -> None:
        self._extra = extra
        self.layers = "blocks"  # where shorthand like ("resid_post", 3) looks
        self.weights: Any = {}  # what else has a name in the model: a table of the same names' weights
        self.owner: Any = None  # what the points are in, for whoever builds the registry to say
        self._made: dict[str, HookPoint] = {}  # by `extra`, when first asked for
        self._points: dict[str, HookPoint] = {}
        self.aliases: dict[str, str] = {}
        self._order: dict[str, int] = {}
        self._standing: list[list[Listener]] = []  # set by add_hook, until removed
        self.absent: dict[str, str] = dict(absent or {})
        self.unsettled = Unsettled() if unsettled is None else unsettled
        self.live: set[HookPoint] = set()
        self.clock = Clock()
        self._selected: dict[Any, list[HookPoint]] = {}
        self.depth = 0
        self.running = 0  # runs of the model in progress; more than one when a hook runs it
        self.scopes: list[HookScope] = []
        for point in points:
            self.add(point)

    @classmethod
    def from_module(cls, module: nn.Module) -> HookRegistry:
        """Collect the HookPoints inside a module, naming each after its path."""
        registry = cls()
        for path, child in module.named_modules():
            if isinstance(child, HookPoint):
                child.__dict__["name"] = path
                registry.add(child)
        return registry

    def add(self, point: HookPoint) -> HookPoint:
        """Register a point under its name and aliases.

        Raises:
            PointError: The name or an alias is taken, or the point has no name.
        """
        names = [point.name, *point.aliases]
        taken = [
            name for name in names if name is None or name in self._points or name in self.aliases
        ]
        if taken:
            raise PointError(f"cannot register {point!r}: {taken[0]!r} is no free name")
        self._points[str(point.name)] = point
        self._selected.clear()
        point.__dict__.update(live=self.live, clock=self.clock)
        if point.fwd or point.bwd:
            self.live.add(point)
        for alias in point.aliases:
            self.aliases[alias] = str(point.name)
        return point

    def add_behind(self, host: HookPoint, points: Iterable[HookPoint]) -> None:
        """Register points that fire right behind another one.

        Raises:
            PointError: A name is taken; none is registered then.
        """
        made = list(points)
        before = list(self._points)
        try:
            for point in made:
                self.add(point)
        except PointError:
            self.drop(made)
            raise
        at = before.index(str(host.name)) + 1
        names = [*before[:at], *(str(point.name) for point in made), *before[at:]]
        self._points = {name: self._points[name] for name in names}
        self._order.clear()

    def drop(self, points: Iterable[HookPoint]) -> None:
        """Forget points and whoever listens there."""
        for point in points:
            if self._points.get(str(point.name)) is not point:
                continue
            point.remove_hooks("both", including_permanent=True)
            del self._points[str(point.name)]
            for alias in point.aliases:
                self.aliases.pop(alias, None)
        self._order.clear()
        self._selected.clear()

    # --- mapping ---------------------------------------------------------------------------------

    def __getitem__(self, name: Any) -> HookPoint:
        point = self._points.get(name) if isinstance(name, str) else None
        if point is not None:
            return point
        canonical = self.aliases.get(name) if isinstance(name, str) else None
        if canonical is not None:
            return self._points[canonical]
        if isinstance(name, str) and self._extra is not None and self._extra.knows(name):
            return self._make(self._extra, name)
        raise self.missing(name)

    def _make(self, extra: Extra, name: str) -> HookPoint:
        if name not in self._made:
            point = extra.make(name)
            point.__dict__.update(live=self.live, clock=self.clock)
            self._made[name] = point
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._points)

    def __len__(self) -> int:
        return len(self._points)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._points or name in self.aliases)

    def __repr__(self) -> str:
        return f"HookRegistry({len(self._points)} points, {len(self.aliases)} aliases)"

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Points by canonical name and by alias."""
        return {
            **self._points,
            **{alias: self._points[name] for alias, name in self.aliases.items()},
        }

    def order(self, point: HookPoint) -> int:
        """Where a point comes in a run; names are held in execution order."""
        if len(self._order) != len(self._points):
            self._order = {name: index for index, name in enumerate(self._points)}
        return self._order.get(str(point.name), len(self._order))

    def canonical(self, name: Any) -> str:
        """The canonical name behind a name or alias.

        Raises:
            UnknownPointError: Nothing is called that; the nearest names are listed.
            AbsentPointError: This model has no such place; says why.
        """
        return str(self[name].name)

    # --- errors ----------------------------------------------------------------------------------

    def why(self, name: str) -> str | None:
        """Why this model has no point of that name; None when it has one or no model would."""
        if name in self:
            return None
        template = re.sub(r"(?<=blocks\.)\d+", "{i}", name)
        layer = re.search(r"\w*blocks\.(\d+)\.", name)
        if name in self.absent:
            return self.absent[name]
        # "blocks.99.hook_out" must not be explained by the reason that holds for existing layers.
        if layer and not any(known.startswith(layer.group(0)) for known in self._points):
            return None
        return self.absent.get(template)

    def nearest(self, name: str, most: int = 4) -> list[str]:
        """Names and aliases closest to a misspelt one."""
        known = [*self._points, *self.aliases]
        # Same layer first: the digits of a name are rarely the misspelt part.
        layer = re.search(r"\w*blocks\.(\d+)\.", name)
        peers = [k for k in known if layer and layer.group(0) in k] or known
        found = get_close_matches(name, peers, n=most, cutoff=0.55)
        return found or get_close_matches(name, known, n=most, cutoff=0.3)

    def missing(self, name: object) -> PointError:
        """The exception for a name that leads nowhere."""
        if not isinstance(name, str):
            return UnknownPointError(
                f"a point name is a string, got {type(name).__name__}: {name!r}"
            )
        reason = self.why(name)
        if reason is not None:
            return AbsentPointError(f"this model has no point {name!r}: {reason}")
        nearest = self.nearest(name)
        hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
        asked = re.match(r"(\w*blocks)\.(\d+)\.", name)
        stack = re.escape(asked.group(1)) if asked else "blocks"
        found = (re.match(rf"{stack}\.(\d+)\.", k) for k in self._points)
        layers = sorted({int(m.group(1)) for m in found if m})
        if asked and layers and int(asked.group(2)) not in layers:
            hint = f"; the layers are {layers[0]} to {layers[-1]}" + hint
        return UnknownPointError(f"no hook point is called {name!r}{hint}")

    # --- selection -------------------------------------------------------------------------------

    def select(self, selection: Selection = None) -> list[HookPoint]:
        """The points a filter means, each once, in registry order.

        Args:
            selection: None for every default point; a name or alias; a glob, in which ``*`` stands for one
                part of a name and ``**`` for any number (``"blocks.*.hook_out"``, ``"**.hook_pattern"``); a
                compiled regex; a predicate on names (aliases are tried too); or a list of these.
        Raises:
            UnknownPointError, AbsentPointError: A name, glob, regex or predicate that selects nothing.
            SelectionError: Not a filter at all.
        """
        if selection is None or isinstance(selection, str):
            # Selections by value are remembered; predicates may change their mind.
            found = self._selected.get(selection)
            if found is None:
                found = self._selected[selection] = self._select_item(selection)
            return list(found)
        if isinstance(selection, (list, tuple, set, frozenset)):
            chosen = {id(point) for item in selection for point in self._select_item(item)}
            known = (*self._points.values(), *self._made.values())
            return [point for point in known if id(point) in chosen]
        return self._select_item(selection)

    def forget_selections(self) -> None:
        """To be called after the points' ``is_default`` was changed."""
        self._selected.clear()

    def _select_item(self, item: Any) -> list[HookPoint]:
        if item is None:
            return [point for point in self._points.values() if point.is_default]
        if isinstance(item, HookPoint):  # callable, but no predicate
            return [self[str(item.name)]]
        if isinstance(item, str):
            if not _GLOB.intersection(item):
                return [self[item]]
            if self._extra is not None and self._extra.knows(item):
                return [
                    self._make(self._extra, name)
                    for name in self._extra.names(glob_of(item).fullmatch)
                ]
            matches: Callable[[str], Any] = glob_of(item).fullmatch
        elif isinstance(item, re.Pattern):
            matches = item.search
        elif callable(item):
            matches = item
        else:
            raise SelectionError(
                f"cannot select hook points with {type(item).__name__} {item!r}; give None, a name, a glob, "
                "a regex, a predicate on names, or a list of these"
            )
        chosen = [
            point
            for name, point in self._points.items()
            if matches(name) or any(matches(alias) for alias in point.aliases)
        ]
        if not chosen:
            what = repr(item) if isinstance(item, (str, re.Pattern)) else f"the predicate {item!r}"
            hint = self.nearest(item) if isinstance(item, str) else []
            hint = hint or list(self._points)[:3]
            raise UnknownPointError(
                f"{what} selects none of the {len(self)} points; for example there are: {', '.join(hint)}"
            )
        return chosen

    # --- listening -------------------------------------------------------------------------------

    def add_hook(
        self,
        selection: Selection,
        fn: Any,
        dir: str = "fwd",
        *,
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> list[Listener]:
        """Add ``fn`` to every selected point, until removed or reset.

        A run of the bridge that passes none of the points is an error, as in a scope.
        """
        depth = self.depth if level is None else level
        made = [
            point.add_hook(fn, dir, is_permanent=is_permanent, level=depth, prepend=prepend)
            for point in self.select(selection)
        ]
        self._standing.append(made)
        return made

    def begin_run(self) -> None:
        """A run of the model starts."""
        self.running += 1
        self.unsettled.run += 1
        for group in self._standing:
            for listener in group:
                listener.fired = False

    def end_run(self) -> None:
        """It is over, however it ended."""
        self.running -= 1
        self.settle()

    def note_run(self, stopped_at: HookPoint | None = None) -> None:
        """It ended as it should: hooks that are set and did not fire are an error.

        Args:
            stopped_at: Where it was cut short on purpose; points from there on owe nothing.
        """
        for scope in self.scopes:
            scope.note_run(stopped_at)
        if self._standing:
            order = None if stopped_at is None else self.order(stopped_at)
            self._standing = [
                group for group in self._standing if not all(x.cancelled for x in group)
            ]
            for group in self._standing:
                check_fired(self, group, order)

    def hooks(
        self,
        fwd_hooks: Iterable[Any] = (),
        bwd_hooks: Iterable[Any] = (),
        *,
        clear_contexts: bool = False,
    ) -> HookScope:
        """A scope: ``with registry.hooks(fwd_hooks=[("blocks.0.hook_out", fn)]): ...``."""
        return HookScope(self, fwd_hooks, bwd_hooks, clear_contexts=clear_contexts)

    def reset(
        self,
        clear_contexts: bool = True,
        direction: str = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove listeners everywhere."""
        for point in self._points.values():
            if point.fwd or point.bwd:
                point.remove_hooks(direction, including_permanent, level)
            if clear_contexts and point.ctx:
                point.clear_context()
        self.settle()

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Nobody listens for the length of a ``with`` block, and no hook owes to have fired in it."""
        held = [(point, point.fwd, point.bwd) for point in self.live]
        owing = self._standing, self.scopes
        self._standing, self.scopes = [], []
        self._tell(held, lambda point, fwd, bwd: ((), ()))
        try:
            yield
        finally:
            self._standing, self.scopes = owing
            self._tell(held, lambda point, fwd, bwd: (fwd, bwd))

    @staticmethod
    def _tell(held: list[Any], what: Callable[..., Any]) -> None:
        for point, fwd, bwd in held:
            point.__dict__["fwd"], point.__dict__["bwd"] = what(point, fwd, bwd)
        for point, _, _ in held:
            for owner in point.owners:
                owner.refresh()

    def settle(self) -> None:
        """Close whatever an interrupted run left open."""
        if not self.running and (self.unsettled.spans or self.unsettled.sites):
            self.unsettled.settle()
