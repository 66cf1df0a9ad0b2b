"""Weights by the field's names: views of the right parameters, in the right shapes, or a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from lensbridge import (
    AbsentPointError,
    InputError,
    LayerRangeError,
    TransformerBridge,
    UnknownPointError,
)

H, D, M = 4, 16, 64
"""Heads, d_head and d_model of the tiny models."""


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


# --- the right parameter ------------------------------------------------------------------------------------


def test_gpt2(fresh: Callable[..., Any]) -> None:
    """Conv1D keeps [in, out], with q, k and v side by side."""
    bridge = fresh("gpt2")
    h, attn = bridge.original_model.transformer.h[0], bridge.blocks[0].attn
    for index, letter in enumerate("QKV"):
        own = h.attn.c_attn.weight[:, index * M : (index + 1) * M]
        assert torch.equal(getattr(attn, f"W_{letter}"), own.view(M, H, D).transpose(0, 1))
        bias = h.attn.c_attn.bias[index * M : (index + 1) * M]
        assert torch.equal(getattr(attn, f"b_{letter}"), bias.view(H, D))
        assert storage(getattr(attn, f"W_{letter}")) == storage(h.attn.c_attn.weight)
        assert storage(getattr(attn, f"b_{letter}")) == storage(h.attn.c_attn.bias)
    assert torch.equal(attn.W_O, h.attn.c_proj.weight.view(H, D, M))
    assert torch.equal(attn.b_O, h.attn.c_proj.bias)
    assert torch.equal(bridge.blocks[0].mlp.W_in, h.mlp.c_fc.weight)
    assert torch.equal(bridge.blocks[0].mlp.W_out, h.mlp.c_proj.weight)
    assert torch.equal(bridge.W_E, bridge.original_model.transformer.wte.weight)
    assert torch.equal(bridge.W_pos, bridge.original_model.transformer.wpe.weight)
    assert torch.equal(bridge.W_E_pos, torch.cat([bridge.W_E, bridge.W_pos]))
    assert torch.equal(bridge.W_U, bridge.original_model.lm_head.weight.T)
    assert torch.equal(bridge.b_U, torch.zeros(160))
    assert torch.equal(bridge.blocks[1].ln2.w, bridge.original_model.transformer.h[1].ln_2.weight)
    assert torch.equal(bridge.ln_final.b, bridge.original_model.transformer.ln_f.bias)


def test_llama(fresh: Callable[..., Any]) -> None:
    """nn.Linear keeps [out, in]; keys and values are shared by two heads each; no biases."""
    bridge = fresh("llama")
    layer, block = bridge.original_model.model.layers[1], bridge.blocks[1]
    attention = layer.self_attn
    assert torch.equal(block.attn.W_Q, attention.q_proj.weight.view(H, D, M).transpose(1, 2))
    assert torch.equal(block.attn.W_K, attention.k_proj.weight.view(2, D, M).transpose(1, 2))
    assert torch.equal(block.attn.W_O, attention.o_proj.weight.T.view(H, D, M))
    assert torch.equal(block.mlp.W_gate, layer.mlp.gate_proj.weight.T)
    assert torch.equal(block.mlp.W_in, layer.mlp.up_proj.weight.T)
    assert torch.equal(block.mlp.W_out, layer.mlp.down_proj.weight.T)
    assert torch.equal(block.ln1.w, layer.input_layernorm.weight)
    zeros = {"b_Q": (H, D), "b_K": (2, D), "b_V": (2, D), "b_O": (M,)}
    for name, shape in zeros.items():
        assert torch.equal(getattr(block.attn, name), torch.zeros(shape))
    assert torch.equal(block.ln1.b, torch.zeros(M))
    assert torch.equal(block.mlp.b_gate, torch.zeros(len(layer.mlp.gate_proj.weight)))


def test_gpt_neox(fresh: Callable[..., Any]) -> None:
    """q, k and v of one head side by side, then the next head's."""
    bridge = fresh("gpt_neox")
    joint = bridge.original_model.gpt_neox.layers[0].attention.query_key_value
    rows = joint.weight.view(H, 3, D, M)
    for index, letter in enumerate("QKV"):
        weight = getattr(bridge.blocks[0].attn, f"W_{letter}")
        assert torch.equal(weight, rows[:, index].transpose(1, 2))
        assert storage(weight) == storage(joint.weight)
        bias = getattr(bridge.blocks[0].attn, f"b_{letter}")
        assert torch.equal(bias, joint.bias.view(H, 3, D)[:, index])
        assert storage(bias) == storage(joint.bias)


def test_phi3(fresh: Callable[..., Any]) -> None:
    """Unequal shares, and gate and up in one layer."""
    bridge = fresh("phi3")
    layer, block = bridge.original_model.model.layers[0], bridge.blocks[0]
    q, k, v = layer.self_attn.qkv_proj.weight.split([H * D, 2 * D, 2 * D])
    assert torch.equal(block.attn.W_Q, q.view(H, D, M).transpose(1, 2))
    assert torch.equal(block.attn.W_K, k.view(2, D, M).transpose(1, 2))
    assert torch.equal(block.attn.W_V, v.view(2, D, M).transpose(1, 2))
    gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
    assert torch.equal(block.mlp.W_gate, gate.T)
    assert torch.equal(block.mlp.W_in, up.T)


def test_every_weight_of_a_layer_is_a_view(bridge: Any, family: str) -> None:
    """Except zeros, and norms whose weight has an offset (Gemma)."""
    held = {storage(p) for p in bridge.original_model.parameters()}
    for name, value in bridge.get_params().items():
        own = name.rpartition(".")[2]
        if own.startswith("b") and not value.any():
            continue
        if family == "gemma" and own in ("w", "W_E"):
            continue
        assert storage(value) in held, name


def test_shapes(bridge: Any) -> None:
    cfg = bridge.cfg
    L, h, kv, d, m = cfg.n_layers, cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.d_model
    wanted = {
        "W_E": (160, m),
        "W_U": (m, 160),
        "b_U": (160,),
        "W_Q": (L, h, m, d),
        "W_K": (L, kv, m, d),
        "W_V": (L, kv, m, d),
        "W_O": (L, h, d, m),
        "b_Q": (L, h, d),
        "b_K": (L, kv, d),
        "b_V": (L, kv, d),
        "b_O": (L, m),
        "W_in": (L, m, cfg.d_mlp),
        "W_out": (L, cfg.d_mlp, m),
        "b_in": (L, cfg.d_mlp),
        "b_out": (L, m),
    }
    if cfg.gated_mlp:
        wanted |= {"W_gate": (L, m, cfg.d_mlp), "b_gate": (L, cfg.d_mlp)}
    for name, shape in wanted.items():
        stack = getattr(bridge, name)
        assert stack.shape == shape, name
        if shape[0] == L:
            part = "mlp" if name[2:] in ("in", "out", "gate") else "attn"
            assert torch.equal(stack[1], getattr(getattr(bridge.blocks[1], part), name))
    if not cfg.gated_mlp:
        with pytest.raises(AbsentPointError, match="W_gate: the MLP is not gated"):
            bridge.W_gate  # noqa: B018


@torch.no_grad()
def test_they_make_what_the_model_makes(bridge: Any, ids: Tensor) -> None:
    """The sweep has this for every architecture."""
    _, cache = bridge.run_with_cache(ids)
    for layer in range(2):
        here, attn = f"blocks.{layer}", bridge.blocks[layer].attn
        for part in "qkv":
            W, b = getattr(attn, f"W_{part.upper()}"), getattr(attn, f"b_{part.upper()}")
            made = torch.einsum("bpm,hmd->bphd", cache[f"{here}.attn.{part}.hook_in"], W) + b
            assert torch.allclose(made, cache[f"{here}.attn.{part}.hook_out"], atol=1e-4)
        made = torch.einsum("bphd,hdm->bpm", cache[f"{here}.attn.hook_z"], attn.W_O) + attn.b_O
        assert torch.allclose(made, cache[f"{here}.attn.o.hook_out"], atol=1e-4)
    made = cache["ln_final.hook_out"] @ bridge.W_U + bridge.b_U
    assert torch.allclose(made, cache["unembed.hook_out"], atol=1e-4)
    assert torch.equal(bridge.W_E[ids], cache["embed.hook_out"])
    for norm in ("blocks.0.ln1", "ln_final"):
        made = cache[f"{norm}.hook_normalized"] * bridge.weight(f"{norm}.w")
        made = made + bridge.weight(f"{norm}.b")
        assert torch.allclose(made, cache[f"{norm}.hook_out"], atol=1e-5)


def test_gradients_reach_the_parameter(fresh: Callable[..., Any]) -> None:
    bridge = fresh("gpt2")
    bridge.W_Q.sum().backward()
    grad = bridge.original_model.transformer.h[0].attn.c_attn.weight.grad
    assert torch.equal(grad[:, :M], torch.ones(M, M))
    assert torch.equal(grad[:, M:], torch.zeros(M, 2 * M))


def test_writing_a_view_changes_the_model(fresh: Callable[..., Any], ids: Tensor) -> None:
    bridge = fresh("gpt_neox")
    with torch.no_grad():
        bridge.blocks[0].attn.W_Q[2] = 0
        bridge.blocks[0].attn.b_Q[2] = 0
    _, cache = bridge.run_with_cache(ids)
    assert (cache["q", 0][:, :, 2] == 0).all()
    assert (cache["q", 0][:, :, 1] != 0).any()


# --- names, layers, towers ----------------------------------------------------------------------------------


def test_attributes_are_listed(wrapped: Callable[[str], Any]) -> None:
    bridge = wrapped("llama")
    assert {"W_Q", "W_K", "W_V", "W_O", "b_Q", "QK", "OV", "hook_pattern"} <= set(
        dir(bridge.blocks[0].attn)
    )
    assert {"W_in", "W_gate", "W_out"} <= set(dir(bridge.blocks[0].mlp))
    assert "W_U" in dir(bridge.unembed)
    assert "w" in dir(bridge.ln_final)
    assert torch.equal(bridge.unembed.W_U, bridge.W_U)
    assert torch.equal(bridge.embed.W_E, bridge.W_E)
    assert torch.equal(bridge.weight("blocks.1.attn.W_O"), bridge.blocks[1].attn.W_O)
    assert "blocks.1.attn.W_O" in bridge.weight_names


def test_shared_heads_are_repeated_on_request(wrapped: Callable[[str], Any]) -> None:
    bridge = wrapped("llama")
    for letter in ("W_K", "W_V", "b_K", "b_V"):
        own = getattr(bridge.blocks[0].attn, letter)
        every = bridge.weight(f"blocks.0.attn.{letter}", expand_groups=True)
        assert every.shape[0] == H
        assert all(torch.equal(every[h], own[h // 2]) for h in range(H))
        _, stack = bridge.stack_params_for("attn", letter, expand_groups=True)
        assert torch.equal(stack[0], every)
    W_Q = bridge.weight("blocks.0.attn.W_Q", expand_groups=True)
    assert torch.equal(W_Q, bridge.blocks[0].attn.W_Q)


def test_hybrids_give_indices(wrapped: Callable[[str], Any]) -> None:
    bridge = wrapped("jamba")
    layers = [index for index, _ in bridge.blocks_with("attn")]
    found, stack = bridge.stack_params_for("attn", "W_Q")
    assert found == layers
    assert torch.equal(stack[0], bridge.blocks[layers[0]].attn.W_Q)
    others, mixers = bridge.stack_params_for("mixer", "out.W")
    assert sorted(others + found) == list(range(bridge.cfg.n_layers))
    module = bridge.original_model.model.layers[others[0]].mamba.out_proj
    assert torch.equal(mixers[0], module.weight.T)
    lacking = [layer for layer in range(bridge.cfg.n_layers) if layer not in layers]
    with pytest.raises(AbsentPointError, match=r"not every layer has attn.W_Q") as refusal:
        bridge.W_Q  # noqa: B018
    assert f"layers {lacking} have not" in str(refusal.value)
    assert "bridge.stack_params_for('attn', 'W_Q')" in str(refusal.value)


def test_unequal_layers_are_not_stacked(wrapped: Callable[[str], Any]) -> None:
    """A dense first layer, experts in the second."""
    bridge = wrapped("deepseek_v3")
    with pytest.raises(
        InputError, match=r"differs in shape.*\[64, 64\] in layers \[0\]"
    ) as refusal:
        bridge.W_in  # noqa: B018
    assert "stack_params_for('mlp', 'W_in', layers=[0])" in str(refusal.value)
    layers, stack = bridge.stack_params_for("mlp", "W_in", layers=[-1])
    assert layers == [1]
    assert torch.equal(stack[0], bridge.blocks[1].mlp.W_in)


def test_experts(wrapped: Callable[[str], Any]) -> None:
    bridge = wrapped("mixtral")
    module = bridge.original_model.model.layers[0].mlp.experts
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    mlp = bridge.blocks[0].mlp
    assert torch.equal(mlp.W_gate, gate.mT)
    assert torch.equal(mlp.W_in, up.mT)
    assert torch.equal(mlp.W_out, module.down_proj.mT)
    assert storage(mlp.W_in) == storage(module.gate_up_proj)
    assert mlp.b_in.shape == mlp.W_in.shape[::2]
    assert mlp.b_out.shape == (len(mlp.W_in), M)
    assert torch.equal(mlp.router.W, bridge.original_model.model.layers[0].mlp.gate.weight.T)
    assert bridge.W_in.shape == (2, *mlp.W_in.shape)


def test_experts_with_biases_in_turns(wrapped: Callable[[str], Any]) -> None:
    bridge = wrapped("gpt_oss")
    module = bridge.original_model.model.layers[0].mlp.experts
    assert torch.equal(bridge.blocks[0].mlp.W_gate, module.gate_up_proj[..., ::2])
    assert torch.equal(bridge.blocks[0].mlp.b_in, module.gate_up_proj_bias[..., 1::2])
    assert torch.equal(bridge.blocks[0].mlp.b_out, module.down_proj_bias)


def test_other_towers(tiny: Callable[..., nn.Module]) -> None:
    bridge = TransformerBridge(tiny("bart", "seq2seq"))
    model = bridge.original_model.model
    own = bridge.encoder_blocks[0].attn.W_Q
    assert torch.equal(own, model.encoder.layers[0].self_attn.q_proj.weight.view(H, D, M).mT)
    cross = bridge.decoder_blocks[1].cross_attn.W_K
    assert torch.equal(cross, model.decoder.layers[1].encoder_attn.k_proj.weight.view(H, D, M).mT)
    assert torch.equal(bridge.encoder_embed.W_E, model.shared.weight)
    assert torch.equal(bridge.W_pos, model.decoder.embed_positions.weight[2:])  # two rows in front
    layers, stack = bridge.stack_params_for("attn", "W_O", tower="encoder_")
    assert layers == [0, 1]
    assert torch.equal(stack[1], bridge.encoder_blocks[1].attn.W_O)
    assert torch.equal(bridge.W_Q[1], bridge.decoder_blocks[1].attn.W_Q)


def test_what_an_embedding_scales_is_scaled(wrapped: Callable[[str], Any]) -> None:
    bridge = wrapped("gemma2")
    table = bridge.original_model.model.embed_tokens.weight
    assert torch.allclose(bridge.W_E, table * 8)  # the root of d_model


# --- absent -------------------------------------------------------------------------------------------------


def test_low_rank_queries(wrapped: Callable[[str], Any]) -> None:
    """DeepSeek's queries pass through a narrow layer: no matrix leads from the stream to them."""
    bridge = wrapped("deepseek_v3")
    with pytest.raises(AbsentPointError, match=r"W_Q.*q_b_proj.*what .*q_a_proj makes"):
        bridge.weight("blocks.0.attn.W_Q")
    with pytest.raises(AbsentPointError, match="q_a_proj"):
        bridge.W_Q  # noqa: B018
    with pytest.raises(AttributeError, match="q_a_proj"):
        bridge.blocks[0].attn.W_Q  # noqa: B018
    assert not hasattr(bridge.blocks[0].attn, "W_Q")
    assert "W_Q" not in dir(bridge.blocks[0].attn)
    assert bridge.blocks[0].attn.W_O.shape[-1] == M


UNKNOWN = [
    (lambda b: b.weight("blocks.0.attn.W_X"), UnknownPointError, "no weight is called"),
    (lambda b: b.weight("blocks.9.attn.W_Q"), UnknownPointError, "blocks.0.attn.W_Q"),
    (lambda b: b.blocks[0].attn.W_X, AttributeError, "no hook point is called"),
    (lambda b: b.blocks[0].mlp.W_gate, AttributeError, "the MLP is not gated"),
    (lambda b: b.weight("blocks.0.mlp.W_gate"), AbsentPointError, "the MLP is not gated"),
    (lambda b: b.stack_params_for("attn", "W_X"), UnknownPointError, "no layer has attn.W_X"),
    (lambda b: b.stack_params_for("mlp", "W_gate"), AbsentPointError, "not gated"),
    (lambda b: b.stack_params_for("attn", "W_Q", layers=[5]), LayerRangeError, "layer 5"),
    (lambda b: b.stack_params_for("attn", "W_Q", tower="vision_"), InputError, "vision_"),
]


@pytest.mark.parametrize(("call", "kind", "words"), UNKNOWN)
def test_unknown(wrapped: Callable[[str], Any], call: Any, kind: Any, words: str) -> None:
    with pytest.raises(kind, match=words):
        call(wrapped("gpt2"))


def test_no_position_embedding(wrapped: Callable[[str], Any]) -> None:
    with pytest.raises(AbsentPointError, match="no learned position embedding"):
        wrapped("llama").W_pos  # noqa: B018


# --- layers that are no plain matrix ------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear layer in 8 bits, as quantised ones are: whole numbers and a scale."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        packed = (layer.weight / scale).round().to(torch.int8)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale.detach(), requires_grad=False)
        self.bias = layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def unpacked(self) -> Tensor:
        return self.packed * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked(), self.bias)


class Adapted(nn.Linear):
    """A linear layer with a low-rank addition, and dropout in training."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.down = nn.Parameter(torch.randn(2, layer.in_features) / 8)
        self.up = nn.Parameter(torch.randn(layer.out_features, 2) / 8)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.dropout(x) @ self.down.T @ self.up.T


class Bent(nn.Linear):
    """A layer that is not linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


@torch.no_grad()
def test_quantised_layers_are_read_by_what_they_do(tiny: Callable[..., nn.Module]) -> None:
    model: Any = tiny("llama")
    bridge = TransformerBridge(model)
    layer = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(layer, name, Packed(getattr(layer, name)))
    bridge = TransformerBridge(model)
    attn = bridge.blocks[0].attn
    assert torch.allclose(attn.W_Q, layer.q_proj.unpacked().view(H, D, M).mT, atol=1e-6)
    assert torch.allclose(attn.W_K, layer.k_proj.unpacked().view(2, D, M).mT, atol=1e-6)
    assert torch.allclose(attn.W_O, layer.o_proj.unpacked().T.view(H, D, M), atol=1e-6)
    assert torch.equal(attn.b_O, torch.zeros(M))


def test_adapters_are_part_of_the_matrix(tiny: Callable[..., nn.Module]) -> None:
    model: Any = tiny("llama")
    layer = model.model.layers[0].mlp
    layer.up_proj = Adapted(layer.up_proj)
    bridge = TransformerBridge(model.train())
    made = bridge.blocks[0].mlp.W_in
    whole = layer.up_proj.weight + layer.up_proj.up @ layer.up_proj.down
    assert torch.allclose(made, whole.T, atol=1e-5)
    assert layer.up_proj.dropout.training
    made.sum().backward()
    assert layer.up_proj.down.grad is not None


def test_what_is_not_linear_is_refused(tiny: Callable[..., nn.Module]) -> None:
    model: Any = tiny("llama")
    held = model.model.layers[0].mlp.down_proj
    bent = Bent(held.in_features, held.out_features, bias=False)
    bent.weight = held.weight
    model.model.layers[0].mlp.down_proj = bent
    bridge = TransformerBridge(model)
    with pytest.raises(AbsentPointError, match="Bent is no linear map: what it makes of a sum"):
        bridge.weight("blocks.0.mlp.W_out")
    with pytest.raises(AbsentPointError, match="Bent"):
        bridge.W_out  # noqa: B018
    assert not hasattr(bridge.blocks[0].mlp, "W_out")
    params = bridge.get_params()
    assert "blocks.0.mlp.W_out" not in params
    assert "blocks.1.mlp.W_out" in params


def test_offloaded_weights_are_fetched(tiny: Callable[..., nn.Module]) -> None:
    model: Any = tiny("gpt2")
    plain = TransformerBridge(copy.deepcopy(model)).get_params()
    cpu_offload(model)
    bridge = TransformerBridge(model)
    assert model.transformer.h[0].attn.c_attn.weight.device.type == "meta"
    held = bridge.get_params()
    assert held.keys() == plain.keys()
    for name, value in held.items():
        assert value.device.type == "cpu", name
        assert torch.equal(value, plain[name]), name
    assert torch.equal(bridge.W_Q[1], plain["blocks.1.attn.W_Q"])
    assert torch.equal(bridge.OV[0].AB, bridge.blocks[0].attn.W_V @ bridge.blocks[0].attn.W_O)
    assert model.transformer.h[0].attn.c_attn.weight.device.type == "meta"


# --- sums and directions ------------------------------------------------------------------------------------


def test_accumulated_bias(fresh: Callable[..., Any]) -> None:
    bridge = fresh("gpt2")
    h = bridge.original_model.transformer.h
    first = h[0].attn.c_proj.bias + h[0].mlp.c_proj.bias
    assert torch.equal(bridge.accumulated_bias(0), torch.zeros(M))
    assert torch.equal(bridge.accumulated_bias(0, mlp_input=True), h[0].attn.c_proj.bias)
    assert torch.allclose(bridge.accumulated_bias(1), first)
    assert torch.allclose(bridge.accumulated_bias(-1), first)
    late = h[0].attn.c_proj.bias + h[1].attn.c_proj.bias
    assert torch.allclose(bridge.accumulated_bias(2, include_mlp_biases=False), late)
    assert torch.allclose(
        bridge.accumulated_bias(1, mlp_input=True, include_mlp_biases=False), late
    )
    with pytest.raises(LayerRangeError, match="layer=3 is out of range"):
        bridge.accumulated_bias(3)
    with pytest.raises(LayerRangeError, match="has no MLP"):
        bridge.accumulated_bias(2, mlp_input=True)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "gpt_neox_sequential", "phi"])
@torch.no_grad()
def test_accumulated_bias_is_what_biases_do(
    fresh: Callable[..., Any], ids: Tensor, name: str
) -> None:
    """With all other outputs of the layers zeroed, the stream is the embedding and the biases."""
    bridge = fresh(name, num_hidden_layers=3)
    for block in bridge.blocks:
        block.attn.W_O.zero_()
        block.mlp.W_out.zero_()
    _, cache = bridge.run_with_cache(ids)
    start = cache["blocks.0.hook_in"]
    for layer in (1, 2):
        made = start + bridge.accumulated_bias(layer)
        assert torch.allclose(cache[f"blocks.{layer}.hook_in"], made, atol=1e-5)
        made = start + bridge.accumulated_bias(layer, mlp_input=True)
        mid = f"blocks.{layer}.hook_resid_mid"
        if mid in cache:
            assert torch.allclose(cache[mid], made, atol=1e-5)
        else:  # in parallel: the MLP reads what the attention reads
            assert torch.allclose(cache[f"blocks.{layer}.hook_in"], made, atol=1e-5)
    assert torch.allclose(cache["blocks.2.hook_out"], start + bridge.accumulated_bias(3), atol=1e-5)


def test_accumulated_bias_with_a_residual_multiplier(fresh: Callable[..., Any]) -> None:
    bridge = fresh("granite", attention_bias=True, residual_multiplier=0.5)
    own = bridge.original_model.model.layers[0].self_attn.o_proj.bias
    assert own.any()
    assert torch.allclose(bridge.accumulated_bias(1), own / 2)


def test_accumulated_bias_without_biases(wrapped: Callable[[str], Any]) -> None:
    for name in ("llama", "mixtral"):
        assert torch.equal(wrapped(name).accumulated_bias(2), torch.zeros(M))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gemma2", "causal", "a norm stands between"),
        ("bert", "masked", "a norm stands between"),
        ("gpt_oss", "causal", "depends on the router"),
    ],
)
def test_biases_that_do_not_add_up(
    tiny: Callable[..., nn.Module], name: str, kind: str, words: str
) -> None:
    bridge = TransformerBridge(tiny(name, kind))
    if name == "gpt_oss":
        assert torch.equal(bridge.blocks[0].mlp.b_out, torch.zeros_like(bridge.blocks[0].mlp.b_out))
        bridge.accumulated_bias(1)  # as long as they are zeros
        with torch.no_grad():
            bridge.blocks[0].mlp.b_out[0] = 1
    with pytest.raises(AbsentPointError, match=words):
        bridge.accumulated_bias(1)
    assert torch.equal(bridge.accumulated_bias(0), torch.zeros(M))


def test_directions_of_tokens(fresh: Callable[..., Any]) -> None:
    bridge = fresh("gpt2")
    W_U = bridge.W_U
    assert torch.equal(bridge.tokens_to_residual_directions(7), W_U[:, 7])
    assert torch.equal(bridge.tokens_to_residual_directions(torch.tensor(7)), W_U[:, 7])
    some = torch.tensor([[3, 4, 5], [6, 7, 8]])
    found = bridge.tokens_to_residual_directions(some)
    assert found.shape == (2, 3, M)
    assert torch.equal(found[1, 2], W_U[:, 8])
    token = bridge.to_single_token("a")
    assert torch.equal(bridge.tokens_to_residual_directions("a"), W_U[:, token])
    assert torch.equal(bridge.tokens_to_residual_directions(["a", "b"])[0], W_U[:, token])
    assert torch.equal(bridge.tokens_to_residual_directions([7, 8])[1], W_U[:, 8])
    with pytest.raises(InputError, match="from 0 to 159, got 160 to 160"):
        bridge.tokens_to_residual_directions(160)
    with pytest.raises(InputError, match="from 0 to 159, got -1"):
        bridge.tokens_to_residual_directions(-1)
    with pytest.raises(InputError, match="2 tokens, not one"):
        bridge.tokens_to_residual_directions("ab")


# --- all at once --------------------------------------------------------------------------------------------


def test_all_parameters(wrapped: Callable[[str], Any]) -> None:
    """Every number of the model is in one of them, once."""
    for name in ("gpt2", "llama", "mixtral"):
        bridge = wrapped(name)
        held = bridge.get_params()
        assert list(held) == [n for n in bridge.weight_names if not n.endswith((".QK", ".OV"))]
        numbers = sum(p.numel() for p in bridge.original_model.parameters())
        assert bridge.n_params_total == numbers
        tied = storage(held["unembed.W_U"]) == storage(held["embed.W_E"])
        stored = {n: v for n, v in held.items() if v.any() and not (tied and n == "unembed.W_U")}
        assert sum(v.numel() for v in stored.values()) == numbers


def test_names_of_hooked_transformer(wrapped: Callable[[str], Any]) -> None:
    attn = ["W_Q", "b_Q", "W_K", "b_K", "W_V", "b_V", "W_O", "b_O"]
    wanted = ["embed.W_E", "pos_embed.W_pos"]
    for i in range(2):
        wanted += [f"blocks.{i}.{ln}.{own}" for ln in ("ln1", "ln2") for own in "wb"]
        wanted += [f"blocks.{i}.attn.{own}" for own in attn]
        wanted += [f"blocks.{i}.mlp.{own}" for own in ("W_in", "b_in", "W_out", "b_out")]
    wanted += ["ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"]
    found = wrapped("gpt2").tl_parameters()
    assert list(found) == wanted
    assert torch.equal(found["blocks.1.attn.W_Q"], wrapped("gpt2").blocks[1].attn.W_Q)
    grouped = wrapped("llama").tl_parameters()
    assert {"blocks.0.attn._W_K", "blocks.0.attn._b_V", "blocks.0.ln1.w"} <= set(grouped)
    assert not {"blocks.0.attn.W_K", "blocks.0.ln1.b", "blocks.0.mlp.b_gate"} & set(grouped)
    experts = wrapped("mixtral").tl_parameters()
    own = wrapped("mixtral").blocks[0].mlp
    assert torch.equal(experts["blocks.0.mlp.W_gate"], own.router.W)
    assert torch.equal(experts["blocks.0.mlp.experts.2.W_in.weight"], own.W_in[2].T)


def test_the_table_is_made_when_it_is_asked_for(tiny: Callable[..., nn.Module]) -> None:
    """Wrapping reads no weight, and reading one leaves the model as it was."""
    model = tiny("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bridge = TransformerBridge(model)
    assert "_held" not in vars(bridge.registry.weights)
    bridge.get_params()
    bridge.all_composition_scores("Q")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
