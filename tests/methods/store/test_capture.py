"""ActivationStore against plain PyTorch hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import (
    ActivationStore,
    HookNotFiredError,
    InputError,
    LayerRangeError,
    TransformerBridge,
    UnknownPointError,
)

LAYERS = ["blocks.0.hook_out", "blocks.1.hook_resid_mid", "model.layers.1.mlp", "model.norm"]


def by_hand(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """What `LAYERS` show, by plain hooks."""
    kept: dict[str, Tensor] = {}
    places = ["model.layers.0", "model.layers.1.post_attention_layernorm<", *LAYERS[2:]]

    def out(name: str) -> Callable[..., None]:
        return lambda module, args, value: kept.update({name: value.clone()})

    def given(name: str) -> Callable[..., None]:
        return lambda module, args: kept.update({name: args[0].clone()})

    handles = [
        model.get_submodule(name[:-1]).register_forward_pre_hook(given(name))
        if name.endswith("<")
        else model.get_submodule(name).register_forward_hook(out(name))
        for name in places
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return [kept[name] for name in places]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_layers_showed(llama_bridge: Any, ids: Tensor, wrapped: bool) -> None:
    """By name, alias and path, of a bare model and of a bridge, whoever runs it."""
    model = llama_bridge.original_model
    given = llama_bridge if wrapped else model
    with ActivationStore(given, LAYERS) as store, torch.no_grad():
        given(ids)
    assert store.layer_names == list(store.activations) == LAYERS
    for name, expected in zip(LAYERS, by_hand(model, ids), strict=True):
        assert torch.equal(store.get(name), expected)
    assert torch.equal(store.get("blocks.0.hook_resid_post"), store.get("model.layers.0"))


def test_enable_disable_clear(llama_bridge: Any, ids: Tensor) -> None:
    """It listens while it is enabled, keeps the last run, and lets go when it is told to."""
    store = ActivationStore(llama_bridge, [1])
    assert not store.enabled
    llama_bridge(ids)
    with pytest.raises(HookNotFiredError, match="nothing was run while the store was enabled"):
        store.get("blocks.1.hook_out")
    store.enable()
    store.enable()
    llama_bridge(ids)
    first = store.get("blocks.1.hook_out")
    llama_bridge(ids[:1])
    second = store.activations["blocks.1.hook_out"]
    assert (len(first), len(second)) == (2, 1)
    store.disable()
    store.disable()
    llama_bridge(ids)
    assert store.get("blocks.1.hook_out") is second
    store.clear()
    with pytest.raises(HookNotFiredError):
        _ = store.activations


def test_captures_never_alias_the_models_memory(tiny: Any, ids: Tensor) -> None:
    """Falcon writes into its MLP's output after it was shown; so may whoever holds the output."""
    model = tiny("falcon", parallel_attn=True, new_decoder_architecture=False)
    shown: list[Tensor] = []
    handle = model.transformer.h[0].mlp.register_forward_hook(
        lambda module, args, out: shown.extend([out, out.clone()])
    )
    with ActivationStore(model, "transformer.h.0.mlp", device=None) as store:
        model(ids)
    handle.remove()
    live, copy = shown
    held = store.get("transformer.h.0.mlp")
    assert torch.equal(held, copy)
    assert not torch.equal(live, copy)
    assert not held.requires_grad


def test_dtype(llama_bridge: Any, ids: Tensor) -> None:
    """Floating values are cast."""
    with ActivationStore(llama_bridge, 0) as full:
        llama_bridge(ids)
    with ActivationStore(llama_bridge, 0, dtype=torch.bfloat16) as half:
        llama_bridge(ids)
    name = "blocks.0.hook_out"
    assert torch.equal(half.get(name), full.get(name).bfloat16())


def test_a_layer_that_never_fired_is_an_error(tiny: Any, ids: Tensor) -> None:
    """On leaving, and when it is asked for; others can be had."""
    model = tiny("llama")
    model.model.spare = nn.Linear(2, 2)
    store = ActivationStore(model, ["model.spare", 0])
    with pytest.raises(HookNotFiredError, match=r"model\.spare showed nothing"), store:
        model(ids)
    assert not store.enabled
    assert len(store.get("blocks.0.hook_out")) == 2
    with pytest.raises(HookNotFiredError, match=r"model\.spare"):
        store.get("model.spare")


def test_an_error_inside_is_the_one_that_is_raised(llama_bridge: Any) -> None:
    """And the hooks go."""
    store = ActivationStore(llama_bridge, 0)
    with pytest.raises(ZeroDivisionError), store:
        raise ZeroDivisionError
    assert not store.enabled


def test_insides_of_attention_in_runs_of_the_bridge(llama_bridge: Any, ids: Tensor) -> None:
    """A fused kernel shows no pattern: the bridge opens it, a bare call is told of."""
    with ActivationStore(llama_bridge, "blocks.0.attn.hook_pattern") as store:
        llama_bridge(ids)
    assert torch.allclose(store.get("blocks.0.attn.hook_pattern").sum(-1), torch.ones(()))


@pytest.mark.parametrize(
    ("layers", "error"),
    [
        (["model.layers.0", "model.layer.1"], UnknownPointError),
        ([0, 4], LayerRangeError),
        ([], InputError),
        ([0, "model.layers.0"], InputError),
    ],
)
def test_wrong_layers_leave_no_hook(llama_bridge: Any, layers: Any, error: Any) -> None:
    """Every name is looked up before anything is set."""
    with pytest.raises(error):
        ActivationStore(llama_bridge, layers)


def test_names_it_does_not_hold(llama_bridge: Any) -> None:
    """Of the model, or of nothing."""
    store = ActivationStore(llama_bridge, [0, 1])
    for name in ("blocks.2.hook_out", "nonsense"):
        with pytest.raises(UnknownPointError):
            store.get(name)


def test_a_model_of_another_kind(tiny: Any) -> None:
    """An image model's layers."""
    model = tiny("vit", "vision")
    images = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    with ActivationStore(TransformerBridge(model), -1) as store, torch.no_grad():
        states = model(pixel_values=images, output_hidden_states=True).hidden_states
    assert torch.equal(store.activations[store.layer_names[0]], states[-1])
