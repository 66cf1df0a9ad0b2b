"""The sites of tiny models by hand: module paths, read with plain PyTorch hooks (`tests/bridge/plain.py`).

A place is a module path for what the module returns, or ``"path<"`` for what it is called with; ``{i}`` is the
layer. Loaded by the fixture `places`.
"""

from __future__ import annotations

_LLAMA = {
    "block_input": "model.layers.{i}<",
    "attn_o_proj_pre": "model.layers.{i}.self_attn.o_proj<",
    "attn_output": "model.layers.{i}.self_attn",
    "post_attn_residual": "model.layers.{i}.post_attention_layernorm<",
    "mlp_input": "model.layers.{i}.mlp<",
    "mlp_output": "model.layers.{i}.mlp",
    "block_output": "model.layers.{i}",
    "final_norm": "model.norm",
    "lm_head_input": "lm_head<",
}
_LAST_NORMS = {
    "attn_output": "model.layers.{i}.post_attention_layernorm",
    "mlp_output": "model.layers.{i}.post_feedforward_layernorm",
}

PLACES: dict[tuple[str, str], dict[str, str]] = {
    # Pre-norm.
    ("llama", "causal"): _LLAMA,
    ("gpt2", "causal"): {
        "block_input": "transformer.h.{i}<",
        "attn_o_proj_pre": "transformer.h.{i}.attn.c_proj<",
        "attn_output": "transformer.h.{i}.attn",
        "post_attn_residual": "transformer.h.{i}.ln_2<",
        "mlp_input": "transformer.h.{i}.mlp<",
        "mlp_output": "transformer.h.{i}.mlp",
        "block_output": "transformer.h.{i}",
        "final_norm": "transformer.ln_f",
        "lm_head_input": "lm_head<",
    },
    # The stream itself is normed once a branch has been added.
    ("bert", "masked"): {
        "block_input": "bert.encoder.layer.{i}<",
        "attn_o_proj_pre": "bert.encoder.layer.{i}.attention.output.dense<",
        "attn_output": "bert.encoder.layer.{i}.attention.output.dense",
        "post_attn_residual": "bert.encoder.layer.{i}.attention.output.LayerNorm<",
        "mlp_input": "bert.encoder.layer.{i}.intermediate<",
        "mlp_output": "bert.encoder.layer.{i}.output.dense",
        "block_output": "bert.encoder.layer.{i}",
        "lm_head_input": "cls.predictions.decoder<",
    },
    # A norm behind each branch, none before.
    ("olmo2", "causal"): {
        **_LLAMA,
        **_LAST_NORMS,
        "post_attn_residual": "model.layers.{i}.mlp<",
    },
    # Norms before and behind.
    ("gemma2", "causal"): {
        **_LLAMA,
        **_LAST_NORMS,
        "post_attn_residual": "model.layers.{i}.pre_feedforward_layernorm<",
    },
    # Attention and MLP side by side: there is no stream between them.
    ("gpt_neox", "causal"): {
        "block_input": "gpt_neox.layers.{i}<",
        "attn_o_proj_pre": "gpt_neox.layers.{i}.attention.dense<",
        "attn_output": "gpt_neox.layers.{i}.attention",
        "mlp_input": "gpt_neox.layers.{i}.mlp<",
        "mlp_output": "gpt_neox.layers.{i}.mlp",
        "block_output": "gpt_neox.layers.{i}",
        "final_norm": "gpt_neox.final_layer_norm",
        "lm_head_input": "lm_head<",
    },
    # The layers of a model with two stacks are the decoder's.
    ("t5", "seq2seq"): {
        "block_input": "decoder.block.{i}<",
        "attn_o_proj_pre": "decoder.block.{i}.layer.0.SelfAttention.o<",
        "attn_output": "decoder.block.{i}.layer.0.SelfAttention",
        "post_attn_residual": "decoder.block.{i}.layer.0",
        "mlp_input": "decoder.block.{i}.layer.2.DenseReluDense<",
        "mlp_output": "decoder.block.{i}.layer.2.DenseReluDense",
        "block_output": "decoder.block.{i}",
        "final_norm": "decoder.final_layer_norm",
        "lm_head_input": "lm_head<",
    },
}
"""(model, kind) -> site -> place; a site that is missing has no place there."""


def layers_of(place: str) -> list[int | None]:
    """The layers a place is in; the tiny models have two."""
    return [0, 1] if "{i}" in place else [None]


def keywords(kind: str, ids: object) -> dict[str, object]:
    """What a bare model of a kind is called with, and a trace too."""
    return {"input_ids": ids} if kind != "seq2seq" else {"input_ids": ids, "decoder_input_ids": ids}
