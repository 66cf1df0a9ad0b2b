"""Embeddings as matrices: what a module makes of every token, and of every position."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float
from torch import Tensor, nn

from ..hooks import ArchitectureError
from .example import FAILURES
from .ranks import own_parameter
from .seen import first_item

_BEHIND_PADDING = ("ProphetNetPositionalEmbeddings",)
"""Classes that count positions from behind their padding row, by themselves."""


def rows_of(module: nn.Module) -> Float[Tensor, "d_vocab d_model"]:
    """What an embedding makes of every id: its own parameter where it only looks up.

    Where it scales or normalises what it looks up, the rows are as it gives them.

    Raises:
        ArchitectureError: It embeds no ids.
    """
    weight = _table(module)
    if type(module) is nn.Embedding and module.max_norm is None:
        return weight
    some = _looked_up(module, torch.arange(min(3, len(weight)), device=weight.device))
    if module.__dict__.get("max_norm") is None and torch.equal(some, weight[: len(some)]):
        return weight
    return _looked_up(module, torch.arange(len(weight), device=weight.device))


def position_rows(module: nn.Module) -> Float[Tensor, "n_ctx d_model"]:
    """The rows of a learned (or fixed) position embedding, from that of position 0 on.

    Raises:
        ArchitectureError: It looks nothing up.
    """
    weight = _table(module)
    # OPT and BART keep two rows in front of that of position 0.
    offset = module.__dict__.get("offset", 0)
    if type(module).__name__ in _BEHIND_PADDING:
        offset = module.__dict__["padding_idx"] + 1
    return weight[offset:]


def is_lookup(module: nn.Module) -> bool:
    """Whether a module looks up rows of a table."""
    weight = own_parameter(module, "weight")
    return weight is not None and weight.dim() == 2 and "padding_idx" in module.__dict__


def _table(module: nn.Module) -> Tensor:
    with align_module_device(module):
        weight = own_parameter(module, "weight")
    if weight is None or not is_lookup(module):
        raise ArchitectureError(f"{type(module).__name__} embeds no ids")
    return weight


def _looked_up(module: nn.Module, ids: Tensor) -> Tensor:
    try:
        made = first_item(module.forward(ids[None]))
    except FAILURES as error:
        raise ArchitectureError(
            f"{type(module).__name__} does not run by itself: {error}"
        ) from error
    if not isinstance(made, Tensor) or made.dim() != 3 or made.shape[1] != len(ids):
        raise ArchitectureError(f"{type(module).__name__} makes no vector of each id")
    return made[0]
