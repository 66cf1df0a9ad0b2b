"""Taps: where a hook point's tensor is found in a module call, and how a changed one is put back.

The only module of lensbridge that makes or removes PyTorch hooks. All points of one module share at most
one forward-pre hook and one forward hook, attached while somebody listens and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .point import HookPoint
from .span import Span


class Call:
    """One call of a module, as its taps see and change it.

    Attributes:
        module: The module being called.
        args: Positional arguments (as the module gets or got them).
        kwargs: Keyword arguments.
        output: What it returned; None on the input side.
        changed: Whether a tap wrote.
        scratch: For taps of one call that share work.
    """

    __slots__ = ("args", "changed", "kwargs", "module", "output", "scratch")

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any = None,
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.output = output
        self.changed = False
        self.scratch: dict[str, Any] = {}


@dataclass(frozen=True)
class Tap:
    """A place in a module call.

    Attributes:
        side: ``"input"`` or ``"output"`` of the module.
        read: Picks the tensor; a view where possible, never a needless copy.
        write: Puts a changed tensor back into the call.
        pick: What `read` makes of the output, where it needs no more than that.
    """

    side: Literal["input", "output"]
    read: Callable[[Call], Tensor]
    write: Callable[[Call, Tensor], None]
    pick: Callable[[Any], Tensor] | None = None


@dataclass(frozen=True)
class Action:
    """Something to do at a call while a point is listened to: carry out elsewhere what was written there.

    Attributes:
        run: Given the call.
        side: Before (``"input"``) or after (``"output"``) the module ran.
    """

    run: Callable[[Call], None]
    side: Literal["input", "output"] = "output"


class Unsettled:
    """What the sites of one model have open or owe, shared between them.

    Attributes:
        spans: Spans that are open right now.
        sites: Sites whose listeners changed in the middle of a call, to be refreshed when it is over.
        run: Number of the run, by which sites know that it is a new one.
    """

    __slots__ = ("run", "sites", "spans")

    def __init__(self) -> None:
        self.run = 0
        self.spans: set[Span] = set()
        self.sites: set[Site] = set()

    def settle(self) -> None:
        """Close and refresh what an interrupted run left behind."""
        while self.spans:
            # The innermost first: they are a stack of modes.
            max(self.spans, key=lambda span: span.depth).close()
        while self.sites:
            site = self.sites.pop()
            site.is_firing = False
            site.refresh()


class Site:
    """All taps of one module, behind at most one PyTorch hook a side.

    Args:
        module: The module.
        unsettled: Shared by the sites of a model.
        is_pure: The module changes none of its arguments and runs no other site's module, so that its input
            can be shown when it is done.
        turn: (which, of how many) for a module that is called several times in a pass, of which this site
            serves one call.
    """

    def __init__(
        self,
        module: nn.Module,
        unsettled: Unsettled | None = None,
        *,
        is_pure: bool = False,
        turn: tuple[int, int] | None = None,
    ) -> None:
        self.module = module
        self.span: Span | None = None
        self.unsettled = Unsettled() if unsettled is None else unsettled
        self.is_firing = False
        self._taps: list[tuple[Tap | Action, HookPoint]] = []
        self._inputs: list[tuple[Tap | Action, HookPoint]] = []
        self._outputs: list[tuple[Tap | Action, HookPoint]] = []
        self._before: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._muted: frozenset[HookPoint] = frozenset()
        self._observed: tuple[HookPoint, Callable[[Any], Tensor]] | None = None
        self._is_pure = is_pure
        self._turn = turn
        self._calls = 0  # begun in this run; counted only where turns matter
        self._run = -1

    def add(self, tap: Tap | Action, point: HookPoint) -> None:
        """Make ``point`` fire at ``tap``, or cause an action. All in the order they were added."""
        self._taps.append((tap, point))
        point.__dict__["owners"] = (*point.owners, self)

    def set_span(self, span: Span) -> None:
        """Open ``span`` around the module's forward while one of its points is listened to."""
        self.span = span
        span.open_spans = self.unsettled.spans
        for point in span.points:
            point.__dict__["owners"] = (*point.owners, self)

    def mute(self, points: frozenset[HookPoint]) -> None:
        """Let these points of this site pass calls in silence (an empty set: none)."""
        self._muted = points
        self.refresh()

    def refresh(self) -> None:
        """Attach or detach so that exactly the listened-to points are served."""
        if self.is_firing or (self.span is not None and self.span.is_open):
            # In the middle of a call both hooks are still needed: what one side began the other ends.
            self.unsettled.sites.add(self)
            return
        inputs, outputs, edits = [], [], False
        for pair in self._taps:
            tap, point = pair
            if not (point.fwd or point.bwd) or point in self._muted:
                continue
            if tap.side == "output":
                outputs.append(pair)
                continue
            inputs.append(pair)
            edits = edits or point.n_edits > 0
        if inputs and self._is_pure and not edits:
            # One hook instead of two.
            inputs, outputs = [], inputs + outputs
        self._inputs = inputs
        self._outputs = outputs
        spanning = self.span is not None and self.span.is_wanted
        self._observed = None if inputs or spanning or self._turn else _only_observed(outputs)
        before = bool(inputs) or spanning
        after = bool(outputs) or spanning
        if self._turn is not None:
            before = after = before or after  # to count its turns
        if before != (self._before is not None):
            self._before = self._switch(self._before, self._attach_before)
        if after != (self._after is not None):
            self._after = self._switch(self._after, self._attach_after)

    @staticmethod
    def _switch(
        handle: RemovableHandle | None, attach: Callable[[], RemovableHandle]
    ) -> RemovableHandle | None:
        if handle is None:
            return attach()
        handle.remove()
        return None

    def _attach_before(self) -> RemovableHandle:
        # prepend: Hugging Face's own recording hooks must see what we made of the value.
        return self.module.register_forward_pre_hook(self._on_input, prepend=True, with_kwargs=True)

    def _attach_after(self) -> RemovableHandle:
        return self.module.register_forward_hook(
            self._on_output, prepend=True, with_kwargs=True, always_call=self.span is not None
        )

    def _on_input(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._turn is not None and not self._is_my_turn():
            return None
        call = Call(module, args, kwargs)
        self._show(call, self._inputs)
        if self.span is not None and self.span.is_wanted:
            self.span.before()
        if self._after is None and self in self.unsettled.sites:
            self._catch_up()
        return (call.args, dict(call.kwargs)) if call.changed else None

    def _on_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._observed is not None and not self.unsettled.spans and output is not None:
            return self._observe(*self._observed, output)
        if self._turn is not None and (self._calls - 1) % self._turn[1] != self._turn[0]:
            return None
        if self.span is not None:
            self.span.close()
        if output is None:
            return None  # the module raised; always_call brought us here only to close
        call = Call(module, args, kwargs, output)
        self._show(call, self._outputs)
        if self in self.unsettled.sites:
            self._catch_up()
        return call.output if call.changed else None

    def _observe(self, point: HookPoint, pick: Callable[[Any], Tensor], output: Any) -> None:
        """The usual case, kept short: one point, whose listeners only look."""
        self.is_firing = True
        try:
            value = pick(output)
            for listener in point.fwd:
                listener.fired = True
                listener.fn(value, point)
        finally:
            self.is_firing = False
        if self.unsettled.sites and self in self.unsettled.sites:
            self._catch_up()

    def _is_my_turn(self) -> bool:
        """Count a call that begins; whether it is the one this site serves."""
        if self._run != self.unsettled.run:
            self._run, self._calls = self.unsettled.run, 0
        self._calls += 1
        return (self._calls - 1) % self._turn[1] == self._turn[0]  # type: ignore[index]

    def _catch_up(self) -> None:
        self.unsettled.sites.discard(self)
        self.refresh()

    def _show(self, call: Call, pairs: list[tuple[Tap | Action, HookPoint]]) -> None:
        self.is_firing = True
        try:
            if self.unsettled.spans:
                # What listeners compute is their own business, not part of what a span watches.
                with torch._C.DisableTorchFunction():
                    _show(call, pairs)
            else:
                _show(call, pairs)
        finally:
            self.is_firing = False


def _only_observed(
    outputs: list[tuple[Tap | Action, HookPoint]],
) -> tuple[HookPoint, Callable[[Any], Tensor]] | None:
    """The one point to show and how to get its tensor, where nobody edits and the output is all it takes."""
    if len(outputs) != 1:
        return None
    tap, point = outputs[0]
    pick = tap.pick if isinstance(tap, Tap) else None
    return None if pick is None or point.n_edits else (point, pick)


def _show(call: Call, pairs: list[tuple[Tap | Action, HookPoint]]) -> None:
    for tap, point in pairs:
        if isinstance(tap, Action):
            tap.run(call)
            continue
        value = tap.read(call)
        if point.n_edits and tap.side == "input":
            # Others read this tensor too; an edit in place must reach this module alone.
            value = value.clone()
        new = point.fire(value)
        if new is not None:
            tap.write(call, new)


@contextmanager
def watch(
    modules: Mapping[str, nn.Module],
    before: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[str, Any], None] | None = None,
) -> Iterator[None]:
    """Be told of every call of many modules, for the length of a ``with`` block.

    Args:
        modules: Modules by the name to report them under.
        before: Given the name and the arguments of a call that begins.
        after: Given the name and the output of a call that is over; None when nobody asks.
    """
    handles: list[RemovableHandle] = []
    try:
        for name, module in modules.items():
            begin = partial(_begin, before, name)
            end = None if after is None else partial(_end, after, name)
            # prepend: what is told here must be known to the hooks of the same call.
            handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
            if end is not None:
                handles.append(module.register_forward_hook(end))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _begin(
    before: Callable[[str, tuple[Any, ...], dict[str, Any]], None],
    name: str,
    _: nn.Module,
    args: Any,
    kwargs: Any,
) -> None:
    with torch._C.DisableTorchFunction():
        before(name, args, kwargs)


def _end(
    after: Callable[[str, Any], None], name: str, _: nn.Module, args: Any, output: Any
) -> None:
    with torch._C.DisableTorchFunction():
        after(name, output)
