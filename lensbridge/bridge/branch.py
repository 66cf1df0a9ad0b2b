"""Editing the residual stream between attention and MLP, where the model holds it in a local variable.

Hugging Face's code keeps ``residual = hidden_states`` and hands the same tensor to the next norm. A hook on
that norm can change what the MLP reads, but not what is added afterwards. To change the *stream*, the edited
tensor must stand in for the original in every operation until the block ends; this span does that.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..hooks import Call, HookPoint, Span, Tap
from .places import get_input, set_input


class BranchSpan(Span):
    """From an edit of `point` to the end of its block, puts the edited tensor where the original is used."""

    def __init__(self, point: HookPoint) -> None:
        super().__init__((point,))

    def before(self) -> None:
        """Nothing to watch when the block starts: an edit opens the span."""

    def close(self) -> None:
        """The block is over (or failed): stop substituting."""
        if self.is_open:
            # Pairs of this span only: another bridge's span on the same block may be open too.
            _edits.pairs = [pair for pair in _edits.pairs if pair[0] is not self]
        super().close()

    def tap(self) -> Tap:
        """The stream where the second branch leaves it; a write reaches branch and stream alike."""

        def write(call: Call, value: Tensor) -> None:
            self.open()
            _edits.pairs = [*_edits.pairs, (self, get_input(call), value)]
            set_input(call, value)

        return Tap("input", get_input, write)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args = tuple(_swap(value) for value in args)
        return func(*args, **{name: _swap(value) for name, value in (kwargs or {}).items()})


class _Edits(threading.local):
    """The edits in force on this thread, oldest first: (span, original, what stands in for it)."""

    pairs: list[tuple[BranchSpan, Tensor, Tensor]] = []  # noqa: RUF012 - replaced, never changed


_edits = _Edits()


def _swap(value: Any) -> Any:
    if isinstance(value, Tensor):
        for _, old, new in _edits.pairs:
            if value is old:
                value = new
        return value
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        swapped = [_swap(item) for item in value]
        return (
            value
            if all(a is b for a, b in zip(value, swapped, strict=True))
            else type(value)(swapped)
        )
    return value
