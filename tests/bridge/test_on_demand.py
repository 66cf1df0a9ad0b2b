"""What each head reads and writes, and what an MLP reads: by name alone, computed while somebody listens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

ATTENTION = {
    # architecture -> the norm that attention reads, its projections, and the norm that its MLP reads
    "gpt2": ("transformer.h.1.ln_1", None, "transformer.h.1.ln_2"),
    "mixtral": (
        "model.layers.1.input_layernorm",
        "model.layers.1.self_attn.{}_proj",
        "model.layers.1.post_attention_layernorm",
    ),
    "gemma2": (
        "model.layers.1.input_layernorm",
        "model.layers.1.self_attn.{}_proj",
        "model.layers.1.pre_feedforward_layernorm",
    ),
    "gptj": ("transformer.h.1.ln_1", "transformer.h.1.attn.{}_proj", None),
    "starcoder2": (
        "model.layers.1.input_layernorm",
        "model.layers.1.self_attn.{}_proj",
        "model.layers.1.post_attention_layernorm",
    ),
}
PARTS = ("q", "k", "v")


@pytest.fixture(params=ATTENTION)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_no_switch_is_needed(name: str, wrapped: Callable[[str], Any], ids: Tensor) -> None:
    """They are in no cache unless they are named, are computed only then, and show what heads read."""
    bridge = wrapped(name)
    with torch.no_grad():
        bare, cache = bridge.run_with_cache(ids)
        wanted = [f"blocks.1.hook_{part}_input" for part in PARTS]
        wanted += ["blocks.1.attn.hook_result"]
        grouped = bridge.cfg.n_key_value_heads not in (None, bridge.cfg.n_heads)
        wanted += [] if grouped else ["blocks.1.hook_attn_in"]
        assert not any(point in cache for point in wanted)
        out, few = bridge.run_with_cache(ids, names_filter=wanted)
    assert torch.equal(out, bare) or torch.allclose(out, bare, atol=1e-5)
    assert len(few) == len(wanted)
    stream = cache["blocks.1.hook_in"]
    for point in wanted[:3] + wanted[4:]:
        heads = few[point].shape[2]
        kv = bridge.cfg.n_key_value_heads or bridge.cfg.n_heads
        assert heads == (bridge.cfg.n_heads if "_q_" in point or "attn_in" in point else kv)
        assert torch.allclose(few[point], stream[:, :, None].expand(-1, -1, heads, -1), atol=1e-5)
    assert bridge.why(wanted[0]) is None
    assert (bridge.why("blocks.1.hook_attn_in") is None) != grouped
    assert not bridge.registry.live


def test_they_cost_nothing_unheard(
    name: str, wrapped: Callable[[str], Any], ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with every other point listened to makes no copy for a head."""
    from lensbridge.bridge import head_inputs, places

    made: list[str] = []

    def counting(what: str, fn: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            made.append(what)
            return fn(*args, **kwargs)

        return count

    monkeypatch.setattr(places, "_results", counting("result", places._results))
    monkeypatch.setattr(head_inputs, "get_input", counting("input", head_inputs.get_input))
    bridge = wrapped(name)
    with torch.no_grad():
        bridge.run_with_cache(ids)
        assert made == []
        names = ["blocks.0.attn.hook_result", "blocks.1.hook_q_input"]
        bridge.run_with_cache(ids, names_filter=names)
    assert sorted(made) == ["input", "result"]


@pytest.mark.parametrize("part", PARTS)
def test_one_heads_input_is_written(
    part: str, name: str, wrapped: Callable[[str], Any], plain: Any, ids: Tensor
) -> None:
    """As in the bare model when that head's slice of the projection is made from another input."""
    bridge = wrapped(name)
    model = bridge.original_model
    norm, projection, _ = ATTENTION[name]
    if projection is None:  # a joint one
        projection, offset = "transformer.h.1.attn.c_attn", 64 * PARTS.index(part)
    else:
        projection, offset = projection.format(part), 0
    kv = bridge.cfg.n_key_value_heads or bridge.cfg.n_heads
    head, d_head = (bridge.cfg.n_heads if part == "q" else kv) - 1, bridge.cfg.d_head
    read = plain.read(model, ids, f"{norm}<")[f"{norm}<"][0]
    other = plain.noisy(read)
    with torch.no_grad():
        made = model.get_submodule(projection)(model.get_submodule(norm)(other))
    at = slice(offset + head * d_head, offset + (head + 1) * d_head)

    def by_hand(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., at] = made[..., at]
        return x

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, head] = other
        return x

    wanted = plain.edited(model, ids, projection, by_hand)
    with torch.no_grad(), bridge.hooks(fwd_hooks=[(f"blocks.1.hook_{part}_input", hook)]):
        found = bridge(ids)
    assert plain.gap(found, wanted) < 1e-5
    assert plain.gap(plain.output_of(model, ids).detach(), wanted) > 1e-4


def test_what_an_mlp_reads(
    name: str, wrapped: Callable[[str], Any], plain: Any, ids: Tensor
) -> None:
    """Shown, and written without touching the stream it adds to; parallel layers say why there is none."""
    bridge = wrapped(name)
    model, norm = bridge.original_model, ATTENTION[name][2]
    if norm is None:
        assert "reads the stream through the norm of attn" in bridge.why("blocks.1.hook_mlp_in")
        return
    read = plain.read(model, ids, f"{norm}<")[f"{norm}<"][0]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids, names_filter="blocks.1.hook_mlp_in")
        assert plain.gap(cache["blocks.1.hook_mlp_in"], read) < 1e-5
        other = model.get_submodule(norm)(plain.noisy(read))
        wanted = plain.edited(model, ids, norm, lambda x: other)
        edit = ("blocks.1.hook_mlp_in", lambda x, hook: plain.noisy(x))
        with bridge.hooks(fwd_hooks=[edit]):
            found = bridge(ids)
    assert plain.gap(found, wanted) < 1e-5


def test_one_heads_result_is_written(
    name: str, wrapped: Callable[[str], Any], plain: Any, ids: Tensor
) -> None:
    """Taken out, it is as if that head's part of z were zero."""
    bridge = wrapped(name)
    layer = bridge.architecture.blocks[1].attn

    def by_hand(z: Tensor) -> Tensor:
        z = z.unflatten(-1, (layer.n_heads, -1)).clone()
        z[..., 1, :] = 0
        return z.flatten(-2)

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, 1] = 0
        return x

    wanted = plain.edited(bridge.original_model, ids, f"{layer.o}<", by_hand)
    with torch.no_grad(), bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_result", hook)]):
        found = bridge(ids)
    assert plain.gap(found, wanted) < 1e-5
    assert plain.gap(plain.output_of(bridge.original_model, ids).detach(), wanted) > 1e-4
