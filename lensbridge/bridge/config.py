"""BridgeConfig: the numbers of a model under the field's names, read from the model and its HF config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .architecture import Architecture, Tower
from .stacks import text_config

_CONTEXT = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "n_ctx",
    "seq_length",
    "max_sequence_length",
)
_ACTIVATION = (
    "hidden_activation",
    "hidden_act",
    "activation_function",
    "activation",
    "act_fn",
    "hidden_activation",
)


@dataclass
class BridgeConfig:
    """What a model is.

    Also the input of `TransformerBridge.boot_native`, which needs the first group only.

    Attributes:
        d_model, n_layers, n_heads, d_head, d_mlp, d_vocab: Sizes. None where the model has no such thing.
        n_ctx: Longest context the model was made for; None if unlimited or unsaid.
        n_key_value_heads: Fewer than ``n_heads`` when heads are grouped.
        act_fn: Name of the MLP's activation.
        normalization_type: ``"LN"`` or ``"RMS"``.
        positional_embedding_type: ``"standard"`` (learned), ``"rotary"`` or ``"other"``.
        gated_mlp: Whether a gate multiplies the MLP's hidden layer.
        eps: Added to the variance in norms.
        parallel_attn_mlp: Whether attention and MLP read the same residual stream.
        model_name, architecture, model_type: Where the weights came from, the HF class, HF's model type.
        device, dtype: Where and what the parameters are.
        default_prepend_bos: Whether text gets a BOS token unless the call says otherwise.
        default_padding_side: Where text is padded unless the call says otherwise.
        tokenizer_prepends_bos, tokenizer_appends_eos: What the tokenizer does by itself.
        initializer_range, seed: For `boot_native`.
    """

    d_model: int | None
    n_layers: int
    n_heads: int | None = None
    d_vocab: int | None = None
    n_ctx: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    n_key_value_heads: int | None = None
    act_fn: str | None = None
    normalization_type: str | None = None
    positional_embedding_type: str | None = None
    gated_mlp: bool | None = None
    eps: float | None = None

    parallel_attn_mlp: bool = False
    model_name: str = ""
    architecture: str = ""
    model_type: str = ""
    device: torch.device | str | None = None
    dtype: torch.dtype = torch.float32
    default_prepend_bos: bool = False
    default_padding_side: str = "right"
    tokenizer_prepends_bos: bool | None = None
    tokenizer_appends_eos: bool | None = None
    initializer_range: float = 0.02
    seed: int | None = None


def read_config(model: nn.Module, architecture: Architecture) -> BridgeConfig:
    """Describe a model, asking its modules before its configuration."""
    hf = text_config(model)
    attn = next((block.attn for block in architecture.blocks if block.attn is not None), None)
    mlp = next((block.mlp for block in architecture.blocks if block.mlp is not None), None)
    main = architecture.main
    norms = [branch.ln for block in main.blocks for branch in block.branches if branch.ln]
    norm = next(iter(norms), main.ln_final)
    if main.pos_embed is not None:
        positions = "standard"
    else:
        positions = "rotary" if attn is not None and attn.is_rotary else "other"
    first = next(model.parameters(), None)
    return BridgeConfig(
        d_model=getattr(hf, "hidden_size", None) or _width(architecture.main),
        n_layers=len(architecture.blocks),
        n_heads=None if attn is None else attn.n_heads,
        d_vocab=getattr(hf, "vocab_size", None),
        n_ctx=_first(hf, _CONTEXT),
        d_head=None if attn is None else attn.d_head,
        d_mlp=None if mlp is None else mlp.d_mlp,
        n_key_value_heads=None if attn is None else attn.n_key_value_heads,
        act_fn=_first(hf, _ACTIVATION),
        normalization_type=None
        if norm is None or not norm.is_open
        else ("LN" if norm.center else "RMS"),
        positional_embedding_type=positions,
        gated_mlp=None if mlp is None else mlp.gate is not None,
        eps=None if norm is None or not norm.is_open else norm.eps,
        parallel_attn_mlp=any(block.is_parallel for block in architecture.blocks),
        model_name=getattr(model, "name_or_path", "") or "",
        architecture=type(model).__name__,
        model_type=getattr(hf, "model_type", ""),
        device=None if first is None else first.device,
        dtype=torch.float32 if first is None else first.dtype,
        initializer_range=getattr(hf, "initializer_range", 0.02),
    )


def _width(tower: Tower) -> int | None:
    """Width of the stream, as the watched run shows it."""
    if tower.seen is None or not tower.blocks:
        return None
    visits = tower.seen.visits.get(tower.blocks[0].path)
    entering = visits[0].entering if visits else None
    return None if entering is None or entering.dim() != 3 else int(entering.shape[-1])


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next(
        (value for name in names if (value := getattr(config, name, None)) is not None), None
    )
