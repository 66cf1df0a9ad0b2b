"""Taps: where a hook point's tensor is found in a module call, and how a changed one is put back.

The only module of lensbridge that makes or removes PyTorch hooks. All points of one module share at most
one forward-pre hook and one forward hook, attached while somebody listens and not before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .point import HookPoint


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
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.output = output
        self.changed = False
        self.scratch: dict[Any, Any] = {}


@dataclass(frozen=True)
class Tap:
    """A place in a module call.

    Attributes:
        side: ``"input"`` or ``"output"`` of the module.
        read: Picks the tensor; a view where possible, never a needless copy.
        write: Puts a changed tensor back into the call.
        late: For an input whose change must not touch the module's other readers of the same input (one
            third of a joint projection): given the changed tensor, mends the call's *output* instead.
    """

    side: Literal["input", "output"]
    read: Callable[[Call], Tensor]
    write: Callable[[Call, Tensor], None]
    late: Callable[[Call, Tensor], None] | None = None


@runtime_checkable
class Span(Protocol):
    """Something open while a module runs, and only while one of its points is listened to."""

    points: tuple[HookPoint, ...]
    is_open: bool

    def open(self) -> None:
        """Called right before the module's forward."""

    def close(self) -> None:
        """Called right after it; must be harmless when not open."""


class Site:
    """All taps of one module, behind at most one PyTorch hook a side."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.span: Span | None = None
        self._taps: list[tuple[Tap, HookPoint]] = []
        self._inputs: list[tuple[Tap, HookPoint]] = []
        self._outputs: list[tuple[Tap, HookPoint]] = []
        self._late: list[tuple[Tap, Tensor]] = []
        self._before: RemovableHandle | None = None
        self._after: RemovableHandle | None = None
        self._muted: frozenset[HookPoint] = frozenset()

    def add(self, tap: Tap, point: HookPoint) -> None:
        """Make ``point`` fire at ``tap``. Points of a side fire in the order they were added."""
        self._taps.append((tap, point))
        point.__dict__["owners"] = (*point.owners, self)

    def set_span(self, span: Span) -> None:
        """Open ``span`` around the module's forward while one of its points is listened to."""
        self.span = span
        for point in span.points:
            point.__dict__["owners"] = (*point.owners, self)

    def mute(self, points: frozenset[HookPoint]) -> None:
        """Let these points of this site pass calls in silence (an empty set: none)."""
        self._muted = points
        self.refresh()

    def refresh(self) -> None:
        """Attach or detach so that exactly the listened-to points are served."""
        active = [
            pair for pair in self._taps if (pair[1].fwd or pair[1].bwd) and pair[1] not in self._muted
        ]
        self._inputs = [pair for pair in active if pair[0].side == "input"]
        self._outputs = [pair for pair in active if pair[0].side == "output"]
        if not any(tap.late for tap, _ in self._inputs):
            self._late = []
        spanning = self.span is not None and any(p.fwd or p.bwd for p in self.span.points)
        needs_after = bool(self._outputs) or spanning or any(t.late for t, _ in self._inputs)
        self._before = self._switch(self._before, bool(self._inputs) or spanning, self._attach_before)
        self._after = self._switch(self._after, needs_after, self._attach_after)

    @staticmethod
    def _switch(
        handle: RemovableHandle | None, wanted: bool, attach: Callable[[], RemovableHandle]
    ) -> RemovableHandle | None:
        if wanted and handle is None:
            return attach()
        if not wanted and handle is not None:
            handle.remove()
            return None
        return handle

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
        call = Call(module, args, kwargs)
        self._late = []
        for tap, point in self._inputs:
            new = point.fire(tap.read(call))
            if new is None:
                continue
            if tap.late is None:
                tap.write(call, new)
            else:
                self._late.append((tap, new))
        if self.span is not None and any(p.fwd or p.bwd for p in self.span.points):
            self.span.open()
        return (call.args, dict(call.kwargs)) if call.changed else None

    def _on_output(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self.span is not None:
            self.span.close()
            if output is None:
                return None  # the module raised; always_call brought us here only to close
        call = Call(module, args, kwargs, output)
        for tap, new in self._late:
            if tap.late is not None:
                tap.late(call, new)
        self._late = []
        for tap, point in self._outputs:
            new = point.fire(tap.read(call))
            if new is not None:
                tap.write(call, new)
        return call.output if call.changed else None
