"""The adapter hands out a model's own modules, of any architecture, and says why one is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lensbridge import (
    AbsentPointError,
    ArchitectureError,
    InputError,
    LayerRangeError,
    TransformerBridge,
)
from lensbridge.methods import LensAPI, ModelAdapter, get_adapter

_LLAMA = {
    "get_layer": "model.layers.{i}",
    "get_attention_module": "model.layers.{i}.self_attn",
    "get_o_proj": "model.layers.{i}.self_attn.o_proj",
    "get_mlp": "model.layers.{i}.mlp",
    "get_pre_attention_norm": "model.layers.{i}.input_layernorm",
    "get_pre_mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "get_embeddings": "model.embed_tokens",
    "get_final_norm": "model.norm",
    "get_lm_head": "lm_head",
}
_PHI = {
    **_LLAMA,
    "get_o_proj": "model.layers.{i}.self_attn.dense",
    "get_pre_mlp_norm": "model.layers.{i}.input_layernorm",
    "get_final_norm": "model.final_layernorm",
}
_FALCON = {
    "get_layer": "transformer.h.{i}",
    "get_attention_module": "transformer.h.{i}.self_attention",
    "get_o_proj": "transformer.h.{i}.self_attention.dense",
    "get_mlp": "transformer.h.{i}.mlp",
    "get_pre_attention_norm": "transformer.h.{i}.input_layernorm",
    "get_embeddings": "transformer.word_embeddings",
    "get_final_norm": "transformer.ln_f",
    "get_lm_head": "lm_head",
}
_GPT2 = {
    "get_layer": "transformer.h.{i}",
    "get_attention_module": "transformer.h.{i}.attn",
    "get_o_proj": "transformer.h.{i}.attn.c_proj",
    "get_mlp": "transformer.h.{i}.mlp",
    "get_pre_attention_norm": "transformer.h.{i}.ln_1",
    "get_pre_mlp_norm": "transformer.h.{i}.ln_2",
    "get_embeddings": "transformer.wte",
    "get_final_norm": "transformer.ln_f",
    "get_lm_head": "lm_head",
}
_NO_NORM_BEFORE = {"get_pre_attention_norm", "get_pre_mlp_norm"}

PARTS: dict[tuple[str, str], dict[str, str]] = {
    **{
        (name, "causal"): _LLAMA
        for name in ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "phi3", "starcoder2")
    },
    ("gemma2", "causal"): {
        **_LLAMA,
        "get_pre_mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    },
    ("olmo2", "causal"): {k: v for k, v in _LLAMA.items() if k not in _NO_NORM_BEFORE},
    ("phi", "causal"): _PHI,
    ("gpt2", "causal"): _GPT2,
    ("gpt_bigcode", "causal"): _GPT2,
    ("falcon", "causal"): _FALCON,
    ("bloom", "causal"): {
        **_FALCON,
        "get_pre_mlp_norm": "transformer.h.{i}.post_attention_layernorm",
    },
    ("gpt_neox", "causal"): {
        "get_layer": "gpt_neox.layers.{i}",
        "get_attention_module": "gpt_neox.layers.{i}.attention",
        "get_o_proj": "gpt_neox.layers.{i}.attention.dense",
        "get_mlp": "gpt_neox.layers.{i}.mlp",
        "get_pre_attention_norm": "gpt_neox.layers.{i}.input_layernorm",
        "get_pre_mlp_norm": "gpt_neox.layers.{i}.post_attention_layernorm",
        "get_embeddings": "gpt_neox.embed_in",
        "get_final_norm": "gpt_neox.final_layer_norm",
        "get_lm_head": "lm_head",
    },
    ("bert", "masked"): {
        "get_layer": "bert.encoder.layer.{i}",
        "get_attention_module": "bert.encoder.layer.{i}.attention.self",
        "get_o_proj": "bert.encoder.layer.{i}.attention.output.dense",
        "get_embeddings": "bert.embeddings.word_embeddings",
        "get_lm_head": "cls.predictions.decoder",
    },
    ("t5", "seq2seq"): {
        "get_layer": "decoder.block.{i}",
        "get_attention_module": "decoder.block.{i}.layer.0.SelfAttention",
        "get_o_proj": "decoder.block.{i}.layer.0.SelfAttention.o",
        "get_mlp": "decoder.block.{i}.layer.2.DenseReluDense",
        "get_pre_attention_norm": "decoder.block.{i}.layer.0.layer_norm",
        "get_pre_mlp_norm": "decoder.block.{i}.layer.2.layer_norm",
        "get_final_norm": "decoder.final_layer_norm",
        "get_lm_head": "lm_head",
    },
    ("vit", "vision"): {
        "get_layer": "vit.layers.{i}",
        "get_attention_module": "vit.layers.{i}.attention",
        "get_o_proj": "vit.layers.{i}.attention.o_proj",
        "get_mlp": "vit.layers.{i}.mlp",
        "get_final_norm": "vit.layernorm",
        "get_lm_head": "classifier",
    },
}
"""(model, kind) -> what is asked for -> the module's path."""


@pytest.fixture
def adapter(lens_of: Callable[..., LensAPI]) -> Callable[..., ModelAdapter]:
    """``adapter("bert", "masked")``: the adapter of a shared tiny model."""
    return lambda *which: lens_of(*which).adapter


@pytest.mark.parametrize("which", PARTS, ids=lambda which: which[0])
def test_parts(adapter: Callable[..., ModelAdapter], which: tuple[str, str]) -> None:
    """Every part is the module itself, in each layer; layers come in order."""
    found = adapter(*which)
    model = found.bridge.original_model
    assert found.num_layers == len(found.get_layers()) == 2
    for i, layer in enumerate(found.get_layers()):
        assert layer is model.get_submodule(PARTS[which]["get_layer"].format(i=i))
    for what, path in PARTS[which].items():
        for given in ((0,), (1,), (-1,)) if "{i}" in path else ((),):
            expected = model.get_submodule(path.format(i=sum(given) % 2))
            assert getattr(found, what)(*given) is expected, (what, given)


def test_sizes(tiny: Callable[..., nn.Module]) -> None:
    """Heads and their width are the model's own, also where the config does not tell or tells otherwise."""
    for name, sizes in {
        "llama": (2, 4, 16, 64),
        "mixtral": (2, 4, 16, 64),
        "qwen3_wide_head": (2, 4, 32, 64),
        "mamba": (2, None, None, 64),
    }.items():
        a = get_adapter(tiny(name))
        assert (a.num_layers, a.num_heads, a.head_dim, a.hidden_size) == sizes, name
    assert get_adapter(tiny("gpt2", n_layer=3)).num_layers == 3


def test_one_name_more(adapter: Callable[..., ModelAdapter]) -> None:
    """The output projection has inteprelens's name too."""
    found = adapter("llama")
    assert found.get_attention_output_proj(1) is found.get_o_proj(1)


def test_of_a_model_or_a_bridge(tiny: Callable[..., nn.Module]) -> None:
    """A model is wrapped; a bridge is used as it is."""
    model = tiny("llama")
    bridge = TransformerBridge(model)
    assert get_adapter(bridge).bridge is bridge
    assert get_adapter(model).get_lm_head() is ModelAdapter(bridge).get_lm_head() is model.lm_head


@pytest.mark.parametrize(
    ("which", "call", "message"),
    [
        (("jamba", "causal"), ("get_attention_module", 0), "layer 0 has no attention: mixer"),
        (("jamba", "causal"), ("get_o_proj", 0), "layer 0 has no attention: mixer"),
        (("jamba", "causal"), ("get_pre_attention_norm", 0), "no norm before attn: mixer"),
        (("mamba", "causal"), ("get_attention_module", 1), "layer 1 has no attention: mixer"),
        (("mamba", "causal"), ("get_mlp", -1), "has no MLP: mixer"),
        (("opt", "causal"), ("get_mlp", 0), "MLP of layer 0 is no module of its own"),
        (("bert", "masked"), ("get_mlp", 1), "MLP of layer 1 is no module of its own"),
        (("olmo2", "causal"), ("get_pre_attention_norm", 0), "no norm stands before it"),
        (("olmo2", "causal"), ("get_pre_mlp_norm", 0), "no norm stands before it"),
    ],
)
def test_parts_a_layer_lacks(
    adapter: Callable[..., ModelAdapter],
    which: tuple[str, str],
    call: tuple[str, int],
    message: str,
) -> None:
    """A part that a layer has not is refused with the reason."""
    what, layer = call
    with pytest.raises(AbsentPointError, match=message):
        getattr(adapter(*which), what)(layer)


@pytest.mark.parametrize("name", ["bert", "bart"])
@pytest.mark.parametrize("what", ["get_pre_attention_norm", "get_pre_mlp_norm"])
def test_norms_behind_are_not_before(
    adapter: Callable[..., ModelAdapter], name: str, what: str
) -> None:
    """Where the stream is normed behind each branch, no norm stands before one."""
    with pytest.raises(AbsentPointError, match="no norm stands before it"):
        getattr(adapter(name, "masked" if name == "bert" else "seq2seq"), what)(0)


def test_parts_a_model_lacks(adapter: Callable[..., ModelAdapter]) -> None:
    """So is one of the whole model."""
    with pytest.raises(ArchitectureError, match="BertForMaskedLM has no final norm"):
        adapter("bert", "masked").get_final_norm()
    with pytest.raises(ArchitectureError, match="BertModel has no head"):
        adapter("bert", "textenc").get_lm_head()


def test_hybrid(adapter: Callable[..., ModelAdapter]) -> None:
    """The layers that have a part give it, each its own kind."""
    jamba = adapter("jamba")
    layers = jamba.bridge.original_model.model.layers
    assert jamba.get_attention_module(1) is layers[1].self_attn
    assert [jamba.get_mlp(i) for i in (0, 1)] == [layer.feed_forward for layer in layers]


@pytest.mark.parametrize("layer", [2, -3])
def test_layers_that_are_not_there(adapter: Callable[..., ModelAdapter], layer: int) -> None:
    """A layer beyond the model is refused, whatever is asked of it."""
    for what in ("get_layer", "get_attention_module", "get_o_proj", "get_mlp", "get_pre_mlp_norm"):
        with pytest.raises(LayerRangeError, match="not one of this model's 2"):
            getattr(adapter("llama"), what)(layer)


def test_layers_that_are_no_numbers(adapter: Callable[..., ModelAdapter], unchecked: None) -> None:
    """True is no layer."""
    layer: Any = True
    with pytest.raises(InputError, match="a layer is an int"):
        adapter("llama").get_layer(layer)
