"""A router's logits, where it makes them: an edit there is what the router then chooses from.

Routers return their logits beside the choice they already made, so changing what comes out changes nothing.
While somebody listens, the router's own matrix product is caught as it happens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hooks import HookPoint, Span
from .places import Rows

_LINEAR = {
    F.linear,
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.mm,
    torch.addmm,
    torch.einsum,
}


class RouterSpan(Span):
    """Fires a point with the scores of all experts.

    Args:
        logits: The point.
        n_experts: How many are scored.
        rows: Rows and positions of the layer that is running; routers see [batch * pos].
    """

    def __init__(self, logits: HookPoint, n_experts: int, rows: Rows) -> None:
        super().__init__((logits,))
        self.logits = logits
        self.n_experts = n_experts
        self.rows = rows
        self._done = False

    def before(self) -> None:
        """A new call of the router."""
        self._done = False
        self.open()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._done or func not in _LINEAR or not isinstance(out, Tensor):
            return out
        if out.shape[-1] != self.n_experts:
            return out
        self._done = True
        new = self.logits.fire(self.rows.split(out) if out.dim() == 2 else out)
        return out if new is None else new.reshape(out.shape)
