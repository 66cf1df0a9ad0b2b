"""The vocabulary: each role of a model, and the names Hugging Face gives the module that plays it.

Order matters: the first name that exists wins. A name may be a path (``"attention.self"``). Adding an
architecture usually means adding a word here, or nothing.
"""

from __future__ import annotations

ATTENTION = (
    "self_attn",
    "attn.attention",
    "attention.self",
    "attention.attention",
    "attn",
    "attention",
    "self_attention",
)
MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")

LN1 = (
    "input_layernorm",
    "ln_1",
    "self_attn_layer_norm",
    "layernorm_before",
    "layer_norm1",
    "norm1",
    "norm_1",
    "ln1",
    "attention_norm",
    "pre_attention_layernorm",
)
LN2 = (
    "pre_feedforward_layernorm",
    "ln_2",
    "post_attention_layernorm",
    "final_layer_norm",
    "layernorm_after",
    "layer_norm2",
    "norm2",
    "norm_2",
    "ln2",
    "ffn_norm",
)
# Where one of these exists, the block norms the branch outputs too, and "post_attention_layernorm" means it.
SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
LN1_POST = ("post_attention_layernorm",)
LN2_POST = ("post_feedforward_layernorm",)

Q = ("q_proj", "query", "q_lin", "q", "wq", "Wq")
K = ("k_proj", "key", "k_lin", "k", "wk", "Wk")
V = ("v_proj", "value", "v_lin", "v", "wv", "Wv")
O = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo")  # noqa: E741
# Joint projections: name -> how the output is shared (see infer.py for what the words mean).
QKV = {
    "c_attn": "contiguous",
    "qkv_proj": "contiguous",
    "query_key_value": "per_head",
    "Wqkv": "contiguous",
}
Q_NORM = ("q_norm", "q_layernorm", "query_layernorm")
K_NORM = ("k_norm", "k_layernorm", "key_layernorm")

MLP_IN = ("up_proj", "c_fc", "fc1", "dense_h_to_4h", "fc_in", "w3", "up", "lin1")
MLP_GATE = ("gate_proj", "w1", "gate")
MLP_OUT = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "w2", "down", "lin2")
GATE_UP = ("gate_up_proj",)

POS_EMBED = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
ROTARY = ("rotary_emb",)
LN_FINAL = (
    "norm",
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "norm_f",
    "layer_norm",
    "final_norm",
)

# Parts of a path that lead to another tower than the text model's.
OTHER_TOWERS = ("vision", "visual", "image", "audio", "speech")

# Attributes of a block that say its branches run side by side.
PARALLEL_FLAGS = ("use_parallel_residual", "parallel_attn", "parallel_residual")
