"""ActivationCache: a mapping from any name of a point to what the run showed there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lensbridge import ActivationCache, HookPoint, InputError, LayerRangeError, UnknownPointError


@pytest.fixture(params=["gpt2", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cache(bridge: Any, ids: Tensor) -> Any:
    with torch.no_grad():
        return bridge.run_with_cache(ids, names_filter=lambda name: True)[1]


def test_is_a_mapping(bridge: Any, cache: Any) -> None:
    """len, iteration, keys, items, values, get, in and dict() agree, over canonical names alone."""
    assert isinstance(cache, Mapping)
    assert isinstance(cache, ActivationCache)
    names = list(cache)
    assert len(cache) == len(names) == len(set(names)) == len(bridge.registry)
    assert list(cache.keys()) == names
    assert [name for name, _ in cache.items()] == names
    held = [id(cache[name]) for name in names]
    assert [id(value) for value in cache.values()] == held
    assert [id(value) for _, value in cache.items()] == held
    assert dict(cache).keys() == cache.keys()
    assert cache.get("blocks.0.hook_out") is cache["blocks.0.hook_out"]
    assert cache.get("nonsense") is None
    assert cache.get(("resid_post", 9), 3) == 3
    assert str(len(cache)) in repr(cache)


def test_aliases(bridge: Any, cache: Any) -> None:
    """Every alias of every point is a key of the same tensor."""
    assert len(bridge.registry.aliases) > 20
    for alias, name in bridge.registry.aliases.items():
        assert cache[alias] is cache[name]
        assert alias in cache


SHORTHAND = [
    ("resid_pre", "blocks.{i}.hook_in"),
    ("resid_mid", "blocks.{i}.hook_resid_mid"),
    ("resid_post", "blocks.{i}.hook_out"),
    ("attn_out", "blocks.{i}.attn.hook_out"),
    ("mlp_out", "blocks.{i}.mlp.hook_out"),
    ("q", "blocks.{i}.attn.q.hook_out"),
    ("k", "blocks.{i}.attn.k.hook_out"),
    ("v", "blocks.{i}.attn.v.hook_out"),
    ("z", "blocks.{i}.attn.o.hook_in"),
    ("query", "blocks.{i}.attn.q.hook_out"),
    ("key", "blocks.{i}.attn.k.hook_out"),
    ("value", "blocks.{i}.attn.v.hook_out"),
    ("pattern", "blocks.{i}.attn.hook_pattern"),
    ("attn", "blocks.{i}.attn.hook_pattern"),
    ("attn_scores", "blocks.{i}.attn.hook_attn_scores"),
    ("attn_logits", "blocks.{i}.attn.hook_attn_scores"),
    ("result", "blocks.{i}.attn.hook_result"),
    ("post", "blocks.{i}.mlp.out.hook_in"),
    ("mlp_in", "blocks.{i}.ln2.hook_in"),
]


@pytest.mark.parametrize(("short", "full"), SHORTHAND)
def test_shorthand(cache: Any, short: str, full: str) -> None:
    """(name, layer), negative layers, and the squeezed "name3" mean the full name."""
    for layer in range(2):
        expected = cache[full.replace("{i}", str(layer))]
        assert cache[short, layer] is expected
        assert cache[short, layer - 2] is expected
        assert cache[f"{short}{layer}"] is expected
        assert (short, layer) in cache


def test_shorthand_of_parts(bridge: Any, cache: Any) -> None:
    """Norms by (name, layer, part); the final norm and the ends without a layer; pre is what is activated."""
    for part in ("ln1", "ln2"):
        for what in ("normalized", "scale"):
            assert cache[what, 1, part] is cache[f"blocks.1.{part}.hook_{what}"]
            assert cache[what, -1, part] is cache[f"blocks.1.{part}.hook_{what}"]
    assert cache["normalized"] is cache["ln_final.hook_normalized"]
    assert cache["scale"] is cache["ln_final.hook_scale"]
    assert cache["embed"] is cache["embed.hook_out"]
    pre = "mlp.in.hook_out" if bridge.cfg.gated_mlp is False else "mlp.gate.hook_out"
    assert cache["pre", 0] is cache[f"blocks.0.{pre}"]
    assert cache["blocks.0.hook_out",] is cache["blocks.0.hook_out"]


def test_keys_that_are_none(bridge: Any, ids: Tensor, cache: Any) -> None:
    """What is not there: why, and what is near; `in` says no without raising."""
    with pytest.raises(UnknownPointError, match=r"resid_psot.*hook_resid_post"):
        cache["resid_psot", 0]
    with pytest.raises(KeyError, match="0 to 1"):
        cache["blocks.2.hook_out"]
    with pytest.raises(LayerRangeError, match="0 to 1"):
        cache["resid_post", 2]
    with pytest.raises(LayerRangeError, match="-3"):
        cache["resid_post", -3]
    with pytest.raises(InputError, match="inside a layer"):
        cache["pattern",]
    for key in (3, ("resid_post", 0, "ln1", 4), (0, "resid_post"), None):
        with pytest.raises(InputError, match="cache key"):
            cache[key]
        assert key not in cache
    with pytest.raises(InputError, match="layer"):
        cache["resid_post", "0"]
    assert ("resid_post", 2) not in cache
    assert "blocks.2.hook_out" not in cache
    _, few = bridge.run_with_cache(ids, names_filter=["blocks.0.hook_out", "blocks.1.hook_out"])
    with pytest.raises(
        UnknownPointError, match=r"exists in the model but the run cached no.*blocks.0.hook_out"
    ):
        few["resid_pre", 0]
    assert ("resid_pre", 0) not in few
    with pytest.raises(UnknownPointError, match=r"gradient.*incl_bwd=True"):
        few["blocks.0.hook_out_grad"]


def test_gradient_keys(bridge: Any, ids: Tensor) -> None:
    """Gradients are under <name>_grad, by alias too, after the values, in the order they arrived."""
    _, cache = bridge.run_with_cache(
        ids, return_type="loss", incl_bwd=True, names_filter="blocks.*.hook_out"
    )
    assert list(cache) == [
        "blocks.0.hook_out",
        "blocks.1.hook_out",
        "blocks.1.hook_out_grad",
        "blocks.0.hook_out_grad",
    ]
    assert cache["blocks.0.hook_resid_post_grad"] is cache["blocks.0.hook_out_grad"]
    assert cache["blocks.0.hook_out_grad"].shape == cache["blocks.0.hook_out"].shape
    assert "blocks.0.hook_resid_post_grad" in cache
    cut = cache.apply_slice_to_pos_dim(-1)
    assert torch.equal(cut["blocks.0.hook_out_grad"], cache["blocks.0.hook_out_grad"][:, -1])


def test_to(cache: Any) -> None:
    """.to moves everything, casts what floats, and returns the cache."""
    before = dict(cache)
    assert cache.to(dtype=torch.float64) is cache
    for name, value in cache.items():
        wanted = torch.float64 if before[name].is_floating_point() else torch.long
        assert value.dtype == wanted, name
        assert torch.equal(value, before[name].to(wanted))
    assert cache.to("meta") is cache
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert cache["resid_post", 0].dtype == torch.float64


@pytest.mark.parametrize(
    ("given", "index"),
    [
        (0, 0),
        (-1, -1),
        (slice(1, 2), slice(1, 2)),
        ((0, 1), slice(0, 1)),
        ([1, 0], [1, 0]),
        ([-1], [-1]),
        (None, slice(None)),
    ],
)
def test_batch_slices(cache: Any, given: Any, index: Any) -> None:
    """Rows picked from every tensor (what all rows share has one), an int dropping the dimension."""
    cut = cache.apply_slice_to_batch_dim(given)
    assert list(cut) == list(cache)
    assert cut.has_batch_dim == (not isinstance(given, int))
    shared = 0
    for name, value in cache.items():
        if len(value) == 1:
            shared += 1
            expected = value[0] if isinstance(given, int) else value
        else:
            expected = value[index]
        assert torch.equal(cut[name], expected), name
    assert shared in (2, 3)
    assert len(cache["resid_post", 0]) == 2  # the original is as it was


@pytest.mark.parametrize("given", [3, -1, (2, 6), slice(None, None, 2), [0, -1]])
def test_position_slices(cache: Any, given: Any) -> None:
    """Positions picked after the fact, with and without a batch dimension."""
    index = slice(*given) if isinstance(given, tuple) else given
    cut = cache.apply_slice_to_pos_dim(given)
    row = cache.apply_slice_to_batch_dim(0).apply_slice_to_pos_dim(given)
    for name, value in cache.items():
        square = name.endswith(("pattern", "scores"))
        expected = value[:, :, index] if square else value[:, index]
        assert torch.equal(cut[name], expected), name
        assert torch.equal(row[name], expected[0]), name


def test_remove_batch_dim(bridge: Any, ids: Tensor, cache: Any) -> None:
    """In place, once; of one row only."""
    _, single = bridge.run_with_cache(ids[:1])
    before = dict(single)
    assert single.has_batch_dim
    assert single.remove_batch_dim() is single
    assert not single.has_batch_dim
    assert all(torch.equal(single[name], before[name][0]) for name in before)
    assert single.remove_batch_dim() is single
    assert all(torch.equal(single[name], before[name][0]) for name in before)
    with pytest.raises(InputError, match="2 rows"):
        cache.remove_batch_dim()
    assert cache.has_batch_dim
    assert len(cache["resid_post", 0]) == 2
    with pytest.raises(InputError, match="no batch dimension"):
        single.apply_slice_to_batch_dim(0)


def test_map(cache: Any) -> None:
    """map makes a new cache of changed tensors and leaves the old."""
    doubled = cache.map(lambda name, value: value * 2)
    assert torch.equal(doubled["resid_post", -1], 2 * cache["resid_post", -1])
    assert list(doubled) == list(cache)


def test_cache_keeps_no_listener(bridge: Any, cache: Any) -> None:
    """A cache is data: no point of the model listens because of it."""
    assert all(isinstance(p, HookPoint) and not p.has_hooks() for p in bridge.registry.values())
    assert not any(value.requires_grad for value in cache.values())


# --- what was run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 2, (1, 4), [0, 5]])
def test_tokens_and_mask_are_cached(bridge: Any, ids: Tensor, given: Any) -> None:
    """They lie beside the tensors, cut as those are."""
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    _, cache = bridge.run_with_cache(ids, attention_mask=mask, pos_slice=given)
    index = slice(*given) if isinstance(given, tuple) else slice(None) if given is None else given
    assert torch.equal(cache.tokens, ids[:, index])
    assert torch.equal(cache.mask, mask[:, index])
    row = cache.apply_slice_to_batch_dim(0)
    assert torch.equal(row.tokens, ids[0, index])


def test_no_padding_no_mask(bridge: Any, ids: Tensor) -> None:
    """Where no padding was told of there is no mask, and of a residual stream there are no tokens."""
    _, cache = bridge.run_with_cache(ids)
    assert torch.equal(cache.tokens, ids)
    assert cache.mask is None
    _, late = bridge.run_with_cache(cache["resid_pre", 1], start_at_layer=1)
    assert late.tokens is None


def test_tokens_behind_a_past(bridge: Any, ids: Tensor) -> None:
    """The positions that were run, not those of the past."""
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    out = bridge.original_model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
    _, cache = bridge.run_with_cache(
        ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values
    )
    assert torch.equal(cache.tokens, ids[:, -1:])
    assert cache.mask is None or cache.mask.tolist() == [[1], [1]]
