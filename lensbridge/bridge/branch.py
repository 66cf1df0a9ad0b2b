"""Editing the residual stream between attention and MLP, where the model holds it in a local variable.

Hugging Face's code keeps ``residual = hidden_states`` and hands the same tensor to the next norm. A hook on
that norm can change what the MLP reads, but not what is added afterwards. To change the *stream*, the edited
tensor must stand in for the original in every operation until the block ends; this span does that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..hooks import Call, HookPoint, Span, Tap
from .places import get_input, set_input


class BranchSpan(Span):
    """From an edit of `point` to the end of its block, puts the edited tensor where the original is used."""

    def __init__(self, point: HookPoint) -> None:
        super().__init__((point,))
        self._old: Tensor | None = None
        self._new: Tensor | None = None

    def before(self) -> None:
        """Nothing to watch when the block starts: an edit opens the span."""

    def close(self) -> None:
        """The block is over (or failed): stop substituting."""
        self._old = self._new = None
        super().close()

    def tap(self) -> Tap:
        """The stream where the second branch leaves it; a write reaches branch and stream alike."""

        def write(call: Call, value: Tensor) -> None:
            self.open()
            self._old, self._new = get_input(call), value
            set_input(call, value)

        return Tap("input", get_input, write)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        args = tuple(self._swap(value) for value in args)
        return func(*args, **{name: self._swap(value) for name, value in (kwargs or {}).items()})

    def _swap(self, value: Any) -> Any:
        if value is self._old:
            return self._new
        if isinstance(value, (tuple, list)) and any(item is self._old for item in value):
            return type(value)([self._swap(item) for item in value])
        return value
