"""Attention inside: scores, pattern, rotated q and k, at the model's own attention call.

While a layer's inner points are listened to, and only then, a torch function mode is open during that
layer's attention module. It sees the attention happen whatever the code around it looks like: a fused
``scaled_dot_product_attention`` is computed in the open instead, a hand-written softmax is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hooks import HookPoint, Span, Step

SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
ADDING_PRODUCTS = {torch.baddbmm, Tensor.baddbmm}
PRODUCTS = {
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.einsum,
    *ADDING_PRODUCTS,
}
_WATCHED = SOFTMAX | PRODUCTS | {F.scaled_dot_product_attention}


class AttentionSpan(Span):
    """Opens one attention module while somebody listens inside it.

    Args:
        n_heads: Query heads.
        n_key_value_heads: Key and value heads.
        scores, pattern: Their points.
        rot_q, rot_k: Points of q and k as they enter the product; None in a model that does not rotate.
        nth: Which softmax of the module is the attention's, where it is written out.
    """

    def __init__(
        self,
        n_heads: int,
        n_key_value_heads: int,
        scores: HookPoint,
        pattern: HookPoint,
        rot_q: HookPoint | None = None,
        rot_k: HookPoint | None = None,
        nth: int | None = None,
    ) -> None:
        super().__init__(tuple(p for p in (rot_q, rot_k, scores, pattern) if p is not None))
        self.n_heads = n_heads
        self.n_key_value_heads = n_key_value_heads
        self.scores = scores
        self.pattern = pattern
        self.rot_q = rot_q
        self.rot_k = rot_k
        self.nth = nth
        self._live: Tensor | None = None
        self._product_seen = False
        self._softmaxes = 0

    def before(self) -> None:
        """A new call of the attention module."""
        self._live, self._product_seen, self._softmaxes = None, False, 0
        self.open()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WATCHED:
            if func is F.scaled_dot_product_attention:
                return self._fused(*args, **kwargs)
            if func in PRODUCTS:
                return self._product(func, args, kwargs)
            return self._softmax(func, args, kwargs)
        out = func(*args, **kwargs)
        live = self._live
        if live is not None and isinstance(out, Tensor) and any(a is live for a in args):
            self._live = out  # dropout, a cast, a sink column sliced off: still the pattern
        return out

    # --- the fused call --------------------------------------------------------------------------

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | int | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        q, k = self._fire_rotated(query, key)
        v = value
        if q.shape[1] != k.shape[1]:  # enable_gqa
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        # Scaling q is one pass over [pos, d_head] instead of one over [pos, pos].
        scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
        dead = None
        if is_causal:
            ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
            scores = scores.masked_fill_(ahead, -torch.inf)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            dead = ~attn_mask.any(-1, keepdim=True)
            scores = scores.masked_fill_(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            dead = torch.isneginf(attn_mask).all(-1, keepdim=True)
            scores = scores + attn_mask
        scores = self._fire_square(self.scores, scores)
        if dead is not None and not bool(dead.any()):
            dead = None
        if dead is not None:
            # A row that may look nowhere (padding) gets zeros from the fused kernel, not NaN. Filled before
            # the softmax as well, or its gradient would be NaN.
            scores = scores.masked_fill(dead, 0.0)
        # At least float32 inside the softmax, as in the models' own eager code.
        wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
        pattern = torch.softmax(wide, dim=-1).to(v.dtype)
        if dead is not None:
            pattern = pattern.masked_fill(dead, 0.0)
        if dropout_p > 0.0:
            pattern = F.dropout(pattern, dropout_p)
        return self._fire_square(self.pattern, pattern) @ v

    # --- attention written out ---------------------------------------------------------------------

    def _softmax(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        x = args[0] if args else kwargs.get("input")
        nth, self._softmaxes = self._softmaxes, self._softmaxes + 1
        if not isinstance(x, Tensor) or not self._is_ours(x, nth):
            return func(*args, **kwargs)  # some other softmax: a router's, say
        rest = {name: value for name, value in kwargs.items() if name != "input"}
        self._live = func(self._fire_square(self.scores, x), *args[1:], **rest)
        return self._live

    def _is_ours(self, x: Tensor, nth: int) -> bool:
        if self.nth is not None:
            return nth == self.nth
        # The watched run was fused; this one is not.
        usual = x.dim() == 4 and x.shape[1] == self.n_heads
        return self._live is None and (usual or (x.dim() == 3 and x.shape[0] % self.n_heads == 0))

    def _product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        if func in ADDING_PRODUCTS:
            return self._adding_product(func, args, kwargs)
        if func is torch.einsum:
            return func(*(self._fire_live(x) for x in args), **kwargs)
        if len(args) < 2:
            return func(*args, **kwargs)
        left, right, *rest = args
        if self._live is not None and left is self._live:
            left = self._fire_live(left)
        elif not self._product_seen and self._is_qk(left, right):
            left, right = self._fire_operands(left, right)
        return func(left, right, *rest, **kwargs)

    def _adding_product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """``baddbmm(bias, q, k)``, its operands by position or by name."""
        given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | dict(kwargs)
        left, right = given.get("batch1"), given.get("batch2")
        if not self._product_seen and self._is_qk(left, right):
            given["batch1"], given["batch2"] = self._fire_operands(left, right)
        return func(given.pop("input"), given.pop("batch1"), given.pop("batch2"), **given)

    def _fire_operands(self, left: Any, right: Any) -> tuple[Tensor, Tensor]:
        self._product_seen = True
        if left.dim() == 4:
            left, key = self._fire_rotated(left, right.transpose(-1, -2))
            return left, key.transpose(-1, -2)
        # Heads folded into the batch.
        shapes = left.shape, right.shape
        apart = [x.view(-1, self.n_heads, *x.shape[1:]) for x in (left, right)]
        left, key = self._fire_rotated(apart[0], apart[1].transpose(-1, -2))
        return left.reshape(shapes[0]), key.transpose(-1, -2).reshape(shapes[1])

    def _is_qk(self, left: Any, right: Any) -> bool:
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            return False
        if left.dim() != right.dim() or left.shape[-1] != right.shape[-2]:
            return False
        if left.dim() == 4:
            return left.shape[1] in (self.n_heads, self.n_key_value_heads)
        return (
            left.dim() == 3 and left.shape[0] == right.shape[0] and not left.shape[0] % self.n_heads
        )

    def _fire_live(self, x: Any) -> Any:
        """The pattern, fired, where it enters a product; anything else as it is."""
        if isinstance(x, (list, tuple)):
            return type(x)(self._fire_live(item) for item in x)
        if self._live is None or x is not self._live:
            return x
        self._live, self._product_seen = None, True
        return self._fire_square(self.pattern, x)

    # --- firing ------------------------------------------------------------------------------------

    def _fire_rotated(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Fire rot_q and rot_k in [batch, pos, head, d_head]; give back the model's own layout."""
        q_point, k_point = self.rot_q, self.rot_k
        if q_point is not None and (q_point.fwd or q_point.bwd):
            new = q_point.fire(self._unpack(query).transpose(1, 2))
            if new is not None:
                query = new.transpose(1, 2).reshape(query.shape)
        if k_point is not None and (k_point.fwd or k_point.bwd):
            own, spread = self._own_heads(key)
            if query.shape[-2] != key.shape[-2]:
                _tell_of_keys(k_point, key.shape[-2])
            new = k_point.fire(own.transpose(1, 2))
            if new is not None:
                key = spread(new.transpose(1, 2))
        return query, key

    def _own_heads(self, key: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The keys before they were repeated for the query heads, and how to repeat them again."""
        n = self.n_key_value_heads
        times = key.shape[1] // n
        if times > 1 and torch.equal(key[:, 0], key[:, 1]):
            return key[:, ::times], lambda x: x.repeat_interleave(times, dim=1)
        if times > 1 and torch.equal(key[:, 0], key[:, n]):
            return key[:, :n], lambda x: x.repeat(1, times, 1, 1)
        return key, lambda x: x

    def _fire_square(self, point: HookPoint, x: Tensor) -> Tensor:
        """Fire scores or pattern in [batch, head, query, key]; give back the model's own layout."""
        if not (point.fwd or point.bwd):
            return x
        new = point.fire(self._unpack(x))
        return x if new is None else new.reshape(x.shape)

    def _unpack(self, x: Tensor) -> Tensor:
        """Undo transformers' packing of grouped heads into the query axis when decoding one token."""
        if x.dim() == 3:  # heads folded into the batch
            return x.view(-1, self.n_heads, *x.shape[1:])
        if x.shape[1] != self.n_heads and x.shape[1] * x.shape[2] == self.n_heads:
            return x.reshape(x.shape[0], self.n_heads, 1, x.shape[3])
        return x


def _tell_of_keys(point: HookPoint, n_keys: int) -> None:
    """Keys kept from earlier passes come along: the tensor begins before this pass does."""
    clock = point.clock
    now = None if clock is None else clock.main
    if clock is None or now is None or now.stop is None or ".cross_attn." in str(point.name):
        return
    first = max(now.stop - n_keys, 0)  # a store of fixed size begins at 0 and ends in empty places
    step = Step(now.number, now.phase, first, first + n_keys, now.prompt_length)
    clock.others = {str(point.name): step, **clock.others}
