"""Spans: a torch function mode that is open while a module runs, and only while somebody listens inside."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from .point import HookPoint


class Span(TorchFunctionMode):
    """Sees the torch functions a module calls. Subclasses say what to do with them.

    The site of the module opens it right before the module's forward and closes it right after, however the
    forward ended; the registry closes what an interrupt left open. Inside listeners it is switched off.

    Args:
        points: The points that fire inside; while none is listened to, the span stays closed.
    """

    def __init__(self, points: tuple[HookPoint, ...]) -> None:
        super().__init__()
        self.points = points
        self.open_spans: set[Any] = set()  # replaced by the set all spans of a model share
        self.depth = 0

    @property
    def is_open(self) -> bool:
        """Whether the mode is on this thread's stack."""
        return self in self.open_spans

    @property
    def is_wanted(self) -> bool:
        """Whether somebody listens inside."""
        return any(point.fwd or point.bwd for point in self.points)

    def before(self) -> None:
        """The module is about to run."""
        self.open()

    def open(self) -> None:
        """Start watching."""
        self.close()
        self.depth = len(self.open_spans)
        self.open_spans.add(self)
        self.__enter__()

    def close(self) -> None:
        """Stop watching; harmless when not open."""
        if self in self.open_spans:
            self.open_spans.discard(self)
            self.__exit__(None, None, None)
