"""Putting a recomputed value in place of the model's own, without disturbing what nobody changed."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def graft(
    original: Float[Tensor, "*shape"],
    recomputed: Float[Tensor, "*shape"],
    untouched: Bool[Tensor, "*mask"],
) -> Float[Tensor, "*shape"]:
    """The recomputed value, except that untouched entries keep the model's own bits.

    Recomputing in another order of operations moves the last bit; without this, listening would change the
    logits. Gradients go through the recomputed value throughout.
    """
    recomputed = recomputed.to(original.dtype)
    if not (torch.is_grad_enabled() and recomputed.requires_grad):
        made = torch.where(untouched, original, recomputed)
        # Models view what they made: the layout is part of the value.
        return made.contiguous() if original.is_contiguous() else made
    difference = (original - recomputed).detach()
    return recomputed + torch.where(untouched, difference, torch.zeros_like(difference))
