"""State-space, recurrent and linear-attention layers, alone and mixed with attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lensbridge import AbsentPointError, TransformerBridge

MIXERS = {
    # name -> the mixer of the first layer
    "mamba": "backbone.layers.0.mixer",
    "mamba2": "backbone.layers.0.mixer",
    "jamba": "model.layers.0.mamba",
    "qwen3_next": "model.layers.0.linear_attn",
    "recurrent_gemma": "model.layers.0.temporal_block",
    "falcon_h1": "model.layers.0.mamba",
}
LAYERS = {
    # name -> point -> the layer it belongs to
    "mamba": {"in": "in_proj", "x": "x_proj", "out": "out_proj"},
    "mamba2": {"in": "in_proj", "norm": "norm", "out": "out_proj"},
    "jamba": {"in": "in_proj", "x": "x_proj", "out": "out_proj"},
    "qwen3_next": {"in": "in_proj_qkvz", "ba": "in_proj_ba", "out": "out_proj"},
    "recurrent_gemma": {"in": "linear_x", "z": "linear_y", "out": "linear_out"},
    "falcon_h1": {"in": "in_proj", "out": "out_proj"},
}
GATES: dict[str, tuple[str, int, int, int]] = {
    # name -> (layer, runs, first and last feature of the gate within a run), as the modelling code splits it
    "mamba": ("in_proj", 1, 64, 128),
    "jamba": ("in_proj", 1, 128, 256),
    "qwen3_next": ("in_proj_qkvz", 2, 64, 96),
    "mamba2": ("in_proj", 1, 0, 128),
    "falcon_h1": ("in_proj", 1, 0, 128),
    "recurrent_gemma": ("linear_y", 1, 0, 64),
}
HYBRIDS = {
    "mamba": ["mixer", "mixer"],
    "mamba2": ["mixer", "mixer"],
    "jamba": ["mixer + mlp", "attn + mlp (experts)"],
    "qwen3_next": ["mixer + mlp (experts)", "attn + mlp (experts)"],
    "recurrent_gemma": ["mixer + mlp", "attn + mlp"],
    "falcon_h1": ["mixer + attn + mlp", "mixer + attn + mlp"],
}


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=sorted(MIXERS))
def name(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return request.param


@pytest.fixture
def bridge(name: str, wrapped: Callable[[str], TransformerBridge]) -> TransformerBridge:
    """A bridge around a tiny model, shared; no test here leaves anything on it."""
    return wrapped(name)


@pytest.fixture
def model(bridge: TransformerBridge) -> nn.Module:
    """The model of `bridge`."""
    return bridge.original_model


def edit(bridge: TransformerBridge, ids: Tensor, name: str, fn: Callable[[Tensor], Tensor]) -> Any:
    return bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda x, hook: fn(x))])


def test_ends(bridge: Any, model: nn.Module, name: str, ids: Tensor, plain: Any) -> None:
    """mixer.hook_in and hook_out are the module's own, and edits of them those by hand."""
    at = MIXERS[name]
    seen = plain.read(model, ids, at, f"{at}<")
    _, cache = bridge.run_with_cache(ids, names_filter="blocks.0.mixer.*")
    assert torch.equal(cache["blocks.0.mixer.hook_in"], seen[f"{at}<"][0])
    assert torch.equal(cache["blocks.0.mixer.hook_out"], seen[at][0])
    for point, place in (("hook_in", f"{at}<"), ("hook_out", at)):
        found = edit(bridge, ids, f"blocks.0.mixer.{point}", plain.noisy)
        assert torch.equal(found, plain.edited(model, ids, place, plain.noisy)), point


def test_zero_ablation(bridge: Any, model: nn.Module, name: str, ids: Tensor, plain: Any) -> None:
    """A mixer that makes nothing leaves the stream; so it does by hand."""
    found = edit(bridge, ids, "blocks.0.mixer.hook_out", torch.zeros_like)
    expected = plain.edited(model, ids, MIXERS[name], torch.zeros_like)
    assert torch.equal(found, expected)
    assert plain.gap(found, model(ids).logits) > 1e-3
    zero = [("blocks.0.mixer.hook_out", lambda x, hook: torch.zeros_like(x))]
    with bridge.hooks(fwd_hooks=zero):
        _, cache = bridge.run_with_cache(ids, names_filter="blocks.0.*")
    if bridge.layer_types()[0] == "mixer":
        assert torch.equal(cache["resid_post", 0], cache["resid_pre", 0])
    elif not bridge.architecture.blocks[0].is_parallel:
        assert torch.equal(cache["resid_mid", 0], cache["resid_pre", 0])


def test_layers_inside(bridge: Any, model: nn.Module, name: str, ids: Tensor, plain: Any) -> None:
    """The layers of the mixer are read and edited under their plain names."""
    for part, layer in LAYERS[name].items():
        path = f"{MIXERS[name]}.{layer}"
        seen = plain.read(model, ids, path, f"{path}<")
        start = f"blocks.0.mixer.{part}"
        ends = [f"{start}.hook_in", f"{start}.hook_out"]
        _, cache = bridge.run_with_cache(ids, names_filter=ends)
        assert torch.equal(cache[ends[0]], seen[f"{path}<"][0]), part
        assert torch.equal(cache[ends[1]], seen[path][0]), part
        for point, place in zip(ends, (f"{path}<", path), strict=True):
            found = edit(bridge, ids, point, plain.noisy)
            assert torch.equal(found, plain.edited(model, ids, place, plain.noisy)), point


def test_gate(bridge: Any, model: nn.Module, name: str, ids: Tensor, plain: Any) -> None:
    """mixer.gate is the share that multiplies what was mixed; where it cannot be told, it says why."""
    point = "blocks.0.mixer.gate.hook_out"
    if point not in bridge.registry:
        assert name != "qwen3_next"
        assert bridge.why(point)
        return
    layer, runs, first, last = GATES[name]
    path = f"{MIXERS[name]}.{layer}"
    whole = plain.read(model, ids, path)[path][0].unflatten(-1, (runs, -1))
    _, cache = bridge.run_with_cache(ids, names_filter=point)
    assert cache[point].shape[:2] == ids.shape
    assert torch.equal(cache[point].flatten(2), whole[..., first:last].flatten(2))

    def fn(x: Tensor) -> Tensor:
        x = x.unflatten(-1, (runs, -1)).clone()
        x[..., first:last] = plain.noisy(x[..., first:last].flatten(2)).view_as(x[..., first:last])
        return x.flatten(-2)

    found = edit(bridge, ids, point, plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, path, fn))


def test_convolution(bridge: Any, model: nn.Module, name: str, ids: Tensor, plain: Any) -> None:
    """Where the model calls its convolution, that is a point; where it takes its weights, it says so."""
    point = "blocks.0.mixer.conv.hook_out"
    if name != "recurrent_gemma":
        assert point not in bridge.registry
        assert "conv1d without calling it" in bridge.why(point)
        with pytest.raises(AbsentPointError, match="without calling it"):
            bridge.run_with_cache(ids, names_filter=point)
        return
    path = f"{MIXERS[name]}.conv_1d"
    _, cache = bridge.run_with_cache(ids, names_filter=point)
    assert torch.equal(cache[point], plain.read(model, ids, path)[path][0])
    found = edit(bridge, ids, point, plain.noisy)
    assert torch.equal(found, plain.edited(model, ids, path, plain.noisy))


@pytest.mark.parametrize("name", ["mamba", "jamba"], indirect=True)
def test_time_step_projection(bridge: Any) -> None:
    """Its weights are used without a call, so there is nothing to hook, and it says so."""
    assert "blocks.0.mixer.dt.hook_out" not in bridge.registry
    assert "dt_proj without calling it" in bridge.why("blocks.0.mixer.dt.hook_out")


def test_sums(bridge: Any, ids: Tensor, plain: Any) -> None:
    """What mixers add is part of the sums of the stream."""
    _, cache = bridge.run_with_cache(ids)
    for layer, block in enumerate(bridge.architecture.blocks):
        total = cache["resid_pre", layer]
        for branch in block.branches:
            total = total + branch.scale * cache[f"blocks.{layer}.hook_{branch.name}_out"]
        assert plain.gap(total, cache["resid_post", layer]) < 5e-6
    proof = bridge.verify()
    assert proof.holds, str(proof)


def test_kinds_of_layers(bridge: Any, name: str, ids: Tensor) -> None:
    """layer_types and blocks_with tell the layers of a hybrid apart, and its parts fire where they are."""
    kinds = HYBRIDS[name]
    assert bridge.layer_types() == kinds
    for part in ("mixer", "attn", "mlp", "mlp.router"):
        found = [index for index, _ in bridge.blocks_with(part)]
        word = "experts" if part == "mlp.router" else part
        assert found == [index for index, kind in enumerate(kinds) if word in kind], part
    _, cache = bridge.run_with_cache(ids)
    with_attention = [index for index, kind in enumerate(kinds) if "attn" in kind]
    assert with_attention == [i for i in range(2) if f"blocks.{i}.attn.hook_pattern" in cache]


def test_a_layer_without_attention_says_so(bridge: Any, name: str, ids: Tensor) -> None:
    """Asking for attention where there is none tells what the layer is."""
    if "attn" in HYBRIDS[name][0]:
        return
    why = bridge.why("blocks.0.attn.hook_pattern")
    assert why
    assert "mixer" in why
    with pytest.raises(AbsentPointError, match="mixer"):
        bridge.run_with_cache(ids, names_filter="blocks.0.attn.hook_pattern")


@pytest.mark.parametrize("name", ["falcon_h1"], indirect=True)
def test_mixer_and_attention_side_by_side(bridge: Any, ids: Tensor, plain: Any) -> None:
    """Falcon-H1 adds both in one sum with one norm; hook_resid_mid is the stream behind both."""
    block = bridge.architecture.blocks[0]
    assert [branch.joins for branch in block.branches] == [False, True, False]
    assert "blocks.0.hook_resid_mid2" not in bridge.registry
    _, cache = bridge.run_with_cache(ids)
    middle = cache["resid_pre", 0]
    for branch in block.branches[:2]:
        middle = middle + branch.scale * cache[f"blocks.0.hook_{branch.name}_out"]
    assert plain.gap(middle, cache["resid_mid", 0]) < 5e-6
    assert torch.equal(cache["resid_mid", 0], cache["blocks.0.ln2.hook_in"])
