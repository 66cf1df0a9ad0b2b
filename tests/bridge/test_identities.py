"""What every name means, as equations between cached values and the untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT = 5e-6
"""Relative float32 error of a few sums in another order."""

BF16 = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture
def cache(bridge: Any, ids: Tensor) -> Any:
    """Every point of one run, those that multiply memory too."""
    return bridge.run_with_cache(ids, names_filter=lambda name: True)[1]


def outside_attention(byhand: Any) -> Callable[[str], bool]:
    return lambda name: not byhand.is_inside(name)


# --- the run is the model's own ---------------------------------------------------------------------------


def test_logits_without_hooks_are_the_models(bridge: Any, hand: Any, ids: Tensor) -> None:
    """With nothing listened to, the bridge is the model, bit for bit."""
    assert torch.equal(bridge(ids), hand.logits(ids))


def test_logits_with_all_but_attention_inside(
    bridge: Any, hand: Any, byhand: Any, ids: Tensor
) -> None:
    """Caching every point outside attention leaves the logits bit-equal."""
    logits, cache = bridge.run_with_cache(ids, names_filter=outside_attention(byhand))
    assert torch.equal(logits, hand.logits(ids))
    assert set(cache) == {name for name in bridge.registry if not byhand.is_inside(name)}


def test_logits_with_everything(bridge: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
    """Caching everything, attention opened in every layer, moves the logits by float error only."""
    logits, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
    assert byhand.gap(logits, hand.logits(ids)) < FLOAT
    assert set(cache) == set(bridge.registry)


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_padded_logits_with_everything(
    bridge: Any, hand: Any, byhand: Any, ids: Tensor, mask: Tensor
) -> None:
    """Likewise for a padded batch, at real tokens; no value anywhere becomes NaN."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = hand.logits(ids, attention_mask=mask, position_ids=positions)
    plain = bridge(ids, attention_mask=mask, position_ids=positions)
    assert torch.equal(plain, expected)
    logits, cache = bridge.run_with_cache(
        ids, names_filter=lambda name: True, attention_mask=mask, position_ids=positions
    )
    assert byhand.gap(logits[mask.bool()], expected[mask.bool()]) < FLOAT
    assert not [name for name, value in cache.items() if value.isnan().any()]


def test_default_cache_leaves_out_what_multiplies_memory(bridge: Any, ids: Tensor) -> None:
    """names_filter=None keeps everything but the points that grow with the number of heads."""
    _, cache = bridge.run_with_cache(ids)
    left_out = set(bridge.registry) - set(cache)
    multiplied = ["result", "q_input", "k_input", "v_input"]
    if bridge.cfg.n_heads == bridge.cfg.n_key_value_heads:
        multiplied.append("attn_in")
    assert left_out == {
        f"blocks.{i}.attn.hook_{what}" for i in range(bridge.cfg.n_layers) for what in multiplied
    }


# --- every point, against the same place read by hand -----------------------------------------------------


def test_every_point_is_what_is_read_by_hand(
    bridge: Any, hand: Any, byhand: Any, cache: Any, ids: Tensor
) -> None:
    """Each cached value is the value of that place in an untouched copy: same bits at module boundaries."""
    _, outside = bridge.run_with_cache(ids, names_filter=outside_attention(byhand))
    for name in bridge.registry:
        expected = hand.read(name, ids)
        if byhand.is_exact(name):
            assert torch.equal(outside[name], expected), name
        else:
            assert byhand.gap(cache[name], expected) < FLOAT, name


def test_padded_points_are_what_is_read_by_hand(
    bridge: Any, hand: Any, byhand: Any, ids: Tensor
) -> None:
    """The same in a left-padded batch: scores, pattern and rotations of the rows that are real."""
    positions = (LEFT.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": LEFT, "position_ids": positions}
    _, cache = bridge.run_with_cache(ids, names_filter=byhand.is_inside, **given)
    for name in cache:
        expected = hand.read(name, ids, **given)
        if name.endswith(("scores", "pattern")):
            one, other = cache[name][0, :, 3:], expected[0, :, 3:]
        else:
            one, other = cache[name][0, 3:], expected[0, 3:]
        assert byhand.gap(one, other) < FLOAT, name
        assert byhand.gap(cache[name][1], expected[1]) < FLOAT, name


def test_axes_say_the_shape(bridge: Any, cache: Any, ids: Tensor) -> None:
    """A point's axes, spelt with the model's sizes, are the shape of its value."""
    cfg = bridge.cfg
    for name, point in bridge.registry.items():
        mlp_hidden = name.endswith(("mlp.in.hook_out", "mlp.gate.hook_out", "mlp.out.hook_in"))
        sizes = {
            "batch": 2,
            "pos": 9,
            "query": 9,
            "key": 9,
            "head": cfg.n_heads,
            "kv_head": cfg.n_key_value_heads,
            "d_head": cfg.d_head,
            "d_model": cfg.d_model,
            "d_vocab": cfg.d_vocab,
            "1": 1,
        }
        assert ("d_mlp" in point.axes) == mlp_hidden, name
        shape = cache[name].shape
        assert len(shape) == len(point.axes.split()), name
        for axis, size in zip(point.axes.split(), shape, strict=True):
            if axis == "d_mlp":
                assert size == cfg.d_mlp, name
            elif axis == "batch" and name.startswith(("pos_embed", "rotary_emb")):
                assert size in (1, 2), name  # positions are shared by the batch
            elif axis != "d_rotary":
                assert size == sizes[axis], name


# --- the residual stream ----------------------------------------------------------------------------------


def test_stream_is_hidden_states(bridge: Any, hand: Any, ids: Tensor) -> None:
    """hook_out of a block is hook_in of the next and Hugging Face's hidden state, bit for bit."""
    _, cache = bridge.run_with_cache(
        ids, names_filter=["blocks.*.hook_in", "blocks.*.hook_out", "ln_final.*"]
    )
    hidden = hand.model(ids, output_hidden_states=True).hidden_states
    n = bridge.cfg.n_layers
    assert len(hidden) == n + 1
    for layer in range(n):
        assert torch.equal(cache["resid_pre", layer], hidden[layer])
        if layer + 1 < n:
            assert torch.equal(cache["resid_post", layer], cache["resid_pre", layer + 1])
            assert torch.equal(cache["resid_post", layer], hidden[layer + 1])
    assert torch.equal(cache["resid_post", n - 1], cache["ln_final.hook_in"])
    assert torch.equal(hand.part("ln_final")(cache["resid_post", n - 1]), hidden[n])
    assert torch.equal(cache["ln_final.hook_out"], hidden[n])


def test_residual_sums(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """What attention and MLP add, added to the stream, is the stream after them."""
    for layer in range(bridge.cfg.n_layers):
        pre, post = cache["resid_pre", layer], cache["resid_post", layer]
        attn, mlp = cache["attn_out", layer], cache["mlp_out", layer]
        if hand.is_parallel:
            assert ("resid_mid", layer) not in cache
            assert byhand.gap(pre + attn + mlp, post) < FLOAT
        else:
            middle = cache["resid_mid", layer]
            assert byhand.gap(pre + attn, middle) < FLOAT
            assert byhand.gap(middle + mlp, post) < FLOAT
            assert torch.equal(middle, cache[f"blocks.{layer}.ln2.hook_in"])


def test_parallel_blocks_are_told(bridge: Any, hand: Any) -> None:
    """cfg knows whether the branches run side by side."""
    assert bridge.cfg.parallel_attn_mlp == hand.is_parallel


# --- attention --------------------------------------------------------------------------------------------


@pytest.fixture(params=["sdpa", "eager"])
def opened(request: pytest.FixtureRequest, model: nn.Module, bridge: Any) -> Any:
    """The bridge over a model with each of the two attention implementations."""
    model.set_attn_implementation(request.param)
    return bridge


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_pattern_is_output_attentions(
    opened: Any, hand: Any, ids: Tensor, mask: Tensor | None
) -> None:
    """The pattern is what Hugging Face's eager code reports, padded or not."""
    given: dict[str, Any] = {}
    if mask is not None:
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    _, cache = opened.run_with_cache(ids, names_filter="blocks.*.attn.hook_pattern", **given)
    hand.model.set_attn_implementation("eager")
    attentions = hand.model(ids, output_attentions=True, **given).attentions
    assert len(cache) == len(attentions) == opened.cfg.n_layers
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
    for layer, expected in enumerate(attentions):
        pattern = cache["pattern", layer]
        for row in range(2):
            difference = pattern[row][:, real[row]] - expected[row][:, real[row]]
            assert difference.abs().max() < 1e-6


def test_eager_run_stays_bit_equal(model: nn.Module, bridge: Any, hand: Any, ids: Tensor) -> None:
    """A model that writes its attention out computes it itself: the same bits with everything cached."""
    for one in (model, hand.model):
        one.set_attn_implementation("eager")
    logits, _ = bridge.run_with_cache(ids, names_filter=lambda name: True)
    assert torch.equal(logits, hand.logits(ids))


@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["full", "left", "right"])
def test_pattern_rows(opened: Any, ids: Tensor, mask: Tensor | None) -> None:
    """Rows of real tokens sum to one, look back only, and never at padding."""
    real = torch.ones(2, 9, dtype=torch.bool) if mask is None else mask.bool()
    _, cache = opened.run_with_cache(
        ids, names_filter="blocks.*.attn.hook_pattern", attention_mask=mask
    )
    for pattern in cache.values():
        for row in range(2):
            rows = pattern[row][:, real[row]]
            assert (rows.sum(-1) - 1).abs().max() < 1e-6
            assert not rows[..., ~real[row]].any()
            assert not pattern[row].triu(1)[:, real[row]].any()


def test_scores_softmax_to_pattern(opened: Any, byhand: Any, ids: Tensor) -> None:
    """The softmax of the scores is the pattern."""
    _, cache = opened.run_with_cache(ids)
    for layer in range(opened.cfg.n_layers):
        scores, pattern = cache["attn_scores", layer], cache["pattern", layer]
        assert byhand.gap(scores.softmax(-1), pattern) < FLOAT


def test_rotated_q_and_k_make_the_scores(opened: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
    """q times k times the scale, where the mask allows: the scores (q and k unrotated in GPT-2)."""
    _, cache = opened.run_with_cache(ids)
    names = ("q", "k") if hand.family == "gpt2" else ("rot_q", "rot_k")
    window = getattr(hand.config, "sliding_window", None) or 9
    back = torch.arange(9)[:, None] - torch.arange(9)[None]
    seen = (back >= 0) & (back < window)
    for layer in range(opened.cfg.n_layers):
        q, k = (cache[name, layer] for name in names)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * hand.d_head**-0.5
        assert byhand.gap(cache["attn_scores", layer][..., seen], scores[..., seen]) < FLOAT
        assert (cache["attn_scores", layer][..., ~seen] < -1e30).all()


def test_pattern_times_v_is_z(opened: Any, byhand: Any, ids: Tensor) -> None:
    """Each head's z is its pattern times the values of its group."""
    _, cache = opened.run_with_cache(ids)
    for layer in range(opened.cfg.n_layers):
        pattern, v = cache["pattern", layer], cache["v", layer]
        v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        assert byhand.gap(z, cache["z", layer]) < FLOAT


def test_z_through_w_o(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """z through the output projection is o.hook_out; each head's share of it is hook_result."""
    for layer in range(bridge.cfg.n_layers):
        projection: Any = hand.part(f"blocks.{layer}.attn.o")
        weight = hand.w_o(projection)
        bias = getattr(projection, "bias", None)
        bias = torch.zeros(bridge.cfg.d_model) if bias is None else bias
        results = torch.einsum("bphd,hdm->bphm", cache["z", layer], weight)
        out = cache[f"blocks.{layer}.attn.o.hook_out"]
        assert byhand.gap(results.sum(2) + bias, out) < FLOAT
        assert byhand.gap(cache["result", layer], results) < FLOAT
        assert byhand.gap(cache["result", layer].sum(2) + bias, out) < FLOAT
        assert torch.equal(out, cache["attn_out", layer])


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_projections_are_weights_split_by_hand(
    bridge: Any, hand: Any, byhand: Any, cache: Any, part: str
) -> None:
    """q, k and v are the input times their own rows of the (joint) weight, head by head."""
    h, kv, d = hand.n_heads, hand.n_kv, hand.d_head
    n = h if part == "q" else kv
    start = {"q": 0, "k": h, "v": h + kv}[part] * d
    for layer in range(bridge.cfg.n_layers):
        module: Any = hand.part(f"blocks.{layer}.attn.{part}")
        weight = module.weight.T if hand.family == "gpt2" else module.weight  # [out, in]
        bias = torch.zeros(len(weight)) if module.bias is None else module.bias
        if hand.family in ("gpt2", "phi3"):
            weight, bias = weight[start : start + n * d], bias[start : start + n * d]
        elif hand.family == "gpt_neox":
            which = "qkv".index(part)
            rows = torch.cat([torch.arange(d) + (3 * head + which) * d for head in range(h)])
            weight, bias = weight[rows], bias[rows]
        assert len(weight) == n * d
        x = cache[f"blocks.{layer}.attn.{part}.hook_in"]
        assert torch.equal(x, cache[f"blocks.{layer}.attn.hook_in"])
        expected = (x @ weight.T + bias).view(2, 9, n, d)
        assert byhand.gap(cache[part, layer], expected) < FLOAT


def test_head_norms(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """Where heads are normalised, q_norm takes q and makes what is rotated."""
    has = hand.family == "qwen3"
    assert ("blocks.0.attn.q_norm.hook_out" in bridge.registry) == has
    for part in ("q", "k"):
        if has:
            for layer in range(bridge.cfg.n_layers):
                name = f"blocks.{layer}.attn.{part}_norm"
                assert torch.equal(cache[f"{name}.hook_in"], cache[part, layer])
                lengths = cache[f"blocks.{layer}.attn.hook_rot_{part}"].norm(dim=-1)
                assert byhand.gap(lengths, cache[f"{name}.hook_out"].norm(dim=-1)) < FLOAT
        else:
            assert "q_norm" in str(bridge.why(f"blocks.0.attn.{part}_norm.hook_out")).replace(
                "k_norm", "q_norm"
            )


# --- norms, MLP, ends -------------------------------------------------------------------------------------


def test_norms(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """input / scale = normalized, and the weights (1 + w in Gemma) make the output of it."""
    norms = [name.removesuffix(".hook_scale") for name in cache if name.endswith("hook_scale")]
    per_block = 1 + (hand.family != "phi") + 2 * (hand.family == "qwen3")
    assert len(norms) == per_block * bridge.cfg.n_layers + 1
    for name in norms:
        centred, scale, affine = hand.norm_inside(hand.part(name), cache[f"{name}.hook_in"])
        assert byhand.gap(cache[f"{name}.hook_scale"], scale) < FLOAT
        assert byhand.gap(cache[f"{name}.hook_normalized"], centred / scale) < FLOAT
        assert (
            byhand.gap(cache[f"{name}.hook_out"], affine(cache[f"{name}.hook_normalized"])) < FLOAT
        )
    assert bridge.cfg.normalization_type == (
        "LN" if hand.family in ("gpt2", "gpt_neox", "phi") else "RMS"
    )


def activation(family: str) -> Callable[[Tensor], Tensor]:
    if family in ("gpt2", "phi"):
        return lambda x: F.gelu(x, approximate="tanh")
    if family == "gemma":
        return lambda x: F.gelu(x, approximate="tanh")
    return F.gelu if family == "gpt_neox" else F.silu


def test_mlp(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """post is the activation of pre (times pre_linear in a gated MLP), and its projection is the output."""
    is_gated = hand.family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
    assert bridge.cfg.gated_mlp == is_gated
    for layer in range(bridge.cfg.n_layers):
        post = activation(hand.family)(cache["pre", layer])
        if is_gated:
            post = post * cache["pre_linear", layer]
        else:
            assert ("pre_linear", layer) not in cache
        assert byhand.gap(cache["post", layer], post) < FLOAT
        out: Any = hand.part(f"blocks.{layer}.mlp.out")
        assert torch.equal(out(cache["post", layer]), cache["mlp_out", layer])
        reader = "ln1" if hand.family == "phi" else "ln2"
        entering = cache[f"blocks.{layer}.{reader}.hook_out"]
        assert torch.equal(cache[f"blocks.{layer}.mlp.hook_in"], entering)


@pytest.mark.parametrize("family", ["phi3"], indirect=True)
def test_joint_gate_and_up(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """gate_up_proj: its first half is the gate (mlp.hook_pre), its second the ungated projection."""
    for layer in range(bridge.cfg.n_layers):
        joint: Any = hand.part(f"blocks.{layer}.mlp.gate")
        gate, up = joint.weight.chunk(2)
        x = cache[f"blocks.{layer}.mlp.hook_in"]
        assert byhand.gap(cache["pre", layer], x @ gate.T) < FLOAT
        assert byhand.gap(cache["pre_linear", layer], x @ up.T) < FLOAT


def test_ends(bridge: Any, hand: Any, byhand: Any, cache: Any, ids: Tensor) -> None:
    """Embedding, positions, final norm and head."""
    embed: Any = hand.part("embed")
    assert torch.equal(cache["embed.hook_in"], ids)
    # Gemma's embedding module multiplies by the width's root itself.
    factor = hand.config.hidden_size**0.5 if hand.family == "gemma" else 1.0
    assert torch.equal(cache["hook_embed"], embed.weight[ids] * factor)
    entering = cache["hook_embed"]
    if hand.family == "gpt2":
        table: Any = hand.part("pos_embed")
        assert torch.equal(cache["pos_embed.hook_in"], torch.arange(9)[None])
        assert torch.equal(cache["hook_pos_embed"], table.weight[:9][None])
        entering = entering + cache["hook_pos_embed"]
    assert byhand.gap(cache["resid_pre", 0], entering) < FLOAT
    head: Any = hand.part("unembed")
    assert torch.equal(cache["unembed.hook_in"], cache["ln_final.hook_out"])
    assert torch.equal(head(cache["ln_final.hook_out"]), cache["unembed.hook_out"])
    assert byhand.gap(cache["unembed.hook_out"], hand.logits(ids)) < FLOAT


def test_rotary(bridge: Any, hand: Any, byhand: Any, cache: Any) -> None:
    """cos and sin are those of positions times inverse frequencies."""
    if hand.family == "gpt2":
        assert "rotary" in str(bridge.why("rotary_emb.hook_cos"))
        return
    cos, sin = cache["rotary_emb.hook_cos"], cache["rotary_emb.hook_sin"]
    width = cos.shape[-1]
    partial = {"gpt_neox": 0.25, "phi": 0.5}.get(hand.family, 1.0)
    assert width == int(hand.d_head * partial)
    frequencies = 10000.0 ** -(torch.arange(0, width, 2) / width)
    angles = (torch.arange(9)[:, None] * frequencies).repeat(1, 2)
    assert byhand.gap(cos[0], angles.cos()) < FLOAT
    assert byhand.gap(sin[0], angles.sin()) < FLOAT
    # A rotation by these angles takes q to rot_q.
    source = (
        "blocks.0.attn.q_norm.hook_out" if hand.family == "qwen3" else "blocks.0.attn.q.hook_out"
    )
    q, rest = cache[source][..., :width], cache[source][..., width:]
    half = torch.cat([-q[..., width // 2 :], q[..., : width // 2]], -1)
    rotated = torch.cat([q * cos[:, :, None] + half * sin[:, :, None], rest], -1)
    assert byhand.gap(cache["rot_q", 0], rotated) < FLOAT


# --- bfloat16 ---------------------------------------------------------------------------------------------


def test_bfloat16(bridge: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
    """In bfloat16: same bits outside attention, bfloat16 error with it, rows that sum to one within it."""
    bridge.to(torch.bfloat16)
    hand.model.to(torch.bfloat16)
    expected = hand.logits(ids)
    logits, outside = bridge.run_with_cache(ids, names_filter=outside_attention(byhand))
    assert torch.equal(logits, expected)
    logits, cache = bridge.run_with_cache(ids, names_filter=lambda name: True)
    for layer in range(bridge.cfg.n_layers):
        pattern, scores = cache["pattern", layer], cache["attn_scores", layer]
        assert pattern.dtype == scores.dtype == torch.bfloat16
        assert (pattern.float().sum(-1) - 1).abs().max() < 2 * BF16
        assert (scores.float().softmax(-1) - pattern.float()).abs().max() <= BF16
        # The first layer's inputs are the same bits, so z differs by its own rounding alone.
        if layer == 0:
            assert byhand.gap(cache["z", 0], outside["z", 0]) < 2 * BF16
    # Rounding in attention is then amplified by what follows: measure that with the model's own two kernels.
    hand.model.set_attn_implementation("eager")
    between_kernels = byhand.gap(hand.logits(ids), expected)
    assert byhand.gap(logits, expected) <= max(2 * between_kernels, 4 * BF16)


def test_float64(bridge: Any, hand: Any, byhand: Any, ids: Tensor) -> None:
    """In float64 opening attention costs float64 error, no more: nothing passes through float32 on the way."""
    bridge.to(torch.float64)
    hand.model.to(torch.float64)
    logits, _ = bridge.run_with_cache(ids, names_filter=byhand.is_inside)
    difference = (logits - hand.logits(ids)).abs().max() / logits.abs().max()
    assert difference < 1e-13
