"""What concepts say: the tokens that a direction in the residual stream makes likelier, and unlikelier."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge import TransformerBridge, module_of
from ...hooks import InputError


@torch.no_grad()
def logit_effects(
    bridge: TransformerBridge, directions: Float[Tensor, "concept d_model"]
) -> Float[Tensor, "concept d_vocab"]:
    """What directions add to the logits, straight through the head.

    The final norm's gain is applied (and its centring), not its scale, which depends on the text:
    effects of a direction are right relative to each other, and up to one positive factor a place.

    Args:
        bridge: The model.
        directions: In the residual stream: a dictionary, say.
    Raises:
        InputError: Directions of another width.
        AbsentPointError: The model has no head.
    """
    if directions.shape[-1] != bridge.cfg.d_model:
        raise InputError(
            f"directions are in the residual stream, which has {bridge.cfg.d_model} features, and not "
            f"{directions.shape[-1]}"
        )
    head = module_of(bridge.registry["unembed.hook_in"])
    parameter = next(head.parameters(), next(bridge.original_model.parameters()))
    x = directions.to(parameter.device, torch.float32)
    norm = bridge.architecture.main.ln_final
    if norm is not None:
        module: Any = bridge.original_model.get_submodule(norm.path)
        gain = getattr(module, "weight", None)
        x = x - x.mean(-1, keepdim=True) if norm.center else x
        x = x if gain is None else x * (gain.float() + norm.offset)
    x = x.to(parameter.dtype)[:, None]
    with bridge.registry.silenced():
        made = head(x) - head(torch.zeros_like(x[:1]))
    return made[:, 0].float()


def top_tokens(
    bridge: TransformerBridge, effects: Float[Tensor, " d_vocab"], k: int = 10
) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
    """The tokens a direction speaks for most, and against most, with how much.

    Args:
        bridge: With a tokenizer.
        effects: A row of `logit_effects`.
        k: How many of each.
    """
    decode = bridge.tokenizer.convert_ids_to_tokens
    count = min(k, len(effects))
    ends = effects.topk(count), (-effects).topk(count)
    for_it, against = (
        [(_plain(decode(int(i))), float(effects[i])) for i in found.indices] for found in ends
    )
    return for_it, against


def _plain(piece: Any) -> str:
    """A token as text has it, as far as one token tells."""
    return str(piece).replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
